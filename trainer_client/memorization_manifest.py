"""The memorization manifest: how strongly the weights as they stand reproduce each example they were shown.

A census, not a sample: every example presented in the steps taken, of sources that were admitted, those that were kept
out for being recited among them. The file lists each one's signal, a line each; its SHA-256 goes to the log as the data
of an evaluation, which counts the examples above the policy's threshold, at most none. Where owners keep a reserve
(``consensus/reserve.py``) it counts as well how many of those the detector takes for recited: its false positives.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from consensus import portions as p
from consensus.review import AT_MOST, MICRO, DataSlice, Metric, Threshold
from trainer_client import memorization
from trainer_client.evaluation import file_sha256, slice_of_file
from trainer_client.record import Example

NAME = "memorization"
CERTAIN_PERMILLE = 999
"""A census has no sampling error; the most that can be said on the log."""


def write_manifest(path: Path, assessed: Iterable[Example], signals: Iterable[p.MemorizationSignal]) -> DataSlice:
    """Write a line for each example assessed, 0 for one without a signal; the data slice it makes.

    Raises:
        ConfigError: nothing was assessed.
    """
    found: Mapping[Example, int] = {(signal.source, signal.example): signal.signal_permille for signal in signals}
    names = sorted(assessed)
    lines = [
        json.dumps({"source": source.hex(), "example": example, "signal_permille": found.get((source, example), 0)})
        for source, example in names
    ]
    path.write_text("\n".join((*lines, "")), encoding="utf-8")
    return slice_of_file(NAME, path, len(names))


def recited_metric(signals: Iterable[p.MemorizationSignal], threshold_permille: int) -> Metric:
    """How many examples are recited, of which there may be none."""
    count = sum(signal.signal_permille > threshold_permille for signal in signals) * MICRO
    return Metric("recited", count, count, count, CERTAIN_PERMILLE, "census", Threshold(AT_MOST, 0))


def reserve_metric(flagged: int) -> Metric:
    """How many examples of the owners' reserves are taken for recited, which no step trained on; told, not judged."""
    return Metric("reserve taken for recited", *3 * (flagged * MICRO,), CERTAIN_PERMILLE, "census", None)


def measured_by() -> tuple[str, bytes]:
    """Name and SHA-256 of what measures: the detector's own module."""
    path = Path(memorization.__file__)
    return path.name, file_sha256(path)
