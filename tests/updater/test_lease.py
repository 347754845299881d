"""Claims are renewed at half their time, whatever the work in between."""

import pytest

from oppu.errors import TransientError
from oppu.store.records import Claim
from oppu.values import UserId
from tests.updater.world import World
from updater.lease import Drained, Leases


class Recorder:
    def __init__(self) -> None:
        self.alive = 0
        self.stop = False

    def beat(self) -> None:
        self.alive += 1


def held(world: World, recorder: Recorder) -> tuple[Leases, Claim]:
    world.act("ada", ["glad"])
    claim = world.store.claim(world.model.base, UserId("ada"), holder="one", ttl_seconds=60)
    assert claim is not None
    leases = Leases(world.store, world.clock, seconds=60, alive=recorder.beat, draining=lambda: recorder.stop)
    leases.hold(claim)
    return leases, claim


def test_renews_at_half_time_and_not_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    leases, _ = held(world, recorder)
    renewed: list[float] = []

    def renew(*_: object) -> bool:
        renewed.append(world.clock.monotonic())
        return True

    monkeypatch.setattr(type(world.store), "renew", renew)
    start = world.clock.monotonic()
    for _ in range(100):
        leases.beat()
        world.clock.advance(1)
    assert [moment - start for moment in renewed] == [30, 60, 90]
    assert recorder.alive == 100


def test_a_clock_that_jumps_does_not_matter(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    leases, _ = held(world, Recorder())
    monkeypatch.setattr(type(world.store), "renew", lambda *_: pytest.fail("renewed too early"))
    world.clock.jump(-86_400)
    leases.beat()
    world.clock.jump(2 * 86_400)
    leases.beat()


def test_a_lost_claim_is_noted_and_not_renewed_again(world: World) -> None:
    leases, claim = held(world, Recorder())
    world.clock.advance(61)
    assert world.store.claim(world.model.base, UserId("ada"), holder="two", ttl_seconds=60) is not None
    assert not leases.lost(claim.user_id)
    leases.touch()
    assert leases.lost(claim.user_id)
    world.clock.advance(61)
    leases.touch()


def test_a_store_that_is_away_is_not_a_lost_claim(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    leases, claim = held(world, Recorder())

    def away(*_: object) -> bool:
        raise TransientError("store: away")

    monkeypatch.setattr(type(world.store), "renew", away)
    world.clock.advance(31)
    leases.beat()
    assert not leases.lost(claim.user_id)


def test_a_renewal_that_failed_is_tried_again_long_before_the_claim_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases, _ = held(world, Recorder())
    tried: list[float] = []
    start = world.clock.monotonic()

    def away(*_: object) -> bool:
        tried.append(world.clock.monotonic() - start)
        raise TransientError("store: away")

    monkeypatch.setattr(type(world.store), "renew", away)
    for _ in range(60):
        leases.beat()
        world.clock.advance(1)
    assert tried == [30, 36, 42, 48, 54]


def test_a_drain_interrupts_a_beat_but_not_a_touch(world: World) -> None:
    recorder = Recorder()
    leases, _ = held(world, recorder)
    recorder.stop = True
    leases.touch()
    with pytest.raises(Drained):
        leases.beat()
