"""A registry that is away while users are trained: nobody fails, nothing is trained afresh, nothing is made anew."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from oppu.effects import perform
from oppu.errors import TransientError
from oppu.registry import AdapterRegistry
from tests.oppu.brittle import BrittleFileSystem
from tests.updater.world import GLAD, World, published
from updater.job import Ended


class NoConnection(Exception):
    """An error as object stores' clients have them: derived from ``Exception`` alone."""


def put(world: World, url: str) -> None:
    """Let the world's adapters lie there."""
    world.registry = AdapterRegistry(
        url,
        base=world.model.base,
        user_hash=world.hash,
        adapter_config=world.model.adapter_config(),
        clock=world.clock,
    )
    world.updater = world.new_updater()
    perform(world.updater.open())


@pytest.fixture
def brittle(world: World) -> Iterator[None]:
    put(world, f"brittle://{uuid.uuid4().hex}")
    yield
    BrittleFileSystem.mend()


@pytest.mark.usefixtures("brittle")
@pytest.mark.parametrize(("fault", "users"), [("cat_file", ("ada", "bob")), ("open", ("bob", "eve"))])
def test_an_error_of_the_file_systems_client_fails_nobody(world: World, fault: str, users: tuple[str, str]) -> None:
    published(world, "ada")
    for user in users:
        world.act(user, GLAD)
    BrittleFileSystem.faults = {fault: NoConnection("no credentials")}
    for _ in range(10):
        with pytest.raises(TransientError, match="no credentials"):
            world.tick()
    assert [world.status(user).failures for user in users] == [0, 0]
    BrittleFileSystem.mend()
    assert world.tick().ended == {Ended.PUBLISHED: 2}


def test_an_unmounted_share_is_waited_for(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share, elsewhere = tmp_path / "share", tmp_path / "elsewhere"
    share.mkdir()
    put(world, str(share / "adapters"))
    version = published(world)
    for user in ("ada", "bob"):
        world.act(user, GLAD)
    share.rename(elsewhere)
    share.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(world.model, "train", lambda *_, **__: pytest.fail("trained for nothing"))
        for _ in range(10):
            with pytest.raises(TransientError, match="not there"):
                world.tick()
    restarted = world.new_updater("restarted")
    with pytest.raises(TransientError, match="not there"):
        perform(restarted.open())
    assert list(share.iterdir()) == []
    assert [world.status(user).failures for user in ("ada", "bob")] == [0, 0]
    assert world.count("oppu_inference_adapter_faults_total") == 0
    share.rmdir()
    elsewhere.rename(share)
    perform(restarted.open())
    assert world.tick(restarted).ended == {Ended.PUBLISHED: 2}
    head = world.head("ada")
    assert head is not None and head.parent == version


def test_a_registry_of_before_the_mark_goes_on(world: World, tmp_path: Path) -> None:
    put(world, str(tmp_path / "adapters"))
    published(world)
    next((tmp_path / "adapters").glob(".oppu*")).unlink()
    world.act("ada", GLAD)
    restarted = world.new_updater("restarted")
    perform(restarted.open())
    assert world.tick(restarted).ended == {Ended.PUBLISHED: 1}
