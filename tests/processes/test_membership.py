"""A consortium changes its members while it runs: by commands, over files, among processes, one of them killed."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from process_fixtures import Processes, processes, source

from consensus.identifiers import Role
from node.ceremony import read_folder
from node.cli import main
from node.commands import ceremony as commands
from node.config import Address
from node.identity import epoch_keystore
from node.keystore import Keystore
from node.provision import RANDOM_PASSPHRASE_COST, MemberRequest, free_ports

pytestmark = pytest.mark.processes

NOW = ("library", "press", "council", "laboratory", "guild")
NEXT = ("library", "council", "laboratory", "guild", "archive")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def prepare(consortium: Processes, directory: Path) -> None:
    """Configuration and passphrase of ``archive``, which has no keystore yet; its address with everybody."""
    network, api = free_ports(2)
    made = consortium.provisioned
    library = made.members["library"]
    archive = dataclasses.replace(
        library,
        name="archive",
        directory=directory / "archive",
        config=directory / "archive" / "node.toml",
        keystore=directory / "archive" / "keystore.json",
        passphrase=directory / "archive" / "passphrase",
        network=Address("127.0.0.1", network),
        api=Address("127.0.0.1", api),
    )
    archive.directory.mkdir()
    archive.passphrase.write_text("the passphrase of archive\n")
    archive.passphrase.chmod(0o600)
    own, peer = f'listen = "{library.network}"', f'library = "{library.network}"'
    text = library.config.read_text().replace('name = "library"', 'name = "archive"')
    text = text.replace(own, f'listen = "{archive.network}"').replace(str(library.api), str(archive.api))
    archive.config.write_text(text.replace("[network.peers]\n", f"[network.peers]\n{peer}\n"))
    for member in made.members.values():
        text = member.config.read_text()
        member.config.write_text(text.replace("[network.peers]\n", f'[network.peers]\narchive = "{archive.network}"\n'))
    made.members["archive"] = archive


def next_secrets(consortium: Processes, names: Iterable[str]) -> dict[str, tuple[object, ...]]:
    """The options that name each member's keystore of epoch 1."""
    members = consortium.provisioned.members
    return {
        name: ("--keystore", epoch_keystore(members[name].keystore, 1), "--passphrase-file", members[name].passphrase)
        for name in names
    }


def finish_ceremony(folder: Path, secrets: Mapping[str, tuple[object, ...]]) -> None:
    """All rounds after the joining, by all who have joined."""
    for _ in range(4):
        for own in secrets.values():
            run("ceremony", "contribute", folder, *own)
    for own in secrets.values():
        assert "members of epoch 1" in run("ceremony", "finish", folder, *own)


def test_member_joins_and_one_leaves_by_commands_while_the_nodes_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "MODERATE_COST", RANDOM_PASSPHRASE_COST)
    with processes(tmp_path / "consortium") as consortium:
        members = consortium.provisioned.members
        prepare(consortium, tmp_path / "consortium")
        consortium.start(*NOW)
        assert consortium.post("library", source(consortium, "library", 1), 30).json()["status"] == "final"

        folder, config = tmp_path / "second", {name: members[name].config for name in (*NOW, "archive")}
        told = run("membership", "invite", folder, "--config", config["library"], "--add", "archive:data-source",
                   "--remove", "press")  # fmt: skip
        assert "--keystore STEM.epoch-1.SUFFIX --passphrase-file FILE\nand with --keep STEM.SUFFIX if it stays" in told
        assert "beside library.keystore its node looks for\nlibrary.epoch-1.keystore" in told
        invited = read_folder(folder).invitation.digest.hex()
        secrets = next_secrets(consortium, NEXT)
        for name in NEXT:
            keep = () if name == "archive" else ("--keep", members[name].keystore)
            run("ceremony", "join", folder, "--as", name, "--invitation", invited, *secrets[name], *keep)
        finish_ceremony(folder, secrets)

        change, sign = tmp_path / "change.event", ("membership", "sign", "--config")
        said = run(*sign, config["library"], "--membership", folder / "epoch-1.membership", "--out", change)
        assert "join: archive\nleave: press\nsigned by library\n1 more of data-source must sign" in said
        assert "change their keys" not in said
        for name in ("press", "council"):
            run(*sign, config[name], "--event", change, "--out", change)
        consortium.start("archive")
        assert "final" in run(*sign, config["laboratory"], "--event", change, "--submit")
        consortium.kill("council")
        consortium.start("council")
        for name in NEXT:
            consortium.wait_until(lambda name=name: consortium.status(name)["epoch"] == 1)  # type: ignore[misc]
        for name in NEXT:
            if name != "guild":
                consortium.wait_until(lambda name=name: consortium.status(name)["voting"])  # type: ignore[misc]
        consortium.wait_until(lambda: "no member of epoch 1" in str(consortium.status("press")["why_not_voting"]))

        assert consortium.post("library", source(consortium, "press", 2)).json()["error"] == "unknown-member"
        seen = tmp_path / "witnessed.txt"
        run("witness", "key", "--name", "witness.example", "--out", tmp_path / "witness.key")
        cosign = ("witness", "cosign", "--key", tmp_path / "witness.key", "--checkpoint", seen, "--config")
        assert "the first that this witness signs" in run(*cosign, config["council"])
        assert "archive" in run("log", "checkpoint", "--config", config["archive"]), "signed by who joined later"

        content = tmp_path / "new.txt"
        content.write_text("a line\n")
        claim = tmp_path / "claim.event"
        run("source", "sign", "--config", config["archive"], "--name", "new", "--content", content, "--lines",
            "--licence", "CC0-1.0", "--rights-basis", "own", "--purpose", "research", "--class", "open",
            "--salt-file", tmp_path / "new.salt", "--out", claim)  # fmt: skip
        signed = json.loads(run("log", "submit", "--config", config["council"], claim, "--json"))
        assert signed["status"] == "final"
        shown = json.loads(run("membership", "show", "--config", config["guild"], "--json"))
        assert (shown["epoch"], [member["name"] for member in shown["members"]]) == (1, list(NEXT))
        assert "signed before" in run(*cosign, config["archive"])
        noted = json.loads(run("log", "checkpoint", "--config", config["archive"], "--json"))
        assert noted["signers"] == ["archive"]
        late = run(*sign, config["council"], "--event", change, "--submit", code=1)
        assert "wrong-epoch: the members of epoch 1: it is epoch 1 already" in late

        bundle, genesis = tmp_path / "new.bundle", tmp_path / "consortium" / "genesis.json"
        run("log", "prove", "--config", config["guild"], "--predicate", "included", "--event", signed["id"],
            "--out", bundle)  # fmt: skip
        verdict = run("verify", "included", "--bundle", bundle, "--genesis", genesis, "--chain-id",
                      consortium.provisioned.chain_id.hex())  # fmt: skip
        assert "to epoch 1: one change of members" in verdict
        assert "answer: yes" in verdict


THREE = (
    MemberRequest("library", Role.DATA_SOURCE),
    MemberRequest("press", Role.DATA_SOURCE),
    MemberRequest("archive", Role.DATA_SOURCE),
    MemberRequest("council", Role.GOVERNANCE),
    MemberRequest("laboratory", Role.OPERATOR),
)


def test_shares_are_refreshed_by_commands_under_the_role_keys_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "MODERATE_COST", RANDOM_PASSPHRASE_COST)
    names = [member.name for member in THREE]
    quorums = {Role.DATA_SOURCE: 2, Role.GOVERNANCE: 1, Role.OPERATOR: 1}
    with processes(tmp_path / "consortium", *names, members=THREE, thresholds=quorums) as consortium:
        members, folder = consortium.provisioned.members, tmp_path / "fresh"
        config = {name: members[name].config for name in names}

        def share(keystore: Path, name: str) -> bytes | None:
            return Keystore.open(keystore, members[name].passphrase.read_bytes().strip()).secrets.bls_share

        assert consortium.post("library", source(consortium, "library", 1), 30).json()["status"] == "final"
        before = {name: share(members[name].keystore, name) for name in names}
        told = run("membership", "refresh", folder, "--config", config["library"])
        invited = read_folder(folder).invitation.digest.hex()
        assert invited in told
        assert "--keep" in told
        secrets = next_secrets(consortium, names)
        held = {name: epoch_keystore(members[name].keystore, 1) for name in names}
        join = ("ceremony", "join", folder, "--invitation", invited, "--as")
        assert "this refreshes its keys" in run(*join, "library", *secrets["library"], code=2)
        other = run(*join, "press", *secrets["library"], "--keep", members["library"].keystore, code=1)
        assert "a refresh changes none" in other
        for name in names:
            run(*join, name, *secrets[name], "--keep", members[name].keystore)
        finish_ceremony(folder, secrets)

        change, sign = tmp_path / "change.event", ("membership", "sign", "--config")
        said = run(*sign, config["library"], "--membership", folder / "epoch-1.membership", "--out", change)
        assert "role keys that stay, under new shares where some members are enough: data-source" in said
        run(*sign, config["archive"], "--event", change, "--out", change)
        run(*sign, config["council"], "--event", change, "--out", change)
        consortium.kill("press")
        assert "final" in run(*sign, config["laboratory"], "--event", change, "--submit")
        for name in names:
            if name != "press":
                consortium.wait_until(lambda name=name: consortium.status(name)["epoch"] == 1)  # type: ignore[misc]
        # Two of three data-sources sign under the old key with the new shares.
        signed = consortium.post("library", source(consortium, "library", 2), 30).json()
        assert signed["status"] == "final"
        consortium.start("press")
        consortium.wait_until(lambda: consortium.status("press")["voting"])
        for name in names:
            assert share(held[name], name) is not None
            dealt = name in ("library", "press", "archive")
            assert (share(held[name], name) != before[name]) is dealt
            consortium.wait_until(  # an old share is erased once nothing is owed with it
                lambda name=name, dealt=dealt: (share(members[name].keystore, name) is None) is dealt  # type: ignore[misc]
            )

        bundle, genesis = tmp_path / "second.bundle", tmp_path / "consortium" / "genesis.json"
        run("log", "prove", "--config", config["council"], "--predicate", "included", "--event", signed["id"],
            "--out", bundle)  # fmt: skip
        verdict = run("verify", "included", "--bundle", bundle, "--genesis", genesis, "--chain-id",
                      consortium.provisioned.chain_id.hex())  # fmt: skip
        assert "to epoch 1: one change of members" in verdict
        assert "answer: yes" in verdict
