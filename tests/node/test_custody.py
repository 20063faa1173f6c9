"""A custodian and what is handed in to it: only what the log commits to, whole or not there, within its room."""

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trio
from api_fixtures import Served, refusal, served
from click.testing import CliRunner, Result
from ledger_fixtures import HOSPITAL, Story, begin
from node_fixtures import CHEAP, PASSPHRASE, kept_secrets

from consensus.accumulators import VERSION, AccumulatorWindow, WindowEntry, WindowTerms, window_root
from consensus.bundle import open_bundle
from consensus.codec import encode
from consensus.epochs import anchor
from consensus.genesis import genesis_to_json
from consensus.membership import ED25519_LIST
from consensus.predicates.accumulators import provenance
from consensus.rejection import Reason, Rejected
from node.cli import main
from node.custody import CommittedWindow, CustodyDesk
from node.keystore import Keystore

CAMPAIGN, POLICY, SOURCE = bytes([7]) * 32, bytes([1]) * 32, bytes([2]) * 32
TOTAL, SUM, SKETCHES = b"total" * 100, b"sum of a source" * 50, b"sketches" * 30


@dataclass(frozen=True)
class Window:
    """A window of accumulators and its files, as a job leaves them."""

    listed: AccumulatorWindow
    files: tuple[bytes, ...] = (TOTAL, SUM, SKETCHES)

    @property
    def root(self) -> bytes:
        return window_root(self.listed)

    @property
    def committed(self) -> CommittedWindow:
        return CommittedWindow(self.listed.terms.first_step, self.listed.terms.last_step, self.root)

    def write(self, directory: Path) -> Path:
        for name in ("windows", "blobs"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "windows" / f"{self.root.hex()}.window").write_bytes(encode(self.listed))
        for content in self.files:
            (directory / "blobs" / f"{sha256(content).hex()}.safetensors").write_bytes(content)
        return directory


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def window(campaign: bytes = CAMPAIGN, first: int = 1, last: int = 2, files: tuple[bytes, ...] = ()) -> Window:
    total, summed, sketches = files or (TOTAL, SUM, SKETCHES)
    entries = (
        WindowEntry(b"", b"", sha256(total), len(total), b"", 0),
        WindowEntry(POLICY, SOURCE, sha256(summed), len(summed), sha256(sketches), len(sketches)),
    )
    listed = AccumulatorWindow(VERSION, WindowTerms(campaign, first, last), entries)
    return Window(listed, (total, summed, sketches))


def committing(*windows: Window) -> "CommittedOf":
    return CommittedOf(tuple(each.committed for each in windows))


@dataclass(frozen=True)
class CommittedOf:
    windows: tuple[CommittedWindow, ...]

    def __call__(self, campaign: bytes) -> tuple[CommittedWindow, ...]:
        return self.windows


def refused(reason: Reason, act: object) -> Rejected:
    assert callable(act)
    with pytest.raises(Rejected) as caught:
        act()
    assert caught.value.reason is reason, caught.value
    return caught.value


def files_below(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


# What is taken


def test_window_handed_in_is_whole_and_comes_back_byte_for_byte(tmp_path: Path) -> None:
    held = window()
    desk, committed = CustodyDesk(tmp_path, 10_000), committing(held)
    desk.take_list(CAMPAIGN, held.root, encode(held.listed), committed)
    assert [each.is_whole for each in desk.windows(CAMPAIGN, committed)] == [False]
    for content in held.files:
        assert desk.take_part(CAMPAIGN, sha256(content), 0, content[:100]) == 100
        assert desk.take_part(CAMPAIGN, sha256(content), 100, content[100:]) == len(content)
    assert [each.is_whole for each in desk.windows(CAMPAIGN, committed)] == [True]
    assert desk.read_list(CAMPAIGN, held.root) == encode(held.listed)
    for content in held.files:
        assert desk.read_part(CAMPAIGN, sha256(content), 0, 150) == content[:150]
        assert desk.read_part(CAMPAIGN, sha256(content), 150, 10_000) == content[150:]
        assert desk.read_part(CAMPAIGN, sha256(content), len(content), 10) == b""
    assert desk.set_aside_bytes == sum(map(len, held.files))


def test_node_without_room_is_no_custodian_and_says_so(tmp_path: Path) -> None:
    held = window()
    desk, committed = CustodyDesk(tmp_path, 0), committing(held)
    for act in (
        lambda: desk.windows(CAMPAIGN, committed),
        lambda: desk.take_list(CAMPAIGN, held.root, encode(held.listed), committed),
        lambda: desk.take_part(CAMPAIGN, sha256(TOTAL), 0, TOTAL),
        lambda: desk.read_list(CAMPAIGN, held.root),
        lambda: desk.read_part(CAMPAIGN, sha256(TOTAL), 0, 1),
    ):
        assert "custody.maximum_bytes is 0" in refused(Reason.NOT_FOUND, act).detail
    assert files_below(tmp_path) == set()


def test_window_that_no_standing_step_names_is_refused(tmp_path: Path) -> None:
    held, other = window(), window(files=(TOTAL, SUM, b"other"))
    desk = CustodyDesk(tmp_path, 10_000)
    refused(Reason.NOT_FOUND, lambda: desk.take_list(CAMPAIGN, other.root, encode(other.listed), committing(held)))
    assert files_below(tmp_path) == set()


def test_list_that_is_not_the_committed_one_is_refused(tmp_path: Path) -> None:
    held, other = window(), window(files=(TOTAL, SUM, b"other"))
    desk = CustodyDesk(tmp_path, 10_000)
    committed = committing(held)
    refused(Reason.DIGEST_MISMATCH, lambda: desk.take_list(CAMPAIGN, held.root, encode(other.listed), committed))
    refused(Reason.MALFORMED, lambda: desk.take_list(CAMPAIGN, held.root, b"no list", committed))
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("change", [{"campaign": bytes(32)}, {"first": 2}, {"last": 3}])
def test_list_of_other_steps_or_another_campaign_is_refused_though_its_root_is_named(
    tmp_path: Path, change: dict[str, object]
) -> None:
    named = window(**change)  # type: ignore[arg-type]
    committed = CommittedOf((CommittedWindow(1, 2, named.root),))
    desk = CustodyDesk(tmp_path, 10_000)
    refused(Reason.DIGEST_MISMATCH, lambda: desk.take_list(CAMPAIGN, named.root, encode(named.listed), committed))


def test_file_that_no_list_names_is_refused(tmp_path: Path) -> None:
    held = window()
    desk = CustodyDesk(tmp_path, 10_000)
    refused(Reason.NOT_FOUND, lambda: desk.take_part(CAMPAIGN, sha256(TOTAL), 0, TOTAL))
    desk.take_list(CAMPAIGN, held.root, encode(held.listed), committing(held))
    refused(Reason.NOT_FOUND, lambda: desk.take_part(CAMPAIGN, sha256(b"a virus"), 0, b"a virus"))
    refused(Reason.NOT_FOUND, lambda: desk.take_part(bytes(32), sha256(TOTAL), 0, TOTAL))


def test_file_with_one_byte_changed_is_thrown_away_and_can_be_handed_in_right(tmp_path: Path) -> None:
    held = window()
    desk = CustodyDesk(tmp_path, 10_000)
    desk.take_list(CAMPAIGN, held.root, encode(held.listed), committing(held))
    altered = bytes([SUM[0] ^ 1]) + SUM[1:]
    refused(Reason.DIGEST_MISMATCH, lambda: desk.take_part(CAMPAIGN, sha256(SUM), 0, altered))
    assert files_below(tmp_path) == {f"{held.root.hex()}.window"}
    assert desk.take_part(CAMPAIGN, sha256(SUM), 0, SUM) == len(SUM)


def test_parts_out_of_order_or_beyond_the_size_are_refused_and_change_nothing(tmp_path: Path) -> None:
    held = window()
    desk = CustodyDesk(tmp_path, 10_000)
    desk.take_list(CAMPAIGN, held.root, encode(held.listed), committing(held))
    refused(Reason.SEQUENCE_GAP, lambda: desk.take_part(CAMPAIGN, sha256(SUM), 1, SUM[1:]))
    desk.take_part(CAMPAIGN, sha256(SUM), 0, SUM[:10])
    refused(Reason.SEQUENCE_GAP, lambda: desk.take_part(CAMPAIGN, sha256(SUM), 0, SUM[:10]))
    refused(Reason.OVERSIZED, lambda: desk.take_part(CAMPAIGN, sha256(SUM), 10, SUM))
    assert desk.take_part(CAMPAIGN, sha256(SUM), 10, SUM[10:]) == len(SUM)


def test_room_is_set_aside_for_a_whole_window_and_what_exceeds_it_is_refused(tmp_path: Path) -> None:
    first = window()
    other = b"a sum of its own" * 60
    second = window(first=3, last=4, files=(TOTAL, other, SKETCHES))
    needed_bytes = sum(map(len, first.files))
    desk, committed = CustodyDesk(tmp_path, needed_bytes + len(other) - 1), committing(first, second)
    desk.take_list(CAMPAIGN, first.root, encode(first.listed), committed)
    desk.take_list(CAMPAIGN, first.root, encode(first.listed), committed)
    assert desk.set_aside_bytes == needed_bytes
    why = refused(Reason.OVERSIZED, lambda: desk.take_list(CAMPAIGN, second.root, encode(second.listed), committed))
    assert f"need {len(other)} bytes, there is room for {len(other) - 1}" in why.detail
    roomier = CustodyDesk(tmp_path, needed_bytes + len(other))
    roomier.take_list(CAMPAIGN, second.root, encode(second.listed), committed)
    assert roomier.set_aside_bytes == roomier.maximum_bytes


def test_custodian_that_died_between_parts_goes_on_from_what_is_on_disk(tmp_path: Path) -> None:
    held = window()
    committed = committing(held)
    before = CustodyDesk(tmp_path, 10_000)
    before.take_list(CAMPAIGN, held.root, encode(held.listed), committed)
    before.take_part(CAMPAIGN, sha256(SUM), 0, SUM[:99])
    refused(Reason.NOT_FOUND, lambda: before.read_part(CAMPAIGN, sha256(SUM), 0, 10))
    after = CustodyDesk(tmp_path, 10_000)
    (found,) = after.windows(CAMPAIGN, committed)
    assert {file.sha256: file.held_bytes for file in found.files}[sha256(SUM)] == 99
    assert after.take_part(CAMPAIGN, sha256(SUM), 99, SUM[99:]) == len(SUM)


def test_custodian_that_died_before_a_whole_file_had_its_name_names_it_at_the_next_part(tmp_path: Path) -> None:
    held = window()
    desk = CustodyDesk(tmp_path, 10_000)
    desk.take_list(CAMPAIGN, held.root, encode(held.listed), committing(held))
    (tmp_path / CAMPAIGN.hex() / "blobs").mkdir()
    (tmp_path / CAMPAIGN.hex() / "blobs" / f"{sha256(SUM).hex()}.safetensors.part").write_bytes(SUM)
    assert desk.take_part(CAMPAIGN, sha256(SUM), len(SUM), b"") == len(SUM)
    assert desk.read_part(CAMPAIGN, sha256(SUM), 0, len(SUM)) == SUM


def test_damaged_list_counts_as_missing_and_is_taken_again(tmp_path: Path) -> None:
    held = window()
    desk, committed = CustodyDesk(tmp_path, 10_000), committing(held)
    desk.take_list(CAMPAIGN, held.root, encode(held.listed), committed)
    path = tmp_path / CAMPAIGN.hex() / "windows" / f"{held.root.hex()}.window"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (tmp_path / CAMPAIGN.hex() / "windows" / "notes.window").write_bytes(b"mine")
    (tmp_path / "lost+found").mkdir()
    assert [each.is_listed for each in desk.windows(CAMPAIGN, committed)] == [False]
    desk.take_list(CAMPAIGN, held.root, encode(held.listed), committed)
    assert [each.is_listed for each in desk.windows(CAMPAIGN, committed)] == [True]


# Over HTTP, against the log


def committed_story() -> tuple[Story, Window]:
    """A campaign whose second of two steps commits to a window; an earlier attempt at it, to another, was undone."""
    told = begin(2, certificate_scheme=ED25519_LIST)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    told.ledger.seal(*told.run.step())
    undone = window(told.run.id, files=(TOTAL, b"undone", SKETCHES))
    told.ledger.seal(*told.run.step(flagged=told.records, accumulator_root=undone.root))
    told.ledger.seal(told.run.rollback())
    held = window(told.run.id)
    told.ledger.seal(*told.run.step(accumulator_root=held.root))
    return told, held


@asynccontextmanager
async def custodian(directory: Path, custody_bytes: int = 10_000) -> AsyncIterator[tuple[Served, Story, Window]]:
    told, held = committed_story()
    async with served(directory / "store", story=told, custody_bytes=custody_bytes) as running:
        yield running, told, held


async def command(*arguments: str | Path) -> Result:
    return await trio.to_thread.run_sync(
        lambda: CliRunner().invoke(main, ["custody", *(str(argument) for argument in arguments)])
    )


@pytest.mark.trio
async def test_run_is_handed_in_seen_and_fetched_and_the_folder_is_the_jobs(tmp_path: Path) -> None:
    async with custodian(tmp_path) as (running, told, held):
        job = held.write(tmp_path / "job")
        asked = ("--url", f"http://{running.address}", "--campaign", told.run.id.hex())
        before = await command("status", *asked)
        assert (before.exit_code, "0 of 1 windows are there whole" in before.output) == (1, True), before.output
        assert "1 to 2  missing" in before.output
        handed = await command("hand-in", *asked, "--accumulators", job)
        assert handed.exit_code == 0, handed.output
        assert f"{sum(map(len, held.files))} bytes handed in; 1 of 1" in handed.output
        again = json.loads((await command("hand-in", *asked, "--accumulators", job, "--json")).output)
        assert again == {"sent_bytes": 0, "windows": 1, "whole": 1}
        after = json.loads((await command("status", *asked, "--json")).output)
        assert [row["whole"] for row in after["windows"]] == [True]
        trusted = trusting(tmp_path, told)
        fetched = await command("fetch", *asked, *trusted, "--out", tmp_path / "fetched")
        assert fetched.exit_code == 0, fetched.output
        more = json.loads((await command("fetch", *asked, *trusted, "--out", tmp_path / "fetched", "--json")).output)
        assert more == {"fetched_bytes": 0, "windows": 1}
    assert files_below(tmp_path / "fetched") == files_below(job)
    for path in (tmp_path / "fetched").rglob("*.*"):
        assert path.read_bytes() == (job / path.relative_to(tmp_path / "fetched")).read_bytes()


def trusting(directory: Path, told: Story) -> tuple[str | Path, ...]:
    genesis = directory / "genesis.json"
    genesis.write_bytes(genesis_to_json(told.ledger.genesis))
    return "--genesis", genesis, "--chain-id", told.ledger.chain_id.hex()


@pytest.mark.trio
async def test_window_of_an_undone_step_is_refused_though_the_log_names_it(tmp_path: Path) -> None:
    async with custodian(tmp_path) as (running, told, _):
        undone = window(told.run.id, files=(TOTAL, b"undone", SKETCHES))
        path = f"/v1/custody/{told.run.id.hex()}/windows/{undone.root.hex()}"
        answer = await running.client.put(path, content=encode(undone.listed))
        assert refusal(answer) == (404, "not-found")


@pytest.mark.trio
async def test_statuses_tell_a_missing_custodian_campaign_and_part_apart(tmp_path: Path) -> None:
    async with custodian(tmp_path) as (running, told, held):
        campaign = told.run.id.hex()
        unknown = await running.client.get(f"/v1/custody/{'00' * 32}")
        assert refusal(unknown) == (409, "unknown-campaign")
        listed = f"/v1/custody/{campaign}/windows/{held.root.hex()}"
        assert refusal(await running.client.get(listed)) == (404, "not-found")
        assert (await running.client.put(listed, content=encode(held.listed))).status_code == 200
        blob = f"/v1/custody/{campaign}/blobs/{sha256(SUM).hex()}"
        assert refusal(await running.client.put(f"{blob}?offset=5", content=SUM)) == (409, "sequence-gap")
        assert refusal(await running.client.put(blob, content=SUM + b"!")) == (413, "oversized")
        assert refusal(await running.client.put(blob, content=SUM[::-1])) == (400, "digest-mismatch")
        assert (await running.client.put(blob, content=SUM)).json() == {"held_bytes": len(SUM)}
        assert (await running.client.get(f"{blob}?offset=10")).content == SUM[10:]
    async with custodian(tmp_path / "other", custody_bytes=0) as (running, told, _):
        answer = await running.client.get(f"/v1/custody/{told.run.id.hex()}")
        assert refusal(answer) == (404, "not-found")


@pytest.mark.trio
@pytest.mark.parametrize("altered", ["list", "file", "cut"])
async def test_custodian_that_gives_out_something_else_is_found_by_who_fetches(tmp_path: Path, altered: str) -> None:
    async with custodian(tmp_path) as (running, told, held):
        asked = ("--url", f"http://{running.address}", "--campaign", told.run.id.hex())
        await command("hand-in", *asked, "--accumulators", held.write(tmp_path / "job"))
        kept = tmp_path / "store" / "custody" / told.run.id.hex()
        name = f"windows/{held.root.hex()}.window" if altered == "list" else f"blobs/{sha256(SUM).hex()}.safetensors"
        content = (kept / name).read_bytes()
        if altered == "list":
            entries = (held.listed.entries[0], msgspec.structs.replace(held.listed.entries[1], size_bytes=1))
            content = encode(msgspec.structs.replace(held.listed, entries=entries))
        elif altered == "file":
            content = bytes([content[0] ^ 1]) + content[1:]
        else:
            content = content[:-1]
        (kept / name).write_bytes(content)
        result = await command("fetch", *asked, *trusting(tmp_path, told), "--out", tmp_path / "fetched")
    assert (result.exit_code, "digest-mismatch" in result.stderr) == (1, True), result.output
    assert not (tmp_path / "fetched" / name).exists()
    assert not any(name.endswith(".part") for name in files_below(tmp_path / "fetched"))


@pytest.mark.trio
async def test_damaged_file_in_the_folder_is_fetched_again(tmp_path: Path) -> None:
    async with custodian(tmp_path) as (running, told, held):
        asked = ("--url", f"http://{running.address}", "--campaign", told.run.id.hex())
        await command("hand-in", *asked, "--accumulators", held.write(tmp_path / "job"))
        damaged = tmp_path / "job" / "blobs" / f"{sha256(SUM).hex()}.safetensors"
        damaged.write_bytes(SUM[::-1])
        fetched = await command("fetch", *asked, *trusting(tmp_path, told), "--out", tmp_path / "job", "--json")
    assert json.loads(fetched.output)["fetched_bytes"] == len(SUM)
    assert damaged.read_bytes() == SUM


@pytest.mark.trio
async def test_run_that_lost_a_file_is_named_and_the_rest_stays_handed_in(tmp_path: Path) -> None:
    async with custodian(tmp_path) as (running, told, held):
        job = held.write(tmp_path / "job")
        (job / "blobs" / f"{sha256(SKETCHES).hex()}.safetensors").unlink()
        asked = ("--url", f"http://{running.address}", "--campaign", told.run.id.hex())
        result = await command("hand-in", *asked, "--accumulators", job)
        assert (result.exit_code, sha256(SKETCHES).hex() in result.stderr) == (2, True), result.output
        shown = await command("status", *asked)
        assert "1 to 2  incomplete" in shown.output


# The word on the log


def member_config(directory: Path, told: Story, address: object, name: str) -> Path:
    """The configuration of a member of the story, with its keystore."""
    (directory / "genesis.json").write_bytes(genesis_to_json(told.ledger.genesis))
    Keystore.create(directory / "keystore.json", kept_secrets(told.ledger.secrets[name]), PASSPHRASE, CHEAP)
    passphrase = directory / "passphrase"
    passphrase.write_bytes(PASSPHRASE)
    passphrase.chmod(0o600)
    config = directory / "node.toml"
    config.write_text(
        f'[node]\nname = "{name}"\ngenesis = "genesis.json"\nchain_id = "{told.ledger.chain_id.hex()}"\n'
        'data_directory = "data"\nkeystore = "keystore.json"\npassphrase_file = "passphrase"\n'
        f'[network]\nlisten = "127.0.0.1:1"\n[api]\nlisten = "{address}"\n',
        encoding="utf-8",
    )
    return config


@pytest.mark.trio
async def test_custodian_signs_only_for_what_it_holds_whole_and_the_bundle_names_it(tmp_path: Path) -> None:
    async with custodian(tmp_path) as (running, told, held):
        config = member_config(tmp_path, told, running.address, HOSPITAL)
        campaign = ("--campaign", told.run.id.hex())
        early = await command("sign", "--config", config, *campaign)
        assert (early.exit_code, "custody-missing" in early.stderr) == (1, True), early.output
        assert "1 of 1 windows are not here whole: steps 1 to 2" in early.stderr
        url = ("--url", f"http://{running.address}")
        await command("hand-in", *url, *campaign, "--accumulators", held.write(tmp_path / "job"))
        signed = await command("sign", "--config", config, *campaign, "--json")
        assert json.loads(signed.output)["status"] == "final", signed.output
        assert json.loads(signed.output)["kind"] == "custody"
        again = await command("sign", "--config", config, *campaign)
        assert (again.exit_code, "duplicate" in again.stderr) == (1, True), again.output
        encoded = (await running.client.get(f"/v1/bundles/accumulators?campaign={told.run.id.hex()}")).content
        opened = open_bundle(anchor(told.ledger.genesis, told.ledger.chain_id), encoded)
    assert provenance(opened).custodians == (HOSPITAL,)
