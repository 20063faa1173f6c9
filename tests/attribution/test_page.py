"""The page of an answer: whole, self-contained, and nobody's words become markup."""

import dataclasses
import json
import re
from pathlib import Path

import msgspec
import pytest
import torch
from attribution_fixtures import FACTS, REFUSED, traced
from click.testing import CliRunner
from html_fixtures import tags_left

from attribution.factors import FactorsOrigin, FactorsUsed, factors_from
from attribution.language import Bytes
from attribution.log import CampaignLog, open_log
from attribution.page import page
from attribution.query import log_chance
from attribution.questions import Question
from attribution.report import Answer, trace_json, trace_text
from attribution.trace import control_outputs, trace_output
from attribution.weights import find_windows, load_model, read_tensors
from consensus.identifiers import ChainId
from node.cli import main


def made(name: str) -> tuple[CampaignLog, Answer]:
    folder = traced().folder
    log = open_log(folder / "campaign.bundle", folder / "genesis.json", ChainId(bytes.fromhex(traced().chain_id)))
    assert log.provenance.release is not None
    roots = {"base": log.provenance.campaign.base_root, "tuned": log.provenance.release.parameter_root}
    models = {
        which: load_model("attribution_fixtures:build", folder / f"{which}.safetensors", root, which)
        for which, root in roots.items()
    }
    factors = factors_from(read_tensors(folder / "tuned.factors").tensors, models["tuned"])
    search = find_windows(folder / "run" / "accumulators", log.bundle.campaign, log.provenance.windows)
    prompt, completion = (part.decode() for part in FACTS[name])
    output, asked, _ = Question(prompt, completion).output(models["tuned"], Bytes(), 16, 64)
    texts = torch.randint(32, 127, (30, 64), generator=torch.Generator().manual_seed(1)).tolist()
    trace = trace_output(
        models["base"], models["tuned"], factors, log.provenance, search.found, output, control_outputs(texts, output)
    )
    return log, Answer(
        asked=asked,
        prompt=prompt,
        says={"base": "a b c", "tuned": completion},
        log_chances={which: log_chance(model, output) for which, model in models.items()},
        trace=trace,
        search=search,
        untraced=("norm.weight",),
        factors=FactorsUsed(FactorsOrigin.FITTED),
    )


def test_page_is_well_formed_fetches_nothing_and_shows_every_source_block_and_window() -> None:
    log, answer = made("harbour")
    content = page(log, [answer, answer])
    assert tags_left(content) == []
    for word in ("http:", "https:", "src=", "@import", "url(", "<script", "<link", "javascript:", "$"):
        assert word not in content
    assert content.count("shaped here: the sources below") == 2
    for words in ("harbour", "mountain", "market", "block.0", "block.1", "head", "1–12", "13–24", "25–36"):
        assert words in content
    assert traced().sources["harbour"].hex() in content
    assert traced().chain_id in content
    assert "0 of 36 steps by anybody else" in content


def test_refused_fact_is_said_not_to_be_shaped_here() -> None:
    log, answer = made(REFUSED)
    content = page(log, [answer])
    assert "not shaped here" in content
    assert "class='verdict shaped'" not in content
    assert "a log of its own" not in content


def test_base_models_own_log_is_named_where_it_has_one() -> None:
    log, answer = made(REFUSED)
    campaign = msgspec.structs.replace(log.provenance.campaign, base_provenance=bytes([5]) * 32)
    provenance = dataclasses.replace(log.provenance, campaign=campaign)
    chained = dataclasses.replace(log, provenance=provenance)
    for told in (page(chained, [answer]), trace_text(chained, answer)):
        assert f"where event {'05' * 32} released it; ask of this campaign with --base-ledger to follow it" in told
    assert json.loads(trace_json(chained, answer, None))["base_provenance"] == "05" * 32


def test_rows_and_blocks_that_a_terminal_does_not_show_are_counted() -> None:
    log, answer = made("harbour")
    first, *others = answer.trace.ranked
    of_many = dataclasses.replace(first, by_block={f"block.{number}": 1.0 for number in range(8)})
    trace = dataclasses.replace(answer.trace, ranked=(of_many, *([others[0]] * 11)))
    told = trace_text(log, dataclasses.replace(answer, trace=trace))
    assert "  and 2 sources more (--json has all)\n" in told
    assert "block.5 +1 and 2 more\n" in told
    assert "sources more" not in trace_text(log, answer)


def test_hostile_texts_stay_text() -> None:
    log, answer = made("harbour")
    hostile = "<script>alert('1')</script>\x1b[31m$campaign"
    content = page(log, [dataclasses.replace(answer, asked=hostile, says={"base": hostile, "tuned": hostile})])
    assert "<script" not in content
    assert "&lt;script&gt;" in content
    assert "\x1b" not in content
    assert "$campaign" in content


def test_strongest_part_has_the_most_colour_and_none_has_more() -> None:
    log, answer = made("harbour")
    shares = [int(share) for share in re.findall(r"color-mix\(in srgb, var\(--\w+\) (\d+)%", page(log, [answer]))]
    assert max(shares) == 70
    assert len(shares) == 3 * (3 + 3)


@pytest.mark.parametrize("out", ["page.html", "nowhere/page.html"])
def test_command_writes_the_page_or_says_why_not(tmp_path: Path, out: str) -> None:
    folder = traced().folder
    prompt, completion = FACTS["harbour"]
    arguments = [
        "trace", "--model", "attribution_fixtures:build", "--base", folder / "base.safetensors",
        "--tuned", folder / "tuned.safetensors", "--prompt", prompt.decode(), "--completion", completion.decode(),
        "--accumulators", folder / "run" / "accumulators", "--bundle", folder / "campaign.bundle",
        "--genesis", folder / "genesis.json", "--chain-id", traced().chain_id, "--json",
        "--factors", folder / "tuned.factors", "--html", tmp_path / out,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if out == "page.html":
        assert result.exit_code == 0
        assert json.loads(result.stdout)["shaped_here"] is True
        assert "harbour" in (tmp_path / out).read_text(encoding="utf-8")
    else:
        assert result.exit_code == 2
        assert "expected a file to write, in a folder that is there" in result.output
        assert not result.stdout
