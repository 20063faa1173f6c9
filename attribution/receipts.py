"""What proves a source's part in a campaign, in words; names from the log are other people's."""

from consensus.policy import MOMENTUM_CARRY, MOMENTUM_FLUSH
from consensus.predicates.accumulators import UsedSource

MOMENTUM_SHOWN = {
    "": "what its gradients left in the optimizer is not settled",
    MOMENTUM_CARRY: "what its gradients left in the optimizer was carried on",
    MOMENTUM_FLUSH: "the optimizer's state that it had a part in was flushed",
}
"""What became of a revoked source's momentum, as its usage records it."""


def shown(text: str) -> str:
    """The text with control characters spelled out: names on the log are other people's words."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def receipt_fields(source: UsedSource) -> list[tuple[str, str]]:
    """What proves a source's part, each with a word for it; names are other people's, to be ``shown``."""
    claim, revocation = source.record.claim, source.record.revocation
    momentum = "" if source.usage is None or not source.admitted else f"; {MOMENTUM_SHOWN[source.usage.momentum]}"
    return [
        ("claimed", f"by {source.owner}, event {source.id.hex()}, entry {source.event.index} of the log"),
        ("licence", f"{claim.licence}, on the ground of {claim.rights_basis}; class {claim.content_class}"),
        ("granted", f"by {', '.join(grant.hex()[:16] + '…' for grant in source.grants) or 'nobody'}"),
        ("under", ", ".join(source.policies) or "no policy"),
        ("used", f"{source.admitted} admitted examples in steps that stand"),
        ("revoked", f"by event {revocation.hex()}{momentum}" if revocation else "no"),
    ]
