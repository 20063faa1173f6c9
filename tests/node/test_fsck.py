"""fsck: a log made by the real rules is sound, and each single change of the database is found and named."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from consensus_fixtures import make_genesis, seed_bytes
from rocksdict import AccessType

from consensus.certificate import Certificate, certificate_message
from consensus.certificate_schemes import scheme_for
from consensus.codec import encode
from consensus.event import CheckedEvent, Kind, check_event, make_entry, pack, sign_entry
from consensus.identifiers import View
from consensus.membership import Genesis
from consensus.participant import MemberSecrets
from consensus.portions import DataItem, DataPortion, Portions, SourceClaim, SourceRevocation, Wire
from consensus.rejection import ConfigError
from consensus.state import SOURCE_TABLE
from consensus.transition import build
from consensus.vote import VoteKind, sign_vote
from node.fsck import Damage, Report, check_data_directory
from node.ledger import KIND_TERM, Ledger
from node.store import Store
from node.store_layout import BY_EVENT, BY_LEAF, HEAD_KEY, Database, open_database, term_prefix, u64

START_MS = 1_700_000_000_000
AUTHOR = "data-source-1"
BLOCKS = 6
EVENTS_PER_BLOCK = 3


@dataclass(frozen=True)
class Chain:
    """A log on disk and what made it."""

    directory: Path
    genesis: Genesis
    secrets: dict[str, MemberSecrets]
    events: list[CheckedEvent]

    def check(self) -> Report:
        stages: list[str] = []
        report = check_data_directory(
            self.directory, self.genesis, lambda stage, done, total: stages.append(f"{stage} {done}/{total}")
        )
        return report


def signed(genesis: Genesis, secrets: dict[str, MemberSecrets], kind: Kind, item: Wire, number: int) -> CheckedEvent:
    member = next(member for member in genesis.members if member.name == AUTHOR)
    portions = Portions(DataPortion(seed_bytes(number, "salt", 0), (DataItem(encode(item)),)), None, None)
    entry = make_entry(genesis.chain_id, kind, member.id, portions)
    signed_entry = sign_entry(entry, member.id, member.role.value, secrets[AUTHOR].identity)
    return check_event(pack(signed_entry, portions), scheme_for(genesis).committee)


def claim(genesis: Genesis, secrets: dict[str, MemberSecrets], number: int) -> CheckedEvent:
    content = SourceClaim(
        name=f"source {number}",
        content_root=bytes(32),
        example_count=1,
        size_bytes=1,
        licence="CC0-1.0",
        rights_basis="ownership",
        purposes=("research",),
        content_class="open",
        valid_from_ms=START_MS,
        valid_until_ms=2 * START_MS,
        statement="",
        overlap_sha256=b"",
        reserve_below=0,
    )
    return signed(genesis, secrets, Kind.SOURCE, content, number)


def write_chain(directory: Path) -> Chain:
    genesis, secrets = make_genesis()
    scheme = scheme_for(genesis)
    members = scheme.committee
    logged: list[CheckedEvent] = []
    with Store.open(directory, genesis.chain_id, create=True) as store:
        ledger = Ledger(store, genesis)
        for height in range(1, BLOCKS + 1):
            candidates = [claim(genesis, secrets, len(logged) + offset) for offset in range(EVENTS_PER_BLOCK)]
            if height == BLOCKS:
                revoked = SourceRevocation(logged[0].id, "consent withdrawn")
                candidates.append(signed(genesis, secrets, Kind.REVOCATION, revoked, 1_000))
            built = build(
                ledger.final,
                candidates if height != 3 else [],
                view=2 * height,
                leader=members.leader(View(2 * height)).id,
                timestamp_ms=START_MS + height,
                committee=members,
                max_events=100,
                max_bytes=1 << 20,
            )
            assert not built.refused
            ledger.keep(built)
            header = built.state.header
            message = certificate_message(genesis.chain_id, 0, View(header.view), header.digest)
            keys = {voter.id: secrets[voter.name] for voter in members.voters}
            shares = {}
            for identifier, held in keys.items():
                assert held.key_share is not None
                shares[identifier] = scheme.share(held.key_share, message)
            certificate = Certificate(scheme.name, header.view, header.digest, 0, scheme.combine(message, shares))
            votes = [
                sign_vote(
                    members,
                    identifier,
                    VoteKind.FINALIZE,
                    View(header.view),
                    header.digest,
                    share=shares[identifier],
                    sign=keys[identifier].identity.sign,
                )
                for identifier in shares
            ]
            ledger.commit([header], certificate, votes)
            logged += built.events
        store.sync()
    return Chain(directory, genesis, secrets, logged)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return write_chain(tmp_path_factory.mktemp("fsck") / "data")


@pytest.fixture
def chain(original: Chain, tmp_path: Path) -> Chain:
    """A copy of the log, to be damaged."""
    shutil.copytree(original.directory, tmp_path / "data")
    return Chain(tmp_path / "data", original.genesis, original.secrets, original.events)


def alter(chain: Chain, change: Callable[[Database], None]) -> None:
    """Change the database underneath the store."""
    database = open_database(chain.directory / "rocksdb", False, AccessType.read_write())
    change(database)
    database.root.flush_wal(True)
    database.families.clear()
    database.handles.clear()
    database.root.close()


def put(chain: Chain, family: str, key: bytes, value: bytes) -> None:
    alter(chain, lambda database: database.families[family].put(key, value))


def remove(chain: Chain, family: str, key: bytes) -> None:
    alter(chain, lambda database: database.families[family].delete(key))


def flip(chain: Chain, family: str, key: bytes, at: int = -1) -> None:
    """Flip one bit of a value."""

    def change(database: Database) -> None:
        value = bytearray(database.families[family].get(key))
        value[at] ^= 1
        database.families[family].put(key, bytes(value))

    alter(chain, change)


def named(report: Report) -> set[tuple[str, str]]:
    return {(damage.family, damage.key) for damage in report.damages}


def test_a_log_made_by_the_rules_is_sound(original: Chain) -> None:
    report = original.check()
    assert report.damages == []
    assert report.sound
    assert (report.height, report.log_size, report.state_values) == (BLOCKS, len(original.events), 15)


def test_an_empty_log_is_sound(tmp_path: Path) -> None:
    genesis, _ = make_genesis()
    with Store.open(tmp_path, genesis.chain_id, create=True) as store:
        Ledger(store, genesis)
        store.sync()
    report = check_data_directory(tmp_path, genesis, lambda stage, done, total: None)
    assert (report.damages, report.height) == ([], 0)


@pytest.mark.parametrize(
    ("family", "key", "found"),
    [
        ("headers", u64(0), ("headers", "height 0")),
        ("headers", u64(2), ("headers", "height 2")),
        ("bodies", u64(2), ("bodies", "height 2")),
        ("certificates", u64(4), ("certificates", "height 4")),
        ("votes", u64(4), ("votes", "height 4")),
        ("entries", u64(5), ("entries", "index 5")),
        ("portions", u64(5), ("portions", "index 5")),
        ("nodes", bytes([0]) + u64(3), ("nodes", "level 0 index 3")),
        ("nodes", bytes([2]) + u64(1), ("nodes", "level 2 index 1")),
    ],
)
def test_a_flipped_bit_is_found_where_it_is(chain: Chain, family: str, key: bytes, found: tuple[str, str]) -> None:
    flip(chain, family, key)
    report = chain.check()
    assert found in named(report)
    assert not report.sound


@pytest.mark.parametrize(
    ("family", "key", "found"),
    [
        ("headers", u64(2), ("headers", "height 2")),
        ("bodies", u64(2), ("bodies", "height 2")),
        ("votes", u64(2), ("votes", "height 2")),
        ("certificates", u64(BLOCKS), ("certificates", f"height {BLOCKS}")),
        ("entries", u64(5), ("entries", "index 5")),
        ("portions", u64(5), ("portions", "index 5")),
        ("nodes", bytes([1]) + u64(1), ("nodes", "level 1 index 1")),
        ("meta", HEAD_KEY, ("meta", "head")),
    ],
)
def test_a_missing_record_is_found_where_it_was(chain: Chain, family: str, key: bytes, found: tuple[str, str]) -> None:
    remove(chain, family, key)
    assert found in named(chain.check())


def test_an_event_that_is_lost_makes_strangers_of_none_that_point_to_it(chain: Chain) -> None:
    remove(chain, "entries", u64(5))
    assert named(chain.check()) == {("entries", "index 5"), ("state", "from height 2 on")}


def test_damage_to_portions_alone_names_them_alone_and_what_was_not_rechecked(chain: Chain) -> None:
    flip(chain, "portions", u64(5))
    assert named(chain.check()) == {("portions", "index 5"), ("state", "from height 2 on")}


def test_a_state_value_the_events_do_not_make_is_found(chain: Chain) -> None:
    key = SOURCE_TABLE + chain.events[3].id
    put(chain, "state", key, b"\x90")
    assert chain.check().damages == [Damage("state", f"key {key.hex()}", "its value is not what the events make it")]


def test_a_removed_and_an_added_state_value_are_found(chain: Chain) -> None:
    key, strange = SOURCE_TABLE + chain.events[3].id, SOURCE_TABLE + bytes(32)
    remove(chain, "state", key)
    put(chain, "state", strange, b"\x90")
    assert named(chain.check()) == {("state", f"key {key.hex()}"), ("state", f"key {strange.hex()}")}


def test_an_undone_revocation_is_found_even_where_the_rules_cannot_be_rechecked(chain: Chain) -> None:
    flip(chain, "portions", u64(0))
    key = SOURCE_TABLE + chain.events[0].id
    remove(chain, "state", key)
    assert ("state", "all") in named(chain.check())


def test_a_lookup_that_points_elsewhere_or_nowhere_is_found(chain: Chain) -> None:
    event = chain.events[4]
    put(chain, "lookup", BY_EVENT + event.id, u64(5))
    remove(chain, "lookup", BY_LEAF + event.leaf_hash)
    assert named(chain.check()) == {
        ("lookup", f"event {event.id.hex()}"),
        ("lookup", f"leaf {event.leaf_hash.hex()}"),
    }


def test_a_listing_that_omits_an_event_is_found(chain: Chain) -> None:
    listed_under = KIND_TERM + b"source"
    remove(chain, "index", term_prefix(listed_under) + u64(4))
    assert named(chain.check()) == {("index", f"term {listed_under.hex()} index 4")}


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("lookup", BY_EVENT + bytes(32), u64(0)),
        ("lookup", BY_LEAF + bytes(32), u64(999)),
        ("index", term_prefix(KIND_TERM + b"policy") + u64(1), b""),
        ("entries", u64(900), b"entry"),
        ("headers", u64(900), b"header"),
        ("nodes", bytes([0]) + u64(900), bytes(32)),
    ],
)
def test_what_does_not_belong_to_the_log_is_found(chain: Chain, family: str, key: bytes, value: bytes) -> None:
    put(chain, family, key, value)
    assert named(chain.check()) == {(family, f"key {key.hex()}")}


def test_a_head_that_forgets_the_newest_ledger_block_is_found(chain: Chain) -> None:
    flip(chain, "meta", HEAD_KEY, at=7)
    assert not chain.check().sound


@pytest.mark.parametrize("height", [BLOCKS + 1, 1 << 63])
def test_a_head_beyond_every_ledger_block_is_named_and_the_check_comes_to_an_end(chain: Chain, height: int) -> None:
    """One flipped bit is enough to make it of a height that no check reaches in a lifetime."""
    alter(
        chain,
        lambda database: database.families["meta"].put(
            HEAD_KEY, u64(height) + database.families["meta"].get(HEAD_KEY)[8:]
        ),
    )
    report = chain.check()
    assert report.damages == [Damage("meta", "head", f"height {height}, the newest ledger block is {BLOCKS}")]
    assert report.height == BLOCKS


def test_a_strange_header_of_an_enormous_height_does_not_count_where_the_head_is_lost(chain: Chain) -> None:
    remove(chain, "meta", HEAD_KEY)
    put(chain, "headers", u64(1 << 63), b"strange")
    report = chain.check()
    assert named(report) == {("meta", "head"), ("headers", f"key {u64(1 << 63).hex()}")}
    assert report.height == BLOCKS


def test_a_damaged_database_file_is_a_damage_not_a_crash(chain: Chain) -> None:
    alter(chain, lambda database: database.root.flush())
    for name in ("entries", "portions", "state"):
        alter(chain, lambda database, name=name: database.families[name].flush())  # type: ignore[misc]
    tables = sorted((chain.directory / "rocksdb").glob("*.sst"))
    assert tables
    for table in tables:
        content = bytearray(table.read_bytes())
        content[40] ^= 0xFF
        table.write_bytes(bytes(content))
    report = chain.check()
    assert not report.sound


def test_only_so_many_damages_are_listed_the_rest_counted(chain: Chain) -> None:
    def add_many(database: Database) -> None:
        for number in range(130):
            database.families["entries"].put(u64(1_000 + number), b"strange")

    alter(chain, add_many)
    report = chain.check()
    assert (len(report.damages), report.damages_left_out) == (100, 30)


def test_another_chains_directory_and_one_in_use_are_refused(chain: Chain, tmp_path: Path) -> None:
    other, _ = make_genesis(seed=1)
    with pytest.raises(ConfigError, match="expected chain"):
        check_data_directory(chain.directory, other, lambda stage, done, total: None)
    with Store.open(chain.directory, chain.genesis.chain_id, create=False), pytest.raises(ConfigError, match="locked"):
        chain.check()
    with pytest.raises(ConfigError, match="found none"):
        check_data_directory(tmp_path / "nothing", chain.genesis, lambda stage, done, total: None)


def test_the_check_changes_nothing(chain: Chain) -> None:
    flip(chain, "entries", u64(5))
    first = chain.check()
    assert chain.check().damages == first.damages
