"""An attempt that a drain or a transient error cuts short is no attempt: it counts nothing and forgives nothing."""

import pytest

from oppu.errors import TransientError
from oppu.store.records import ClaimState
from tests.updater.world import GLAD, SETTINGS, World
from updater.job import Ended


def test_a_drain_neither_counts_nor_forgives_failures(world: World) -> None:
    world.act("ada", GLAD)
    world.model.ruins = {"ada"}
    for failures in range(1, SETTINGS.quarantine_after):
        assert world.tick(world.new_updater("next")).ended == {Ended.FAILED: 1}
        world.clock.advance(24 * 3600)
        before, log, stopping = world.status("ada"), world.log("ada"), world.new_updater("stopping")
        assert before.failures == failures
        world.model.while_training = stopping.drain
        assert world.tick(stopping).ended == {Ended.SKIPPED: 1}
        world.model.while_training = lambda: None
        assert (world.status("ada"), world.log("ada")) == (before, log)
    assert world.tick(world.new_updater("next")).ended == {Ended.FAILED: 1}
    assert world.status("ada").state is ClaimState.QUARANTINED


def test_who_killed_a_process_is_tried_alone_after_a_drain_too(world: World) -> None:
    world.act("bob", GLAD)

    def die() -> None:
        raise KeyboardInterrupt

    world.model.while_training = die
    with pytest.raises(KeyboardInterrupt):
        world.tick()
    world.clock.advance(SETTINGS.claim_seconds + 1)
    stopping = world.new_updater("stopping")
    world.model.while_training = stopping.drain
    assert world.tick(stopping).ended == {Ended.SKIPPED: 1}
    world.model.while_training = lambda: None
    world.act("ada", GLAD * 2)  # the more urgent
    assert world.tick(world.new_updater("next")).ended == {Ended.PUBLISHED: 2}
    assert [[job.user_id for job in jobs] for jobs in world.model.jobs[-2:]] == [["ada"], ["bob"]]


@pytest.mark.parametrize("effect", ["store_publish", "store_conclude", "registry_write"])
def test_a_transient_error_neither_counts_nor_forgives_failures(world: World, effect: str) -> None:
    world.act("ada", GLAD)

    def away() -> None:
        raise TransientError("away")

    for failures in range(1, SETTINGS.quarantine_after):
        world.model.ruins = {"ada"}
        assert world.tick().ended == {Ended.FAILED: 1}
        assert world.status("ada").failures == failures
        world.clock.advance(24 * 3600)
        world.model.ruins = {"ada"} if effect == "store_conclude" else set()
        before, log = world.status("ada"), world.log("ada")
        with pytest.raises(TransientError):
            world.tick(None, **{effect: away})
        assert (world.status("ada"), world.log("ada")) == (before, log)
    world.model.ruins = {"ada"}
    assert world.tick().ended == {Ended.FAILED: 1}
    assert world.status("ada").state is ClaimState.QUARANTINED


@pytest.mark.parametrize("when", ["store_give_back", "after_store_give_back"])
def test_giving_back_is_tried_again_where_the_store_did_not_answer(world: World, when: str) -> None:
    world.act("ada", GLAD)
    world.model.while_training = world.updater.drain
    faults = [TransientError("store: connection lost")]

    def once() -> None:
        if faults:
            raise faults.pop()

    with pytest.raises(TransientError):
        world.tick(None, **{when: once})
    assert world.trace.count("store.give_back") == 2
    assert (world.status("ada").state, world.due()) == (ClaimState.FREE, 1)
    assert world.updates(Ended.SKIPPED) + world.updates(Ended.DISCARDED) == 1
