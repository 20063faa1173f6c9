"""Reviews of a campaign: what was measured on its weights, what was decided, what a replay found.

Four kinds of event hold a model to account after its steps: an *evaluation* binds metrics to the parameter root they
were measured on, with their confidence intervals, the data, the script and the thresholds set beforehand; a *decision*
gives a member's reasons, and with enough governance members lifts or sets a bar to release; an *audit challenge* has
some steps picked by lot (``beacon.py``), to be taken again; an *audit result* is what a member other than the operator
found when it took steps again (``trainer_client/replay.py``).

A threshold is met by the whole confidence interval, not by the value alone.
"""

from typing import Annotated

from msgspec import Meta

from consensus.codec import encode
from consensus.identifiers import ZERO_DIGEST, Digest, Tag, tagged_hash
from consensus.portions import Bytes32, Name, Natural, Settings, Text, Wire
from consensus.rejection import Reason, Rejected

Integer = Annotated[int, Meta(ge=-(2**53 - 1), le=2**53 - 1)]
StepNumber = Annotated[int, Meta(ge=1, le=2**53 - 1)]

MICRO = 1_000_000
MAX_PICKS = 256

AT_LEAST = "at-least"
AT_MOST = "at-most"
SIDES = frozenset({AT_LEAST, AT_MOST})

ACCEPT = "accept"
REJECT = "reject"
NOTE = "note"
OUTCOMES = frozenset({ACCEPT, REJECT, NOTE})


class Threshold(Wire, frozen=True):
    """A bound set for a metric, in millionths: ``at-least`` or ``at-most``."""

    side: Name
    bound_micro: Integer


class Metric(Wire, frozen=True):
    """A measured value and its confidence interval, in millionths.

    ``method`` names how the interval was made (``bootstrap``, ``wilson``); ``confidence_permille`` is 950 for 95 %.
    """

    name: Name
    value_micro: Integer
    low_micro: Integer
    high_micro: Integer
    confidence_permille: Annotated[int, Meta(ge=1, le=999)]
    method: Name
    threshold: Threshold | None


class DataSlice(Wire, frozen=True):
    """What a model was measured on; ``sha256`` is of the file or list that holds it."""

    name: Name
    sha256: Bytes32
    examples: Annotated[int, Meta(ge=1, le=2**53 - 1)]


class Evaluation(Wire, frozen=True):
    """Metrics of the weights with ``parameter_root``, which the campaign has after ``steps`` steps."""

    name: Name
    steps: Natural
    parameter_root: Bytes32
    data: DataSlice
    script_name: Name
    script_sha256: Bytes32
    metrics: Annotated[tuple[Metric, ...], Meta(min_length=1, max_length=64)]


class Decision(Wire, frozen=True):
    """Reasons, about a campaign, or an evaluation, audit result or release of it.

    ``outcome`` is ``note``; or, by governance about an evaluation, ``accept`` (it bars no release any more) or
    ``reject`` (it does, whatever it measured).
    """

    subject: Bytes32
    outcome: Name
    rationale: Annotated[str, Meta(min_length=1, max_length=8_192)]


class AuditChallenge(Wire, frozen=True):
    """``picks`` of the steps ``first_step`` to ``last_step``, by lot, are to be taken again by ``answer_by_ms``."""

    number: StepNumber
    first_step: StepNumber
    last_step: StepNumber
    picks: Annotated[int, Meta(ge=1, le=MAX_PICKS)]
    answer_by_ms: Natural
    statement: Text


class PickedStep(Wire, frozen=True):
    """What came of a picked step; ``differing`` is empty if it, and all that led to it, came out as recorded."""

    step: StepNumber
    differing: Annotated[tuple[Name, ...], Meta(max_length=16)]


class AuditAnswer(Wire, frozen=True):
    """Answers ``challenge``, by event id, for the steps that ``beacon`` picks, rising."""

    challenge: Bytes32
    beacon: Annotated[bytes, Meta(min_length=96, max_length=96)]
    picked: Annotated[tuple[PickedStep, ...], Meta(min_length=1, max_length=MAX_PICKS)]

    @property
    def matching(self) -> tuple[int, ...]:
        """The picked steps that came out as recorded."""
        return tuple(each.step for each in self.picked if not each.differing)

    @property
    def differing(self) -> tuple[int, ...]:
        """Those that did not."""
        return tuple(each.step for each in self.picked if each.differing)


class AuditResult(Wire, frozen=True):
    """Steps ``first_step`` to ``last_step``, taken again: the first ``matched`` came out as recorded.

    If not all did, step ``first_step + matched`` is the first that did not, in what ``differing`` names. ``end_root``
    is the parameter root after the last matching step. ``tolerance`` is empty where bits were compared, else how far
    numbers may have differed; ``environment`` the build it ran on.

    With an ``answer`` only the steps picked of that range were asked for: ``matched`` counts those that came out as
    recorded, ``differing`` is of the first that did not, and ``end_root`` zero where none did.
    """

    first_step: StepNumber
    last_step: StepNumber
    matched: Natural
    differing: Annotated[tuple[Name, ...], Meta(max_length=64)]
    end_root: Bytes32
    tolerance: Annotated[str, Meta(max_length=128)]
    environment: Settings
    statement: Text
    answer: AuditAnswer | None

    @property
    def differs(self) -> bool:
        """Whether some step did not come out as recorded."""
        if self.answer is not None:
            return bool(self.answer.differing)
        return self.matched < self.last_step - self.first_step + 1


def examination_digest(evaluation: Evaluation) -> Digest:
    """What was tested, whatever came out: the evaluation with its steps, parameter root and measured values zero."""
    metrics = tuple(
        Metric(each.name, 0, 0, 0, each.confidence_permille, each.method, each.threshold) for each in evaluation.metrics
    )
    blank = Evaluation(
        evaluation.name,
        0,
        ZERO_DIGEST,
        evaluation.data,
        evaluation.script_name,
        evaluation.script_sha256,
        metrics,
    )
    return tagged_hash(Tag.EVALUATION, encode(blank))


def unmet(evaluation: Evaluation) -> tuple[str, ...]:
    """The metrics whose threshold is not met by their whole interval."""
    return tuple(metric.name for metric in evaluation.metrics if not is_met(metric))


def is_met(metric: Metric) -> bool:
    """Whether the whole interval keeps to the threshold; also without one."""
    if metric.threshold is None:
        return True
    if metric.threshold.side == AT_LEAST:
        return metric.low_micro >= metric.threshold.bound_micro
    return metric.high_micro <= metric.threshold.bound_micro


def metric_text(metric: Metric) -> str:
    """A metric in a line: value, interval, threshold and whether it is met."""
    text = (
        f"{metric.name!a} is {_number(metric.value_micro)}, {_number(metric.low_micro)} to "
        f"{_number(metric.high_micro)} at {_decimal(metric.confidence_permille, 1)} % ({metric.method!a})"
    )
    if metric.threshold is None:
        return text
    side = "at least" if metric.threshold.side == AT_LEAST else "at most"
    met = "met" if is_met(metric) else "MISSED"
    return f"{text}; {side} {_number(metric.threshold.bound_micro)}: {met}"


def _number(micro: int) -> str:
    return _decimal(micro, 6)


def _decimal(value: int, places: int) -> str:
    """A number given in units of its last decimal place, without zeros at its end."""
    whole, rest = divmod(abs(value), 10**places)
    fraction = f"{rest:0{places}d}".rstrip("0")
    return f"{'-' if value < 0 else ''}{whole}{'.' if fraction else ''}{fraction}"


def check_evaluation(evaluation: Evaluation) -> None:
    """What an evaluation must be, whatever campaign it is of.

    Raises:
        Rejected: ``BAD_FIELD``.
    """
    names = [metric.name for metric in evaluation.metrics]
    if names != sorted(set(names)):
        raise Rejected(Reason.BAD_FIELD, "metrics are not in strictly increasing order of name")
    for metric in evaluation.metrics:
        if not metric.low_micro <= metric.value_micro <= metric.high_micro:
            raise Rejected(
                Reason.BAD_FIELD,
                f"metric {metric.name!a:.60}: value {metric.value_micro} is outside its interval, "
                f"{metric.low_micro} to {metric.high_micro}",
            )
        if metric.threshold is not None and metric.threshold.side not in SIDES:
            raise Rejected(
                Reason.BAD_FIELD,
                f"metric {metric.name!a:.60}: threshold {metric.threshold.side!a:.60}, "
                f"expected {AT_LEAST} or {AT_MOST}",
            )


def check_audit(result: AuditResult) -> None:
    """What an audit result must be, whatever campaign it is of.

    Raises:
        Rejected: ``BAD_FIELD``.
    """
    steps = result.last_step - result.first_step + 1
    if result.answer is not None and result.matched != len(result.answer.matching):
        raise Rejected(
            Reason.BAD_FIELD, f"counts {result.matched} picked steps as matching, names {len(result.answer.matching)}"
        )
    if steps < 1 or result.matched > steps:
        raise Rejected(
            Reason.BAD_FIELD,
            f"{result.matched} of the steps {result.first_step} to {result.last_step} came out as recorded",
        )
    if bool(result.differing) != result.differs:
        raise Rejected(Reason.BAD_FIELD, "what differs is named exactly where a step did not come out as recorded")
