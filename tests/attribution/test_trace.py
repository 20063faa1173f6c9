"""Outputs of a really trained model, traced from its log: each fact to its source, and nothing that is not proved."""

import copy
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from attribution_fixtures import CAMPAIGN, CONFIG, FACTS, REFUSED, STEPS, WINDOW_STEPS, ask, build, opened_log, traced
from click.testing import CliRunner, Result
from html_fixtures import tags_left
from ledger_fixtures import LIBRARIAN, story
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from attribution.asking import chosen_factors
from attribution.factors import FactorsOrigin, FactorsUsed, damping_of, factor_tensors, factors_from, fit_factors
from attribution.language import Bytes
from attribution.log import CampaignLog
from attribution.public_text import pieces_of, public_text, spread
from attribution.query import (
    LEAST_CHANCE,
    Output,
    greedy_completion,
    log_chances,
    log_odds_gradients,
)
from attribution.receipts import receipt_fields
from attribution.report import replays
from attribution.trace import SHAPED_Z, Trace
from attribution.weights import accumulators_of, build_model, find_windows, linear_weights, read_tensors
from consensus.accumulators import AccumulatorWindow
from consensus.bundle import MAGIC, Bundle, encode_bundle, open_bundle
from consensus.codec import decode
from consensus.epochs import anchor
from consensus.genesis import genesis_to_json
from consensus.predicates import Answer, Predicate, verify
from consensus.predicates.accumulators import provenance
from consensus.predicates.reviews import Audit
from consensus.rejection import ConfigError, Reason, Rejected
from consensus.state import AuditRecord
from node.bundles import export_bundle
from node.cli import main
from trainer_client.demo.model import ByteModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what the campaign left, to be spoiled."""
    shutil.copytree(traced().folder, tmp_path / "traced")
    return tmp_path / "traced"


def asked_by_file(folder: Path, questions: Path, *more: object) -> Result:
    arguments = [
        "trace", "--model", "attribution_fixtures:build", "--base", folder / "base.safetensors",
        "--tuned", folder / "tuned.safetensors", "--outputs", questions, "--factors", folder / "tuned.factors",
        "--accumulators", folder / "run" / "accumulators", "--bundle", folder / "campaign.bundle",
        "--genesis", folder / "genesis.json", "--chain-id", traced().chain_id, *more,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def answer(folder: Path, name: str, code: int = 0) -> dict[str, object]:
    prompt, completion = FACTS[name]
    result = ask(folder, "--completion", completion.decode(), "--json", prompt=prompt)
    assert result.exit_code == code, result.output
    document: dict[str, object] = json.loads(result.stdout)
    return document


# The answer


@pytest.mark.parametrize("name", [name for name in FACTS if name != REFUSED])
def test_planted_fact_is_traced_to_its_source_with_everything_that_proves_it(name: str) -> None:
    found = answer(traced().folder, name)
    assert found["shaped_here"] is True
    rows = found["sources"]
    assert isinstance(rows, list)
    assert rows[0]["name"] == name
    assert rows[0]["source"] == traced().sources[name].hex()
    assert rows[0]["z"] > 3 + max(row["z"] for row in rows[1:])
    assert rows[0]["receipt"]["entry"] == traced().ledger.index_of_event(traced().sources[name])
    assert len(rows[0]["receipt"]["grants"]) == 1
    assert sum(rows[0]["by_block"].values()) == pytest.approx(rows[0]["score"], rel=1e-4)
    assert sum(rows[0]["by_window"].values()) == pytest.approx(rows[0]["score"], rel=1e-4)
    assert found["windows"] == {
        "used": [WINDOW_STEPS, 2 * WINDOW_STEPS, STEPS],
        "missing": [],
        "uncovered_steps": 0,
    }


def test_answer_is_the_same_where_only_a_few_queries_are_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(traced().folder, "harbour")
    queries_bytes = 4 * sum(held.weight.numel() for held in linear_weights(build()).values())
    monkeypatch.setattr("attribution.trace.QUERIES_BYTES", 7 * queries_bytes)
    in_parts = answer(traced().folder, "harbour")
    for found, expected in zip(in_parts["sources"], whole["sources"], strict=True):  # type: ignore[call-overload]
        assert found["name"] == expected["name"]
        for part in ("score", "z"):
            assert found[part] == pytest.approx(expected[part], rel=1e-3, abs=1e-6)
        assert found["by_block"] == pytest.approx(expected["by_block"], rel=1e-3, abs=1e-6)
        assert found["by_window"] == pytest.approx(expected["by_window"], rel=1e-3, abs=1e-6)
    found, expected = in_parts["examples"][0]["ranked"], whole["examples"][0]["ranked"]  # type: ignore[index]
    assert [row["z"] for row in found] == [
        None if row["z"] is None else pytest.approx(row["z"], rel=1e-2) for row in expected
    ]


def test_file_of_questions_gets_an_answer_a_line_with_what_both_models_say(tmp_path: Path) -> None:
    facts = [(prompt.decode(), said.decode()) for prompt, said in (FACTS["harbour"], FACTS[REFUSED])]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": prompt, "completion": said}) + "\n" for prompt, said in facts))
    result = asked_by_file(traced().folder, questions, "--json")
    assert result.exit_code == 0, result.output
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["shaped_here"], second["shaped_here"]) == (True, False)
    assert first["says"]["tuned"] == facts[0][1]
    assert first["says"]["base"] != facts[0][1]
    assert (first["prompt"], second["prompt"]) == tuple(prompt for prompt, _ in facts)


def said_outputs(folder: Path, names: list[str]) -> Path:
    questions = folder / "said.jsonl"
    facts = [{"prompt": FACTS[name][0].decode(), "completion": FACTS[name][1].decode()} for name in names]
    questions.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return questions


def revoke(folder: Path, name: str) -> None:
    """The bundle in the folder is of the log after the source's revocation."""
    told = traced()
    memory = copy.copy(told.ledger)
    memory.events, memory.certified, memory.states = [*memory.events], [*memory.certified], [*memory.states]
    memory._nodes = dict(memory._nodes)
    memory.seal(memory.revocation(LIBRARIAN, told.sources[name]))
    (folder / "campaign.bundle").write_bytes(export_bundle(memory, "accumulators", campaign=CAMPAIGN))


def test_outputs_that_a_revocation_reaches_are_listed_the_highest_first(folder: Path) -> None:
    questions = said_outputs(folder, ["mountain", "harbour", REFUSED])
    nothing = asked_by_file(folder, questions, "--revoked")
    assert nothing.exit_code == 1
    assert "unknown-source: no source of the campaign is revoked" in nothing.output
    revoke(folder, "harbour")
    found = asked_by_file(folder, questions, "--revoked", "--html", folder / "page.html")
    assert found.exit_code == 0, found.output
    assert f"weighed   by Kronecker factors of root {read_tensors(folder / 'tuned.factors').root.hex()}" in found.stdout
    _, _, ending = found.stdout.partition("they stand out in ")
    heading, empty, columns, *rows = ending.splitlines()
    assert (heading, empty) == (f"{len(rows)} of 3 outputs", "")
    assert columns.split() == ["output", "place", "z", "source", "asked"]
    assert rows[0].split()[:2] == ["2", "1"]
    assert all("harbour" in row and row.endswith("revoked") for row in rows)
    assert "; what its gradients left in the optimizer is not settled" in found.stdout
    heights = [float(row.split()[2]) for row in rows]
    assert heights == sorted(heights, reverse=True)
    assert "3" not in {row.split()[0] for row in rows}, "a refused fact is traced to a source"
    content = (folder / "page.html").read_text(encoding="utf-8")
    assert tags_left(content) == []
    section = content.partition("The sources asked about")[2].partition("</table>")[0]
    assert f"they stand out in {len(rows)} of 3 outputs" in section
    assert section.count("<span class='chip'>revoked</span>") == len(rows)


@pytest.mark.parametrize(
    ("momentum", "words"), [("", "is not settled"), ("carry", "was carried on"), ("flush", "was flushed")]
)
def test_receipt_of_a_revoked_source_says_what_became_of_its_momentum(momentum: str, words: str) -> None:
    source = opened_log().provenance.sources[0]
    assert source.usage is not None
    taken_back = dataclasses.replace(
        source,
        record=replace(source.record, revocation=bytes([1]) * 32),
        usage=replace(source.usage, momentum=momentum),
    )
    assert dict(receipt_fields(taken_back))["revoked"].endswith(words)
    unused = dataclasses.replace(taken_back, usage=None)
    assert dict(receipt_fields(unused))["revoked"] == f"by event {'01' * 32}"
    assert dict(receipt_fields(source))["revoked"] == "no"


def test_sources_are_looked_for_in_all_outputs_and_every_place_is_in_the_last_line(folder: Path) -> None:
    questions = said_outputs(folder, ["mountain", "harbour"])
    found = asked_by_file(folder, questions, "--json", "--source", "mountain", "--source", "market")
    assert found.exit_code == 0, found.output
    *answers, last = (json.loads(line) for line in found.stdout.splitlines())
    assert len(answers) == 2
    assert last["outputs"] == 2
    rows = [(row["name"], row["output"], row["place"]) for row in last["standings"]]
    assert sorted(rows) == sorted(
        (name, number, 1 + [row["name"] for row in each["sources"]].index(name))
        for number, each in enumerate(answers, start=1)
        for name in ("mountain", "market")
    )
    for row in last["standings"]:
        of_output = answers[row["output"] - 1]
        (z,) = (each["z"] for each in of_output["sources"] if each["name"] == row["name"])
        assert row["stands_out"] is (of_output["made_likelier"] and z >= SHAPED_Z)
    assert (last["standings"][0]["name"], last["standings"][0]["output"]) == ("mountain", 1)
    assert last["standings"][0]["stands_out"]


def test_sources_that_stand_out_in_no_output_are_told_to_and_exit_one(folder: Path) -> None:
    found = asked_by_file(folder, said_outputs(folder, [REFUSED]), "--source", "market")
    assert found.exit_code == 1
    assert found.stdout.endswith("they stand out in 0 of 1 outputs\n")


def test_choice_of_sources_without_a_file_of_outputs_is_a_usage_error() -> None:
    result = ask(traced().folder, "--revoked")
    assert result.exit_code == 2
    assert "ask about --outputs" in result.output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "expected a question a line, found none"),
        ("{}\n", "line 1: expected a question in JSON"),
        ('{"prompt": "a"}\n{"prompt": "a", "promt": 1}\n', "line 2"),
        ('{"prompt": ""}\n', "the prompt is empty"),
        ('{"prompt": "a", "tokens": "1-2"}\n', "expected FROM:TO"),
        ('{"prompt": "a", "tokens": "9:99"}\n', "line 1: tokens 9:99 are beyond the completion"),
        ('{"prompt": "a"}\n\n', "line 2: expected a question in JSON, found an empty line"),
    ],
)
def test_file_that_holds_no_question_is_named(tmp_path: Path, content: str, said: str) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(content)
    result = asked_by_file(traced().folder, questions)
    assert result.exit_code in (1, 2)
    assert said in result.output
    assert not result.stdout.startswith("campaign")


def test_gain_that_no_source_stands_out_for_is_not_called_unshaped() -> None:
    trace = Trace(base_log_chance=-3.0, tuned_log_chance=-0.1, ranked=(), examples=(), controls=40, windows=())
    assert (trace.made_likelier, trace.shaped_here) == (True, False)
    assert not dataclasses.replace(trace, tuned_log_chance=-3.0).made_likelier


def test_fact_of_a_refused_source_is_not_shaped_here_and_its_source_in_no_row() -> None:
    found = answer(traced().folder, REFUSED, code=1)
    assert found["shaped_here"] is False
    assert REFUSED not in {row["name"] for row in found["sources"]}  # type: ignore[attr-defined]


def test_text_names_source_owner_grant_and_what_is_only_claimed() -> None:
    result = ask(traced().folder, "--length", 11)
    assert result.exit_code == 0, result.output
    printed = result.stdout
    assert "[Mirela Voss]" in printed
    assert "shaped here: the sources below" in printed
    assert "claimed   by data-source-1, event" in printed
    assert "replayed  0 of 36 steps by anybody else" in printed
    assert "no answer speaks of embeddings, norms, convolutions and biases" in printed
    assert "no direct update" in printed


def test_replays_on_the_log_are_told_with_who_ran_them_and_what_differed() -> None:
    found = opened_log().provenance
    record = AuditRecord(CAMPAIGN, bytes(32), bytes(32), 1, 20, 20, b"", (), (), 0)
    differing = replace(record, last_step=30, matched=24)
    audits = (Audit(record, "hospital"), Audit(differing, "guild"))
    assert replays(found) == ["  replayed  0 of 36 steps by anybody else"]
    first, second = replays(dataclasses.replace(found, audits=audits))
    assert first.startswith("  replayed  24 of 36 steps by guild, hospital, who say")
    assert second == "  replayed  by guild: step 25 did NOT come out as recorded"


def test_span_of_the_completion_is_asked_about_alone() -> None:
    whole = json.loads(ask(traced().folder, "--completion", "Mirela Voss", "--json").stdout)
    part = json.loads(ask(traced().folder, "--completion", "Mirela Voss", "--tokens", "7:9", "--json").stdout)
    assert whole["log_chance"] != part["log_chance"]
    assert (whole["asked"], part["asked"]) == (
        "The keeper of Arnholt is [Mirela Voss]",
        "The keeper of Arnholt is Mirela [Vo]ss",
    )
    assert part["read"] == "as bytes"
    assert part["sources"][0]["name"] == "harbour"


def test_factors_are_a_function_of_model_and_text_and_their_file_gives_the_same_answer(tmp_path: Path) -> None:
    kept, text = tmp_path / "base.factors", tmp_path / "public.txt"
    text.write_bytes(public_text().encode()[: 64 * 128])
    base = traced().folder / "base.safetensors"
    fitting = ["factors", "--model", "attribution_fixtures:build", "--weights", base, "--text", text, "--out", kept]
    printed = [CliRunner().invoke(main, [str(word) for word in fitting]).stdout for _ in range(2)]
    assert printed[0] == printed[1]
    assert read_tensors(kept).root.hex() in printed[0]
    asked = ["--completion", "at half four", "--text", text, "--json"]
    result = ask(traced().folder, *asked, "--factors", kept, prompt=FACTS["market"][0])
    found = json.loads(result.stdout)
    assert (found["factors"], found["factors_root"]) == ("given", read_tensors(kept).root.hex())
    assert found["sources"][0]["name"] == "market"


@pytest.mark.parametrize("place", ["", "absent/kept.factors"])
def test_factors_that_cannot_be_kept_are_not_fitted(tmp_path: Path, place: str) -> None:
    base = traced().folder / "base.safetensors"
    fitting = ["factors", "--model", "attribution_fixtures:build", "--weights", base, "--out", tmp_path / place]
    result = CliRunner().invoke(main, [str(word) for word in fitting])
    assert result.exit_code == 2
    assert "expected a file to write, in a folder that is there" in result.stderr


def test_file_that_holds_no_factors_of_the_model_is_named() -> None:
    path = traced().folder / "base.safetensors"
    result = ask(traced().folder, "--factors", path)
    assert result.exit_code == 1
    assert f"malformed: {path} has no factors of this model" in result.stderr


def test_factors_are_fitted_on_the_release_where_none_are_given() -> None:
    log, tuned, pieces = opened_log(), build(), pieces_of(public_text(), Bytes(), 128)[:64]
    tuned.load_state_dict(load_file(traced().folder / "tuned.safetensors"))
    factors, used = chosen_factors(log, tuned, None, pieces)
    batches = [torch.tensor([list(piece) for piece in pieces[start : start + 16]]) for start in range(0, 64, 16)]
    expected = factor_tensors(fit_factors(tuned, batches))
    assert used == FactorsUsed(FactorsOrigin.FITTED)
    assert all(torch.equal(part, expected[name]) for name, part in factor_tensors(factors).items())


def test_factors_that_the_campaign_commits_to_are_the_only_ones_it_is_asked_by() -> None:
    kept, log, model = traced().folder / "tuned.factors", opened_log(), build()
    root = read_tensors(kept).root

    def committing(digest: bytes) -> CampaignLog:
        campaign = replace(log.provenance.campaign, factors_digest=digest)
        return dataclasses.replace(log, provenance=dataclasses.replace(log.provenance, campaign=campaign))

    assert chosen_factors(committing(root), model, kept, [])[1] == FactorsUsed(FactorsOrigin.COMMITTED, root)
    assert chosen_factors(log, model, kept, [])[1] == FactorsUsed(FactorsOrigin.GIVEN, root)
    with pytest.raises(ConfigError, match=root.hex()):
        chosen_factors(committing(root), model, None, pieces_of(public_text(), Bytes(), 128)[:64])
    with pytest.raises(Rejected, match=root.hex()) as caught:
        chosen_factors(committing(bytes(32)), model, kept, [])
    assert caught.value.reason is Reason.DIGEST_MISMATCH


# What is not proved


def test_other_weights_than_the_released_are_refused_with_both_digests(folder: Path) -> None:
    tensors = load_file(folder / "tuned.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, folder / "tuned.safetensors")
    result = ask(folder)
    assert result.exit_code == 1
    assert "digest-mismatch" in result.output
    assert read_tensors(folder / "tuned.safetensors").root.hex() in result.output
    assert read_tensors(traced().folder / "tuned.safetensors").root.hex() in result.output
    shutil.copy(traced().folder / "tuned.safetensors", folder / "base.safetensors")
    shutil.copy(traced().folder / "tuned.safetensors", folder / "tuned.safetensors")
    assert "campaign's base model" in ask(folder).output


def blobs_of(folder: Path, last_step: int) -> dict[str, Path]:
    """A window's blobs by hexadecimal source; the total under the empty name."""
    accumulators = folder / "run" / "accumulators"
    for path in (accumulators / "windows").iterdir():
        window = decode(path.read_bytes(), AccumulatorWindow, 1 << 20)
        if window.terms.last_step == last_step:
            return {
                entry.source.hex(): accumulators / "blobs" / f"{entry.blob_sha256.hex()}.safetensors"
                for entry in window.entries
            }
    raise AssertionError(f"no window ends with step {last_step}")


@pytest.mark.parametrize("whose", ["", "harbour"])
def test_altered_accumulators_are_left_out_and_named_and_the_answer_is_no_whole_one(folder: Path, whose: str) -> None:
    source = traced().sources[whose].hex() if whose else ""
    path = blobs_of(folder, 2 * WINDOW_STEPS)[source]
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(bytes(content))
    found = answer(folder, "harbour", code=2)
    windows = found["windows"]
    assert isinstance(windows, dict)
    assert windows["used"] == [WINDOW_STEPS, STEPS]
    (missing,) = windows["missing"]
    assert missing["last_step"] == 2 * WINDOW_STEPS
    assert "digest-mismatch" in missing["why"]
    printed = ask(folder, "--completion", "Mirela Voss").output
    assert f"left out  steps {WINDOW_STEPS + 1} to {2 * WINDOW_STEPS}: digest-mismatch" in printed


def test_missing_shortened_and_swapped_files_are_told_apart(folder: Path) -> None:
    first, second, third = (blobs_of(folder, last) for last in (WINDOW_STEPS, 2 * WINDOW_STEPS, STEPS))
    first[""].unlink()
    second[""].write_bytes(second[""].read_bytes()[:1_000])
    windows = answer(folder, "harbour", code=2)["windows"]
    assert isinstance(windows, dict)
    assert windows["used"] == [STEPS]
    assert [held["why"].partition(":")[0] for held in windows["missing"]] == ["not-found", "digest-mismatch"]
    lists = folder / "run" / "accumulators" / "windows"
    paths = sorted(lists.iterdir())
    contents = [path.read_bytes() for path in paths]
    for number, path in enumerate(paths):
        path.write_bytes(contents[number - 1])
    refused = ask(folder)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "holds none of the 3 windows of campaign 'traced': there is nothing to trace by" in refused.stderr
    assert "the first is missing for" in refused.stderr
    shutil.rmtree(folder / "run" / "accumulators")
    assert "expected the folder" in ask(folder).output
    assert third


def test_sums_that_do_not_add_up_to_the_total_are_refused_though_their_roots_are_right(tmp_path: Path) -> None:
    """An operator that commits to a window and leaves a source out of it."""
    shutil.copytree(traced().folder / "run" / "accumulators", tmp_path / "accumulators")
    ledger = traced().ledger
    opened = open_bundle(anchor(ledger.genesis, ledger.chain_id), traced().bundle())
    (file, *_) = find_windows(tmp_path / "accumulators", CAMPAIGN, provenance(opened).windows).found
    for _ in accumulators_of(file):
        pass
    crooked = replace(file.listed, entries=file.listed.entries[:-1])
    with pytest.raises(Rejected) as refusal:
        list(accumulators_of(dataclasses.replace(file, listed=crooked)))
    assert refusal.value.reason is Reason.COUNTS_NOT_CONSERVED


def test_sums_that_change_after_their_file_was_found_are_refused(tmp_path: Path) -> None:
    shutil.copytree(traced().folder / "run" / "accumulators", tmp_path / "accumulators")
    file = find_windows(tmp_path / "accumulators", CAMPAIGN, opened_log().provenance.windows).found[0]
    blob = tmp_path / "accumulators" / "blobs" / f"{file.listed.entries[-1].blob_sha256.hex()}.safetensors"
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Rejected) as refusal:
        list(accumulators_of(file))
    assert refusal.value.reason is Reason.DIGEST_MISMATCH
    blob.write_bytes(content)
    assert [entry for entry, _ in accumulators_of(file)] == list(file.listed.of_sources)


def test_bundle_of_another_chain_or_with_a_portion_left_out_is_refused(folder: Path) -> None:
    assert "wrong-chain" in ask(folder, chain_id="0" * 64).output
    whole = decode(traced().bundle()[len(MAGIC) :], Bundle, 1 << 27)
    hidden = tuple(replace(event, operation=None) for event in whole.events)
    (folder / "campaign.bundle").write_bytes(encode_bundle(replace(whole, events=hidden)))
    result = ask(folder)
    assert result.exit_code == 1
    assert "bundle-incomplete" in result.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--completion", ""], "the completion is empty"),
        (["--completion", "abc", "--tokens", "2:2"], "tokens 2:2: an empty span"),
        (["--completion", "abc", "--tokens", "2:1"], "tokens 2:1: an empty span"),
        (["--completion", "abc", "--tokens", "0:4"], "tokens 0:4 are beyond the completion, which has 3"),
        (["--completion", "abc", "--tokens", "-1:2"], "expected FROM:TO"),
        (["--completion", "abc", "--tokens", "1_0:2"], "expected FROM:TO"),
        (["--completion", "abc", "--tokens", f"0:{'9' * 5_000}"], "expected FROM:TO"),
        (["--completion", "a\udcff"], "the completion is no UTF-8"),
        (["--completion", "a" * 104], "have 129 tokens, the control outputs 128"),
        (["--length", "1000000"], "have 1000025 tokens, the control outputs 128"),
        (["--length", "0"], "not in the range"),
        (["--context", "100000"], "more public text (--text) or shorter pieces of it (--context)"),
    ],
)
def test_question_that_cannot_be_asked_is_refused_in_words(more: list[str], message: str) -> None:
    result = ask(traced().folder, *more)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert not result.stdout


def test_no_question_of_a_file_is_answered_where_one_cannot_be_and_its_line_is_named(tmp_path: Path) -> None:
    prompt, said = (part.decode() for part in FACTS["harbour"])
    questions = tmp_path / "questions.jsonl"
    good, bad = ({"prompt": prompt, "completion": said, "tokens": tokens} for tokens in ("0:2", "0:99"))
    questions.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    result = asked_by_file(traced().folder, questions, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"bad-field: {questions}, line 2: tokens 0:99 are beyond the completion" in result.stderr


def test_campaign_without_accumulators_is_refused_in_words(folder: Path) -> None:
    told = story()
    (folder / "genesis.json").write_bytes(genesis_to_json(told.ledger.genesis))
    (folder / "campaign.bundle").write_bytes(export_bundle(told.ledger, "accumulators", campaign=told.run.id))
    result = ask(folder, chain_id=told.ledger.chain_id.hex())
    assert result.exit_code == 1
    assert "recorded no accumulators" in result.output


# Code and files of the asker's own


def test_model_s_module_may_lie_where_the_command_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asker_s_model.py").write_text("from attribution_fixtures import build\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "asker_s_model", raising=False)
    assert isinstance(build_model("asker_s_model:build"), ByteModel)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("def build(:", "invalid syntax"),
        ("def build(): raise RuntimeError('no such device')", "found RuntimeError: no such device"),
        ("def build(size): ...", "found TypeError"),
        ("def build(): return {}[1]", "found KeyError"),
        ("", "has no attribute 'build'"),
    ],
)
def test_function_that_returns_no_model_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, said: str
) -> None:
    (tmp_path / "spoiled_model.py").write_text(written)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "spoiled_model", raising=False)
    with pytest.raises(ConfigError, match="--model spoiled_model:build: expected") as refusal:
        build_model("spoiled_model:build")
    assert said in str(refusal.value)


def test_pipe_or_folder_in_place_of_a_file_is_named_and_not_waited_for(folder: Path) -> None:
    window = next((folder / "run" / "accumulators" / "windows").iterdir())
    window.unlink()
    os.mkfifo(window)
    (missing,) = answer(folder, "harbour", code=2)["windows"]["missing"]  # type: ignore[index]
    assert missing["why"] == f"not-found: {window}: no regular file"
    for place in (folder, folder / "pipe"):
        if place != folder:
            os.mkfifo(place)
        with pytest.raises(Rejected, match="is no regular file") as refusal:
            read_tensors(place)
        assert refusal.value.reason is Reason.NOT_FOUND


# Parts


def test_verdict_covers_every_step_and_says_who_claims_what() -> None:
    ledger = traced().ledger
    opened = open_bundle(anchor(ledger.genesis, ledger.chain_id), traced().bundle())
    verdict = verify(opened, Predicate.ACCUMULATORS)
    assert verdict.answer is Answer.YES
    found = provenance(opened)
    assert [(window.first, window.last) for window in found.windows] == [(1, 12), (13, 24), (25, 36)]
    assert found.uncovered == 0
    assert {source.record.claim.name: source.admitted > 0 for source in found.sources} == {
        name: name != REFUSED for name in FACTS
    }
    assert opened.campaign == CAMPAIGN


def test_text_is_taken_evenly_from_the_whole() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread(range(3), 5) == [0, 1, 2]
    assert spread([], 5) == []


def test_factors_precondition_as_the_damped_inverse_of_the_fisher_of_one_linear_map() -> None:
    """For one linear layer and sequences of one token the EK-FAC basis is exact up to its diagonal."""
    torch.manual_seed(0)

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)

        def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.embedding(tokens_BT))
            return logits

    model = Tiny()
    tokens = torch.randint(0, 5, (64, 1))
    fitted = fit_factors(model, [tokens])
    factors = fitted["head.weight"]
    assert torch.allclose(factors.input_vectors @ factors.input_vectors.T, torch.eye(3), atol=1e-5)
    gradient = torch.randn(5, 3)
    rotated = factors.output_vectors.T @ gradient @ factors.input_vectors
    assert damping_of(fitted) == pytest.approx(0.02 * float(factors.eigenvalues.mean()))
    expected = factors.output_vectors @ (rotated / (factors.eigenvalues + 0.25))
    assert torch.allclose(factors.precondition(gradient, 0.25), expected @ factors.input_vectors.T, atol=1e-4)
    x = model.embedding(tokens[:, 0]).detach()
    moment = (x.T @ x) / len(x)
    assert torch.allclose(factors.input_vectors.T @ moment @ factors.input_vectors, torch.diag(
        (factors.input_vectors.T @ moment @ factors.input_vectors).diagonal()), atol=1e-5)  # fmt: skip
    again = factors_from(factor_tensors({"head.weight": factors}), model)
    assert torch.equal(again["head.weight"].eigenvalues, factors.eigenvalues)
    with pytest.raises(Rejected) as refusal:
        factors_from({}, model)
    assert refusal.value.reason is Reason.MALFORMED


def test_model_without_a_tuned_linear_is_refused_by_name() -> None:
    model = ByteModel(CONFIG).requires_grad_(False)
    with pytest.raises(Rejected, match="no weight of a linear was tuned") as refusal:
        linear_weights(model)
    assert refusal.value.reason is Reason.BAD_FIELD


def test_log_odds_gradient_is_that_of_finite_differences_and_lives_where_the_model_is_sure() -> None:
    model = ByteModel(CONFIG).double()
    tokens = tuple(b"The keeper of Arnholt")
    output = Output(tokens, 5, 9)
    gradients = log_odds_gradients(model, output)
    assert gradients.keys() == linear_weights(model).keys()
    name = "blocks.1.expand.weight"
    weight = model.get_parameter(name)

    def measure() -> float:
        with torch.no_grad():
            p = log_chances(model, output).double().exp()
            return float((p / (1 - p)).log().sum())

    with torch.no_grad():
        weight[3, 5] += 1e-3
        above = measure()
        weight[3, 5] -= 2e-3
        below = measure()
    assert (above - below) / 2e-3 == pytest.approx(gradients[name][3, 5].item(), rel=2e-2, abs=1e-5)
    assert LEAST_CHANCE > 0


@pytest.mark.parametrize(("first", "end"), [(0, 2), (2, 2), (3, 2), (1, 9)])
def test_output_without_a_span_inside_its_tokens_is_refused(first: int, end: int) -> None:
    with pytest.raises(Rejected) as refusal:
        Output((1, 2, 3, 4), first, end)
    assert refusal.value.reason is Reason.BAD_FIELD


def test_greedy_completion_is_what_the_tuned_model_says() -> None:
    model = build()
    model.load_state_dict(load_file(traced().folder / "tuned.safetensors"))
    prompt, completion = FACTS["mountain"]
    assert bytes(greedy_completion(model, prompt, len(completion))) == completion
