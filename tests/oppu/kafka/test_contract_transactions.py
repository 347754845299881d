"""The port's promises about groups and transactions, on both brokers."""

import time
from collections.abc import Mapping

import pytest

from oppu.errors import InvalidRecord, ProducerFenced
from oppu.kafka.port import GroupMetadata, TransactionalProducer
from oppu.values import Partition
from tests.oppu.kafka.contract import TOPIC_BYTES, World, collect, consume_transform, out, quiet, settle, take


def test_members_share_partitions_and_take_over_from_one_that_leaves(world: World) -> None:
    topic = world.topic(partitions=4)
    calls: list[int] = []

    def start(new: frozenset[Partition], committed: Mapping[Partition, int | None]) -> Mapping[Partition, int]:
        calls.append(len(new))
        return dict.fromkeys(new, 0)

    first = world.consumer(topic, start=start)
    settle(first, partitions=4)
    second = world.consumer(topic, start=start)
    settle(first, second, partitions=4)
    assert len(first.assignment()) == len(second.assignment()) == 2
    world.producer().send([out(topic, f"{n}", f"{n}") for n in range(40)])
    collect([first, second], lambda found: len(found) == 40)
    second.close()
    # what it keeps is not started anew, so nothing of it comes twice; the other two partitions do
    again = collect([first], lambda found: len(first.assignment()) == 4 and bool(found))
    again += [record for _ in range(6) for record in first.poll(0.05, 100)]
    assert calls == [4, 2, 2]
    assert 0 < len(again) < 40
    assert len({record.partition for record in again}) == 2


def test_a_pause_outlives_a_rebalance_for_what_is_kept(world: World) -> None:
    topic = world.topic(partitions=2)
    first = world.consumer(topic)
    settle(first, partitions=2)
    first.pause(first.assignment())
    second = world.consumer(topic)
    settle(first, second, partitions=2)
    kept = first.assignment()
    second.close()
    world.producer().send([out(topic, f"{n}", f"{n}") for n in range(20)])
    got = collect([first], lambda found: len(first.assignment()) == 2 and bool(found))
    got += [record for _ in range(6) for record in first.poll(0.05, 100)]
    assert {record.partition for record in got} == first.assignment() - kept


def test_a_stale_generation_cannot_commit_offsets(world: World) -> None:
    source, target = world.topic(partitions=2), world.topic(name="out")
    first = world.consumer(source)
    settle(first, partitions=2)
    stale = first.group_metadata()
    second = world.consumer(source)
    settle(first, second, partitions=2)
    transactions = world.transactions()
    transactions.begin()
    transactions.send([out(target, "never")])
    with pytest.raises(ProducerFenced):
        transactions.send_offsets({Partition(source, 0): 1}, stale)
    with pytest.raises(ProducerFenced):
        transactions.commit()
    transactions.abort()
    assert first.committed([Partition(source, 0)]) == {Partition(source, 0): None}
    consume_transform(transactions, first, {Partition(source, 0): 1}, out(target, "fresh"))
    transactions.commit()
    assert first.committed([Partition(source, 0)]) == {Partition(source, 0): 1}


def test_one_who_is_no_member_cannot_commit_offsets(world: World) -> None:
    source = world.topic()
    transactions = world.transactions()
    transactions.begin()
    outsider = world.consumer(source)
    assert outsider.group_metadata() == GroupMetadata(f"{world.prefix}-g", -1, "")
    with pytest.raises(ProducerFenced):
        transactions.send_offsets({Partition(source, 0): 1}, outsider.group_metadata())
    transactions.abort()
    assert outsider.committed([Partition(source, 0)]) == {Partition(source, 0): None}


def test_open_and_aborted_transactions_are_hidden(world: World) -> None:
    topic = world.topic()
    log = Partition(topic, 0)
    world.write(topic, "before")
    consumer = world.consumer(topic)
    assert take(consumer, 1) == ["before"]
    transactions = world.transactions()
    transactions.begin()
    transactions.send([out(topic, "aborted")])
    world.write(topic, "behind")
    assert quiet(consumer) == []
    assert consumer.end_offsets([log])[log] <= 2
    assert consumer.peek_end_offsets([log])[log] <= 2
    transactions.abort()
    assert take(consumer, 1) == ["behind"]
    transactions.begin()
    transactions.send([out(topic, "one"), out(topic, "two")])
    transactions.commit()
    assert take(consumer, 2) == ["one", "two"]
    assert quiet(consumer) == []


def test_the_end_is_the_last_stable_offset_and_markers_take_offsets(world: World) -> None:
    topic = world.topic()
    log = Partition(topic, 0)
    consumer = world.consumer(topic)
    settle(consumer, partitions=1)
    transactions = world.transactions()
    world.write(topic, "0")
    transactions.begin()
    transactions.send([out(topic, "1")])
    transactions.commit()
    world.write(topic, "3")
    records = collect([consumer], lambda found: len(found) == 3)
    assert [record.offset for record in records] == [0, 1, 3]
    assert consumer.end_offsets([log]) == consumer.peek_end_offsets([log]) == {log: 4}
    assert consumer.beginning_offsets([log]) == {log: 0}
    assert consumer.end_offsets([]) == consumer.peek_end_offsets([]) == consumer.committed([]) == {}


def test_records_and_offsets_are_committed_together(world: World) -> None:
    source, target = world.topic(), world.topic(name="out")
    log = Partition(source, 0)
    world.write(source, "a", "b", "c")
    consumer = world.consumer(source)
    assert take(consumer, 3) == ["a", "b", "c"]
    transactions = world.transactions()
    for number in (1, 2):
        consume_transform(transactions, consumer, {log: number}, out(target, f"answer {number}"))
        transactions.commit()
        assert consumer.committed([log]) == {log: number}
    consumer.close()
    successor = world.consumer(source)
    assert take(successor, 1) == ["c"]


def test_an_abort_leaves_nothing(world: World) -> None:
    source, target = world.topic(), world.topic(name="out")
    log = Partition(source, 0)
    consumer, transactions = world.consumer(source, target), world.transactions()
    settle(consumer, partitions=2)
    consume_transform(transactions, consumer, {log: 1}, out(target, "never"))
    transactions.abort()
    transactions.abort()
    assert consumer.committed([log]) == {log: None}
    consume_transform(transactions, consumer, {log: 2}, out(target, "kept"))
    transactions.commit()
    assert consumer.committed([log]) == {log: 2}
    assert take(consumer, 1) == ["kept"]


def test_an_empty_transaction_is_fine(world: World) -> None:
    topic = world.topic()
    consumer, transactions = world.consumer(topic), world.transactions()
    settle(consumer, partitions=1)
    for offsets in ({}, {Partition(topic, 0): 0}):
        consume_transform(transactions, consumer, offsets)
        transactions.commit()
    transactions.begin()
    transactions.abort()
    assert consumer.committed([Partition(topic, 0)]) == {Partition(topic, 0): 0}


def test_nothing_can_be_sent_outside_a_transaction(world: World) -> None:
    topic = world.topic()
    transactions = world.transactions()
    with pytest.raises(ProducerFenced):
        transactions.send([out(topic, "x")])
    with pytest.raises(ProducerFenced):
        transactions.commit()
    transactions.abort()


def test_an_oversized_record_fails_the_transaction_alone(world: World) -> None:
    topic = world.topic()
    consumer, transactions = world.consumer(topic), world.transactions()
    for size in (TOPIC_BYTES + 100, 2 * TOPIC_BYTES):
        transactions.begin()
        with pytest.raises(InvalidRecord):
            transactions.send([out(topic, "with it"), out(topic, "x" * size)])
            transactions.commit()
        transactions.abort()
        # a producer that got so far that the broker refused the record may be spent, and says so
        transactions = reopened(world, transactions)
    transactions.begin()
    transactions.send([out(topic, "after")])
    transactions.commit()
    assert take(consumer, 1) == ["after"]


def reopened(world: World, transactions: TransactionalProducer) -> TransactionalProducer:
    """Return the producer, or a successor where it cannot begin."""
    try:
        transactions.begin()
    except ProducerFenced:
        return world.transactions()
    transactions.abort()
    return transactions


def test_a_successor_aborts_its_predecessor_at_once_and_fences_it(world: World) -> None:
    source, target = world.topic(), world.topic(name="out")
    log = Partition(source, 0)
    consumer = world.consumer(source, target)
    settle(consumer, partitions=2)
    zombie = world.transactions()
    consume_transform(zombie, consumer, {log: 7}, out(target, "zombie"))
    began = time.monotonic()
    successor = world.transactions()
    consume_transform(successor, consumer, {log: 1}, out(target, "successor"))
    successor.commit()
    assert take(consumer, 1) == ["successor"]
    assert time.monotonic() - began < 5, "the transaction timeout is twice that"
    with pytest.raises(ProducerFenced):
        zombie.commit()
    zombie.abort()
    with pytest.raises(ProducerFenced):
        zombie.begin()
    consume_transform(successor, consumer, {log: 2}, out(target, "still there"))
    successor.commit()
    assert take(consumer, 1) == ["still there"]
    assert consumer.committed([log]) == {log: 2}


def test_a_fenced_producer_can_neither_send_nor_disturb_its_successor(world: World) -> None:
    topic = world.topic()
    consumer, zombie = world.consumer(topic), world.transactions()
    zombie.begin()
    zombie.send([out(topic, "zombie, before")])
    successor = world.transactions()
    successor.begin()
    successor.send([out(topic, "successor")])
    with pytest.raises(ProducerFenced):
        zombie.send([out(topic, "zombie, after")])
        zombie.commit()
    time.sleep(0.3)  # what the zombie's client does on its own account must not fence the successor
    zombie.abort()
    successor.commit()
    assert take(consumer, 1) == ["successor"]
    assert quiet(consumer) == []


def test_slots_do_not_fence_each_other(world: World) -> None:
    topic = world.topic()
    consumer, one, two = world.consumer(topic), world.transactions("one"), world.transactions("two")
    one.begin()
    two.begin()
    one.send([out(topic, "one")])
    two.send([out(topic, "two")])
    two.commit()
    one.commit()
    assert sorted(take(consumer, 2)) == ["one", "two"]


def test_closing_aborts_what_is_open(world: World) -> None:
    topic = world.topic()
    consumer, transactions = world.consumer(topic), world.transactions()
    transactions.begin()
    transactions.send([out(topic, "never")])
    transactions.close()
    world.write(topic, "visible")
    assert take(consumer, 1) == ["visible"]


def test_a_high_watermark_counts_what_is_not_committed_yet(world: World) -> None:
    topic = world.topic()
    world.write(topic, "a")
    transactions = world.transactions()
    transactions.begin()
    transactions.send([out(topic, "open")])
    admin, partition = world.broker.admin(), Partition(topic, 0)
    try:
        deadline = time.monotonic() + 10  # what is sent is acknowledged at the latest by the commit
        while admin.high_watermarks([partition]) != {partition: 2} and time.monotonic() < deadline:
            time.sleep(0.05)
        assert admin.high_watermarks([partition]) == {partition: 2}
        assert admin.high_watermarks([]) == {}
    finally:
        admin.close()
        transactions.abort()
