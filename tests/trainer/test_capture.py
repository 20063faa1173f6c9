"""The captured environment: complete, digestible, and without secrets."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consensus.codec import decode, encode
from trainer_client import capture
from trainer_client.capture import (
    WITHHELD,
    Environment,
    capture_environment,
    environment_digest,
    shown_command_line,
)


def facts(directory: Path) -> dict[str, str]:
    return {setting.name: setting.value for setting in capture_environment(directory).settings}


def git(directory: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


def test_capture_is_canonical_and_its_digest_covers_every_setting(tmp_path: Path) -> None:
    environment = capture_environment(tmp_path)
    assert decode(encode(environment), Environment, 1 << 20) == environment
    names = [setting.name for setting in environment.settings]
    assert names == sorted(set(names))
    assert environment_digest(environment) == environment_digest(capture_environment(tmp_path))
    shortened = Environment(environment.settings[1:])
    assert environment_digest(shortened) != environment_digest(environment)


def test_capture_names_versions_threads_and_flags(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert found["torch"] == torch.__version__
    assert found["torch.threads"] == str(torch.get_num_threads())
    assert found["torch.deterministic_algorithms"] == "False"
    assert found["code.commit"] == "none"
    assert int(found["packages.count"]) > 10


def test_seed_and_driver_are_named(tmp_path: Path) -> None:
    torch.manual_seed(1_234)
    assert facts(tmp_path)["torch.initial_seed"] == "1234"
    version = tmp_path / "version"
    assert capture._driver(version) == "none"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    assert capture._driver(version) == "550.54.15"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n")
    assert capture._driver(version) == "570.86.10"
    version.write_text("another driver\n")
    assert capture._driver(version) == "unknown"


def test_container_and_its_image_are_named_where_something_tells(tmp_path: Path) -> None:
    assert capture._container_facts({}, tmp_path) == {"container": "none", "container.image": "none"}
    kubernetes = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert capture._container_facts(kubernetes, tmp_path) == {"container": "kubernetes", "container.image": "unknown"}
    (tmp_path / ".dockerenv").touch()
    named = {"COUNTERSIGN_CONTAINER_IMAGE": "trainer@sha256:12"}
    assert capture._container_facts(named, tmp_path) == {"container": "docker", "container.image": "trainer@sha256:12"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.containerenv").write_text('engine="podman-4"\nimage="trainer:1"\nimageid="ab12"\n')
    assert capture._container_facts({}, tmp_path) == {"container": "podman", "container.image": "trainer:1 ab12"}
    assert capture._container_facts(named, tmp_path)["container.image"] == "trainer@sha256:12"


def test_changed_and_untracked_files_change_the_code_digest(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "train.py").write_text("one\n")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-m", "first")
    clean = facts(tmp_path)
    (tmp_path / "train.py").write_text("two\n")
    changed = facts(tmp_path)
    (tmp_path / "extra.py").write_text("three\n")
    extra = facts(tmp_path)
    assert len({found["code.changes_sha256"] for found in (clean, changed, extra)}) == 3
    assert len({found["code.commit"] for found in (clean, changed, extra)}) == 1


def test_variables_outside_the_allow_list_are_not_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SERVICE_PASSWORD", "hunter2")
    found = facts(tmp_path)
    assert found["environment.OMP_NUM_THREADS"] == "3"
    assert not any("hunter2" in value for value in found.values())


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["train.py", "--lr", "0.1"], "train.py --lr 0.1"),
        (["train.py", "--api-key", "abc", "x"], f"train.py --api-key {WITHHELD} x"),
        (["train.py", "--token=abc", "x"], f"train.py --token={WITHHELD} x"),
        (["train.py", "PASSWORD=abc"], f"train.py PASSWORD={WITHHELD}"),
        (["train.py", "--use-key", "--verbose"], "train.py --use-key --verbose"),
        (["train.py", "--max-tokens=5"], f"train.py --max-tokens={WITHHELD}"),
    ],
)
def test_credentials_are_left_out_of_the_command_line(arguments: list[str], shown: str) -> None:
    assert shown_command_line(arguments) == shown


def test_command_line_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--secret", "abc"])
    assert facts(tmp_path)["command"] == f"train.py --secret {WITHHELD}"
