"""A campaign's provenance from a bundle of the predicate ``accumulators``, checked against a pinned chain."""

from dataclasses import dataclass
from pathlib import Path

from consensus.bundle import MAX_BUNDLE_BYTES, OpenBundle, open_bundle
from consensus.epochs import anchor
from consensus.genesis import MAX_JSON_BYTES, genesis_from_json
from consensus.identifiers import ChainId
from consensus.predicates import Predicate, Verdict, verify
from consensus.predicates.accumulators import Provenance, provenance
from consensus.rejection import Reason, Rejected


@dataclass(frozen=True, slots=True)
class CampaignLog:
    """What the log proves about a campaign, and the verdict that says how far."""

    bundle: OpenBundle
    provenance: Provenance
    verdict: Verdict


def open_log(bundle_path: Path, genesis_path: Path, chain_id: ChainId) -> CampaignLog:
    """Read and check a bundle.

    Raises:
        Rejected: whatever is wrong with a file, its proofs or its predicate.
    """
    trusted = anchor(genesis_from_json(_read(genesis_path, MAX_JSON_BYTES)), chain_id)
    bundle = open_bundle(trusted, _read(bundle_path, MAX_BUNDLE_BYTES))
    verdict = verify(bundle, Predicate.ACCUMULATORS)
    return CampaignLog(bundle, provenance(bundle), verdict)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():
            raise Rejected(Reason.NOT_FOUND, f"{path} is no regular file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise Rejected(Reason.NOT_FOUND, f"{path} cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise Rejected(Reason.OVERSIZED, f"{path} has more than {max_bytes} bytes")
    return content
