"""Bundles made of a ledger wherever it is: by a node that serves it, or from a stopped node's data directory.

Nothing is believed here: whoever asks holds the bundle against the chain that it trusts.
"""

from collections.abc import Sequence
from pathlib import Path

from consensus.event import Kind
from consensus.membership import Genesis
from consensus.predicates import Predicate
from consensus.rejection import ConfigError, Reason, Rejected
from consensus.state import CAMPAIGN_TABLE
from node.bundles import export_bundle
from node.client import NodeClient
from node.request_fields import digest

NAMED = 5
"""Campaigns named to somebody who did not say which."""


def bundle_of(where: str, genesis: Genesis, predicate: Predicate, campaign: bytes, token: str | None = None) -> bytes:
    """The bundle of a predicate about a campaign, or about the only one on that log where ``campaign`` is empty.

    Args:
        where: a node's HTTP address, or a data directory that no process has open.
        token: for a node that asks for one.

    Raises:
        Rejected: ``UNKNOWN_CAMPAIGN`` where the log has no such campaign, none, or several and none was given;
            ``NOT_FOUND`` where nothing is final yet.
        ConfigError: no data directory of this chain there, or another process has it open; no HTTP address.
        Unavailable: a node that does not answer, or a log that is not whole yet.
        InvariantBroken: a damaged data directory.
    """
    if "://" in where:
        with NodeClient(where, token) as client:
            listed = client.every_event({"kind": Kind.CAMPAIGN.value})
            asked = campaign or _only([digest("campaign", row.campaign) for row in listed])
            return client.bundle(predicate.value, {"campaign": asked.hex()})
    if not Path(where).is_dir():
        raise ConfigError(
            f"{where}: expected a Countersign data directory, or a node's address like http://127.0.0.1:7480"
        )
    from node.api_log import LogReading  # noqa: PLC0415 (a node that is asked needs no database)
    from node.ledger import Ledger  # noqa: PLC0415
    from node.store import Store  # noqa: PLC0415

    with Store.open_read_only(Path(where), genesis.chain_id) as store:
        if store.head() is None:
            raise Rejected(Reason.NOT_FOUND, f"{where}: no ledger block is final yet")
        reading = LogReading(Ledger(store, genesis))
        keys = [key[len(CAMPAIGN_TABLE) :] for key, _ in reading.state.items_with_prefix(CAMPAIGN_TABLE)]
        return export_bundle(reading, predicate.value, campaign=campaign or _only(keys))


def _only(campaigns: Sequence[bytes]) -> bytes:
    if not campaigns:
        raise Rejected(Reason.UNKNOWN_CAMPAIGN, "the log has no campaign")
    if len(campaigns) > 1:
        named = ", ".join(sorted(campaign.hex() for campaign in campaigns)[:NAMED])
        raise Rejected(Reason.UNKNOWN_CAMPAIGN, f"the log has {len(campaigns)} campaigns, say which: {named}")
    return campaigns[0]
