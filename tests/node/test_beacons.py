"""Beacons over nodes: no share before finality, one value whoever gives shares, shares that outlive their epoch."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from api_fixtures import InstantNode, OtherMembers, Served, beacon_desk, node_of, refusal, served, voting_keys, wire
from click.testing import CliRunner, Result
from epoch_fixtures import change_event, next_membership
from ledger_fixtures import HOSPITAL, Story, begin, digest
from node_fixtures import CHEAP, PASSPHRASE, Consortium, change, next_epoch, running, until

from consensus.beacon import beacon_message, picked_steps
from consensus.codec import encode
from consensus.event import CheckedEvent
from consensus.genesis import genesis_to_json
from consensus.identifiers import VOTING_ROLES
from consensus.membership import Parameters
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.state import ChallengeRecord
from node.beacons import BeaconDesk
from node.cli import main
from node.clock import SystemClock
from node.keystore import Keystore, Secrets
from node.messages import BeaconShare, GetBeaconShare
from node.runner import Node
from node.service import EventState

pytestmark = pytest.mark.trio

FOUR = {"data-source": 4, "governance": 4, "operator": 4, "verifier": 1}
THREE = {"data-source": 3, "governance": 1, "operator": 1}
NAMES = ("data-source-1", "data-source-2", "data-source-3", "governance-1", "operator-1")


def taken(counts: dict[str, int] | None = None) -> Story:
    """A campaign that took five steps."""
    told = begin(counts=counts)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    for _ in range(5):
        told.ledger.seal(*told.run.step())
    return told


@dataclass
class Asked:
    """A challenge that is final at a node, and the desk of its operator."""

    told: Story
    node: InstantNode
    challenge: CheckedEvent

    @property
    def desk(self) -> BeaconDesk:
        return self.node.beacons

    @property
    def others(self) -> OtherMembers:
        assert isinstance(self.desk._peers, OtherMembers)
        return self.desk._peers

    @property
    def record(self) -> ChallengeRecord:
        return self.desk.record(self.told.run.id, self.challenge.id)


def asked(directory: Path, counts: dict[str, int] | None = None) -> Asked:
    told = taken(counts)
    challenge = told.ledger.audit_challenge(HOSPITAL, told.run.id)
    told.ledger.seal(challenge)
    node, _ = node_of(told, directory / "log")
    return Asked(told, node, challenge)


async def test_share_asked_before_finality_is_refused(tmp_path: Path) -> None:
    told = taken()
    node, _ = node_of(told, tmp_path / "log")
    challenge = told.ledger.audit_challenge(HOSPITAL, told.run.id)
    node.held = True
    node.submit(wire(challenge))
    assert node.status_of(challenge.id).state is EventState.PENDING
    with pytest.raises(Rejected, match="is not final; no share is given before it is") as refused:
        node.beacons.record(told.run.id, challenge.id)
    assert refused.value.reason is Reason.NOT_FOUND
    with pytest.raises(Rejected):
        await node.beacons.answer(GetBeaconShare(told.run.id, challenge.id))
    node.seal(challenge)
    assert node.beacons.record(told.run.id, challenge.id).number == 1


async def test_share_of_another_campaigns_challenge_is_refused(tmp_path: Path) -> None:
    found = asked(tmp_path)
    for campaign, challenge in (
        (digest("other"), found.challenge.id),
        (found.told.run.id, found.challenge.id[:16] + bytes(16)),
    ):
        with pytest.raises(Rejected) as refused:
            found.desk.record(campaign, challenge)
        assert refused.value.reason is Reason.NOT_FOUND


async def test_beacon_is_gathered_and_is_the_same_without_some(tmp_path: Path) -> None:
    found = asked(tmp_path, FOUR)
    whole = await found.desk.beacon(found.record)
    assert whole == found.told.ledger.beacon(found.told.run.id)
    found.others.silent = {f"{role.value}-4" for role in VOTING_ROLES}
    assert await found.desk.beacon(found.record) == whole


async def test_member_that_learns_later_that_the_challenge_is_final_is_asked_again(tmp_path: Path) -> None:
    found = asked(tmp_path)
    found.others.late = {"governance-1": 2, "data-source-1": 1}
    assert await found.desk.beacon(found.record) == found.told.ledger.beacon(found.told.run.id)
    assert found.others.late == {"governance-1": 0, "data-source-1": 0}


async def test_without_a_quorum_the_missing_members_are_named(tmp_path: Path) -> None:
    found = asked(tmp_path, FOUR)
    found.others.silent = {"governance-1", "governance-2"}
    with pytest.raises(Unavailable, match=r"too few shares of audit 1's beacon; none of governance-1, governance-2"):
        await found.desk.beacon(found.record)


def of_another_audit(found: Asked) -> Callable[[str, bytes], bytes]:
    ledger = found.told.ledger
    shares = ledger._shares(beacon_message(ledger.chain_id, 0, found.told.run.id, 2))
    return lambda name, answer: encode(BeaconShare(ledger.ids[name], shares[ledger.ids[name]]))


def of_another_epoch(found: Asked) -> Callable[[str, bytes], bytes]:
    ledger = found.told.ledger
    shares = ledger._shares(beacon_message(ledger.chain_id, 1, found.told.run.id, 1))
    return lambda name, answer: encode(BeaconShare(ledger.ids[name], shares[ledger.ids[name]]))


def of_another_member(found: Asked) -> Callable[[str, bytes], bytes]:
    ledger = found.told.ledger
    shares = ledger._shares(beacon_message(ledger.chain_id, 0, found.told.run.id, 1))
    return lambda name, answer: encode(BeaconShare(ledger.ids[name], shares[ledger.ids["data-source-1"]]))


def of_a_stranger(found: Asked) -> Callable[[str, bytes], bytes]:
    return lambda name, answer: encode(BeaconShare(digest("stranger"), bytes(96)))


def garbage(found: Asked) -> Callable[[str, bytes], bytes]:
    return lambda name, answer: b"\xff" * 40


@pytest.mark.parametrize("lie", [of_another_audit, of_another_epoch, of_another_member, of_a_stranger, garbage])
async def test_false_shares_spoil_no_beacon_that_the_honest_can_make(
    tmp_path: Path, lie: Callable[[Asked], Callable[[str, bytes], bytes]]
) -> None:
    found = asked(tmp_path, FOUR)
    forged = lie(found)
    found.others.spoil = lambda name, answer: forged(name, answer) if name.endswith("-2") else answer
    assert await found.desk.beacon(found.record) == found.told.ledger.beacon(found.told.run.id)
    two = ("governance-2", "governance-3")
    found.others.spoil = lambda name, answer: forged(name, answer) if name in two else answer
    with pytest.raises(Unavailable, match="none of governance-2, governance-3"):
        await found.desk.beacon(found.record)


async def test_member_that_does_not_vote_gathers_and_gives_none(tmp_path: Path) -> None:
    found = asked(tmp_path, FOUR)
    desk = beacon_desk(found.told.ledger, found.node.ledger, "operator-1", tmp_path / "other")
    desk.begin_epoch(None, "a verifier never votes")
    with pytest.raises(Unavailable, match="no share of audit 1: a verifier never votes"):
        desk.share(found.record)
    assert await desk.beacon(found.record) == found.told.ledger.beacon(found.told.run.id)


async def test_shares_of_an_ended_epoch_are_kept_for_what_is_not_answered(tmp_path: Path) -> None:
    told = taken()
    first, second = (told.ledger.audit_challenge(HOSPITAL, told.run.id, number) for number in (1, 2))
    told.ledger.seal(first, second)
    told.ledger.seal(told.ledger.audit_answer(first))
    node, _ = node_of(told, tmp_path / "log")
    record = node.beacons.record(told.run.id, second.id)
    made, keys = node.beacons.share(record), voting_keys(node.memory, "operator-1")
    assert not node.beacons.owed()
    membership, _ = next_membership(node.memory.genesis, node.memory.committee, node.memory.secrets)
    node.seal(change_event(node.memory, membership))
    node.beacons.begin_epoch(None, "")
    assert node.beacons.owed() == {0: [record]}
    with pytest.raises(Unavailable, match="no share of audit 2 of epoch 0"):
        node.beacons.share(record)
    node.beacons.keep(record, keys, node.ledger.epochs.of(0).scheme)
    assert node.beacons.share(record) == made
    assert not node.beacons.owed()
    with pytest.raises(Unavailable, match="no share of audit 1 of epoch 0"):
        node.beacons.share(node.beacons.record(told.run.id, first.id))


async def test_share_and_beacon_over_http(tmp_path: Path) -> None:
    told = taken()
    challenge = told.ledger.audit_challenge(HOSPITAL, told.run.id)
    async with served(tmp_path / "log", story=told) as here:
        path = f"/v1/audits/{told.run.id.hex()}/{challenge.id.hex()}"
        for what in ("share", "beacon"):
            assert refusal(await here.client.get(f"{path}/{what}")) == (404, "not-found")
        assert (await here.client.post("/v1/events", content=wire(challenge))).status_code == 202
        share = (await here.client.get(f"{path}/share")).json()
        assert (share["voter"], share["epoch"]) == (here.node.member("operator-1").hex(), 0)
        beacon = (await here.client.get(f"{path}/beacon")).json()
        assert beacon == {"number": 1, "epoch": 0, "beacon": here.node.memory.beacon(told.run.id).hex()}
        here.node.beacons._peers.silent = {"governance-1"}
        assert (await here.client.get(f"{path}/beacon")).status_code == 503
        assert refusal(await here.client.get(f"/v1/audits/xyz/{challenge.id.hex()}/share"))[1] == "malformed"


class LogClock(SystemClock):
    """Goes on from the time at which a ledger in memory ended."""

    def __init__(self, told: Story) -> None:
        self._ahead_ms = told.ledger.now_ms - super().now_ms()

    def now_ms(self) -> int:
        return super().now_ms() + self._ahead_ms


def config_of(here: Served, directory: Path) -> Path:
    """The configuration of who asks this node; without keys, which a beacon needs none of."""
    genesis = here.node.memory.genesis
    (directory / "genesis.json").write_bytes(genesis_to_json(genesis))
    path = directory / "node.toml"
    path.write_text(
        f"""
[node]
name = "data-source-2"
genesis = "genesis.json"
chain_id = "{genesis.chain_id.hex()}"
data_directory = "data"
keystore = "none.keystore"

[network]
listen = "127.0.0.1:1"

[api]
listen = "127.0.0.1:{here.address.port}"
"""
    )
    return path


async def command(*arguments: object) -> Result:
    return await trio.to_thread.run_sync(lambda: CliRunner().invoke(main, [str(argument) for argument in arguments]))


async def test_command_shows_the_picked_steps_once_the_challenge_is_final(tmp_path: Path) -> None:
    told = taken()
    challenge = told.ledger.audit_challenge(HOSPITAL, told.run.id)
    async with served(tmp_path / "log", story=told) as here:
        config = config_of(here, tmp_path)
        subject = ("--campaign", told.run.id.hex(), "--challenge", challenge.id.hex())
        ask = ("audit", "beacon", "--config", config, *subject)
        early = await command(*ask)
        assert (early.exit_code, "is no final audit challenge" in early.stderr) == (1, True), early.stderr
        await here.client.post("/v1/events", content=wire(challenge))
        out = tmp_path / "audit.json"
        found = await command(*ask, "--out", out)
        assert found.exit_code == 0, found.output
        document = json.loads(out.read_text())
        beacon = here.node.memory.beacon(told.run.id)
        assert bytes.fromhex(document["beacon"]) == beacon
        assert document["steps"] == list(picked_steps(beacon, 1, 4, 2))
        assert f"audit 1: steps {document['steps'][0]}, {document['steps'][1]}" in found.output
        assert json.loads((await command(*ask, "--json")).output) == document


async def test_command_believes_no_beacon_that_its_node_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = taken()
    challenge = told.ledger.audit_challenge(HOSPITAL, told.run.id)
    async with served(tmp_path / "log", story=told) as here:
        config = config_of(here, tmp_path)
        await here.client.post("/v1/events", content=wire(challenge))

        async def lie(record: ChallengeRecord) -> bytes:
            return here.node.memory.beacon(told.run.id, 2)

        monkeypatch.setattr(here.node.beacons, "beacon", lie)
        subject = ("--campaign", told.run.id.hex(), "--challenge", challenge.id.hex())
        found = await command("audit", "beacon", "--config", config, *subject, "--out", tmp_path / "audit.json")
        assert (found.exit_code, "bad-signature" in found.stderr) == (1, True), found.stderr
        assert not (tmp_path / "audit.json").exists()


async def test_commands_lead_from_the_challenge_to_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = taken()
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    monkeypatch.setattr("node.commands.audit.SystemClock", lambda: LogClock(told))
    async with served(tmp_path / "log", story=told) as here:
        config = config_of(here, tmp_path)
        held = told.ledger.secrets[HOSPITAL]
        secrets = Secrets(
            identity_seed=held.identity_seed,
            transport_seed=held.transport_seed,
            log_seed=held.log_seed or bytes(32),
            bls_share=None,
        )
        Keystore.create(tmp_path / "none.keystore", secrets, PASSPHRASE, CHEAP)
        subject = ("--config", config, "--campaign", told.run.id.hex())
        picks = ("--last-step", 4, "--picks", 2)
        for _ in (1, 2):
            made = await command("audit", "challenge", *subject, *picks, "--json")
            assert made.exit_code == 0, made.output
        challenge = json.loads(made.output)
        assert (challenge["kind"], challenge["status"]) == ("audit-challenge", "final")
        shown = await command("audit", "beacon", *subject, "--challenge", challenge["id"], "--json")
        audit = json.loads(shown.output)
        assert audit["number"] == 2
        replay = {
            **{name: audit[name] for name in ("chain_id", "campaign")},
            **{"steps": 5, "matched": 2, "difference": None, "without": [], "environment": {"torch": "2.13.0"}},
            "end_root": bytes(32).hex(),
            "picked": [{"step": step, "differing": []} for step in audit["steps"]],
            "audit": {name: audit[name] for name in ("challenge", "beacon", "first_step", "last_step")},
        }
        report = tmp_path / "replay.json"
        report.write_text(json.dumps(replay))
        recorded = await command("audit", "record", "--config", config, "--replay", report)
        assert recorded.exit_code == 0, recorded.output
        assert "2 steps picked by lot: all came out as recorded" in recorded.output
        record = here.node.beacons.record(told.run.id, bytes.fromhex(challenge["id"]))
        assert (record.number, record.standing) == (2, "passed")
        again = await command("audit", "record", "--config", config, "--replay", report)
        assert (again.exit_code, "duplicate" in again.stderr) == (1, True)


# Whole nodes


async def finalize(node: Node, event: bytes) -> None:
    taken_in = node.submit(event)
    status = await node.wait_final(taken_in.id, 20)
    assert status.state is EventState.FINAL, status


async def test_nodes_make_the_beacon_of_an_ended_epoch_from_the_shares_they_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    told = taken(THREE)
    consortium = Consortium(tmp_path, THREE, Parameters(), clock=LogClock(told))
    assert consortium.genesis == told.ledger.genesis
    first, second = (told.ledger.audit_challenge(HOSPITAL, told.run.id, number) for number in (1, 2))
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium)
    async with running(nodes):
        await until(lambda: all(len(node.snapshot().peers_connected) == 4 for node in nodes))
        for event in told.ledger.events:
            await finalize(nodes[4], wire(event))
        with pytest.raises(Rejected):
            nodes[0].beacons.record(told.run.id, first.id)
        await finalize(nodes[1], wire(first))
        record = nodes[1].beacons.record(told.run.id, first.id)
        beacon = await nodes[1].beacons.beacon(record)
        assert beacon == told.ledger.beacon(told.run.id, 1)
        await finalize(nodes[1], wire(second))
        await finalize(nodes[1], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        await until(lambda: all(len(node.snapshot().peers_connected) == 4 for node in nodes))
        assert (tmp_path / "data-source-3" / "beacon-shares" / f"{second.id.hex()}.share").exists()
        later = nodes[0].beacons.record(told.run.id, second.id)
        assert await nodes[0].beacons.beacon(later) == told.ledger.beacon(told.run.id, 2)
        await finalize(nodes[1], wire(told.ledger.audit_answer(first)))
        await finalize(nodes[1], wire(told.ledger.audit_answer(second)))
        await until(lambda: nodes[0].beacons.record(told.run.id, second.id).standing == "passed")
