"""The demonstration's page and summary, made from facts without a run."""

import dataclasses
import re
from xml.etree import ElementTree

import pytest
from html_fixtures import tags_left

from node.demo.charts import Mark, heat_map, loss_curve
from node.demo.display import sparkline
from node.demo.facts import (
    BandFacts,
    BlockShare,
    CheckFacts,
    CustodyFacts,
    DecisionFacts,
    FinalityFacts,
    GrantFacts,
    Moment,
    PartyFacts,
    RankedFacts,
    RecallFacts,
    RecitedFacts,
    ReplayFacts,
    ReserveFacts,
    RunFacts,
    SourceFacts,
    StepFacts,
    SurveyFacts,
    ToleranceFacts,
    TraceFacts,
    TracingFacts,
    summary_of,
)
from node.demo.report import render

PROMISED = (
    "chain_id",
    "nodes",
    "voting_nodes",
    "roles",
    "ledger_blocks",
    "log_size",
    "log_root",
    "certificate_scheme",
    "certificate_bytes",
    "steps",
    "refused_examples",
    "rollbacks",
    "revocations",
    "finality_ms_p50",
    "finality_ms_p99",
    "step_overhead_percent",
    "checks",
    "seconds",
)


def party(name: str, role: str = "governance", log_root: str = "ab" * 32) -> PartyFacts:
    return PartyFacts(name, role, role != "verifier", 41, log_root, "cd" * 32)


def source(name: str, admitted: int, refused: dict[str, int], *, revoked: bool = False) -> SourceFacts:
    presented = admitted + sum(refused.values())
    claim = (name, "12" * 32, "library", "PSF-2.0", ("fine-tuning",), "news", 48, 24)
    return SourceFacts(*claim, revoked, presented, admitted, refused, 2)


def step(number: int, loss: float | None, *, discarded: bool = False) -> StepFacts:
    return StepFacts(number, 0, 10 + number, loss, 16, 12, 4, 0, discarded)


def facts() -> RunFacts:
    return RunFacts(
        chain_id="0f" * 32,
        origin="demo.example/log",
        started="2026-01-02 03:04 UTC",
        seconds=99.44,
        python="3.11.9",
        campaign="ca" * 32,
        policy="b0" * 32,
        policy_rationale="because",
        parties=(party("council"), party("library", "data-source"), party("guild", "verifier")),
        tolerances=(ToleranceFacts("governance", 1, 1, 0, 0, 0),),
        sources=(source("letters", 30, {}), source("weekly", 0, {"licence-not-admitted": 31}, revoked=True)),
        steps=(step(1, 3.0), step(2, 2.5), step(3, 1.0, discarded=True), step(3, 2.25), step(4, None)),
        grants=(GrantFacts(1, 25, 6, ("council", "library")),),
        moments=(
            Moment("claim", 1.0, None, "claimed"),
            Moment("killed", 2.0, 1, "gone"),
            Moment("back", 3.0, 2, "back again"),
            Moment("rollback", 4.0, 3, "undone"),
        ),
        shares=(BlockShare("embedding", {}), BlockShare("head", {("letters", 0): 750, ("letters", 1): 250})),
        bands=(BandFacts(1, 4.0, {"letters": 3}, ("block.1", "head")), BandFacts(2, 6.5, {}, ())),
        checks=(
            CheckFacts(
                "included",
                "Is it there?",
                "the release",
                "yes",
                ((1, "checked", "the first"), (2, "attested", "the second"), (3, "not-covered", "the third")),
                "countersign verify included --bundle x",
                1_234,
                0.5,
            ),
        ),
        recall=(RecallFacts("letters", "The mayor is ", "Eklund.", "the the", "Eklund.", 0.01, 0.9, "admitted"),),
        survey=SurveyFacts("e0" * 32, 40, 604, 800, ()),
        reserve=ReserveFacts(72, 1),
        custody=CustodyFacts("council", 6, 75_400_000),
        decisions=(),
        replay=ReplayFacts(4, 4, "", "letters", "countersign replay --campaign x", 3.5),
        tracing=TracingFacts(
            (
                TraceFacts(
                    RecallFacts("letters", "The mayor is ", "Eklund.", "the the", "Eklund.", 0.01, 0.9, "admitted"),
                    True,
                    True,
                    (
                        RankedFacts("letters", "press", 7.25, 30, 5, 2, False),
                        RankedFacts("<odd>", "press", -0.5, 3, 6, 1, True),
                    ),
                    "the the",
                    0.0125,
                ),
                TraceFacts(
                    RecallFacts("weekly", "The vault holds ", "opals.", "the the", "the a", 0.01, 0.02, "refused"),
                    False,
                    False,
                    (RankedFacts("letters", "press", 1.5, 30, 5, 2, False),),
                    "the a",
                    0.02,
                ),
            ),
            "countersign trace --prompt 'The mayor is '",
            40,
            12.5,
        ),
        ledger_blocks=41,
        log_size=320,
        log_root="ab" * 32,
        state_root="cd" * 32,
        certificate_scheme="bls-threshold",
        certificate_bytes=96,
        final_steps=4,
        rollbacks=1,
        revocations=1,
        finality=FinalityFacts(77, 41.0, 120.5),
        step_overhead_percent=6.5,
        memorization_overhead_percent=4.0,
        paused_seconds=0.1,
        release_file="release/model.safetensors",
        release_bytes=3_500_000,
        release_sha256="5a" * 32,
    )


def test_report_fetches_nothing_and_runs_nothing() -> None:
    page = render(facts())
    for word in ("http:", "https:", "src=", "@import", "url(", "<script", "<link", "<iframe", "javascript:"):
        assert word not in page


def test_report_is_well_formed_and_its_drawings_are_xml() -> None:
    page = render(facts())
    assert tags_left(page) == []
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_report_leaves_no_placeholder_and_is_a_function_of_its_facts() -> None:
    page = render(facts())
    assert "$" not in page
    assert page == render(facts())


def test_hostile_names_and_texts_stay_text() -> None:
    hostile = "<script>alert(1)</script>&\"'"
    made = facts()
    page = render(
        dataclasses.replace(
            made,
            policy_rationale=hostile,
            sources=(dataclasses.replace(made.sources[0], name=hostile, licence=hostile, refused={hostile: 1}),),
            moments=(Moment("refusal", 1.0, 2, hostile),),
            checks=(dataclasses.replace(made.checks[0], steps=((1, "checked", hostile),), command=hostile),),
            recall=(dataclasses.replace(made.recall[0], tuned_says=hostile),),
        )
    )
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_every_step_of_a_check_says_how_far_it_goes() -> None:
    page = render(facts())
    for text in ("the first", "the second", "the third", "not covered", "attested", "countersign verify included"):
        assert text in page


def test_traces_show_where_they_lead_and_the_rest_beside_it() -> None:
    page = render(facts())
    assert "<b>letters</b> of press" in page
    assert "claim at entry 5 of the log, 30 admitted examples under 2 grants" in page
    assert "&lt;odd&gt;" in page
    assert "not shaped here" in page
    summary = summary_of(facts())
    assert summary["traces"] == {
        "letters": {
            "fate": "admitted",
            "shaped_here": True,
            "leads_to": "letters",
            "probability_without": 0.0125,
            "z": {"letters": 7.25, "<odd>": -0.5},
        },
        "weekly": {
            "fate": "refused",
            "shaped_here": False,
            "leads_to": "",
            "probability_without": 0.02,
            "z": {"letters": 1.5},
        },
    }


def test_page_and_summary_say_what_the_released_model_recites_and_who_accepted_that() -> None:
    made = dataclasses.replace(
        facts(),
        survey=SurveyFacts("e0" * 32, 40, 854, 800, (RecitedFacts("letters", "press", 21, 854),)),
        decisions=(
            DecisionFacts(("press",), "note", "no objection"),
            DecisionFacts(("council",), "accept", "published & <free>"),
        ),
    )
    page = render(made)
    assert "The released model recites 1 example above the policy" in page
    assert "<b>letters</b>" in page
    assert "854 ‰" in page
    assert "published &amp; &lt;free&gt;" in page
    assert tags_left(page) == []
    summary = summary_of(made)
    assert summary["memorization"] == {
        "examples": 40,
        "highest_signal_permille": 854,
        "threshold_permille": 800,
        "recited": [{"source": "letters", "example": 21, "signal_permille": 854}],
        "reserve": {"examples": {"letters": 24, "weekly": 24}, "assessed": 72, "taken_for_recited": 1},
    }
    assert [each["outcome"] for each in summary["decisions"]] == ["note", "accept"]  # type: ignore[attr-defined]


def test_page_tells_what_is_measured_against_the_reserves_of_the_sources_that_keep_one() -> None:
    page = render(facts())
    assert "24 of 48 examples in reserve" in page
    assert "Of 72 texts in the owners' reserves, on which no step trained, the check takes 1 for recited" in page
    made = facts()
    without = dataclasses.replace(
        made,
        reserve=ReserveFacts(0, 0),
        sources=tuple(dataclasses.replace(each, reserve=0) for each in made.sources),
    )
    assert "examples in reserve" not in render(without)
    assert "texts in the owners' reserves" not in render(without)


def test_page_shows_a_band_beside_the_rest_of_its_source_and_where_it_was_let_through_to() -> None:
    page = render(facts())
    assert "3 examples of letters cost the base model 4 nats a byte or more" in page
    assert "let through to block.1, head alone" in page
    assert "6.5 nats" not in page, "no example is of that band"
    assert page.count("letters → head: ") == 2
    assert "letters → head: 25.0 %" in page
    assert summary_of(facts())["bands"] == [
        {"band": 1, "from_nats": 4.0, "examples": {"letters": 3}, "blocks": ["block.1", "head"]},
        {"band": 2, "from_nats": 6.5, "examples": {}, "blocks": []},
    ]


def test_page_says_that_somebody_else_than_the_operator_held_what_a_trace_reads() -> None:
    assert "council, who is not the operator, holds them: 75 MB of 6 windows" in render(facts())
    assert summary_of(facts())["custody"] == {"custodian": "council", "windows": 6, "size_bytes": 75_400_000}


def test_page_of_a_model_that_recites_nothing_names_the_strongest_signal_and_no_decision() -> None:
    page = render(facts())
    assert "Of 40 examples the strongest is recited at 604 ‰; the policy bears 800 ‰." in page
    assert "The released model recites" not in page
    assert "signed by</th><th>decision" not in page


def test_step_that_did_not_come_out_again_spoils_the_verdict() -> None:
    made = facts()
    failed = dataclasses.replace(
        made, replay=dataclasses.replace(made.replay, matched=2, difference="step 3: parameter block <head>")
    )
    assert not failed.passed
    page = render(failed)
    assert "2 of 4" in page
    assert "step 3: parameter block &lt;head&gt;" in page


def test_trace_is_right_where_it_leads_to_the_planter_and_a_refused_fact_to_none() -> None:
    taught, untaught = facts().tracing.traces
    assert taught.right
    assert untaught.right
    assert not dataclasses.replace(taught, shaped_here=False).right
    assert not dataclasses.replace(taught, ranked=taught.ranked[::-1]).right
    assert not dataclasses.replace(untaught, shaped_here=True).right


def test_failed_check_is_opened_and_spoils_the_verdict() -> None:
    made = facts()
    assert made.passed
    failed = dataclasses.replace(
        made, checks=(dataclasses.replace(made.checks[0], answer="no", steps=((1, "failed", "roots differ"),)),)
    )
    assert not failed.passed
    assert summary_of(failed)["checks"] == {"included": False}
    page = render(failed)
    assert 'class="verdict bad"' in page
    assert "0 of 1 checks say yes" in page
    assert '<details class="check" open>' in page


def test_nodes_at_different_logs_do_not_pass() -> None:
    made = facts()
    split = dataclasses.replace(made, parties=(*made.parties, party("press", log_root="ee" * 32)))
    assert not split.replicated
    assert not split.passed
    assert "do not stand at one log" in render(split)


def test_no_checks_is_not_a_pass() -> None:
    assert not dataclasses.replace(facts(), checks=()).passed


def test_summary_has_every_promised_figure_from_the_facts() -> None:
    summary = summary_of(facts())
    assert [key for key in PROMISED if key not in summary] == []
    assert summary["nodes"] == 3
    assert summary["voting_nodes"] == 2
    assert summary["refused_examples"] == 31
    assert summary["finality_ms_p99"] == 120.5
    assert summary["seconds"] == 99.4


def test_outage_is_shaded_and_undone_step_is_crossed() -> None:
    page = render(facts())
    assert "The operator's node was down from step 1 to step 2" in page or "&#x27;s node was down" in page
    assert "Step 3 was undone" in page


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, 2.0), (2, 2.0)]])
def test_loss_curve_of_few_or_equal_points_is_drawn(points: list[tuple[int, float]]) -> None:
    drawing = loss_curve(points, [], [Mark(1, "rollback", "U", "x")], [], max(1, len(points)))
    assert drawing == "" if not points else ElementTree.fromstring(drawing) is not None


def test_crowded_marks_do_not_cover_each_other() -> None:
    marks = [Mark(number, "refusal", "R", "x") for number in (1, 2, 3)]
    drawing = loss_curve([(1, 2.0), (150, 1.0)], [], marks, [], 150)
    assert len(set(re.findall(r'<circle cx="[^"]+" cy="([^"]+)"', drawing))) == 3


def test_nothing_let_through_is_a_dot_in_the_heat_map() -> None:
    drawing = heat_map(["embedding", "head"], [("letters", "press · news", {"head": 500})])
    assert drawing.count("·</text>") == 1
    assert "50 %" in drawing


def test_sparkline_falls_with_the_loss_and_keeps_its_width() -> None:
    line = sparkline([float(value) for value in range(400, 0, -1)], 40)
    assert len(line) == 40
    assert (line[0], line[-1]) == ("█", "▁")
    assert sparkline([], 40) == ""
    assert sparkline([1.0], 40) == "▁"
