"""The memorization manifest: a file that a training job writes, held to the evaluation on the log that names it.

The file lists every example the weights were shown, a line each, with how strongly they recite it; the log has its
SHA-256 as the data of an evaluation (``trainer_client/memorization_manifest.py``). The signals are the operator's
claim; that the file is the one that was meant, and what the log says of the evaluation, is proved by a bundle.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from consensus.bundle import OpenBundle
from consensus.rejection import ConfigError, Rejected
from consensus.review import Evaluation
from consensus.state import EVALUATION_TABLE, EvaluationRecord, review_prefix
from node.files import open_regular

MAX_MANIFEST_BYTES = 256 << 20


class ManifestLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An example, by its source and its place in it, and how strongly it is recited."""

    source: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    example: Annotated[int, Meta(ge=0)]
    signal_permille: Annotated[int, Meta(ge=0, le=1_000)]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The file's lines, and its SHA-256."""

    sha256: bytes
    lines: tuple[ManifestLine, ...]

    @property
    def highest_permille(self) -> int:
        """The strongest signal."""
        return max(line.signal_permille for line in self.lines)

    def above(self, threshold_permille: int) -> tuple[ManifestLine, ...]:
        """The examples whose signal exceeds a policy's threshold, the strongest first."""
        found = [line for line in self.lines if line.signal_permille > threshold_permille]
        return tuple(sorted(found, key=lambda line: (-line.signal_permille, line.source, line.example)))


@dataclass(frozen=True, slots=True)
class Survey:
    """The evaluation that names a manifest: proved to be on the log, with how it stands there."""

    record: EvaluationRecord
    index: int
    evaluation: Evaluation


def read_manifest(path: Path) -> Manifest:
    """A manifest's file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        with open_regular(path, MAX_MANIFEST_BYTES) as (file, size_bytes):
            content = file.read(size_bytes)
    except Rejected as error:
        raise ConfigError(f"{path}: expected a memorization manifest, found: {error.detail}") from error
    try:
        lines = tuple(msgspec.json.Decoder(ManifestLine).decode_lines(content))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a memorization manifest, found: {error}") from error
    if not lines:
        raise ConfigError(f"{path}: expected a memorization manifest, found no example")
    return Manifest(hashlib.sha256(content).digest(), lines)


def survey_of(bundle: OpenBundle, manifest: Manifest, path: Path) -> Survey:
    """The newest evaluation of the bundle's campaign that was made on this manifest.

    Raises:
        ConfigError: there is none: this is not the file that the operator recorded.
        Rejected: ``BUNDLE_INCOMPLETE``.
    """
    records = bundle.range(review_prefix(EVALUATION_TABLE, bundle.campaign), EvaluationRecord).values()
    found = []
    for record in records:
        event = bundle.event_of(record.event, "evaluation")
        if isinstance(event.operation, Evaluation) and event.operation.data.sha256 == manifest.sha256:
            found.append(Survey(record, event.index, event.operation))
    if not found:
        raise ConfigError(
            f"{path}: expected the data of an evaluation of campaign {bundle.campaign.hex()}, found SHA-256 "
            f"{manifest.sha256.hex()}, which none of its {len(records)} evaluations names"
        )
    return max(found, key=lambda survey: survey.index)
