"""Node processes in network namespaces whose cables are cut, slow and lossy: nothing acknowledged is lost or forked."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespace_fixtures import NAMES, NamespaceProcesses, namespace_processes
from process_fixtures import source

pytestmark = pytest.mark.processes

SKEWED_NODE = Path(__file__).parents[1] / "skewed_node.py"
SILENT_SECONDS = 30
"""By when a node knows that whoever was cut off is gone; it is five seconds on an idle machine."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NamespaceProcesses]:
    """One network for all tests of this file; each goes on with the log of the one before."""
    with namespace_processes(tmp_path_factory.mktemp("cut") / "consortium") as consortium:
        yield consortium


@pytest.fixture
def network(shared: NamespaceProcesses) -> NamespaceProcesses:
    """Every node running and connected, every cable good."""
    shared.heal()
    shared.start(*(name for name in NAMES if name not in shared.running))
    for name in NAMES:
        shared.wait_until(lambda name=name: shared.status(name)["peers_connected"] == connected(name), 60)  # type: ignore[misc]
    return shared


def connected(name: str) -> list[str]:
    return sorted(other for other in NAMES if other != name)


def submit(network: NamespaceProcesses, owner: str, number: int) -> str:
    """An event that a node has taken; its id."""
    answer = network.post(owner, source(network, owner, number))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_partition_of_a_minority_stops_it_alone_and_loses_nothing_on_either_side(network: NamespaceProcesses) -> None:
    before = submit(network, "press", 100)
    assert network.is_final("press", before, 60)
    network.partition("press")
    lost = network.status("press")["log_size"]
    stranded = submit(network, "press", 101)
    acknowledged = [submit(network, "library", number) for number in range(102, 112)]
    for event in acknowledged:
        assert network.is_final("library", event, 60), network.log("library")
    network.wait_until(lambda: network.status("press")["peers_connected"] == [], SILENT_SECONDS)
    assert network.status("press")["roles_connected"] == {"data-source": 1, "governance": 0, "operator": 0}
    assert network.status("press")["log_size"] == lost
    assert not network.is_final("press", stranded)
    network.heal()
    assert network.is_final("library", stranded, 60), network.log("press")
    network.assert_whole([before, stranded, *acknowledged])


def test_partition_without_a_quorum_on_either_side_finalizes_nothing_and_loses_nothing(
    network: NamespaceProcesses,
) -> None:
    left, right = ("library", "press", "council"), ("archive", "laboratory")
    network.partition(*left)
    sizes = {name: network.status(name)["log_size"] for name in NAMES}
    waiting = [submit(network, owner, 200) for owner in ("library", "archive")]
    network.wait_until(lambda: network.status("council")["peers_connected"] == ["library", "press"], SILENT_SECONDS)
    network.wait_until(lambda: network.status("archive")["peers_connected"] == ["laboratory"], SILENT_SECONDS)
    for name in (*left, *right):
        assert network.status(name)["log_size"] == sizes[name]
        assert not any(network.is_final(name, event) for event in waiting)
    network.heal()
    for name in NAMES:
        assert all(network.is_final(name, event, 60) for event in waiting), network.log(name)
    network.assert_whole(waiting)


def test_node_that_hears_and_is_not_heard_forks_nothing_and_is_back_when_it_is(network: NamespaceProcesses) -> None:
    network.link(["archive"], connected("archive"), blocked=True)
    acknowledged = [submit(network, "library", number) for number in range(300, 310)]
    for event in acknowledged:
        assert network.is_final("library", event, 60), network.log("library")
    network.wait_until(lambda: "archive" not in str(network.status("library")["peers_connected"]), SILENT_SECONDS)
    network.wait_until(lambda: network.status("archive")["peers_connected"] == [], SILENT_SECONDS)
    network.heal()
    back = submit(network, "archive", 310)
    assert network.is_final("archive", back, 60), network.log("archive")
    network.assert_whole([*acknowledged, back])


def test_node_that_is_suspended_holds_up_nobody_and_is_whole_when_it_goes_on(network: NamespaceProcesses) -> None:
    """SIGSTOP under load, for longer than the silence after which the others close their connections."""
    acknowledged = [submit(network, owner, 350 + number) for number in range(5) for owner in ("press", "library")]
    with network.suspended("press"):
        meanwhile = 360

        def is_missed() -> bool:
            nonlocal meanwhile
            acknowledged.append(submit(network, "library", meanwhile))
            meanwhile += 1
            assert network.is_final("library", acknowledged[-1], 60), network.log("library")
            return not any("press" in str(network.status(name)["peers_connected"]) for name in connected("press"))

        network.wait_until(is_missed, SILENT_SECONDS)
    back = submit(network, "press", 351)
    assert network.is_final("press", back, 60), network.log("press")
    network.wait_until(lambda: bool(network.status("press")["voting"]), 60)
    network.assert_whole([*acknowledged, back])


def test_slow_and_lossy_links_delay_events_and_lose_none(network: NamespaceProcesses) -> None:
    network.link(NAMES, NAMES, delay_seconds=0.05, loss=0.05)
    acknowledged = [submit(network, owner, 400 + number) for number in range(5) for owner in NAMES[:3]]
    for event in acknowledged:
        assert network.is_final("library", event, 120), network.log("library")
    network.heal()
    network.assert_whole(acknowledged)


def test_events_become_final_where_every_message_takes_longer_than_the_first_timeout(
    network: NamespaceProcesses,
) -> None:
    network.link(NAMES, NAMES, delay_seconds=0.45)
    acknowledged = []
    for number in range(3):
        acknowledged.append(submit(network, "library", 450 + number))
        assert network.is_final("library", acknowledged[-1], 60), network.log("library")
    network.heal()
    network.assert_whole(acknowledged)


def test_kill_minus_nine_while_the_network_flaps_loses_nothing_acknowledged(network: NamespaceProcesses) -> None:
    instants = random.Random(20_241_129)
    acknowledged: list[str] = []
    for cycle in range(6):
        victim, cut = instants.sample(NAMES, 2)
        owner = next(name for name in NAMES[:3] if name not in (victim, cut))
        pending = [submit(network, owner, 500 + 10 * cycle + number) for number in range(5)]
        network.partition(cut)
        if instants.random() < 0.5:
            network.is_final(owner, pending[0], 1)
        network.kill(victim)
        network.start(victim)
        network.heal()
        for event in pending:
            assert network.is_final(owner, event, 60), network.log(owner)
        acknowledged += pending
    network.assert_whole(acknowledged)
    network.start(*NAMES)
    for name in NAMES:
        network.wait_until(lambda name=name: bool(network.status(name)["voting"]), 60)  # type: ignore[misc]


def test_clock_far_off_is_refused_by_name_and_stops_nobody_else(network: NamespaceProcesses) -> None:
    for name, offset_ms in (("press", 2_000), ("archive", 60_000)):
        network.kill(name)
        network.programs[name] = [sys.executable, str(SKEWED_NODE), str(offset_ms)]
        network.start(name)
    acknowledged: list[str] = []

    def refused() -> bool:
        """Submit on until archive has led a view and others have led ones that archive judged."""
        acknowledged.append(submit(network, "library", 600 + len(acknowledged)))
        assert network.is_final("library", acknowledged[-1], 60), network.log("library")
        return "by archive is" in network.log("library") and "behind our clock" in network.log("archive")

    network.wait_until(refused, 60)
    assert "ms ahead of our clock, at most 5000 allowed" in network.log("library")
    assert "by press is" not in network.log("library")
    ahead = network.status("library")["clocks_ahead_ms"]
    assert isinstance(ahead, dict)
    assert ahead["archive"] > 50_000
    for name in ("press", "archive"):
        network.kill(name)
        del network.programs[name]
        network.start(name)
    network.assert_whole(acknowledged)
