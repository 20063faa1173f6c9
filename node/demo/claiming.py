"""What a person sees of the claims: the sources, with what their owners keep from training, and the policy's rules."""

from collections.abc import Sequence

from consensus.portions import BandRule, ClassRule, Policy
from node.demo.consortium import COUNCIL, CorpusDescription, Finalized, SignedSource
from node.demo.display import Display, safe


def show_sources(display: Display, corpus: CorpusDescription, signed: Sequence[SignedSource]) -> None:
    """A table of the sources; what will have one refused stands out."""
    rows = []
    for source in signed:
        described = source.description
        licence, purposes = safe(described.licence), safe(", ".join(described.purposes))
        if described.name == corpus.licence_refused:
            licence = f"[yellow]{licence}[/]"
        if described.name == corpus.purpose_refused:
            purposes = f"[yellow]{purposes}[/]"
        counts = (str(source.examples), str(described.reserve))
        rows.append((described.name, described.owner, licence, purposes, described.content_class, *counts))
    headings = ("source", "signed by", "licence", "purposes", "class", "examples", "kept")
    display.table(headings, rows, right=(5, 6))
    display.line()
    display.line(
        "[dim]kept: a reserve, drawn by lot; no step trains on it, recital of the rest is measured against it[/]"
    )


def show_policy(display: Display, policy: Policy, final: Finalized) -> None:
    """The policy's rules, those of entropy bands under their class's."""
    display.done(
        f"{COUNCIL} signed the policy [bold]{safe(policy.name)}[/] [dim](final in {final.milliseconds:.0f} ms)[/]"
    )
    display.line(
        f"  [dim]licences {safe(', '.join(policy.licences))}; purpose {safe(', '.join(policy.purposes))}; "
        f"grants of at most {policy.maximum_grant_steps} steps; "
        f"recital above {policy.memorization_threshold_permille} ‰ is undone[/]"
    )
    for rule in policy.classes:
        display.line(f"  [dim]{safe(rule.content_class)} {_depths(rule)}[/]")
        for band in rule.bands:
            from_nats = policy.entropy_edges_milli[band.band - 1] / 1_000
            unlikely = f"{safe(rule.content_class)} that costs the base model {from_nats:g} nats a byte or more"
            display.line(f"  [dim]{unlikely} {_depths(band)}[/]")
    display.line(f"  [dim]nothing is released before {' and '.join(policy.custody)} has what tracing needs[/]")


def _depths(rule: ClassRule | BandRule) -> str:
    of_every = f"moves {rule.default_weight_permille / 10:g} % of every block"
    blocks: dict[int, list[str]] = {}
    for weight in rule.blocks:
        blocks.setdefault(weight.weight_permille, []).append(weight.block)
    exceptions = ", ".join(f"{' and '.join(names)} {permille / 10:g} %" for permille, names in blocks.items())
    return f"{of_every}, but {safe(exceptions)}" if exceptions else of_every
