"""Measures for ``run.evaluate``: values with confidence intervals, and digests of what they were measured on.

::

    run.evaluate(
        "held-out",
        [mean_metric("loss", losses_N, at_most=2.5), proportion_metric("exact", right, of, at_least=0.6)],
        data=slice_of_file("validation", Path("validation.jsonl"), examples=len(losses_N)),
        script=Path(__file__),
    )

A threshold is met when the whole interval keeps to it. One that is missed bars the campaign's release until the same
test is met on later weights, or governance accepts it (``countersign decision add``).
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from consensus.rejection import ConfigError
from consensus.review import AT_LEAST, AT_MOST, MICRO, DataSlice, Metric, Threshold

CONFIDENCE = 0.95
RESAMPLES = 2_000
RESAMPLED_AT_ONCE = 64
LARGEST = (2**53 - 1) / MICRO


def mean_metric(
    name: str,
    values: Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    confidence: float = CONFIDENCE,
) -> Metric:
    """The mean of one value per example; percentile bootstrap over examples (Efron 1979), the same each time.

    Raises:
        ConfigError: fewer than two values, one that is not finite or beyond 9e9, or both bounds.
    """
    values_N = torch.as_tensor(values, dtype=torch.float64)
    if values_N.ndim != 1 or len(values_N) < 2 or not torch.isfinite(values_N).all():
        raise ConfigError(f"metric {name!r}: expected a list of at least two finite values")
    count = len(values_N)
    generator = torch.Generator().manual_seed(0)
    means = torch.cat(
        [
            values_N[torch.randint(count, (RESAMPLED_AT_ONCE, count), generator=generator)].mean(dim=1)
            for _ in range(math.ceil(RESAMPLES / RESAMPLED_AT_ONCE))
        ]
    )
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    mean = values_N.mean().item()
    return _metric(name, mean, min(low, mean), max(high, mean), confidence, "bootstrap", at_least, at_most)


def proportion_metric(
    name: str,
    successes: int,
    trials: int,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    confidence: float = CONFIDENCE,
) -> Metric:
    """How many of so many; score interval (Wilson 1927), which holds for few trials and near 0 and 1.

    Raises:
        ConfigError: no trial, more successes than trials, or both bounds.
    """
    if not 0 <= successes <= trials or not trials:
        raise ConfigError(f"metric {name!r}: {successes} of {trials} is no proportion")
    deviations = math.sqrt(2) * torch.special.erfinv(torch.tensor(confidence, dtype=torch.float64)).item()
    share, square = successes / trials, deviations**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    spread = deviations / (1 + square / trials)
    spread *= math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    low, high = max(0.0, middle - spread), min(1.0, middle + spread)
    return _metric(name, share, min(low, share), max(high, share), confidence, "wilson", at_least, at_most)


def slice_of_file(name: str, path: Path, examples: int) -> DataSlice:
    """A data slice that is one file.

    Raises:
        ConfigError: the file cannot be read, or no example is in it.
    """
    if examples < 1:
        raise ConfigError(f"data slice {name!r}: {examples} examples")
    return DataSlice(name, file_sha256(path), examples)


def slice_of(name: str, contents: Sequence[bytes]) -> DataSlice:
    """A data slice from its examples' bytes: SHA-256 over each one's length, as 8 bytes, and its bytes, in order.

    Raises:
        ConfigError: no example is in it.
    """
    if not contents:
        raise ConfigError(f"data slice {name!r}: no examples")
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return DataSlice(name, digest.digest(), len(contents))


def file_sha256(path: Path) -> bytes:
    """SHA-256 of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, found: {error.strerror}") from error


def _metric(
    name: str,
    value: float,
    low: float,
    high: float,
    confidence: float,
    method: str,
    at_least: float | None,
    at_most: float | None,
) -> Metric:
    if not 0 < confidence < 1:
        raise ConfigError(f"metric {name!r}: a confidence of {confidence}, expected one between 0 and 1")
    if at_least is not None and at_most is not None:
        raise ConfigError(f"metric {name!r}: give at_least or at_most; for both, record two metrics")
    if max(abs(low), abs(high), abs(at_least or 0.0), abs(at_most or 0.0)) > LARGEST:
        raise ConfigError(f"metric {name!r}: values beyond {LARGEST:g} cannot be recorded, choose another unit")
    threshold = None
    if at_least is not None:
        threshold = Threshold(AT_LEAST, math.ceil(at_least * MICRO))
    if at_most is not None:
        threshold = Threshold(AT_MOST, math.floor(at_most * MICRO))
    return Metric(
        name=name,
        value_micro=round(value * MICRO),
        low_micro=min(math.floor(low * MICRO), round(value * MICRO)),
        high_micro=max(math.ceil(high * MICRO), round(value * MICRO)),
        confidence_permille=min(999, max(1, round(confidence * 1_000))),
        method=method,
        threshold=threshold,
    )
