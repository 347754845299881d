"""Exactly one answer for each request, whatever fails between any two effects."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from oppu.effects import perform
from oppu.errors import FatalError, OffsetOutOfRange, ProducerFenced, TransientError
from oppu.kafka.memory import MemoryConsumer
from oppu.kafka.topics import topic_specs
from oppu.values import Partition

if TYPE_CHECKING:
    from tests.inference.conftest import Drive, World

EFFECTS = ("producer.begin", "producer.send", "producer.send_offsets", "producer.commit")
GROUP = "oppu-inference"
Failing = Callable[[str, Exception, bool], "Drive"]


def _ids(world: World) -> list[str]:
    return [p.request_id for p in world.predictions()]


def _ask_some(world: World, count: int = 6) -> list[str]:
    ids = [f"r{number}" for number in range(count)]
    for number, request_id in enumerate(ids):
        world.ask(f"user{number}", request_id)
    return ids


def test_effects_come_in_order_after_all_is_computed(world: World) -> None:
    ids = _ask_some(world)
    steps = world.worker.step(world.offer(), world.clock.now())
    names = []
    effect = next(steps)
    with pytest.raises(StopIteration):
        while True:
            names.append(effect.name)
            assert _ids(world) == []
            effect = steps.send(effect.run())
    assert names == list(EFFECTS)
    assert _ids(world) == ids


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize("error", [TransientError("away"), ProducerFenced("fenced")])
def test_an_error_at_any_effect_leaves_one_answer_each(
    world: World, failing: Failing, name: str, error: Exception, after: bool
) -> None:
    ids = _ask_some(world)
    world.send(b"not json", b"someone")
    assert world.turn(failing(name, error, after)) is None
    for _ in range(3):
        world.turn()
    assert _ids(world) == ids
    assert len(world.dead_letters()) == 1
    assert sum(world.broker.committed(GROUP).values()) >= 7


def test_without_seeking_back_the_answer_would_be_lost(world: World, failing: Failing) -> None:
    """The control of the tests above: an abort alone does not bring the records back."""
    _ask_some(world)
    with pytest.raises(TransientError):
        failing("producer.send", TransientError("away"), False)(world.worker.step(world.offer(), world.clock.now()))
    world.turn()
    assert _ids(world) == []


def test_a_dead_letter_is_in_the_same_transaction_as_the_offset(world: World, failing: Failing) -> None:
    world.send(b"\xff", b"someone")
    world.ask("anna", "r1")
    assert world.turn(failing("producer.commit", TransientError("away"), False)) is None
    assert world.dead_letters() == []
    assert world.broker.committed(GROUP) == {}
    world.turn()
    (letter,) = world.dead_letters()
    assert (letter.key, letter.value) == (b"someone", b"\xff")
    assert world.answer("r1").status == "ok"
    assert world.sample("oppu_ingest_dead_letters_total", reason="invalid_utf8") == 1
    assert world.sample("oppu_inference_predictions_total", task="label", status="ok") == 1


def test_a_store_that_is_away_delays_and_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = _ask_some(world)
    users = world.store.users
    with monkeypatch.context() as patch:

        def away(*_: object) -> None:
            raise TransientError("locked")

        patch.setattr(world.store, "users", away)
        assert world.turn() is None
        assert world.turn() is None
    assert world.store.users == users
    world.turn()
    assert _ids(world) == ids


def test_a_broker_that_is_away_is_recovered_from_in_the_end(world: World) -> None:
    ids = _ask_some(world)
    steps = world.worker.step(world.offer(), world.clock.now())
    next(steps).run()
    world.broker.unavailable = True
    for _ in range(3):
        with pytest.raises(TransientError):
            perform(world.worker.recover(ProducerFenced("fenced")))
    world.broker.unavailable = False
    perform(world.worker.recover(TransientError("still")))
    world.turn()
    assert _ids(world) == ids


def test_a_fenced_worker_rejoins_and_goes_on(world: World) -> None:
    world.turn()
    old = world.worker.consumer
    world.broker.transactional_producer("oppu-inference-0")
    ids = _ask_some(world)
    assert world.turn() is None
    assert world.worker.consumer is not old
    world.turn()
    assert _ids(world) == ids


def test_a_zombie_that_was_expelled_writes_nothing(world: World) -> None:
    ids = _ask_some(world)
    zombie = world
    records = zombie.offer()
    consumer = zombie.worker.consumer
    assert isinstance(consumer, MemoryConsumer)
    world.broker.expire(consumer)
    other = world.another("1")
    other.turn()
    assert _ids(world) == ids
    with pytest.raises(ProducerFenced):
        perform(zombie.worker.step(records, zombie.clock.now()))
    perform(zombie.worker.recover(ProducerFenced("stale")))
    for _ in range(4):
        zombie.turn()
        other.turn()
    assert _ids(world) == ids
    other.worker.close()


def test_a_restart_aborts_its_predecessor_and_takes_over(world: World) -> None:
    ids = _ask_some(world)
    steps = world.worker.step(world.offer(), world.clock.now())
    for effect in (next(steps),):
        effect.run()
    steps.send(None).run()
    consumer = world.worker.consumer
    assert isinstance(consumer, MemoryConsumer)
    consumer.crash()
    world.clock.advance(11)
    successor = world.another("0")
    successor.turn()
    successor.turn()
    assert _ids(world) == ids
    successor.worker.close()


def test_two_workers_share_and_answer_each_once(world: World) -> None:
    other = world.another("1")
    for _ in range(3):
        world.turn()
        other.turn()
    ids = _ask_some(world, 20)
    for _ in range(2):
        world.turn()
        other.turn()
    assert sorted(_ids(world)) == sorted(ids)
    shares = [len(w.worker.consumer.assignment()) for w in (world, other)]
    assert sorted(shares) == [1, 2]
    other.worker.close()


def test_records_offered_twice_are_answered_once(world: World) -> None:
    ids = _ask_some(world)
    records = world.offer()
    perform(world.worker.step([*records, *records], world.clock.now()))
    perform(world.worker.step(records, world.clock.now()))
    assert _ids(world) == ids


def test_records_of_a_partition_that_left_are_dropped(world: World) -> None:
    _ask_some(world)
    records = world.offer()
    foreign = [record for record in records if record.partition.index == 0]
    consumer = world.worker.consumer
    assert isinstance(consumer, MemoryConsumer)
    other = world.another("1")
    for _ in range(2):
        other.worker.consumer.poll(0, 0)
        consumer.poll(0, 0)
    left = set(Partition(world.topics.requests, i) for i in range(3)) - consumer.assignment()
    assert left
    outcome = perform(world.worker.step(records, world.clock.now()))
    assert outcome.handled == sum(record.partition not in left for record in records)
    assert len(foreign) <= len(records)
    other.worker.close()


class TestStart:
    def test_begins_with_the_first_record_there_is(self, world: World) -> None:
        partition = Partition(world.topics.requests, 0)
        assert world.worker.start(frozenset({partition}), {partition: None}) == {partition: 0}
        assert world.worker.start(frozenset({partition}), {}) == {partition: 0}

    def test_goes_on_where_the_group_stands(self, world: World) -> None:
        _ask_some(world)
        world.turn()
        committed = world.broker.committed(GROUP)
        assert world.worker.start(frozenset(committed), dict(committed)) == committed

    def test_goes_to_the_beginning_below_which_nothing_is_left(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        for number in range(5):
            world.ask("anna", f"r{number}")
        (partition,) = {record.partition for record in world.broker.records(world.topics.requests)}
        world.broker.delete_records(partition, 3)
        assert world.worker.start(frozenset({partition}), {partition: 1}) == {partition: 3}
        assert "2 requests were deleted" in caplog.text

    def test_a_position_deleted_in_mid_run_is_recovered_from(self, world: World) -> None:
        world.turn()
        for number in range(5):
            world.ask("anna", f"r{number}")
        (partition,) = {record.partition for record in world.broker.records(world.topics.requests)}
        world.broker.delete_records(partition, 3)
        with pytest.raises(OffsetOutOfRange) as raised:
            world.offer()
        perform(world.worker.recover(raised.value))
        world.turn()
        assert _ids(world) == ["r3", "r4"]

    def test_a_recreated_topic_is_read_from_its_beginning(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        for number in range(5):
            world.ask("anna", f"r{number}")
        world.turn()
        committed = dict(world.broker.committed(GROUP))
        world.broker.delete_topic(world.topics.requests)
        world.broker.admin().create_topics(topic_specs(world.settings))
        world.ask("anna", "new")
        world.broker._cluster.group(GROUP).committed.update(committed)
        with pytest.raises(OffsetOutOfRange) as raised:
            for _ in range(3):
                world.offer()
        perform(world.worker.recover(raised.value))
        assert "beyond the end" in caplog.text
        world.turn()
        assert "new" in _ids(world)


class TestPoison:
    def test_the_killer_is_answered_and_passed(self, world: World) -> None:
        world.ask("anna", "killer")
        world.ask("anna", "next")
        killer, *rest = world.offer()
        outcome = perform(world.worker.poison(killer, world.clock.now()))
        assert outcome.handled == 1
        error = world.answer("killer").error
        assert error is not None and error.code == "worker_crashed"
        perform(world.worker.step(rest, world.clock.now()))
        assert world.answer("next").status == "ok"
        assert _ids(world) == ["killer", "next"]

    def test_one_that_names_nobody_is_set_aside(self, world: World) -> None:
        world.send(b"[", b"x")
        (killer,) = world.offer()
        perform(world.worker.poison(killer, world.clock.now()))
        (letter,) = world.dead_letters()
        assert dict(letter.headers)["reason"] == b"worker_crashed"
        assert world.broker.committed(GROUP) == {killer.partition: 1}

    def test_one_whose_key_is_anothers_is_answered_to_the_user_it_names(self, world: World) -> None:
        world.send(json.dumps({"request_id": "r", "user_id": "anna"}).encode(), b"bert")
        (killer,) = world.offer()
        perform(world.worker.poison(killer, world.clock.now()))
        error = world.answer("r").error
        assert error is not None and error.code == "worker_crashed"
        assert world.dead_letters() == []

    def test_one_that_was_answered_is_not_answered_again(self, world: World) -> None:
        world.ask("anna", "r1")
        (record,) = world.offer()
        perform(world.worker.step([record], world.clock.now()))
        assert perform(world.worker.poison(record, world.clock.now())).handled == 0
        assert _ids(world) == ["r1"]


def test_use_before_open_or_after_close_is_fatal(world: World) -> None:
    world.worker.close()
    with pytest.raises(FatalError):
        _ = world.worker.consumer
    world.worker.close()
    world.worker.open()
    _ask_some(world, 2)
    world.turn()
    assert _ids(world) == ["r0", "r1"]


@pytest.mark.parametrize(("name", "calls"), [("producer.commit", ["open"]), ("producer.send", ["abort"])])
def test_only_a_commit_of_unknown_outcome_needs_a_new_producer(
    world: World, failing: Failing, name: str, calls: list[str]
) -> None:
    """It makes the broker finish the old transaction before the committed offsets are read."""
    world.turn()
    _ask_some(world)
    world.fault = None
    drive = failing(name, TransientError("away"), False)
    with pytest.raises(TransientError):
        drive(world.worker.step(world.offer(), world.clock.now()))
    seen: list[str] = []
    world.broker.on_call(seen.append)
    perform(world.worker.recover(TransientError("away")))
    producer_calls = [call.removeprefix("transactions.") for call in seen if call.startswith("transactions.")]
    assert producer_calls[: len(calls)] == calls
    assert seen.index(f"transactions.{calls[0]}") < seen.index("consumer.committed")
