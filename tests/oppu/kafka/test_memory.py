"""What the in-memory broker models beyond the contract: time, faults, crashes and retention."""

from collections.abc import Mapping

import pytest

from oppu.clock import ManualClock
from oppu.errors import OffsetOutOfRange, ProducerFenced, TransientError
from oppu.kafka.memory import MemoryBroker, MemoryConsumer, MemoryTransactions
from oppu.kafka.memory_cluster import Timeouts
from oppu.kafka.memory_group import assign
from oppu.kafka.port import TopicSpec
from oppu.values import OutRecord, Partition
from tests.oppu.kafka.contract import earliest, out

LOG = Partition("t", 0)


@pytest.fixture
def clock() -> ManualClock:
    """Time that stands still."""
    return ManualClock()


@pytest.fixture
def broker(clock: ManualClock) -> MemoryBroker:
    """A cluster with a topic ``t`` of two partitions and ``o`` of one."""
    broker = MemoryBroker(clock, Timeouts(session=10, transaction=10, poll=300))
    broker.admin().create_topics([TopicSpec("t", 2, 1), TopicSpec("o", 1, 1)])
    return broker


def member(broker: MemoryBroker, name: str = "m") -> MemoryConsumer:
    """Open a member of group ``g`` on ``t``."""
    return broker.consumer("g", ["t"], earliest, client_id=name)


def joined(broker: MemoryBroker, *names: str) -> list[MemoryConsumer]:
    """Open members and let them share."""
    members = [member(broker, name) for name in names]
    for _ in range(3):
        for each in members:
            each.poll(0, 100)
    return members


def opened(broker: MemoryBroker, consumer: MemoryConsumer, value: str = "x") -> MemoryTransactions:
    """Open a transaction with one record and one offset."""
    transactions = broker.transactional_producer("id")
    transactions.begin()
    transactions.send([out("o", value)])
    transactions.send_offsets({LOG: 1}, consumer.group_metadata())
    return transactions


def test_nobody_fetches_until_every_member_has_rejoined(broker: MemoryBroker) -> None:
    first, second = joined(broker, "a", "b")
    broker.producer(client_id="p").send([out("t", str(n), str(n)) for n in range(10)])
    third = member(broker, "c")
    assert third.poll(0, 100) == []
    assert first.poll(0, 100) == []
    held = first.group_metadata()
    assert len(second.poll(0, 100)) > 0, "the last to rejoin completes the generation"
    first.poll(0, 100)
    assert first.group_metadata().generation == held.generation + 1


def test_the_old_generation_is_good_until_the_new_one_begins(broker: MemoryBroker) -> None:
    (first,) = joined(broker, "a")
    transactions = opened(broker, first)
    second = member(broker, "b")
    second.poll(0, 1)
    transactions.commit()
    assert broker.committed("g") == {LOG: 1}


def test_a_crashed_member_holds_the_group_up_until_its_session_ends(broker: MemoryBroker, clock: ManualClock) -> None:
    first, second = joined(broker, "a", "b")
    second.crash()
    with pytest.raises(TransientError):
        second.poll(0, 1)
    third = member(broker, "c")
    for _ in range(3):
        assert first.poll(0, 1) == third.poll(0, 1) == []
    assert third.assignment() == frozenset()
    clock.advance(10.1)
    for _ in range(2):
        first.poll(0, 1)
        third.poll(0, 1)
    assert first.assignment() | third.assignment() == {Partition("t", 0), Partition("t", 1)}


def test_a_member_that_does_not_poll_is_expelled_after_the_poll_timeout(
    broker: MemoryBroker, clock: ManualClock
) -> None:
    first, second = joined(broker, "a", "b")
    clock.advance(200)
    first.poll(0, 1)
    clock.advance(200)
    first.poll(0, 1)
    first.poll(0, 1)
    assert len(first.assignment()) == 2
    stale = second.group_metadata()
    transactions = broker.transactional_producer("id")
    transactions.begin()
    with pytest.raises(ProducerFenced):
        transactions.send_offsets({LOG: 1}, stale)


def test_an_expelled_zombie_starts_anew_and_its_old_proof_is_worthless(broker: MemoryBroker) -> None:
    starts: list[frozenset[Partition]] = []

    def start(new: frozenset[Partition], committed: Mapping[Partition, int | None]) -> Mapping[Partition, int]:
        starts.append(new)
        return dict.fromkeys(new, 0)

    zombie = broker.consumer("g", ["t"], start, client_id="z")
    zombie.poll(0, 1)
    stale = zombie.group_metadata()
    broker.expire(zombie)
    (successor,) = joined(broker, "s")
    assert len(successor.assignment()) == 2
    transactions = broker.transactional_producer("z")
    transactions.begin()
    with pytest.raises(ProducerFenced):
        transactions.send_offsets({LOG: 9}, stale)
    assert zombie.assignment() == frozenset({Partition("t", 0), Partition("t", 1)}), "it does not know yet"
    zombie.poll(0, 1)
    assert zombie.assignment() == frozenset()
    for _ in range(2):
        successor.poll(0, 1)
        zombie.poll(0, 1)
    assert len(zombie.assignment()) == 1
    assert [len(new) for new in starts] == [2, 1]


def test_a_crashed_transaction_hides_what_is_behind_it_until_it_times_out(
    broker: MemoryBroker, clock: ManualClock
) -> None:
    (consumer,) = joined(broker, "a")
    log = Partition("o", 0)
    transactions = opened(broker, consumer)
    broker.producer(client_id="p").send([out("o", "behind")])
    transactions.crash()
    assert consumer.end_offsets([log]) == {log: 0}
    with pytest.raises(TransientError, match="unstable"):
        consumer.committed([LOG])
    clock.advance(10.1)
    assert consumer.end_offsets([log]) == {log: 3}
    assert consumer.committed([LOG]) == {LOG: None}
    assert [record.value for record in broker.records("o")] == [b"behind"]


def test_a_transaction_that_timed_out_is_fenced(broker: MemoryBroker, clock: ManualClock) -> None:
    (consumer,) = joined(broker, "a")
    transactions = opened(broker, consumer)
    clock.advance(10.1)
    with pytest.raises(ProducerFenced):
        transactions.commit()
    transactions.abort()
    with pytest.raises(ProducerFenced):
        transactions.begin()
    assert broker.records("o") == []


def test_a_successor_waits_for_offsets_in_an_open_transaction(broker: MemoryBroker) -> None:
    (consumer,) = joined(broker, "a")
    transactions = opened(broker, consumer)
    broker.expire(consumer)
    successor = member(broker, "b")
    with pytest.raises(TransientError, match="unstable"):
        successor.poll(0, 1)
    transactions.commit()
    broker.producer(client_id="p").send([OutRecord("t", b"0", b"0"), OutRecord("t", b"3", b"3")])
    positions = {record.partition: record.offset for record in successor.poll(0, 100)}
    assert positions.get(LOG, 1) == 1


def test_retention_puts_a_position_out_of_range(broker: MemoryBroker) -> None:
    broker.admin().create_topics([TopicSpec("r", 1, 1)])
    log = Partition("r", 0)
    consumer = broker.consumer("r", ["r"], earliest, client_id="r")
    consumer.poll(0, 1)
    broker.producer(client_id="p").send([out("r", str(n)) for n in range(5)])
    broker.delete_records(log, 3)
    with pytest.raises(OffsetOutOfRange) as raised:
        consumer.poll(0, 100)
    assert raised.value.offsets == {("r", 0): 0}
    assert consumer.beginning_offsets([log]) == {log: 3}
    consumer.seek(log, 3)
    assert [record.offset for record in consumer.poll(0, 100)] == [3, 4]
    broker.delete_records(log, 2)
    broker.delete_records(log, 99)
    assert consumer.beginning_offsets([log]) == consumer.end_offsets([log]) == {log: 5}


def test_a_topic_created_again_is_another_one(broker: MemoryBroker) -> None:
    admin = broker.admin()
    (consumer,) = joined(broker, "a")
    transactions = opened(broker, consumer)
    transactions.commit()
    before = admin.topic_ids(["t"])
    broker.delete_topic("t")
    assert admin.topic_ids(["t"]) == {}
    admin.create_topics([TopicSpec("t", 3, 1)])
    assert admin.topic_ids(["t"]) != before
    assert broker.committed("g") == {}
    consumer.poll(0, 1)
    assert len(consumer.assignment()) == 3


def test_an_unavailable_broker_fails_every_call_and_forgets_nothing(broker: MemoryBroker) -> None:
    (consumer,) = joined(broker, "a")
    producer, transactions = broker.producer(client_id="p"), broker.transactional_producer("id")
    broker.unavailable = True
    for call in (
        lambda: consumer.poll(0, 1),
        lambda: consumer.committed([LOG]),
        lambda: producer.send([out("t", "x")]),
        transactions.begin,
        lambda: broker.transactional_producer("id"),
        lambda: broker.producer(client_id="p"),
        lambda: member(broker),
        lambda: broker.admin().cluster_id(),
    ):
        with pytest.raises(TransientError):
            call()
    broker.unavailable = False
    producer.send([out("t", "x")])
    assert [record.value for record in consumer.poll(0, 10)] == [b"x"]


def test_faults_can_be_injected_by_operation(broker: MemoryBroker) -> None:
    (consumer,) = joined(broker, "a")
    transactions = opened(broker, consumer)
    calls: list[str] = []

    def fault(operation: str) -> None:
        calls.append(operation)
        if operation == "transactions.commit":
            raise TransientError("injected")

    broker.on_call(fault)
    with pytest.raises(TransientError, match="injected"):
        transactions.commit()
    transactions.abort()
    broker.on_call(None)
    assert calls == ["transactions.commit", "transactions.abort"]
    assert (broker.records("o"), broker.committed("g")) == ([], {})


def test_a_jump_of_the_wall_clock_expires_nothing(broker: MemoryBroker, clock: ManualClock) -> None:
    (consumer,) = joined(broker, "a")
    transactions = opened(broker, consumer)
    clock.jump(86_400)
    transactions.commit()
    clock.jump(-2 * 86_400)
    consumer.poll(0, 1)
    assert len(consumer.assignment()) == 2
    assert broker.records("o")[0].timestamp_ms == int(ManualClock().now().timestamp() * 1000)


def test_range_assignment_gives_the_first_members_one_more() -> None:
    shares = assign({"b": ("t", "u"), "a": ("t",), "c": ("missing",)}, {"t": 3, "u": 1})
    assert shares == {
        "a": {Partition("t", 0), Partition("t", 1)},
        "b": {Partition("t", 2), Partition("u", 0)},
        "c": frozenset(),
    }
