"""A store of a million example-visits: building its index, and one trace through it, cold and warm, with its memory.

The model is the demonstration's transformer at the width named, 6 layers: 24 weights of linears beside the head, which
counts too where a query meets accumulators. Synthetic are the sums, the sketches (random numbers in the product's own
files, each example visited once) and, of the log, the campaign's record; windows, lists, roots and digests are the
product's own and are held to as in ``countersign trace``. Three of the sources were given the query's direction, so
that they stand out and theirs are the sketches opened. Sources of one window share their files of sketches, a few for
each window, so that the run's folder stays small; the index holds every source's rows.

The trace runs in a process of its own (gradients of the output and 40 controls, accumulators of every source, sketches
of three); its time is that of everything but imports and loading the model and the factors. *Cold*: the system has
dropped the files from memory. Its threads wait for each other asleep (``OMP_WAIT_POLICY=PASSIVE``), as they should
where other programs use the cores: awake, they were twenty times slower there.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from harness import Report, at_most, progress, run_benchmark, watch_load
from safetensors.torch import load_file, save_file

from attribution.examples import OPEN_AT_MOST, Allowance
from attribution.factors import factor_tensors, factors_from, fit_factors
from attribution.index import SketchedCampaign, open_index
from attribution.index_build import build_index, check_index
from attribution.query import Output
from attribution.trace import control_outputs, preconditioned_queries, trace_output
from attribution.weights import find_windows, linear_weights
from consensus.accumulators import VERSION, AccumulatorWindow, WindowEntry, WindowTerms, window_root
from consensus.codec import encode
from consensus.predicates.accumulators import Window
from trainer_client.demo.model import ByteModel, ModelConfig, parameter_blocks

CHAIN, CAMPAIGN, POLICY = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32
LAYERS, CONTEXT, CONTROLS = 6, 128, 40
SOURCES, WINDOWS, WINDOW_STEPS, LEADING = 32, 5, 50, 3
FILES_OF_A_WINDOW = 4
RANK = 1
QUERY_SECONDS, QUERY_BYTES = 10.0, 2e9


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a store is; examples of one source in one window, each visited once."""

    width: int
    examples: int

    @property
    def visits(self) -> int:
        """In all of the store."""
        return SOURCES * WINDOWS * self.examples

    def model(self) -> ByteModel:
        """The same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return ByteModel(ModelConfig(context_bytes=CONTEXT, layer_count=LAYERS, head_count=4, width=self.width))


def outputs() -> tuple[Output, tuple[Output, ...]]:
    """What is asked about, and the controls."""
    texts = torch.randint(256, (CONTROLS + 1, 64), generator=torch.Generator().manual_seed(2)).tolist()
    asked = Output(tuple(texts[0]), 40, 64)
    return asked, control_outputs(texts[1:], asked)


def source_id(number: int) -> bytes:
    """Of a source, in the order of ids."""
    return number.to_bytes(32, "big")


def sketched(model: ByteModel) -> list[str]:
    """The 24 weights."""
    return [name for name in linear_weights(model) if not name.startswith("head")]


class Store:
    """A run's folder, made up."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder = folder
        self.sizes = sizes
        for name in ("windows", "blobs"):
            (folder / name).mkdir(parents=True)

    def make(self) -> None:
        """Sums that add up, sketches, lists."""
        model = self.sizes.model()
        texts = torch.randint(256, (64, CONTEXT), generator=torch.Generator().manual_seed(3))
        factors = fit_factors(model, list(texts.split(16)))
        save_file(factor_tensors(factors), self.folder / "factors")
        asked, _ = outputs()
        queries, _ = preconditioned_queries(model, factors, [asked])
        query = {name: gradients_KPQ[0] for name, gradients_KPQ in queries.items()}
        windows = [self._window(model, query, number) for number in range(WINDOWS)]
        (self.folder / "windows.json").write_text(json.dumps(windows))

    def _window(self, model: ByteModel, query: dict[str, torch.Tensor], number: int) -> tuple[int, int, str]:
        progress(f"making window {number + 1} of {WINDOWS}")
        first, last = number * WINDOW_STEPS + 1, (number + 1) * WINDOW_STEPS
        random = torch.Generator().manual_seed(100 + number)
        files = [self._sketches(model, first, random) for _ in range(FILES_OF_A_WINDOW)]
        total = {name: torch.zeros_like(gradient) for name, gradient in query.items()}
        entries = []
        for source in range(SOURCES):
            sums = {}
            for name, gradient in query.items():
                noise = torch.randn(gradient.shape, generator=random) * gradient.norm() / gradient.numel() ** 0.5
                leads = LEADING - source if source < LEADING else 0
                sums[name] = (noise - 0.1 * leads * gradient).bfloat16()
                total[name] += sums[name].float()
            digest, size_bytes = self._blob(sums)
            entries.append(WindowEntry(POLICY, source_id(source), digest, size_bytes, *files[source % len(files)]))
        whole = WindowEntry(b"", b"", *self._blob({name: held.bfloat16() for name, held in total.items()}), b"", 0)
        window = AccumulatorWindow(VERSION, WindowTerms(CAMPAIGN, first, last), (whole, *entries))
        root = window_root(window)
        (self.folder / "windows" / f"{root.hex()}.window").write_bytes(encode(window))
        return first, last, root.hex()

    def _sketches(self, model: ByteModel, first_step: int, random: torch.Generator) -> tuple[bytes, int]:
        count = self.sizes.examples
        examples = torch.arange(count)
        steps = first_step + examples * WINDOW_STEPS // count
        tensors = {"examples": examples, "visits": torch.stack([steps, examples], dim=1)}
        shapes = {name: held.weight.shape for name, held in linear_weights(model).items()}
        for name in sketched(model):
            for part, size in zip(("left", "right"), shapes[name], strict=True):
                low, high = torch.randint(1, 16, (2, count, RANK, size // 2), generator=random, dtype=torch.uint8)
                tensors[f"{name}/{part}"] = low | (high << 4)
            tensors[f"{name}/scale"] = torch.rand(count, RANK, generator=random) * 1e-3
        return self._blob(tensors)

    def _blob(self, tensors: dict[str, torch.Tensor]) -> tuple[bytes, int]:
        unfinished = self.folder / "unfinished"
        save_file(tensors, unfinished)
        with unfinished.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        size_bytes = unfinished.stat().st_size
        unfinished.rename(self.folder / "blobs" / f"{digest.hex()}.safetensors")
        return digest, size_bytes


def terms_of(folder: Path, sizes: Sizes) -> SketchedCampaign:
    """What a log would say."""
    listed = json.loads((folder / "windows.json").read_text())
    windows = tuple(Window(first, last, bytes.fromhex(root), None) for first, last, root in listed)
    shapes = {name: tuple(held.weight.shape) for name, held in linear_weights(sizes.model()).items()}
    return SketchedCampaign(CHAIN, CAMPAIGN, RANK, shapes, windows)


def provenance_of(terms: SketchedCampaign, sizes: Sizes) -> SimpleNamespace:
    """The campaign's record and its sources."""
    blocks = [
        SimpleNamespace(name=block, tensors=[SimpleNamespace(name=name) for name in names])
        for block, names in parameter_blocks(sizes.model()).items()
    ]
    sources = [
        SimpleNamespace(
            id=source_id(number), admitted=1, record=SimpleNamespace(claim=SimpleNamespace(name=f"source {number}"))
        )
        for number in range(SOURCES)
    ]
    return SimpleNamespace(campaign=SimpleNamespace(parameter_blocks=blocks), sources=sources, windows=terms.windows)


def ask(folder: Path, index_folder: Path, sizes: Sizes) -> None:
    """One trace, in this process; prints what it took."""
    model = sizes.model()
    factors = factors_from(load_file(folder / "factors"), model)
    terms = terms_of(folder, sizes)
    provenance = provenance_of(terms, sizes)
    asked, controls = outputs()
    used = time.process_time()
    stages: list[tuple[str, float]] = [("lists and sums held to their roots", time.monotonic())]
    search = find_windows(folder, CAMPAIGN, terms.windows)
    stages.append(("index opened", time.monotonic()))
    index = open_index(index_folder, terms)

    def told(stage: str) -> None:
        kind = {"g": "gradients", "s": "accumulators of all sources", "e": "sketches of three sources"}[stage[0]]
        if stages[-1][0] != kind:
            stages.append((kind, time.monotonic()))

    allowance = Allowance(OPEN_AT_MOST)
    trace = trace_output(model, model, factors, provenance, search.found, asked, controls, told, index, allowance)
    ends = [began for _, began in stages[1:]] + [time.monotonic()]
    assert not search.missing
    assert {found.source for found in trace.examples} == {source_id(number) for number in range(LEADING)}
    assert not any(found.left_out for found in trace.examples)
    document = {
        "seconds": ends[-1] - stages[0][1],
        "cpu_seconds": time.process_time() - used,
        "stages": {name: round(end - began, 2) for (name, began), end in zip(stages, ends, strict=True)},
        "opened_visits": sum(found.visits for found in trace.examples),
        "unopened_visits": sum(found.unopened_visits for found in trace.examples),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024,
    }
    print(json.dumps(document))


def asked_apart(folder: Path, index_folder: Path, sizes: Sizes, threads: int) -> dict[str, object]:
    """``ask`` in a process of its own."""
    command = [sys.executable, __file__, "--ask", str(folder), str(index_folder), "--threads", str(threads)]
    command += ["--width", str(sizes.width), "--examples", str(sizes.examples)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    document: dict[str, object] = json.loads(finished.stdout)
    return document


def forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """Make a store, build its index, ask it."""
    sizes = Sizes(arguments.width, arguments.examples or (250 if arguments.quick else 6_250))
    with tempfile.TemporaryDirectory(prefix="countersign-store-", dir=arguments.directory) as kept:
        folder, index_folder = Path(kept) / "accumulators", Path(kept) / "index"
        Store(folder, sizes).make()
        terms = terms_of(folder, sizes)
        name = f"{sizes.visits:,} visits x 24 weights, width {sizes.width}, rank {RANK}"
        report.note(
            f"{arguments.threads} threads, {SOURCES} sources, {WINDOWS} windows; "
            "sums, sketches and the campaign's record are synthetic"
        )
        report.rate(f"{name}: the run's folder", size_of(folder) / 1e9, "GB")
        with watch_load() as load:
            index = build_index(terms, folder, index_folder)
        assert (index.visits, index.header.left_out) == (sizes.visits, ())
        report.rate(f"{name}: index, built", load.wall_seconds, "s", load=load)
        report.rate(f"{name}: index, size", size_of(index_folder) / 1e9, "GB")
        with watch_load() as load:
            found = check_index(index)
        assert found.whole == SOURCES * WINDOWS
        report.rate(f"{name}: index, all of it held to the log", load.wall_seconds, "s", load=load)
        for state in ("cold", "warm", "warm"):
            if state == "cold":
                forget(Path(kept))
            with watch_load() as load:
                answer = asked_apart(folder, index_folder, sizes, arguments.threads)
            report.rate(f"{name}: trace, {state}", answer["seconds"], "s", at_most(QUERY_SECONDS), load)
            report.rate(f"{name}: trace, {state}, all threads", answer["cpu_seconds"], "s CPU", load=load)
            report.note(f"{state}: {answer['stages']}")
        report.rate(f"{name}: trace, visits opened", answer["opened_visits"], "visits", at_most(OPEN_AT_MOST))
        report.rate(f"{name}: trace, most memory", answer["peak_bytes"] / 1e6, "MB", at_most(QUERY_BYTES / 1e6))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a store of a million sketches and a trace through it.")
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument("--examples", type=int, default=0, help="of a source in a window; default: a million visits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the trace; default: all cores")
    parser.add_argument("--directory", help="where the store is made and removed; default: the system's")
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    given, _ = parser.parse_known_args()
    if given.ask:
        torch.set_num_threads(given.threads)
        ask(Path(given.ask[0]), Path(given.ask[1]), Sizes(given.width, given.examples))
        return 0
    return run_benchmark("store", measure, parser)


if __name__ == "__main__":
    sys.exit(main())
