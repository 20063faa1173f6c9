"""The beacon of an audit: a value nobody can choose or know before the audit's challenge is final, and what it picks.

It is the sum of the three role signatures over chain, epoch, campaign and audit number, as in a ``bls-threshold``
certificate but under a tag of its own: neither can ever serve as the other.

- **One value** ◆. A BLS signature is unique, whichever ``t_r`` members of each role give their shares; their sum is
  too. Contents of ledger blocks, times and event ids would not do: whoever leads or signs chooses among many. Nor would
  ``bls-multisig``, whose sum depends on who signed: there, and where certificates list signatures, there is no beacon.
- **Unknown until the challenge is final** ◆. A member gives its share only when the challenge is final in its own log.
  Until then whoever wants to know holds fewer than ``t_r`` shares of some role, unless that many members of *every*
  role break this rule. So the steps, and what the log says of the state they began in, are fixed before.
- **Bound to the epoch in which the challenge became final**, by its key in the challenge's record: members and group
  keys may have changed when the answer comes.

Picking is drawing without replacement (R. Floyd, in Bentley, CACM 30(9), 1987), from hashes of the beacon.
"""

from collections.abc import Mapping

from consensus import bls
from consensus.certificate import CertificateScheme
from consensus.identifiers import ChainId, MemberId, Tag, tagged_hash, tagged_message
from consensus.membership import BLS_THRESHOLD, Committee
from consensus.rejection import Reason, Rejected


def beacon_key(committee: Committee) -> bytes:
    """What beacons of an epoch verify against: the sum of its role keys.

    Raises:
        Rejected: ``NO_BEACON`` where certificates have no unique signature.
    """
    if committee.certificate_scheme != BLS_THRESHOLD:
        raise Rejected(
            Reason.NO_BEACON,
            f"steps are picked by a unique signature of every role; {committee.certificate_scheme} has none",
        )
    return bls.aggregate_public_keys([group.group_key for group in committee.groups])


def beacon_message(chain_id: ChainId, epoch: int, campaign: bytes, number: int) -> bytes:
    """What the shares of an audit's beacon sign."""
    return tagged_message(Tag.BEACON, chain_id, epoch.to_bytes(8, "big"), campaign, number.to_bytes(8, "big"))


def make_beacon(scheme: CertificateScheme, message: bytes, shares: Mapping[MemberId, bytes]) -> bytes:
    """The beacon that ``t_r`` shares of every role make; checked, 96 bytes.

    Raises:
        Rejected: ``NO_BEACON``; as ``CertificateScheme.combine``, which names who gave a bad share.
    """
    beacon_key(scheme.committee)
    return scheme.combine(message, shares)


def picked_steps(beacon: bytes, first_step: int, last_step: int, picks: int) -> tuple[int, ...]:
    """The ``picks`` different steps of that range which a beacon picks, rising; ``picks`` is at most their number."""
    count = last_step - first_step + 1
    chosen: set[int] = set()
    for place in range(count - picks, count):
        drawn = int.from_bytes(tagged_hash(Tag.PICKED_STEPS, beacon, place.to_bytes(8, "big")), "big") % (place + 1)
        chosen.add(place if drawn in chosen else drawn)
    return tuple(first_step + step for step in sorted(chosen))
