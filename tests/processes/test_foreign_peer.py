"""A node written from the specification alone, over stock libp2p, takes part in a consortium of ours."""

import ast
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from process_fixtures import MEMBERS, Processes, source

from consensus.identifiers import Role
from node.transport import peer_id_of

pytestmark = pytest.mark.processes

PEER = Path(__file__).parents[1] / "foreign" / "peer.py"
OURS = {"attribution", "benchmarks", "consensus", "node", "tests", "trainer_client"}
VOTERS = [request.name for request in MEMBERS if request.role is not Role.VERIFIER]
EARLIER, CLAIMED = 7, 5


def test_foreign_peer_takes_part_and_is_told_what_it_does_wrong(tmp_path: Path) -> None:
    consortium = both_ways(tmp_path)
    try:
        consortium.start(*VOTERS)
        for number in range(EARLIER):
            assert consortium.post("press", source(consortium, "press", number), 20).json()["status"] == "final"
        setting = tmp_path / "setting.json"
        setting.write_text(json.dumps(setting_of(consortium)))
        done = subprocess.run(
            [sys.executable, str(PEER), str(setting)], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert 0 < len(found["dials"]) < len(VOTERS)
        assert found["log_of_who_dialled"] == EARLIER
        assert found["log_size"] == EARLIER + CLAIMED
        assert found["log_root"] in {consortium.status(name)["log_root"] for name in VOTERS}
        assert found["authors"] == ["library", "press"]
        assert found["in_batches"] == 3
        assert found["votes_heard"] > 0
        assert found["told"] == {
            "integer not in its shortest form": "non-canonical",
            "unknown request": "malformed",
            "field of another type": "malformed",
            "height below zero": "malformed",
            "bytes after the request": "malformed",
            "no MessagePack at all": "malformed",
            "nothing": "malformed",
            "altered event by HTTP": "portion-mismatch",
            "no event by HTTP": "malformed",
            "a good request after all of these": "answered",
            "frame beyond the bound": "connection ended",
            "frame of an unknown kind": "connection ended",
            "vote on the bulk stream": "connection ended",
            "another chain's protocol": "no connection",
            "unknown key": "no connection",
        }
        dialled = found["dials"][0]
        log = (consortium.provisioned.members[dialled].directory / "node.log").read_text()
        for reason in ("closed_oversized", "frame of kind 9 on bulk", "frame of kind 1 on bulk"):
            assert reason in log
        counted = consortium.client.get(consortium.provisioned.members[dialled].api_url + "/metrics").text
        counts = dict(
            line.split() for line in counted.splitlines() if not line.startswith("#") and line.count(" ") == 1
        )
        assert float(counts["countersign_network_requests_refused_total"]) == 7
        assert float(counts["countersign_network_refused_handshakes_total"]) >= 1
        assert float(counts["countersign_network_refused_strangers_total"]) >= 1
        assert all(consortium.status(name)["voting"] for name in VOTERS)
        assert consortium.post(dialled, source(consortium, "press", 99), 20).json()["status"] == "final"
    finally:
        consortium.close()


def test_foreign_peer_imports_nothing_of_ours() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(PEER.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert "libp2p" in imported
    assert not imported & OURS


def both_ways(directory: Path) -> Processes:
    """A consortium whose verifier dials some voters and is dialled by others: of two, the lower peer id dials."""
    for attempt in itertools.count():
        consortium = Processes(directory / f"consortium-{attempt}")
        ids = {name: peer_id_of(consortium.member(name).transport_key).to_bytes() for name in ("guild", *VOTERS)}
        if min(ids.values()) < ids["guild"] < max(ids.values()):
            return consortium
        consortium.close()
    raise AssertionError


def setting_of(consortium: Processes) -> dict[str, object]:
    """What the foreign implementation's operator would configure."""
    members = consortium.provisioned.members
    network = {name: [member.network.host, member.network.port] for name, member in members.items()}
    return {
        "genesis": str(consortium.provisioned.genesis_path),
        "chain_id": consortium.provisioned.chain_id.hex(),
        "verifier": {
            "name": "guild",
            "transport_seed": consortium.secrets("guild").transport_seed.hex(),
            "listen": network["guild"],
        },
        "addresses": network,
        "author": {
            "name": "library",
            "identity_seed": consortium.secrets("library").identity_seed.hex(),
            "api": members["library"].api_url,
        },
    }
