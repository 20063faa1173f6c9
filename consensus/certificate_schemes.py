"""Which certificate scheme a genesis means, in one of its epochs."""

from consensus import bls
from consensus.bls_certificates import BlsMultisig, BlsThreshold
from consensus.certificate import CertificateScheme
from consensus.listed_certificates import SignatureLists
from consensus.membership import (
    BLS_MULTISIG,
    BLS_THRESHOLD,
    ED25519_LIST,
    ML_DSA_65_LIST,
    Committee,
    Genesis,
    Membership,
    committee,
)
from consensus.rejection import Reason, Rejected
from consensus.threshold import GroupKeys


def scheme_for(
    genesis: Genesis, membership: Membership | None = None, before: Committee | None = None
) -> CertificateScheme:
    """The certificate scheme of a chain for the members of its genesis, or of a later epoch.

    ``membership.check_genesis`` and ``check_membership`` have accepted them; ``before`` is as in ``committee``.

    Raises:
        Rejected: ``BAD_MEMBERSHIP`` for a scheme this version does not know.
    """
    held = membership or genesis.membership
    members = committee(genesis, held, before)
    match genesis.certificate_scheme:
        case name if name == BLS_THRESHOLD:
            groups = {
                group.role: GroupKeys(group.threshold, group.group_key, group.share_keys) for group in held.groups
            }
            whole = bls.aggregate_public_keys([group.group_key for group in held.groups])
            return BlsThreshold(members, groups, whole)
        case name if name == BLS_MULTISIG:
            return BlsMultisig(members)
        case name if name in (ED25519_LIST, ML_DSA_65_LIST):
            return SignatureLists(name, members)
        case name:
            raise Rejected(Reason.BAD_MEMBERSHIP, f"no certificate scheme is called {name!a}")
