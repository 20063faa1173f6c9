"""Per-source accumulators: what each source added to the gradients of a window of steps, at full rank.

For policy, source and parameter of a linear, over the steps t of a window (``consensus/accumulators.py``), and by head
for each piece of one (``pieces.py``):

    sum_t  learning_rate_t * clip_factor_t * sum_{i of the source} (w_i / 1000) * g_i / c

which is the source's part of the gradient that the optimizer received, times the learning rate. Formed in the routed
backward pass, which sums rows source by source anyway (``routing.GradientObserver``); nothing is computed twice.

* **Conservation.** Apart from that, the whole gradient after clipping, times the learning rate, is summed from the
  parameters' ``grad``: the window's *total*. At its end the parts must add up to it, or the run stops: something
  else than the admitted examples reached the optimizer. Blobs hold parts and total, so anybody can check again.
* **Undone steps leave no trace.** Sums are part of every snapshot (``state_dict``); what a rollback restores, it
  restores here. A replayed step is summed again and written nowhere.
* **Sketches beside them**, where the campaign says so: the same gradients example by example, at low rank.
* **Durable before it is said.** A window's blobs are on disk before the step event that names their root.
* **Several ranks** each sum what their own examples add; the first has them all added up at a window's end.

Not covered: embeddings, norms, and tensors shared with an embedding (``routed_modules.observed_parameters``).

Memory: for each policy and source of a window, a float32 copy of what linears hold, beside the one for the total and
those in snapshots. Sums and files are made in one thread of their own.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from consensus.accumulators import (
    BLOBS,
    VERSION,
    WINDOWS,
    AccumulatorWindow,
    WindowEntry,
    WindowTerms,
    blob_path,
    ends_window,
    window_bounds,
    window_path,
    window_root,
)
from consensus.codec import encode
from consensus.identifiers import Digest
from consensus.rejection import CountersignError
from trainer_client.durable import make_durable
from trainer_client.pieces import Entries
from trainer_client.ranks import ALONE, Ranks
from trainer_client.record import Example
from trainer_client.routed_modules import observed_parameters
from trainer_client.sharding import as_part_of, whole
from trainer_client.sketches import NO_OTHERS, SketchBook, WindowSketches, sketch_file

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How far parts may be from their total, relative to the sum of their norms, by the gradients' narrowest dtype."""

Sums = dict[str, Tensor]
"""Sums by the parameter table's names: of a whole parameter or of a piece."""


class AccumulatorsBroken(CountersignError):
    """The per-source sums do not add up to the gradient that the optimizer received."""


class SourceAccumulators:
    """The sums of one run; an observer of its routing, and stateful for its snapshots.

    Args:
        directory: ``windows/ROOT.window`` and ``blobs/SHA256.safetensors`` go below it.
        window_steps: at least 1.
        sketch_rank: of the sketches kept example by example (``sketches.py``); 0 keeps none.
        sketch_ranks: of parameters that are sketched at another.
        dtype: of the blobs; sums are float32 (float64 for float64 gradients).
        ranks: whose losses are each multiplied by their number (``data_parallel.py``).
    """

    def __init__(
        self,
        directory: Path,
        campaign: bytes,
        window_steps: int,
        planned_steps: int,
        sketch_rank: int = 0,
        sketch_ranks: Mapping[str, int] = NO_OTHERS,
        dtype: torch.dtype = torch.bfloat16,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self.directory = directory
        self._campaign = campaign
        self._window_steps = window_steps
        self._planned_steps = planned_steps
        self._dtype = dtype
        self.sketches = SketchBook(sketch_rank, sketch_ranks) if sketch_rank else None
        self._entries: Entries = {}
        self._block_of: Mapping[str, int] = {}
        self._pending: dict[tuple[bytes, str], Tensor] = {}
        self._sums: dict[tuple[bytes, bytes], Sums] = {}
        self._total: Sums = {}
        self._narrowest = torch.float32
        self._folding: Future[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="accumulators")
        self.cpu_seconds = 0.0

    def attach(self, model: nn.Module, block_of_entry: Mapping[str, int], entries: Entries) -> None:
        """Learns whose gradients to sum; makes the directories. ``entries`` are the model's.

        Raises:
            RoutingUnsupported: as ``routed_modules.census``.
        """
        observed = frozenset(observed_parameters(model))
        self._entries = {name: entry for name, entry in entries.items() if entry.tensor_name in observed}
        self._block_of = block_of_entry
        if self.sketches is not None:
            self.sketches.attach(self._entries)
        for name in (WINDOWS, BLOBS):
            (self.directory / name).mkdir(parents=True, exist_ok=True)

    def expect(self, step: int, examples: Sequence[Example]) -> None:
        """The micro-batch whose backward pass comes next is of these examples, in this order."""
        if self.sketches is not None:
            self.sketches.expect(step, examples)

    def observe(self, parameter: str, group: bytes, gradient: Tensor) -> None:
        """One source's part of one parameter's gradient, in one backward pass."""
        if parameter not in self._entries:
            return
        if gradient.dtype in (torch.bfloat16, torch.float16):
            self._narrowest = gradient.dtype
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        held = self._pending.get((group, parameter))
        if held is None:
            self._pending[group, parameter] = wide
        else:
            held.add_(wide)

    def take_step(
        self, policy: bytes, optimizer: torch.optim.Optimizer, factors_of_blocks: Sequence[float | None]
    ) -> None:
        """Between clipping and ``optimizer.step()``: the step's parts and whole gradient enter the window.

        ``factors_of_blocks`` are ``scaling.Scaled``'s: what was observed, times them, is what the optimizer gets.
        """
        rates = {id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}
        self._wait()
        factors = {}
        for name, entry in self._entries.items():
            factor, rate = factors_of_blocks[self._block_of[name]], rates.get(id(entry.parameter), 0.0)
            gradient = entry.gradient
            if gradient is None or factor is None:
                continue
            factors[name] = rate * factor / self._ranks.size
            _add(self._total, name, gradient, rate)
        if self.sketches is not None:
            self.sketches.take_step(policy, factors)
        pending, self._pending = self._pending, {}
        self._folding = self._executor.submit(self._fold, policy, pending, factors)

    def skip_step(self) -> None:
        """In place of ``take_step``: the optimizer does not step, and nothing of it enters the window."""
        self._pending = {}
        if self.sketches is not None:
            self.sketches.skip_step()

    def end_step(self, index: int, *, recorded: bool) -> Future[Digest] | None:
        """After a step: where a window ends, its root, once its blobs are on disk. ``None`` within a window.

        On ranks other than the first there is no root. A step that is only replayed (not ``recorded``) ends its
        window without writing it again.
        """
        if not ends_window(self._window_steps, self._planned_steps, index):
            return None
        self._wait()
        sums, total, narrowest = self._sums, self._total, self._narrowest
        self._sums, self._total, self._narrowest = {}, {}, torch.float32
        sketches = None if self.sketches is None else self.sketches.end_window()
        if not recorded:
            return None
        total = {name: whole(as_part_of(part, self._entries[name].tensor)) for name, part in sorted(total.items())}
        if self._ranks.size > 1:
            total = {name: part.cpu() for name, part in total.items()}
            sums, sketches = self._of_all_ranks(sums, sketches)
        if not self._ranks.is_first:
            return None
        first, last = window_bounds(self._window_steps, self._planned_steps, index)
        terms = WindowTerms(self._campaign, first, last)
        return self._executor.submit(self._write, terms, sums, total, sketches, TOLERANCE[narrowest])

    def _of_all_ranks(
        self, sums: Mapping[tuple[bytes, bytes], Sums], sketches: WindowSketches | None
    ) -> tuple[dict[tuple[bytes, bytes], Sums], WindowSketches | None]:
        """On the first rank, what all of them summed and sketched in the window."""
        flat = {(*place, name): part.cpu() for place, held in sums.items() for name, part in held.items()}
        added: dict[tuple[bytes, bytes], Sums] = {}
        for (policy, source, name), part in self._ranks.summed_by_first(flat).items():
            added.setdefault((policy, source), {})[name] = part
        if sketches is None or self.sketches is None:
            return added, None
        plain = self._ranks.gathered_by_first(sketches.plain())
        return added, self.sketches.merged([WindowSketches.from_plain(each) for each in plain]) if plain else None

    def state_dict(self) -> dict[str, Any]:
        """The sums of the window so far, without the step being taken."""
        self._wait()
        sums = [(policy, source, dict(held)) for (policy, source), held in self._sums.items()]
        sketches = None if self.sketches is None else self.sketches.window.plain()
        return {"sums": sums, "total": dict(self._total), "narrowest": self._narrowest, "sketches": sketches}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Back to those sums; what the step being taken added is dropped."""
        self._wait()
        self._pending = {}
        self._sums = {(policy, source): dict(held) for policy, source, held in state_dict["sums"]}
        self._total = dict(state_dict["total"])
        self._narrowest = state_dict["narrowest"]
        if self.sketches is not None:
            self.sketches.go_back_to(WindowSketches.from_plain(state_dict["sketches"]))

    def close(self) -> None:
        """Waits for what is being written."""
        self._executor.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self) -> None:
        folding, self._folding = self._folding, None
        if folding is not None:
            folding.result()

    def _fold(self, policy: bytes, pending: dict[tuple[bytes, str], Tensor], factors: Mapping[str, float]) -> None:
        for (source, name), part in pending.items():
            if name in factors:
                _add(self._sums.setdefault((policy, source), {}), name, part, factors[name])
        self.cpu_seconds = time.thread_time()

    def _write(
        self,
        terms: WindowTerms,
        sums: Mapping[tuple[bytes, bytes], Sums],
        total: Sums,
        sketches: WindowSketches | None,
        tolerance: float,
    ) -> Digest:
        check_conservation(sums.values(), total, tolerance)
        entries = [WindowEntry(b"", b"", *self._sums_blob(total), b"", 0)]
        for (policy, source), held in sorted(sums.items(), key=_place):
            kept = {} if sketches is None else sketch_file(sketches, policy, source)
            sketched = self._blob(kept) if kept else (b"", 0)
            entries.append(WindowEntry(policy, source, *self._sums_blob(held), *sketched))
        window = AccumulatorWindow(VERSION, terms, tuple(entries))
        root = window_root(window)
        path = self.directory / window_path(root)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(encode(window))
        make_durable(unfinished, path)
        self.cpu_seconds = time.thread_time()
        return root

    def _sums_blob(self, sums: Sums) -> tuple[bytes, int]:
        return self._blob({name: tensor.to("cpu", self._dtype).contiguous() for name, tensor in sums.items()})

    def _blob(self, tensors: dict[str, Tensor]) -> tuple[bytes, int]:
        """SHA-256 and size of the safetensors file with these tensors, once it is on disk."""
        unfinished = self.directory / BLOBS / "blob.unfinished"
        save_file(tensors, unfinished)
        with unfinished.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        size_bytes = unfinished.stat().st_size
        make_durable(unfinished, self.directory / blob_path(digest))
        return digest, size_bytes


def by_source(examples: Iterable[tuple[bytes, int]]) -> tuple[tuple[bytes, int], ...]:
    """The order of a micro-batch while accumulators are kept: neighbours of one source are summed in place, scattered
    ones would be gathered first. Part of what makes a run's bits."""
    return tuple(sorted(examples, key=lambda example: example[0]))


def check_conservation(parts: Iterable[Mapping[str, Tensor]], total: Mapping[str, Tensor], tolerance: float) -> None:
    """The parts of each parameter add up to its total.

    Raises:
        AccumulatorsBroken: they differ by more than ``tolerance`` times the sum of their norms.
    """
    parts = tuple(parts)
    for name in sorted(set(total).union(*parts)):
        own = [held[name] for held in parts if name in held]
        shape = (own[0] if own else total[name]).shape
        difference = total.get(name, torch.zeros(shape)).clone()
        for part in own:
            difference -= part
        found = float(difference.norm())
        scale = sum(float(part.norm()) for part in own)
        if not found <= tolerance * scale:
            raise AccumulatorsBroken(
                f"parameter {name!r}: the sources' gradients are {found:.3g} away from the whole one, of norm"
                f" {scale:.3g} together; something else than admitted examples reached the optimizer"
            )


def _add(sums: Sums, name: str, part: Tensor, factor: float) -> None:
    held = sums.get(name)
    if held is None:
        sums[name] = part.to(torch.promote_types(part.dtype, torch.float32)) * factor
    else:
        held.add_(part, alpha=factor)


def _place(item: tuple[tuple[bytes, bytes], Sums]) -> tuple[bytes, bytes]:
    return item[0]
