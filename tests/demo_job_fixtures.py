"""The demonstration's job over three of its sources, against a node in this process."""

import json
from pathlib import Path

from fake_node import SALT, FakeNode

from consensus.keys import Ed25519SigningKey
from trainer_client.demo.corpus import demonstration_corpus

CAMPAIGN = bytes([7]) * 32
SEED = bytes([9]) * 32


def written_config(node: FakeNode, directory: Path, **changes: object) -> Path:
    """Three of the demonstration's sources, registered and on disk, and a small job over them."""
    corpus = demonstration_corpus("data-source-1", "data-source-2")
    sources = []
    for source in (corpus.source(name) for name in ("debugger-manual", "callers-weekly", "assignment-letters")):
        identifier = node.source(
            source.name,
            list(source.examples),
            owner=source.owner,
            licence=source.licence,
            content_class=source.content_class,
            purposes=source.purposes,
        )
        (directory / f"{source.name}.txt").write_bytes(b"".join(source.examples))
        described = {"id": identifier.hex(), "name": source.name, "file": f"{source.name}.txt"}
        sources.append({**described, "content_salt": SALT.hex()})
    node.delegate(CAMPAIGN, Ed25519SigningKey(SEED))
    (directory / "job.key").write_text(SEED.hex() + "\n")
    config = {
        "node_url": node.url,
        "chain_id": node.chain_id.hex(),
        "operator": node.member_id("operator-1").hex(),
        "campaign": CAMPAIGN.hex(),
        "job_key_file": "job.key",
        "run_directory": "job",
        "release_file": "release/tuned.safetensors",
        "cache_directory": "cache",
        "steps": 6,
        "batch_size": 4,
        "base_steps": 2,
        "check_memorization_every_steps": 3,
        "sources": sources,
        **changes,
    }
    path = directory / "job.json"
    path.write_text(json.dumps(config))
    return path
