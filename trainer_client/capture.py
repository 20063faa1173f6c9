"""What a run ran on: versions, code, command, threads, seed, determinism flags, processor, container, environment.

Bit-exact replay needs the same thread count, determinism flags and library versions; a replay auditor reads
them here. The capture is a claim of the operator, fixed by the ``campaign`` event.

Environment variables are taken from an allow-list, and values of options that look like credentials are
left out of the command line: the capture is shown to every member.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

import torch

from consensus.codec import encode
from consensus.identifiers import Digest, Tag, tagged_hash
from consensus.portions import Setting, Wire

ENVIRONMENT_ALLOW_LIST = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_RANK",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "RANK",
    "WORLD_SIZE",
)
IMAGE_VARIABLE = "COUNTERSIGN_CONTAINER_IMAGE"
"""Name and digest of the container's image, from whoever starts it: inside most kinds nothing tells."""
WITHHELD = "(withheld)"
GIT_TIMEOUT_SECONDS = 10
MAX_VALUE_CHARACTERS = 8_192

_SECRET_OPTION = re.compile(
    r"^(-{0,2}[\w-]*(?:key|token|secret|passw|credential)[\w-]*)(=.*)?$", re.IGNORECASE | re.DOTALL
)


class Environment(Wire, frozen=True):
    """Named facts in name order."""

    settings: tuple[Setting, ...]


def capture_environment(code_directory: Path) -> Environment:
    """The environment of this process; ``code_directory`` is where the training code lies."""
    facts = (
        _interpreter_facts()
        | _torch_facts()
        | _container_facts(os.environ, Path("/"))
        | _code_facts(code_directory)
        | {f"environment.{name}": os.environ[name] for name in ENVIRONMENT_ALLOW_LIST if name in os.environ}
    )
    return Environment(tuple(Setting(name, value[:MAX_VALUE_CHARACTERS]) for name, value in sorted(facts.items())))


def environment_digest(environment: Environment) -> Digest:
    """The digest of a capture's canonical bytes."""
    return tagged_hash(Tag.ENVIRONMENT, encode(environment))


def shown_command_line(arguments: list[str]) -> str:
    """Arguments as one line, without the values of options that look like credentials."""
    shown = []
    withhold_next = False
    for argument in arguments:
        secret = _SECRET_OPTION.match(argument)
        if withhold_next and not argument.startswith("-"):
            shown.append(WITHHELD)
        elif secret is not None and secret[2] is not None:
            shown.append(f"{secret[1]}={WITHHELD}")
        else:
            shown.append(argument)
        withhold_next = secret is not None and secret[2] is None and argument.startswith("-")
    return " ".join(shown)


def _interpreter_facts() -> dict[str, str]:
    packages = sorted({f"{each.metadata['Name']}=={each.version}" for each in distributions()})
    return {
        "command": shown_command_line(sys.argv),
        "packages.count": str(len(packages)),
        "packages.sha256": hashlib.sha256("\n".join(packages).encode()).hexdigest(),
        "platform": platform.platform(),
        "processor": _processor_model(),
        "processor.count": str(os.cpu_count()),
        "python": platform.python_version(),
        "python.implementation": platform.python_implementation(),
    }


def _torch_facts() -> dict[str, str]:
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,
        "torch.capability": torch.backends.cpu.get_cpu_capability(),
        "torch.cuda": str(torch.version.cuda),
        "torch.cudnn.benchmark": str(torch.backends.cudnn.benchmark),
        "torch.cudnn.deterministic": str(torch.backends.cudnn.deterministic),
        "torch.deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "torch.devices": ", ".join(devices) or "cpu",
        "torch.float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch.driver": _driver(Path("/proc/driver/nvidia/version")),
        "torch.initial_seed": str(torch.initial_seed()),
        "torch.interop_threads": str(torch.get_num_interop_threads()),
        "torch.threads": str(torch.get_num_threads()),
    }


def _driver(version: Path) -> str:
    """The version of NVIDIA's kernel module; ``none`` without one."""
    try:
        found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)", version.read_text())
    except OSError:
        return "none"
    return found[1] if found else "unknown"


def _container_facts(environment: Mapping[str, str], root: Path) -> dict[str, str]:
    """What kind of container this is, ``none`` outside one, and of which image.

    Podman writes the image into the container; whoever starts another kind may name it in ``IMAGE_VARIABLE``.
    """
    podman = root / "run/.containerenv"
    if podman.is_file():
        kind = "podman"
    elif (root / ".dockerenv").exists():
        kind = "docker"
    else:
        kind = "kubernetes" if "KUBERNETES_SERVICE_HOST" in environment else "none"
    text = podman.read_text() if kind == "podman" else ""
    written = dict(re.findall(r'^(image|imageid)="(.+)"$', text, re.MULTILINE))
    found = " ".join(written[name] for name in ("image", "imageid") if name in written)
    image = environment.get(IMAGE_VARIABLE) or found or ("none" if kind == "none" else "unknown")
    return {"container": kind, "container.image": image}


def _code_facts(directory: Path) -> dict[str, str]:
    """The commit, and a digest of what differs from it; ``none`` outside a git repository."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return {"code.commit": "none", "code.changes_sha256": "none"}
    changes = hashlib.sha256(_git(directory, "diff", "--binary", "HEAD") or b"")
    top = Path(os.fsdecode((_git(directory, "rev-parse", "--show-toplevel") or b"").strip()))
    untracked = _git(top, "ls-files", "--others", "--exclude-standard", "-z") or b""
    for name in sorted(filter(None, untracked.split(b"\x00"))):
        path = top / os.fsdecode(name)
        if path.is_file():
            changes.update(b"\x00" + name + b"\x00" + hashlib.sha256(path.read_bytes()).digest())
    return {"code.commit": commit.decode().strip(), "code.changes_sha256": changes.hexdigest()}


def _git(directory: Path, *arguments: str) -> bytes | None:
    """Standard output of a git command; ``None`` without git, repository or commit."""
    try:
        finished = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            check=True,
            timeout=GIT_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return finished.stdout


def _processor_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    models = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return models[0] if models else platform.processor() or "unknown"
