"""One member's part in the founding ceremony: what it says next, and the secrets it ends with.

A pure function of a 32-byte seed and of the transcripts it is shown. Dealt values are sealed with X25519 and
XSalsa20-Poly1305 (libsodium ``crypto_box``) between keys made for this ceremony alone.

The one thing a participant must not lose is ``dealt_over``. A member that reveals its polynomial, is then shown another
set of commitments, and deals again, lets whoever changed its commitment meanwhile choose the group key. The host keeps
``dealt_over`` durably before a deal leaves the machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nacl.bindings import crypto_box_easy, crypto_box_open_easy, crypto_box_seed_keypair
from nacl.exceptions import CryptoError

from consensus import bls
from consensus import key_generation as dkg
from consensus.ceremony import (
    Answer,
    Body,
    Commit,
    Complain,
    Confirm,
    Deal,
    Invitation,
    Join,
    SignedMessage,
    Transcript,
)
from consensus.codec import encode
from consensus.identifiers import VOTING_ROLES, Role, Tag, tagged_hash, tagged_message
from consensus.keys import Ed25519SigningKey, SignatureScheme, Signer, signer_for
from consensus.membership import Member, member_id, scheme_needs
from consensus.rejection import Reason, Rejected
from consensus.threshold import member_possession_context


@dataclass(frozen=True, slots=True, repr=False)
class MemberSecrets:
    """What a member keeps to itself. A verifier has no log seed and no key share."""

    identity: Signer
    identity_seed: bytes
    transport_seed: bytes
    log_seed: bytes | None
    key_share: bls.Secret | None
    """Its share of the role key, or its own BLS secret where roles have none; ``None`` where certificates need neither.
    """


@dataclass(frozen=True, slots=True, repr=False)
class MemberSeeds:
    """The seeds of a member's keys that are its own whatever the others do, each 32 bytes."""

    identity: bytes
    transport: bytes
    log: bytes


def member_seeds(seed: bytes) -> MemberSeeds:
    """What a member's one seed gives."""
    return MemberSeeds(*(derive_seed(seed, purpose) for purpose in ("identity", "transport", "log")))


class Participant:
    """One member's part: a pure function of its 32-byte seed and of the transcripts it is shown.

    ``dealt_over`` is the digest of the commitments it dealt over, empty before: whoever hosts a participant keeps it
    durably *before* a deal leaves the machine, and gives it back after a restart. ``kept`` are the seeds of a member
    that took part before and keeps its identity, transport and log key; its BLS keys are made anew from ``seed``. To a
    refresh a voter brings its ``share`` of the role key, or its own secret where keys are summed.
    """

    def __init__(
        self,
        invitation: Invitation,
        name: str,
        seed: bytes,
        scheme: SignatureScheme | None = None,
        dealt_over: bytes = b"",
        kept: MemberSeeds | None = None,
        share: bls.Secret | None = None,
    ) -> None:
        """
        Raises:
            Rejected: ``UNKNOWN_MEMBER`` for a name that was not invited, ``BAD_KEY`` for a seed that has not 32 bytes
                and, in a refresh, for another identity or share than the member has.
        """
        found = next((invited for invited in invitation.members if invited.name == name), None)
        if found is None:
            raise Rejected(Reason.UNKNOWN_MEMBER, f"{name} was not invited")
        if len(seed) != 32:
            raise Rejected(Reason.BAD_KEY, f"a seed has 32 bytes, not {len(seed)}")
        needs = scheme_needs(invitation.certificate_scheme)
        self.invitation = invitation
        self.name = name
        self.role = found.role
        self.dealt_over = dealt_over
        self._seeds = kept or member_seeds(seed)
        self._refreshed = invitation.refreshed(name)
        if self._refreshed is not None:
            scheme = SignatureScheme(self._refreshed.scheme)
        self.identity: Signer = signer_for(scheme or needs.identity or SignatureScheme.ED25519, self._seeds.identity)
        self._seed = seed
        self._box_public, self._box_secret = crypto_box_seed_keypair(derive_seed(seed, "ceremony-box"))
        self._own: bls.Secret | None = None
        if self._refreshed is not None:
            self._own = self._kept_secret(self._refreshed, share)
        elif needs.member_keys and self.role in VOTING_ROLES:
            self._own = bls.secret_from_seed(derive_seed(seed, "bls"))

    def __repr__(self) -> str:
        return f"Participant({self.name})"

    def join(self) -> bytes:
        """Round 1."""
        if self._refreshed is not None:
            return self._signed(Join(self.invitation.digest, self._refreshed, self._box_public))
        own, seeds = self._own, self._seeds
        bls_key = possession = log_key = b""
        identity = self.identity
        if own is not None:
            bls_key = bls.public_key(own)
            context = member_possession_context(self.invitation.nonce, member_id(identity.scheme, identity.public_key))
            possession = bls.prove_possession(own, context)
        if self.role in VOTING_ROLES:
            log_key = Ed25519SigningKey(seeds.log).public_key
        member = Member(
            name=self.name,
            role=self.role,
            scheme=int(identity.scheme),
            identity_key=identity.public_key,
            transport_key=Ed25519SigningKey(seeds.transport).public_key,
            log_key=log_key,
            bls_key=bls_key,
            bls_possession=possession,
        )
        return self._signed(Join(self.invitation.digest, member, self._box_public))

    def next_message(self, transcript: Transcript) -> bytes | None:
        """What is due from this member now; None while it waits for others, or when its part is done.

        Raises:
            Rejected: ``EQUIVOCATION`` when the commitments are not those it dealt over before; ``WRONG_CHAIN`` for a
                transcript in which another has joined under its name.
        """
        if transcript.missing(Join, tuple(invited.name for invited in self.invitation.members)):
            return None if self.name in transcript.said(Join) else self.join()
        if transcript.member(self.name).identity_key != self.identity.public_key:
            raise Rejected(Reason.WRONG_CHAIN, f"somebody else has joined as {self.name}")
        if not scheme_needs(self.invitation.certificate_scheme).group_keys or self.role == Role.VERIFIER:
            return None
        if transcript.is_dealt(self.role):
            return self._dealing_message(transcript)
        if self.name in transcript.said(Confirm):
            return None
        return self._signed(Confirm(transcript.roster, self._possession_share(transcript)))

    def secret(self, transcript: Transcript) -> bls.Secret | None:
        """The member's share of its role's key, or its own BLS secret where roles have none, once it can be known.

        Raises:
            Rejected: ``CEREMONY_INCOMPLETE``, also for a value that is bad and whose dealer's answer is not here.
        """
        needs = scheme_needs(self.invitation.certificate_scheme)
        if self._own is None or not needs.group_keys or not transcript.is_dealt(self.role):
            return self._own
        transcript.deals(self.role)
        dealt = self._dealt_to_us(transcript)
        dealt.update(self._answers_to_us(transcript))
        before = None if self._refreshed is None else self._own
        try:
            return dkg.check_dealt_shares(self._ceremony, self._index, transcript.reveals(self.role), dealt, before)
        except dkg.BadDealing as error:
            # Answers that are here fit. Once we have confirmed nobody else awaits one: only we know that we lost it.
            dealer = self.invitation.role_members(self.role)[error.dealer - 1]
            raise Rejected(
                Reason.CEREMONY_INCOMPLETE, f"waiting for what {dealer} answers to {self.name}: {error.why}"
            ) from error

    def _kept_secret(self, member: Member, share: bls.Secret | None) -> bls.Secret | None:
        if member.identity_key != self.identity.public_key:
            raise Rejected(Reason.BAD_KEY, f"another identity key than {self.name} has: a refresh changes none")
        if self.role not in VOTING_ROLES:
            return None
        group = self._ceremony.refreshed
        expected = member.bls_key if group is None else group.share_keys[self._index - 1]
        if share is None or bls.public_key(share) != expected:
            raise Rejected(Reason.BAD_KEY, f"not the share that {self.name} has of its role's key")
        return share

    def secrets(self, transcript: Transcript) -> MemberSecrets:
        """What the member keeps, once the ceremony is over; raises as ``secret``."""
        seeds = self._seeds
        return MemberSecrets(
            identity=self.identity,
            identity_seed=seeds.identity,
            transport_seed=seeds.transport,
            log_seed=seeds.log if self.role in VOTING_ROLES else None,
            key_share=self.secret(transcript),
        )

    def _dealing_message(self, transcript: Transcript) -> bytes | None:
        role, members = self.role, self.invitation.role_members(self.role)
        dealer = dkg.Dealer(self._ceremony, self._index, derive_seed(self._seed, "bls"))
        if self.name not in transcript.said(Commit):
            return self._signed(Commit(transcript.roster, dealer.commitment()))
        if transcript.missing(Commit, members):
            return None
        if self.name not in transcript.said(Deal):
            over = transcript.commitments(role)
            if self.dealt_over not in (b"", over):
                raise Rejected(
                    Reason.EQUIVOCATION,
                    f"{self.name} dealt over other commitments before: somebody changed its own. Begin anew",
                )
            self.dealt_over = over
            commits = {members.index(name) + 1: held.commitment for name, held in transcript.said(Commit, role).items()}
            sealed = tuple(
                self._seal(transcript, name, dealer.share_for(index).value)
                for index, name in enumerate(members, start=1)
            )
            return self._signed(Deal(over, dealer.reveal(commits), sealed))
        if transcript.missing(Deal, members):
            return None
        if self.name not in transcript.said(Complain):
            bad = self._bad_dealers(transcript)
            if bad:
                return self._signed(Complain(transcript.deals(role), bad))
        shown = transcript.answers(role)[self.name]
        asked = [index for index in transcript.accused(role).get(self.name, ()) if index not in shown]
        if asked:
            return self._signed(Answer(transcript.deals(role), tuple(dealer.share_for(index) for index in asked)))
        if self.name in transcript.said(Confirm) or transcript.unanswered(role):
            return None
        return self._signed(Confirm(transcript.deals(role), self._possession_share(transcript)))

    def _possession_share(self, transcript: Transcript) -> dkg.PossessionShare:
        secret = self.secret(transcript)
        assert secret is not None
        return dkg.possession_share(self._ceremony, dkg.KeyShare(self._index, secret, transcript.group(self.role)))

    def _bad_dealers(self, transcript: Transcript) -> tuple[int, ...]:
        reveals, dealt = transcript.reveals(self.role), self._dealt_to_us(transcript)
        bad = []
        for dealer in sorted(reveals):
            try:
                if dealer not in dealt:
                    raise dkg.BadDealing(dealer, "its value does not open")
                dkg.check_dealt_share(self._ceremony, self._index, dealer, reveals[dealer], dealt[dealer])
            except dkg.BadDealing:
                bad.append(dealer)
        return tuple(bad)

    def _dealt_to_us(self, transcript: Transcript) -> dict[int, dkg.DealtShare]:
        """Values that open, by dealer."""
        members = self.invitation.role_members(self.role)
        opened = {}
        for name, deal in transcript.said(Deal, self.role).items():
            try:
                value = crypto_box_open_easy(
                    deal.sealed[self._index - 1],
                    self._box_nonce(transcript, name, self.name),
                    transcript.said(Join)[name].box_key,
                    self._box_secret,
                )
            except CryptoError:
                continue
            dealer = members.index(name) + 1
            opened[dealer] = dkg.DealtShare(self._ceremony.id, dealer, self._index, value)
        return opened

    def _answers_to_us(self, transcript: Transcript) -> Mapping[int, dkg.DealtShare]:
        return {
            shown[self._index].dealer: shown[self._index]
            for shown in transcript.answers(self.role).values()
            if self._index in shown
        }

    def _seal(self, transcript: Transcript, recipient: str, value: bytes) -> bytes:
        """One message for each pair of keys and direction, so that a nonce derived from the names never repeats."""
        return crypto_box_easy(
            value,
            self._box_nonce(transcript, self.name, recipient),
            transcript.said(Join)[recipient].box_key,
            self._box_secret,
        )

    def _box_nonce(self, transcript: Transcript, dealer: str, recipient: str) -> bytes:
        return tagged_hash(Tag.CEREMONY, b"box", transcript.roster, dealer.encode(), recipient.encode())[:24]

    @property
    def _ceremony(self) -> dkg.Ceremony:
        return self.invitation.key_ceremony(self.role)

    @property
    def _index(self) -> int:
        return self.invitation.role_members(self.role).index(self.name) + 1

    def _signed(self, body: Body) -> bytes:
        encoded = encode(body)
        return encode(SignedMessage(self.name, encoded, self.identity.sign(tagged_message(Tag.CEREMONY, encoded))))


def hold_ceremony(invitation: Invitation, participants: Sequence[Participant]) -> Transcript:
    """The whole ceremony among participants in one process.

    Raises:
        Rejected: what one of them did wrong.
    """
    messages: list[bytes] = []
    while True:
        transcript = Transcript(invitation, messages)
        said = [message for one in participants if (message := one.next_message(transcript)) is not None]
        if not said:
            return transcript
        messages += said


def derive_seed(seed: bytes, purpose: str) -> bytes:
    """The seed of one of a member's keys; seeds of different purposes say nothing of each other."""
    return tagged_hash(Tag.KEY_DERIVATION, seed, purpose.encode())
