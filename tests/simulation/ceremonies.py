"""The ceremony of an epoch to come, over the simulated network: folders that members pass on to each other, or lose.

A ``Seat`` keeps what it has seen and over which commitments it has dealt; all else dies with it. ``LastDealers`` are
two members that together fix their role's key if they can: one waits for everybody else's reveal, then chooses its
polynomial *in the exponent*, so that the sum of all constant terms is a key whose secret the two know and every value
it deals to honest members fits. ``BadDealer`` gives one member a value off its polynomial and insists on it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from ledger_fixtures import digest

from consensus import bls
from consensus import key_generation as dkg
from consensus.ceremony import Answer, Body, Commit, Confirm, Deal, Invitation, Transcript
from consensus.identifiers import VOTING_ROLES, MemberId, Role
from consensus.membership import Membership
from consensus.participant import MemberSecrets, MemberSeeds, Participant, derive_seed
from consensus.rejection import Reason, Rejected
from consensus.threshold import lagrange_weights

if TYPE_CHECKING:
    from simulation.ledgers import LedgerSimulation

TURN_MS = 200
CRASHES_IN_A_TURN = 20
"""Of a host's chances to crash at a step, so many are taken at each turn of its seat."""

Done = Callable[[Membership, dict[str, MemberSecrets]], None]
Failed = Callable[["Seat", Rejected], None]


class Ceremony:
    """One ceremony: it ends for all once somebody has the membership, or names who spoilt it."""

    def __init__(
        self,
        simulation: "LedgerSimulation",
        invitation: Invitation,
        kept: Mapping[str, MemberSeeds],
        done: Done,
        failed: Failed,
    ) -> None:
        self.simulation = simulation
        self.invitation = invitation
        self.over = False
        self._done, self._failed = done, failed
        self._seen: dict[frozenset[bytes], Transcript | Rejected] = {}
        cast: dict[str, type[Seat]] = dict(
            zip(simulation.plan.last_dealers, (LastDealersHelper, LastDealer), strict=False)
        )
        cast.update(dict.fromkeys(simulation.plan.bad_dealers, BadDealer))
        self.seats = [
            cast.get(invited.name, Seat)(self, invited.name, kept.get(invited.name)) for invited in invitation.members
        ]
        for seat in self.seats:
            simulation.at(simulation.random.randint(1, TURN_MS), seat.act)

    def transcript(self, messages: Iterable[bytes]) -> Transcript:
        """Everything in a folder, checked; what it is worth does not depend on whose it is.

        Raises:
            Rejected: as ``Transcript``.
        """
        held = frozenset(messages)
        if held not in self._seen:
            try:
                self._seen[held] = Transcript(self.invitation, sorted(held))
            except Rejected as refusal:
                self._seen[held] = refusal
        found = self._seen[held]
        if isinstance(found, Rejected):
            raise found
        return found

    def ends(self, transcript: Transcript) -> None:
        """Everybody has said everything. Whoever cheated may have no secret of its own."""
        made = transcript.membership()
        self.over = True
        secrets = {}
        for seat in self.seats:
            try:
                secrets[seat.name] = seat.participant.secrets(transcript)
            except Rejected:
                if type(seat) is Seat:
                    raise
        self._done(made, secrets)

    def culprit(self, refusal: dkg.BadDealing) -> str:
        """Whom a refusal names; only one role's key is dealt in these plans."""
        role = next(role for role in VOTING_ROLES if not self.invitation.key_ceremony(role).summed)
        return self.invitation.role_members(role)[refusal.dealer - 1]

    def fails(self, seat: "Seat", refusal: Rejected) -> None:
        """Somebody spoilt it, and ``seat`` knows who."""
        self.over = True
        self._failed(seat, refusal)


class Seat:
    """One member and its folder."""

    def __init__(self, ceremony: Ceremony, name: str, kept: MemberSeeds | None) -> None:
        self.ceremony = ceremony
        self.name = name
        self.address = ceremony.simulation.address_of(name) or MemberId(digest("to be", name))
        self.held: dict[bytes, None] = {}
        self._kept = kept
        self._dealt_over = b""
        self._sit_down()

    def _sit_down(self) -> None:
        epoch = self.ceremony.invitation.epoch
        self.participant = Participant(
            self.ceremony.invitation,
            self.name,
            digest("ceremony", epoch, self.name),
            dealt_over=self._dealt_over,
            kept=self._kept,
        )

    def act(self) -> None:
        """Say what is due, pass on what is here, and again after a while."""
        ceremony, simulation = self.ceremony, self.ceremony.simulation
        if ceremony.over:
            return
        if not simulation.healed and simulation.random.random() < CRASHES_IN_A_TURN * simulation.plan.crash:
            simulation.note("seat crash", self.name)
            self._sit_down()
        try:
            self._take_turn()
        except Rejected as refusal:
            if refusal.reason is not Reason.CEREMONY_INCOMPLETE:  # messages overtake each other
                ceremony.fails(self, refusal)
                return
        for other in ceremony.seats:
            if other is not self and simulation.gets_through(self.address, other.address):
                messages = dict(self.held)
                simulation.at(
                    simulation.delay_ms(self.address), lambda other=other, got=messages: other.held.update(got)
                )
        simulation.at(simulation.random.randint(1, 2 * TURN_MS), self.act)

    def _take_turn(self) -> None:
        transcript = self.ceremony.transcript(self.held)
        message = self.says(transcript)
        self._dealt_over = self.participant.dealt_over
        if message is not None:
            self.held[message] = None
            self.ceremony.simulation.note("says", self.name, len(self.held))
        elif not transcript.awaited():
            self.ceremony.ends(transcript)

    def says(self, transcript: Transcript) -> bytes | None:
        """What is due from it."""
        return self.participant.next_message(transcript)

    # For those that cheat

    @property
    def role(self) -> Role:
        return self.participant.role

    @property
    def index(self) -> int:
        """Its own in its role, from 1."""
        return self.ceremony.invitation.role_members(self.role).index(self.name) + 1

    def signed(self, body: Body) -> bytes:
        return self.participant._signed(body)


class LastDealers(Seat):
    """What the two have in common: the secret they want, and a confirmation made of everybody else's."""

    WANTED = bls.secret_from_seed(b"what the last dealers want to be")

    def _honest(self) -> list[int]:
        names = self.ceremony.invitation.role_members(self.role)
        return [at for at, name in enumerate(names, start=1) if name not in self.ceremony.simulation.plan.last_dealers]

    def says(self, transcript: Transcript) -> bytes | None:
        roster_complete = not transcript.missing(Commit, self.ceremony.invitation.role_members(self.role))
        if not roster_complete or not transcript.is_dealt(self.role):
            return super().says(transcript)
        if self.name not in transcript.said(Deal):
            return self.deals(transcript)
        return self._confirms(transcript)

    def deals(self, transcript: Transcript) -> bytes | None:
        """Round 2 of the key generation."""
        return super().says(transcript)

    def _confirms(self, transcript: Transcript) -> bytes | None:
        """Nobody knows the secret of its share key; but honest members' parts and the wanted secret give its part."""
        names = self.ceremony.invitation.role_members(self.role)
        said = transcript.said(Confirm, self.role)
        honest = self._honest()
        if self.name in said or any(names[at - 1] not in said for at in honest):
            return None
        ceremony, group = self.ceremony.invitation.key_ceremony(self.role), transcript.group(self.role)
        parts = {at: said[names[at - 1]].possession.signature for at in honest}
        parts[0] = bls.possession_share(self.WANTED, group.group_key, ceremony.possession_context)
        weights = lagrange_weights(sorted(parts), at=self.index)
        signature = bls.weighted_signature_sum(
            [(weights.numerators[at], parts[at]) for at in sorted(parts)], weights.denominator
        )
        part = dkg.PossessionShare(ceremony.id, self.index, group.group_key, signature)
        return self.signed(Confirm(transcript.deals(self.role), part))


class LastDealersHelper(LastDealers):
    """Deals as it should, and keeps quiet about what the other one deals to it."""


class LastDealer(LastDealers):
    """Deals last."""

    def deals(self, transcript: Transcript) -> bytes | None:
        role, invitation = self.role, self.ceremony.invitation
        names = invitation.role_members(role)
        if transcript.missing(Deal, tuple(name for name in names if name != self.name)):
            return None
        ceremony = invitation.key_ceremony(role)
        others = [(-1, reveal.coefficients[0]) for reveal in transcript.reveals(role).values()]
        points = {0: bls.weighted_public_key_sum([(1, bls.public_key(self.WANTED)), *others])}
        values = {at: bls.secret_from_seed(digest("dealt to", at)) for at in self._honest()[: ceremony.threshold - 1]}
        points.update((at, bls.public_key(value)) for at, value in values.items())
        own = dkg.Dealer(ceremony, self.index, digest("last dealer"))
        commits = {names.index(name) + 1: held.commitment for name, held in transcript.said(Commit, role).items()}
        proof = own.reveal({**commits, self.index: own.commitment()})
        reveal = dkg.Reveal(ceremony.id, self.index, _through(points), proof.nonce_point, proof.response)
        sealed = tuple(
            self.participant._seal(transcript, name, values[at].to_bytes() if at in values else b"\x01" * 32)
            for at, name in enumerate(names, start=1)
        )
        return self.signed(Deal(transcript.commitments(role), reveal, sealed))


class BadDealer(Seat):
    """Deals the first member of its role a value off its polynomial, and says so again when it is asked to show it."""

    BAD = b"\x05" * 32

    def says(self, transcript: Transcript) -> bytes | None:
        role = self.role
        if self.name not in transcript.said(Deal) and transcript.is_dealt(role):
            due = super().says(transcript)
            if self.participant.dealt_over and due is not None:
                return self._spoilt(transcript)
            return due
        if transcript.accused(role).get(self.name) and not transcript.answers(role)[self.name]:
            ceremony = self.ceremony.invitation.key_ceremony(role)
            shares = tuple(
                dkg.DealtShare(ceremony.id, self.index, at, self.BAD) for at in transcript.accused(role)[self.name]
            )
            return self.signed(Answer(transcript.deals(role), shares))
        return super().says(transcript)

    def _spoilt(self, transcript: Transcript) -> bytes:
        role, names = self.role, self.ceremony.invitation.role_members(self.role)
        dealer = dkg.Dealer(
            self.ceremony.invitation.key_ceremony(role),
            self.index,
            derive_seed(self.participant._seed, "bls"),
        )
        commits = {names.index(name) + 1: held.commitment for name, held in transcript.said(Commit, role).items()}
        sealed = tuple(
            self.participant._seal(transcript, name, self.BAD if at == 1 else dealer.share_for(at).value)
            for at, name in enumerate(names, start=1)
        )
        return self.signed(Deal(transcript.commitments(role), dealer.reveal(commits), sealed))


def _through(points: Mapping[int, bytes]) -> tuple[bytes, ...]:
    """Coefficients in the exponent of the polynomial through points at distinct indices, by Lagrange."""
    order = bls.GROUP_ORDER
    bases: dict[int, list[int]] = {}
    for at in points:
        basis = [1]
        for other in points:
            if other != at:
                inverse = pow(at - other, -1, order)
                shifted = [0, *basis]
                basis = [(up - other * low) * inverse % order for up, low in zip(shifted, [*basis, 0], strict=True)]
        bases[at] = basis
    return tuple(
        bls.weighted_public_key_sum([(bases[at][degree], points[at]) for at in sorted(points)])
        for degree in range(len(points))
    )
