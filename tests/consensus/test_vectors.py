"""Golden vectors: the same bytes under every hash seed, as committed, and as a stranger's code computes them."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from consensus.codec import decode
from consensus.event import MAX_ENTRY_BYTES, Entry, Kind, unpack

VECTORS = Path(__file__).parents[1] / "vectors"
ROOT = VECTORS.parents[1]
FILES = (
    "accumulators",
    "audits",
    "batch_signatures",
    "blocks",
    "bundles",
    "ceremony",
    "certificates",
    "checkpoints",
    "ed25519",
    "epoch_links",
    "epochs",
    "events",
    "evidence",
    "job_keys",
    "ledger_blocks",
    "log_proofs",
    "log_tree",
    "node_messages",
    "portions",
    "possession",
    "receipts",
    "reserve",
    "round_messages",
    "sampler",
    "signed_events",
    "state_map",
    "tagged_hash",
    "transitions",
)
OF_OTHER_CHECKERS = {
    "transitions": "check_transitions.py",
    **dict.fromkeys(
        ("bundles", "checkpoints", "epoch_links", "ledger_blocks", "receipts", "signed_events"), "check_shown.py"
    ),
    **dict.fromkeys(("node_messages", "round_messages"), "check_said.py"),
}
WITH_REASONS = (
    "batch_signatures",
    "bundles",
    "checkpoints",
    "ed25519",
    "epoch_links",
    "job_keys",
    "ledger_blocks",
    "log_proofs",
    "node_messages",
    "receipts",
    "round_messages",
    "signed_events",
)
CHECKERS = {name: OF_OTHER_CHECKERS.get(name, "check_vectors.py") for name in FILES}


def run(program: str, folder: Path, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(VECTORS / program), str(folder)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_vectors_are_made_anew_byte_by_byte_under_every_hash_seed(hash_seed: str, tmp_path: Path) -> None:
    made = run("generate.py", tmp_path, hash_seed)
    assert made.returncode == 0, made.stderr
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(FILES)
    assert sorted(path.stem for path in VECTORS.glob("*.json")) == sorted(FILES)
    for name in FILES:
        committed = (VECTORS / f"{name}.json").read_bytes()
        assert (tmp_path / f"{name}.json").read_bytes() == committed, f"{name}: a wire change, or a broken encoder"


@pytest.mark.parametrize("checker", ["check_vectors.py", "check_shown.py", "check_said.py"])
def test_vectors_hold_by_code_that_shares_nothing_with_the_implementation(checker: str) -> None:
    checked = run(checker, VECTORS)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == f"{len(listed_cases(checker))} vectors hold\n"


def listed_cases(checker: str) -> list[dict]:
    """The cases that a checker judges, those of one file that stand under what they share as well."""
    files = [json.loads((VECTORS / f"{name}.json").read_text()) for name in FILES if CHECKERS[name] == checker]
    return [
        case
        for file in files
        for held in file
        for case in (*held.get("accepted", ()), *held.get("refused", ())) or [held]
    ]


@pytest.mark.parametrize("name", WITH_REASONS)
def test_each_refused_case_is_refused_and_would_not_pass_as_accepted(name: str, tmp_path: Path) -> None:
    """The checker that is told to accept one of them says no."""
    for file in FILES:
        (tmp_path / f"{file}.json").write_bytes((VECTORS / f"{file}.json").read_bytes())
    target = tmp_path / f"{name}.json"
    text = target.read_text()
    reasons = [at for at in range(len(text)) if text.startswith('"reason": "', at)]
    assert len(reasons) > 10
    for at in (reasons[0], reasons[len(reasons) // 2], reasons[-1]):
        end = text.index('"', at + len('"reason": "'))
        target.write_text(text[:at] + '"reason": ""' + text[end + 1 :])
        assert run(CHECKERS[name], tmp_path).returncode != 0


def test_every_kind_of_event_does_what_the_specification_says_by_code_that_shares_nothing() -> None:
    checked = run("check_transitions.py", VECTORS)
    assert checked.returncode == 0, checked.stderr
    kinds, events = set(), 0
    for story in json.loads((VECTORS / "transitions.json").read_text()):
        for block in story["blocks"]:
            events += len(block["events"]) + len(block["refused"])
            kinds |= {
                decode(unpack(bytes.fromhex(each)).entry, Entry, MAX_ENTRY_BYTES).kind for each in block["events"]
            }
    assert kinds == set(Kind)
    assert checked.stdout == f"{events} events do what the vectors say\n"


MISREADINGS = {
    "refusals of one reason stay apart": (
        "sorted([*earlier, *listed])",
        "[*earlier, *listed]",
    ),
    "a rollback forgets refusals": (
        "discarded_steps=head",
        "refusal_events=0,\n        discarded_steps=head",
    ),
    "a rollback is no last event": (
        'root=said["restored_root"],\n        last_event=event.id',
        'root=said["restored_root"],\n        last_event=head["last_event"]',
    ),
    "only steps on the log are discarded": (
        "+ len(discarded)",
        "+ undoes",
    ),
    "refused examples are discarded, too": (
        'usage["discarded"] += admitted',
        'usage["discarded"] += shown',
    ),
    "a rollback takes the last step back": (
        'usage["momentum"] = momentum_before',
        'usage["momentum"], usage["last_step"] = momentum_before, usage["last_step"] - 1',
    ),
    "a rollback leaves momentum settled": (
        'usage["momentum"] = momentum_before',
        "pass",
    ),
    "a step writes only whom it admits": (
        'undo[each] = [each, shown, admitted, refused, usage["momentum"]]',
        'undo[each] = [each, shown, admitted, refused, usage["momentum"]]\n'
        "        if not admitted:\n            continue",
    ),
    "what a step settles and does not name is not undone": (
        "for each in settled:\n        undo[each]",
        "for each in ():\n        undo[each]",
    ),
    "pending refusals outlive the step": (
        'for each in said["memorization"]),\n        pending=[],',
        'for each in said["memorization"]),',
    ),
    "a finding left open keeps its place": (
        "others = [held",
        "if stands_open and subject in self.get(6, campaign)['open_findings']:\n            return\n"
        "        others = [held",
    ),
    "an evaluation closes what governance rejected": (
        '== (test, "unmet")',
        "[:1] == (test,)",
    ),
    "an answer settles what governance rejected": (
        'if standing == "open":',
        "if True:",
    ),
    "the first policy is number 0": (
        "if before else 1)",
        "if before else 0)",
    ),
    "an evaluation is a last event": (
        'standing="met" if met else "unmet",\n    )',
        'standing="met" if met else "unmet",\n    )\n    log.change(6, event.campaign, last_event=event.id)',
    ),
    "a successor is nobody": (
        'successor=joins.get(old[member], b"")',
        'successor=b""',
    ),
    "a release moves no sequence": (
        'closed="released", release=event.id)',
        'closed="released", release=event.id, next_sequence=head["next_sequence"] - 1)',
    ),
    "a replaced key stays": (
        'log.change(4, head["job_key"], replaced=True)',
        "pass",
    ),
}
"""By what a reader might have taken the specification to say, the change of the checker that says so."""


@pytest.mark.parametrize(("right", "wrong"), MISREADINGS.values(), ids=MISREADINGS)
def test_no_misreading_of_an_effect_passes(right: str, wrong: str, tmp_path: Path) -> None:
    text = (VECTORS / "check_transitions.py").read_text()
    assert text.count(right) == 1
    (tmp_path / "check_transitions.py").write_text(text.replace(right, wrong))
    (tmp_path / "check_vectors.py").write_bytes((VECTORS / "check_vectors.py").read_bytes())
    made = subprocess.run(
        [sys.executable, str(tmp_path / "check_transitions.py"), str(VECTORS)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 1
    assert "the vector says" in made.stderr or "Refused" in made.stderr, made.stderr


LEFT_OUT = {
    "a torsion component": ("check_vectors.py", "not edwards_same(edwards_times(EDWARDS_ORDER, point), IDENTITY)"),
    "S above the order": ("check_vectors.py", "s >= EDWARDS_ORDER"),
    "the identity": ("check_vectors.py", "edwards_same(point, IDENTITY)"),
    "hashes between equal sizes": ("check_vectors.py", "len(proof) != (older is None)"),
    "the root of nothing": ("check_vectors.py", "(first == 0 and older != tree([]))"),
    "the size of a batch": ("check_vectors.py", "not 2 <= size <= 65_536"),
    "the key of a job key's id": ("check_vectors.py", "job_key_id(scheme, key) != identifier"),
    "how far an epoch went": (
        "check_shown.py",
        'size < held["first"][0] or (held["end"] is not None and size > held["end"][0])',
    ),
    "the log at which an epoch ended": ("check_shown.py", "any(size == at and root != known for at, known in ends)"),
    "whose certificate it is": (
        "check_shown.py",
        '(block, view, epoch) != (tagged(name("block"), encoded), header[4], header[2])',
    ),
    "a changed role": (
        "check_shown.py",
        "any(before.get(member_id(new), new[1]) != new[1] for new in members)",
    ),
    "the digest of members": (
        "check_shown.py",
        'tagged(name("membership"), self.chain_id, membership) != digest',
    ),
    "a signer too many": ("check_shown.py", "len(signers) > 1"),
    "a quorum of signers": ("check_shown.py", "role in AUTHORS[kind] and signed_by < needed"),
    "the order of what a bundle holds": ("check_shown.py", "len(set(places)) != len(places)"),
    "portions disclosed twice": ("check_shown.py", "(data is not None and items is not None)"),
    "the pinned log": ("check_shown.py", "header[12] != root"),
    "numbers outside campaigns": ("check_shown.py", "opened[6:8] != [0, 0]"),
    "the time of a ledger block": ("check_shown.py", "header[8] < parent[8]"),
    "100 signatures": ("check_shown.py", "len(lines) > 100"),
    "the order of votes": ("check_said.py", "voters != sorted(set(voters))"),
    "what votes are for": (
        "check_said.py",
        "any((vote[3], vote[4], vote[5]) != (kind, view, block) for vote in held)",
    ),
    "a share on another vote": ("check_said.py", 'share != b"" and kind != FINALIZE'),
    "an event twice": ("check_said.py", "len(set(leaves)) != len(leaves)"),
    "32 events": ("check_said.py", "count == 32"),
    "the stream of a frame": ("check_said.py", '(stream == "votes" and kind > 1)'),
    "the length of a refusal": ("check_said.py", "(kind == 5 and length > 8 + 64)"),
}
"""By the rule, a condition of a checker that refuses what breaks it."""


@pytest.mark.parametrize(("checker", "rule"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_no_rule_can_be_left_out(checker: str, rule: str, tmp_path: Path) -> None:
    for name in ("check_vectors.py", "check_shown.py", "check_said.py"):
        text = (VECTORS / name).read_text()
        if name == checker:
            assert text.count(rule) == 1
            text = text.replace(rule, "False")
        (tmp_path / name).write_text(text)
    made = subprocess.run(
        [sys.executable, str(tmp_path / checker), str(VECTORS)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 1, made.stdout


@pytest.mark.parametrize(
    ("checker", "expected"),
    [
        ("check_vectors.py", "blspy collections cryptography hashlib json nacl pathlib struct sys"),
        ("check_transitions.py", "check_vectors json pathlib struct sys"),
        ("check_said.py", "check_vectors collections struct sys"),
        ("check_shown.py", "base64 check_vectors cryptography hashlib struct sys"),
    ],
)
def test_checker_imports_nothing_of_ours(checker: str, expected: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((VECTORS / checker).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            imported.add(node.module.partition(".")[0])
    assert imported == set(expected.split())


@pytest.mark.parametrize("name", FILES)
def test_checker_refuses_a_vector_that_is_changed_anywhere(name: str, tmp_path: Path) -> None:
    """One hex digit of the last case's last digest is turned."""
    for file in FILES:
        (tmp_path / f"{file}.json").write_bytes((VECTORS / f"{file}.json").read_bytes())
    target = tmp_path / f"{name}.json"
    text = target.read_text()
    quoted = [at for at in range(1, len(text)) if text[at] == '"' and text[at - 1] in "0123456789abcdef"]
    at = quoted[-1] - 1
    target.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    assert run(CHECKERS[name], tmp_path).returncode != 0
