"""The port's promises about records, positions and the cluster, on both brokers."""

from collections.abc import Mapping

import pytest

from oppu.errors import FatalError, InvalidRecord, OffsetOutOfRange, Reason, TransientError
from oppu.kafka.port import TopicSpec
from oppu.values import OutRecord, Partition
from tests.oppu.kafka.contract import TOPIC_BYTES, World, collect, out, quiet, settle, take, values


def test_records_come_in_order_with_all_they_carry(world: World) -> None:
    topic = world.topic()
    sent = [
        OutRecord(topic, b"\xff\x00", "ü".encode(), (("a", b"1"), ("a", b""), ("b", b"\xff"))),
        OutRecord(topic, b"only key", None),
        OutRecord(topic, None, b"only value"),
        OutRecord(topic, None, None),
        OutRecord(topic, b"", b""),
    ]
    acknowledged = world.producer().send(sent)
    assert [(p.partition, p.offset) for p in acknowledged] == [(Partition(topic, 0), n) for n in range(5)]
    records = collect([world.consumer(topic)], lambda found: len(found) >= 5)
    assert [(r.offset, r.key, r.value, r.headers) for r in records] == [
        (n, s.key, s.value, s.headers) for n, s in enumerate(sent)
    ]
    assert all(record.timestamp_ms > 1_700_000_000_000 for record in records)


def test_nothing_to_send_is_fine(world: World) -> None:
    assert world.producer().send([]) == []


def test_a_poll_returns_at_most_what_was_asked_for(world: World) -> None:
    topic = world.topic()
    world.write(topic, *map(str, range(7)))
    consumer = world.consumer(topic)
    sizes: list[int] = []
    while sum(sizes) < 7:
        sizes.append(len(consumer.poll(1.0, 3)))
    assert max(sizes) == 3


def test_an_unknown_topic_is_transient(world: World) -> None:
    with pytest.raises(TransientError):
        world.producer().send([out(f"{world.prefix}.missing", "x")])


@pytest.mark.parametrize("size", [TOPIC_BYTES + 100, TOPIC_BYTES * 2])
def test_an_oversized_record_is_refused_and_the_producer_lives_on(world: World, size: int) -> None:
    topic = world.topic()
    producer = world.producer()
    with pytest.raises(InvalidRecord) as refused:
        producer.send([out(topic, "x" * size)])
    assert refused.value.reason is Reason.LIMIT_EXCEEDED
    assert producer.send([out(topic, "after")])[0].partition == Partition(topic, 0)


def test_records_up_to_the_topics_limit_pass(world: World) -> None:
    topic = world.topic()
    world.write(topic, "x" * (TOPIC_BYTES - 200), "small", "y" * (TOPIC_BYTES - 200))
    assert [len(value) for value in take(world.consumer(topic), 3)] == [
        TOPIC_BYTES - 200,
        5,
        TOPIC_BYTES - 200,
    ]


KEYS = ["", "a", "ab", "abc", "abcd", "user-1", "user-2", "ünïcödé", "日本語のユーザー", "🦜", "\x00", "x" * 999]


def test_keys_go_where_kafkas_default_partitioner_sends_them(world: World) -> None:
    topic = world.topic(partitions=7)
    produced = world.producer().send([out(topic, "v", key) for key in KEYS])
    # by Kafka's own Utils.toPositive(Utils.murmur2(key)) % 7
    assert [p.partition.index for p in produced] == [2, 5, 0, 4, 5, 3, 0, 4, 6, 1, 0, 6]


# --- positions


def test_start_decides_where_to_begin(world: World) -> None:
    topic = world.topic(partitions=2)
    calls: list[tuple[frozenset[Partition], Mapping[Partition, int | None]]] = []

    def start(new: frozenset[Partition], committed: Mapping[Partition, int | None]) -> Mapping[Partition, int]:
        calls.append((new, dict(committed)))
        return dict.fromkeys(new, 2)

    world.producer().send([out(topic, f"{n}", f"{n}") for n in range(40)])
    records = collect([world.consumer(topic, start=start)], lambda found: len(found) >= 36)
    both = frozenset({Partition(topic, 0), Partition(topic, 1)})
    assert calls == [(both, dict.fromkeys(both))]
    assert len(records) == 36
    assert min(record.offset for record in records) == 2


def test_an_error_of_start_leaves_poll_and_nothing_is_delivered_until_it_succeeds(world: World) -> None:
    topic = world.topic()
    world.write(topic, "a")
    failures: list[Exception] = [FatalError("one"), TransientError("two"), KeyError("three")]

    def start(new: frozenset[Partition], committed: Mapping[Partition, int | None]) -> Mapping[Partition, int]:
        if failures:
            raise failures.pop(0)
        return dict.fromkeys(new, 0)

    consumer = world.consumer(topic, start=start)
    for kind in (FatalError, TransientError, KeyError):
        with pytest.raises(kind):
            collect([consumer], lambda found: bool(found))
    assert take(consumer, 1) == ["a"]


def test_seek_moves_the_position_both_ways(world: World) -> None:
    topic = world.topic()
    world.write(topic, "a", "b", "c")
    consumer = world.consumer(topic)
    assert take(consumer, 3) == ["a", "b", "c"]
    consumer.seek(Partition(topic, 1 - 1), 1)
    assert take(consumer, 2) == ["b", "c"]
    consumer.seek(Partition(topic, 0), 0)
    consumer.seek(Partition(topic, 0), 2)
    assert take(consumer, 1) == ["c"]
    consumer.seek(Partition(topic, 9), 0)


def test_a_paused_partition_delivers_nothing_until_resumed(world: World) -> None:
    topic = world.topic(partitions=2)
    consumer = world.consumer(topic)
    settle(consumer, partitions=2)
    paused = Partition(topic, 0)
    consumer.pause([paused, Partition("elsewhere", 0)])
    world.producer().send([out(topic, f"{n}", f"{n}") for n in range(20)])
    rest = collect([consumer], lambda found: bool(found))
    rest += [record for _ in range(6) for record in consumer.poll(0.05, 100)]
    assert {record.partition for record in rest} == {Partition(topic, 1)}
    consumer.resume([paused, Partition("elsewhere", 0)])
    collect([consumer], lambda found: len(found) + len(rest) == 20)


def test_what_was_fetched_before_a_pause_is_delivered_after_the_resume(world: World) -> None:
    topic = world.topic(partitions=3)
    sent = [out(topic, f"v{n}", key=f"k{n % 11}") for n in range(300)]
    world.producer().send(sent)
    consumer = world.consumer(topic)
    found: list[str] = []
    for _ in range(400):
        polled = consumer.poll(0.05, 20)
        found += values(polled)
        part = {record.partition for record in polled}
        consumer.pause(part)
        found += values(consumer.poll(0.05, 20))
        consumer.resume(part)
        if len(found) >= len(sent):
            break
    assert sorted(found) == sorted(f"v{n}" for n in range(300))


@pytest.mark.parametrize("position", [5, 1_000_000])
def test_a_position_beyond_the_end_is_out_of_range_until_sought_back(world: World, position: int) -> None:
    topic = world.topic()
    world.write(topic, "a", "b")
    consumer = world.consumer(topic, start=lambda new, _: dict.fromkeys(new, position))
    for _ in range(2):
        with pytest.raises(OffsetOutOfRange) as raised:
            collect([consumer], lambda found: bool(found))
        assert raised.value.offsets == {(topic, 0): position}
    consumer.seek(Partition(topic, 0), 1)
    assert take(consumer, 1) == ["b"]


def test_standing_at_the_end_is_in_range(world: World) -> None:
    topic = world.topic()
    world.write(topic, "a", "b")
    consumer = world.consumer(topic, start=lambda new, _: dict.fromkeys(new, 2))
    assert quiet(consumer) == []
    world.write(topic, "c")
    assert take(consumer, 1) == ["c"]


def test_the_cluster_and_its_topics_can_be_described(world: World) -> None:
    topic, other = world.topic(partitions=3), world.topic(name="other")
    missing = f"{world.prefix}.missing"
    admin = world.broker.admin()
    another = world.broker.admin()
    assert admin.cluster_id() == another.cluster_id() != ""
    another.close()
    ids = admin.topic_ids([topic, other, missing])
    assert ids.keys() == {topic, other}
    assert ids[topic] != ids[other]
    spec = TopicSpec(topic, 3, 1, {"max.message.bytes": str(TOPIC_BYTES)})
    assert admin.describe_topics([topic, missing]) == {topic: spec}
    assert admin.create_topics([spec]) == []
    assert admin.topic_ids([]) == {}
    admin.close()
