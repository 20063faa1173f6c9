"""Five node processes on loopback: kill -9 at any instant, restart, and nothing acknowledged is lost."""

import random
import signal
import subprocess
from pathlib import Path

import pytest
from process_fixtures import COUNTERSIGN, processes, source

from consensus.membership import BLS_THRESHOLD, SCHEME_NEEDS

pytestmark = pytest.mark.processes

NAMES = ("library", "press", "council", "laboratory", "guild")
KILLS = 8


def test_kill_minus_nine_at_random_instants_loses_nothing_acknowledged(tmp_path: Path) -> None:
    instants = random.Random(20_240_607)
    with processes(tmp_path / "consortium", *NAMES) as consortium:
        acknowledged: list[str] = []
        for cycle in range(KILLS):
            victim = NAMES[cycle % len(NAMES)]
            owner = "press" if victim == "library" else "library"
            in_flight = [
                consortium.post(owner, source(consortium, owner, 100 * cycle + number)) for number in range(10)
            ]
            assert {answer.status_code for answer in in_flight} == {202}, in_flight[0].text
            if instants.random() < 0.5:
                event = in_flight[0].json()["id"]
                consortium.get(owner, f"/v1/events/{event}?wait=1")
            consortium.kill(victim)
            consortium.start(victim)
            for answer in in_flight:
                event = answer.json()["id"]
                found = consortium.get(owner, f"/v1/events/{event}?wait=30")
                assert found is not None, consortium.log(owner)
                assert found["status"] == "final", (found, consortium.log(owner))
                acknowledged.append(event)
        assert all(consortium.status(name)["voting"] for name in NAMES[:4])
        consortium.assert_whole(acknowledged)


@pytest.mark.parametrize("certificate_scheme", [name for name in SCHEME_NEEDS if name != BLS_THRESHOLD])
def test_kill_minus_nine_under_every_other_certificate_scheme_loses_nothing_acknowledged(
    tmp_path: Path, certificate_scheme: str
) -> None:
    voters = NAMES[:4]
    with processes(tmp_path / "consortium", *voters, certificate_scheme=certificate_scheme) as consortium:
        acknowledged: list[str] = []
        for victim in ("press", "council"):
            for number in range(len(acknowledged), len(acknowledged) + 10):
                answer = consortium.post("library", source(consortium, "library", number))
                assert answer.status_code == 202, answer.text
                acknowledged.append(answer.json()["id"])
            assert consortium.is_final("library", acknowledged[0], 60), consortium.log("library")
            consortium.kill(victim)
            consortium.start(victim)
        consortium.assert_whole(acknowledged)


def test_no_event_is_final_without_every_role_and_all_are_once_it_is_back(tmp_path: Path) -> None:
    with processes(tmp_path / "consortium", *NAMES) as consortium:
        consortium.kill("council", signal.SIGTERM)
        event = consortium.post("library", source(consortium, "library", 1)).json()["id"]
        waiting = consortium.get("library", f"/v1/events/{event}?wait=2")
        assert waiting is not None
        assert waiting["status"] == "pending"
        consortium.start("council")
        final = consortium.get("library", f"/v1/events/{event}?wait=30")
        assert final is not None
        assert final["status"] == "final"


def test_second_node_on_the_same_data_directory_is_refused_by_name(tmp_path: Path) -> None:
    with processes(tmp_path / "consortium", "library") as consortium:
        config = str(consortium.provisioned.members["library"].config)
        second = subprocess.run(
            [COUNTERSIGN, "node", "run", "--config", config], capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 2
        assert "locked by process" in second.stderr
        assert "Traceback" not in second.stderr
        assert consortium.get("library", "/v1/health") is not None
