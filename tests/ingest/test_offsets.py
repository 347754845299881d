"""Where ingest begins to read, by what store and broker say; and the same through the whole loop."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from ingest.offsets import END_GRACE_SECONDS, Log, Offsets
from oppu.errors import OffsetIdentityChanged, TransientError
from oppu.store.records import OffsetAdvance, StoredOffset
from oppu.values import Partition, Record
from tests.ingest.world import TOPICS, World

P, Q = Partition("events", 0), Partition("events", 1)


def record(offset: int, partition: Partition = P) -> Record:
    return Record(partition, offset, 0, None, None)


def test_a_partition_without_a_row_begins_at_the_first_record_there_is() -> None:
    offsets = Offsets()
    assert offsets.place({}, {P: Log(5, 9, "id")}, 0.0) == {P: 5}
    assert offsets.advances([record(5), record(6)]) == (OffsetAdvance(P, None, 7, "id"),)


def test_a_partition_with_a_row_goes_on_there() -> None:
    offsets = Offsets()
    assert offsets.place({P: StoredOffset(7, "id")}, {P: Log(5, 9, "id")}, 0.0) == {P: 7}
    advances = offsets.advances([record(7), record(8)])
    assert advances == (OffsetAdvance(P, 7, 9, "id"),)
    assert offsets.written(advances) == 0
    assert offsets.advances([record(12)]) == (OffsetAdvance(P, 9, 13, "id"),), "markers make offsets jump"


def test_at_the_end_nothing_is_wrong() -> None:
    assert Offsets().place({P: StoredOffset(9, "id")}, {P: Log(0, 9, "id")}, 0.0) == {P: 9}


def test_another_identity_is_fatal_and_names_the_command() -> None:
    with pytest.raises(OffsetIdentityChanged, match=r"oppu topics adopt events 0 --offset 3"):
        Offsets().place({P: StoredOffset(7, "old")}, {P: Log(3, 9, "new")}, 0.0)


@pytest.mark.parametrize(("stored", "actual"), [(None, "id"), ("id", None), (None, None)])
def test_an_identity_that_is_not_known_is_not_compared(stored: str | None, actual: str | None) -> None:
    offsets = Offsets()
    assert offsets.place({P: StoredOffset(7, stored)}, {P: Log(0, 9, actual)}, 0.0) == {P: 7}
    assert offsets.advances([record(7)])[0].topic_id == (actual or stored)


def test_beyond_the_end_is_fatal_only_after_a_while() -> None:
    offsets = Offsets()
    stored, logs = {P: StoredOffset(10, "id")}, {P: Log(0, 9, "id")}
    for now in (0.0, END_GRACE_SECONDS - 1):
        with pytest.raises(TransientError, match="beyond the end"):
            offsets.place(stored, logs, now)
    with pytest.raises(OffsetIdentityChanged, match=r"oppu topics adopt events 0 --offset 9"):
        offsets.place(stored, logs, END_GRACE_SECONDS)


def test_an_end_that_catches_up_is_forgiven() -> None:
    offsets = Offsets()
    stored = {P: StoredOffset(10, "id")}
    with pytest.raises(TransientError):
        offsets.place(stored, {P: Log(0, 9, "id")}, 0.0)
    assert offsets.place(stored, {P: Log(0, 10, "id")}, 1.0) == {P: 10}
    with pytest.raises(TransientError):
        offsets.place(stored, {P: Log(0, 9, "id")}, 100.0)


def test_a_partition_that_comes_back_has_its_grace_again() -> None:
    offsets, stored, logs = Offsets(), {P: StoredOffset(10, "id")}, {P: Log(0, 9, "id")}
    with pytest.raises(TransientError):
        offsets.place(stored, logs, 0.0)
    offsets.keep_only(frozenset())
    with pytest.raises(TransientError):
        offsets.place(stored, logs, 86_400.0)


def test_a_gap_is_stepped_over_and_counted_when_it_is_written(caplog: pytest.LogCaptureFixture) -> None:
    offsets = Offsets()
    assert offsets.place({P: StoredOffset(7, "id")}, {P: Log(20, 30, "id")}, 0.0) == {P: 20}
    assert "13 records were deleted before they were read" in caplog.text
    advances = offsets.advances([])
    assert advances == (OffsetAdvance(P, 7, 20, "id"),)
    assert offsets.written(advances) == 13
    assert offsets.advances([]) == ()
    assert offsets.advances([record(20)]) == (OffsetAdvance(P, 20, 21, "id"),)


def test_finished_and_foreign_records_are_dropped() -> None:
    offsets = Offsets()
    offsets.place({P: StoredOffset(7, "id")}, {P: Log(0, 9, "id")}, 0.0)
    assert offsets.fresh([record(6), record(7), record(8), record(7, Q)]) == [record(7), record(8)]
    offsets.keep_only(frozenset({Q}))
    assert offsets.fresh([record(7)]) == []


# --- through the loop


def test_records_that_retention_deleted_are_counted_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.event("e0")
    world.turn()
    world.loop.close()
    gone = [world.event(f"gone{n}") for n in range(4)]
    world.broker.delete_records(gone[0].partition, gone[-1].offset + 1)
    for _ in range(2):
        world.worker = world.new_worker()
        world.loop = world.new_loop()
        world.turn(4, seconds=1.0)
        world.loop.close()
    assert world.value("oppu_ingest_gap_records_total") == 4
    assert "4 records were deleted" in caplog.text
    assert world.next_offsets()[gone[0].partition] == gone[-1].offset + 1
    world.worker = world.new_worker()
    world.loop = world.new_loop()
    world.event("e1")
    world.turn(4, seconds=1.0)
    assert world.ids() == ["e0", "e1"]


def test_a_recreated_topic_stops_the_worker_until_it_is_adopted(world: World) -> None:
    world.event("e1")
    world.turn()
    world.loop.close()
    spec = world.broker.admin().describe_topics([TOPICS.events])[TOPICS.events]
    world.broker.delete_topic(TOPICS.events)
    world.broker.admin().create_topics([replace(spec)])
    fresh = world.event("e2")
    world.worker, before = world.new_worker(), world.next_offsets()
    world.loop = world.new_loop()
    with pytest.raises(OffsetIdentityChanged, match="oppu topics adopt"):
        world.loop.run()
    assert world.next_offsets() == before
    assert world.ids() == ["e1"]
    identity = world.broker.admin().topic_ids([TOPICS.events])[TOPICS.events]
    world.store.adopt_offset("memory", fresh.partition, 0, identity)
    world.worker = world.new_worker()
    world.loop = world.new_loop()
    world.turn(4, seconds=1.0)
    assert world.ids() == ["e1", "e2"]


def test_an_offset_beyond_the_end_stops_the_worker(make_world: Callable[..., World]) -> None:
    world = make_world()
    partition = world.event("e1").partition
    world.store.adopt_offset("memory", partition, 500, None)
    with pytest.raises(OffsetIdentityChanged, match=r"offset 500 lies beyond the end 1"):
        world.turn(100, seconds=1.0)
    assert world.clock.monotonic() >= END_GRACE_SECONDS
    assert world.ids() == []
