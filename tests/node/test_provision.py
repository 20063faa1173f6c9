"""Provisioning: the files of a consortium are what a node starts from, private, and refuse to be half right."""

import stat
from pathlib import Path

import pytest

from consensus import bls
from consensus.certificate_schemes import scheme_for
from consensus.genesis import genesis_from_json
from consensus.identifiers import VOTING_ROLES, Role
from consensus.keys import Ed25519SigningKey, SignatureScheme
from consensus.membership import ED25519_LIST, Parameters, check_genesis, committee
from consensus.rejection import ConfigError
from node.commands.member import load_member
from node.config import Address, load_config
from node.keystore import Keystore, read_passphrase
from node.provision import MemberRequest, Provisioned, free_ports, provision

CREATED_MS = 1_800_000_000_000
FOUR = (
    MemberRequest("library", Role.DATA_SOURCE),
    MemberRequest("press.example", Role.DATA_SOURCE),
    MemberRequest("council", Role.GOVERNANCE),
    MemberRequest("laboratory", Role.OPERATOR),
)


def made(directory: Path, requests: tuple[MemberRequest, ...] = FOUR, **options: object) -> Provisioned:
    return provision(directory / "net", "trial.example/log", requests, created_ms=CREATED_MS, **options)  # type: ignore[arg-type]


def test_every_member_starts_from_files_of_its_own(tmp_path: Path) -> None:
    consortium = made(tmp_path, (*FOUR, MemberRequest("auditor", Role.VERIFIER)))
    genesis = genesis_from_json(consortium.genesis_path.read_bytes())
    check_genesis(genesis)
    assert genesis == consortium.genesis
    assert genesis.chain_id == consortium.chain_id
    for member in consortium.members.values():
        own = load_member(member.config)
        assert own.member.name == member.name
        assert own.config.node.data_directory == member.directory / "data"
        assert not own.config.node.data_directory.exists()
        assert {*own.config.network.peers} == {*consortium.members} - {member.name}
        assert own.config.api.listen == member.api
        assert own.config.countersign.auto == (member.role in VOTING_ROLES)
        for private in (member.keystore, member.passphrase):
            assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_shares_and_keys_in_keystores_are_those_of_the_genesis(tmp_path: Path) -> None:
    consortium = made(tmp_path)
    scheme = scheme_for(consortium.genesis)
    for member in consortium.genesis.members:
        files = consortium.members[member.name]
        config = load_config(files.config)
        secrets = Keystore.open(files.keystore, read_passphrase(config.node.passphrase_file, {})).secrets
        assert Ed25519SigningKey(secrets.transport_seed).public_key == member.transport_key
        assert Ed25519SigningKey(secrets.log_seed).public_key == member.log_key
        assert secrets.bls_share is not None
        share = bls.Secret.from_bytes(secrets.bls_share)
        scheme.verify_share(member.id, b"message", scheme.share(share, b"message"))


def test_two_consortia_share_no_secret_and_no_chain(tmp_path: Path) -> None:
    first, second = made(tmp_path / "first"), made(tmp_path / "second")
    assert first.chain_id != second.chain_id
    keys = [{member.identity_key for member in one.genesis.members} for one in (first, second)]
    assert not keys[0] & keys[1]


def test_scheme_thresholds_parameters_and_passphrase_are_taken_over(tmp_path: Path) -> None:
    three = (*FOUR, MemberRequest("archive", Role.DATA_SOURCE))
    consortium = made(
        tmp_path,
        three,
        certificate_scheme=ED25519_LIST,
        thresholds={Role.DATA_SOURCE: 2},
        parameters=Parameters(heartbeat_ms=1_234),
        passphrase=b"a passphrase of people",
        purposes=("poetry",),
    )
    assert consortium.genesis.certificate_scheme == ED25519_LIST
    assert consortium.genesis.parameters.heartbeat_ms == 1_234
    assert committee(consortium.genesis).threshold(Role.DATA_SOURCE) == 2
    member = consortium.members["archive"]
    assert Keystore.open(member.keystore, b"a passphrase of people").secrets.bls_share is None
    assert load_config(member.config).countersign.purposes == ("poetry",)


def test_given_addresses_are_kept_and_a_public_host_listens_everywhere(tmp_path: Path) -> None:
    requests = (MemberRequest("library", Role.DATA_SOURCE, Address("library.example", 7400), None), *FOUR[1:])
    consortium = made(tmp_path, requests)
    assert load_config(consortium.members["library"].config).network.listen == Address("0.0.0.0", 7400)
    assert load_config(consortium.members["council"].config).network.peers["library"] == Address(
        "library.example", 7400
    )


def test_free_ports_are_all_different() -> None:
    assert len(set(free_ports(20))) == 20


@pytest.mark.parametrize(
    ("requests", "options", "message"),
    [
        (FOUR[:2], {}, "at least one governance"),
        ((*FOUR, FOUR[0]), {}, "two members are called library"),
        ((*FOUR, MemberRequest("../outside", Role.VERIFIER)), {}, "no sound genesis"),
        ((*FOUR, MemberRequest("Upper", Role.VERIFIER)), {}, "no sound genesis"),
        (FOUR, {"thresholds": {Role.DATA_SOURCE: 1}}, "no sound genesis"),
        (FOUR, {"certificate_scheme": "rot13"}, "no sound genesis"),
        (FOUR, {"certificate_scheme": "ed25519", "identity_scheme": SignatureScheme.ML_DSA_65}, "no sound genesis"),
    ],
)
def test_members_that_make_no_genesis_are_refused_before_anything_is_written(
    tmp_path: Path, requests: tuple[MemberRequest, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, requests, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    consortium = made(tmp_path)
    before = consortium.members["library"].keystore.read_bytes()
    with pytest.raises(ConfigError, match="empty or missing directory"):
        made(tmp_path)
    assert consortium.members["library"].keystore.read_bytes() == before
