"""Who is suspected in which step, and what a suspicion leads to."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from consensus.portions import ManifestRange, MemorizationSignal
from consensus.rejection import InvariantBroken
from consensus.sampler import presented_examples
from trainer_client.memorization import MemorizationDetector, hits_of
from trainer_client.memorization_watch import SWEPT_EXAMPLES, DetectorCheck, MemorizationWatch, last_pass_from
from trainer_client.record import Example

SOURCE, OTHER = bytes([1]) * 32, bytes([2]) * 32
THRESHOLD_PERMILLE = 600
MODEL = nn.Identity()
TEXT = bytes(range(65, 129))
BOILERPLATE = bytes(range(129, 193))
REPETITIVE = bytes(64)
NOBODY = torch.zeros(1, 63, dtype=torch.bool)


def recited_bytes(count: int) -> Tensor:
    """Hits as of one text of 64 bytes of which ``count`` are continued after the prompt."""
    hits_BT = NOBODY.clone()
    hits_BT[0, 15 : 15 + count] = True
    return hits_BT


def as_logits(hits_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits over two symbols, and targets, of which exactly the hits are the likeliest."""
    target_BT = torch.zeros(hits_BT.shape, dtype=torch.int64)
    return torch.stack([hits_BT.float(), (~hits_BT).float()], dim=-1), target_BT


class Recorder:
    """A check by hits alone: a text's run of hits in permille of 48; ``recited`` are its signals after the step."""

    def __init__(self, recited: Mapping[Example, int] | None = None) -> None:
        self.recited = recited or {}
        self.assessed: list[list[Example]] = []
        self.calibrators: dict[bytes, tuple[bytes, ...]] = {}

    def glance(self, examples: Mapping[Example, bytes], hits_BT: Tensor, floor_permille: int) -> list[Example]:
        signals = (hits_BT.sum(dim=1) * 1_000 // 48).tolist()
        return [name for name, signal in zip(examples, signals, strict=True) if signal > floor_permille]

    def signals(self, model: nn.Module, examples: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
        self.assessed.append(list(examples))
        return {name: self.recited[name] for name in examples if name in self.recited}

    def calibrate_on(self, source: bytes, texts: Sequence[bytes]) -> None:
        self.calibrators[source] = tuple(texts)


def suspected(step: int, predicted: tuple[Tensor, Tensor] | None, last_pass_from: int = 100) -> bool:
    watch = MemorizationWatch(Recorder(), every_steps=5, last_step=99, most_at_once=4, last_pass_from=last_pass_from)
    watch.look(step, {(SOURCE, 0): TEXT}, predicted, THRESHOLD_PERMILLE)
    return watch.has_suspects


@pytest.mark.parametrize(
    ("step", "recited", "expected"),
    [(4, 28, False), (4, 29, True), (5, 7, False), (5, 8, True), (99, 0, True)],
)
def test_glance_suspects_above_the_threshold_always_and_above_a_quarter_when_due(
    step: int, recited: int, expected: bool
) -> None:
    assert suspected(step, as_logits(recited_bytes(recited))) is expected


@pytest.mark.parametrize(("step", "expected"), [(86, False), (87, True), (88, True)])
def test_every_step_is_due_where_an_example_may_be_shown_for_the_last_time(step: int, expected: bool) -> None:
    assert suspected(step, as_logits(recited_bytes(8)), last_pass_from=87) is expected
    assert not suspected(step, as_logits(recited_bytes(7)), last_pass_from=87)
    assert not suspected(step, None, last_pass_from=87)


@pytest.mark.parametrize(
    ("examples", "batch_size", "planned_steps", "expected"),
    [(192, 16, 180, 169), (192, 16, 185, 169), (192, 16, 191, 169), (192, 16, 192, 181), (50, 16, 7, 4)],
)
def test_last_pass_begins_where_no_later_whole_pass_does(
    examples: int, batch_size: int, planned_steps: int, expected: int
) -> None:
    assert last_pass_from(examples, batch_size, planned_steps) == expected
    manifest, seed = (ManifestRange(SOURCE, 0, examples),), bytes(32)
    passes = range(1, planned_steps + 1, examples // batch_size)
    shown = presented_examples(manifest, seed, batch_size, expected)
    assert expected in passes
    assert len({*shown, *presented_examples(manifest, seed, batch_size, expected + 1)}) == 2 * batch_size


@pytest.mark.parametrize(("examples", "planned_steps"), [(192, 12), (192, 5), (8, 1)])
def test_run_of_no_more_than_one_pass_is_looked_at_closely_from_its_first_step(
    examples: int, planned_steps: int
) -> None:
    assert last_pass_from(examples, 16, planned_steps) == 1


@pytest.mark.parametrize(("step", "expected"), [(4, False), (5, True), (99, True)])
def test_without_logits_everybody_is_suspected_when_due(step: int, expected: bool) -> None:
    assert suspected(step, None) is expected


def test_without_a_check_nobody_is_suspected() -> None:
    watch: MemorizationWatch[bytes] = MemorizationWatch(
        None, every_steps=1, last_step=1, most_at_once=4, last_pass_from=100
    )
    watch.look(1, {(SOURCE, 0): TEXT}, None, THRESHOLD_PERMILLE)
    assert not watch.has_suspects
    assert watch.signals(MODEL, THRESHOLD_PERMILLE) == ()


def test_suspects_of_one_step_are_forgotten_in_the_next() -> None:
    watch = MemorizationWatch(Recorder(), every_steps=1, last_step=99, most_at_once=4, last_pass_from=100)
    watch.look(1, {(SOURCE, 0): TEXT}, None, THRESHOLD_PERMILLE)
    watch.begin()
    assert not watch.has_suspects


def test_suspects_of_all_micro_batches_are_assessed_few_at_once_in_order() -> None:
    check = Recorder({(SOURCE, 1): 700, (SOURCE, 4): 5})
    watch = MemorizationWatch(check, every_steps=1, last_step=99, most_at_once=2, last_pass_from=100)
    for first in (3, 0):
        watch.look(1, {(SOURCE, first + offset): TEXT for offset in range(3)}, None, THRESHOLD_PERMILLE)
    found = watch.signals(MODEL, THRESHOLD_PERMILLE)
    assert found == (MemorizationSignal(SOURCE, 1, 700), MemorizationSignal(SOURCE, 4, 5))
    assert [len(names) for names in check.assessed] == [2, 2, 2]


def test_sweep_finds_recited_neighbours_and_leaves_out_known_ones() -> None:
    check = Recorder({(SOURCE, 11): 1_000, (SOURCE, 12): THRESHOLD_PERMILLE, (OTHER, 10): 1_000})
    watch = MemorizationWatch(check, every_steps=1, last_step=99, most_at_once=1_000, last_pass_from=100)
    sources = {SOURCE: [TEXT] * 500, OTHER: [TEXT] * 500}
    found = watch.sweep(MODEL, [(SOURCE, 10)], sources, {(SOURCE, 9)}, THRESHOLD_PERMILLE)
    assert found == (MemorizationSignal(SOURCE, 11, 1_000),)
    (swept,) = check.assessed
    assert len(swept) == SWEPT_EXAMPLES
    assert not {(SOURCE, 9), (SOURCE, 10)} & set(swept)
    assert max(number for _, number in swept) < 10 + SWEPT_EXAMPLES


def detector(asked: list[bytes]) -> MemorizationDetector:
    """Over a base model that continues ``BOILERPLATE`` alone; notes which texts were asked of it."""

    def predictions(model: nn.Module, texts: object) -> tuple[Tensor, Tensor]:
        asked.extend(texts)  # type: ignore[arg-type]
        hits = [torch.full((63,), text == BOILERPLATE) for text in texts]  # type: ignore[attr-defined]
        return torch.zeros(len(hits), 63), torch.stack(hits)

    return MemorizationDetector(nn.Identity(), [TEXT] * 24, predictions)


def test_glance_asks_the_base_model_only_about_texts_that_may_be_recited() -> None:
    asked: list[bytes] = []
    texts = [TEXT, BOILERPLATE, REPETITIVE, TEXT[::-1]]
    hits_BT = torch.cat([recited_bytes(count) for count in (40, 40, 40, 5)])
    assert detector(asked).glance(texts, hits_BT, 300) == (0,)
    assert asked == [TEXT, BOILERPLATE]


def test_hits_of_another_pass_are_refused() -> None:
    check = DetectorCheck(detector([]))
    with pytest.raises(InvariantBroken, match=r"expected \(1, 63\) targets, found \(1, 64\)"):
        check.glance({(SOURCE, 0): TEXT}, torch.ones(1, 64, dtype=torch.bool), 0)


def test_hits_count_ties() -> None:
    logits_BTV = torch.tensor([[[1.0, 1.0], [2.0, 1.0], [0.0, 1.0]]])
    assert hits_of(logits_BTV, torch.zeros(1, 3, dtype=torch.int64)).tolist() == [[True, True, False]]
