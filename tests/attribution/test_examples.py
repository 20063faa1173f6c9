"""From a source to its examples, by sketches: what a trace opens, and what it does with files that are not right."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attribution_fixtures import CAMPAIGN, CONFIG, FACTS, SKETCH_RANK, STEPS, ask, build, opened_log, traced
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from sketch_fixtures import unpacked
from torch import Tensor

from attribution.controls import Queries, deviations
from attribution.examples import JUDGED_EXAMPLES, Allowance, Asked, SourceExamples, source_examples
from attribution.query import Output, log_odds_gradients
from attribution.sketches import RunFolder, Sketches, SketchQuery, open_sketches
from attribution.trace import SHAPED_Z
from attribution.weights import WindowFile, find_windows, linear_weights
from consensus.accumulators import WindowEntry
from consensus.rejection import Reason, Rejected
from trainer_client.demo.model import ByteModel

ROWS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(traced().folder, tmp_path / "traced")
    return tmp_path / "traced"


def windows(folder: Path) -> tuple[WindowFile, ...]:
    return find_windows(folder / "run" / "accumulators", CAMPAIGN, opened_log().provenance.windows).found


def entry_of(file: WindowFile, name: str = "harbour") -> WindowEntry:
    (found,) = (entry for entry in file.listed.of_sources if entry.source == traced().sources[name])
    return found


def sketch_path(file: WindowFile, entry: WindowEntry) -> Path:
    return file.directory / "blobs" / f"{entry.sketches_sha256.hex()}.safetensors"


def query() -> dict[str, Tensor]:
    model = ByteModel(CONFIG)
    model.load_state_dict(load_file(traced().folder / "tuned.safetensors"))
    prompt, completion = FACTS["harbour"]
    return log_odds_gradients(model, Output(tuple(prompt + completion), len(prompt), len(prompt + completion)))


def opened(folder: Path, asked: dict[str, Tensor], exact: float = 1.0) -> SourceExamples:
    whose = Asked(traced().sources["harbour"], exact, {})
    (found,) = source_examples(SketchQuery(asked), windows(folder), [whose], RunFolder(), Allowance())
    return found


def checked(file: WindowFile, entry: WindowEntry, asked: dict[str, Tensor]) -> Sketches:
    return open_sketches(RunFolder(), file, entry).check(file, entry, SketchQuery(asked).shapes)


def test_trace_names_the_leading_sources_examples_and_how_much_of_it_they_make() -> None:
    completion = FACTS["harbour"][1].decode()
    result = ask(traced().folder, "--completion", completion, "--json")
    document = json.loads(result.stdout)
    found, *_ = document["examples"]  # of other sources too, where one stands out as well
    assert found["source"] == document["sources"][0]["source"] == traced().sources["harbour"].hex()
    assert (found["rank"], found["left_out"]) == (SKETCH_RANK, [])
    assert 0.1 < found["covered"] < 1.25
    assert found["covered"] * document["sources"][0]["score"] == pytest.approx(
        sum(row["score"] for row in found["ranked"]), rel=1e-6
    )
    scores = [row["score"] for row in found["ranked"]]
    assert scores == sorted(scores, reverse=True)
    assert {row["example"] for row in found["ranked"]} <= set(range(ROWS))
    for row in found["ranked"]:
        assert sum(row["by_window"].values()) == pytest.approx(row["score"])
        assert row["steps"] == sorted(set(row["steps"]))
        assert all(1 <= step <= STEPS for step in row["steps"])
    judged = [row["z"] for row in found["ranked"]]
    assert all(z > SHAPED_Z for z in judged[:JUDGED_EXAMPLES])
    assert set(judged[JUDGED_EXAMPLES:]) == {None}
    text = ask(traced().folder, "--completion", completion).stdout
    assert f"examples of harbour, by {found['opened']} sketches of rank {SKETCH_RANK}" in text
    assert "single examples: this campaign keeps no sketches" not in text


def test_score_of_an_example_is_the_inner_product_of_its_sketched_gradients() -> None:
    asked = query()
    file = windows(traced().folder)[0]
    entry = entry_of(file)
    tensors = load_file(sketch_path(file, entry))
    expected = torch.zeros(len(tensors["examples"]), dtype=torch.float64)
    for name, gradient in asked.items():
        left, right = (
            unpacked(tensors[f"{name}/{label}"], size)
            for label, size in zip(("left", "right"), gradient.shape, strict=True)
        )
        scale = tensors[f"{name}/scale"].double()
        expected -= torch.einsum("nr,nrp,nrq,pq->n", scale, left, right, gradient.double())
    found = checked(file, entry, asked).scores(SketchQuery(asked))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-9)


def test_first_examples_stand_above_their_own_scores_for_the_controls() -> None:
    asked = query()
    random = torch.Generator().manual_seed(5)
    scale = {name: gradient.norm() / gradient.numel() ** 0.5 for name, gradient in asked.items()}
    controls = [
        {name: torch.randn(gradient.shape, generator=random) * scale[name] for name, gradient in asked.items()}
        for _ in range(30)
    ]
    everything = [asked, *controls]
    lengths = [1.0 + number / 10 for number in range(len(everything))]
    beside = Queries({name: torch.stack([each[name] for each in everything]) for name in asked}, lengths)
    files = windows(traced().folder)
    whose = Asked(traced().sources["harbour"], 1.0, {})
    (found,) = source_examples(SketchQuery(asked), files, [whose], RunFolder(), Allowance(), [beside])
    scores = torch.zeros(len(everything), ROWS, dtype=torch.float64)
    for file in files:
        held = checked(file, entry_of(file), asked)
        for number, each in enumerate(everything):
            scores[number, held.examples] += held.scores(SketchQuery(each))
    for row in found.ranked[:JUDGED_EXAMPLES]:
        assert row.score == pytest.approx(scores[0, row.example].item(), rel=1e-4)
        assert row.z == pytest.approx(deviations(scores[:, row.example].tolist(), lengths), rel=1e-3)
    assert len(found.ranked) == ROWS > JUDGED_EXAMPLES
    assert {row.z for row in found.ranked[JUDGED_EXAMPLES:]} == {None}


def test_sketches_that_change_between_score_and_judgement_are_refused(folder: Path) -> None:
    asked, file = query(), windows(folder)[0]
    held = checked(file, entry_of(file), asked)
    path = sketch_path(file, entry_of(file))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    queries = {name: gradient[None] for name, gradient in asked.items()}
    assert float(held.scores_of([ROWS + 1], queries).abs().max()) == 0.0, "an example that is not here was looked for"
    with pytest.raises(Rejected, match="changed while it was read"):
        held.scores_of([int(held.examples[0])], queries)


def test_source_nobody_lists_has_no_examples() -> None:
    whose = Asked(bytes(32), 1.0, {})
    assert not source_examples(SketchQuery(query()), windows(traced().folder), [whose], RunFolder(), Allowance())


@pytest.mark.parametrize("spoil", ["missing", "flipped", "longer", "header"])
def test_file_that_is_not_the_one_committed_to_is_left_out_and_named(folder: Path, spoil: str) -> None:
    file = windows(folder)[1]
    path = sketch_path(file, entry_of(file))
    content = path.read_bytes()
    if spoil == "missing":
        path.unlink()
    elif spoil == "header":
        path.write_bytes(content[:8] + b"?" + content[9:])
    else:
        path.write_bytes(content + b"x" if spoil == "longer" else content[:-1] + bytes([content[-1] ^ 1]))
    whole, found = opened(traced().folder, query()), opened(folder, query())
    assert 0 < found.opened < whole.opened
    (why,) = found.left_out
    assert why.startswith(f"steps {file.window.first} to {file.window.last}: ")
    assert ("not-found" if spoil == "missing" else "digest-mismatch") in why
    result = ask(folder, "--completion", FACTS["harbour"][1].decode())
    assert result.exit_code == 0
    assert "left out  steps" in result.stdout


def forged(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> tuple[WindowFile, WindowEntry]:
    """A window whose list commits to other sketches than the honest ones."""
    file = windows(folder)[0]
    entry = entry_of(file)
    tensors = load_file(sketch_path(file, entry))
    change(tensors)
    path = folder / "forged.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).digest()
    (file.directory / "blobs" / f"{digest.hex()}.safetensors").write_bytes(content)
    return file, replace(entry, sketches_sha256=digest, sketches_bytes=len(content))


NAME = "blocks.0.expand.weight"


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def _with(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors.get(name, torch.zeros(1)))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("examples"), "expected examples"),
        (_with("examples", lambda t: t.int()), "expected examples"),
        (_with("examples", lambda t: t[:0]), "expected examples"),
        (_with("examples", lambda t: t.flip(0)), "strictly increasing"),
        (_with("examples", lambda t: t - 1), "strictly increasing"),
        (_with("examples", lambda t: t[:-1]), "not of the examples listed"),
        (_without("visits"), "expected visits"),
        (_with("visits", lambda t: t.int()), "expected visits"),
        (_with("visits", lambda t: t[:, :1]), "expected visits"),
        (_with("visits", lambda t: t.flip(0)), "strictly increasing"),
        (_with("visits", lambda t: t + torch.tensor([1_000, 0])), "outside of the steps"),
        (_with("visits", lambda t: t - torch.tensor([0, 1_000])), "not of the examples listed"),
        (_without(f"{NAME}/scale"), "are not whole"),
        (_with(f"{NAME}/scale", lambda t: t[:1]), "not of this model's shapes"),
        (_with(f"{NAME}/scale", lambda t: t.fill_(float("nan"))), "not of this model's shapes"),
        (_with(f"{NAME}/scale", lambda t: t.double()), "not of this model's shapes"),
        (_with(f"{NAME}/left", lambda t: t.to(torch.int8)), "not of this model's shapes"),
        (_with(f"{NAME}/left", lambda t: t[:, :, :1]), "not of this model's shapes"),
        (_with(f"{NAME}/right", lambda t: t[:, :1]), "not of this model's shapes"),
        (_with(f"{NAME}/right", lambda t: t[0]), "not of this model's shapes"),
        (_with("stray", lambda t: t), "are not whole"),
        (_with(f"{NAME}/left/more", lambda t: t), "are not whole"),
    ],
)
def test_sketches_that_no_trainer_of_ours_writes_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    file, entry = forged(folder, change)
    with pytest.raises(Rejected) as refusal:
        checked(file, entry, query())
    assert refusal.value.reason is Reason.MALFORMED
    assert message in refusal.value.detail


def test_file_that_is_no_safetensors_is_refused(folder: Path) -> None:
    file = windows(folder)[0]
    content = b"\xff" * 40
    digest = hashlib.sha256(content).digest()
    (file.directory / "blobs" / f"{digest.hex()}.safetensors").write_bytes(content)
    entry = replace(entry_of(file), sketches_sha256=digest, sketches_bytes=len(content))
    with pytest.raises(Rejected) as refusal:
        checked(file, entry, query())
    assert refusal.value.reason is Reason.MALFORMED


def test_every_linear_of_the_model_is_sketched() -> None:
    file = windows(traced().folder)[0]
    held = checked(file, entry_of(file), query())
    assert set(held.parameters) == set(linear_weights(build()))
