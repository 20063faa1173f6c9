"""Making a role's joint key without a dealer anybody must trust.

``t < n``: PedPoP (Crites, Komlo and Maller, eprint 2021/1375; Komlo and Goldberg, eprint 2020/852) with a
commitment round before it:

1. every member picks a polynomial of degree ``t - 1`` and publishes only a *commitment* to its reveal;
2. with *all* commitments in hand it publishes the *reveal*: its coefficients times the generator
   (Feldman 1987) and a Schnorr proof that it knows the constant term, bound to ceremony (nonce, epoch,
   role, t, n) and dealer; to each member, in private, the polynomial's value at its index;
3. every member checks every reveal against its commitment, every proof, and its own values against the
   reveals; any failure names the dealer and the ceremony is begun anew without it.

Without round 1 the dealer who moves last fixes the group key; without the proofs it can cancel the others'
constant terms. Both attacks are tests.

``t = n``: the members' own keys, each with its proof of possession, are summed.

*Refresh* of a group that stays (Herzberg, Jarecki, Krawczyk and Yung, Crypto 1995): the same rounds over polynomials
whose constant term is zero and is left out; the proof is of the lowest coefficient there is. Each member adds what it
is dealt to its share, so the group key stays, and old and new shares lie on different polynomials: fewer than ``t`` old
ones are worth nothing any more, not even together with new ones. ``t`` old ones still sign; only a new key ends that.

In both cases the members then sign a joint proof of possession of the group key, which also shows that
they all computed the same one. Messages are wire Structs; carrying them, keeping dealt shares
private on the way, and drawing seeds are left to the node.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from msgspec import Meta, Struct

from consensus import bls
from consensus.codec import encode
from consensus.identifiers import Digest, MemberId, Role, Tag, tagged_hash
from consensus.rejection import InvariantBroken, Reason, Rejected
from consensus.threshold import (
    GroupKeys,
    combine_shares,
    group_possession_context,
    member_possession_context,
)

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
PublicKeyBytes = Annotated[bytes, Meta(min_length=48, max_length=48)]
SignatureBytes = Annotated[bytes, Meta(min_length=96, max_length=96)]
Index = Annotated[int, Meta(ge=1, le=256)]


class BadDealing(Rejected):
    """A member broke the ceremony; ``dealer`` is its index, ``why`` what it did."""

    def __init__(self, dealer: int, detail: str) -> None:
        super().__init__(Reason.BAD_DEALING, f"dealer {dealer}: {detail}")
        self.dealer = dealer
        self.why = detail


@dataclass(frozen=True, slots=True)
class Ceremony:
    """What a key is made for. ``nonce`` is the chain's 32-byte nonce."""

    nonce: bytes
    epoch: int
    role: Role
    threshold: int
    member_count: int
    refreshed: GroupKeys | None = None
    """The group whose shares are made anew under its key, where ``t < n``; None for a new key."""

    @property
    def lowest_degree(self) -> int:
        """Of the coefficients that are dealt: a polynomial that refreshes has no constant term."""
        return 0 if self.refreshed is None else 1

    @property
    def summed(self) -> bool:
        """Whether members' own keys are summed (``t = n``)."""
        return self.threshold == self.member_count

    @property
    def id(self) -> Digest:
        """What every message of the ceremony is bound to."""
        return tagged_hash(
            Tag.DKG_CEREMONY,
            self.nonce,
            self.epoch.to_bytes(8, "big"),
            self.role.value.encode(),
            self.threshold.to_bytes(4, "big"),
            self.member_count.to_bytes(4, "big"),
            *(() if self.refreshed is None else (self.refreshed.group_key, *self.refreshed.share_keys)),
        )

    @property
    def possession_context(self) -> bytes:
        """What the joint proof of possession is bound to."""
        return group_possession_context(self.nonce, self.epoch, self.role)


class Commitment(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="dkg-commitment"):
    """Round 1, to all: the hash of the dealer's reveal."""

    ceremony: Bytes32
    dealer: Index
    digest: Bytes32


class Reveal(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="dkg-reveal"):
    """Round 2, to all: the coefficients times the generator, lowest degree first, and a proof of
    knowledge of that first one (``nonce_point``, ``response``).
    """

    ceremony: Bytes32
    dealer: Index
    coefficients: Annotated[tuple[PublicKeyBytes, ...], Meta(min_length=1, max_length=256)]
    nonce_point: PublicKeyBytes
    response: Bytes32

    @property
    def digest(self) -> Digest:
        """What the dealer's commitment must name."""
        return tagged_hash(Tag.DKG_COMMITMENT, encode(self))


class DealtShare(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="dkg-share"):
    """Round 2, *in private*: the dealer's polynomial at the recipient's index, 32 bytes big-endian."""

    ceremony: Bytes32
    dealer: Index
    recipient: Index
    value: Bytes32

    def __repr__(self) -> str:
        return f"DealtShare(dealer={self.dealer}, recipient={self.recipient}, value=…)"


class PossessionShare(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="dkg-possession"):
    """Round 3, to all: a member's part in the joint proof of possession of ``group_key``."""

    ceremony: Bytes32
    dealer: Index
    group_key: PublicKeyBytes
    signature: SignatureBytes


Message = TypeVar("Message", Commitment, Reveal, DealtShare, PossessionShare)


@dataclass(frozen=True, slots=True)
class KeyShare:
    """What a member holds at the end: its secret within the group."""

    index: int
    secret: bls.Secret
    group: GroupKeys


class Dealer:
    """One member's part in a ceremony with ``t < n``; a pure function of its seed.

    The same seed gives unrelated polynomials in different ceremonies.
    """

    __slots__ = ("_coefficients", "_reveal", "_seed", "ceremony", "index")

    def __init__(self, ceremony: Ceremony, index: int, seed: bytes) -> None:
        if ceremony.summed:
            raise InvariantBroken("with t = n the members' own keys are summed and nobody deals")
        self.ceremony = ceremony
        self.index = index
        self._seed = seed
        self._coefficients = [
            bls.secret_from_seed(self._derive(b"coefficient", degree.to_bytes(4, "big")))
            for degree in range(ceremony.lowest_degree, ceremony.threshold)
        ]
        self._reveal = self._make_reveal()

    def commitment(self) -> Commitment:
        """Round 1."""
        return Commitment(ceremony=self.ceremony.id, dealer=self.index, digest=self._reveal.digest)

    def reveal(self, commitments: Mapping[int, Commitment]) -> Reveal:
        """Round 2; only once every dealer has committed.

        Raises:
            BadDealing: naming a dealer that has not.
        """
        _check_complete(self.ceremony, commitments)
        if commitments[self.index] != self.commitment():
            raise BadDealing(self.index, "the commitment in our name is not ours")
        return self._reveal

    def share_for(self, recipient: int) -> DealtShare:
        """Round 2, for one member's eyes only."""
        value = 0
        for coefficient in reversed(self._coefficients):
            value = (value * recipient + coefficient.scalar) % bls.GROUP_ORDER
        value = value * recipient**self.ceremony.lowest_degree % bls.GROUP_ORDER
        return DealtShare(
            ceremony=self.ceremony.id, dealer=self.index, recipient=recipient, value=value.to_bytes(32, "big")
        )

    def __repr__(self) -> str:
        return f"Dealer(index={self.index}, role={self.ceremony.role.value})"

    def _make_reveal(self) -> Reveal:
        points = tuple(bls.public_key(coefficient) for coefficient in self._coefficients)
        nonce = bls.secret_from_seed(self._derive(b"proof", *points))
        nonce_point = bls.public_key(nonce)
        challenge = _knowledge_challenge(self.ceremony, self.index, points[0], nonce_point)
        response = (nonce.scalar + challenge * self._coefficients[0].scalar) % bls.GROUP_ORDER
        return Reveal(
            ceremony=self.ceremony.id,
            dealer=self.index,
            coefficients=points,
            nonce_point=nonce_point,
            response=response.to_bytes(32, "big"),
        )

    def _derive(self, purpose: bytes, *parts: bytes) -> Digest:
        return tagged_hash(
            Tag.DKG_POLYNOMIAL, self._seed, self.ceremony.id, self.index.to_bytes(4, "big"), purpose, *parts
        )


def check_reveals(
    ceremony: Ceremony, commitments: Mapping[int, Commitment], reveals: Mapping[int, Reveal]
) -> GroupKeys:
    """Round 3: the group the reveals define.

    Raises:
        BadDealing: naming the first dealer whose reveal is missing, is not what it committed to, or does
            not prove knowledge of its first coefficient.
        Rejected: ``BAD_KEY`` when the sum of valid reveals is degenerate.
    """
    _check_complete(ceremony, commitments)
    _check_complete(ceremony, reveals)
    for dealer in sorted(reveals):
        _check_reveal(ceremony, commitments[dealer], reveals[dealer])
    sums = [
        bls.aggregate_public_keys([reveals[dealer].coefficients[place] for dealer in sorted(reveals)])
        for place in range(ceremony.threshold - ceremony.lowest_degree)
    ]
    dealt = tuple(_evaluate(ceremony, sums, index) for index in range(1, ceremony.member_count + 1))
    before = ceremony.refreshed
    if before is None:
        return GroupKeys(ceremony.threshold, sums[0], dealt)
    keys = zip(before.share_keys, dealt, strict=True)
    return GroupKeys(ceremony.threshold, before.group_key, tuple(bls.aggregate_public_keys(pair) for pair in keys))


def check_dealt_shares(
    ceremony: Ceremony,
    index: int,
    reveals: Mapping[int, Reveal],
    dealt: Mapping[int, DealtShare],
    before: bls.Secret | None = None,
) -> bls.Secret:
    """Round 3: the recipient's own secret, from what every dealer sent to it; a refresh adds it to the one ``before``.

    Raises:
        BadDealing: naming the first dealer whose value does not lie on its polynomial (a complaint).
    """
    _check_complete(ceremony, reveals)
    _check_complete(ceremony, dealt)
    total = 0 if before is None else before.scalar
    for dealer in sorted(dealt):
        value = check_dealt_share(ceremony, index, dealer, reveals[dealer], dealt[dealer])
        total = (total + value.scalar) % bls.GROUP_ORDER
    return bls.Secret(total)


def check_dealt_share(ceremony: Ceremony, recipient: int, dealer: int, reveal: Reveal, share: DealtShare) -> bls.Secret:
    """One dealer's value for one recipient is on the polynomial it revealed.

    Raises:
        BadDealing: naming the dealer.
    """
    if (share.ceremony, share.dealer, share.recipient) != (ceremony.id, dealer, recipient):
        raise BadDealing(dealer, f"its share is for {share.recipient}, not for {recipient}")
    try:
        value = bls.Secret.from_bytes(share.value)
        fits = bls.public_key(value) == _evaluate(ceremony, reveal.coefficients, recipient)
    except Rejected as error:
        raise BadDealing(dealer, f"its share for {recipient} is no scalar: {error.detail}") from error
    if not fits:
        raise BadDealing(dealer, f"its share for {recipient} is not on the polynomial it revealed")
    return value


def sum_member_keys(
    ceremony: Ceremony, members: Sequence[MemberId], keys: Sequence[bytes], possessions: Sequence[bytes]
) -> GroupKeys:
    """``t = n``: the group of members' own keys, in member order.

    Raises:
        BadDealing: naming the first member whose proof of possession fails.
        Rejected: ``BAD_KEY`` when the keys cancel.
    """
    if not ceremony.summed or not len(members) == len(keys) == len(possessions) == ceremony.member_count:
        raise InvariantBroken("summing needs the keys of all members, with t = n")
    for index, (member, key, possession) in enumerate(zip(members, keys, possessions, strict=True), start=1):
        try:
            bls.verify_possession(key, member_possession_context(ceremony.nonce, member), possession)
        except Rejected as error:
            raise BadDealing(index, error.detail) from error
    return GroupKeys(ceremony.threshold, bls.aggregate_public_keys(keys), tuple(keys))


def possession_share(ceremony: Ceremony, share: KeyShare) -> PossessionShare:
    """A member's part in the joint proof of possession."""
    key = share.group.group_key
    signature = bls.possession_share(share.secret, key, ceremony.possession_context)
    return PossessionShare(ceremony=ceremony.id, dealer=share.index, group_key=key, signature=signature)


def combine_possession(ceremony: Ceremony, group: GroupKeys, shares: Mapping[int, PossessionShare]) -> bytes:
    """The joint proof of possession, checked. All members take part: it shows that all agree on the key.

    Raises:
        BadDealing: naming the first member whose part is missing, bad, or for another key.
    """
    _check_complete(ceremony, shares)
    for index in sorted(shares):
        if shares[index].group_key != group.group_key:
            raise BadDealing(index, f"it computed the group key {shares[index].group_key.hex()}")
        try:
            bls.verify_possession_share(
                group.share_keys[index - 1],
                group.group_key,
                ceremony.possession_context,
                shares[index].signature,
            )
        except Rejected as error:
            raise BadDealing(index, error.detail) from error
    signatures = {index: share.signature for index, share in shares.items()}
    possession = combine_shares(ceremony.threshold, ceremony.member_count, signatures)
    bls.verify_possession(group.group_key, ceremony.possession_context, possession)
    return possession


def _check_complete(ceremony: Ceremony, messages: Mapping[int, Message]) -> None:
    """Exactly one message of this ceremony from every dealer, filed under its own index."""
    for dealer in range(1, ceremony.member_count + 1):
        message = messages.get(dealer)
        if message is None:
            raise BadDealing(dealer, "its message is missing")
        if message.ceremony != ceremony.id or message.dealer != dealer:
            raise BadDealing(dealer, "its message is of another ceremony or dealer")
    if len(messages) != ceremony.member_count:
        stranger = max(messages)
        raise BadDealing(stranger, f"the ceremony has {ceremony.member_count} dealers")


def _check_reveal(ceremony: Ceremony, commitment: Commitment, reveal: Reveal) -> None:
    dealer = reveal.dealer
    if reveal.digest != commitment.digest:
        raise BadDealing(dealer, "it revealed something else than it committed to")
    expected = ceremony.threshold - ceremony.lowest_degree
    if len(reveal.coefficients) != expected:
        raise BadDealing(dealer, f"polynomial with {len(reveal.coefficients)} coefficients, expected {expected}")
    response = int.from_bytes(reveal.response, "big")
    if response >= bls.GROUP_ORDER:
        raise BadDealing(dealer, "the response of its proof of knowledge is out of range")
    first = reveal.coefficients[0]
    challenge = _knowledge_challenge(ceremony, dealer, first, reveal.nonce_point)
    try:
        for point in reveal.coefficients:
            bls.check_public_key(point)
        recomputed = bls.weighted_public_key_sum([(response, bls.GENERATOR), (-challenge, first)])
    except Rejected as error:
        raise BadDealing(dealer, error.detail) from error
    if recomputed != reveal.nonce_point:
        raise BadDealing(dealer, "it does not prove knowledge of its first coefficient")


def _knowledge_challenge(ceremony: Ceremony, dealer: int, first: bytes, nonce_point: bytes) -> int:
    """Fiat-Shamir challenge; 256 bits modulo r are uniform enough for a challenge."""
    hashed = tagged_hash(Tag.DKG_KNOWLEDGE, ceremony.id, dealer.to_bytes(4, "big"), first, nonce_point)
    return int.from_bytes(hashed, "big") % bls.GROUP_ORDER


def _evaluate(ceremony: Ceremony, coefficients: Sequence[bytes], at: int) -> bytes:
    """The polynomial in the exponent at a small positive index."""
    return bls.weighted_public_key_sum(
        (at**degree, point) for degree, point in enumerate(coefficients, ceremony.lowest_degree)
    )
