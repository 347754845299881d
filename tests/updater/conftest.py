"""One fresh world for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.updater.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """The real store on SQLite, the real registry in memory, a counting model, and a clock that is moved by hand."""
    made = World(tmp_path)
    yield made
    made.store.close()
