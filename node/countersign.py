"""The grant desk: countersigning grants by the owner's configured rules, or by hand.

The operator's node takes an unsigned grant from its job, signs it, and asks the nodes of every named
data-source authority and of governance. Each checks what admission will check, at this moment's state, then
its owner's rules (``[countersign]`` in the configuration). Where a rule says no, or ``auto`` is off, the grant
waits for ``countersign grant sign``; the signature given later is delivered to the operator's node. When the
last needed one is there, the grant is submitted as an event.

A node countersigns a grant at most once, and nothing but a grant.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from consensus import portions as p
from consensus.admission import RETRYABLE, check_granted_sources
from consensus.codec import decode, encode
from consensus.event import (
    CheckedEvent,
    Entry,
    EventSignature,
    Kind,
    add_signature,
    check_signature,
    check_unsigned,
    pack_parts,
    sign_entry,
    unpack,
)
from consensus.identifiers import Digest, MemberId, Role
from consensus.keys import Signer
from consensus.membership import Member
from consensus.membership_change import holder, holders
from consensus.policy import check_grant_terms
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    CAMPAIGN_TABLE,
    POLICY_HEAD_KEY,
    POLICY_TABLE,
    SOURCE_TABLE,
    CampaignHead,
    CampaignRecord,
    PolicyHead,
    PolicyRecord,
    SourceRecord,
    StateView,
)
from node.clock import Clock
from node.config import CountersignSection
from node.ledger import Ledger
from node.messages import AskCountersign, Countersigned, DeliverSignature, Done
from node.network import Network
from node.service import EventState, EventStatus, GrantRefusal, GrantState, GrantStatus

log = logging.getLogger("countersign.grants")

GRANTS_KEPT = 200
"""For each operator that asks, so that none can push another's out."""
ASK_SECONDS = 10.0
RETRY_SECONDS = 1.0
WAITING = "waiting"


@dataclass(slots=True)
class _Grant:
    """A grant this node gathers for, or was asked to countersign (``asked_by``)."""

    event: CheckedEvent
    entry: Entry
    needed: "_Needed"
    asked_by: MemberId | None
    refusals: dict[MemberId, GrantRefusal] = field(default_factory=dict)
    submitted: bool = False

    @property
    def missing(self) -> list[Member]:
        """Members to ask: each owner that has not signed, and all of governance while too few have."""
        held = {MemberId(signature.signer) for signature in self.entry.signatures}
        missing = [member for member in self.needed.each if member.id not in held]
        if sum(member.id in held for member in self.needed.governance) < self.needed.governance_threshold:
            missing += [member for member in self.needed.governance if member.id not in held]
        return missing


@dataclass(frozen=True, slots=True)
class _Needed:
    """Whose signatures a grant needs: each of ``each``, and ``governance_threshold`` of ``governance``."""

    each: tuple[Member, ...]
    governance: tuple[Member, ...]
    governance_threshold: int

    def __contains__(self, member: object) -> bool:
        return any(held.id == member for held in (*self.each, *self.governance))


class CountersignDesk:
    """One member's grants: gathered as an operator, countersigned as an owner or governance."""

    def __init__(
        self,
        ledger: Ledger,
        network: Network,
        clock: Clock,
        member: Member,
        identity: Signer,
        rules: CountersignSection,
        submit: Callable[[bytes], CheckedEvent],
        status_of: Callable[[Digest], EventStatus],
    ) -> None:
        self._ledger = ledger
        self._network = network
        self._clock = clock
        self._member = member
        self._identity = identity
        self._rules = rules
        self._submit = submit
        self._status_of = status_of
        self._grants: OrderedDict[Digest, _Grant] = OrderedDict()
        self._nursery: trio.Nursery | None = None
        self._is_member = True

    async def run(self) -> None:
        """Ask for countersignatures until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    def begin_epoch(self, member: Member | None, identity: Signer | None) -> None:
        """Go on as this member, None for none; forget grants that need one who left, or are signed by one."""
        if member is not None and identity is not None:
            self._member, self._identity = member, identity
        self._is_member = member is not None
        for event_id, grant in list(self._grants.items()):
            try:
                grant.needed = self._needed(grant.event)
                for signature in grant.entry.signatures:
                    self._ledger.committee.member(MemberId(signature.signer))
            except Rejected as error:
                log.info("grant %s is given up: %s", event_id.hex()[:16], error)
                del self._grants[event_id]

    def _require_member(self) -> None:
        if not self._is_member:
            raise Rejected(Reason.UNKNOWN_MEMBER, f"{self._member.name} is no member in this epoch")

    # The operator's side

    async def request(self, encoded_unsigned: bytes) -> Digest:
        """Sign an unsigned grant event by the operator's own rules and start to gather countersignatures.

        Raises:
            Rejected: the rule it breaks; ``WRONG_AUTHOR`` for another operator's.
        """
        self._require_member()
        event = self._check(encoded_unsigned)
        if event.entry.author != self._member.id:
            raise Rejected(Reason.WRONG_AUTHOR, "a job asks the node of its own operator")
        if event.id in self._grants:
            return event.id
        self._check_admissible(event)
        grant = _Grant(event, event.entry, self._needed(event), None)
        withheld = self._why_withheld(event)
        if withheld is None:
            grant.entry = sign_entry(event.entry, self._member.id, self._member.role, self._identity)
        else:
            log.info("grant %s waits for a signature by hand: %s", event.id.hex()[:16], withheld)
        self._keep(event.id, grant)
        assert self._nursery is not None
        self._nursery.start_soon(self._gather, event.id)
        return event.id

    async def _gather(self, event_id: Digest) -> None:
        while (grant := self._grants.get(event_id)) is not None and not grant.submitted:
            async with trio.open_nursery() as nursery:
                for member in grant.missing:
                    if member.id != self._member.id:
                        nursery.start_soon(self._ask, grant, member, nursery.cancel_scope)
            try:
                self._submit_if_complete(event_id)
            except (Rejected, Unavailable) as error:
                log.warning("grant %s is complete and could not be submitted: %s", event_id.hex()[:16], error)
            terms = grant.event.governance
            assert isinstance(terms, p.GrantTerms)
            if grant.submitted or terms.closes_at_ms < self._clock.now_ms() or self._is_refused(grant):
                return
            await trio.sleep(RETRY_SECONDS)

    async def _ask(self, grant: _Grant, member: Member, round_scope: trio.CancelScope) -> None:
        """Ask one member; end the round with the last signature needed, whoever else is silent."""
        if member.id not in self._network.connected:
            return
        event = pack_parts(encode(grant.event.entry), grant.event.portions_bytes)
        try:
            encoded = await self._network.request(member.id, encode(AskCountersign(event)), ASK_SECONDS)
            answer = decode(encoded, Countersigned, 1 << 16)
            if answer.signature is not None:
                self._take_signature(grant, answer.signature)
                if not grant.missing:
                    round_scope.cancel()
            elif answer.reason in set(Reason) - RETRYABLE:
                grant.refusals[member.id] = GrantRefusal(member.name, Reason(answer.reason), answer.detail)
            else:
                # It waits for a hand, or its log is a moment behind ours.
                grant.refusals.pop(member.id, None)
        except (Unavailable, Rejected) as error:
            log.info("countersignature of %s: %s", member.name, error)

    def _take_signature(self, grant: _Grant, signature: EventSignature) -> None:
        if MemberId(signature.signer) not in grant.needed:
            raise Rejected(Reason.SURPLUS_SIGNATURE, "a signature the grant does not need")
        check_signature(grant.entry, grant.event.id, signature, self._ledger.committee)
        grant.refusals.pop(MemberId(signature.signer), None)
        grant.entry = add_signature(grant.entry, signature)

    def _submit_if_complete(self, event_id: Digest) -> None:
        grant = self._grants[event_id]
        if grant.submitted or grant.missing:
            return
        self._submit(pack_parts(encode(grant.entry), grant.event.portions_bytes))
        grant.submitted = True

    def _is_refused(self, grant: _Grant) -> bool:
        """Whether the rules of the log refuse it; an owner's own refusal can still be lifted by hand."""
        try:
            self._check_admissible(grant.event)
        except Rejected:
            return True
        return False

    # The countersigner's side

    async def answer(self, asker: MemberId, request: AskCountersign | DeliverSignature) -> bytes:
        """The answer to another node's request."""
        if isinstance(request, DeliverSignature):
            grant = self._grants.get(Digest(request.event_id))
            if grant is not None and grant.asked_by is None:
                self._take_signature(grant, request.signature)
                self._submit_if_complete(Digest(request.event_id))
            return encode(Done())
        self._require_member()
        event = self._check(request.event)
        if event.entry.author != asker:
            raise Rejected(Reason.WRONG_AUTHOR, "a grant is asked for by its operator's own node")
        held = self._grants.get(event.id)
        if held is not None and (given := self._given(held)) is not None:
            return encode(Countersigned(given, "", ""))
        try:
            self._check_admissible(event)
            needed = self._needed(event)
            if self._member.id not in needed:
                raise Rejected(Reason.SURPLUS_SIGNATURE, f"the grant names no source of {self._member.name}")
        except Rejected as error:
            return encode(Countersigned(None, error.reason.value, error.detail))
        grant = held or _Grant(event, event.entry, needed, asker)
        self._keep(event.id, grant)
        withheld = self._why_withheld(event)
        if withheld is not None:
            log.info("grant %s waits for a signature by hand: %s", event.id.hex()[:16], withheld)
            return encode(Countersigned(None, WAITING, withheld))
        grant.entry = sign_entry(event.entry, self._member.id, self._member.role, self._identity)
        given = self._given(grant)
        return encode(Countersigned(given, "", ""))

    async def sign(self, event_id: Digest) -> GrantStatus:
        """Countersign by hand and deliver to the operator's node.

        Raises:
            Rejected: ``NOT_FOUND``, or the rule of the log it breaks by now.
        """
        self._require_member()
        grant = self._grants.get(event_id)
        if grant is None:
            raise Rejected(Reason.NOT_FOUND, f"no grant {event_id.hex()} waits here")
        self._check_admissible(grant.event)
        grant.entry = sign_entry(grant.entry, self._member.id, self._member.role, self._identity)
        if grant.asked_by is None:
            self._submit_if_complete(event_id)
            return self.status(event_id)
        given = self._given(grant)
        assert given is not None
        message = encode(DeliverSignature(event_id, given))
        try:
            await self._network.request(grant.asked_by, message, ASK_SECONDS)
        except Unavailable as error:
            log.info("signature kept, the operator's node will ask again: %s", error)
        return self.status(event_id)

    def _given(self, grant: _Grant) -> EventSignature | None:
        return next((held for held in grant.entry.signatures if held.signer == self._member.id), None)

    def _why_withheld(self, event: CheckedEvent) -> str | None:
        """Which of the owner's rules leaves this grant to its hand; None if all are kept to."""
        rules = self._rules
        terms = event.governance
        assert isinstance(terms, p.GrantTerms)
        if not rules.auto:
            return "auto is off"
        view = StateView(self._ledger.final.state)
        campaign = view.get(CAMPAIGN_TABLE + event.entry.campaign, CampaignRecord, Reason.UNKNOWN_CAMPAIGN, "campaign")
        if campaign.purpose not in rules.purposes and "*" not in rules.purposes:
            return f"purpose '{campaign.purpose}'"
        operator = self._ledger.committee.member(MemberId(event.entry.author)).name
        if operator not in rules.operators and "*" not in rules.operators:
            return f"operator '{operator}'"
        if terms.last_step - terms.first_step + 1 > rules.max_steps:
            return f"more than {rules.max_steps} steps"
        if terms.closes_at_ms - self._clock.now_ms() > rules.max_duration_seconds * 1_000:
            return f"open for more than {rules.max_duration_seconds} s"
        for item in event.items:
            assert isinstance(item, p.GrantedSource)
            record = view.get(SOURCE_TABLE + item.source, SourceRecord, Reason.UNKNOWN_SOURCE, "source")
            own = holder(view, record.author) == self._member.id
            named = {"*", item.source.hex(), record.claim.name} & set(rules.sources)
            if own and not named:
                return f"source '{record.claim.name}'"
        return None

    # Both

    def _check(self, encoded: bytes) -> CheckedEvent:
        wire = unpack(encoded)
        event = check_unsigned(wire.entry, wire.portions, self._ledger.committee)
        if event.entry.kind is not Kind.GRANT:
            raise Rejected(Reason.BAD_FIELD, f"{event.entry.kind.phrase} is not countersigned here")
        if event.entry.signatures:
            raise Rejected(Reason.SURPLUS_SIGNATURE, "a grant is asked for without signatures")
        return event

    def _check_admissible(self, event: CheckedEvent) -> None:
        """What admission will check, but for the signatures, at the finalized state and this moment."""
        terms = event.governance
        assert isinstance(terms, p.GrantTerms)
        view = StateView(self._ledger.final.state)
        identifier = event.entry.campaign
        campaign = view.get(CAMPAIGN_TABLE + identifier, CampaignRecord, Reason.UNKNOWN_CAMPAIGN, "campaign")
        head = view.get(CAMPAIGN_HEAD_TABLE + identifier, CampaignHead, Reason.UNKNOWN_CAMPAIGN, "campaign")
        if head.closed:
            raise Rejected(Reason.CAMPAIGN_CLOSED, f"the campaign is {head.closed}")
        if event.entry.author != holder(view, campaign.operator):
            raise Rejected(Reason.WRONG_AUTHOR, "the campaign is another operator's")
        in_force = view.get(POLICY_HEAD_KEY, PolicyHead, Reason.UNKNOWN_POLICY, "policy")
        if in_force.policy != terms.policy:
            raise Rejected(Reason.POLICY_NOT_IN_FORCE, f"the policy in force is {in_force.policy.hex()}")
        policy = view.get(POLICY_TABLE + terms.policy, PolicyRecord, Reason.UNKNOWN_POLICY, "policy").policy
        now_ms = self._clock.now_ms()
        check_grant_terms(Digest(terms.policy), policy, terms, now_ms)
        sources = tuple(item.source for item in event.items if isinstance(item, p.GrantedSource))
        check_granted_sources(view, campaign, policy, sources, now_ms, terms.closes_at_ms)

    def _needed(self, event: CheckedEvent) -> _Needed:
        committee = self._ledger.committee
        view = StateView(self._ledger.final.state)
        owners = holders(
            view,
            (
                view.get(SOURCE_TABLE + item.source, SourceRecord, Reason.UNKNOWN_SOURCE, "source").author
                for item in event.items
                if isinstance(item, p.GrantedSource)
            ),
        )
        each = (MemberId(event.entry.author), *map(MemberId, sorted(owners)))
        return _Needed(
            each=tuple(committee.member(identifier) for identifier in each),
            governance=committee.role_members(Role.GOVERNANCE),
            governance_threshold=committee.threshold(Role.GOVERNANCE),
        )

    def _keep(self, event_id: Digest, grant: _Grant) -> None:
        self._grants[event_id] = grant
        same_asker = [held for held, other in self._grants.items() if other.asked_by == grant.asked_by]
        for surplus in same_asker[:-GRANTS_KEPT]:
            del self._grants[surplus]

    def status(self, event_id: Digest) -> GrantStatus:
        """How far a grant has come.

        Raises:
            Rejected: ``NOT_FOUND``.
        """
        committee = self._ledger.committee
        on_log = self._status_of(event_id)
        grant = self._grants.get(event_id)
        if on_log.index is not None:
            # What a countersigner holds has its own signature alone.
            event = self._ledger.checked(on_log.index)
            if event.entry.kind is Kind.GRANT:
                grant = _Grant(event, event.entry, _Needed((), (), 0), None, submitted=True)
                committee = self._ledger.epochs.at(on_log.index).committee
        if grant is None:
            raise Rejected(Reason.NOT_FOUND, f"no grant {event_id.hex()} is known here")
        refusals = list(grant.refusals.values())
        if on_log.state is EventState.FINAL:
            state = GrantState.FINAL
        elif on_log.state is EventState.REJECTED:
            state = GrantState.REFUSED
            assert on_log.reason is not None
            refusals.append(GrantRefusal("the log", on_log.reason, on_log.detail))
        elif grant.submitted:
            state = GrantState.SUBMITTED
        elif grant.refusals:
            state = GrantState.REFUSED
        else:
            state = GrantState.GATHERING
        return GrantStatus(
            id=event_id,
            campaign=Digest(grant.event.entry.campaign),
            state=state,
            signers=tuple(committee.member(MemberId(held.signer)).name for held in grant.entry.signatures),
            missing=tuple(member.name for member in grant.missing),
            refusals=tuple(refusals),
        )

    def list(self) -> tuple[GrantStatus, ...]:
        """Grants being gathered, waiting for this member's hand, or lately seen; newest last."""
        return tuple(self.status(event_id) for event_id in self._grants)
