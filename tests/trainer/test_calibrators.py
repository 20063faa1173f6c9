"""What an example's drop is held against: texts of its band, none its own, none that the model recites."""

from collections.abc import Sequence
from math import inf

import pytest
import torch

from trainer_client.calibrators import CORRUPTED_PERMILLE, Calibrators, corrupted

TEXTS = tuple(bytes([65 + number]) * 64 for number in range(30))
DEGREES = len(CORRUPTED_PERMILLE)


class Measured:
    """Drops by the text's first appearance among the calibrators; those of ``recited`` originals have a signal."""

    def __init__(self, calibrators: Calibrators, recited: Sequence[bytes] = ()) -> None:
        self.calibrators = calibrators
        self.recited = recited
        self.asked: list[bytes] = []

    def __call__(self, texts: Sequence[bytes]) -> list[tuple[float, int]]:
        self.asked += texts
        places = [self.calibrators.texts.index(text) for text in texts]
        return [(float(place), 900 if text in self.recited else 0) for place, text in zip(places, texts, strict=True)]


def limit(calibrators: Calibrators, measure: Measured, base_loss: float, **changes: object) -> float:
    """With base losses that are the calibrators' places."""
    base_losses_C = torch.arange(len(calibrators.texts), dtype=torch.float32)
    asked: dict[str, object] = {"count": 12, "quantile_permille": 1_000, "but": b"", "copied_permille": 500, **changes}
    return calibrators.limit(base_losses_C, base_loss, measure, **asked)  # type: ignore[arg-type]


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
    assert limit(calibrators, measure, 100.25) == 106.0
    assert limit(calibrators, measure, 100.25, quantile_permille=0) == 95.0
    assert limit(calibrators, measure, 0.0) == 11.0


def test_quantile_is_of_the_band() -> None:
    calibrators = Calibrators(TEXTS)
    measure = Measured(calibrators)
    assert limit(calibrators, measure, 0.0, quantile_permille=500) == 5.0
    assert limit(calibrators, measure, 0.0, quantile_permille=950) == 10.0


def test_text_is_never_held_against_itself_however_corrupted() -> None:
    calibrators = Calibrators(TEXTS)
    found = limit(calibrators, Measured(calibrators), 6.0, but=TEXTS[1], quantile_permille=0)
    assert found == 0.0
    band = [number for number in range(6 * DEGREES) if not DEGREES <= number < 2 * DEGREES]
    assert limit(calibrators, Measured(calibrators), 6.0, but=TEXTS[1]) == float(band[11])


def test_text_that_the_model_recites_calibrates_nothing_and_neither_do_its_corruptions() -> None:
    calibrators = Calibrators(TEXTS)
    measure = Measured(calibrators, recited=TEXTS[:3])
    assert limit(calibrators, measure, 0.0, quantile_permille=0) == 3.0 * DEGREES
    assert limit(calibrators, measure, 0.0) == 5.0 * DEGREES - 1


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
