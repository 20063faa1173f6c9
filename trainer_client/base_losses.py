"""Base losses: what the base model loses on each example before the first step, and the entropy bands that follow.

Measured where the policy in force has entropy bands, with ``probe_loss``: the loss of training, of the same inputs,
without dropout and without gradients. Only examples of sources that the policy admits reach the model; the others are
written down as unmeasured, and no grant under a policy with bands is asked for them. The campaign commits to the file
(``consensus/bands.py`` has its form), which lies in ``base-losses`` in the run's directory: a run that is taken up
again reads it there, and whoever replays the campaign is given it.

**The same on the same build.** A loss depends in its last bits on which examples are in a batch with it, so batches are
those of a step: in the manifest's order, ``micro_batch_size`` at a time, divided among the ranks. Rounding to
thousandths of a nat takes most of what another build adds, not all: near a half it tips.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from consensus import portions as p
from consensus.bands import LARGEST_LOSS_MILLI, UNMEASURED, band_of, decode_losses, encode_losses
from consensus.policy import maximum_profile
from consensus.rejection import ConfigError, Reason, Rejected
from trainer_client.data_parallel import ParallelModel
from trainer_client.durable import make_durable
from trainer_client.random_states import random_states, set_random_states
from trainer_client.ranks import Ranks
from trainer_client.record import Example

E = TypeVar("E")

FOLDER = "base-losses"
MILLI = 1_000


class BaseLosses:
    """The base model's loss of every example of a manifest, in thousandths of a nat per token.

    Args:
        losses_milli: in the manifest's order, ``UNMEASURED`` for an example kept from the model.
    """

    def __init__(self, manifest: Sequence[p.ManifestRange], losses_milli: Sequence[int]) -> None:
        self._encoded = encode_losses(losses_milli)
        self._by_source: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        begun = 0
        for held in manifest if losses_milli else ():
            self._by_source[held.source] = held.first, tuple(losses_milli[begun : begun + held.count])
            begun += held.count

    @property
    def encoded(self) -> bytes:
        """The file."""
        return self._encoded

    @property
    def sha256(self) -> bytes:
        """What the campaign commits to; empty where nothing was measured at all."""
        return sha256(self._encoded).digest() if self._encoded else b""

    @property
    def measured(self) -> frozenset[bytes]:
        """The sources whose examples were measured."""
        return frozenset(source for source, (_, losses) in self._by_source.items() if UNMEASURED not in losses)

    def loss_milli(self, example: Example) -> int:
        """An example's loss, or ``UNMEASURED``."""
        source, number = example
        first, losses = self._by_source.get(source, (number, (UNMEASURED,)))
        return losses[number - first]

    def band(self, example: Example, edges_milli: Sequence[int]) -> int:
        """The entropy band of an example, from 0.

        Raises:
            Rejected: ``BASE_LOSSES_MISSING``, as ``bands.band_of``.
        """
        return band_of(self.loss_milli(example), edges_milli) if edges_milli else 0

    def bands(self, source: bytes, edges_milli: Sequence[int]) -> frozenset[int]:
        """The bands of a source's examples; none of a source that was not measured, where there are edges."""
        if not edges_milli:
            return frozenset((0,))
        _, losses = self._by_source.get(source, (0, ()))
        return frozenset(band_of(loss, edges_milli) for loss in losses if loss != UNMEASURED)


NOTHING_MEASURED = BaseLosses((), ())


@dataclass(frozen=True, slots=True)
class Measure(Generic[E]):
    """How losses are measured: as training takes examples, ``batch_size`` at a time, divided among the ranks.

    ``loss`` is of model and what ``collate`` returns, one for each example, ``[B]``; ``contents`` are the sources'.
    """

    model: ParallelModel
    loss: Callable[[nn.Module, Any], Tensor]
    contents: Mapping[bytes, Sequence[E]]
    collate: Callable[[Sequence[E]], Any]
    batch_size: int
    ranks: Ranks

    def losses_milli(self, examples: Sequence[Example]) -> dict[Example, int]:
        """What the model loses on each example, in thousandths of a nat, on every rank; all of them must ask.

        Raises:
            ConfigError: ``loss`` gives something else than a finite number for each example. RankFailed: elsewhere.
        """
        own: dict[Example, int] = {}
        problems: list[str] = []
        random_before = random_states()
        try:
            with self.model.evaluated():
                for batch in self.ranks.micro_batches(examples, self.batch_size):
                    # As many passes on every rank, whatever comes of one: sharded parameters need all of them.
                    shown = batch or tuple(examples[:1])
                    inputs = self.collate([self.contents[source][number] for source, number in shown])
                    loss_B = self.loss(self.model.module, inputs)
                    if loss_B.shape == (len(shown),) and bool(loss_B.isfinite().all()):
                        own.update(zip(batch, map(_in_milli, loss_B.tolist()), strict=bool(batch)))
                    else:
                        source, number = shown[0]
                        first = f"{number} of source {source.hex()}"
                        problems.append(
                            f"for each of {len(shown)} examples from {first} on, found {loss_B.tolist()!r:.200}"
                        )
        finally:
            set_random_states(random_before)
        self.ranks.together(lambda: _refuse(problems))
        found: dict[Example, int] = {}
        for part in self.ranks.gathered(own):
            found |= part
        return found


def base_losses(measure: Measure[E], manifest: Sequence[p.ManifestRange], admitted: Collection[bytes]) -> BaseLosses:
    """Of a manifest, whose examples are measured if their source is ``admitted``.

    Raises:
        ConfigError, RankFailed: as ``Measure.losses_milli``.
    """
    examples = _examples_of(manifest)
    found = measure.losses_milli(tuple(example for example in examples if example[0] in admitted))
    return BaseLosses(manifest, [found.get(example, UNMEASURED) for example in examples])


def confirmed_losses(
    measure: Measure[E], manifest: Sequence[p.ManifestRange], recorded: BaseLosses, tolerance: float
) -> None:
    """What a run recorded is the model's, measured again; or no further from it than ``tolerance`` of the recorded.

    Raises:
        Rejected: ``DIGEST_MISMATCH``. ConfigError, RankFailed: as ``Measure.losses_milli``.
    """
    wanted = {example: recorded.loss_milli(example) for example in _examples_of(manifest)}
    found = measure.losses_milli(tuple(example for example, loss in wanted.items() if loss != UNMEASURED))
    differing = [
        example for example, loss in found.items() if abs(loss - wanted[example]) > tolerance * wanted[example]
    ]
    if differing:
        source, number = first = min(differing)
        raise Rejected(
            Reason.DIGEST_MISMATCH,
            f"the base losses of {len(differing)} examples are not the model's, the first is example {number} of"
            f" source {source.hex()}: recorded {wanted[first]}, found {found[first]} thousandths of a nat",
        )


def path_of(run_directory: Path, campaign: bytes) -> Path:
    """Where a run keeps a campaign's base losses."""
    return run_directory / FOLDER / f"{campaign.hex()}.losses"


def write_base_losses(path: Path, losses: BaseLosses) -> None:
    """Put them on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(losses.encoded)
    make_durable(unfinished, path)


def read_base_losses(path: Path, manifest: Sequence[p.ManifestRange], committed_sha256: bytes) -> BaseLosses:
    """The base losses that a campaign committed to.

    Raises:
        ConfigError: there is no such file. Rejected: ``DIGEST_MISMATCH`` for another file; ``MALFORMED``.
    """
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected the campaign's base losses, found: {error.strerror}") from error
    found = sha256(encoded).digest()
    if found != committed_sha256:
        raise Rejected(
            Reason.DIGEST_MISMATCH,
            f"{path}: base losses with SHA-256 {found.hex()}, the campaign committed to {committed_sha256.hex()}",
        )
    return BaseLosses(manifest, decode_losses(encoded, sum(held.count for held in manifest)))


def closed_blocks(
    policy: p.Policy, classes: Mapping[bytes, str], losses: BaseLosses, blocks: tuple[str, ...]
) -> tuple[str, ...]:
    """The parameter blocks in which no example of these sources has weight. ``classes`` are theirs."""
    pairs = {
        (content_class, band)
        for source, content_class in classes.items()
        for band in losses.bands(source, policy.entropy_edges_milli)
    }
    profiles = [maximum_profile(policy, content_class, band, blocks) for content_class, band in sorted(pairs)]
    return tuple(
        block
        for number, block in enumerate(blocks)
        if not any(profile.weights_permille[number] for profile in profiles)
    )


def _examples_of(manifest: Sequence[p.ManifestRange]) -> tuple[Example, ...]:
    return tuple((held.source, held.first + place) for held in manifest for place in range(held.count))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(f"the base model's losses: expected a finite number {problems[0]}")


def _in_milli(loss: float) -> int:
    return min(max(round(loss * MILLI), 0), LARGEST_LOSS_MILLI)
