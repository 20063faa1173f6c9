"""A node whose configuration names a checkpoint appends no other history, and goes on with none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import msgspec
import pytest
import trio
from ledger_fixtures import LIBRARIAN, MemoryLedger, begin, story
from node_fixtures import Consortium, running, until
from snapshot_fixtures import honest, served, write, written

from consensus.block import decode_header
from consensus.checkpoint import assemble_note, checkpoint_text, sign_note
from consensus.cosignature import Ed25519Cosigner, cosign, encode_witness_key
from consensus.epochs import Pin
from consensus.keys import Ed25519SigningKey
from consensus.merkle import root_of
from consensus.rejection import ConfigError, InvariantBroken
from node import history, snapshot
from node.catchup import CatchUp
from node.config import Address, NetworkSection, NodeConfig, NodeSection
from node.history import HistoryFill
from node.identity import load_pin
from node.ledger import Ledger
from node.pace import Pace
from node.snapshot import Joining
from node.store import Store

ANOTHER = "this is another history"


@cache
def told() -> MemoryLedger:
    return story().ledger


def pin(size: int, root: bytes = b"") -> Pin:
    return Pin(size, root or root_of([event.leaf_hash for event in told().events[:size]]))


@contextmanager
def opened(directory: Path, held: Pin | None, *, create: bool = False) -> Iterator[Ledger]:
    with Store.open(directory, told().chain_id, create=create) as store:
        yield Ledger(store, told().genesis, held)


@pytest.mark.parametrize("size", range(1, len(story().ledger.events) + 3))
def test_log_that_begins_with_the_pinned_one_is_appended_wherever_that_ends(tmp_path: Path, size: int) -> None:
    held = pin(size) if size <= len(told().events) else pin(size, bytes(32))
    with opened(tmp_path, held, create=True) as ledger:
        write(ledger, told())
        assert ledger.final.header.log_size == len(told().events)
    with opened(tmp_path, held):
        pass


def test_ledger_block_that_would_end_another_history_is_not_appended(tmp_path: Path) -> None:
    sizes = [decode_header(header, told().chain_id).log_size for header, _ in told().certified]
    for number, size in enumerate(range(1, len(told().events) + 1)):
        before = max((held for held in sizes if held < size), default=0)
        with opened(tmp_path / str(number), pin(size, bytes(32)), create=True) as ledger:
            with pytest.raises(InvariantBroken, match=ANOTHER) as caught:
                write(ledger, told())
            assert pin(size).log_root.hex() in str(caught.value)
            assert ledger.final.header.log_size == before
        with opened(tmp_path / str(number), pin(size)) as ledger:
            write(ledger, told())


def test_log_on_disk_is_held_to_a_pin_that_is_named_later(tmp_path: Path) -> None:
    written(told(), tmp_path).store.close()
    for size in range(1, len(told().events) + 1):
        with opened(tmp_path, pin(size)):
            pass
        with pytest.raises(InvariantBroken, match=ANOTHER), opened(tmp_path, pin(size, bytes(32))):
            pass


@pytest.mark.trio
async def test_log_below_a_snapshot_is_held_to_the_pin_as_it_is_filled_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "LEAST_EVENTS", 4)
    monkeypatch.setattr(snapshot, "REQUEST_SECONDS", 30.0)
    monkeypatch.setattr(history, "REQUEST_SECONDS", 30.0)
    full = written(told(), tmp_path / "full")
    size = len(told().events) // 2

    async def join_and_fill(directory: Path, held: Pin) -> None:
        with opened(directory, held, create=True) as ledger:
            async with served([honest(full), honest(full)]) as network:
                catch_up = CatchUp(ledger, network, lambda appended: None, Joining(ledger, network, lambda: None))
                for peer in sorted(network.connected):
                    await catch_up.from_peer(peer)
                assert ledger.missing_blocks > 0
                with trio.fail_after(60):
                    await HistoryFill(ledger, network, Pace(1 << 30)).run()
            assert ledger.missing_blocks == 0

    await join_and_fill(tmp_path / "true", pin(size))
    with pytest.RaisesGroup(pytest.RaisesExc(InvariantBroken, match=ANOTHER), flatten_subgroups=True):
        await join_and_fill(tmp_path / "forged", pin(size, bytes(32)))
    with opened(tmp_path / "forged", pin(size)) as ledger:
        assert ledger.missing_blocks > 0
    full.store.close()


@pytest.mark.trio
async def test_verifying_node_follows_the_pinned_history_and_stops_at_another(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    voters = [consortium.node(name) for name in ("data-source-1", "data-source-2", "governance-1", "operator-1")]
    seen, forged = tmp_path / "seen.txt", tmp_path / "forged.txt"
    async with running(voters):
        for number in range(3):
            event = voters[0].submit(consortium.source_event("data-source-1", number))
            await until(lambda event=event: voters[0].status_of(event.id).index is not None)
        final = voters[0].ledger.final.header
        name = consortium.genesis.name
        seen.write_bytes(checkpoint_text(name, final.log_size, final.log_root))
        forged.write_bytes(checkpoint_text(name, final.log_size, bytes(32)))
        honest_one = consortium.node("verifier-1", checkpoint=seen)
        async with running([honest_one]):
            await until(lambda: honest_one.snapshot().log_size >= final.log_size)
        with pytest.raises(InvariantBroken, match=ANOTHER):
            consortium.node("verifier-1", checkpoint=forged)
        shutil.rmtree(tmp_path / "verifier-1")
        with pytest.RaisesGroup(pytest.RaisesExc(InvariantBroken, match=ANOTHER), flatten_subgroups=True):
            async with running([consortium.node("verifier-1", checkpoint=forged)]):
                await trio.sleep(60)


# The configuration


def config_with(folder: Path, **fields: object) -> NodeConfig:
    node = NodeSection(
        name="verifier-1",
        genesis=folder / "genesis.json",
        chain_id=told().chain_id.hex(),
        data_directory=folder / "data",
        keystore=folder / "keystore",
    )
    network = NetworkSection(listen=Address("127.0.0.1", 0))
    return NodeConfig(node=msgspec.structs.replace(node, **fields), network=network)


def test_checkpoint_of_a_configuration_is_one_of_this_log_and_of_its_witnesses(tmp_path: Path) -> None:
    genesis, witness = told().genesis, Ed25519Cosigner(bytes(32))
    path, right = tmp_path / "seen.txt", pin(5)
    text = checkpoint_text(genesis.name, right.log_size, right.log_root)
    key = encode_witness_key("witness.example", witness)
    other = encode_witness_key("other.example", Ed25519Cosigner(bytes([1]) * 32))
    assert load_pin(config_with(tmp_path), genesis) is None
    with pytest.raises(ConfigError, match=r"node\.checkpoint: .*seen\.txt"):
        load_pin(config_with(tmp_path, checkpoint=path), genesis)
    path.write_bytes(text)
    assert load_pin(config_with(tmp_path, checkpoint=path), genesis) == right
    path.write_bytes(assemble_note(text, [cosign(text, "witness.example", witness, 7)]))
    assert load_pin(config_with(tmp_path, checkpoint=path, witnesses=(key,)), genesis) == right
    for fields, words in (
        ({"witnesses": (other,)}, "none of 1 signatures"),
        ({"witnesses": (key, other), "witnesses_needed": 2}, "2 of the witnesses are needed"),
        ({"witnesses": ("nonsense",)}, r"node\.witnesses: key 1: a verifier key 'nonsense', expected NAME\+ID\+KEY"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_pin(config_with(tmp_path, checkpoint=path, **fields), genesis)
    foreign = checkpoint_text("elsewhere.example", 5, right.log_root)
    path.write_bytes(assemble_note(foreign, [sign_note(foreign, "elsewhere.example", Ed25519SigningKey(bytes(32)))]))
    with pytest.raises(ConfigError, match="elsewhere"):
        load_pin(config_with(tmp_path, checkpoint=path), genesis)


def test_history_by_the_same_keys_is_refused_by_whoever_knows_the_true_one(tmp_path: Path) -> None:
    true, forged = begin().ledger, begin().ledger
    true.seal(true.source(LIBRARIAN, "poems"))
    forged.seal(forged.source(LIBRARIAN, "forgery"))
    held = Pin(len(true.events), root_of([event.leaf_hash for event in true.events]))
    with Store.open(tmp_path, true.chain_id, create=True) as store:
        ledger = Ledger(store, true.genesis, held)
        with pytest.raises(InvariantBroken, match=ANOTHER):
            write(ledger, forged)
        write(ledger, true)
        assert ledger.final.header.log_root == held.log_root
