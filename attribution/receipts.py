"""What proves a source's part in a campaign, in words; names from the log are other people's."""

from consensus.predicates.accumulators import UsedSource


def shown(text: str) -> str:
    """The text with control characters spelled out: names on the log are other people's words."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def receipt_fields(source: UsedSource) -> list[tuple[str, str]]:
    """What proves a source's part, each with a word for it; names are other people's, to be ``shown``."""
    claim, revocation = source.record.claim, source.record.revocation
    return [
        ("claimed", f"by {source.owner}, event {source.id.hex()}, entry {source.event.index} of the log"),
        ("licence", f"{claim.licence}, on the ground of {claim.rights_basis}; class {claim.content_class}"),
        ("granted", f"by {', '.join(grant.hex()[:16] + '…' for grant in source.grants) or 'nobody'}"),
        ("under", ", ".join(source.policies) or "no policy"),
        ("used", f"{source.admitted} admitted examples in steps that stand"),
        ("revoked", f"by event {revocation.hex()}" if revocation else "no"),
    ]
