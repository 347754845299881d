"""Files of erased users that an updater wrote after the erasure: swept at its opening, and from time to time."""

import pytest

from oppu.effects import perform
from oppu.errors import TransientError
from oppu.values import OutRecord, UserId
from tests.updater.world import GLAD, World, published
from updater import sweeping
from updater.job import Ended
from updater.sweeping import LATE, PAUSE_SECONDS

ADA = UserId("ada")


def erase(world: World, user: str = "ada") -> None:
    """Erase as the command does: the rows, then the files."""
    announce = OutRecord("t.adapter-updates", user.encode(), None)
    world.store.erase(UserId(user), cluster_id="c", end_offsets={}, now=world.clock.now(), announce=announce)
    world.registry.delete_user(UserId(user))


def away() -> None:
    raise TransientError("registry: cannot delete: away")


def leave_files(world: World) -> None:
    """Erase a user whose version is written just then, and cannot be deleted again."""
    world.act("ada", GLAD)
    assert world.tick(registry_write=lambda: erase(world), registry_delete=away).ended == {Ended.DISCARDED: 1}
    assert world.registry.versions(ADA, 1) == [1]


def test_what_a_killed_updater_wrote_is_swept_by_the_next(world: World) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    world.act("ada", GLAD)
    with pytest.raises(KeyboardInterrupt):
        world.tick(registry_write=lambda: erase(world), store_publish=die)
    assert world.registry.versions(ADA, 1) == [1]
    world.clock.advance(10 * LATE.total_seconds())
    later = world.new_updater("later")
    perform(later.open())
    world.tick(later)
    assert world.trace == ["registry.sweep"]
    assert world.registry.versions(ADA, 1) == []


def test_what_could_not_be_deleted_is_swept_within_the_hour(world: World) -> None:
    leave_files(world)
    world.clock.advance(PAUSE_SECONDS - 1)
    world.tick()
    assert world.registry.versions(ADA, 1) == [1]
    world.clock.advance(1)
    world.tick()
    assert world.registry.versions(ADA, 1) == []
    world.tick()
    assert world.trace == []


def test_a_sweep_that_fails_stops_no_training_and_is_tried_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    leave_files(world)
    world.clock.advance(LATE.total_seconds())
    world.act("bob", GLAD)
    late = world.new_updater("late")
    assert world.tick(late, registry_sweep=away).ended == {Ended.PUBLISHED: 1}
    assert "registry.sweep: left for later" in caplog.text
    assert world.registry.versions(ADA, 1) == [1]
    world.clock.advance(PAUSE_SECONDS)
    world.tick(late)  # not a young erasure any more, yet the pass before has not seen it
    assert world.registry.versions(ADA, 1) == []


def test_who_came_back_keeps_the_new_adapter(world: World) -> None:
    published(world)
    erase(world)
    version = published(world)
    world.clock.advance(PAUSE_SECONDS)
    world.tick()
    assert world.trace == ["registry.sweep"]
    world.registry.load(world.ref("ada", version, epoch=2))


def test_a_pass_goes_chunk_by_chunk_and_later_ones_take_young_erasures(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "CHUNK", 2)
    swept: list[int] = []
    monkeypatch.setattr(type(world.registry), "sweep", lambda _, erased: swept.append(len(erased)))
    for n in range(5):
        erase(world, f"user{n}")
    updater = world.new_updater("another")
    for _ in range(5):
        world.tick(updater)
    assert swept == [2, 2, 1]
    world.clock.advance(LATE.total_seconds())
    erase(world, "user5")
    world.clock.advance(PAUSE_SECONDS)
    for _ in range(3):
        world.tick(updater)
    assert swept == [2, 2, 1, 1]
