"""Configuration: misspelt, mistyped or contradictory keys are refused by name; the examples are complete."""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from consensus.rejection import ConfigError
from node.clock import SystemClock
from node.config import Address, NodeConfig, api_tokens, load_config

CHAIN = "ab" * 32
CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = sorted(path for path in CONFIGS.glob("*.toml") if not path.stem.startswith("policy"))
MINIMAL = f"""
[node]
name = "library"
genesis = "genesis.json"
chain_id = "{CHAIN}"
data_directory = "data"
keystore = "/keys/library.keystore"

[network]
listen = "0.0.0.0:7400"
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "node.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(directory: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(directory, text))
    assert "node.toml" in str(caught.value)
    return str(caught.value)


def documented_keys() -> set[str]:
    sections = {field.name: field.type for field in msgspec.structs.fields(NodeConfig)}
    return {f"{name}.{field.name}" for name, kind in sections.items() for field in msgspec.structs.fields(kind)}


def test_minimal_configuration_gets_safe_defaults_and_paths_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.node.data_directory == tmp_path / "data"
    assert config.node.keystore == Path("/keys/library.keystore")
    assert config.node.pinned_chain == bytes.fromhex(CHAIN)
    assert config.network.listen == Address("0.0.0.0", 7400)
    assert config.api.listen == Address("127.0.0.1", 0)
    assert not config.countersign.auto
    assert config.network.peers == {}


def test_examples_are_the_four_roles() -> None:
    assert [path.stem for path in EXAMPLES] == ["data-source", "governance", "operator", "rights-holder"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_loads(path: Path) -> None:
    config = load_config(path)
    assert config.network.peers
    assert config.countersign.auto == (path.stem != "rights-holder")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_documents_every_key_and_its_commented_lines_are_valid(path: Path, tmp_path: Path) -> None:
    uncommented = re.sub(r"(?m)^# (?=[a-z_]+ = )", "", path.read_text(encoding="utf-8"))
    load_config(write(tmp_path, uncommented))
    found = {f"{name}.{key}" for name, section in tomllib.loads(uncommented).items() for key in section}
    assert found == documented_keys()


def test_misspelt_rule_is_refused_with_the_likely_key(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + "[countersign]\nmax_step = 3\n")
    assert "unknown key countersign.max_step (did you mean countersign.max_steps?)" in message
    assert "expected one of: auto, purposes" in message


def test_unknown_section_is_refused(tmp_path: Path) -> None:
    assert "unknown key telemetry; expected one of: node, network" in refused(tmp_path, MINIMAL + "[telemetry]\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + '[api]\nmax_body_bytes = "8"\n', "api.max_body_bytes: expected int, got str"),
        (MINIMAL + "[countersign]\nauto = 1\n", "countersign.auto: expected bool, got int"),
        (MINIMAL + "[limits]\nmempool_events = 0\n", "limits.mempool_events: expected int >= 1"),
        (
            MINIMAL.replace("[network]", 'log_level = "verbose"\n[network]'),
            "node.log_level: expected one of debug, info, warning, error, found 'verbose'",
        ),
        (
            MINIMAL.replace("[network]", 'log_format = "xml"\n[network]'),
            "node.log_format: expected one of text, json, found 'xml'",
        ),
        (
            MINIMAL.replace("[network]", 'sync = "fast"\n[network]'),
            "node.sync: expected one of replay, snapshot, found 'fast'",
        ),
        (MINIMAL + "limits = 3\n", "unknown key network.limits"),
        ("limits = 3\n" + MINIMAL, "limits: expected object, got int"),
        (MINIMAL.replace(CHAIN, "AB" * 32), "node.chain_id: expected 64 lower-case hexadecimal digits"),
        (MINIMAL.replace('"library"', '"Library"'), "node.name: expected a name of a-z"),
        (MINIMAL.replace('listen = "0.0.0.0:7400"', ""), "network.listen: required, found none"),
        (MINIMAL.replace("0.0.0.0:7400", "7400"), 'network.listen: expected "host:port"'),
        (
            MINIMAL.replace("0.0.0.0:7400", "::1:7400"),
            'network.listen: expected "host:port" or "[IPv6]:port"',
        ),
        (MINIMAL.replace("0.0.0.0:7400", "host:7_400"), 'network.listen: expected "host:port"'),
        (MINIMAL.replace("0.0.0.0:7400", "host:65536"), 'network.listen: expected "host:port"'),
        (MINIMAL.replace('"data"', "7"), "node.data_directory: expected a non-empty string, found 7"),
        (
            MINIMAL + '[network.peers]\ncouncil = "council:0"\n',
            "network.peers.council: expected a port from 1",
        ),
        (
            MINIMAL + '[network.peers]\nlibrary = "other:1"\n',
            "expected other members, found this node, library",
        ),
        (MINIMAL + "[node]\n", "expected a configuration in TOML"),
        ("", "node: required, found none"),
    ],
)
def test_wrong_value_is_refused_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


def test_witnesses_of_no_checkpoint_and_more_than_there_are_are_refused(tmp_path: Path) -> None:
    def of(lines: str) -> str:
        return MINIMAL.replace("[network]", lines + "\n[network]")

    assert "node.witnesses: expected node.checkpoint beside them" in refused(tmp_path, of('witnesses = ["KEY"]'))
    seen = 'checkpoint = "seen.txt"\n'
    for lines in (seen + "witnesses_needed = 2", seen + 'witnesses = ["KEY"]\nwitnesses_needed = 2'):
        assert "node.witnesses_needed: expected at most as many" in refused(tmp_path, of(lines))
    config = load_config(write(tmp_path, of(seen + 'witnesses = ["A", "B"]\nwitnesses_needed = 2')))
    assert config.node.checkpoint == tmp_path / "seen.txt"


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.toml")


def test_reachable_api_without_tokens_is_refused(tmp_path: Path) -> None:
    open_to_all = MINIMAL + '[api]\nlisten = "0.0.0.0:7480"\n'
    assert "api.listen: expected a loopback address" in refused(tmp_path, open_to_all)
    assert load_config(write(tmp_path, open_to_all + 'tokens_file = "tokens"\n')).api.tokens_file == tmp_path / "tokens"
    for loopback in ("[::1]:7480", "localhost:7480", "127.0.0.9:0"):
        load_config(write(tmp_path, MINIMAL + f'[api]\nlisten = "{loopback}"\n'))
    assert "without tokens" in refused(tmp_path, MINIMAL + '[api]\nlisten = "node.example:7480"\n')


@pytest.mark.parametrize("missing", ["purposes", "sources", "operators"])
def test_automatic_countersigning_without_a_rule_is_refused(tmp_path: Path, missing: str) -> None:
    rules = {"purposes": '["research"]', "sources": '["*"]', "operators": '["laboratory"]'}
    del rules[missing]
    section = "[countersign]\nauto = true\n" + "".join(f"{key} = {value}\n" for key, value in rules.items())
    assert f"countersign.{missing}: expected at least one" in refused(tmp_path, MINIMAL + section)


def test_tokens_come_from_configuration_and_private_file_and_never_show_in_repr(tmp_path: Path) -> None:
    inline, listed = "inline-token-0123456789", "listed-token-0123456789"
    tokens_file = tmp_path / "tokens"
    tokens_file.write_text(f"# the job's\n\n{listed}\n", encoding="utf-8")
    tokens_file.chmod(0o640)
    text = MINIMAL + f'[api]\ntokens = ["{inline}"]\ntokens_file = "tokens"\n'
    api = load_config(write(tmp_path, text)).api
    assert inline not in repr(load_config(write(tmp_path, text)))
    with pytest.raises(ConfigError, match="chmod 600"):
        api_tokens(api)
    tokens_file.chmod(0o600)
    assert api_tokens(api) == (inline, listed)
    tokens_file.write_text("short\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="found token 1 with 5"):
        api_tokens(api)
    assert "api.tokens[0]: expected str of length >= 16" in refused(tmp_path, MINIMAL + '[api]\ntokens = ["x"]\n')


def test_a_tokens_file_without_tokens_does_not_open_the_interface_to_everybody(tmp_path: Path) -> None:
    tokens_file = tmp_path / "tokens"
    tokens_file.write_text("# all of them were revoked\n")
    tokens_file.chmod(0o600)
    text = MINIMAL + '[api]\nlisten = "0.0.0.0:7480"\ntokens_file = "tokens"\n'
    with pytest.raises(ConfigError, match="tokens: expected at least one token, a line each, found none"):
        api_tokens(load_config(write(tmp_path, text)).api)


@pytest.mark.parametrize("token", ["with a space 0123456789", "not-ascii-ü-0123456789"])
def test_a_token_that_no_header_can_hold_is_refused_without_showing_it(tmp_path: Path, token: str) -> None:
    inline = refused(tmp_path, MINIMAL + f'[api]\ntokens = ["{token}"]\n')
    assert "api.tokens[0]: expected visible ASCII characters alone" in inline
    tokens_file = tmp_path / "tokens"
    tokens_file.write_text(f"a-good-token-0123456789\n{token}\n", encoding="utf-8")
    tokens_file.chmod(0o600)
    with pytest.raises(ConfigError, match="found more in token 2") as caught:
        api_tokens(load_config(write(tmp_path, MINIMAL + '[api]\ntokens_file = "tokens"\n')).api)
    assert token not in inline + str(caught.value)


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ('name = "library"', 'name = "Library"', "node.name: expected a name of a-z, 0-9"),
        ('name = "library"', 'name = "Library"', "found 'Library'"),
        ('name = "library"', "", "node.name: required, found none"),
        (f'chain_id = "{CHAIN}"', 'chain_id = "abc"', "expected 64 lower-case hexadecimal digits, found 'abc'"),
        ('data_directory = "data"', 'data_directory = "a\\u0000b"', "node.data_directory: expected a path"),
        ('data_directory = "data"', 'data_directory = "~nobody-here/x"', "home directory is not known"),
        ('listen = "0.0.0.0:7400"', 'listen = "0.0.0.0:7400"\npeers.press = 5', "network.peers.press: expected a non"),
        ('listen = "0.0.0.0:7400"', 'listen = "0.0.0.0:7400"\npeers.Press = "h:1"', "found 'Press'"),
    ],
)
def test_what_is_wrong_is_told_with_its_key_and_what_was_found(
    tmp_path: Path, line: str, other: str, message: str
) -> None:
    assert line in MINIMAL
    assert message in refused(tmp_path, MINIMAL.replace(line, other))


def test_a_section_of_the_wrong_kind_is_not_printed_for_it_may_hold_tokens(tmp_path: Path) -> None:
    assert "hunter2" not in refused(tmp_path, MINIMAL + '[[api]]\ntokens = ["hunter2-hunter2-hunter2"]\n')


def test_the_longest_name_a_genesis_may_have_is_a_name_here(tmp_path: Path) -> None:
    name = "a" * 64
    assert load_config(write(tmp_path, MINIMAL.replace('"library"', f'"{name}"'))).node.name == name


def test_token_is_not_echoed_when_it_is_refused(tmp_path: Path) -> None:
    assert "hunter2" not in refused(tmp_path, MINIMAL + '[api]\ntokens = ["hunter2"]\n')


def test_api_tokens_without_file_are_those_of_the_configuration(tmp_path: Path) -> None:
    assert api_tokens(load_config(write(tmp_path, MINIMAL)).api) == ()


def test_ipv6_address_is_written_back_in_brackets() -> None:
    address = Address.parse("[0::1]:80")
    assert (str(address), address.host) == ("[::1]:80", "::1")
    assert len({address, Address("::1", 80)}) == 1


def test_system_clock_counts_milliseconds_forward() -> None:
    clock = SystemClock()
    assert clock.now_ms() > 1_700_000_000_000
    first = clock.monotonic_ms()
    assert clock.monotonic_ms() >= first
