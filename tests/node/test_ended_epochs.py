"""A node killed when an epoch has ended keeps what is asked of its old secret, and erases that, when it starts."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from api_fixtures import InstantNode, node_of
from epoch_fixtures import change_event
from ledger_fixtures import HOSPITAL, MemoryLedger, begin
from node_fixtures import PASSPHRASE, Consortium, next_epoch

import node.files
from consensus.membership import BLS_MULTISIG, Membership, Parameters
from consensus.rejection import ConfigError
from consensus.state import ChallengeRecord
from node import ended_epochs
from node.identity import LEFT_EPOCHS_FILE, epoch_keystore, load_identity
from node.keystore import Keystore
from node.messages import BeaconShare
from node.repair import set_aside
from node.runner import Node
from node.store import Store

pytestmark = pytest.mark.trio

COUNTS = {"data-source": 3, "governance": 1, "operator": 1}
OPERATOR = "operator-1"


@dataclass
class Killed:
    """A node's disk as it is when the terminal ledger block is durable and nothing else is done."""

    consortium: Consortium
    name: str
    record: ChallengeRecord
    share: BeaconShare
    """What the member's share of the open challenge must be."""

    @property
    def kept(self) -> Path:
        return self.consortium.folder / self.name / "beacon-shares" / f"{self.record.event.hex()}.share"

    def secret(self, epoch: int = 0) -> bytes | None:
        base = self.consortium.folder / f"{self.name}.keystore"
        return Keystore.open(epoch_keystore(base, epoch) if epoch else base, PASSPHRASE).secrets.bls_share

    def start(self) -> Node:
        """The node, started and stopped."""
        node = self.consortium.node(self.name)
        node._close()
        return node


def killed(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = OPERATOR, remove: tuple[str, ...] = ()) -> Killed:
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    told = begin(counts=COUNTS)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    for _ in range(5):
        told.ledger.seal(*told.run.step())
    challenge = told.ledger.audit_challenge(HOSPITAL, told.run.id)
    told.ledger.seal(challenge)
    consortium = Consortium(folder, COUNTS, Parameters())
    assert consortium.genesis == told.ledger.genesis
    node, store = node_of(told, folder / name)
    record = node.beacons.record(told.run.id, challenge.id)
    share = node.beacons.share(record)
    membership, _ = next_epoch(consortium, remove=remove)
    node.seal(change_event(node.memory, membership))
    assert node.ledger.committee.epoch == 1
    store.close()
    consortium.first_keystore(name)
    return Killed(consortium, name, record, share)


async def test_node_killed_when_an_epoch_ended_keeps_its_share_and_erases_the_secret_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = killed(tmp_path, monkeypatch)
    assert not found.kept.exists()
    assert found.secret() is not None
    node = found.start()
    assert node.beacons.share(found.record) == found.share
    assert found.kept.exists()
    assert found.secret() is None
    assert found.secret(1) is not None
    assert node.snapshot().epoch == 1
    monkeypatch.setattr(ended_epochs, "Keystore", None)  # nothing is opened twice
    found.start()


async def test_folder_of_shares_has_its_name_on_disk_before_a_secret_is_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = killed(tmp_path, monkeypatch)
    shares, synced = found.kept.parent, list[Path]()

    def sync(directory: Path) -> None:
        if shares.exists():
            synced.append(directory)

    monkeypatch.setattr(node.files, "sync_directory", sync)
    found.start()
    keystores = tmp_path
    assert synced == [shares.parent, shares, keystores, shares.parent]  # the last for ``left-epochs``


@pytest.mark.parametrize("fails", ["beacons", "keystore"])
async def test_full_disk_erases_nothing_that_is_not_kept_and_costs_no_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    found = killed(tmp_path, monkeypatch)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(f"node.{fails}.replace_private", full)
        found.start()
    assert "old shares of epochs before 1 are not erased before the next start" in caplog.text
    assert found.kept.exists() == (fails == "keystore")
    assert found.secret() is not None
    found.start()
    assert found.kept.exists()
    assert found.secret() is None


async def test_keystore_that_does_not_open_is_named_and_costs_no_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = killed(tmp_path, monkeypatch)
    (tmp_path / f"{OPERATOR}.keystore").unlink()
    found.consortium.first_keystore(OPERATOR, b"another passphrase")
    found.start()
    assert f"{OPERATOR}.keystore: the passphrase does not open this keystore" in caplog.text
    assert found.kept.exists()


async def test_member_that_left_erases_its_share_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = killed(tmp_path, monkeypatch, "data-source-3", remove=("data-source-3",))
    node = found.start()
    assert "no member of epoch 1" in node.snapshot().why_not_voting
    assert found.kept.exists()
    assert found.secret() is None


async def test_member_that_left_starts_again_where_its_database_is_gone_and_its_share_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = killed(tmp_path, monkeypatch, "data-source-3", remove=("data-source-3",))
    config, genesis, clock = found.start().config, found.consortium.genesis, found.consortium.clock
    set_aside(tmp_path / found.name, genesis.chain_id)
    node = Node(config, genesis, load_identity(config, genesis), clock)
    node._close()
    assert "shares of epochs before 1 are erased; the log is fetched again" in node.snapshot().why_not_voting
    (tmp_path / found.name / LEFT_EPOCHS_FILE).unlink()
    with pytest.raises(ConfigError, match="expected a BLS key share, found none"):
        Node(config, genesis, load_identity(config, genesis), clock)


async def test_key_that_serves_on_in_the_new_epoch_is_not_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    memory = MemoryLedger(COUNTS, certificate_scheme=BLS_MULTISIG)
    consortium = Consortium(tmp_path, COUNTS, Parameters(), certificate_scheme=BLS_MULTISIG)
    assert consortium.genesis == memory.genesis
    store = Store.open(tmp_path / OPERATOR, memory.chain_id, create=True)
    same = Membership(1, memory.genesis.members, memory.genesis.thresholds, ())
    InstantNode(memory, store).seal(change_event(memory, same))
    store.close()
    keystore = consortium.first_keystore(OPERATOR)
    node = consortium.node(OPERATOR)
    node._close()
    assert node.snapshot().voting
    assert Keystore.open(keystore, PASSPHRASE).secrets.bls_share is not None
