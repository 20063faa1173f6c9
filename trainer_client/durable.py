"""Files that are whole or not there: content first, then the name."""

import os
from pathlib import Path


def make_durable(unfinished: Path, path: Path) -> None:
    """Give a written file its name; what is named is whole and on disk, also after a crash."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
