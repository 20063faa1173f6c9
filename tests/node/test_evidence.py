"""Evidence is on disk, by name, before anything else is done with it."""

from pathlib import Path

import pytest
from ledger_fixtures import MemoryLedger, digest
from snapshot_fixtures import written

import node.files
from consensus.event import CheckedEvent, check_event
from consensus.identifiers import View
from consensus.vote import VoteEvidence, VoteKind, sign_vote
from node.evidence import EvidenceDesk


def test_first_evidence_is_durable_before_it_is_handed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemoryLedger()
    ledger = written(memory, tmp_path / "data")
    culprit, author = memory.committee.voters[:2]
    votes = [
        sign_vote(
            memory.committee,
            culprit.id,
            VoteKind.NOTARIZE,
            View(9),
            digest(block),
            share=b"",
            sign=memory.secrets[culprit.name].identity.sign,
        )
        for block in ("one", "other")
    ]
    steps: list[Path | str] = []
    monkeypatch.setattr(node.files, "sync_directory", steps.append)

    def submit(packed: bytes) -> CheckedEvent:
        steps.append("handed in")
        return check_event(packed, memory.committee)

    folder = tmp_path / "data" / "evidence"
    desk = EvidenceDesk(folder, ledger, author, memory.secrets[author.name].identity, submit)
    desk.take(VoteEvidence(*votes))
    assert steps == [folder.parent, folder, "handed in"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == [f"{culprit.name}.two-notarize-votes.0"]
    ledger.store.close()
