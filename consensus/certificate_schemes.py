"""Which certificate scheme a genesis means."""

from consensus import bls
from consensus.bls_certificates import BlsMultisig, BlsThreshold
from consensus.certificate import CertificateScheme
from consensus.listed_certificates import SignatureLists
from consensus.membership import BLS_MULTISIG, BLS_THRESHOLD, ED25519_LIST, ML_DSA_65_LIST, Genesis, committee
from consensus.rejection import Reason, Rejected
from consensus.threshold import GroupKeys


def scheme_for(genesis: Genesis) -> CertificateScheme:
    """The certificate scheme of a genesis that ``membership.check_genesis`` has accepted.

    Raises:
        Rejected: ``BAD_MEMBERSHIP`` for a scheme this version does not know.
    """
    members = committee(genesis)
    match genesis.certificate_scheme:
        case name if name == BLS_THRESHOLD:
            groups = {
                group.role: GroupKeys(group.threshold, group.group_key, group.share_keys) for group in genesis.groups
            }
            whole = bls.aggregate_public_keys([group.group_key for group in genesis.groups])
            return BlsThreshold(members, groups, whole)
        case name if name == BLS_MULTISIG:
            return BlsMultisig(members)
        case name if name in (ED25519_LIST, ML_DSA_65_LIST):
            return SignatureLists(name, members)
        case name:
            raise Rejected(Reason.BAD_MEMBERSHIP, f"no certificate scheme is called {name!a}")
