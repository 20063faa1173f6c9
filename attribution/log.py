"""A campaign's provenance from a bundle of the predicate ``accumulators``, checked against a pinned chain.

The bundle is a file, or is made now of a ledger: by a node that serves it, or from a stopped node's disk. Whoever
starts a command brings what reaches ledgers and custodians (``Outside``): tracing takes bytes, and checks them wherever
they came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from consensus.bundle import MAX_BUNDLE_BYTES, OpenBundle, open_bundle
from consensus.epochs import Anchor, anchor
from consensus.event import Kind
from consensus.genesis import MAX_JSON_BYTES, genesis_from_json
from consensus.identifiers import ChainId
from consensus.membership import Genesis
from consensus.portions import Release
from consensus.predicates import Predicate, Verdict, verify
from consensus.predicates.accumulators import Provenance, Window, provenance
from consensus.rejection import Reason, Rejected


@dataclass(frozen=True, slots=True)
class CampaignLog:
    """What the log proves about a campaign, and the verdict that says how far."""

    bundle: OpenBundle
    provenance: Provenance
    verdict: Verdict


class Outside(Protocol):
    """What is not in this process: ledgers, and custodians of what campaigns keep."""

    def bundle_of(
        self, where: str, genesis: Genesis, predicate: Predicate, campaign: bytes, token: str | None
    ) -> bytes:
        """The bundle of a predicate about a campaign, or about the only one where ``campaign`` is empty.

        ``where`` is a node's HTTP address, which ``token`` is for, or a directory.
        """

    def fetch_windows(
        self, url: str, token: str | None, campaign: bytes, windows: Sequence[Window], directory: Path
    ) -> None:
        """Fill a folder with what a custodian keeps of these windows; each file is held to what the log commits to."""


def open_log(bundle_path: Path, genesis_path: Path, chain_id: ChainId) -> CampaignLog:
    """Read and check a bundle.

    Raises:
        Rejected: whatever is wrong with a file, its proofs or its predicate.
    """
    return _opened(_trusted(genesis_path, chain_id), _read(bundle_path, MAX_BUNDLE_BYTES))


def open_ledger(
    outside: Outside, where: str, token: str | None, campaign: bytes, genesis_path: Path, chain_id: ChainId
) -> CampaignLog:
    """Have the bundle made of a ledger, and check it as one from a file.

    Raises:
        Rejected: as ``open_log``; ``UNKNOWN_CAMPAIGN`` where it is not on that log, or which one is not said.
        ConfigError, Unavailable: no ledger there, or none that can be read now.
    """
    trusted = _trusted(genesis_path, chain_id)
    return _opened(trusted, outside.bundle_of(where, trusted.genesis, Predicate.ACCUMULATORS, campaign, token))


def check_released_base(log: CampaignLog, before: CampaignLog) -> None:
    """The campaign of ``before`` released the base model of ``log``'s: the release it names stands there, of its root.

    Raises:
        Rejected: ``NOT_FOUND`` where the campaign names none, or the other log's campaign has no such release;
            ``BUNDLE_INCOMPLETE`` where it is not disclosed; ``DIGEST_MISMATCH`` for another root, with both.
    """
    campaign = log.provenance.campaign
    named = campaign.base_provenance
    if not named:
        raise Rejected(
            Reason.NOT_FOUND, "the campaign names no release that its base model came from: no other log is to be asked"
        )
    event = before.bundle.by_id.get(named)
    if event is None or event.kind is not Kind.RELEASE or event.entry.campaign != before.bundle.campaign:
        raise Rejected(
            Reason.NOT_FOUND,
            f"the base model came from release {named.hex()}, which is none of campaign {before.bundle.campaign.hex()} "
            f"on chain {before.bundle.trusted.chain_id.hex()}",
        )
    if not isinstance(event.operation, Release):
        raise Rejected(Reason.BUNDLE_INCOMPLETE, f"what release {named.hex()} released is not disclosed")
    if event.operation.parameter_root != campaign.base_root:
        raise Rejected(
            Reason.DIGEST_MISMATCH,
            f"release {named.hex()} has root {event.operation.parameter_root.hex()}, the campaign's base model "
            f"{campaign.base_root.hex()}",
        )


def _trusted(genesis_path: Path, chain_id: ChainId) -> Anchor:
    return anchor(genesis_from_json(_read(genesis_path, MAX_JSON_BYTES)), chain_id)


def _opened(trusted: Anchor, encoded: bytes) -> CampaignLog:
    bundle = open_bundle(trusted, encoded)
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
