"""The ledger's side of a run as every rank of its job sees it: the first rank's, whose answers the others are told.

Each method is a message among ranks, so every rank calls the same ones in the same order; arguments count on the
first. Steps are not told of here: only the first rank's book records them (``step_book.py``).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from consensus import portions as p
from consensus.identifiers import Digest
from consensus.rejection import InvariantBroken
from consensus.review import DataSlice, Metric
from trainer_client.calls import CampaignStatus
from trainer_client.grants import OpenGrant
from trainer_client.ledger_side import LedgerSide, News
from trainer_client.outbox import Fate
from trainer_client.ranks import Ranks
from trainer_client.record import Permission, Place, RecordedEvent
from trainer_client.resumption import RecordedPast, RecordedStep

T = TypeVar("T")


class SharedLedger:
    """``LedgerSide`` for all ranks: see there what its methods do and raise.

    Args:
        own: on the first rank, and there alone.
    """

    def __init__(self, ranks: Ranks, own: LedgerSide | None) -> None:
        self._ranks = ranks
        self._own = own
        self._place: Place | None = None

    @property
    def place(self) -> Place:
        """Where the campaign stands; on other ranks than the first without the steps taken since it last went back.

        Raises:
            InvariantBroken: it has not been opened.
        """
        if self._own is not None:
            return self._own.place
        if self._place is None:
            raise InvariantBroken("the campaign has not been opened")
        return self._place

    @property
    def background_cpu_seconds(self) -> float:
        """This rank's."""
        return 0.0 if self._own is None else self._own.background_cpu_seconds

    def deliver_left(self) -> CampaignStatus | None:
        return self._told(lambda own: own.deliver_left())

    def open_campaign(self, terms: p.Campaign, manifest: Sequence[p.ManifestRange]) -> RecordedEvent:
        return self._moved(lambda own: own.open_campaign(terms, manifest))

    def take_up(self, head: CampaignStatus) -> None:
        self._moved(lambda own: own.take_up(head))

    def past_since(self, step: int, head: CampaignStatus) -> RecordedPast:
        return self._told(lambda own: own.past_since(step, head))

    def opening(self) -> p.Campaign:
        return self._told(lambda own: own.opening())

    def admitted_sources(self, manifest: Sequence[p.ManifestRange]) -> frozenset[bytes]:
        return self._told(lambda own: own.admitted_sources(manifest))

    def start_grants(
        self,
        blocks: tuple[str, ...],
        measured: Collection[bytes],
        on_grant: Callable[[OpenGrant], None],
        past: Sequence[RecordedStep] = (),
    ) -> Mapping[bytes, OpenGrant]:
        return self._told(lambda own: own.start_grants(blocks, measured, on_grant, past))

    def permission_for(self, step: int) -> OpenGrant:
        return self._told(lambda own: own.permission_for(step))

    def news(self, candidate: RecordedEvent | None) -> News:
        return self._told(lambda own: own.news(candidate))

    def forget_through(self, index: int) -> None:
        if self._own is not None:
            self._own.forget_through(index)

    def wait_all_settled(self) -> Fate | None:
        return self._told(lambda own: own.wait_all_settled())

    def roll_back_to_log(self, failure: Fate) -> tuple[Place, Permission]:
        return self._moved(lambda own: own.roll_back_to_log(failure))

    def record_memorization_rollback(
        self, permission: Permission, step: Digest, signals: tuple[p.MemorizationSignal, ...]
    ) -> RecordedEvent:
        return self._moved(lambda own: own.record_memorization_rollback(permission, step, signals))

    def record_evaluation(
        self, name: str, metrics: Sequence[Metric], data: DataSlice, script: tuple[str, bytes]
    ) -> RecordedEvent | None:
        return self._told(lambda own: own.record_evaluation(name, metrics, data, script))

    def wait_for_decisions(self, limit_seconds: float) -> tuple[bytes, ...]:
        return self._told(lambda own: own.wait_for_decisions(limit_seconds))

    def open_findings(self) -> tuple[bytes, ...]:
        return self._told(lambda own: own.open_findings())

    def record_release(self, file_name: str, file_sha256: bytes) -> RecordedEvent:
        return self._told(lambda own: own.record_release(file_name, file_sha256))

    def record_abandon(self, reason: str) -> RecordedEvent:
        return self._told(lambda own: own.record_abandon(reason))

    def close(self, *, wait: bool) -> None:
        """As ``LedgerSide.close``; no message."""
        if self._own is not None:
            self._own.close(wait=wait)

    def _told(self, call: Callable[[LedgerSide], T]) -> T:
        return self._ranks.by_first(lambda: call(self._first()))

    def _moved(self, call: Callable[[LedgerSide], T]) -> T:
        """As ``_told``, with where the campaign stands afterwards."""
        result, self._place = self._ranks.by_first(lambda: (call(self._first()), self._first().place))
        return result

    def _first(self) -> LedgerSide:
        assert self._own is not None
        return self._own
