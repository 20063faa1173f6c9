"""``countersign verify`` as its users meet it: files, exit codes, text, and a bare installation."""

import hashlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from ledger_fixtures import Story, begin, safetensors_file, story

from consensus.block import decode_header
from consensus.bundle import MAGIC, MAX_BUNDLE_BYTES, Bundle, encode_bundle, open_bundle
from consensus.checkpoint import assemble_note, checkpoint_text, encode_verifier_key, sign_note
from consensus.codec import decode
from consensus.epochs import anchor
from consensus.event import Kind
from consensus.genesis import genesis_to_json
from consensus.keys import Ed25519SigningKey
from consensus.predicates import Answer, Predicate, verify
from consensus.rejection import Reason, Rejected
from node.bundles import export_bundle
from node.demo.processes import countersign_command
from node.verify import printable, read_weights, verify_command


@cache
def told() -> Story:
    return story()


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder as a demonstration leaves it: ``bundles/``, ``release/``, ``genesis.json``."""
    tale = told()
    (tmp_path / "bundles").mkdir()
    (tmp_path / "release").mkdir()
    (tmp_path / "genesis.json").write_bytes(genesis_to_json(tale.ledger.genesis))
    (tmp_path / "release" / "model.safetensors").write_bytes(tale.weights)
    for predicate in (Predicate.POLICY_IN_FORCE, Predicate.DELTA_EXACT, Predicate.REFUSALS_COMPLETE):
        encoded = export_bundle(tale.ledger, predicate, campaign=tale.run.id)
        (tmp_path / "bundles" / predicate.value).write_bytes(encoded)
    for predicate in (Predicate.SOURCE_HONORED, Predicate.SOURCE_UNUSED):
        encoded = export_bundle(tale.ledger, predicate, campaign=tale.run.id, source=tale.books)
        (tmp_path / "bundles" / predicate.value).write_bytes(encoded)
    exposed = export_bundle(tale.ledger, "revocation-exposure", campaign=tale.run.id, source=tale.records)
    (tmp_path / "bundles" / "revocation-exposure").write_bytes(exposed)
    event = next(event for event in tale.ledger.events if event.entry.kind is Kind.EVIDENCE)
    (tmp_path / "bundles" / "evidence").write_bytes(export_bundle(tale.ledger, "evidence", event=event.id))
    return tmp_path


def arguments(house: Path, predicate: str, *more: str, chain_id: str = "") -> list[str]:
    return [
        predicate,
        "--bundle",
        str(house / "bundles" / predicate),
        "--genesis",
        str(house / "genesis.json"),
        "--chain-id",
        chain_id or told().ledger.chain_id.hex(),
        *more,
    ]


def test_answer_is_the_exit_code_where_nothing_can_be_printed(house: Path) -> None:
    """A script may want nothing else, and closes what it does not read."""
    command = countersign_command("verify", *arguments(house, "source-honored"))
    for closing in (">&-", "2>&-", ">&- 2>&-"):
        assert subprocess.run(["sh", "-c", f'exec "$@" {closing}', "sh", *command], check=False).returncode == 0
        wrong = [*command[:-1], "00" * 32]
        refused = subprocess.run(["sh", "-c", f'exec "$@" {closing}', "sh", *wrong], check=False)
        assert refused.returncode not in (0, None), closing


def verified(house: Path, predicate: str, *more: str, chain_id: str = "") -> Result:
    result = CliRunner().invoke(verify_command, arguments(house, predicate, *more, chain_id=chain_id))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    "predicate", ["policy-in-force", "delta-exact", "refusals-complete", "source-honored", "revocation-exposure"]
)
def test_honest_bundle_answers_yes_with_numbered_steps(house: Path, predicate: str) -> None:
    result = verified(house, predicate)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[-1] == "answer: yes"
    assert lines[-2] == "as of ledger block 18, log size 29, time 2023-11-14T22:13:38 (UTC)"
    assert f"about campaign {told().run.id.hex()}" in lines
    assert any(line.startswith("  1  checked      the genesis is that of the pinned chain") for line in lines)


def test_evidence_names_the_member_and_what_it_signed(house: Path) -> None:
    result = verified(house, "evidence")
    assert result.exit_code == 0
    assert "contradict each other (two-notarize-votes)" in result.output
    assert result.output.splitlines()[-1] == "answer: yes"


def test_no_exits_one_and_names_the_failed_step(house: Path) -> None:
    result = verified(house, "source-unused")
    assert result.exit_code == 1
    assert "failed" in result.output
    assert result.output.endswith("answer: no\n")


def test_missing_weights_are_unknown_and_explained(house: Path) -> None:
    (house / "release" / "model.safetensors").unlink()
    result = verified(house, "delta-exact")
    assert result.exit_code == 2
    assert "answer: unknown" in result.output
    assert f"put the file into {house / 'release'}" in result.output


def test_tampered_weights_are_a_no(house: Path) -> None:
    tampered = bytearray(told().weights)
    tampered[-1] ^= 1
    (house / "release" / "model.safetensors").write_bytes(tampered)
    result = verified(house, "delta-exact")
    assert result.exit_code == 1
    assert result.output.count(" failed ") == 2


def test_weights_given_by_name_are_compared(house: Path) -> None:
    elsewhere = house / "elsewhere.safetensors"
    elsewhere.write_bytes(told().weights)
    (house / "release" / "model.safetensors").unlink()
    assert verified(house, "delta-exact", "--weights", str(elsewhere)).exit_code == 0
    assert verified(house, "policy-in-force", "--weights", str(elsewhere)).exit_code == 1


def test_weights_that_are_no_safetensors_file_are_refused(house: Path) -> None:
    (house / "release" / "model.safetensors").write_bytes(b"not a tensor in sight")
    result = verified(house, "delta-exact")
    assert result.exit_code == 1
    assert "refused: malformed" in result.output


def test_genesis_of_another_chain_is_refused_naming_both(house: Path) -> None:
    pinned = "ab" * 32
    result = verified(house, "delta-exact", chain_id=pinned)
    assert result.exit_code == 1
    assert "refused: wrong-chain" in result.output
    assert pinned in result.output
    assert told().ledger.chain_id.hex() in result.output


@pytest.mark.parametrize("chain_id", [" ", "ab", "AB" * 32, "0x" + "ab" * 31, "g" * 64])
def test_chain_id_that_is_none_is_refused(house: Path, chain_id: str) -> None:
    result = verified(house, "delta-exact", chain_id=chain_id)
    assert (result.exit_code, "64 lower-case hexadecimal digits" in result.output) == (2, True)


@pytest.mark.parametrize("subject", ["--campaign", "--source", "--event", "--earlier"])
def test_subject_that_is_no_digest_was_wrongly_asked_about(house: Path, subject: str) -> None:
    result = verified(house, "delta-exact", subject, "abc")
    assert (result.exit_code, "64 lower-case hexadecimal digits" in result.output) == (2, True)


def test_witness_key_that_is_none_is_told_its_form(house: Path) -> None:
    result = verified(house, "delta-exact", "--witness", "abc")
    assert (result.exit_code, "expected NAME+ID+KEY" in result.output) == (2, True)


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_truncated_bundle_is_refused_without_a_traceback(house: Path, keep: int) -> None:
    path = house / "bundles" / "delta-exact"
    path.write_bytes(path.read_bytes()[:keep])
    result = verified(house, "delta-exact")
    assert result.exit_code == 1
    assert result.output.startswith("refused: malformed")
    assert "Traceback" not in result.output


def test_altered_bundle_is_refused_without_a_traceback(house: Path) -> None:
    path = house / "bundles" / "refusals-complete"
    original = path.read_bytes()
    for position in range(0, len(original), 997):
        altered = bytearray(original)
        altered[position] ^= 0x40
        path.write_bytes(altered)
        result = verified(house, "refusals-complete")
        assert result.exit_code == 1
        assert result.output.startswith("refused: ")


def test_oversized_bundle_is_refused(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.verify.MAX_BUNDLE_BYTES", 100)
    result = verified(house, "delta-exact")
    assert (result.exit_code, "refused: oversized" in result.output) == (1, True)


@pytest.mark.parametrize("missing", ["bundles/delta-exact", "genesis.json"])
def test_file_that_is_not_there_was_wrongly_asked_about(house: Path, missing: str) -> None:
    (house / missing).unlink()
    result = verified(house, "delta-exact")
    assert result.exit_code == 2
    assert missing in result.output


def test_bundle_in_place_of_the_genesis_is_refused(house: Path) -> None:
    (house / "genesis.json").write_bytes((house / "bundles" / "delta-exact").read_bytes())
    assert "refused: malformed" in verified(house, "delta-exact").output


def test_bundle_with_a_step_left_out_is_refused(house: Path) -> None:
    path = house / "bundles" / "delta-exact"
    bundle = decode(path.read_bytes()[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)
    path.write_bytes(encode_bundle(msgspec.structs.replace(bundle, events=bundle.events[:-2] + bundle.events[-1:])))
    result = verified(house, "delta-exact")
    assert (result.exit_code, "refused: bundle-incomplete" in result.output) == (1, True)


def test_bundle_of_another_predicate_is_refused(house: Path) -> None:
    (house / "bundles" / "delta-exact").write_bytes((house / "bundles" / "policy-in-force").read_bytes())
    assert "refused: unknown-predicate" in verified(house, "delta-exact").output
    assert verified(house, "source-honored", "--json").exit_code == 0
    unknown = CliRunner().invoke(verify_command, ["nonsense", *arguments(house, "delta-exact")[1:]])
    assert (unknown.exit_code, "refused: unknown-predicate" in unknown.output) == (1, True)


def test_bundle_about_another_campaign_than_asked_is_refused(house: Path) -> None:
    assert verified(house, "delta-exact", "--campaign", told().run.id.hex()).exit_code == 0
    result = verified(house, "delta-exact", "--campaign", "00" * 32)
    assert (result.exit_code, "refused: bad-field" in result.output) == (1, True)


def test_json_names_answer_subject_and_steps(house: Path) -> None:
    found = json.loads(verified(house, "source-honored", "--json").output)
    assert (found["answer"], found["source"]) == ("yes", told().books.hex())
    assert found["as_of"] == {"height": 18, "log_size": 29, "timestamp_ms": 1_700_000_018_000}
    assert [step["number"] for step in found["steps"]] == list(range(1, len(found["steps"]) + 1))
    assert {step["status"] for step in found["steps"]} == {"checked", "attested", "not-covered"}
    refused = json.loads(verified(house, "source-honored", "--json", chain_id="00" * 32).output)
    assert (refused["answer"], refused["error"]) == ("refused", "wrong-chain")


def test_names_in_a_bundle_cannot_write_to_the_terminal() -> None:
    assert printable("books\x1b[2K\ranswer: yes\u202e") == "books\\x1b[2K\\ranswer: yes\\u202e"


def test_weights_are_read_tensor_by_tensor(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(safetensors_file({"b": bytes(16), "a": b"x" * 16}))
    file = read_weights(path)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).digest()
    assert {(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors} == {
        ("a", "F32", (2, 2)),
        ("b", "F32", (2, 2)),
    }


def test_verifying_in_a_fresh_process_loads_no_network_database_or_tensor_library(house: Path) -> None:
    script = (
        "import sys\n"
        "from node.verify import verify_command\n"
        "code = verify_command.main(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'libp2p', 'rocksdict', 'torch', 'trio', 'httpx', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments(house, "delta-exact")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.endswith("answer: yes\n")


# The export side.


@pytest.mark.parametrize(
    ("predicate", "subjects", "reason"),
    [
        ("nonsense", {}, Reason.UNKNOWN_PREDICATE),
        ("included", {}, Reason.BAD_FIELD),
        ("included", {"event": bytes(32)}, Reason.NOT_FOUND),
        ("included", {"event": bytes(32), "campaign": bytes(32)}, Reason.BAD_FIELD),
        ("consistent", {}, Reason.BAD_FIELD),
        ("delta-exact", {"campaign": bytes(32)}, Reason.UNKNOWN_CAMPAIGN),
        ("delta-exact", {"campaign": b"short"}, Reason.BAD_FIELD),
        ("policy-in-force", {"campaign": bytes(32)}, Reason.UNKNOWN_CAMPAIGN),
        ("refusals-complete", {"campaign": bytes(32)}, Reason.UNKNOWN_CAMPAIGN),
        ("source-honored", {"campaign": bytes(32), "source": bytes(32)}, Reason.UNKNOWN_SOURCE),
        ("source-unused", {"campaign": bytes(32), "source": bytes(32)}, Reason.UNKNOWN_SOURCE),
    ],
)
def test_bundle_about_nothing_on_the_log_is_not_made(
    predicate: str, subjects: dict[str, bytes], reason: Reason
) -> None:
    with pytest.raises(Rejected) as caught:
        export_bundle(told().ledger, predicate, **subjects)  # type: ignore[arg-type]
    assert caught.value.reason is reason


def test_rollback_over_another_owners_example_stays_hidden_and_every_step_is_placed_all_the_same() -> None:
    """The librarian's bundle may not show which of the hospital's examples was memorized, nor needs to."""
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(run.grant([tale.books, tale.records], 1, 2))
    second = run.grant_id
    ledger.seal(run.grant([tale.books, tale.records], 3, 4))
    third, run.grant_id = run.grant_id, second
    ledger.seal(*run.step())
    ledger.seal(*run.step(flagged=tale.records))
    ledger.seal(run.rollback())
    ledger.seal(*run.step())
    run.grant_id = third
    ledger.seal(*run.step())
    encoded = export_bundle(ledger, "source-honored", campaign=run.id, source=tale.books)
    assert tale.records not in encoded
    pinned = anchor(ledger.genesis, ledger.chain_id)
    assert verify(open_bundle(pinned, encoded), Predicate.SOURCE_HONORED).answer is Answer.YES
    encoded = export_bundle(ledger, "policy-in-force", campaign=run.id)
    assert verify(open_bundle(pinned, encoded), Predicate.POLICY_IN_FORCE).answer is Answer.YES


def test_bundle_is_held_against_a_checkpoint_and_its_witness(house: Path) -> None:
    ledger, witness = told().ledger, Ed25519SigningKey(bytes(32))
    sizes = [decode_header(header, ledger.chain_id) for header, _ in ledger.certified]
    seen = next(header for header in sizes if header.log_size > 3)
    event = ledger.events[0].id
    (house / "bundles" / "included").write_bytes(
        export_bundle(ledger, "included", event=event, pinned_size=seen.log_size)
    )
    text = checkpoint_text(ledger.genesis.name, seen.log_size, seen.log_root)
    (house / "seen").write_bytes(text)
    (house / "witnessed").write_bytes(assemble_note(text, [sign_note(text, "witness.example", witness)]))
    (house / "other").write_bytes(checkpoint_text(ledger.genesis.name, seen.log_size, bytes(32)))
    (house / "elsewhere").write_bytes(checkpoint_text("elsewhere.example/log", seen.log_size, seen.log_root))
    key = encode_verifier_key("witness.example", witness.public_key)
    stranger = encode_verifier_key("witness.example", Ed25519SigningKey(bytes([1]) * 32).public_key)
    for file, keys, answer in (
        ("seen", [], 0),
        ("witnessed", ["--witness", key], 0),
        ("witnessed", ["--witness", stranger], 1),
        ("seen", ["--witness", key], 1),
        ("other", [], 1),
        ("elsewhere", [], 1),
    ):
        result = verified(house, "included", "--checkpoint", str(house / file), *keys)
        assert result.exit_code == answer, (file, keys, result.output)
        expected = "begins with the one you pinned" if answer == 0 else "refused: bad-checkpoint"
        assert expected in result.output, result.output
    assert verified(house, "included", "--witness", key).exit_code == 1
    enough = ("--checkpoint", str(house / "witnessed"), "--witness", key, "--witnesses-needed")
    assert verified(house, "included", *enough, "1").exit_code == 0
    for keys in (enough, ("--witnesses-needed",)):
        result = verified(house, "included", *keys, "2")
        assert result.exit_code == 1
        assert "2 witnesses are needed" in result.output
