"""What an example's drop is held against: texts of its band, none its own, none that the model recites."""

from collections.abc import Sequence
from math import inf

import pytest
import torch

from trainer_client.calibrators import CORRUPTED_PERMILLE, Calibrators, corrupted

TEXTS = tuple(bytes([65 + number]) * 64 for number in range(30))
DEGREES = len(CORRUPTED_PERMILLE)


class Measured:
    """Drops by the text's place among the calibrators; those of ``recited`` originals have a signal."""

    def __init__(self, calibrators: Calibrators, recited: Sequence[bytes] = ()) -> None:
        self.calibrators = calibrators
        self.recited = recited
        self.asked: list[bytes] = []

    def __call__(self, texts: Sequence[bytes]) -> list[tuple[float, int]]:
        self.asked += texts
        places = [self.calibrators.texts.index(text) for text in texts]
        return [(float(place), 900 if text in self.recited else 0) for place, text in zip(places, texts, strict=True)]


def limit(calibrators: Calibrators, measure: Measured, base_loss: float, **changes: object) -> float:
    """Text n has base loss n as it is, and a hundred more at each degree of corruption."""
    count, degrees = len(calibrators.texts) // DEGREES, torch.arange(DEGREES, dtype=torch.float32)
    base_losses_C = (torch.arange(count, dtype=torch.float32)[:, None] + 100 * degrees).flatten()
    asked: dict[str, object] = {"count": 12, "quantile_permille": 1_000, "but": b"", "copied_permille": 500, **changes}
    return calibrators.limit(base_losses_C, base_loss, measure, **asked)  # type: ignore[arg-type]


def place(number: int, degree: int = 0) -> float:
    """The drop that ``Measured`` gives a text."""
    return float(number * DEGREES + degree)


@pytest.mark.parametrize("text", [bytes(range(32, 127)), bytes(200), b"ab" * 64])
def test_corruption_goes_from_nothing_to_every_byte_and_is_the_same_each_time(text: bytes) -> None:
    texts = [corrupted(text, permille) for permille in CORRUPTED_PERMILLE]
    assert texts == [corrupted(text, permille) for permille in CORRUPTED_PERMILLE]
    changed = [sum(mine != theirs for mine, theirs in zip(text, each, strict=True)) for each in texts]
    assert changed[0] == 0
    assert changed == sorted(changed)
    assert changed[-1] > 0.95 * len(text)
    for permille, count in zip(CORRUPTED_PERMILLE, changed, strict=True):
        assert abs(count - permille * len(text) / 1_000) < 0.2 * len(text)


def test_band_is_of_the_calibrators_nearest_in_base_loss() -> None:
    calibrators = Calibrators(TEXTS)
    measure = Measured(calibrators)
    assert limit(calibrators, measure, 15.25) == place(21)
    assert limit(calibrators, measure, 15.25, quantile_permille=0) == place(10)
    assert limit(calibrators, measure, 0.0) == place(11)


@pytest.mark.parametrize(
    ("base_loss", "degree", "number"),
    [(-50.0, 0, 11), (29.0, 0, 29), (40.0, 0, 29), (80.0, 1, 11), (329.5, 3, 29), (900.0, 5, 29)],
)
def test_band_is_of_the_least_corruption_that_reaches_the_loss_or_comes_nearest(
    base_loss: float, degree: int, number: int
) -> None:
    calibrators = Calibrators(TEXTS)
    assert limit(calibrators, Measured(calibrators), base_loss) == place(number, degree)


@pytest.mark.parametrize(("permille", "rank"), [(500, 7), (900, 12), (920, 12), (1, 1)])
def test_limit_is_the_quantile_that_one_more_text_like_them_exceeds_no_more_often(permille: int, rank: int) -> None:
    """Of 12 drops and one more alike, it is above the k-th in (13 - k) of 13 cases."""
    calibrators = Calibrators(TEXTS)
    assert limit(calibrators, Measured(calibrators), 0.0, quantile_permille=permille) == place(rank - 1)
    assert (13 - rank) / 13 <= 1 - permille / 1_000


def test_text_is_never_held_against_itself_however_corrupted() -> None:
    calibrators = Calibrators(TEXTS)
    assert limit(calibrators, Measured(calibrators), 0.0, but=TEXTS[0], quantile_permille=0) == place(1)
    assert limit(calibrators, Measured(calibrators), 200.0, but=TEXTS[0], quantile_permille=0) == place(1, 2)


def test_text_that_the_model_recites_calibrates_nothing_and_neither_do_its_corruptions() -> None:
    calibrators = Calibrators(TEXTS)
    measure = Measured(calibrators, recited=TEXTS[:3])
    assert limit(calibrators, measure, 0.0, quantile_permille=0) == place(3)
    assert limit(calibrators, measure, 0.0) == place(14)
    assert limit(calibrators, measure, 300.0, quantile_permille=0) == place(3, 3)


def test_where_every_calibrator_is_recited_any_drop_is_above_the_limit() -> None:
    calibrators = Calibrators(TEXTS)
    assert limit(calibrators, Measured(calibrators, recited=TEXTS), 0.0) == -inf


def test_calibrators_are_measured_once_until_they_are_forgotten() -> None:
    calibrators = Calibrators(TEXTS)
    measure = Measured(calibrators)
    limit(calibrators, measure, 0.0)
    limit(calibrators, measure, 0.0)
    assert len(measure.asked) == len(set(measure.asked)) == 12
    calibrators.forget()
    limit(calibrators, measure, 0.0)
    assert len(measure.asked) == 24
