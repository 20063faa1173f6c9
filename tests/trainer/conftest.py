"""A scene for every test that governs a run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_node import running_node
from governed_fixtures import CLIENTS, Scene, by_heads, examples_of


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    texts = {name: examples_of(name) for name in ("manual", "paper", "secret")}
    with running_node() as node:
        yield Scene(node, tmp_path / "run", texts)
    while CLIENTS:
        CLIENTS.pop().close()


@pytest.fixture
def headed(scene: Scene) -> Scene:
    by_heads(scene)
    return scene
