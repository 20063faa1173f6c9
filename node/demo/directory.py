"""The demonstration's output directory: what may be replaced, and how one of ours is known.

``ABOUT.txt`` marks a directory as made by a demonstration; only such a one is ever removed, and never while the
demonstration that made it still runs (it holds the directory's lock).
"""

import shutil
from pathlib import Path

from consensus.rejection import ConfigError
from node.files import DirectoryLock

ABOUT_FILE = "ABOUT.txt"
ABOUT_FIRST_LINE = "This directory was made by `countersign demo`; the next run replaces it."


def prepare(directory: Path, keep: bool) -> bool:
    """Make room for a run; whether an earlier one was removed.

    Raises:
        ConfigError: the directory holds something else, an earlier run with ``keep``, or one that is running.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory}: expected a directory for --out, found a file")
    if not directory.exists() or not any(directory.iterdir()):
        return False
    about = directory / ABOUT_FILE
    if not about.is_file() or not about.read_text(encoding="utf-8", errors="replace").startswith(ABOUT_FIRST_LINE):
        raise ConfigError(
            f"{directory}: expected an empty or missing directory, or an earlier demo run, found other files; "
            "nothing was touched: give another --out"
        )
    if keep:
        raise ConfigError(f"{directory}: an earlier demo run is here, and --keep was given: give another --out")
    lock = DirectoryLock.acquire(directory)
    lock.release()
    shutil.rmtree(directory)
    return True


def mark(directory: Path) -> None:
    """Say what the directory is: to the next run, and to people."""
    (directory / ABOUT_FILE).write_text(_about(), encoding="utf-8")


def _about() -> str:
    return f"""{ABOUT_FIRST_LINE}

report.html       what happened, for people: open it in a browser
summary.json      the same figures, for programs
genesis.json      the members, their keys and quorums: with its chain id all a verifier needs
bundles/          proofs exported from the rights-holder's node, for `countersign verify`
release/          the fine-tuned weights
<member>/         what a member's node runs from: node.toml, keystore.json, passphrase, data/, node.log
job/              the training job's own records

All keys were made by one person for a trial. They prove nothing between parties that do not trust that person.
"""
