"""Key shares of a role: Lagrange weights, combining signature shares, finding the bad ones.

A role of ``n`` members with threshold ``t`` signs under one group key, in one of two ways:

- ``t < n``: member ``i`` holds the value at ``i`` of a polynomial of degree ``t - 1`` whose value at zero is
  the group secret (Shamir 1979). Any ``t`` signature shares combine by Lagrange interpolation in the
  exponent (Boldyreva, PKC 2003); the result is the plain BLS signature of the group secret.
- ``t = n``: the group key is the sum of the members' own keys, and signatures add up. Nobody can
  have biased it: each key has proved possession on its own.

Rules:

- Combine first, check once; look for culprits only when the check fails.
- Coefficients of a batch check are 128-bit hashes over the message and *all* keys and shares: with
  coefficients known in advance, bad shares can be made to cancel (Bellare, Garay and Rabin 1998).
- Any ``t`` share holders can forge another's share: shares are never evidence against a member.

Indices count from 1 in the order of the role's members. Making the shares is left to
``key_generation``, summing roles to ``certificate``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from consensus import bls
from consensus.identifiers import MemberId, Role, Tag, tagged_hash
from consensus.rejection import Reason, Rejected

COEFFICIENT_BYTES = 16


class BadShares(Rejected):
    """Shares that are not their members' own; ``indices`` names the members within the role."""

    def __init__(self, indices: tuple[int, ...], detail: str) -> None:
        super().__init__(Reason.BAD_SHARE, detail)
        self.indices = indices


@dataclass(frozen=True, slots=True)
class GroupKeys:
    """Public side of a role's joint key. ``share_keys[i - 1]`` belongs to index ``i``."""

    threshold: int
    group_key: bytes
    share_keys: tuple[bytes, ...]

    @property
    def summed(self) -> bool:
        """Whether all members must sign, so that keys and signatures simply add up."""
        return self.threshold == len(self.share_keys)


@dataclass(frozen=True, slots=True)
class Weights:
    """Public integer weights by index, over one common denominator modulo the group order."""

    numerators: dict[int, int]
    denominator: int


def member_possession_context(nonce: bytes, member: MemberId) -> bytes:
    """What a member's own proof of possession is bound to."""
    return tagged_hash(Tag.POSSESSION, b"member", nonce, member)


def group_possession_context(nonce: bytes, epoch: int, role: Role) -> bytes:
    """What a role's joint proof of possession is bound to."""
    return tagged_hash(Tag.POSSESSION, b"group", nonce, epoch.to_bytes(8, "big"), role.value.encode())


def lagrange_weights(indices: Sequence[int], at: int = 0) -> Weights:
    """Weights that turn values at distinct ``indices`` into the value at ``at``.

    They are fractions of small integers: ids 1 and 2 at zero give 2 and -1. Kept so, most sums need no
    full-length multiplication.
    """
    fractions: dict[int, Fraction] = {}
    for index in indices:
        fraction = Fraction(1)
        for other in indices:
            if other != index:
                fraction *= Fraction(at - other, index - other)
        fractions[index] = fraction
    denominator = lcm(*(fraction.denominator for fraction in fractions.values()))
    return Weights({index: int(value * denominator) for index, value in fractions.items()}, denominator)


def combination_weights(threshold: int, member_count: int, indices: Sequence[int]) -> Weights:
    """Weights that combine the shares of ``threshold`` distinct ``indices`` of ``member_count``."""
    if threshold == member_count:
        return Weights(dict.fromkeys(indices, 1), 1)
    return lagrange_weights(indices)


def signing_indices(threshold: int, member_count: int, present: Mapping[int, bytes]) -> list[int]:
    """The lowest ``threshold`` indices present.

    Raises:
        Rejected: ``BAD_SHARE`` for an index outside 1 to ``member_count``; ``QUORUM_NOT_REACHED``.
    """
    for index in present:
        if not 1 <= index <= member_count:
            raise Rejected(Reason.BAD_SHARE, f"share index {index}, expected 1 to {member_count}")
    if len(present) < threshold:
        raise Rejected(Reason.QUORUM_NOT_REACHED, f"{len(present)} shares, {threshold} needed")
    return sorted(present)[:threshold]


def combine_shares(threshold: int, member_count: int, shares: Mapping[int, bytes]) -> bytes:
    """The signature that the lowest ``threshold`` shares make together. *Not checked*: verify it.

    Raises:
        Rejected: as ``signing_indices``; ``BAD_SIGNATURE`` for a share that is no point.
    """
    indices = signing_indices(threshold, member_count, shares)
    weights = combination_weights(threshold, member_count, indices)
    terms = [(weights.numerators[index], shares[index]) for index in indices]
    return bls.weighted_signature_sum(terms, weights.denominator)


def verify_shares(group: GroupKeys, message: bytes, shares: Mapping[int, bytes]) -> None:
    """Every share is its member's own; one pairing check each.

    Raises:
        BadShares: naming every culprit.
    """
    culprits: list[int] = []
    for index in sorted(shares):
        try:
            bls.verify(_share_key(group, index), message, shares[index])
        except Rejected:
            culprits.append(index)
    if culprits:
        raise BadShares(tuple(culprits), f"bad signature shares of members {culprits}")


def verify_shares_together(group: GroupKeys, message: bytes, shares: Mapping[int, bytes]) -> None:
    """Every share is its member's own; one pairing check for all of them.

    Raises:
        Rejected: ``BAD_SIGNATURE`` or ``BAD_SHARE``, without saying whose.
    """
    indices = sorted(shares)
    keys = {index: _share_key(group, index) for index in indices}
    transcript = tagged_hash(
        Tag.BATCH_COEFFICIENT,
        message,
        *(part for i in indices for part in (i.to_bytes(4, "big"), keys[i], shares[i])),
    )
    coefficients = {index: _batch_coefficient(transcript, index) for index in indices}
    bls.verify(
        bls.weighted_public_key_sum((coefficients[index], keys[index]) for index in indices),
        message,
        bls.weighted_signature_sum((coefficients[index], shares[index]) for index in indices),
    )


def check_group_keys(group: GroupKeys) -> None:
    """The share keys lie on one polynomial of degree ``t - 1`` whose value at zero is the group key.

    Raises:
        Rejected: ``BAD_KEY`` for a key that is none; ``BAD_MEMBERSHIP`` for keys that do not fit together.
    """
    n = len(group.share_keys)
    if not 1 <= group.threshold <= n:
        raise Rejected(Reason.BAD_MEMBERSHIP, f"threshold {group.threshold} of {n} share keys")
    for key in (group.group_key, *group.share_keys):
        bls.check_public_key(key)
    if len(set(group.share_keys)) != n:
        raise Rejected(Reason.BAD_MEMBERSHIP, "two members have the same share key")
    if group.summed:
        if bls.aggregate_public_keys(group.share_keys) != group.group_key:
            raise Rejected(Reason.BAD_MEMBERSHIP, "the group key is not the sum of the share keys")
        return
    base = range(1, group.threshold + 1)
    for at in (0, *range(group.threshold + 1, n + 1)):
        # At whole numbers the weights of the indices 1 to t are whole numbers: the denominator is 1.
        weights = lagrange_weights(base, at).numerators
        expected = group.share_keys[at - 1] if at else group.group_key
        if bls.weighted_public_key_sum((weights[i], group.share_keys[i - 1]) for i in base) != expected:
            name = f"share key {at}" if at else "the group key"
            raise Rejected(Reason.BAD_MEMBERSHIP, f"{name} is not on the polynomial of the first share keys")


def _share_key(group: GroupKeys, index: int) -> bytes:
    if not 1 <= index <= len(group.share_keys):
        raise Rejected(Reason.BAD_SHARE, f"share index {index}, expected 1 to {len(group.share_keys)}")
    return group.share_keys[index - 1]


def _batch_coefficient(transcript: bytes, index: int) -> int:
    """128 bits that nobody can choose before all shares are fixed; never zero."""
    hashed = tagged_hash(Tag.BATCH_COEFFICIENT, transcript, index.to_bytes(4, "big"))
    return int.from_bytes(hashed[:COEFFICIENT_BYTES], "big") + 1
