"""Files made to fool or to hang ``countersign verify``: an answer of 0, 1 or 2, never a traceback, never no end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ledger_fixtures import HOSPITAL, CampaignRun, Story, begin, safetensors_file, story
from safetensors import deserialize

from consensus import portions as p
from consensus.block import header_digest
from consensus.genesis import genesis_to_json
from consensus.predicates import Predicate
from consensus.rejection import Reason, Rejected
from node import weights
from node.bundles import export_bundle
from node.verify import verify_command
from node.weights import read_weights


@pytest.fixture(scope="module")
def tale() -> Story:
    return story()


@pytest.fixture
def house(tmp_path: Path, tale: Story) -> Path:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "release").mkdir()
    (tmp_path / "genesis.json").write_bytes(genesis_to_json(tale.ledger.genesis))
    (tmp_path / "release" / "model.safetensors").write_bytes(tale.weights)
    delta = export_bundle(tale.ledger, Predicate.DELTA_EXACT, campaign=tale.run.id)
    (tmp_path / "bundles" / "delta-exact").write_bytes(delta)
    consistent = export_bundle(tale.ledger, Predicate.CONSISTENT, earlier=tale.ledger.certified[2])
    (tmp_path / "bundles" / "consistent").write_bytes(consistent)
    return tmp_path


def command(house: Path, tale: Story, predicate: str, *more: str, **files: Path) -> list[str]:
    bundle, genesis = files.get("bundle", house / "bundles" / predicate), files.get("genesis", house / "genesis.json")
    chain = tale.ledger.chain_id.hex()
    return [predicate, "--bundle", str(bundle), "--genesis", str(genesis), "--chain-id", chain, *more]


def answered(arguments: list[str]) -> Result:
    result = CliRunner().invoke(verify_command, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2)
    return result


def refused_weights(path: Path) -> str:
    with pytest.raises(Rejected) as refusal:
        read_weights(path)
    assert refusal.value.reason in (Reason.MALFORMED, Reason.NOT_FOUND, Reason.OVERSIZED)
    return refusal.value.detail


# Files that are none.


@pytest.mark.parametrize("place", ["bundle", "genesis", "weights"])
@pytest.mark.parametrize("thing", ["pipe", "device", "folder", "loop"])
def test_pipe_device_folder_or_link_to_itself_is_refused_and_not_waited_for(
    house: Path, tale: Story, place: str, thing: str
) -> None:
    trap = house / "trap.safetensors"
    if thing == "pipe":
        os.mkfifo(trap)
    elif thing == "device":
        trap.symlink_to("/dev/zero")
    elif thing == "folder":
        trap.mkdir()
    else:
        trap.symlink_to(trap)
    if place == "weights":
        arguments = command(house, tale, "delta-exact", "--weights", str(trap))
    else:
        arguments = command(house, tale, "delta-exact", **{place: trap})
    result = answered(arguments)
    assert result.exit_code == 1
    assert "refused: not-found" in result.stderr


def test_trap_in_the_release_folder_is_refused(house: Path, tale: Story) -> None:
    (house / "release" / "a.safetensors").symlink_to("/dev/zero")
    assert answered(command(house, tale, "delta-exact")).exit_code == 1


def test_second_file_in_the_release_folder_is_not_covered_by_the_first(house: Path, tale: Story) -> None:
    assert answered(command(house, tale, "delta-exact")).exit_code == 0
    (house / "release" / "other.safetensors").write_bytes(safetensors_file({"x": bytes(16)}))
    result = answered(command(house, tale, "delta-exact"))
    assert result.exit_code == 1
    assert "other.safetensors has" in result.output


# Weights.


def made(header: object, content: bytes = bytes(16), length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + content


def tensor(begin: int = 0, end: int = 16, dtype: object = "F32", shape: object = (2, 2)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


A = '"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'

BAD_WEIGHTS = {
    "nothing": b"",
    "only a length": (8).to_bytes(8, "little"),
    "header longer than the file": made({"a": tensor()}, length=1 << 20),
    "header of all lengths": made({"a": tensor()}, length=2**64 - 1),
    "name twice": made(("{" + A + "," + A + "}").encode()),
    "name twice by another spelling": made(("{" + A + "," + A.replace('"a"', '"\\u0061"') + "}").encode()),
    "field twice": made(b'{"a":{"dtype":"I32","dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'),
    "unknown field": made({"a": tensor() | {"strides": [1]}}),
    "field left out": made({"a": {"dtype": "F32", "shape": [2, 2]}}),
    "overlap": made({"a": tensor(), "b": tensor(0, 16)}),
    "partial overlap": made({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)),
    "hole": made({"a": tensor(0, 16), "b": tensor(24, 40)}, bytes(40)),
    "hole in front": made({"a": tensor(8, 24)}, bytes(24)),
    "bytes of no tensor": made({"a": tensor()}, bytes(17)),
    "truncated": made({"a": tensor()}, bytes(15)),
    "end before begin": made({"a": tensor(16, 0)}),
    "negative offset": made({"a": tensor(-16, 0)}),
    "shape of another size": made({"a": tensor(shape=[2, 3])}),
    "negative shape": made({"a": tensor(shape=[-2, -2])}),
    "shape that overflows 64 bits": made({"a": tensor(shape=[2**52, 2**52, 2**24 + 1])}),
    "shape of too many dimensions": made({"a": tensor(shape=[1] * 17)}),
    "huge number": made(('{"a":{"dtype":"F32","shape":[' + "9" * 5_000 + '],"data_offsets":[0,16]}}').encode()),
    "fraction": made({"a": tensor(shape=[2.0, 2])}),
    "truth value": made({"a": tensor(0, 4, shape=[True])}, bytes(4)),
    "not a number": made(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "unknown dtype": made({"a": tensor(dtype="F128")}),
    "dtype in lower case": made({"a": tensor(dtype="f32")}),
    "dtype that is none": made({"a": tensor(dtype=["F32"])}),
    "half a Unicode character": made(b'{"a\\ud800":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'),
    "not UTF-8": made(b'{"\xff":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'),
    "space in front": made((" {" + A + "}").encode()),
    "text after the header": made(("{" + A + "} {}").encode()),
    "list": made([]),
    "deep": made(b'{"a":' + b"[" * 200_000),
    "metadata that is no table": made({"__metadata__": [], "a": tensor()}),
    "metadata that is a tensor": made({"__metadata__": tensor()}),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_ambiguous_or_broken_weights_are_never_a_yes_and_never_a_crash(house: Path, tale: Story, name: str) -> None:
    path = house / "bad.safetensors"
    path.write_bytes(BAD_WEIGHTS[name])
    result = answered(command(house, tale, "delta-exact", "--weights", str(path)))
    assert result.exit_code == 1


@pytest.mark.parametrize("name", sorted(set(BAD_WEIGHTS) - {"half a Unicode character"}))
def test_ambiguous_or_broken_weights_are_refused_by_the_reader(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_WEIGHTS[name])
    assert str(path) in refused_weights(path)


def test_header_that_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write((weights.MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(1 << 34)
    assert "a header of" in refused_weights(path)


def test_sparse_file_beyond_the_bound_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_WEIGHTS_BYTES", 1 << 20)
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate((1 << 20) + 1)
    assert "at most" in refused_weights(path)


def test_reader_agrees_with_the_formats_own_library(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": tensor(16, 32),
        "empty": tensor(32, 32, shape=[0, 3]),
        "a": tensor(),
        "scalar": tensor(32, 34, dtype="BF16", shape=[]),
    }
    encoded = made(json.dumps(header).encode() + b"   ", bytes(range(34)))
    path = tmp_path / "f.safetensors"
    path.write_bytes(encoded)
    ours = {(held.name, held.dtype, held.shape) for held in read_weights(path).tensors}
    assert ours == {(name, held["dtype"], tuple(held["shape"])) for name, held in deserialize(encoded)}
    assert len(ours) == 4


def test_many_chunks_give_the_digests_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(safetensors_file({"a": b"x" * 16, "b": bytes(16)}))
    whole = read_weights(path)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 3)
    assert read_weights(path) == whole


# What is pinned, and what is printed.


@pytest.mark.parametrize("spelling", ["{:X}", "0x{:064x}", " {:064x}", "{:064x}\n", "{:064x}00", "é{:064x}"])
def test_chain_id_in_any_other_spelling_is_refused(house: Path, tale: Story, spelling: str) -> None:
    chain = spelling.format(int.from_bytes(tale.ledger.chain_id, "big"))
    arguments = command(house, tale, "delta-exact")
    arguments[arguments.index("--chain-id") + 1] = chain
    result = answered(arguments)
    assert result.exit_code == 2
    assert "lower-case hex" in result.stderr


@pytest.mark.parametrize(
    "change",
    [
        (b'"version": 1', b'"version": 1, "version": 1'),
        (b'"version": 1', b'"version": 1, "comment": "harmless"'),
        (b'"version": 1', b'"version": true'),
        (b'"version": 1', b'"version": 1.0'),
        (b'"bls-threshold"', b'"\\ud800"'),
        (b'"bls-threshold"', b'"ed25519"'),
    ],
)
def test_genesis_that_says_more_or_says_it_twice_is_refused(
    house: Path, tale: Story, change: tuple[bytes, bytes]
) -> None:
    encoded = genesis_to_json(tale.ledger.genesis)
    assert change[0] in encoded
    (house / "other.json").write_bytes(encoded.replace(*change, 1))
    result = answered(command(house, tale, "delta-exact", genesis=house / "other.json"))
    assert result.exit_code == 1
    assert result.stderr.startswith("refused: ")


def test_earlier_ledger_block_of_another_history_is_refused(house: Path, tale: Story) -> None:
    seen, other = (tale.ledger.certified[number][0] for number in (2, 3))
    assert answered(command(house, tale, "consistent", "--earlier", header_digest(seen).hex())).exit_code == 0
    result = answered(command(house, tale, "consistent", "--earlier", header_digest(other).hex()))
    assert result.exit_code == 1
    assert "the bundle is about earlier" in result.stderr
    assert answered(command(house, tale, "delta-exact", "--earlier", header_digest(seen).hex())).exit_code == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_name_the_terminal_cannot_show_does_not_stop_the_answer(tmp_path: Path, encoding: str) -> None:
    tale = begin()
    source = tale.ledger.source(HOSPITAL, "bücher \u4e66\u202e")
    tale.ledger.seal(source)
    run = CampaignRun(tale.ledger, (p.ManifestRange(source.id, 0, 8),), name="other", batch_size=4)
    tale.ledger.seal(*run.open())
    bundle = export_bundle(tale.ledger, Predicate.SOURCE_HONORED, campaign=run.id, source=source.id)
    (tmp_path / "bundle").write_bytes(bundle)
    (tmp_path / "genesis.json").write_bytes(genesis_to_json(tale.ledger.genesis))
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            "from node.verify import verify_command; verify_command()",
            *command(tmp_path, tale, "source-honored", bundle=tmp_path / "bundle"),
        ],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        cwd=Path(__file__).parents[2],
        check=False,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"\\u4e66\\u202e" in ran.stdout
    assert ran.stdout.endswith(b"answer: yes\n")
