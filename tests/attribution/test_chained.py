"""An answer goes on in the base model's own log: whose the output is, and what does not prove to be that log."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import trio
from api_fixtures import served, told
from attribution_fixtures import CAMPAIGN, FACTS, LATER_CAMPAIGN, LATER_FACTS, Traced, chained, traced
from click.testing import CliRunner, Result
from html_fixtures import tags_left
from msgspec.structs import replace
from snapshot_fixtures import written

from attribution.factors import FactorsOrigin, FactorsUsed
from attribution.log import CampaignLog, check_released_base, open_log
from attribution.report import Answer, BaseAnswer, lifts
from attribution.trace import Trace
from attribution.weights import Search, read_tensors
from consensus.identifiers import ChainId
from consensus.rejection import Reason, Rejected
from node.bundles import export_bundle
from node.cli import main


def following(first: Traced) -> list[object]:
    """The options that lead into the first campaign's log."""
    return [
        "--base-bundle", first.folder / "campaign.bundle", "--base-genesis", first.folder / "genesis.json",
        "--base-chain-id", first.chain_id, "--base-of-base", first.folder / "base.safetensors",
        "--base-accumulators", first.folder / "run" / "accumulators", "--base-factors", first.folder / "tuned.factors",
    ]  # fmt: skip


def ask(fact: tuple[bytes, bytes], *more: object) -> Result:
    """Asks the second campaign about what its tuned model was taught, by it or by its base model's campaign."""
    second, (prompt, completion) = chained(), fact
    arguments = [
        "trace", "--model", "attribution_fixtures:build", "--base", second.folder / "base.safetensors", "--tuned",
        second.folder / "tuned.safetensors", "--prompt", prompt.decode(), "--completion", completion.decode(),
        "--accumulators", second.folder / "run" / "accumulators", "--bundle", second.folder / "campaign.bundle",
        "--genesis", second.folder / "genesis.json", "--chain-id", second.chain_id, "--factors",
        second.folder / "tuned.factors", *more,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@functools.cache
def followed(name: str) -> Result:
    """The answer in JSON about one fact, followed into the first campaign's log."""
    return ask((FACTS | LATER_FACTS)[name], "--json", *following(traced()))


def without(options: list[object], *names: str) -> list[object]:
    """The options, but for these and their values."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for name, value in pairs if name not in names for word in (name, value)]


def log_of(made: Traced) -> CampaignLog:
    chain_id = ChainId(bytes.fromhex(made.chain_id))
    return open_log(made.folder / "campaign.bundle", made.folder / "genesis.json", chain_id)


@pytest.mark.parametrize("name", ["harbour", "market"])
def test_fact_of_the_base_model_is_not_shaped_here_and_leads_to_its_source_in_the_base_models_log(name: str) -> None:
    result = followed(name)
    assert result.exit_code == 0, result.output
    here = json.loads(result.stdout)
    assert (here["made_likelier"], here["shaped_here"]) == (False, False)
    of_base = here["of_base"]
    before = of_base["answer"]
    assert before["shaped_here"] is True
    assert before["sources"][0]["source"] == traced().sources[name].hex()
    assert (here["campaign"], before["campaign"]) == (LATER_CAMPAIGN.hex(), CAMPAIGN.hex())
    assert (here["chain_id"], before["chain_id"]) == (chained().chain_id, traced().chain_id)
    assert here["base_provenance"] == traced().release.hex()
    assert before["log_chance"]["tuned"] == here["log_chance"]["base"]
    assert before["says"]["tuned"] == here["says"]["base"] == FACTS[name][1].decode()
    odds = of_base["log_odds"]
    assert of_base["lift_of_base"] == pytest.approx(odds["base"] - odds["before"])
    assert of_base["lift_here"] == pytest.approx(odds["tuned"] - odds["base"])
    assert of_base["lift_of_base"] > 3
    assert of_base["lift_here"] < of_base["lift_of_base"] / 4


def test_fact_of_the_second_campaign_is_shaped_there_and_not_by_the_base_models() -> None:
    here = json.loads(followed("lantern").stdout)
    assert here["sources"][0]["name"] == "lantern"
    assert (here["shaped_here"], here["of_base"]["answer"]["shaped_here"]) == (True, False)
    assert here["of_base"]["lift_here"] > 3
    assert here["of_base"]["answer"]["of_base"] is None


def test_text_and_page_say_both_answers_each_with_its_chain_receipt_and_shares(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = ask(FACTS["harbour"], "--html", page, *following(traced()))
    assert result.exit_code == 0, result.output
    here, _, before = result.stdout.partition("\nwhat shaped the base model\n")
    assert (
        "not shaped here: this fine-tune did not make the output likelier; what the base model's own log says" in here
    )
    assert "shaped here: the sources below" in before
    root = read_tensors(traced().folder / "tuned.safetensors").root.hex()
    assert f"what event {traced().release.hex()} released on chain {traced().chain_id}: root {root}" in here
    for text, made in ((here, chained()), (before, traced())):
        assert f"trusted   chain {made.chain_id}" in text
        assert text.count("claimed   by operator-1: that these are the gradients") == 1
    assert f"event {traced().sources['harbour'].hex()}, entry" in before
    assert before.count("log-odds ") == 3
    content = page.read_text(encoding="utf-8")
    assert tags_left(content) == []
    for words in (chained().chain_id, traced().chain_id, "What shaped the base model", "by its own campaign"):
        assert words in content


@pytest.mark.parametrize(
    ("before", "base", "tuned", "share"),
    [(-4.0, 2.0, 4.0, 0.75), (-4.0, 2.0, 1.0, None), (2.0, 1.0, 4.0, None), (1.0, 1.0, 1.0, None)],
)
def test_share_is_told_where_both_campaigns_raised_the_output(
    before: float, base: float, tuned: float, share: float | None
) -> None:
    answer = Answer(
        "", "", {}, {}, Trace(0.0, 0.0, (), (), 40, ()), Search((), ()), (), FactorsUsed(FactorsOrigin.GIVEN)
    )
    of_base = BaseAnswer(log_of(traced()), answer, before, base, tuned)
    assert of_base.share_of_base == share
    assert ("75 % of both" in " ".join(lifts(of_base))) == (share is not None)


def test_without_the_base_models_log_the_answer_says_how_to_ask_on() -> None:
    result = ask(FACTS["harbour"])
    assert result.exit_code == 1
    assert f"where event {traced().release.hex()} released it; ask of this campaign with --base-ledger" in result.stdout
    assert "stands below" not in result.stdout


def test_stopped_nodes_disk_is_followed_as_the_bundle_is(tmp_path: Path) -> None:
    written(traced().ledger, tmp_path / "data").store.close()
    by_disk = ["--base-ledger", tmp_path / "data", "--base-campaign", CAMPAIGN.hex()]
    by_file = followed("market")
    found = ask(FACTS["market"], "--json", *by_disk, *without(following(traced()), "--base-bundle"))
    assert (found.exit_code, found.stdout) == (by_file.exit_code, by_file.stdout)


@pytest.mark.trio
async def test_base_models_node_is_told_its_own_token_and_not_that_of_this_logs_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = dataclasses.replace(told(), ledger=traced().ledger)
    monkeypatch.setenv("COUNTERSIGN_TOKEN", "s" * 32)
    async with served(tmp_path / "data", story=story, tokens=("s" * 32,)) as node:
        options = without(following(traced()), "--base-bundle", "--base-of-base")
        options += ["--base-ledger", f"http://{node.address}", "--base-of-base", tmp_path / "none"]
        refused = await trio.to_thread.run_sync(lambda: ask(FACTS["harbour"], *options))
        assert refused.exit_code != 0
        assert "unauthorized" in refused.output
        monkeypatch.setenv("COUNTERSIGN_BASE_TOKEN", "s" * 32)
        opened = await trio.to_thread.run_sync(lambda: ask(FACTS["harbour"], *options))
        assert opened.exit_code == 1
        assert f"{tmp_path / 'none'} cannot be read" in opened.output


# What is not the base model's log


def test_log_of_another_campaign_is_refused() -> None:
    itself = following(traced())
    itself[1] = chained().folder / "campaign.bundle"
    itself[3] = chained().folder / "genesis.json"
    itself[5] = chained().chain_id
    result = ask(FACTS["harbour"], *itself)
    assert result.exit_code == 1
    assert "not-found" in result.output
    assert (
        f"came from release {traced().release.hex()}, which is none of campaign {LATER_CAMPAIGN.hex()}" in result.output
    )


def test_log_of_another_chain_than_the_pinned_is_refused_also_where_none_is_named() -> None:
    unnamed = without(following(traced()), "--base-genesis", "--base-chain-id")
    result = ask(FACTS["harbour"], *unnamed)
    assert result.exit_code == 1
    assert "wrong-chain" in result.output


def test_campaign_that_names_no_release_cannot_be_followed() -> None:
    with pytest.raises(Rejected) as refusal:
        check_released_base(log_of(traced()), log_of(traced()))
    assert refusal.value.reason is Reason.NOT_FOUND
    assert "names no release" in refusal.value.detail


def test_release_of_other_weights_is_refused_with_both_roots() -> None:
    log = log_of(chained())
    campaign = replace(log.provenance.campaign, base_root=bytes([3]) * 32)
    other = dataclasses.replace(log, provenance=dataclasses.replace(log.provenance, campaign=campaign))
    with pytest.raises(Rejected) as refusal:
        check_released_base(other, log_of(traced()))
    assert refusal.value.reason is Reason.DIGEST_MISMATCH
    assert "03" * 32 in refusal.value.detail
    assert read_tensors(traced().folder / "tuned.safetensors").root.hex() in refusal.value.detail


def test_event_that_is_no_release_or_not_disclosed_is_no_origin() -> None:
    log, before = log_of(chained()), log_of(traced())
    step = before.provenance.windows[0].event
    campaign = replace(log.provenance.campaign, base_provenance=step.id)
    from_a_step = dataclasses.replace(log, provenance=dataclasses.replace(log.provenance, campaign=campaign))
    with pytest.raises(Rejected) as refusal:
        check_released_base(from_a_step, before)
    assert refusal.value.reason is Reason.NOT_FOUND
    closed = dataclasses.replace(before.bundle.by_id[traced().release], operation=None)
    hidden = dataclasses.replace(before.bundle, by_id={**before.bundle.by_id, closed.id: closed})
    with pytest.raises(Rejected) as refusal:
        check_released_base(log, dataclasses.replace(before, bundle=hidden))
    assert refusal.value.reason is Reason.BUNDLE_INCOMPLETE


def test_other_weights_than_the_base_model_was_tuned_from_are_refused() -> None:
    options = without(following(traced()), "--base-of-base")
    result = ask(FACTS["harbour"], "--base-of-base", chained().folder / "tuned.safetensors", *options)
    assert result.exit_code == 1
    assert "the model that the base model was tuned from has root" in result.output


def test_base_log_without_accumulators_is_refused_by_its_campaigns_name(tmp_path: Path) -> None:
    bundle = tmp_path / "other.bundle"
    bundle.write_bytes(export_bundle(traced().ledger, "delta-exact", campaign=CAMPAIGN))
    options = ["--base-bundle", bundle, *without(following(traced()), "--base-bundle")]
    result = ask(FACTS["harbour"], *options)
    assert result.exit_code == 1
    assert "unknown-predicate" in result.output


@pytest.mark.parametrize(
    ("left_out", "more", "why"),
    [
        (("--base-bundle",), (), "goes with --base-ledger or --base-bundle"),
        ((), ("--base-ledger", "b"), "either --base-bundle or --base-ledger"),
        ((), ("--base-campaign", "ab" * 32), "--base-campaign goes with --base-ledger"),
        (("--base-of-base",), (), "with --base-of-base and --base-accumulators"),
        (("--base-accumulators",), (), "with --base-of-base and --base-accumulators"),
    ],
)
def test_options_that_do_not_go_together_are_a_usage_error(
    left_out: tuple[str, ...], more: tuple[str, ...], why: str
) -> None:
    result = ask(FACTS["harbour"], *without(following(traced()), *left_out), *more)
    assert result.exit_code == 2
    assert why in result.output
