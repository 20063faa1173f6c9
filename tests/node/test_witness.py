"""Witnesses: they sign one history, keep what they signed, and are asked as C2SP says."""

import base64
import fcntl
import json
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import trio
from api_fixtures import Served, served, wire
from click.testing import CliRunner, Result
from ledger_fixtures import LIBRARIAN, MemoryLedger, Story, begin

from consensus.checkpoint import (
    Checkpoint,
    assemble_note,
    checkpoint_text,
    note_text,
    parse_checkpoint,
    sign_note,
    verify_note,
)
from consensus.cosignature import Ed25519Cosigner, cosign, encode_witness_key, parse_witness_key, verify_cosignatures
from consensus.genesis import genesis_to_json
from consensus.keys import Ed25519SigningKey
from consensus.merkle import verify_consistency
from consensus.rejection import Reason, Rejected
from node.cli import main
from node.verify import read_pin

NAME = "witness.example/w1"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


async def ran(*arguments: object) -> Result:
    return await trio.to_thread.run_sync(run, *arguments)


def key_in(folder: Path, *more: str) -> str:
    made = run("witness", "key", "--name", NAME, "--out", folder / "witness.key", *more)
    assert made.exit_code == 0, made.output
    return made.stdout.strip()


def cosigning(folder: Path, node: Served, checkpoint: str = "seen.txt") -> list[object]:
    ledger = node.node.memory
    (folder / "genesis.json").write_bytes(genesis_to_json(ledger.genesis))
    return ["witness", "cosign", "--url", f"http://{node.address}", "--genesis", folder / "genesis.json",
            "--chain-id", ledger.chain_id.hex(), "--key", folder / "witness.key",
            "--checkpoint", folder / checkpoint]  # fmt: skip


def another_source(ledger: MemoryLedger, name: str) -> bytes:
    return wire(ledger.source(LIBRARIAN, name))


# Keys


@pytest.mark.parametrize("scheme", ["ed25519", "ml-dsa-44"])
def test_key_is_private_is_never_overwritten_and_is_what_others_trust(tmp_path: Path, scheme: str) -> None:
    verifier_key = key_in(tmp_path, "--scheme", scheme)
    path = tmp_path / "witness.key"
    key = parse_witness_key(verifier_key)
    assert (key.name, key.type.label) == (NAME, scheme)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    held = path.read_bytes()
    again = run("witness", "key", "--name", NAME, "--out", path)
    assert again.exit_code == 2
    assert path.read_bytes() == held
    assert json.loads(held)["seed"] not in again.output


def test_name_that_cannot_stand_in_a_note_makes_no_key(tmp_path: Path) -> None:
    refused = run("witness", "key", "--name", "a b", "--out", tmp_path / "witness.key")
    assert refused.exit_code == 1
    assert "key name 'a b'" in refused.stderr
    assert not (tmp_path / "witness.key").exists()


# Signing


@pytest.mark.trio
@pytest.mark.parametrize("scheme", ["ed25519", "ml-dsa-44"])
async def test_witness_signs_a_log_and_then_what_continues_it(tmp_path: Path, scheme: str) -> None:
    key = parse_witness_key(key_in(tmp_path, "--scheme", scheme))
    began = int(time.time())
    async with served(tmp_path / "data", story=begin()) as node:
        sizes = []
        for name in ("poems", "letters"):
            signed = await ran(*cosigning(tmp_path, node))
            assert signed.exit_code == 0, signed.output
            note = (tmp_path / "seen.txt").read_bytes()
            assert note.decode() == signed.stdout
            seconds = verify_cosignatures(note, [key])[NAME]
            assert seconds is not None
            assert seconds >= began
            origin = node.node.memory.genesis.name
            assert verify_note(note, {origin: node.node.log_key.public_key}) == {origin}
            sizes.append(parse_checkpoint(note_text(note)).size)
            assert ("the first that this witness signs" in signed.stderr) == (len(sizes) == 1)
            node.node.submit(another_source(node.node.memory, name))
        assert sizes[1] == sizes[0] + 1
        again = await ran(*cosigning(tmp_path, node), "--json")
        assert json.loads(again.stdout)["before"] == sizes[1]


@pytest.mark.trio
async def test_witness_does_not_sign_another_history_by_the_same_keys(tmp_path: Path) -> None:
    key_in(tmp_path)
    true, forged = begin(), begin()
    true.ledger.seal(true.ledger.source(LIBRARIAN, "poems"))
    for name in ("forgery", "more of it"):
        forged.ledger.seal(forged.ledger.source(LIBRARIAN, name))
    async with served(tmp_path / "true", story=true) as node:
        assert (await ran(*cosigning(tmp_path, node))).exit_code == 0
    held = (tmp_path / "seen.txt").read_bytes()
    async with served(tmp_path / "forged", story=forged) as node:
        refused = await ran(*cosigning(tmp_path, node))
        assert refused.exit_code == 1
        assert "bad-proof" in refused.stderr
        assert (tmp_path / "seen.txt").read_bytes() == held
        unwarned = await ran(*cosigning(tmp_path, node, "other.txt"))
        assert unwarned.exit_code == 0, "by itself the forged history is as good as the true one"


@pytest.mark.trio
async def test_verifying_node_has_no_log_key_and_its_certified_ledger_block_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = parse_witness_key(key_in(tmp_path))

    def none() -> bytes:
        raise Rejected(Reason.NOT_FOUND, "a verifier has no log key")

    async with served(tmp_path / "data", story=begin()) as node:
        monkeypatch.setattr(node.node, "checkpoint_note", none)
        for name in ("poems", "letters"):
            signed = await ran(*cosigning(tmp_path, node))
            assert signed.exit_code == 0, signed.output
            note, header = (tmp_path / "seen.txt").read_bytes(), node.node.ledger.final.header
            assert set(verify_cosignatures(note, [key])) == {NAME}
            stated = parse_checkpoint(note_text(note))
            assert (stated.size, stated.root) == (header.log_size, header.log_root)
            node.node.submit(another_source(node.node.memory, name))


@pytest.mark.trio
async def test_node_that_refuses_its_checkpoint_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_in(tmp_path)

    def wrong() -> bytes:
        raise Rejected(Reason.BAD_CHECKPOINT, "none today")

    async with served(tmp_path / "data", story=begin()) as node:
        monkeypatch.setattr(node.node, "checkpoint_note", wrong)
        refused = await ran(*cosigning(tmp_path, node))
    assert (refused.exit_code, "none today" in refused.stderr) == (1, True), refused.stderr


@pytest.mark.trio
async def test_witness_does_not_go_back(tmp_path: Path) -> None:
    key_in(tmp_path)
    longer = begin()
    longer.ledger.seal(longer.ledger.source(LIBRARIAN, "poems"))
    async with served(tmp_path / "longer", story=longer) as node:
        assert (await ran(*cosigning(tmp_path, node))).exit_code == 0
    async with served(tmp_path / "shorter", story=begin()) as node:
        refused = await ran(*cosigning(tmp_path, node))
    assert refused.exit_code == 1
    assert "the node is at" in refused.stderr


@pytest.mark.trio
async def test_witness_signs_no_note_that_no_member_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_in(tmp_path)
    async with served(tmp_path / "data", story=begin()) as node:
        header, origin = node.node.ledger.final.header, node.node.memory.genesis.name
        text = checkpoint_text(origin, header.log_size, header.log_root)
        stranger = assemble_note(text, [sign_note(text, origin, Ed25519SigningKey(bytes(32)))])
        monkeypatch.setattr(node.node, "checkpoint_note", lambda: stranger)
        refused = await ran(*cosigning(tmp_path, node))
    assert refused.exit_code == 1
    assert "a note that nobody known signed" in refused.stderr
    assert not (tmp_path / "seen.txt").exists()


@pytest.mark.trio
async def test_witness_believes_no_checkpoint_that_the_ledger_does_not_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_in(tmp_path)
    async with served(tmp_path / "data", story=begin()) as node:
        origin, size = node.node.memory.genesis.name, node.node.ledger.final.header.log_size
        text = checkpoint_text(origin, size, bytes(32))
        lying = assemble_note(text, [sign_note(text, origin, node.node.log_key)])
        monkeypatch.setattr(node.node, "checkpoint_note", lambda: lying)
        refused = await ran(*cosigning(tmp_path, node))
    assert refused.exit_code == 1
    assert "bad-checkpoint" in refused.stderr


@pytest.mark.trio
async def test_witness_starts_from_nothing_but_what_it_signed_itself(tmp_path: Path) -> None:
    key_in(tmp_path)
    seen = tmp_path / "seen.txt"
    async with served(tmp_path / "data", story=begin()) as node:
        assert (await ran(*cosigning(tmp_path, node))).exit_code == 0
        signed = seen.read_bytes()
        text = note_text(signed)
        origin, size, root = text.decode().splitlines()
        other = checkpoint_text("elsewhere.example", int(size), base64.b64decode(root))
        stranger = assemble_note(text, [cosign(text, NAME, Ed25519Cosigner(bytes(32)), 5)])
        for content, words in (
            (text, "a note without"),
            (stranger, "none of 1 signatures"),
            (assemble_note(other, [cosign(other, NAME, Ed25519Cosigner(bytes(32)), 5)]), "elsewhere.example"),
            (signed.replace(origin.encode(), b"x" + origin.encode()), f"x{origin}"),
            (b"", "a note without"),
        ):
            seen.write_bytes(content)
            refused = await ran(*cosigning(tmp_path, node))
            assert (refused.exit_code, words in refused.stderr) == (1, True), refused.stderr
            assert seen.read_bytes() == content


@pytest.mark.trio
async def test_witness_whose_clock_is_behind_does_not_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_in(tmp_path)
    async with served(tmp_path / "data", story=begin()) as node:
        assert (await ran(*cosigning(tmp_path, node))).exit_code == 0
        held = (tmp_path / "seen.txt").read_bytes()
        monkeypatch.setattr("node.commands.witness.time.time", lambda: 1_000_000.0)
        refused = await ran(*cosigning(tmp_path, node))
    assert refused.exit_code == 2
    assert "clock is behind" in refused.stderr
    assert (tmp_path / "seen.txt").read_bytes() == held


@pytest.mark.trio
async def test_two_processes_do_not_sign_at_once(tmp_path: Path) -> None:
    key_in(tmp_path)
    async with served(tmp_path / "data", story=begin()) as node:
        with (tmp_path / ".seen.txt.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            refused = await ran(*cosigning(tmp_path, node))
    assert refused.exit_code == 2
    assert "another process signs" in refused.stderr


@pytest.mark.trio
async def test_node_of_another_chain_is_not_signed(tmp_path: Path) -> None:
    key_in(tmp_path)
    async with served(tmp_path / "data", story=begin()) as node:
        arguments = cosigning(tmp_path, node)
        arguments[arguments.index("--chain-id") + 1] = "ab" * 32
        refused = await ran(*arguments)
    assert refused.exit_code == 1
    assert "wrong-chain" in refused.stderr


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"name": "w", "scheme": "rsa", "seed": "' + b"00" * 32 + b'"}',
        b'{"name": "w", "scheme": "ed25519", "seed": "00"}',
        b'{"name": "w", "scheme": "ed25519", "seed": "no hex"}',
        b"\xff\xfe",
    ],
)
def test_file_that_is_no_key_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "witness.key"
    path.write_bytes(content)
    path.chmod(0o600)
    refused = run("witness", "cosign", "--url", "http://127.0.0.1:1", "--key", path, "--checkpoint", tmp_path / "seen")
    assert refused.exit_code == 2
    assert "expected a file of countersign witness key" in refused.stderr


@pytest.mark.parametrize("options", [(), ("--genesis", "g"), ("--chain-id", "ab" * 32)])
def test_witness_needs_something_to_trust(tmp_path: Path, options: tuple[str, ...]) -> None:
    key_in(tmp_path)
    refused = run(
        "witness", "cosign", "--url", "http://127.0.0.1:1", "--key", tmp_path / "witness.key",
        "--checkpoint", tmp_path / "seen", *options,
    )  # fmt: skip
    assert refused.exit_code == 2
    assert "--genesis FILE and --chain-id HEX" in refused.stderr


# Asking


class PublicWitness:
    """A C2SP witness (tlog-witness) on a free port, which knows one log by the key it is given."""

    def __init__(self, origin: str, log_key: bytes) -> None:
        self.cosigner = Ed25519Cosigner(bytes([7]) * 32)
        self.keys = {origin: log_key}
        self.latest = Checkpoint(origin, 0, parse_checkpoint(checkpoint_text(origin, 1, bytes(32))).root)
        self.sign = lambda text: cosign(text, NAME, self.cosigner, 1_790_000_000)
        self.answer: Callable[[bytes], tuple[int, bytes]] = self.add_checkpoint
        self.asked: list[bytes] = []
        self.pause_seconds = 0.0
        """After each byte of an answer."""
        self.url = ""

    @property
    def key(self) -> str:
        return encode_witness_key(NAME, self.cosigner)

    def add_checkpoint(self, body: bytes) -> tuple[int, bytes]:
        head, _, note = body.partition(b"\n\n")
        old, *hashes = head.decode().split("\n")
        old_size = int(re.fullmatch(r"old (0|[1-9][0-9]*)", old)[1])  # type: ignore[index]
        stated = parse_checkpoint(note_text(note))
        if stated.origin not in self.keys:
            return 404, b""
        try:
            verify_note(note, self.keys)
        except Rejected:
            return 403, b""
        if old_size != self.latest.size:
            return 409, f"{self.latest.size}\n".encode()
        if old_size == stated.size and stated.root != self.latest.root:
            return 409, f"{self.latest.size}\n".encode()
        proof = [base64.b64decode(held) for held in hashes]
        try:
            if old_size:
                verify_consistency(old_size, stated.size, proof, self.latest.root, stated.root)
        except Rejected:
            return 422, b""
        self.latest = stated
        return 200, self.sign(note_text(note))


@contextmanager
def public_witness(witness: PublicWitness) -> Iterator[PublicWitness]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/w/add-checkpoint"
            body = self.rfile.read(int(self.headers["content-length"]))
            witness.asked.append(body)
            status, answer = witness.answer(body)
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            assert self.headers["accept-encoding"] == "identity"
            pieces = [bytes([byte]) for byte in answer] if witness.pause_seconds else [answer]
            with suppress(ConnectionError):
                for piece in pieces:
                    self.wfile.write(piece)
                    time.sleep(witness.pause_seconds)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    witness.url = f"http://127.0.0.1:{server.server_address[1]}/w/"
    try:
        yield witness
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asking(folder: Path, node: Served, witness: PublicWitness) -> list[object]:
    return ["witness", "ask", "--url", f"http://{node.address}", "--checkpoint", folder / "seen.txt",
            "--witness", witness.url, witness.key]  # fmt: skip


def witness_of(story: Story) -> PublicWitness:
    seed = story.ledger.secrets[LIBRARIAN].log_seed
    assert seed is not None
    return PublicWitness(story.ledger.genesis.name, Ed25519SigningKey(seed).public_key)


@pytest.mark.trio
async def test_public_witness_signs_and_signs_what_continues_it(tmp_path: Path) -> None:
    story = begin()
    with public_witness(witness_of(story)) as witness:
        async with served(tmp_path / "data", story=story) as node:
            for number, name in enumerate(("poems", "letters", "maps")):
                if number == 2:
                    (tmp_path / "seen.txt").unlink()
                done = await ran(*asking(tmp_path, node, witness))
                assert done.exit_code == 0, done.output
                note = (tmp_path / "seen.txt").read_bytes()
                assert note.decode() == done.stdout
                assert verify_cosignatures(note, [parse_witness_key(witness.key)]) == {NAME: 1_790_000_000}
                assert verify_note(note, witness.keys)
                node.node.submit(another_source(node.node.memory, name))
    size = len(story.ledger.events)
    expected = [0, size, 0, size + 1]
    assert [body.split(b"\n")[0] for body in witness.asked] == [b"old %d" % old for old in expected], (
        "where the file is gone, the witness says what it signed"
    )


@pytest.mark.trio
@pytest.mark.parametrize(
    ("status", "answer", "code", "words"),
    [
        (403, b"", 1, "it knows none of the keys"),
        (404, b"", 1, "it does not know this log"),
        (409, b"99\n", 1, "the witness signed 99 entries before"),
        (409, b"0\n", 1, "the witness signed another root at 0 entries"),
        (409, b"?", 1, "the witness signed another root"),
        (422, b"", 1, "it has seen another history"),
        (500, b"oh \xff", 2, "answered with status 500"),
        (200, b"", 1, "without signatures"),
        (200, b"hello\n", 1, "signature line"),
        (200, b"\n\n\n", 1, "bad-checkpoint"),
        (200, b"x" * 70_000, 2, "sent more than 65536 bytes"),
    ],
)
async def test_witness_that_does_not_sign_is_told_of(
    tmp_path: Path, status: int, answer: bytes, code: int, words: str
) -> None:
    story = begin()
    with public_witness(witness_of(story)) as witness:
        witness.answer = lambda body: (status, answer)
        async with served(tmp_path / "data", story=story) as node:
            refused = await ran(*asking(tmp_path, node, witness))
    assert (refused.exit_code, words in refused.stderr) == (code, True), refused.stderr
    assert not (tmp_path / "seen.txt").exists()


@pytest.mark.trio
async def test_witness_whose_answer_drips_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.witness.LONGEST_ANSWER_SECONDS", 0.1)
    story = begin()
    with public_witness(witness_of(story)) as witness:
        witness.pause_seconds = 0.05
        async with served(tmp_path / "data", story=story) as node:
            refused = await ran(*asking(tmp_path, node, witness))
    assert (refused.exit_code, "took more than 0.1 s to answer" in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "seen.txt").exists()


@pytest.mark.trio
async def test_answer_by_another_key_or_of_another_checkpoint_is_no_signature(tmp_path: Path) -> None:
    story = begin()
    with public_witness(witness_of(story)) as witness:
        async with served(tmp_path / "data", story=story) as node:
            for sign, words in (
                (lambda text: cosign(text, NAME, Ed25519Cosigner(bytes([8]) * 32), 5), "none of 1 signatures"),
                (lambda text: sign_note(text, NAME, Ed25519SigningKey(bytes([7]) * 32)), "none of 1 signatures"),
                (lambda text: cosign(b"x" + text, NAME, witness.cosigner, 5), "does not verify"),
            ):
                witness.answer = lambda body, sign=sign: (200, sign(note_text(body.partition(b"\n\n")[2])))
                refused = await ran(*asking(tmp_path, node, witness))
                assert (refused.exit_code, words in refused.stderr) == (1, True), refused.stderr


@pytest.mark.trio
async def test_file_that_is_no_checkpoint_of_this_log_is_not_replaced(tmp_path: Path) -> None:
    story = begin()
    keystore = tmp_path / "seen.txt"
    keystore.write_bytes(b"an identity")
    with public_witness(witness_of(story)) as witness:
        async with served(tmp_path / "data", story=story) as node:
            refused = await ran(*asking(tmp_path, node, witness))
    assert (refused.exit_code, f"bad-checkpoint: {keystore}" in refused.stderr) == (1, True), refused.output
    assert keystore.read_bytes() == b"an identity"
    assert witness.asked == []


@pytest.mark.trio
async def test_witness_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    story = begin()
    with public_witness(witness_of(story)) as witness:
        pass
    async with served(tmp_path / "data", story=story) as node:
        gone = await ran(*asking(tmp_path, node, witness))
        assert (gone.exit_code, "does not answer" in gone.stderr) == (2, True), gone.stderr
        witness.url = "witness.example"
        no_address = await ran(*asking(tmp_path, node, witness))
        assert (no_address.exit_code, "expected a witness's address" in no_address.stderr) == (2, True)


@pytest.mark.trio
async def test_several_witnesses_sign_one_note_and_a_verifier_says_how_many_it_needs(tmp_path: Path) -> None:
    story = begin()
    one, other = witness_of(story), witness_of(story)
    other.cosigner = Ed25519Cosigner(bytes([8]) * 32)
    other.sign = lambda text: cosign(text, "witness.example/w2", other.cosigner, 7)
    other_key = encode_witness_key("witness.example/w2", other.cosigner)
    seen = tmp_path / "seen.txt"
    with public_witness(one), public_witness(other):
        async with served(tmp_path / "data", story=story) as node:
            both = [*asking(tmp_path, node, one), "--witness", other.url, other_key]
            done = await ran(*both, "--json")
            assert done.exit_code == 0, done.output
            times = {NAME: 1_790_000_000, "witness.example/w2": 7}
            assert json.loads(done.stdout)["witnesses"] == times
            keys = [parse_witness_key(one.key), parse_witness_key(other_key)]
            assert verify_cosignatures(seen.read_bytes(), keys) == times
            other.answer = lambda body: (403, b"")
            partly = await ran(*both)
            assert partly.exit_code == 1
            assert "not signed by witness.example/w2: bad-checkpoint" in partly.stderr
            assert verify_cosignatures(seen.read_bytes(), keys) == {NAME: 1_790_000_000}
            one.answer = lambda body: (500, b"")
            held = seen.read_bytes()
            assert (await ran(*both)).exit_code == 1
            assert seen.read_bytes() == held
    origin = story.ledger.genesis.name
    assert read_pin(seen, origin, [one.key, other_key])[1] == {NAME: 1_790_000_000}
    with pytest.raises(Rejected, match=f"signed by {NAME} alone; 2 of the witnesses are needed"):
        read_pin(seen, origin, [one.key, other_key], 2)
