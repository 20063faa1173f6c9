"""The founding ceremony as its users hold it: commands, folders of their own, and a postman between them."""

import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from node_fixtures import running, until

from consensus.ceremony import Commit, Complain, SignedMessage
from consensus.codec import decode, encode
from consensus.genesis import genesis_from_json, genesis_to_json
from consensus.identifiers import Role, Tag, tagged_message
from consensus.key_generation import Dealer
from consensus.keys import Ed25519SigningKey
from node import ceremony as folders
from node.cli import main
from node.clock import SystemClock
from node.commands import ceremony as commands
from node.config import Address, ApiSection, CountersignSection, NetworkSection, NodeConfig, NodeSection
from node.identity import load_identity
from node.keystore import Keystore
from node.provision import RANDOM_PASSPHRASE_COST, free_ports
from node.runner import Node

SMALL = {"library": "data-source", "press": "data-source", "council": "governance", "laboratory": "operator"}
DEALT = {**SMALL, "archive": "data-source", "guild": "verifier"}


@pytest.fixture(autouse=True)
def _cheap_keystores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MODERATE_COST", RANDOM_PASSPHRASE_COST)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


class Partners:
    """Each has a machine of its own, which is a folder; ``post`` carries every message to everybody."""

    def __init__(self, root: Path, members: dict[str, str], *options: str) -> None:
        self.root = root
        self.members = members
        first = next(iter(members))
        invited = [word for name, role in members.items() for word in ("--member", f"{name}:{role}")]
        run("ceremony", "init", self.folder(first), "--name", "our.example/log", *invited, *options)
        self.digest = folders.read_folder(self.folder(first)).invitation.digest.hex()
        for name in members:
            (root / name).mkdir(exist_ok=True)
            passphrase = root / name / "passphrase"
            passphrase.write_text(f"the passphrase of {name}\n")
            passphrase.chmod(0o600)
            if name != first:
                shutil.copytree(self.folder(first), self.folder(name))

    def folder(self, name: str) -> Path:
        return self.root / name / "founding"

    def secrets(self, name: str) -> list[object]:
        own = self.root / name
        return ["--keystore", own / "keystore.json", "--passphrase-file", own / "passphrase"]

    def keystore(self, name: str) -> Keystore:
        return Keystore.open(self.root / name / "keystore.json", f"the passphrase of {name}".encode())

    def post(self) -> None:
        for sender in self.members:
            for recipient in self.members:
                for file in self.folder(sender).glob("*.ceremony"):
                    if not (self.folder(recipient) / file.name).exists():
                        shutil.copy(file, self.folder(recipient))

    def join(self, *names: str) -> None:
        for name in names or self.members:
            run("ceremony", "join", self.folder(name), "--as", name, "--invitation", self.digest, *self.secrets(name))
        self.post()

    def contribute(self, *names: str) -> None:
        for name in names or self.members:
            run("ceremony", "contribute", self.folder(name), *self.secrets(name))
        self.post()

    def finish(self) -> str:
        chains = set()
        for name in self.members:
            printed = run("ceremony", "finish", self.folder(name), *self.secrets(name)).output
            chains.add(next(line.split()[-1] for line in printed.splitlines() if line.startswith("chain id")))
        (chain,) = chains
        return chain


@pytest.fixture
def partners(tmp_path: Path) -> Partners:
    return Partners(tmp_path, DEALT, "--threshold", "data-source=2", "--heartbeat-ms", "300")


@pytest.mark.trio
async def test_partners_end_with_a_network_that_runs(partners: Partners, tmp_path: Path) -> None:
    partners.join()
    assert "awaited: commit of library, press, archive" in run("ceremony", "status", partners.folder("guild")).output
    for _ in range(3):
        partners.contribute()
    assert "nothing is awaited" in run("ceremony", "status", partners.folder("guild")).output
    chain = partners.finish()
    assert partners.finish() == chain
    assert "checked: every message" in run("ceremony", "verify", partners.folder("guild"), "--chain-id", chain).output
    ports = dict(zip(partners.members, free_ports(len(partners.members)), strict=True))
    nodes = []
    for name in partners.members:
        config = NodeConfig(
            node=NodeSection(
                name=name,
                genesis=partners.folder(name) / "genesis.json",
                chain_id=chain,
                data_directory=tmp_path / name / "data",
                keystore=tmp_path / name / "keystore.json",
                passphrase_file=tmp_path / name / "passphrase",
            ),
            network=NetworkSection(
                listen=Address("127.0.0.1", ports[name]),
                peers={other: Address("127.0.0.1", port) for other, port in ports.items() if other != name},
            ),
            api=ApiSection(listen=Address("127.0.0.1", 0)),
            countersign=CountersignSection(),
        )
        genesis = genesis_from_json(config.node.genesis.read_bytes())
        nodes.append(Node(config, genesis, load_identity(config, genesis), SystemClock()))
        assert partners.keystore(name).secrets.ceremony_seed is None
    async with running(nodes):
        await until(lambda: all(node.snapshot().height >= 2 for node in nodes))
        assert [node.snapshot().voting for node in nodes] == [name != "guild" for name in partners.members]


@pytest.mark.parametrize("scheme", ["bls-multisig", "ed25519", "ml-dsa-65"])
def test_schemes_without_joint_keys_are_done_when_all_have_joined(tmp_path: Path, scheme: str) -> None:
    partners = Partners(tmp_path, SMALL, "--scheme", scheme)
    partners.join()
    run("ceremony", "verify", partners.folder("press"), "--chain-id", partners.finish())


def test_role_that_needs_all_its_members_sums_their_keys(tmp_path: Path) -> None:
    partners = Partners(tmp_path, SMALL)
    partners.join()
    partners.contribute()
    partners.finish()
    genesis = genesis_from_json((partners.folder("press") / "genesis.json").read_bytes())
    assert genesis.groups[0].share_keys == (genesis.members[0].bls_key, genesis.members[1].bls_key)


def test_contributing_again_says_nothing_new_and_a_lost_file_is_written_the_same(partners: Partners) -> None:
    partners.join()
    partners.contribute()
    again = run("ceremony", "contribute", partners.folder("library"), *partners.secrets("library")).output
    assert "wrote" in again
    partners.post()
    dealt = partners.folder("library") / "deal-library.ceremony"
    before = dealt.read_bytes()
    dealt.unlink()
    run("ceremony", "contribute", partners.folder("library"), *partners.secrets("library"))
    assert dealt.read_bytes() == before
    quiet = run("ceremony", "contribute", partners.folder("library"), *partners.secrets("library")).output
    assert "wrote" not in quiet
    assert "awaited: deal of press, archive" in quiet


def test_dealer_that_changes_its_commitment_after_a_deal_gets_no_second_one(partners: Partners) -> None:
    """A rogue member, and a postman that hides its first commitment from the others."""
    partners.join()
    partners.contribute()
    partners.contribute("library")
    folder = folders.read_folder(partners.folder("archive"))
    secrets = partners.keystore("archive").secrets
    dealer = Dealer(folder.invitation.key_ceremony(Role.DATA_SOURCE), 3, bytes(32))
    body = encode(Commit(folder.transcript().roster, dealer.commitment()))
    signature = Ed25519SigningKey(secrets.identity_seed).sign(tagged_message(Tag.CEREMONY, body))
    rogue = encode(SignedMessage("archive", body, signature))
    own = partners.folder("library")
    (own / "rogue.ceremony").write_bytes(rogue)
    seen = run("ceremony", "contribute", own, *partners.secrets("library"), code=1).output
    assert "equivocation" in seen
    assert "archive" in seen
    (own / "commit-archive.ceremony").unlink()
    (own / "deal-library.ceremony").unlink()
    refused = run("ceremony", "contribute", own, *partners.secrets("library"), code=1).output
    assert "dealt over other commitments before" in refused
    assert not (own / "deal-library.ceremony").exists()


def falsely_complained(partners: Partners, name: str) -> tuple[str, bytes]:
    """The file in which a member complains of library, whose value to it is good."""
    deals = folders.read_folder(partners.folder("library")).transcript().deals(Role.DATA_SOURCE)
    body = encode(Complain(deals, (1,)))
    key = Ed25519SigningKey(partners.keystore(name).secrets.identity_seed)
    message = SignedMessage(name, body, key.sign(tagged_message(Tag.CEREMONY, body)))
    return f"complain-{name}.ceremony", encode(message)


def test_complaints_shown_to_the_dealer_alone_one_after_the_other_convict_nobody(partners: Partners) -> None:
    partners.join()
    for _ in range(2):
        partners.contribute()
    own = partners.folder("library")
    for name in ("archive", "press"):
        file, complaint = falsely_complained(partners, name)
        (own / file).write_bytes(complaint)
        wrote = run("ceremony", "contribute", own, *partners.secrets("library")).output
        assert wrote.count("answer-library-") == 1
        assert "wrote" not in run("ceremony", "contribute", own, *partners.secrets("library")).output
    answers = sorted(own.glob("answer-library-*.ceremony"))
    assert len(answers) == 2
    for answer in answers:
        shutil.copy(answer, partners.folder("press"))
    run("ceremony", "contribute", partners.folder("press"), *partners.secrets("press"))
    assert "awaited: confirm of " in run("ceremony", "status", partners.folder("press")).output
    partners.post()
    partners.contribute()
    partners.contribute()
    chain = partners.finish()
    assert "checked: every message" in run("ceremony", "verify", partners.folder("guild"), "--chain-id", chain).output


def test_false_complaint_after_all_confirmed_keeps_nobody_from_finishing(partners: Partners) -> None:
    partners.join()
    for _ in range(3):
        partners.contribute()
    run("ceremony", "finish", partners.folder("library"), *partners.secrets("library"))
    file, complaint = falsely_complained(partners, "archive")
    for name in partners.members:
        (partners.folder(name) / file).write_bytes(complaint)
    assert "nothing is awaited" in run("ceremony", "status", partners.folder("guild")).output
    run("ceremony", "verify", partners.folder("guild"), "--chain-id", partners.finish())


def test_join_of_another_invitation_than_the_one_read_out_makes_no_keys(partners: Partners) -> None:
    output = run(
        "ceremony", "join", partners.folder("press"), "--as", "press", "--invitation", "0" * 64,
        *partners.secrets("press"), code=2,
    ).output  # fmt: skip
    assert "ask who sent it" in output
    assert not (partners.root / "press" / "keystore.json").exists()


def test_nobody_joins_twice_uninvited_or_over_a_keystore(partners: Partners) -> None:
    partners.join("press")
    for name, code, message in (("press", 2, "joined as press already"), ("eve", 1, "eve was not invited")):
        own = [*partners.secrets("press")]
        own[1] = partners.root / "another.json"
        output = run(
            "ceremony", "join", partners.folder("press"), "--as", name, "--invitation", partners.digest, *own, code=code
        ).output
        assert message in output
        assert not (partners.root / "another.json").exists()
    (partners.folder("press") / "join-press.ceremony").unlink()
    output = run(
        "ceremony", "join", partners.folder("press"), "--as", "press", "--invitation", partners.digest,
        *partners.secrets("press"), code=2,
    ).output  # fmt: skip
    assert "nothing is overwritten" in output


def test_hostile_files_in_the_folder_are_named_and_nothing_is_written(partners: Partners, tmp_path: Path) -> None:
    partners.join()
    own = partners.folder("library")
    planted = own / "planted.ceremony"
    before = sorted(own.iterdir())
    joined = (own / "join-press.ceremony").read_bytes()
    for content in (b"", b"\x93", bytes(300), b"\xff" * 500, joined[:-1], joined + b"\x00", b"\x95" + joined[1:]):
        planted.write_bytes(content)
        output = run("ceremony", "contribute", own, *partners.secrets("library"), code=1).output
        assert f"{planted}: " in output
        planted.unlink()
    with planted.open("wb") as huge:
        huge.truncate(1 << 30)
    assert f"oversized: {planted} has" in run("ceremony", "status", own, code=1).output
    planted.unlink()
    os.mkfifo(planted)
    assert "not a regular file" in run("ceremony", "status", own, code=1).output
    planted.unlink()
    planted.symlink_to("/dev/zero")
    assert "not a regular file" in run("ceremony", "status", own, code=1).output
    planted.unlink()
    assert sorted(own.iterdir()) == before
    other = Partners(tmp_path / "other", SMALL)
    other.join("press")
    shutil.copy(other.folder("press") / "join-press.ceremony", planted)
    assert "joined another ceremony" in run("ceremony", "status", own, code=1).output


def test_a_changed_message_is_told_with_whose_it_is(partners: Partners) -> None:
    partners.join()
    file = partners.folder("library") / "join-press.ceremony"
    message = decode(file.read_bytes(), SignedMessage, 1 << 20)
    forged = msgspec.structs.replace(message, signature=bytes(64))
    file.write_bytes(encode(forged))
    assert "bad-signature: the join of press: " in run("ceremony", "status", file.parent, code=1).output
    forged = msgspec.structs.replace(message, body=message.body[:-1])
    file.write_bytes(encode(forged))
    assert "malformed: a message of press: " in run("ceremony", "status", file.parent, code=1).output


def test_a_join_that_cannot_be_written_leaves_no_keys_behind(partners: Partners) -> None:
    own = partners.folder("press")
    # A message of somebody else lies under the name that this one's must have.
    partners.join("library")
    shutil.copy(own / "join-library.ceremony", own / "join-press.ceremony")
    output = run(
        "ceremony", "join", own, "--as", "press", "--invitation", partners.digest, *partners.secrets("press"), code=2
    ).output
    assert "join-press.ceremony: expected no such file" in output
    assert not (partners.root / "press" / "keystore.json").exists()
    (own / "join-press.ceremony").unlink()
    partners.join("press")


def test_an_invitation_names_roles_and_no_addresses(tmp_path: Path) -> None:
    init = ("ceremony", "init", tmp_path / "f", "--name", "our.example/log", "--member", "council:governance")
    more = ("--member", "laboratory:operator")
    library = "--member", "library:data-source"
    address = run(*init, *more, "--member", "library:data-source:10.0.0.1:7400", code=2).output
    assert "expected NAME:ROLE with a role of" in address
    assert "expected a name of up to 64" in run(*init, *more, "--member", "Library:data-source", code=2).output
    assert "at least one operator member, found none" in run(*init, *library, code=2).output
    assert "two members are called library" in run(*init, *more, *library, *library, code=2).output
    named = run("ceremony", "init", tmp_path / "f", "--name", "Our Log", *more, code=2).output
    assert "found 'Our Log'" in named
    assert not (tmp_path / "f").exists()


def test_keystore_of_no_member_or_of_an_older_ceremony_takes_no_part(partners: Partners, tmp_path: Path) -> None:
    partners.join()
    other = Partners(tmp_path / "other", SMALL)
    other.join()
    output = run("ceremony", "contribute", partners.folder("press"), *other.secrets("press"), code=2).output
    assert "expected a keystore of a member that has joined" in output
    other.contribute()
    other.finish()
    second = second_epoch(other)
    finish_second(other, second, {name: other.root / name / "keystore.epoch-1.json" for name in other.members})
    output = run("ceremony", "contribute", second, *other.secrets("press"), code=2).output
    assert "takes part in none" in output


@pytest.mark.parametrize(("members", "options"), [(DEALT, ("--threshold", "data-source=2")), (SMALL, ())])
def test_contributing_after_the_end_says_that_nothing_more_is_due(
    members: dict[str, str], options: tuple[str, ...], tmp_path: Path
) -> None:
    partners = Partners(tmp_path, members, *options)
    partners.join()
    for _ in range(3 if options else 1):
        partners.contribute()
    partners.finish()
    for name in members:
        said = run("ceremony", "contribute", partners.folder(name), *partners.secrets(name)).output
        assert said == f"{tmp_path / name / 'keystore.json'} has finished this ceremony: nothing more is due\n"


def test_join_line_of_an_invitation_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COUNTERSIGN_PASSPHRASE", raising=False)
    members = [word for name, role in SMALL.items() for word in ("--member", f"{name}:{role}")]
    said = run("ceremony", "init", tmp_path / "f", "--name", "our.example/log", *members).output
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("words\n")
    passphrase.chmod(0o600)
    command, keystore_and_passphrase = said.splitlines()[-1].split("--keystore FILE")
    assert keystore_and_passphrase == " --passphrase-file FILE"
    joining = [*command.replace("NAME", "press").split()[1:], "--keystore", tmp_path / "keystore"]
    refused = run(*joining, code=2).output
    assert "expected --passphrase-file or the variable COUNTERSIGN_PASSPHRASE, found neither" in refused
    run(*joining, "--passphrase-file", passphrase)


def test_verify_refuses_another_chain_an_unfinished_ceremony_and_a_changed_genesis(tmp_path: Path) -> None:
    partners = Partners(tmp_path, SMALL)
    partners.join()
    folder = partners.folder("council")
    assert "ceremony-incomplete: waiting for the confirm of" in run("ceremony", "verify", folder, code=1).output
    partners.contribute()
    chain = partners.finish()
    assert "wrong-chain" in run("ceremony", "verify", folder, "--chain-id", "0" * 64, code=1).output
    genesis = genesis_from_json((folder / "genesis.json").read_bytes())
    assert genesis.chain_id.hex() == chain
    (folder / "genesis.json").write_bytes(genesis_to_json(genesis).replace(b"our.example", b"own.example"))
    assert "is not the genesis this ceremony ends in" in run("ceremony", "verify", folder, code=1).output
    refused = run("ceremony", "finish", folder, *partners.secrets("council"), code=2).output
    assert "found another file" in refused
    (folder / "genesis.json").write_bytes(genesis_to_json(genesis) + b"\n")
    assert "is not the genesis this ceremony ends in" in run("ceremony", "verify", folder, code=1).output
    assert "found another file" in run("ceremony", "finish", folder, *partners.secrets("council"), code=2).output


def test_key_share_is_never_printed_or_left_in_the_folder(partners: Partners) -> None:
    partners.join()
    for _ in range(3):
        partners.contribute()
    partners.finish()
    everything = b"".join(file.read_bytes() for file in partners.folder("press").iterdir())
    for name in partners.members:
        secrets = partners.keystore(name).secrets
        for secret in (secrets.identity_seed, secrets.transport_seed, secrets.log_seed, secrets.bls_share):
            assert secret is None or secret not in everything


def second_epoch(partners: Partners) -> Path:
    """The folder of a ceremony of epoch 1 that nobody has joined yet, without roles whose keys are dealt."""
    folder = partners.root / "second"
    first = folders.read_folder(partners.folder("council")).invitation
    folders.write_invitation(folder, msgspec.structs.replace(first, epoch=1))
    return folder


def finish_second(partners: Partners, folder: Path, keystores: dict[str, Path]) -> dict[str, str]:
    """Hold it, each with the identity it has; what joining and finishing said, by member."""
    digest = folders.read_folder(folder).invitation.digest.hex()
    said = {}
    for name, keystore in keystores.items():
        _, kept, *passphrase = partners.secrets(name)
        options = ("--invitation", digest, "--keystore", keystore, "--keep", kept, *passphrase)
        said[name] = run("ceremony", "join", folder, "--as", name, *options).output
    for name, keystore in keystores.items():
        run("ceremony", "contribute", folder, "--keystore", keystore, *partners.secrets(name)[2:])
    for name, keystore in keystores.items():
        said[name] += run("ceremony", "finish", folder, "--keystore", keystore, *partners.secrets(name)[2:]).output
    return said


def test_a_later_epochs_keystore_that_its_node_will_not_find_is_told(tmp_path: Path) -> None:
    partners = Partners(tmp_path, SMALL)
    partners.join()
    partners.contribute()
    partners.finish()
    folder = second_epoch(partners)
    names = {"library": "keystore.epoch-1.json", "press": "keystore.epoch-1.keystore", "council": "next.json",
             "laboratory": "keystore.epoch-2.json"}  # fmt: skip
    said = finish_second(partners, folder, {name: tmp_path / name / file for name, file in names.items()})
    assert "warning" not in said["library"]
    assert f"node.keystore is {tmp_path}/library/keystore.json, and no other" in said["library"]
    for name in ("press", "council", "laboratory"):
        own = tmp_path / name
        assert f"{own}/keystore.json looks for {own}/keystore.epoch-1.json in epoch 1" in said[name]
    assert f"there is no {tmp_path}/press/keystore.keystore" in said["press"]
    for name in ("council", "laboratory"):
        assert f"no node looks for {tmp_path / name / names[name]}" in said[name]
        assert "library.epoch-1.keystore" in said[name]


def test_verify_checks_a_ceremony_of_a_later_epoch(tmp_path: Path) -> None:
    partners = Partners(tmp_path, SMALL)
    partners.join()
    partners.contribute()
    chain = partners.finish()
    folder = second_epoch(partners)
    assert "ceremony-incomplete" in run("ceremony", "verify", folder, code=1).output
    finish_second(partners, folder, {name: tmp_path / name / "keystore.epoch-1.json" for name in SMALL})
    made = folder / "epoch-1.membership"
    said = run("ceremony", "verify", folder).output
    assert said.startswith("epoch  1\n")
    assert f"checked: every message of 4 members, and that {made} is what they end in" in said
    document = json.loads(run("ceremony", "verify", folder, "--json").output)
    assert document == {"epoch": 1, "membership": str(made), "members": 4}
    assert "expected a founding ceremony" in run("ceremony", "verify", folder, "--chain-id", chain, code=2).output
    made.write_bytes(made.read_bytes() + b"\0")
    assert f"{made} is not the membership this ceremony ends in" in run("ceremony", "verify", folder, code=1).output


def test_verify_writes_nothing_and_says_what_is_missing(tmp_path: Path) -> None:
    partners = Partners(tmp_path, SMALL)
    partners.join()
    partners.contribute()
    chain = partners.finish()
    folder = partners.folder("press")
    (folder / "genesis.json").unlink()
    said = run("ceremony", "verify", folder, "--chain-id", chain).output
    assert f"checked: every message of 4 members; {folder}/genesis.json is missing" in said
    assert json.loads(run("ceremony", "verify", folder, "--json").output)["genesis"] is None
    assert not (folder / "genesis.json").exists()
