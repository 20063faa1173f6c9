"""Grants: asks for permission ahead of time and says what the one in force allows.

Before a grant is asked for, every source of the manifest is judged by ``consensus.policy.why_refused`` against the
policy in force; those it refuses are not asked for. Once the grant is on the log, the reason each source was
left out is computed again as the log's own admission does it, at the time the grant was opened: that is
the reason a refusal must state.

One thread asks; the job meanwhile trains on under the grant it holds, and waits only without one. A request that
a member refuses, or that a changed policy or a revocation overtook, is judged and made anew.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from consensus.identifiers import Digest
from consensus.policy import band_count, maximum_profile, why_refused
from consensus.portions import ClassProfile, Policy
from consensus.rejection import CountersignError, InvariantBroken, Reason, Rejected, Unavailable
from consensus.state import DELEGATION_TABLE, POLICY_TABLE, DelegationRecord, PolicyRecord, SourceRecord
from trainer_client.calls import GrantStatus
from trainer_client.plan import RunSettings
from trainer_client.record import Permission, Recorder
from trainer_client.submit import Client

POLL_SECONDS = 0.1
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0
LOG_AFTER_SECONDS = 5.0

HOPELESS = frozenset(
    {
        Reason.CAMPAIGN_CLOSED,
        Reason.JOB_KEY_EXPIRED,
        Reason.UNKNOWN_JOB_KEY,
        Reason.UNKNOWN_MEMBER,
        Reason.WRONG_AUTHOR,
        Reason.WRONG_CHAIN,
        Reason.WRONG_ROLE,
        Reason.UNAUTHORIZED,
        Reason.SOURCE_NOT_GRANTED,
    }
)
"""Reasons that asking again will not change."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenGrant:
    """A grant on the log and what follows from it.

    ``refused`` names the reason of every manifest source it leaves out; ``profiles`` the depth profile of each admitted
    class and entropy band over the campaign's parameter blocks.
    """

    permission: Permission
    policy: Policy
    first_step: int
    last_step: int
    opened_at_ms: int
    closes_at_ms: int
    refused: Mapping[bytes, str]
    profiles: Mapping[tuple[str, int], ClassProfile]


class GrantKeeper:
    """Keeps a run in grants. ``permission_for`` is the training thread's; the rest happens behind it.

    Args:
        sources: every manifest source's id, in order.
        measured: those whose examples' base losses the campaign committed to; a policy with entropy bands is asked for
            no others.
        now_ms: Unix time in milliseconds; decides when to ask, never what is valid.
    """

    def __init__(
        self,
        client: Client,
        recorder: Recorder,
        *,
        campaign: bytes,
        job_key: bytes,
        purpose: str,
        planned_steps: int,
        blocks: tuple[str, ...],
        sources: Sequence[bytes],
        measured: Collection[bytes],
        settings: RunSettings,
        on_grant: Callable[[OpenGrant], None],
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._client = client.again()
        self._close_client = self._client.close
        self._recorder = recorder
        self._campaign = campaign
        self._job_key = job_key
        self._purpose = purpose
        self._planned_steps = planned_steps
        self._blocks = blocks
        self._sources = tuple(sources)
        self._measured = measured
        self._settings = settings
        self._on_grant = on_grant
        self._now_ms = now_ms
        self._changed = threading.Condition()
        self._held: list[OpenGrant] = []
        self._unusable: set[bytes] = set()
        self._wanted: int | None = None
        self._problem: CountersignError | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="grants", daemon=True)
        self.cpu_seconds = 0.0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a request under way is forgotten."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._close_client()
        if self._thread.is_alive():
            self._thread.join()

    def permission_for(self, step: int) -> OpenGrant:
        """The newest open grant that covers a step; asks for the next one early, waits if there is none.

        Raises:
            Rejected: a grant cannot be had, and why. Unavailable: the pause limit is over.
            InvariantBroken: asking has ended by itself, and why.
        """
        started = time.monotonic()
        logged = False
        with self._changed:
            while True:
                grant = self._covering(step)
                if grant is not None:
                    self._renew_if_due(grant, step)
                    return grant
                if self._problem is not None:
                    raise self._problem
                self._want(step)
                waited_seconds = time.monotonic() - started
                limit_seconds = self._settings.pause_limit_seconds
                if limit_seconds is not None and waited_seconds > limit_seconds:
                    raise Unavailable(f"no grant for step {step} after {waited_seconds:.0f} s")
                if not logged and waited_seconds > LOG_AFTER_SECONDS:
                    _log.warning("paused at step %d: no grant covers it yet", step)
                    logged = True
                self._changed.wait(0.5)

    def hold(self, grant: bytes) -> None:
        """A grant from before the run was taken up again: used as long as it covers steps and is open.

        Raises:
            Rejected: ``UNKNOWN_GRANT`` or ``UNKNOWN_POLICY``.
        """
        opened = self.opened(grant)
        with self._changed:
            self._held.append(opened)

    def opened(self, grant: bytes) -> OpenGrant:
        """A grant on the log and what follows from it.

        Raises:
            Rejected: ``UNKNOWN_GRANT`` or ``UNKNOWN_POLICY``.
        """
        record = self._client.state_record(POLICY_TABLE + self._client.grant_record(grant).policy, PolicyRecord)
        if record is None:
            raise Rejected(Reason.UNKNOWN_POLICY, f"the policy of grant {grant.hex()} is not on the log")
        return self._opened(Digest(grant), record.policy)

    def discard(self, grant: bytes) -> None:
        """A grant the log no longer honours."""
        with self._changed:
            self._unusable.add(grant)

    def _covering(self, step: int) -> OpenGrant | None:
        horizon_ms = self._now_ms() + self._settings.closing_margin_ms
        for grant in reversed(self._held):
            if (
                grant.first_step <= step <= grant.last_step
                and grant.closes_at_ms > horizon_ms
                and grant.permission.grant not in self._unusable
            ):
                return grant
        return None

    def _renew_if_due(self, grant: OpenGrant, step: int) -> None:
        permille = self._settings.renew_at_permille
        steps_left = grant.last_step - step
        time_left_ms = grant.closes_at_ms - self._now_ms()
        if time_left_ms * 1_000 <= (grant.closes_at_ms - grant.opened_at_ms) * permille:
            self._want_unless_covered(step + 1, grant)
        elif steps_left * 1_000 <= (grant.last_step - grant.first_step + 1) * permille:
            self._want_unless_covered(grant.last_step + 1, grant)

    def _want_unless_covered(self, step: int, current: OpenGrant) -> None:
        if step > self._planned_steps:
            return
        newer = any(
            grant.first_step <= step <= grant.last_step and grant.opened_at_ms > current.opened_at_ms
            for grant in self._held
        )
        if not newer:
            self._want(step)

    def _want(self, step: int) -> None:
        if self._wanted is None:
            self._wanted = step
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._keep_in_grants()
        except Exception as fault:  # the root of this thread: ``permission_for`` raises it in the job's
            _log.exception("asking for grants ends")
            problem = InvariantBroken(f"grants are not asked for any more: {type(fault).__name__}: {fault}")
            problem.__cause__ = fault
            with self._changed:
                self._problem = problem
                self._changed.notify_all()

    def _keep_in_grants(self) -> None:
        while True:
            with self._changed:
                while self._wanted is None and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                step = self._wanted
            assert step is not None
            grant = self._obtain(step)
            with self._changed:
                if grant is not None:
                    self._held.append(grant)
                self._wanted = None
                self._changed.notify_all()
                if self._problem is not None:
                    return

    def _obtain(self, step: int) -> OpenGrant | None:
        """Ask until there is a grant; None when stopped or hopeless."""
        pause_seconds = FIRST_PAUSE_SECONDS
        while not self._stopping:
            try:
                grant = self._ask(step)
            except Rejected as refusal:
                if refusal.reason in HOPELESS:
                    self._problem = refusal
                    return None
                problem: CountersignError = refusal
            except CountersignError as unusable:
                problem = unusable
            else:
                if grant is not None:
                    self._on_grant(grant)
                return grant
            finally:
                self.cpu_seconds = time.thread_time()
            if not self._stopping:
                _log.warning("the grant for steps from %d is asked for again: %s", step, problem)
            self._pause(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
        return None

    def _ask(self, step: int) -> OpenGrant | None:
        """One request, judged afresh and followed until it is final; None when stopped meanwhile.

        Raises:
            Rejected: it was refused.
        """
        client, settings = self._client, self._settings
        policy = client.policy_in_force()
        delegation = client.state_record(DELEGATION_TABLE + self._job_key, DelegationRecord)
        if delegation is None:
            raise Rejected(Reason.UNKNOWN_JOB_KEY, f"job key {self._job_key.hex()} is not delegated")
        now_ms = self._now_ms()
        # A tenth less than the policy allows: the ledger's clock may be behind this one.
        duration_ms = min(settings.grant_duration_ms, policy.policy.maximum_grant_duration_ms * 9 // 10)
        closes_at_ms = min(now_ms + duration_ms, delegation.expires_at_ms)
        records = {source: client.source_record(source) for source in self._sources}
        refused = {
            source: why_refused(
                policy.policy, record.claim, bool(record.revocation), self._purpose, now_ms, closes_at_ms
            )
            for source, record in records.items()
        }
        admitted = [source for source, reason in refused.items() if reason is None]
        if not admitted:
            raise Rejected(Reason.SOURCE_NOT_GRANTED, "the policy in force admits none of the campaign's sources")
        if policy.policy.entropy_edges_milli:
            admitted = [source for source in admitted if source in self._measured]
            if not admitted:
                raise Rejected(
                    Reason.BASE_LOSSES_MISSING,
                    "the policy in force goes by entropy bands, and of no source that it admits did the campaign commit"
                    " to base losses",
                )
        steps = min(settings.grant_steps, policy.policy.maximum_grant_steps)
        request = self._recorder.grant_request(
            sequence=client.campaign(self._campaign).next_grant,
            policy=policy.id,
            sources=admitted,
            first_step=step,
            last_step=min(step + steps - 1, self._planned_steps),
            closes_at_ms=closes_at_ms,
        )
        status = client.request_grant(request.encoded)
        started = time.monotonic()
        logged = False
        while status.status != "final":
            if self._stopping:
                return None
            if status.status == "refused":
                raise _refusal(status)
            if self._now_ms() >= closes_at_ms:
                raise Rejected(Reason.GRANT_CLOSED, "it would be closed before it was signed by everybody")
            if not logged and time.monotonic() - started > LOG_AFTER_SECONDS:
                _log.warning("a grant is %s, signatures missing: %s", status.status, ", ".join(status.missing))
                logged = True
            self._pause(POLL_SECONDS)
            status = client.grant_status(request.id)
        return self._opened(request.id, policy.policy)

    def _opened(self, grant: Digest, policy: Policy) -> OpenGrant:
        opened = self._client.grant_record(grant)
        refused: dict[bytes, str] = {}
        classes: set[str] = set()
        for source in self._sources:
            record = self._client.source_record(source)
            if source in opened.sources:
                classes.add(record.claim.content_class)
            else:
                refused[source] = self._true_reason(policy, record, opened.opened_at_ms, opened.closes_at_ms)
        return OpenGrant(
            permission=Permission(grant, opened.policy),
            policy=policy,
            first_step=opened.first_step,
            last_step=opened.last_step,
            opened_at_ms=opened.opened_at_ms,
            closes_at_ms=opened.closes_at_ms,
            refused=refused,
            profiles={
                (name, band): maximum_profile(policy, name, band, self._blocks)
                for name in sorted(classes)
                for band in range(band_count(policy))
            },
        )

    def _true_reason(self, policy: Policy, record: SourceRecord, opened_at_ms: int, closes_at_ms: int) -> str:
        revoked = bool(record.revocation) and record.revoked_at_ms <= opened_at_ms
        reason = why_refused(policy, record.claim, revoked, self._purpose, opened_at_ms, closes_at_ms)
        return (reason or Reason.SOURCE_NOT_GRANTED).value

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if not self._stopping:
                self._changed.wait(seconds)


def _refusal(status: GrantStatus) -> Rejected:
    """The first member's refusal, with every member's words."""
    said = "; ".join(f"{each.member}: {each.error}: {each.detail}" for each in status.refusals)
    named = next((each.error for each in status.refusals if each.error in frozenset(Reason)), None)
    # Another word than HOPELESS ones: what one member refuses today it may sign tomorrow.
    reason = Reason(named) if named is not None and Reason(named) not in HOPELESS else Reason.MISSING_SIGNATURE
    return Rejected(reason, f"grant {status.id} was refused: {said}")
