"""Adapters whose reads hang, come late or fail: who is served what meanwhile, and who is not held up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

import pytest

from inference.adapters import AdapterShelf, Fallback, Placed
from inference.faults import AWAY_SECONDS, HOLD_BACK_SECONDS
from inference.host_cache import HostCache
from inference.readers import Readers
from oppu.clock import SystemClock
from oppu.errors import TransientError
from oppu.lm.port import AdapterRef, AdapterSource, Tensors
from oppu.settings import InferenceSettings, Settings
from oppu.values import UserId, UserState
from oppu.wire import Provenance

if TYPE_CHECKING:
    from tests.inference.conftest import World

ALONE = {"retrieve": 0, "profile": False}
FAULTS = "oppu_inference_adapter_faults_total"


def _why(provenance: Provenance) -> list[tuple[str, str]]:
    return [(fault.part, fault.reason) for fault in provenance.degraded]


def _ask(world: World, *users: str, turn: int = 0) -> bool:
    """Say whether a step answered them."""
    for user in users:
        world.ask(user, f"{user}{turn}", options=ALONE)
    return world.turn() is not None


class GatedSource(AdapterSource):
    """Holds back the versions that it is told to."""

    def __init__(self, source: AdapterSource, *held: AdapterRef) -> None:
        self.source, self.gates = source, {ref: threading.Event() for ref in held}

    def load(self, ref: AdapterRef) -> Tensors:
        if ref in self.gates:
            assert self.gates[ref].wait(30)
        return self.source.load(ref)


@pytest.fixture
def gated(world: World) -> Iterator[Callable[..., tuple[AdapterShelf, HostCache]]]:
    """Return a maker of a shelf and its cache, by the machine's clock, some versions hanging: ``(*held, wait)``."""
    sources: list[GatedSource] = []

    def make(*held: AdapterRef, wait: float = 0.05) -> tuple[AdapterShelf, HostCache]:
        sources.append(GatedSource(world.adapters, *held))
        cache = HostCache(sources[-1], capacity=8, readers=Readers(4))
        clock = SystemClock()
        return AdapterShelf(cache, world.model, world.store, world.metrics, clock, wait_seconds=wait), cache

    yield make
    for gate in (gate for source in sources for gate in source.gates.values()):
        gate.set()


def _states(world: World, *users: str) -> list[UserState]:
    found = world.store.users([UserId(user) for user in users], world.model.base)
    return [found[UserId(user)] for user in users]


def _waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds that the cache is ready to wait for reads that are not done, as it goes on."""
    found: list[float] = []

    def counted(reads: Collection[Future[Tensors]], timeout: float | None = None) -> Any:
        found.append(timeout or 0.0)
        return wait(reads, timeout)

    monkeypatch.setattr("inference.host_cache.wait", counted)
    return found


def _failing(*bad: AdapterRef) -> Callable[[AdapterRef], None]:
    def on_load(ref: AdapterRef) -> None:
        if ref in bad:
            raise TransientError("registry: [Errno 5] Input/output error")

    return on_load


def test_a_parent_that_is_still_being_read_makes_its_user_late_and_nobody_else(
    world: World, gated: Callable[..., tuple[AdapterShelf, HostCache]]
) -> None:
    for user in ("anna", "ben"):
        world.remember(user, [("words", "law")])
    parent = world.publish("anna", "art")
    shelf, cache = gated(parent)
    shelf.expect(_states(world, "anna"))
    head = world.publish("anna", "war", readable=False)
    ben = world.publish("ben", "art")
    cache.expect([head, ben], wait_seconds=30)  # nothing is late but the parent
    placed = shelf.place(_states(world, "anna", "ben"))
    assert placed == {UserId("anna"): Placed(None, Fallback.LATE), UserId("ben"): Placed(ben)}


def test_a_slow_parent_or_newer_head_holds_the_batch_up_no_longer_than_its_wait(
    world: World, gated: Callable[..., tuple[AdapterShelf, HostCache]], monkeypatch: pytest.MonkeyPatch
) -> None:
    users = ("anna", "ben", "cleo")
    for user in users:
        world.remember(user, [("words", "law")])
    parents = [world.publish(user, "art") for user in users]
    heads = [world.publish(user, "war", readable=False) for user in users[:2]]
    states = _states(world, *users)
    del world.adapters.versions[parents[2]]
    newer = world.publish("cleo", "war")
    shelf, cache = gated(*parents[:2], newer, wait=0.2)
    cache.expect([*heads, parents[2]], wait_seconds=30)
    waits = _waits(monkeypatch)
    placed = shelf.place(states)
    assert sum(waits) <= 0.2 + 1e-6
    assert [placed[UserId(user)] for user in users] == [Placed(None, Fallback.LATE)] * 3
    assert cache.reading(newer)


def test_a_parent_that_is_read_in_time_serves(
    world: World, gated: Callable[..., tuple[AdapterShelf, HostCache]]
) -> None:
    world.remember("anna", [("words", "law")])
    parent = world.publish("anna", "art")
    world.publish("anna", "war", readable=False)
    shelf, _ = gated(wait=30.0)
    for _ in range(2):
        assert shelf.place(_states(world, "anna"))[UserId("anna")] == Placed(parent, Fallback.PARENT)


def test_a_hung_read_is_waited_for_in_one_batch_only(
    world: World, gated: Callable[..., tuple[AdapterShelf, HostCache]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("anna", "ben"):
        world.remember(user, [("words", "law")])
    hung, other = world.publish("anna", "art"), world.publish("ben", "art")
    shelf, cache = gated(hung, wait=0.5)
    cache.expect([other], wait_seconds=30)
    waits, seen = _waits(monkeypatch), []
    for _ in range(3):
        waits.clear()
        placed = shelf.place(_states(world, "anna", "ben"))
        seen.append(sum(waits))
        assert placed == {UserId("anna"): Placed(None, Fallback.LATE), UserId("ben"): Placed(other)}
    assert seen[0] > 0.4
    assert seen[1:] == [0.0, 0.0]


def test_as_many_hung_reads_as_readers_leave_the_others_their_adapters(world: World) -> None:
    users = [f"user{number}" for number in range(3)]
    for user in users:
        world.remember(user, [("words", "law")])
    refs = [world.publish(user, "art") for user in users]
    source = GatedSource(world.adapters, *refs[:2])
    cache = HostCache(source, capacity=8, readers=Readers(2, stuck_seconds=0.1))
    shelf = AdapterShelf(cache, world.model, world.store, world.metrics, SystemClock(), wait_seconds=0.01)
    shelf.place(_states(world, *users))
    cache.expect([refs[2]], wait_seconds=30)
    placed = shelf.place(_states(world, *users))
    assert [placed[UserId(user)] for user in users] == [Placed(None, Fallback.LATE)] * 2 + [Placed(refs[2])]
    for gate in source.gates.values():
        gate.set()


def test_a_read_that_fails_late_counts_as_failed_and_not_as_late_for_ever(
    world: World, gated: Callable[..., tuple[AdapterShelf, HostCache]]
) -> None:
    world.remember("anna", [("words", "law")])
    parent, head = world.publish("anna", "art"), world.publish("anna", "war")
    world.adapters.on_load = _failing(head)
    shelf, cache = gated(head, wait=0.05)
    [state] = _states(world, "anna")
    assert shelf.place([state])[state.user_id] == Placed(None, Fallback.LATE)
    source = cache._source
    assert isinstance(source, GatedSource)
    source.gates[head].set()
    cache.expect([head], wait_seconds=30)
    source.gates[head] = threading.Event()  # its next read hangs as long
    shelf.expect([state])
    cache.expect([parent], wait_seconds=30)
    assert shelf.place([state])[state.user_id] == Placed(parent, Fallback.PARENT)


def test_one_file_that_meets_an_error_costs_its_own_user_alone(world: World) -> None:
    for user in ("anna", "ben", "cleo"):
        world.remember(user, [("words", "law")])
    parent, bad = world.publish("anna", "art"), world.publish("anna", "war")
    alone = world.publish("ben", "law")
    world.publish("cleo", "sport")
    world.adapters.on_load = _failing(bad, alone)
    assert all([_ask(world, "anna", "ben", "cleo", turn=turn) for turn in range(2)])
    anna, ben = world.answer("anna1").provenance, world.answer("ben1").provenance
    assert anna is not None and ben is not None
    assert (world.answer("anna0").output, world.answer("cleo0").output) == ("art", "sport")
    assert (anna.adapter_version, _why(anna)) == (parent.version, [("adapter", "unreadable_fell_back_to_parent")])
    assert (ben.adapter_version, _why(ben)) == (None, [("adapter", "unreadable_used_base")])
    assert (world.adapters.loads[bad], world.adapters.loads[alone]) == (1, 1)  # held back the second time
    assert world.sample(FAULTS) == 2
    world.clock.advance(HOLD_BACK_SECONDS)
    assert _ask(world, "anna", "ben", "cleo", turn=2)
    assert world.adapters.loads[bad] == 2
    world.clock.advance(HOLD_BACK_SECONDS)
    world.adapters.on_load = lambda ref: None
    assert _ask(world, "anna", turn=3)
    assert world.answer("anna3").output == "war"


def test_where_every_load_meets_an_error_the_registry_is_away(world: World) -> None:
    for user in ("anna", "ben"):
        world.remember(user, [("words", "law")])
    refs = [world.publish("anna", "art"), world.publish("anna", "war"), world.publish("ben", "art")]
    shelf = AdapterShelf(world.adapters, world.model, world.store, world.metrics, world.clock)
    world.adapters.on_load = _failing(*refs)
    for _ in range(3):
        with pytest.raises(TransientError, match="Errno 5"):
            shelf.place(_states(world, "anna", "ben"))
    world.adapters.on_load = lambda ref: None
    placed = shelf.place(_states(world, "anna", "ben"))
    assert list(placed.values()) == [Placed(refs[1]), Placed(refs[2])]


def test_one_bad_file_among_users_in_the_bank_is_not_waited_for(world: World) -> None:
    for user in ("anna", "ben"):
        world.remember(user, [("words", "law")])
        world.publish(user, "art")
    _ask(world, "ben")
    world.adapters.on_load = _failing(*world.adapters.versions)
    assert _ask(world, "anna", "ben", turn=1)
    answer = world.answer("anna1").provenance
    assert answer is not None and _why(answer) == [("adapter", "unreadable_used_base")]
    assert world.answer("ben1").output == "art"
    assert _ask(world, "anna", "ben", turn=2)  # held back, and still not waited for
    world.adapters.on_load = lambda ref: None
    world.clock.advance(HOLD_BACK_SECONDS)
    assert _ask(world, "anna", turn=3)
    assert world.answer("anna3").output == "art"


def test_a_registry_that_is_away_for_all_of_a_batch_is_waited_for_so_long(world: World) -> None:
    for user in ("anna", "ben"):
        world.remember(user, [("words", "law")])
        world.publish(user, "art")
    world.adapters.on_load = _failing(*world.adapters.versions)
    assert not _ask(world, "anna", "ben", turn=1)
    world.clock.advance(AWAY_SECONDS)
    assert world.turn() is not None
    answers = [world.answer(f"{user}1").provenance for user in ("anna", "ben")]
    assert all(p is not None and _why(p) == [("adapter", "unreadable_used_base")] for p in answers)


def test_parents_that_serve_are_not_given_up_for_a_batch_mate(
    settings: Settings, make_world: Callable[..., World]
) -> None:
    slots = 64
    world = make_world(settings.model_copy(update={"inference": InferenceSettings(batch=64, resident_adapters=slots)}))
    shelf = AdapterShelf(world.adapters, world.model, world.store, world.metrics, world.clock)
    users = [f"user{number}" for number in range(6)]
    others = [f"other{number}" for number in range(slots - 6)]
    for user in [*users, *others, "new"]:
        world.remember(user, [("words", "law")])
    parents = {user: world.publish(user, "art") for user in users}
    shelf.place(_states(world, *users))
    for user in users:
        world.publish(user, "war", readable=False)
    for user in [*others, "new"]:
        world.publish(user, "art")
    shelf.place(_states(world, *others))
    placed = shelf.place(_states(world, *users, "new"))
    assert all(placed[UserId(user)] == Placed(parents[user], Fallback.PARENT) for user in users)
    assert world.sample("oppu_inference_bank_events_total", event="load") == slots + 1


def test_a_parent_that_serves_a_late_user_stays(world: World, gated: Callable[..., Any]) -> None:
    for user in ("anna", "b", "c", "d", "e"):
        world.remember(user, [("words", "law")])
    parent = world.publish("anna", "art")
    for user in ("b", "c", "d", "e"):
        world.publish(user, "art")
    plain = AdapterShelf(world.adapters, world.model, world.store, world.metrics, world.clock)
    plain.place(_states(world, "anna"))
    plain.place(_states(world, "b", "c", "d"))
    shelf, _ = gated(world.publish("anna", "war"))
    placed = shelf.place(_states(world, "anna", "e"))
    assert placed[UserId("anna")] == Placed(parent, Fallback.LATE)
    assert world.model.resident(parent)
