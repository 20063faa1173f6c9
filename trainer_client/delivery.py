"""Delivery: one thread that carries the outbox to a node and follows what becomes of it.

* Events are sent in order. The node's refusal of one stops the sending of those behind it, because they chain
  to it; ``failure`` then names it, once everything before it is settled (which is still sent where it must be again).
* A refusal that may pass (``admission.RETRYABLE``) is tried again for a while.
* An overloaded node is waited for without a limit: it says nothing against the event, only that it has no room yet. It
  checks all of a batch before it refuses any, so one event asks for room, after growing pauses; once that is taken,
  batches grow again.
* A node, or a proxy before it, may take less at once than is sent: a batch it calls too large is halved, and what
  follows stays within that. A single event that is too large is refused.
* An event final implies every earlier accepted one is: a campaign's events are numbered without gaps.
* A node that does not know what it accepted (it was killed) is told again. So is one that dropped it for a reason
  that may pass: a pool drops what has waited too long for others, and takes the same event again.
* Without a node the outbox fills and the job goes on: no trouble with it is raised into the training loop.
* On a full disk what the node says cannot be noted, so it is asked again until it can.
* Anything else that ends the thread, a fault of ours or a broken outbox, is raised by ``failure``: the job would wait
  for ever.

What to do about a failure is left to ``governed.py``.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from consensus.admission import RETRYABLE
from consensus.rejection import CountersignError, InvariantBroken, Reason, Rejected
from trainer_client.calls import EventStatus
from trainer_client.outbox import DISK_FULL_RETRY_SECONDS, Fate, Outbox, OutboxFull, Outgoing
from trainer_client.submit import Client

BATCH_EVENTS = 256
BATCH_BYTES = 1 << 20
POLL_SECONDS = 0.1
UNREACHABLE_PAUSE_SECONDS = 1.0
RETRYABLE_LIMIT_SECONDS = 60.0
FIRST_SLOW_SECONDS = 0.2
LONGEST_SLOW_SECONDS = 5.0
DROPS_WHILE_THE_LOG_GREW = 2
"""So often a node whose log grew meanwhile drops (after ten minutes each) what it was sent again, before that counts as
a refusal."""

PASSING = frozenset(reason.value for reason in RETRYABLE)

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Dropped:
    """An event that the node accepted and dropped: the log's size when it was accepted again, and how many of its
    waits since saw the log grow."""

    id: bytes
    log_size: int | None = None
    chances: int = 0


class Delivery:
    """Carries ``outbox`` to ``client``'s node from ``start`` until ``stop``."""

    def __init__(
        self,
        outbox: Outbox,
        client: Client,
        retryable_limit_seconds: float = RETRYABLE_LIMIT_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outbox = outbox
        self._client = client.again()
        self._retryable_limit_seconds = retryable_limit_seconds
        self._monotonic = monotonic
        self._stopping = threading.Event()
        self._refused: bytes | None = None
        self._waiting_since: float | None = None
        self._batch_events = BATCH_EVENTS
        """How many events are sent at once: all that may be, fewer for a node that was overloaded lately."""
        self._batch_bytes = BATCH_BYTES
        """How much is sent at once: all that may be, less where the node called it too large."""
        self._slow_seconds = 0.0
        """How long an overloaded node was last left alone; 0 where it takes what it is sent."""
        self._send_from: float | None = None
        """Before this time nothing is sent."""
        self._told_of_slowness = False
        self._dropped: _Dropped | None = None
        self._reachable = True
        self._disk_is_full = False
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self.cpu_seconds = 0.0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End at once; what is not delivered, or not answered yet, stays in the outbox."""
        self._stopping.set()
        self._client.close()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def failure(self) -> Fate | None:
        """The first event that was rejected, once all before it are settled; None while all is well.

        Raises:
            InvariantBroken: delivery has ended by itself, and why; what is not delivered stays in the outbox.
        """
        fault = self._fault
        if fault is not None:
            raise InvariantBroken(f"events are not delivered any more: {type(fault).__name__}: {fault}") from fault
        refused = self._refused
        if refused is None:
            return None
        fate = self._outbox.fate(refused)
        assert fate is not None
        return fate if self._outbox.is_settled_before(fate.position) else None

    def resume(self) -> None:
        """Send again, after a failure has been dealt with."""
        self._refused = None

    def _run(self) -> None:
        try:
            self._deliver()
        except Exception as fault:  # the root of this thread: ``failure`` raises it in the job's
            _log.exception("delivery ends")
            self._fault = fault

    def _deliver(self) -> None:
        while not self._stopping.is_set():
            try:
                moved = self._round()
            except OutboxFull as problem:
                if not self._disk_is_full:
                    _log.warning("the outbox waits for room on the disk: %s", problem)
                self._disk_is_full = True
                self._batch_events = 1  # what is sent is sent again until its answer can be noted
                self._stopping.wait(DISK_FULL_RETRY_SECONDS)
                continue
            except CountersignError as problem:
                if self._reachable and not self._stopping.is_set():
                    _log.warning("events are spooled, the node gives no usable answer: %s", problem)
                self._reachable = False
                self._stopping.wait(UNREACHABLE_PAUSE_SECONDS)
                continue
            finally:
                self.cpu_seconds = time.thread_time()
            if not self._reachable:
                _log.warning("the node answers again")
                self._reachable = True
            if moved:
                self._disk_is_full = False
            else:
                self._outbox.wait_changed(POLL_SECONDS)

    def _round(self) -> bool:
        """Whether anything moved."""
        moved = self._send()
        return self._follow() or moved

    def _send(self) -> bool:
        if self._send_from is not None and self._monotonic() < self._send_from:
            return False
        self._send_from = None
        batch = self._outbox.queued(self._batch_events, self._batch_bytes, self._refused_position())
        if not batch:
            self._told_of_slowness = False
            return False
        try:
            results = self._client.submit_batch([outgoing.event for outgoing in batch])
        except Rejected as refusal:
            if refusal.reason is not Reason.OVERSIZED:
                raise
            self._note_oversized(batch, refusal)
            return True
        if not all(self._note_answer(outgoing, result) for outgoing, result in zip(batch, results, strict=True)):
            return False
        self._batch_events = min(2 * self._batch_events, BATCH_EVENTS)
        self._slow_seconds = 0.0
        return True

    def _note_answer(self, outgoing: Outgoing, result: EventStatus) -> bool:
        """Record one answer; False where those behind it must wait."""
        if result.error == Reason.DUPLICATE.value:
            result = self._status(outgoing.id) or result
        if result.status == "final":
            self._outbox.finalize([outgoing.id])
        elif result.status != "rejected":
            if self._dropped is not None and self._dropped.id == outgoing.id:
                self._dropped.log_size = self._client.log_size()
            self._outbox.accept([outgoing.id])
        elif result.error == Reason.OVERLOADED.value:
            self._slow_down(result)
            return False
        elif result.error in PASSING and not self._too_long():
            return False
        else:
            self._reject(outgoing.id, result)
            return False
        self._waiting_since = None
        return True

    def _note_oversized(self, batch: tuple[Outgoing, ...], refusal: Rejected) -> None:
        size_bytes = sum(len(outgoing.event) for outgoing in batch)
        if len(batch) > 1:
            self._batch_bytes = size_bytes // 2
            _log.warning("the node takes no batch of %d bytes, smaller ones are sent: %s", size_bytes, refusal.detail)
        else:
            why = EventStatus(batch[0].id.hex(), "rejected", error=refusal.reason.value, detail=refusal.detail)
            self._reject(batch[0].id, why)

    def _slow_down(self, result: EventStatus) -> None:
        self._waiting_since = None
        self._batch_events = 1
        self._slow_seconds = min(max(2 * self._slow_seconds, FIRST_SLOW_SECONDS), LONGEST_SLOW_SECONDS)
        self._send_from = self._monotonic() + self._slow_seconds
        if not self._told_of_slowness:
            _log.warning("the node asks to slow down, events wait in the outbox: %s", result.detail)
            self._told_of_slowness = True

    def _follow(self) -> bool:
        ends = self._outbox.oldest_and_newest_accepted()
        if ends is None:
            return False
        oldest, newest = ends
        found = self._status(newest.id)
        if found is not None and found.status == "final":
            self._outbox.finalize_accepted_through(newest.position)
            return True
        if oldest.id != newest.id:
            found = self._status(oldest.id)
        if found is None:
            self._outbox.requeue_accepted()
            return True
        if found.status == "final":
            self._outbox.finalize([oldest.id])
            return True
        if found.status == "rejected":
            if found.error in PASSING and self._may_still_pass(oldest.id, found):
                self._outbox.requeue_accepted()
            else:
                self._reject(oldest.id, found)
            return True
        return False

    def _may_still_pass(self, identifier: bytes, found: EventStatus) -> bool:
        """Whether the oldest accepted event, which the node dropped for a reason that may pass, is sent again.

        The reason does not tell why it had to wait. A node may count time without a quorum, when nothing becomes final:
        that counts for nothing here, and ends with the outage. An event that lacks something which never comes (a
        delegation that was never made) could be sent for ever, to a log on which others become final. All before it in
        the outbox is settled, so what it lacks is nothing of ours: each wait in which the log grew was a chance, and
        after ``DROPS_WHILE_THE_LOG_GREW`` of them, in all, it is over. More than one, as others may have been taken
        first.
        """
        dropped = self._dropped
        if dropped is None or dropped.id != identifier:
            dropped = _Dropped(identifier)
        elif dropped.log_size is not None and self._client.log_size() > dropped.log_size:
            dropped.chances += 1
        self._dropped = dropped
        if dropped.chances >= DROPS_WHILE_THE_LOG_GREW:
            return False
        _log.warning("event %s is sent again, the node dropped it: %s", identifier.hex(), found.detail)
        return True

    def _refused_position(self) -> int | None:
        refused = self._refused
        fate = None if refused is None else self._outbox.fate(refused)
        return None if fate is None else fate.position

    def _status(self, identifier: bytes) -> EventStatus | None:
        """None for an event the node does not know."""
        try:
            return self._client.status(identifier)
        except Rejected as refusal:
            if refusal.reason is Reason.NOT_FOUND:
                return None
            raise

    def _reject(self, identifier: bytes, result: EventStatus) -> None:
        self._outbox.reject([identifier], result.error, result.detail)
        if self._refused is None:
            self._refused = identifier
        else:
            earlier, found = self._outbox.fate(self._refused), self._outbox.fate(identifier)
            assert earlier is not None
            assert found is not None
            if found.position < earlier.position:
                self._refused = identifier
        _log.warning("event %s was rejected: %s: %s", identifier.hex(), result.error, result.detail)

    def _too_long(self) -> bool:
        now = self._monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        return now - self._waiting_since > self._retryable_limit_seconds
