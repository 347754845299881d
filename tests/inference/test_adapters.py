"""Which adapter version serves, and what serves where it cannot be read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from inference.adapters import AdapterShelf, Fallback, Placed
from inference.host_cache import HostCache
from oppu.errors import FatalError, TransientError
from oppu.lm.fake import TENSOR, FakeModel
from oppu.lm.port import AdapterRef, AdapterSource, Tensors
from oppu.settings import InferenceSettings, Settings
from oppu.values import Head, OutRecord, UserId, UserState
from oppu.wire import Prediction, Provenance

if TYPE_CHECKING:
    from tests.inference.conftest import World


class SlowSource(AdapterSource):
    """Reads when it is told to go."""

    def __init__(self, source: AdapterSource) -> None:
        self.source, self.go = source, threading.Event()

    def load(self, ref: AdapterRef) -> Tensors:
        assert self.go.wait(30)
        return self.source.load(ref)


ALONE = {"retrieve": 0, "profile": False}
FAULTS = "oppu_inference_adapter_faults_total"


def _served(world: World, request_id: str, user: str = "anna", **fields: Any) -> tuple[Prediction, Provenance]:
    world.ask(user, request_id, **{"options": ALONE, **fields})
    world.turn()
    answer = world.answer(request_id)
    assert answer.provenance is not None
    return answer, answer.provenance


def _why(provenance: Provenance) -> list[tuple[str, str]]:
    return [(fault.part, fault.reason) for fault in provenance.degraded]


def test_a_published_version_serves_the_next_request(world: World) -> None:
    world.remember("anna", [("words", "law")])
    assert _served(world, "r0")[1].adapter_version is None
    for number, label in enumerate(("art", "war", "sport"), start=1):
        ref = world.publish("anna", label)
        answer, provenance = _served(world, f"r{number}")
        assert (answer.output, provenance.adapter_version) == (label, ref.version)
        assert _why(provenance) == []


def test_a_rolled_back_version_serves_no_more(world: World) -> None:
    world.remember("anna", [("words", "law")])
    first, _ = world.publish("anna", "art"), world.publish("anna", "war")
    assert _served(world, "r0")[0].output == "war"
    announce = OutRecord(world.topics.updates, b"anna", b"{}")
    world.store.roll_back(
        world.model.base, UserId("anna"), to=first.version, reason="", now=world.clock.now(), announce=announce
    )
    answer, provenance = _served(world, "r1")
    assert (answer.output, provenance.adapter_version) == ("art", first.version)


def test_a_resident_version_is_not_read_again(world: World) -> None:
    world.remember("anna", [("words", "law")])
    ref = world.publish("anna", "art")
    for number in range(3):
        _served(world, f"r{number}")
    assert world.adapters.loads[ref] == 1


def test_an_unreadable_version_falls_back_to_its_parent(world: World) -> None:
    world.remember("anna", [("words", "law")])
    parent = world.publish("anna", "art")
    world.publish("anna", "war", readable=False)
    answer, provenance = _served(world, "r1")
    assert (answer.output, provenance.adapter_version) == ("art", parent.version)
    assert provenance.used == ("adapter",)
    assert _why(provenance) == [("adapter", "unreadable_fell_back_to_parent")]
    assert world.sample(FAULTS) == 1
    reason = {"part": "adapter", "reason": "unreadable_fell_back_to_parent"}
    assert world.sample("oppu_inference_degraded_total", **reason) == 1


def test_without_a_readable_parent_the_base_serves(world: World) -> None:
    world.remember("anna", [("words", "law")])
    world.publish("anna", "art", readable=False)
    world.publish("anna", "war", readable=False)
    answer, provenance = _served(world, "r1")
    assert (provenance.adapter_version, provenance.used) == (None, ())
    assert _why(provenance) == [("adapter", "unreadable_used_base")]
    assert world.sample(FAULTS) == 2
    assert answer.scores == _served(world, "r2", user="nobody")[0].scores


@pytest.mark.parametrize(
    "tensors",
    [{}, {TENSOR: np.zeros((2, 2), np.float32)}, {TENSOR: np.full((1, 64), np.nan, np.float32)}],
)
def test_weights_that_do_not_fit_count_as_unreadable(world: World, tensors: Any) -> None:
    world.remember("anna", [("words", "law")])
    ref = world.publish("anna", "art")
    world.adapters.versions[ref] = tensors
    assert _why(_served(world, "r1")[1]) == [("adapter", "unreadable_used_base")]


def test_a_bad_version_is_read_once_a_minute(world: World) -> None:
    world.remember("anna", [("words", "law")])
    ref = world.publish("anna", "art", readable=False)
    for number in range(3):
        assert _why(_served(world, f"r{number}")[1]) == [("adapter", "unreadable_used_base")]
    assert world.adapters.loads[ref] == 1
    world.clock.advance(60)
    _served(world, "r3")
    assert world.adapters.loads[ref] == 2
    assert world.sample(FAULTS) == 2


def test_a_bad_version_does_not_taint_the_next(world: World) -> None:
    world.remember("anna", [("words", "law")])
    world.publish("anna", "art", readable=False)
    _served(world, "r1")
    ref = world.publish("anna", "war")
    answer, provenance = _served(world, "r2")
    assert (answer.output, provenance.adapter_version, _why(provenance)) == ("war", ref.version, [])


def test_files_collected_meanwhile_mean_reading_the_head_again(world: World) -> None:
    world.remember("anna", [("words", "law")])
    old = world.publish("anna", "art")

    def collected(ref: AdapterRef) -> None:
        if ref == old and old in world.adapters.versions:
            world.publish("anna", "war")
            del world.adapters.versions[old]

    world.adapters.on_load = collected
    answer, provenance = _served(world, "r1")
    assert (answer.output, provenance.adapter_version) == ("war", old.version + 1)
    assert _why(provenance) == []


def test_a_user_erased_meanwhile_is_answered_by_the_base(world: World) -> None:
    world.remember("anna", [("words", "law")])
    first = world.publish("anna", "art")

    def erased(ref: AdapterRef) -> None:
        world.adapters.versions.clear()
        tombstone = OutRecord(world.topics.updates, b"anna", None)
        now = world.clock.now()
        world.store.erase(UserId("anna"), cluster_id="memory", end_offsets={}, now=now, announce=tombstone)

    world.adapters.on_load = erased
    _, provenance = _served(world, "r1")
    assert (provenance.adapter_version, provenance.used) == (None, ())
    assert world.adapters.loads[first] == 1


def test_a_version_of_before_the_erasure_is_never_served(world: World) -> None:
    world.remember("anna", [("words", "law")])
    old = world.publish("anna", "art")
    _served(world, "r0")
    assert world.model.resident(old)
    tombstone = OutRecord(world.topics.updates, b"anna", None)
    world.store.erase(UserId("anna"), cluster_id="memory", end_offsets={}, now=world.clock.now(), announce=tombstone)
    world.remember("anna", [("words", "law")])
    assert _served(world, "r1")[1].adapter_version is None
    new = world.publish("anna", "war")
    answer, provenance = _served(world, "r2")
    assert (answer.output, provenance.adapter_version) == ("war", new.version)
    assert new.epoch > old.epoch


def test_a_registry_that_is_away_is_waited_for(world: World) -> None:
    world.remember("anna", [("words", "law")])
    world.publish("anna", "art")

    def away(ref: AdapterRef) -> None:
        raise TransientError("registry")

    world.adapters.on_load = away
    world.ask("anna", "r1", options=ALONE)
    assert world.turn() is None
    world.adapters.on_load = lambda ref: None
    world.turn()
    assert world.answer("r1").output == "art"


def test_a_bank_smaller_than_the_batch_serves_everybody(settings: Settings, make_world: Callable[..., World]) -> None:
    small = settings.model_copy(update={"inference": InferenceSettings(batch=16, resident_adapters=3)})
    world = make_world(small)
    labels = ("art", "law", "sport", "war")
    users = [f"user{number}" for number in range(10)]
    for number, user in enumerate(users):
        world.remember(user, [("words", "law")])
        world.publish(user, labels[number % 4])
    for turn in range(3):
        for user in users[turn:] + users[:turn]:
            world.ask(user, f"{user}-{turn}", options=ALONE)
        world.turn()
    for number, user in enumerate(users):
        assert {world.answer(f"{user}-{turn}").output for turn in range(3)} == {labels[number % 4]}
    assert world.sample("oppu_inference_bank_adapters") <= 3
    assert world.sample("oppu_inference_bank_events_total", event="evict") > 0


def test_one_placed_early_is_placed_again_when_a_later_one_evicts_it(world: World) -> None:
    users = [f"user{number}" for number in range(4)]
    refs = {}
    for user in [*users, "old0", "old1", "old2"]:
        world.remember(user, [("words", "law")])
        refs[user] = world.publish(user, "art")
    for user in ("user0", "old0", "old1", "old2"):
        _served(world, f"warm-{user}", user=user)
    assert world.model.resident(refs["user0"])
    shelf = AdapterShelf(world.adapters, world.model, world.store, world.metrics, world.clock)
    states = world.store.users([UserId(user) for user in users], world.model.base)
    placed = shelf.place(states.values())
    assert all(world.model.resident(refs[user]) for user in users)
    assert {user: place.ref for user, place in placed.items()} == {user: refs[user] for user in users}


def test_users_in_the_bank_stay_when_their_batch_mates_are_loaded(world: World) -> None:
    """With many more users than places, every batch has some of each: none may push out the other again and again."""
    refs = {}
    for user in ("user0", "user1", "user2", "new0", "new1"):
        world.remember(user, [("words", "law")])
        refs[user] = world.publish(user, "art")
    for user in ("user0", "user1", "user2"):
        _served(world, f"warm-{user}", user=user)
    loads = world.sample("oppu_inference_bank_events_total", event="load")
    shelf = AdapterShelf(world.adapters, world.model, world.store, world.metrics, world.clock)
    states = world.store.users([UserId(user) for user in ("new0", "new1", "user0")], world.model.base)
    placed = shelf.place(states.values())
    assert all(world.model.resident(refs[user]) for user in ("user0", "new0", "new1"))
    assert len(placed) == 3
    assert world.sample("oppu_inference_bank_events_total", event="load") == loads + 2


def test_more_users_than_the_bank_has_places_is_a_fault_of_ours(world: World) -> None:
    for number in range(5):
        world.remember(f"user{number}", [("words", "law")])
        world.publish(f"user{number}", "art")
    shelf = AdapterShelf(world.adapters, world.model, world.store, world.metrics, world.clock)
    states = world.store.users([UserId(f"user{number}") for number in range(5)], world.model.base)
    with pytest.raises(FatalError):
        shelf.place(states.values())


def test_what_is_not_read_in_time_is_served_without_and_said_and_serves_later(world: World) -> None:
    world.remember("anna", [("words", "law")])
    ref = world.publish("anna", "art")
    slow = SlowSource(world.adapters)
    cache = HostCache(slow, capacity=4, readers=ThreadPoolExecutor(1))
    shelf = AdapterShelf(cache, world.model, world.store, world.metrics, world.clock, wait_seconds=0.01)
    state = world.store.users([UserId("anna")], world.model.base)[UserId("anna")]
    assert shelf.place([state])[state.user_id] == Placed(None, Fallback.LATE)
    assert world.sample("oppu_inference_bank_events_total", event="late") == 1
    slow.go.set()
    shelf.expect([state], wait_seconds=30)
    assert shelf.place([state])[state.user_id] == Placed(ref)


def test_a_parent_in_the_bank_serves_until_its_successor_is_read(world: World) -> None:
    world.remember("anna", [("words", "law")])
    parent = world.publish("anna", "art")
    _served(world, "r0")
    world.publish("anna", "war")
    slow = SlowSource(world.adapters)
    cache = HostCache(slow, capacity=4, readers=ThreadPoolExecutor(1))
    shelf = AdapterShelf(cache, world.model, world.store, world.metrics, world.clock, wait_seconds=0.01)
    state = world.store.users([UserId("anna")], world.model.base)[UserId("anna")]
    assert shelf.place([state])[state.user_id] == Placed(parent, Fallback.LATE)
    slow.go.set()


def test_a_head_of_another_epoch_is_no_head(world: World) -> None:
    shelf = AdapterShelf(world.adapters, FakeModel(), world.store, world.metrics, world.clock)
    state = UserState(UserId("anna"), 2, 5, Head(version=1, parent=None, trained_through=5, epoch=1))
    assert shelf.place([state])[state.user_id].ref is None
    assert not world.adapters.loads
