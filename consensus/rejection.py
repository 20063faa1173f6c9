"""Why an input was refused, and whose fault it is.

Exceptions of the project::

    CountersignError
    ├── Rejected          the peer's or author's fault; carries a Reason and changes nothing
    ├── InvariantBroken   ours: a rule we must uphold ourselves was about to break; stop
    ├── Unavailable       neither's: something needed is not here yet; retry
    └── ConfigError       the operator's: names file, key, expected, found

Verifying functions raise ``Rejected``; they never return a bool that can be ignored.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Named reasons for a refusal; the value is what APIs, logs and the command line print."""

    # Bytes
    MALFORMED = "malformed"
    NON_CANONICAL = "non-canonical"
    OVERSIZED = "oversized"
    UNSUPPORTED_VERSION = "unsupported-version"
    WRONG_CHAIN = "wrong-chain"
    # Keys and signatures
    BAD_KEY = "bad-key"
    BAD_SIGNATURE = "bad-signature"
    BAD_PROOF_OF_POSSESSION = "bad-proof-of-possession"
    BAD_SHARE = "bad-share"
    BAD_DEALING = "bad-dealing"
    EQUIVOCATION = "equivocation"
    CEREMONY_INCOMPLETE = "ceremony-incomplete"
    MISSING_SIGNATURE = "missing-signature"
    SURPLUS_SIGNATURE = "surplus-signature"
    # Membership
    UNKNOWN_MEMBER = "unknown-member"
    WRONG_ROLE = "wrong-role"
    WRONG_AUTHOR = "wrong-author"
    WRONG_EPOCH = "wrong-epoch"
    BAD_MEMBERSHIP = "bad-membership"
    # Events
    BAD_FIELD = "bad-field"
    SCHEME_NOT_ADMITTED = "scheme-not-admitted"
    PORTION_MISMATCH = "portion-mismatch"
    DUPLICATE = "duplicate"
    SEQUENCE_GAP = "sequence-gap"
    # Claims
    UNKNOWN_SOURCE = "unknown-source"
    SOURCE_NOT_YET_VALID = "source-not-yet-valid"
    SOURCE_EXPIRED = "source-expired"
    SOURCE_REVOKED = "source-revoked"
    LICENCE_NOT_ADMITTED = "licence-not-admitted"
    PURPOSE_NOT_ADMITTED = "purpose-not-admitted"
    CLASS_NOT_ADMITTED = "class-not-admitted"
    UNKNOWN_POLICY = "unknown-policy"
    POLICY_NOT_IN_FORCE = "policy-not-in-force"
    UNKNOWN_CAMPAIGN = "unknown-campaign"
    CAMPAIGN_CLOSED = "campaign-closed"
    UNKNOWN_JOB_KEY = "unknown-job-key"
    JOB_KEY_EXPIRED = "job-key-expired"
    UNKNOWN_GRANT = "unknown-grant"
    GRANT_CLOSED = "grant-closed"
    GRANT_EXCEEDS_POLICY = "grant-exceeds-policy"
    OUTSIDE_GRANT = "outside-grant"
    SOURCE_NOT_GRANTED = "source-not-granted"
    # Steps
    DEPTH_ABOVE_MAXIMUM = "depth-above-maximum"
    PARAMETER_ROOT_BROKEN = "parameter-root-broken"
    STEP_CHAIN_BROKEN = "step-chain-broken"
    COUNTS_NOT_CONSERVED = "counts-not-conserved"
    ACCUMULATORS_INCOMPLETE = "accumulators-incomplete"
    MOMENTUM_UNACCOUNTED = "momentum-unaccounted"
    GLOBAL_CLIPPING_NOT_ADMITTED = "global-clipping-not-admitted"
    GRANULARITY_NOT_ADMITTED = "granularity-not-admitted"
    SKETCHES_TOO_COARSE = "sketches-too-coarse"
    BASE_LOSSES_MISSING = "base-losses-missing"
    RESERVED_FOR_CALIBRATION = "reserved-for-calibration"
    MEMORIZATION_ABOVE_THRESHOLD = "memorization-above-threshold"
    ROLLBACK_REQUIRED = "rollback-required"
    NOTHING_TO_ROLL_BACK = "nothing-to-roll-back"
    ROOT_NOT_FINAL = "root-not-final"
    FINDING_OPEN = "finding-open"
    CUSTODY_MISSING = "custody-missing"
    # Audits
    NO_BEACON = "no-beacon"
    AUDIT_LATE = "audit-late"
    NOT_PICKED = "not-picked"
    # Ledger blocks, votes, certificates
    BAD_BLOCK = "bad-block"
    BAD_TIMESTAMP = "bad-timestamp"
    STATE_ROOT_MISMATCH = "state-root-mismatch"
    LOG_ROOT_MISMATCH = "log-root-mismatch"
    BAD_VOTE = "bad-vote"
    NO_CONFLICT = "no-conflict"
    BAD_CERTIFICATE = "bad-certificate"
    QUORUM_NOT_REACHED = "quorum-not-reached"
    CENSORED_EVENT = "censored-event"
    # Proofs and bundles
    BAD_PROOF = "bad-proof"
    BAD_CHECKPOINT = "bad-checkpoint"
    BUNDLE_INCOMPLETE = "bundle-incomplete"
    UNKNOWN_PREDICATE = "unknown-predicate"
    DIGEST_MISMATCH = "digest-mismatch"
    # Service
    OVERLOADED = "overloaded"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not-found"


class CountersignError(Exception):
    """Root of the project's exceptions."""


class Rejected(CountersignError):
    """An input breaks a rule. ``reason`` is the rule's name; ``detail`` says expected and found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def anew(self) -> "Rejected":
        """The same without traceback and causes. Raised itself, what a frame holds would hold that frame: a cycle, and
        all that the frame knows stays until it is collected.
        """
        return Rejected(self.reason, self.detail)

    def __reduce__(self) -> tuple[type["Rejected"], tuple[Reason, str]]:
        """Copies, also in another process, have both parts."""
        return type(self), (self.reason, self.detail)


class InvariantBroken(CountersignError):
    """Our own code or storage is about to break a promise; the process must stop, not continue."""


def breaks_invariant(error: BaseException) -> bool:
    """Whether an error is, or among those of several tasks has, an ``InvariantBroken``."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(breaks_invariant, error.exceptions))
    return isinstance(error, InvariantBroken)


class Unavailable(CountersignError):
    """Something needed is not here yet (a peer, a ledger block, a node); retrying may help."""


class ConfigError(CountersignError):
    """The operator's configuration is wrong; the message names file, key, expected and found."""
