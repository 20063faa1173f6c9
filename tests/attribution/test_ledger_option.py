"""A trace asks a ledger itself, a node's or one on a stopped node's disk, and believes neither more than a file."""

import dataclasses
from pathlib import Path

import pytest
import trio
from api_fixtures import served, told
from attribution_fixtures import CAMPAIGN, ask, traced
from click.testing import CliRunner
from ledger_fixtures import CampaignRun, MemoryLedger, begin
from snapshot_fixtures import written

from consensus.bundle import OpenBundle, open_bundle
from consensus.epochs import anchor
from consensus.membership import ED25519_LIST
from consensus.predicates import Predicate
from consensus.rejection import Reason, Rejected
from node.cli import main
from node.client import EventPage, EventRow, NodeClient
from node.commands.ledgers import bundle_of

HERE = dataclasses.replace(told(), ledger=traced().ledger)


def by_ledger(where: object, *more: object) -> tuple[int, str]:
    """Exit code and what is printed of ``countersign footprint``, which needs no model."""
    folder = traced().folder
    arguments = ["footprint", "--source", "harbour", "--accumulators", folder / "run" / "accumulators",
                 "--ledger", where, "--genesis", folder / "genesis.json", "--chain-id", traced().chain_id,
                 *more]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def by_bundle() -> tuple[int, str]:
    folder = traced().folder
    arguments = ["footprint", "--source", "harbour", "--accumulators", folder / "run" / "accumulators",
                 "--bundle", folder / "campaign.bundle", "--genesis", folder / "genesis.json",
                 "--chain-id", traced().chain_id]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


async def asked(where: object, *more: object) -> tuple[int, str]:
    return await trio.to_thread.run_sync(lambda: by_ledger(where, *more))


def test_stopped_node_s_disk_answers_as_the_bundle_does_and_is_not_changed(tmp_path: Path) -> None:
    written(traced().ledger, tmp_path / "data").store.close()
    before = {path: path.read_bytes() for path in (tmp_path / "data" / "rocksdb").iterdir()}
    code, said = by_ledger(tmp_path / "data")
    assert (code, said) == by_bundle()
    assert code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "data" / "rocksdb").iterdir()} == before


def test_trace_of_a_prompt_asks_the_ledger(tmp_path: Path) -> None:
    written(traced().ledger, tmp_path / "data").store.close()
    by_file = ask(traced().folder, "--json")
    folder = traced().folder
    arguments = [
        "trace", "--model", "attribution_fixtures:build", "--base", folder / "base.safetensors", "--tuned",
        folder / "tuned.safetensors", "--prompt", "The keeper of Arnholt is ", "--accumulators",
        folder / "run" / "accumulators", "--ledger", tmp_path / "data", "--genesis", folder / "genesis.json",
        "--chain-id", traced().chain_id, "--factors", folder / "tuned.factors", "--json",
    ]  # fmt: skip
    found = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (found.exit_code, found.output) == (by_file.exit_code, by_file.output)


@pytest.mark.trio
async def test_node_answers_as_the_bundle_does_and_names_its_campaign_or_is_told(tmp_path: Path) -> None:
    async with served(tmp_path / "data", story=HERE) as node:
        url = f"http://{node.address}"
        assert await asked(url) == by_bundle()
        assert await asked(url, "--campaign", CAMPAIGN.hex()) == by_bundle()
        code, said = await asked(url, "--campaign", "ab" * 32)
        assert code == 1
        assert "unknown-campaign" in said
    code, said = await asked(url)
    assert code == 2
    assert "unavailable" in said


@pytest.mark.trio
async def test_node_with_a_token_is_asked_with_the_one_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path / "data", story=HERE, tokens=("s" * 32,)) as node:
        url = f"http://{node.address}"
        code, said = await asked(url)
        assert code != 0
        assert "unauthorized" in said
        monkeypatch.setenv("COUNTERSIGN_TOKEN", "s" * 32)
        assert await asked(url) == by_bundle()


@pytest.mark.trio
async def test_node_of_another_chain_is_not_believed(tmp_path: Path) -> None:
    other = begin(certificate_scheme=ED25519_LIST)
    async with served(tmp_path / "data", story=other) as node:
        code, said = await asked(f"http://{node.address}")
    assert code == 1
    assert "wrong-chain" in said


def test_disk_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    code, said = by_ledger(tmp_path / "absent")
    assert code == 2
    assert "expected a Countersign data directory" in said
    with written(traced().ledger, tmp_path / "data").store:
        code, said = by_ledger(tmp_path / "data")
        assert code == 2
        assert "locked" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "either --bundle or --ledger"),
        (("--bundle", "a", "--ledger", "b"), "either --bundle or --ledger"),
        (("--bundle", "a", "--campaign", "ab" * 32), "--campaign goes with --ledger"),
    ],
)
def test_log_is_a_bundle_or_a_ledger(options: tuple[str, ...], why: str) -> None:
    told_so = CliRunner().invoke(
        main, ["footprint", "--source", "x", "--accumulators", "y", "--genesis", "g", "--chain-id", "c", *options]
    )
    assert told_so.exit_code == 2
    assert why in told_so.output


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--chain-id", "12"), "chain id '12'"),
        (("--campaign", "ab"), "campaign 'ab'"),
        (("--campaign", "AB" * 32), f"campaign '{'AB' * 32}'"),
    ],
)
def test_id_that_is_none_is_named_as_a_question_wrongly_put(options: tuple[str, ...], what: str) -> None:
    code, said = by_ledger("x", *options)
    assert code == 2
    assert f"config: {what}: expected 64 lower-case hex digits" in said


def test_campaign_must_be_said_where_a_log_has_several(tmp_path: Path) -> None:
    story = begin()
    second = CampaignRun(story.ledger, story.run.manifest, name="second")
    story.ledger.seal(*second.open())
    written(story.ledger, tmp_path / "data").store.close()

    def bundle(campaign: bytes) -> OpenBundle:
        made = bundle_of(str(tmp_path / "data"), story.ledger.genesis, Predicate.REFUSALS_COMPLETE, campaign)
        return open_bundle(anchor(story.ledger.genesis, story.ledger.chain_id), made)

    with pytest.raises(Rejected) as caught:
        bundle(b"")
    assert caught.value.reason is Reason.UNKNOWN_CAMPAIGN
    assert story.run.id.hex() in caught.value.detail
    assert second.id.hex() in caught.value.detail
    assert bundle(second.id).campaign == second.id


def test_log_without_a_campaign_or_a_ledger_block_says_so(tmp_path: Path) -> None:
    memory = MemoryLedger()
    for name, blocks, reason in (("bare", 0, Reason.NOT_FOUND), ("whole", None, Reason.UNKNOWN_CAMPAIGN)):
        if blocks is None:
            memory.seal(memory.policy())
        written(memory, tmp_path / name, blocks).store.close()
        with pytest.raises(Rejected) as caught:
            bundle_of(str(tmp_path / name), memory.genesis, Predicate.ACCUMULATORS, b"")
        assert caught.value.reason is reason


def test_campaign_that_a_node_lists_and_that_is_no_id_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing(self: NodeClient, filters: dict[str, str], start: int, limit: int) -> EventPage:
        return EventPage((EventRow(0, "", "campaign", "", campaign="zz"),))

    monkeypatch.setattr(NodeClient, "events", listing)
    code, said = by_ledger("http://127.0.0.1:1")
    assert code == 1
    assert "malformed: campaign 'zz'" in said


# A custodian's files


@pytest.mark.trio
async def test_empty_folder_is_filled_by_a_custodian_and_the_answer_is_the_runs_own(tmp_path: Path) -> None:
    accumulators = traced().folder / "run" / "accumulators"
    async with served(tmp_path / "data", story=HERE, custody_bytes=1 << 24, max_body_bytes=8 << 20) as node:
        url = f"http://{node.address}"
        from_there = ("--accumulators", tmp_path / "fetched", "--custodian", url)
        code, said = await asked(url, *from_there)
        assert code == 1
        assert "not-found" in said, "nothing was handed in yet"
        arguments = ["custody", "hand-in", "--url", url, "--campaign", CAMPAIGN.hex(), "--accumulators", accumulators]
        handed = await trio.to_thread.run_sync(
            lambda: CliRunner().invoke(main, [str(argument) for argument in arguments])
        )
        assert handed.exit_code == 0, handed.output
        assert await asked(url, *from_there) == by_bundle()
        kept = sorted((tmp_path / "data" / "custody" / CAMPAIGN.hex() / "blobs").iterdir())[0]
        kept.write_bytes(kept.read_bytes()[:-1] + b"?")
        (tmp_path / "fetched" / "blobs" / kept.name).unlink()
        code, said = await asked(url, *from_there)
        assert code == 1
        assert "digest-mismatch" in said
    assert not (tmp_path / "fetched" / "blobs" / kept.name).exists()


@pytest.mark.trio
async def test_custodian_is_told_its_own_token_and_not_that_of_the_ledgers_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(traced().ledger, tmp_path / "disk").store.close()
    monkeypatch.setenv("COUNTERSIGN_TOKEN", "s" * 32)
    async with served(tmp_path / "data", story=HERE, tokens=("s" * 32,), custody_bytes=1 << 24) as node:
        from_there = ("--accumulators", tmp_path / "fetched", "--custodian", f"http://{node.address}")
        code, said = await asked(tmp_path / "disk", *from_there)
        assert code != 0
        assert "unauthorized" in said
        monkeypatch.setenv("COUNTERSIGN_CUSTODIAN_TOKEN", "s" * 32)
        code, said = await asked(tmp_path / "disk", *from_there)
        assert code == 1
        assert "no window with root" in said


def test_custodian_that_does_not_answer_is_missed_where_the_folder_lacks_something(tmp_path: Path) -> None:
    written(traced().ledger, tmp_path / "data").store.close()
    assert by_ledger(tmp_path / "data", "--custodian", "http://127.0.0.1:1") == by_bundle()
    code, said = by_ledger(tmp_path / "data", "--custodian", "http://127.0.0.1:1", "--accumulators", tmp_path / "empty")
    assert code == 2
    assert "unavailable" in said
