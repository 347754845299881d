"""A fresh SQLite store and the world around it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oppu.settings import StoreSettings
from oppu.store.sql import migrate
from tests.ingest.world import World


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store; copying it is quicker than migrating one for every test."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    migrate(StoreSettings(url=f"sqlite:///{path}"))
    return path


@pytest.fixture
def make_world(template: Path, tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Make a world on a store of its own; closed after the test."""
    worlds: list[World] = []

    def make(**settings: Any) -> World:
        database = tmp_path / f"history{len(worlds)}.db"
        shutil.copy(template, database)
        worlds.append(World(database, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.loop.close()
        world.store.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """A world whose worker has joined its group."""
    world = make_world()
    world.turn(3)
    return world
