"""``countersign decision`` and ``countersign audit``: what they sign, and what they refuse to."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from consensus.event import CheckedEvent, Kind, check_event
from consensus.identifiers import MemberId, Role
from consensus.portions import Setting
from consensus.rejection import ConfigError
from consensus.review import AuditAnswer, AuditChallenge, AuditResult, Decision, PickedStep
from node.cli import main
from node.clock import SystemClock
from node.commands.member import load_member
from node.commands.policy import read_policy
from node.provision import MemberRequest, Provisioned, provision

CAMPAIGN, EVALUATION, ROOT = "ab" * 32, "cd" * 32, "ef" * 32


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(exit_code: int, message: str, *arguments: str | Path) -> None:
    result = run(*arguments)
    assert (result.exit_code, message in result.stderr) == (exit_code, True), result.stderr


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Provisioned:
    requests = [
        MemberRequest("library", Role.DATA_SOURCE),
        MemberRequest("council", Role.GOVERNANCE),
        MemberRequest("senate", Role.GOVERNANCE),
        MemberRequest("laboratory", Role.OPERATOR),
        MemberRequest("guild", Role.VERIFIER),
    ]
    directory = tmp_path_factory.mktemp("reviews")
    return provision(directory / "net", "trial.example/log", requests, created_ms=1_800_000_000_000)


def config(consortium: Provisioned, name: str) -> Path:
    return consortium.members[name].config


def event_in(path: Path, consortium: Provisioned) -> CheckedEvent:
    return check_event(path.read_bytes(), load_member(config(consortium, "council")).committee)


def decide(consortium: Provisioned, name: str, out: Path, *more: str) -> Result:
    given = ("--campaign", CAMPAIGN, "--rationale", "as agreed", "--out", out)
    return run("decision", "add", "--config", config(consortium, name), *given, *more)


# decision


def test_decision_of_governance_is_signed_by_one_member_after_the_other(
    consortium: Provisioned, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.event", tmp_path / "second.event"
    started = decide(consortium, "council", first, "--about", EVALUATION, "--outcome", "accept")
    assert started.exit_code == 0, started.output
    assert "1 more governance members must sign" in started.output
    added = run("decision", "add", "--config", config(consortium, "senate"), "--event", first, "--out", second)
    assert "signed by council, senate" in added.output
    assert "'as agreed'" in added.output
    assert "more governance" not in added.output
    event = event_in(second, consortium)
    assert event.governance == Decision(bytes.fromhex(EVALUATION), "accept", "as agreed")
    assert event.entry.campaign == bytes.fromhex(CAMPAIGN)


def test_others_note_in_their_own_name_and_about_the_campaign_by_default(
    consortium: Provisioned, tmp_path: Path
) -> None:
    out = tmp_path / "note.event"
    result = decide(consortium, "laboratory", out, "--json")
    assert json.loads(result.stdout)["kind"] == "decision"
    event = event_in(out, consortium)
    assert event.governance == Decision(bytes.fromhex(CAMPAIGN), "note", "as agreed")
    assert event.signers == {event.entry.author}


def test_incomplete_decision_is_not_submitted(consortium: Provisioned, tmp_path: Path) -> None:
    council = config(consortium, "council")
    refused(
        1,
        "missing-signature",
        *("decision", "add", "--config", council, "--campaign", CAMPAIGN, "--rationale", "r", "--submit"),
    )


def test_what_is_no_decision_is_refused(consortium: Provisioned, tmp_path: Path) -> None:
    council = ("decision", "add", "--config", config(consortium, "council"))
    assert run(*council, "--out", tmp_path / "x").exit_code == 2
    assert run(*council, "--campaign", CAMPAIGN, "--rationale", "r").exit_code == 2
    assert run(*council, "--campaign", CAMPAIGN, "--out", tmp_path / "x").exit_code == 2
    assert run(*council, "--campaign", "abc", "--rationale", "r", "--out", tmp_path / "x").exit_code == 2
    note = tmp_path / "note.event"
    decide(consortium, "council", note)
    library = ("decision", "add", "--config", config(consortium, "library"), "--out", tmp_path / "x")
    refused(2, "signed by a governance member", *library, "--event", note)
    audited = tmp_path / "audit.event"
    record(consortium, "library", replay_file(tmp_path), audited)
    refused(2, "found an event of kind audit-result", *council, "--event", audited, "--out", tmp_path / "x")


# audit


def replay_file(directory: Path, **changes: object) -> Path:
    path = directory / "replay.json"
    document = {
        "chain_id": "",
        "campaign": CAMPAIGN,
        "without": [],
        "steps": 12,
        "replayed": 12,
        "matched": 12,
        "difference": None,
        "root": ROOT,
        "end_root": ROOT,
        "recorded_root": ROOT,
        "environment": {"torch": "2.13.0", "cpu": "AVX2"},
        "seconds": 1.0,
        **changes,
    }
    path.write_text(json.dumps(document))
    return path


def record(consortium: Provisioned, name: str, replay: Path, out: Path) -> Result:
    document = json.loads(replay.read_text())
    if isinstance(document, dict) and document.get("chain_id") == "":
        document["chain_id"] = load_member(config(consortium, name)).committee.chain_id.hex()
        replay.write_text(json.dumps(document))
    return run("audit", "record", "--config", config(consortium, name), "--replay", replay, "--out", out)


@pytest.mark.parametrize("name", ["library", "council", "guild"])
def test_replay_becomes_an_audit_result_in_its_runners_name(consortium: Provisioned, tmp_path: Path, name: str) -> None:
    out = tmp_path / "audit.event"
    result = record(consortium, name, replay_file(tmp_path), out)
    assert result.exit_code == 0, result.output
    assert "12 steps: all came out as recorded" in result.output
    event = event_in(out, consortium)
    assert event.entry.kind is Kind.AUDIT_RESULT
    assert load_member(config(consortium, name)).committee.member(MemberId(event.entry.author)).name == name
    environment = (Setting("cpu", "AVX2"), Setting("torch", "2.13.0"))
    assert event.governance == AuditResult(1, 12, 12, (), bytes.fromhex(ROOT), "", environment, "", None)


def test_difference_is_recorded_as_found(consortium: Provisioned, tmp_path: Path) -> None:
    out = tmp_path / "audit.event"
    replay = replay_file(tmp_path, matched=4, difference={"step": 5, "what": ["optimizer state", "x" * 300]})
    result = record(consortium, "library", replay, out)
    assert "step 5 did not; 4 came out as recorded" in result.output
    found = event_in(out, consortium).governance
    assert isinstance(found, AuditResult)
    assert (found.last_step, found.matched, found.differing) == (5, 4, ("optimizer state", "x" * 128))
    assert found.differs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": [CAMPAIGN]}, "compares nothing"),
        ({"matched": 0}, "nothing was compared"),
        ({"matched": 3, "difference": {"step": 5, "what": ["parameters"]}}, "3 steps came out as recorded, and step 5"),
        ({"matched": -1}, "expected a replay's JSON document"),
        ({"difference": {"step": 5, "what": []}}, "expected a replay's JSON document"),
        ({"campaign": "elsewhere"}, "expected a replay's JSON document"),
        ({"chain_id": "ab" * 32}, "a replay of chain abab"),
    ],
)
def test_what_is_no_audit_is_refused(
    consortium: Provisioned, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    result = record(consortium, "library", replay_file(tmp_path, **changes), tmp_path / "audit.event")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "audit.event").exists()


# audits by lot


BEACON = "cd" * 96
AUDIT = {"challenge": EVALUATION, "beacon": BEACON, "first_step": 3, "last_step": 90}


def picks(*differing: int) -> list[dict[str, object]]:
    return [{"step": step, "differing": ["tensor head.bias"] if step in differing else []} for step in (4, 8, 70)]


def test_challenge_is_signed_with_its_range_and_time(consortium: Provisioned, tmp_path: Path) -> None:
    out = tmp_path / "challenge.event"
    before = SystemClock().now_ms()
    result = run(
        *("audit", "challenge", "--config", config(consortium, "guild"), "--campaign", CAMPAIGN, "--number", "3"),
        *("--first-step", "5", "--last-step", "500", "--picks", "8", "--hours", "2", "--out", out),
    )
    assert result.exit_code == 0, result.output
    assert "audit 3 of campaign" in result.output
    asked = event_in(out, consortium).governance
    assert isinstance(asked, AuditChallenge)
    assert (asked.number, asked.first_step, asked.last_step, asked.picks) == (3, 5, 500, 8)
    assert 0 <= asked.answer_by_ms - before - 2 * 3_600_000 < 60_000
    laboratory = ("audit", "challenge", "--config", config(consortium, "laboratory"), "--campaign", CAMPAIGN)
    refused(2, "audited by others", *laboratory, "--last-step", "5", "--picks", "1", "--out", out)


def test_replay_of_an_audits_steps_becomes_its_answer(consortium: Provisioned, tmp_path: Path) -> None:
    out = tmp_path / "audit.event"
    replay = replay_file(tmp_path, matched=3, replayed=9, picked=picks(), audit=AUDIT, tolerance="0.01 of the change")
    result = record(consortium, "library", replay, out)
    assert "3 steps picked by lot: all came out as recorded" in result.output
    found = event_in(out, consortium).governance
    assert isinstance(found, AuditResult)
    assert (found.first_step, found.last_step, found.matched, found.differing) == (3, 90, 3, ())
    assert found.tolerance == "0.01 of the change"
    answer = AuditAnswer(
        bytes.fromhex(EVALUATION), bytes.fromhex(BEACON), tuple(PickedStep(step, ()) for step in (4, 8, 70))
    )
    assert found.answer == answer


def test_difference_in_a_picked_step_is_recorded_as_found(consortium: Provisioned, tmp_path: Path) -> None:
    out = tmp_path / "audit.event"
    difference = {"step": 6, "what": ["parameter block head"]}
    replay = replay_file(tmp_path, matched=2, picked=picks(8), audit=AUDIT, difference=difference)
    result = record(consortium, "library", replay, out)
    assert "step 6 did not; 2 came out as recorded" in result.output
    found = event_in(out, consortium).governance
    assert isinstance(found, AuditResult)
    assert found.answer is not None
    assert found.differing == ("parameter block head",)
    assert (found.answer.differing, found.answer.matching) == ((8,), (4, 70))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"picked": picks()}, "steps that its runner chose"),
        ({"audit": AUDIT}, "steps that its runner chose"),
        ({"picked": picks(8), "audit": AUDIT}, "12 picked steps came out as recorded, 2 are named"),
        ({"picked": picks(8), "audit": AUDIT, "matched": 2}, "2 picked steps came out as recorded"),
        ({"picked": picks(), "audit": {**AUDIT, "beacon": "cd"}}, "expected a replay's JSON document"),
    ],
)
def test_what_is_no_answer_is_refused(
    consortium: Provisioned, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    result = record(consortium, "library", replay_file(tmp_path, **changes), tmp_path / "audit.event")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_auditors_of_a_policy_file_are_members_by_name(consortium: Provisioned, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    template = (Path(__file__).parents[2] / "configs" / "policy.toml").read_text(encoding="utf-8")
    members = load_member(config(consortium, "council")).committee.members
    path.write_text(template.replace("# auditors = []", 'auditors = ["guild", "library"]'), encoding="utf-8")
    ids = {member.name: member.id for member in members}
    assert read_policy(path, members).auditors == (ids["guild"], ids["library"])
    path.write_text(template.replace("# auditors = []", 'auditors = ["nobody"]'), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"auditors: expected members of the network \(.*guild.*\), found 'nobody'"):
        read_policy(path, members)


def test_operator_and_broken_files_are_refused(consortium: Provisioned, tmp_path: Path) -> None:
    out = tmp_path / "audit.event"
    result = record(consortium, "laboratory", replay_file(tmp_path), out)
    assert (result.exit_code, "audited by others" in result.stderr) == (2, True)
    broken = tmp_path / "broken.json"
    broken.write_text("[]")
    assert record(consortium, "library", broken, out).exit_code == 2
    audit = ("audit", "record", "--config", config(consortium, "library"), "--out", out, "--replay")
    refused(2, "expected a replay's JSON document", *audit, tmp_path / "none.json")
