"""The demonstration's job as the demonstration starts it: a process, a configuration file, lines on stdout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from demo_job_fixtures import CAMPAIGN, SEED, written_config
from fake_node import running_node
from safetensors.torch import load_file

from consensus import portions as p
from consensus.codec import encode
from consensus.event import Kind
from trainer_client.commitment import root_of_tensors
from trainer_client.demo.job import main


def test_job_process_trains_reports_and_releases_once_a_custodian_gave_its_word(tmp_path: Path) -> None:
    lines = []
    with running_node() as node:
        node.policy(custody=("governance",), entropy_edges_milli=(4_000,))
        config = written_config(node, tmp_path, accumulator_window_steps=6, custody_wait_seconds=100.0)
        command = [sys.executable, "-m", "trainer_client.demo.job", "--config", str(config)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as job:
            assert job.stdout is not None
            for line in job.stdout:
                lines.append(json.loads(line))
                if lines[-1]["event"] == "custody":
                    word = p.SaltedPortion(bytes(32), encode(p.Custody(node.head(CAMPAIGN).last_event)))
                    node.by_member("governance-1", Kind.CUSTODY, p.Portions(None, word, None), campaign=CAMPAIGN)
        assert job.returncode == 0
        head = node.head(CAMPAIGN)
        releases = [event for event in node.order if event.entry.kind is Kind.RELEASE]
    assert (head.closed, head.steps) == ("released", 6)
    assert [line["event"] for line in lines].count("custody") == 1
    assert (tmp_path / "job" / "base-losses" / f"{CAMPAIGN.hex()}.losses").stat().st_size > 0
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert all(line["of"] == 6 and line["loss"] > 0 for line in lines if line["event"] == "step")
    assert {"base", "campaign", "grant", "refusal", "release", "done"} <= {line["event"] for line in lines}
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    assert summary["steps"] == len(summary["losses"]) == 6
    assert summary["refused_examples"] == {"licence-not-admitted": head.refused}
    assert summary["release"] == releases[0].id.hex()
    assert {fact["source"] for fact in summary["facts"]} == {
        "debugger-manual",
        "callers-weekly",
        "assignment-letters",
    }
    assert root_of_tensors(load_file(tmp_path / "release" / "tuned.safetensors")) == head.root


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"surprise": 1}, "unknown field"),
        ({"chain_id": "xyz"}, "chain_id: expected 32 bytes"),
        ({"job_key_file": "nowhere"}, "expected a readable file"),
        ({"example_bytes": 100}, "expected examples of 100 bytes"),
    ],
)
def test_wrong_configuration_is_named_and_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], said: str
) -> None:
    with running_node() as node:
        assert main(["--config", str(written_config(node, tmp_path, **change))]) == 2
    assert said in capsys.readouterr().err


def test_refused_campaign_is_named_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_node() as node:
        node.policy(purposes=("evaluation",))
        assert main(["--config", str(written_config(node, tmp_path))]) == 1
    assert "purpose-not-admitted" in capsys.readouterr().err


def test_job_key_file_of_the_delegation_command_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_node() as node:
        config = written_config(node, tmp_path)
        (tmp_path / "job.key").write_text(
            json.dumps({"job_key_scheme": "ed25519", "job_key_seed": SEED.hex(), "campaign": CAMPAIGN.hex()})
        )
        assert main(["--config", str(config)]) == 1
    assert "unknown-policy" in capsys.readouterr().err
