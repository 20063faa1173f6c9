"""The command line: every command explains itself, errors are one line and an exit code, and a network made by
``network init`` runs, takes a claim, and proves it.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from fake_node import endless_node, running_node
from rocksdict import AccessType

from consensus.event import CheckedEvent, Kind, check_event
from consensus.identifiers import Role
from consensus.merkle import inclusion_proof_of, verify_inclusion
from consensus.overlap import OverlapIndex, overlaps
from consensus.portions import BandRule, BlockWeight, ClassRule, Policy, SourceClaim, content_leaf, content_salt
from consensus.rejection import Unavailable
from consensus.reserve import LOT_BITS, bound_of, reserved_among
from node.cli import COMMANDS, every_command, main
from node.client import NodeClient
from node.commands.content import measure, pieces_of, read_examples
from node.commands.log_disk import print_report
from node.commands.member import load_member
from node.commands.policy import read_policy
from node.commands.process import JsonLines
from node.fsck_reader import Report
from node.provision import MemberRequest, Provisioned, provision
from node.store import Store
from node.store_layout import open_database

POLICY = """
name = "trial-policy"
licences = ["CC-BY-4.0"]
purposes = ["research"]
memorization_threshold_permille = 900
maximum_grant_steps = 100
maximum_grant_duration_seconds = 600

[[class]]
name = "open"
default_weight_permille = 1000
blocks = { "block.0" = 250 }
"""
BAND = """
[[class.band]]
band = {band}
default_weight_permille = 0
blocks = {{ "block.0" = 125 }}
"""
CLAIM = ("--licence", "CC-BY-4.0", "--rights-basis", "licence", "--purpose", "research", "--class", "open")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="countersign")


def refused(exit_code: int, message: str, *arguments: str | Path) -> None:
    """One line on standard error, no traceback, this exit code."""
    result = run(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert message in result.stderr
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def networks(directory: Path, *, second_governance: bool = False) -> Provisioned:
    requests = [
        MemberRequest("library", Role.DATA_SOURCE),
        MemberRequest("council", Role.GOVERNANCE),
        MemberRequest("laboratory", Role.OPERATOR),
    ]
    if second_governance:
        requests.append(MemberRequest("senate", Role.GOVERNANCE))
    return provision(directory / "net", "trial.example/log", requests, created_ms=1_800_000_000_000)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Provisioned:
    return networks(tmp_path_factory.mktemp("cli"), second_governance=True)


def event_in(path: Path, config: Path) -> CheckedEvent:
    return check_event(path.read_bytes(), load_member(config).committee)


# Help


def test_every_command_says_what_it_does_and_every_option_what_it_is_for() -> None:
    for name, command in every_command():
        assert command.help, name
        assert command.help.strip()[0].isupper(), name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"
        if not isinstance(command, click.Group):
            assert name in command.help, f"{name}: expected an example in its help"


def test_the_overview_lists_every_command_in_the_words_of_its_own_help() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name, lazy in COMMANDS.items():
        assert name in result.output
        assert lazy.summary in result.output


def test_unknown_commands_and_options_are_usage_errors() -> None:
    assert run("nonsense").exit_code == 2
    assert run("log", "show", "--nonsense").exit_code == 2
    assert run("source", "revoke", "--config", "x", "ABC", "--reason", "y").exit_code == 2
    assert run("log", "prove", "--config", "x", "--out", "y").exit_code == 2


# Surroundings


def process(*arguments: str | bytes | Path, stdout: int, **environment: str) -> subprocess.Popen[bytes]:
    # Tests that run in the background inherit an interrupt that is ignored.
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{begin}; from node.cli import main; main(prog_name='countersign')", *arguments]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, cwd=root, env={**os.environ, **environment})


@pytest.mark.parametrize("arguments", [("network", "--help"), ("verify", "--help")])
def test_output_that_nobody_reads_any_more_ends_a_command_quietly_and_is_no_answer(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    asked = process(*arguments, stdout=writing)
    os.close(writing)
    assert (asked.communicate(timeout=60)[1], asked.returncode) == (b"", 141)


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("log", "--help")])
def test_a_full_disk_under_the_output_is_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        asked = process(*arguments, stdout=full.fileno())
        errors = asked.communicate(timeout=60)[1]
    assert (errors, asked.returncode) == (b"error: file: input or output: No space left on device\n", 2)


def test_interrupting_a_command_is_no_answer(answering: tuple[str, dict[str, tuple[int, bytes]]]) -> None:
    url, table = answering
    table["/v1/events"] = (200, b'{"events": [], "next": null}')
    asked = process("log", "show", "--url", url, "--follow", stdout=subprocess.PIPE)
    assert asked.stdout is not None
    try:
        asked.stdout.readline()
        asked.send_signal(signal.SIGINT)
        assert asked.communicate(timeout=60)[1] == b"error: interrupted\n"
    finally:
        asked.kill()
        asked.communicate()
    assert asked.returncode == 130


def test_names_that_are_not_utf_8_are_told_in_escapes_or_refused_in_one_line(consortium: Provisioned) -> None:
    member = consortium.members["library"]
    odd = os.fsencode(member.directory) + b"/\xff.toml"
    Path(os.fsdecode(odd)).write_bytes(member.config.read_bytes())
    asked = process("node", "run", "--check", "--config", odd, stdout=subprocess.PIPE, PYTHONIOENCODING="utf-8:strict")
    output, errors = asked.communicate(timeout=60)
    assert (asked.returncode, errors) == (0, b"")
    assert b"\\udcff.toml: library" in output
    asked = process("node", "status", "--url", b"http://127.0.0.1:1/\xff", stdout=subprocess.PIPE)
    assert b"error: text: expected UTF-8" in asked.communicate(timeout=60)[1]
    assert asked.returncode == 2


# Extras

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"httpx", "trio", "libp2p", "rocksdict", "hypercorn", "starlette", "torch",
                                      "prometheus_client", "rich", "numpy", "multiaddr"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from node.cli import main
main(sys.argv[1:], prog_name="countersign")
"""


def without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_verify_and_network_init_need_no_extra_and_the_others_say_which(tmp_path: Path) -> None:
    assert without_extras("--help").returncode == 0
    assert without_extras("verify", "--help").returncode == 0
    init = without_extras(
        "network", "init", "--out", str(tmp_path / "net"), "--name", "trial.example/log",
        "--member", "a:data-source", "--member", "b:governance", "--member", "c:operator",
    )  # fmt: skip
    assert init.returncode == 0, init.stderr
    listed = without_extras("source", "list", "--url", "http://127.0.0.1:1")
    assert listed.returncode == 2
    assert listed.stderr == "error: this command needs the node extra: pip install 'countersign[node]'\n"


# network init


def test_network_init_prints_chain_id_and_what_each_role_bears(tmp_path: Path) -> None:
    members = [f"--member={role}-{n}:{role}" for role in ("data-source", "governance", "operator") for n in range(4)]
    result = run("network", "init", "--out", tmp_path / "net", "--name", "trial.example/log", *members)
    assert result.exit_code == 0, result.output
    assert "data-source  4        3       1                    2                   1" in result.output
    assert "tolerates no silent node" not in result.output
    assert "key ceremony" in result.output


def test_network_init_warns_of_a_role_that_tolerates_no_silent_node(tmp_path: Path) -> None:
    members = ("--member", "a:data-source", "--member", "b:governance", "--member", "c:operator")
    result = run("network", "init", "--out", tmp_path / "net", "--name", "x", *members)
    assert result.output.count("tolerates no silent node") == 3
    as_json = run("network", "init", "--out", tmp_path / "more", "--name", "x", *members, "--json")
    document = json.loads(as_json.stdout)
    assert document["tolerances"][0] == {
        "role": "data-source", "members": 1, "threshold": 1, "agreement": 0, "validity": 0, "liveness": 0,
    }  # fmt: skip
    genesis = json.loads((tmp_path / "more" / "genesis.json").read_text())
    assert [member["name"] for member in genesis["members"]] == ["a", "b", "c"]


def test_network_init_refuses_what_makes_no_network(tmp_path: Path) -> None:
    out = ("network", "init", "--name", "x", "--out", tmp_path / "net")
    assert run(*out, "--member", "a:king").exit_code == 2
    assert run(*out, "--member", "a").exit_code == 2
    assert run(*out, "--member", "a:operator:host").exit_code == 2
    assert run(*out, "--member", "a:operator", "--threshold", "operator=x").exit_code == 2
    refused(2, "at least one data-source", *out, "--member", "a:operator")
    assert not (tmp_path / "net").exists()


# node


def test_node_run_check_accepts_a_provisioned_member_and_names_what_is_wrong(consortium: Provisioned) -> None:
    member = consortium.members["library"]
    result = run("node", "run", "--config", member.config, "--check")
    assert (result.exit_code, "ready" in result.output) == (0, True)
    wrong = member.directory / "wrong.toml"
    wrong.write_text(member.config.read_text().replace(consortium.chain_id.hex(), "ab" * 32))
    refused(2, "expected the genesis of chain abab", "node", "run", "--config", wrong, "--check")
    wrong.write_text(member.config.read_text().replace('"keystore.json"', '"../council/keystore.json"'))
    refused(2, "passphrase does not open", "node", "run", "--config", wrong, "--check")
    refused(2, "expected a configuration file", "node", "run", "--config", member.directory / "none.toml")


def test_node_run_check_knows_a_member_that_joins_later_and_a_data_directory_that_is_none(tmp_path: Path) -> None:
    member = networks(tmp_path).members["library"]
    config = member.config.read_text()
    later = member.directory / "archive.toml"
    later.write_text(config.replace('name = "library"', 'name = "archive"'))
    refused(2, "node.name: expected a member of the genesis", "node", "run", "--config", later, "--check")
    (member.directory / "keystore.epoch-1.json").write_bytes(member.keystore.read_bytes())
    (member.directory / "keystore.epoch-1.json").chmod(0o600)
    result = run("node", "run", "--config", later, "--check")
    assert (result.exit_code, "archive, a member of a later epoch" in result.output) == (0, True)
    later.write_text(config.replace('data_directory = "data"', 'data_directory = "passphrase"'))
    for check in (("--check",), ()):
        refused(2, "passphrase: expected a folder, or nothing yet", "node", "run", "--config", later, *check)


def test_a_passphrase_of_any_bytes_may_stand_in_the_environment(
    consortium: Provisioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = consortium.members["library"]
    lines = member.config.read_text().splitlines(keepends=True)
    config = member.directory / "environment.toml"
    config.write_text("".join(line for line in lines if not line.startswith("passphrase_file")))
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", os.fsdecode(b"\xff\xfe"))
    refused(2, "the passphrase does not open this keystore", "node", "run", "--config", config, "--check")


def test_a_token_that_no_header_can_hold_is_refused_and_never_printed(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    for token in ("secret-one\nsecret-two", "secret-ü", ""):
        token_file.write_text(token)
        token_file.chmod(0o600)
        asked = ("node", "status", "--url", "http://127.0.0.1:1", "--token-file", token_file)
        refused(2, "expected one API token, of visible ASCII characters alone", *asked)
        assert "secret" not in run(*asked).output


def test_a_node_that_does_not_answer_is_not_known_rather_than_no(consortium: Provisioned) -> None:
    refused(2, "unavailable: the node at", "node", "status", "--config", consortium.members["library"].config)
    refused(2, "found neither", "node", "status")
    refused(2, "expected a node's address", "node", "status", "--url", "ftp://somewhere")


def test_who_takes_part_is_not_known_from_a_node_that_does_not_answer(consortium: Provisioned, tmp_path: Path) -> None:
    config = ("--config", consortium.members["library"].config)
    refused(2, "unavailable: the node at", "membership", "show", *config)
    refused(2, "unavailable: the node at", "membership", "invite", tmp_path / "f", *config)
    refused(2, "unavailable: the node at", "membership", "refresh", tmp_path / "f", *config)
    assert not (tmp_path / "f").exists()


def test_a_node_whose_port_is_taken_says_so_in_one_line(tmp_path: Path) -> None:
    consortium = networks(tmp_path)
    library, council = consortium.members["library"], consortium.members["council"]
    with socket.create_server((library.network.host, library.network.port)):
        refused(2, f"network.listen: cannot listen on {library.network}", "node", "run", "--config", library.config)
    with socket.create_server((council.api.host, council.api.port)):
        refused(2, f"api.listen: cannot listen on {council.api}", "node", "run", "--config", council.config)


def test_a_bundle_is_asked_for_with_what_its_predicate_is_about(consortium: Provisioned, tmp_path: Path) -> None:
    prove = ("log", "prove", "--config", consortium.members["library"].config, "--out", tmp_path / "b", "--predicate")
    for predicate, given, message in (
        ("evidence", (), "--predicate evidence: expected --event beside it, found none"),
        ("evidence", ("--campaign", "ab" * 32), "expected --event beside it, found --campaign"),
        ("source-unused", (), "expected --campaign and --source beside it, found none"),
        ("consistent", (), "expected --earlier beside it, found none"),
    ):
        asked = run(*prove, predicate, *given)
        assert (asked.exit_code, message in asked.stderr) == (2, True), asked.stderr


# source


def sign_source(consortium: Provisioned, content: Path, out: Path, *options: str) -> Result:
    config = consortium.members["library"].config
    out.unlink(missing_ok=True)
    return run("source", "sign", "--config", config, "--content", content, "--out", out, *options)


def test_a_claim_commits_to_the_examples_by_salts_that_show_one_at_a_time(
    consortium: Provisioned, tmp_path: Path
) -> None:
    content, out, salt_file = tmp_path / "text.txt", tmp_path / "claim.event", tmp_path / "sonnets.salt"
    content.write_bytes(b"one\ntwo\r\n\nthree")
    options = ("--name", "sonnets", "--lines", "--salt-file", str(salt_file), *CLAIM)
    result = sign_source(consortium, content, out, *options)
    assert result.exit_code == 0, result.output
    assert stat.S_IMODE(salt_file.stat().st_mode) == 0o600
    claim = event_in(out, consortium.members["library"].config).items[0]
    assert isinstance(claim, SourceClaim)
    assert (claim.example_count, claim.size_bytes, claim.name) == (3, 11, "sonnets")
    salt = bytes.fromhex(salt_file.read_text())
    leaves = [content_leaf(content_salt(salt, at), text) for at, text in enumerate((b"one", b"two", b"three"))]
    verify_inclusion(leaves[1], 1, 3, inclusion_proof_of(leaves, 1), claim.content_root)
    again = sign_source(consortium, content, tmp_path / "again.event", *options)
    assert again.exit_code == 0
    renewed = event_in(tmp_path / "again.event", consortium.members["library"].config).items[0]
    assert isinstance(renewed, SourceClaim)
    assert renewed.content_root == claim.content_root


def test_a_claim_names_the_overlap_index_of_its_examples_whose_key_is_kept_beside_it(
    consortium: Provisioned, tmp_path: Path
) -> None:
    content, out, index_path = tmp_path / "text.txt", tmp_path / "claim.event", tmp_path / "sonnets.overlap"
    line = b"Shall I compare thee to a summer's day? Thou art more lovely and more temperate"
    content.write_bytes(b"another line that is long enough to have a fingerprint\n" + line)
    options = ("--name", "sonnets", "--lines", "--salt-file", str(tmp_path / "sonnets.salt"), *CLAIM)
    result = sign_source(consortium, content, out, *options, "--overlap", str(index_path))
    assert result.exit_code == 0, result.output
    claim = event_in(out, consortium.members["library"].config).items[0]
    assert isinstance(claim, SourceClaim)
    assert claim.overlap_sha256 == hashlib.sha256(index_path.read_bytes()).digest()
    key_path = tmp_path / "sonnets.overlap.key"
    for path in (index_path, key_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    index, key = OverlapIndex(index_path.read_bytes()), bytes.fromhex(key_path.read_text())
    (found,) = overlaps(index, key, b"it said: " + line)
    assert (found.example, index.header.examples) == (1, 2)
    assert found.longest.length > 50
    assert bytes.fromhex((tmp_path / "sonnets.salt").read_text()) not in (key, index_path.read_bytes())


@pytest.mark.parametrize(("asked", "expected"), [("auto", 32), ("7", 7), ("0", 0), (None, 0)])
def test_a_claim_keeps_so_many_examples_in_reserve_as_asked_for(
    consortium: Provisioned, tmp_path: Path, asked: str | None, expected: int
) -> None:
    content, out = tmp_path / "text.txt", tmp_path / "claim.event"
    content.write_bytes(b"".join(b"line %d\n" % number for number in range(100)))
    options = ("--name", "sonnets", "--lines", "--salt-file", str(tmp_path / "sonnets.salt"), *CLAIM)
    result = sign_source(consortium, content, out, *options, *(("--reserve", asked) if asked else ()))
    assert result.exit_code == 0, result.output
    assert (f"{expected} of the examples are the reserve" in result.output) is bool(expected)
    claim = event_in(out, consortium.members["library"].config).items[0]
    assert isinstance(claim, SourceClaim)
    assert len(reserved_among(claim, range(100))) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", "reserve: expected at most half of 63 examples, found 32"),
        ("32", "reserve: expected at most half of 63 examples, found 32"),
        ("-1", "reserve: expected a number of examples or auto, found '-1'"),
        ("2%", "reserve: expected a number of examples or auto, found '2%'"),
    ],
)
def test_a_reserve_that_leaves_too_little_of_a_source_is_refused_by_name(
    consortium: Provisioned, tmp_path: Path, asked: str, expected: str
) -> None:
    content, out = tmp_path / "text.txt", tmp_path / "claim.event"
    content.write_bytes(b"".join(b"line %d\n" % number for number in range(63)))
    options = ("--name", "sonnets", "--lines", "--salt-file", str(tmp_path / "sonnets.salt"), *CLAIM)
    result = sign_source(consortium, content, out, *options, "--reserve", asked)
    assert (result.exit_code, expected in result.stderr) == (2, True), result.stderr
    assert not out.exists()


def test_examples_are_files_pieces_lines_or_json_fields(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "z.txt").write_bytes(b"12345")
    (folder / "a.txt").write_bytes(b"678")
    assert list(read_examples([folder], pieces_of(2))) == [b"67", b"8", b"12", b"34", b"5"]
    measured = measure(read_examples([folder], pieces_of(2)), bytes(32))
    assert (measured.example_count, measured.size_bytes) == (5, 8)
    many = measure((b"%d" % number for number in range(10_000)), bytes(32))
    assert many.example_count == 10_000


def test_jsonl_fields_become_examples_and_bad_records_are_named(consortium: Provisioned, tmp_path: Path) -> None:
    content, out = tmp_path / "records.jsonl", tmp_path / "claim.event"
    options = ("--name", "records", "--jsonl", "text", "--salt-file", str(tmp_path / "s"), *CLAIM)
    content.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert sign_source(consortium, content, out, *options).exit_code == 0
    content.write_text('{"text": "one"}\n{"words": "two"}\n')
    result = sign_source(consortium, content, out, *options)
    assert (result.exit_code, "record 2" in result.stderr) == (2, True)


def test_a_claim_file_gives_what_options_do_not(consortium: Provisioned, tmp_path: Path) -> None:
    claim_path, out = tmp_path / "claim.toml", tmp_path / "claim.event"
    claim_path.write_text(
        'name = "poems"\nlicence = "CC0-1.0"\nrights_basis = "ownership"\npurposes = ["research"]\n'
        'class = "open"\nvalid_days = 30\nstatement = "ours"\n'
    )
    (tmp_path / "poem.txt").write_bytes(b"a whole file")
    options = ("--claim", str(claim_path), "--licence", "CC-BY-4.0", "--salt-file", str(tmp_path / "s"))
    assert sign_source(consortium, tmp_path / "poem.txt", out, *options).exit_code == 0
    claim = event_in(out, consortium.members["library"].config).items[0]
    assert isinstance(claim, SourceClaim)
    assert (claim.name, claim.licence, claim.statement, claim.example_count) == ("poems", "CC-BY-4.0", "ours", 1)
    assert claim.valid_until_ms - claim.valid_from_ms == 30 * 86_400_000 + 60_000
    claim_path.write_text("licens = 3")
    assert sign_source(consortium, tmp_path / "poem.txt", out, *options).exit_code == 2


def test_a_claim_without_its_terms_by_the_wrong_member_or_without_examples_is_refused(
    consortium: Provisioned, tmp_path: Path
) -> None:
    content, out = tmp_path / "text.txt", tmp_path / "claim.event"
    content.write_bytes(b"text")
    library = ("source", "sign", "--config", consortium.members["library"].config, "--out", out)
    salt = ("--salt-file", tmp_path / "s")
    refused(2, "a claim needs licence, rights-basis, purposes, class", *library, "--content", content, "--name", "x")
    council = ("source", "sign", "--config", consortium.members["council"].config, "--out", out)
    refused(2, "signed by a data-source member", *council, "--content", content, "--name", "x", *salt, *CLAIM)
    (tmp_path / "empty").mkdir()
    refused(2, "empty directory", *library, "--content", tmp_path / "empty", "--name", "x", *salt, *CLAIM)
    refused(2, "readable file", *library, "--content", tmp_path / "none", "--name", "x", *salt, *CLAIM)
    assert run(*library[:-2], "--content", content, "--name", "x", *salt, *CLAIM).exit_code == 2
    both = run(*library, "--content", content, "--name", "x", "--lines", "--jsonl", "f", *salt, *CLAIM)
    assert both.exit_code == 2
    assert not out.exists()


# policy


def test_a_policy_is_signed_by_one_member_after_the_other(consortium: Provisioned, tmp_path: Path) -> None:
    council, senate = consortium.members["council"].config, consortium.members["senate"].config
    policy_path, first, second = tmp_path / "policy.toml", tmp_path / "first.event", tmp_path / "second.event"
    policy_path.write_text(POLICY)
    started = run("policy", "sign", "--config", council, "--policy", policy_path, "--out", first)
    assert started.exit_code == 0, started.output
    assert "1 more governance members must sign" in started.output
    added = run("policy", "sign", "--config", senate, "--event", first, "--out", second)
    assert "signed by council, senate" in added.output
    event = event_in(second, council)
    assert event.entry.kind is Kind.POLICY
    assert isinstance(event.governance, Policy)
    assert event.governance.maximum_grant_duration_ms == 600_000
    assert event.governance.classes[0].blocks[0].weight_permille == 250
    early = run("policy", "sign", "--config", council, "--policy", policy_path, "--submit")
    assert (early.exit_code, "missing-signature" in early.stderr) == (1, True)


def test_no_command_writes_over_a_file_but_the_event_that_it_adds_to(consortium: Provisioned, tmp_path: Path) -> None:
    council, senate = consortium.members["council"], consortium.members["senate"]
    policy_path, event = tmp_path / "policy.toml", tmp_path / "policy.event"
    policy_path.write_text(POLICY)
    keystore = council.keystore.read_bytes()
    new = ("policy", "sign", "--config", council.config, "--policy", policy_path, "--out")
    taken = run(*new, council.keystore)
    assert (taken.exit_code, "nothing is overwritten" in taken.stderr) == (2, True)
    assert run(*new, event).exit_code == 0
    again = run(*new, event)
    assert (again.exit_code, "nothing is overwritten" in again.stderr) == (2, True)
    assert run("policy", "sign", "--config", senate.config, "--event", event, "--out", event).exit_code == 0
    assert event_in(event, council.config).signers == {
        consortium_id(consortium, name) for name in ("council", "senate")
    }
    content, overlap = tmp_path / "text", tmp_path / "text.overlap"
    content.write_bytes(b"a line that is long enough to have a fingerprint of its own")
    claim = ("--name", "x", "--salt-file", str(tmp_path / "salt"), *CLAIM)
    lost = sign_source(consortium, content, tmp_path / "claim.event", *claim, "--overlap", str(council.keystore))
    assert (lost.exit_code, "nothing is overwritten" in lost.stderr) == (2, True)
    for _ in range(2):
        made = sign_source(consortium, content, tmp_path / "claim.event", *claim, "--overlap", str(overlap))
        assert made.exit_code == 0, made.output
    delegate = ("job", "delegate", "--config", consortium.members["laboratory"].config, "--campaign", "c")
    refused(2, "nothing is overwritten", *delegate, "--hours", "1", "--out", council.keystore)
    prove = ("log", "prove", "--config", council.config, "--out", council.keystore)
    refused(2, "nothing is overwritten", *prove, "ab" * 32)
    assert council.keystore.read_bytes() == keystore


def consortium_id(consortium: Provisioned, name: str) -> bytes:
    return next(member.id for member in consortium.genesis.members if member.name == name)


def test_files_that_are_no_events_are_named(consortium: Provisioned, tmp_path: Path) -> None:
    path, config = tmp_path / "x.event", consortium.members["council"].config
    for content in (b"", b"\xff", bytes(100)):
        path.write_bytes(content)
        refused(1, f"malformed: {path}: not a SignedEvent", "log", "submit", "--config", config, path)
        member = ("membership", "sign", "--config", config, "--out", tmp_path / "y")
        refused(1, f"malformed: {path}: not a SignedEvent", *member, "--event", path)
        refused(1, f"malformed: {path}: not a Membership", *member, "--membership", path)
    assert not (tmp_path / "y").exists()


def test_rules_by_entropy_band_are_read_beside_those_of_their_class(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("entropy_edges_milli = [1500, 3000]\n" + POLICY + BAND.format(band=0) + BAND.format(band=2))
    found = read_policy(path)
    weights = (BlockWeight("block.0", 125),)
    bands = (BandRule(0, 0, weights), BandRule(2, 0, weights))
    assert found.classes == (ClassRule("open", 1_000, (BlockWeight("block.0", 250),), bands),)
    assert found.entropy_edges_milli == (1_500, 3_000)


def test_what_is_no_policy_or_no_policy_event_is_refused(consortium: Provisioned, tmp_path: Path) -> None:
    sign = ("policy", "sign", "--config", consortium.members["council"].config, "--out", tmp_path / "out.event")
    policy_path, content, claim = tmp_path / "policy.toml", tmp_path / "text", tmp_path / "claim.event"
    policy_path.write_text(POLICY.replace("licences", "licenses"))
    refused(2, "unknown field `licenses`", *sign, "--policy", policy_path)
    policy_path.write_text('revocation = "perhaps"\n' + POLICY)
    refused(2, f"{policy_path}: bad-field: revocation is 'perhaps'", *sign, "--policy", policy_path)
    policy_path.write_text('momentum = "keep"\n' + POLICY)
    refused(2, f"{policy_path}: bad-field: momentum is 'keep'", *sign, "--policy", policy_path)
    policy_path.write_text("entropy_edges_milli = [3000, 1500]\n" + POLICY)
    refused(2, f"{policy_path}: bad-field: edges of entropy bands: expected rising", *sign, "--policy", policy_path)
    policy_path.write_text("entropy_edges_milli = [0.5]\n" + POLICY)
    refused(2, "Expected `int`, got `float`", *sign, "--policy", policy_path)
    policy_path.write_text("entropy_edges_milli = [1500]\n" + POLICY + BAND.format(band=2))
    refused(2, f"{policy_path}: bad-field: class open has rules for entropy bands (2,)", *sign, "--policy", policy_path)
    policy_path.write_text(POLICY + BAND.format(band=0))
    refused(2, f"{policy_path}: bad-field: class open has rules for entropy bands (0,)", *sign, "--policy", policy_path)
    policy_path.write_text("entropy_edges_milli = [1500]\n" + POLICY + BAND.format(band=1).replace("blocks", "block"))
    refused(2, "unknown field `block`", *sign, "--policy", policy_path)
    for number in ("1001", "-1", str(10**30)):
        policy_path.write_text(re.sub("default_weight_permille = .*", f"default_weight_permille = {number}", POLICY))
        refused(2, f"error: config: {policy_path}: ", *sign, "--policy", policy_path)
    content.write_bytes(b"x")
    options = ("--name", "x", "--salt-file", str(tmp_path / "s"), *CLAIM)
    assert sign_source(consortium, content, claim, *options).exit_code == 0
    refused(2, "expected a policy event, found a source event", *sign, "--event", claim)
    claim.write_bytes(b"\xff")
    refused(1, "malformed", *sign, "--event", claim)
    assert run(*sign).exit_code == 2


# A node's answers


@pytest.fixture
def answering() -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """An HTTP server on loopback that answers what a test puts into its table, 404 without a reason otherwise."""
    table: dict[str, tuple[int, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = table.get(self.path.partition("?")[0], (404, b"nothing"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", table
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_refusal_keeps_the_nodes_reason_and_an_overloaded_node_is_not_a_no(
    answering: tuple[str, dict[str, tuple[int, bytes]]],
) -> None:
    url, table = answering
    table["/v1/policy"] = (404, b'{"error": "not-found", "detail": "no policy is in force"}')
    refused(1, "not-found: no policy is in force", "policy", "show", "--url", url)
    table["/v1/policy"] = (503, b'{"error": "overloaded", "detail": "later"}')
    refused(2, "unavailable: the node at", "policy", "show", "--url", url)
    table["/v1/policy"] = (200, b"<html>")
    refused(2, "not understood", "policy", "show", "--url", url)
    refused(2, "is it a Countersign node?", "source", "list", "--url", url)
    nested = b'{"error": "x", "more": ' + b"[" * 200_000
    table["/v1/policy"] = (200, nested)
    refused(2, "not understood", "policy", "show", "--url", url)
    table["/v1/policy"] = (502, nested)
    refused(2, "is it a Countersign node?", "policy", "show", "--url", url)
    table["/v1/events"] = (200, b'{"events": [], "next": 0}')
    with NodeClient(url) as client, pytest.raises(Unavailable, match="the page after 0 begins at 0"):
        list(client.every_event({}))
    table["/v1/policy"] = (401, b'{"error": "unauthorized", "detail": "token"}')
    refused(1, "unauthorized", "policy", "show", "--url", url)


def test_an_answer_that_never_ends_and_one_that_is_coded_are_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.client.LONGEST_BODY_SECONDS", 0.3)
    with endless_node("drip") as url, NodeClient(url) as client, pytest.raises(Unavailable, match=r"more than 0\.3 s"):
        client.checkpoint()
    monkeypatch.undo()
    with running_node() as node, NodeClient(node.url) as client:
        coded = gzip.compress(bytes(1 << 20))
        node.answers = [(200, {"Content-Encoding": "gzip"}, coded)]
        assert client.checkpoint() == coded


def test_an_event_that_is_not_final_yet_is_neither_a_yes_nor_a_no(
    consortium: Provisioned, answering: tuple[str, dict[str, tuple[int, bytes]]], tmp_path: Path
) -> None:
    url, table = answering
    table["/v1/events"] = (202, json.dumps({"id": "ab" * 32, "status": "pending"}).encode())
    configs = {}
    for name in ("library", "laboratory"):
        member = consortium.members[name]
        configs[name] = member.directory / "waiting.toml"
        configs[name].write_text(member.config.read_text().replace(str(member.api), url.removeprefix("http://")))
    revoke = ("source", "revoke", "--config", configs["library"], "ab" * 32, "--reason", "consent withdrawn")
    assert run(*revoke[:-1], " ").exit_code == 2
    waits = run(*revoke)
    assert (waits.exit_code, "pending" in waits.stdout, waits.stderr) == (2, True, "")
    as_json = run(*revoke, "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)["status"]) == (2, "pending")
    key = tmp_path / "job-key.json"
    delegate = ("job", "delegate", "--config", configs["laboratory"], "--campaign", "c", "--out", key, "--hours")
    assert run(*delegate, "nan").exit_code == 2
    assert not key.exists()
    delegated = run(*delegate, "1")
    assert (delegated.exit_code, "pending" in delegated.stdout, key.exists()) == (2, True, True)


def test_what_others_wrote_reaches_a_terminal_with_its_control_characters_spelled_out(
    answering: tuple[str, dict[str, tuple[int, bytes]]],
) -> None:
    url, table = answering
    row = {
        "id": "ef" * 32, "name": "\x1b[31mred\u202e", "author": "01" * 32, "author_name": "library",
        "licence": "CC-BY-4.0", "purposes": ["research"], "class": "open",
    }  # fmt: skip
    table["/v1/sources"] = (200, json.dumps({"sources": [row]}).encode())
    assert "\\x1b[31mred\\u202e" in run("source", "list", "--url", url).output
    assert json.loads(run("source", "list", "--url", url, "--json").stdout)[0]["name"] == row["name"]
    table["/v1/policy"] = (404, json.dumps({"error": "not-found", "detail": "no \x1b[31mpolicy"}).encode())
    refused(1, "no \\x1b[31mpolicy", "policy", "show", "--url", url)


def test_many_large_sources_with_reserves_do_not_hold_up_the_list(
    answering: tuple[str, dict[str, tuple[int, bytes]]],
) -> None:
    url, table = answering
    counts = (400_000, 300_000, 200_000, 999_999, 2_000_000, 600_000)
    rows = [
        {
            "id": "ef" * 32, "name": f"source-{count}", "author": "01" * 32, "author_name": "library",
            "licence": "CC-BY-4.0", "purposes": ["research"], "class": "open", "example_count": count,
            "content_root": "ab" * 32, "reserve_below": 1,
        }
        for count in counts
    ]  # fmt: skip
    table["/v1/sources"] = (200, json.dumps({"sources": rows}).encode())
    listed = json.loads(run("source", "list", "--url", url, "--json").stdout)
    counted = [row["example_count"] for row in listed if row["reserve_counted"]]
    assert counted == [400_000, 300_000, 200_000], "the smallest, of a million examples together"
    lines = run("source", "list", "--url", url).output.splitlines()[1:]
    assert [line.split(" open ")[1].split()[1] for line in lines] == ["none"] * 3 + ["about"] * 3


def test_grants_and_sources_print_as_tables_and_as_json(answering: tuple[str, dict[str, tuple[int, bytes]]]) -> None:
    url, table = answering
    grant = {
        "id": "ab" * 32, "campaign": "cd" * 32, "status": "gathering", "signers": ["laboratory"],
        "missing": ["library"], "refusals": [{"member": "library", "error": "source-revoked", "detail": "it was"}],
    }  # fmt: skip
    table["/v1/grants"] = (200, json.dumps({"grants": [grant]}).encode())
    root = hashlib.sha256(b"content").digest()
    counts, bounds = (100, 100, 10_000_000), (0, bound_of(root, 100, 32), 1 << (LOT_BITS - 1))
    rows = [
        {
            "id": "ef" * 32, "name": f"source-{count}", "author": "01" * 32, "author_name": "library",
            "licence": "CC-BY-4.0", "purposes": ["research"], "class": "open", "example_count": count,
            "content_root": root.hex(), "reserve_below": bound, "revoked_at_ms": 0,
        }
        for count, bound in zip(counts, bounds, strict=True)
    ]  # fmt: skip
    table["/v1/sources"] = (200, json.dumps({"sources": rows}).encode())
    listed = run("source", "list", "--url", url).output.splitlines()
    assert listed[0].split()[-3:] == ["examples", "reserve", "revoked"]
    assert [line.split(" open ")[1].split() for line in listed[1:]] == [
        ["100", "none", "no"], ["100", "32", "no"], ["10000000", "about", "5000000", "no"],
    ]  # fmt: skip
    listed_json = json.loads(run("source", "list", "--url", url, "--json").stdout)
    assert [(row["reserve"], row["reserve_counted"]) for row in listed_json] == [
        (0, True), (32, True), (5_000_000, False),
    ]  # fmt: skip
    for lie in ({"content_root": "f"}, {"reserve_below": 1 << 60}, {"example_count": -1}):
        table["/v1/sources"] = (200, json.dumps({"sources": [{**rows[0], **lie}]}).encode())
        result = run("source", "list", "--url", url)
        assert result.exit_code == 2
        assert next(iter(lie)) in result.output
    table[f"/v1/grants/{'ab' * 32}"] = (200, json.dumps(grant).encode())
    assert "laboratory  library" in run("grant", "list", "--url", url).output
    shown = run("grant", "show", "--url", url, "ab" * 32).output
    assert "library refuses: source-revoked: it was" in shown
    assert json.loads(run("grant", "show", "--url", url, "ab" * 32, "--json").stdout) == grant


# Real processes


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from node.cli import main; main()", "node", "run", "--config", str(config)]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2])


def wait_until_voting(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 60.0) -> None:
    """Until the node has a ledger block."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        result = run("node", "status", "--url", url, "--json")
        if result.exit_code == 0 and json.loads(result.stdout)["height"] > 0:
            return
        time.sleep(0.2)
    raise AssertionError(f"{url}: no ledger block; {log.read_text()[-2_000:]}")


def check_whole_path(directory: Path, configs: dict[str, Path], chain_id: str) -> None:
    """Policy, claim, delegation, revocation; then proofs of them by the command line alone."""
    (directory / "policy.toml").write_text(POLICY)
    (directory / "text.txt").write_text("one\ntwo\n")
    done = run("policy", "sign", "--config", configs["council"], "--policy", directory / "policy.toml", "--submit")
    assert done.exit_code == 0, done.output
    signed = run(
        "source", "sign", "--config", configs["library"], "--name", "sonnets", "--content", directory / "text.txt",
        "--lines", "--salt-file", directory / "salt", *CLAIM, "--submit", "--json",
    )  # fmt: skip
    assert signed.exit_code == 0, signed.output
    claim = json.loads(signed.stdout)
    assert (claim["status"], claim["index"]) == ("final", 1)

    receipt, bundle = directory / "claim.receipt", directory / "claim.bundle"
    prove = ("log", "prove", "--config", configs["laboratory"])
    proved = run(*prove, claim["id"], "--out", receipt, "--json")
    assert json.loads(proved.stdout)["log_index"] == 1
    assert run(*prove, "--predicate", "included", "--event", claim["id"], "--out", bundle).exit_code == 0
    verify = ("verify", "included", "--bundle", bundle, "--genesis", directory / "net" / "genesis.json", "--chain-id")
    assert run(*verify, chain_id).exit_code == 0
    assert run(*verify, "ab" * 32).exit_code == 1
    refused(1, "not-found", *prove, "ab" * 32, "--out", directory / "none.receipt")

    delegated = run(
        "job", "delegate", "--config", configs["laboratory"], "--campaign", "c", "--hours", "1",
        "--out", directory / "job-key.json", "--scheme", "ml-dsa-65",
    )  # fmt: skip
    assert delegated.exit_code == 0, delegated.output
    key_file = json.loads((directory / "job-key.json").read_text())
    assert sorted(key_file) == [
        "campaign", "chain_id", "expires_at_ms", "job_key_scheme", "job_key_seed", "node_url", "operator",
    ]  # fmt: skip
    assert key_file["job_key_scheme"] == "ml-dsa-65"
    assert stat.S_IMODE((directory / "job-key.json").stat().st_mode) == 0o600

    revoke = ("source", "revoke", "--config", configs["library"], claim["id"], "--reason", "consent withdrawn")
    assert run(*revoke).exit_code == 0
    refused(1, "duplicate", *revoke)
    listed = run("log", "show", "--config", configs["council"], "--json")
    kinds = [json.loads(line)["kind"] for line in listed.stdout.splitlines()]
    assert kinds == ["policy", "source", "delegation", "revocation"]
    assert len(run("log", "show", "--config", configs["council"], "--kind", "source").stdout.splitlines()) == 2
    assert len(run("log", "show", "--config", configs["council"], "--limit", "3").stdout.splitlines()) == 4
    assert "liveness 0" in run("node", "status", "--config", configs["council"]).stdout
    sources = json.loads(run("source", "list", "--config", configs["council"], "--json").stdout)
    assert [(row["name"], row["revoked_at_ms"] > 0) for row in sources] == [("sonnets", True)]
    assert json.loads(run("policy", "show", "--config", configs["library"], "--json").stdout)["policy"]
    checkpoint = run("log", "checkpoint", "--config", configs["library"], "--json")
    assert checkpoint.exit_code == 0, checkpoint.output
    assert json.loads(checkpoint.stdout)["signers"] == ["library"]
    check_witness(directory, configs, chain_id, claim["id"])


def check_witness(directory: Path, configs: dict[str, Path], chain_id: str, event: str) -> None:
    """What a witness signs, its users hold a bundle against."""
    made = run("witness", "key", "--name", "witness.example/w1", "--out", directory / "witness.key")
    assert made.exit_code == 0, made.output
    seen, bundle = directory / "witnessed.txt", directory / "witnessed.bundle"
    signed = run(
        "witness", "cosign", "--config", configs["library"], "--key", directory / "witness.key", "--checkpoint", seen
    )
    assert signed.exit_code == 0, signed.output
    prove = ("log", "prove", "--config", configs["library"], "--predicate", "included", "--event", event)
    assert run(*prove, "--checkpoint", seen, "--out", bundle).exit_code == 0
    verify = (
        "verify", "included", "--bundle", bundle, "--genesis", directory / "net" / "genesis.json", "--chain-id",
        chain_id, "--checkpoint", seen, "--witness",
    )  # fmt: skip
    verified = run(*verify, made.stdout.strip())
    assert verified.exit_code == 0, verified.output
    assert "checkpoint signed by witness witness.example/w1, at 20" in verified.stderr
    verified = run(*verify, made.stdout.strip(), "--json")
    assert list(json.loads(verified.stdout)["witnesses"]) == ["witness.example/w1"]
    keys = json.loads(run("log", "keys", "--config", configs["library"], "--json").stdout)
    assert sorted(keys["keys"]) == ["council", "laboratory", "library", "press"]
    assert run(*verify, keys["keys"]["library"]).exit_code == 0, "a member's own signature counts where it is trusted"
    assert run(*verify, keys["keys"]["council"]).exit_code == 1
    refused(2, "locked by process", "log", "fsck", "--config", configs["library"])


@pytest.mark.processes
def test_a_network_of_four_processes_takes_proves_and_keeps_a_claim(tmp_path: Path) -> None:
    made = run(
        "network", "init", "--out", tmp_path / "net", "--name", "trial.example/log", "--heartbeat-ms", "500", "--json",
        "--member", "library:data-source", "--member", "press:data-source",
        "--member", "council:governance", "--member", "laboratory:operator",
    )  # fmt: skip
    document = json.loads(made.stdout)
    configs = {member["name"]: Path(member["config"]) for member in document["members"]}
    processes = {name: start(config, tmp_path / f"{name}.log") for name, config in configs.items()}
    try:
        for member in document["members"]:
            name = member["name"]
            wait_until_voting(member["api_url"], processes[name], tmp_path / f"{name}.log")
        check_whole_path(tmp_path, configs, document["chain_id"])
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        for name, process in processes.items():
            try:
                assert process.wait(20) == 0, (tmp_path / f"{name}.log").read_text()
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                raise AssertionError((tmp_path / f"{name}.log").read_text()) from None
    check_logs(configs)


def check_logs(configs: dict[str, Path]) -> None:
    """Every stopped node's log is sound; one whose state was altered is not."""
    for name, config in configs.items():
        checked = run("log", "fsck", "--config", config)
        assert checked.exit_code == 0, checked.output
        assert "4 events" in checked.output, name
        assert stat.S_IMODE((config.parent / "data").stat().st_mode) == 0o700
    database = open_database(configs["press"].parent / "data" / "rocksdb", False, AccessType.read_write())
    database.families["state"].put(bytes(33), b"strange")
    database.families.clear()
    database.handles.clear()
    database.root.close()
    damaged = run("log", "fsck", "--config", configs["press"])
    assert (damaged.exit_code, f"damaged: state key {bytes(33).hex()}" in damaged.stdout) == (1, True)
    repaired = run("log", "repair", "--config", configs["press"])
    assert repaired.exit_code == 0, repaired.output
    assert f"set aside: {configs['press'].parent / 'data' / 'rocksdb.damaged-1'}" in repaired.stdout
    again = run("log", "repair", "--config", configs["press"], "--json")
    assert (again.exit_code, json.loads(again.stdout)["set_aside"]) == (0, None)


def test_a_log_that_is_not_whole_is_said_to_be_so_beside_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(Report(height=9, log_size=20, state_values=5, missing_blocks=3))
    note, verdict = capsys.readouterr().out.splitlines()
    assert note.startswith(
        "not whole: 3 ledger blocks missing below the snapshot that the log began at, and the rules "
    )
    assert verdict == "sound: 9 ledger blocks, 20 events, 5 state values"


def test_data_directory_of_a_member_that_joined_later_is_repaired(consortium: Provisioned, tmp_path: Path) -> None:
    config = consortium.members["library"].config
    joined = config.with_name("newcomer.toml")
    joined.write_text(
        config.read_text()
        .replace('name = "library"', 'name = "newcomer"')
        .replace('data_directory = "data"', f'data_directory = "{tmp_path / "data"}"')
    )
    Store.open(tmp_path / "data", consortium.chain_id, create=True).close()
    (tmp_path / "data" / "rocksdb" / "CURRENT").unlink()
    repaired = run("log", "repair", "--config", joined)
    assert (repaired.exit_code, "set aside: " in repaired.stdout) == (0, True), repaired.output
    sound = run("log", "repair", "--config", joined)
    assert (sound.exit_code, "nothing to repair" in sound.stdout) == (0, True), sound.output


def test_a_log_line_is_one_json_object_whatever_the_message_holds() -> None:
    record = logging.LogRecord("countersign.x", logging.WARNING, __file__, 1, 'two\nlines and "%s"', ("quotes",), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["level"] == "warning"
    assert parsed["logger"] == "countersign.x"
    assert parsed["message"] == 'two\nlines and "quotes"'
    assert parsed["time"].endswith("+00:00")
