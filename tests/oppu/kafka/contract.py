"""What the contract suite of the Kafka port stands on: one world for the in-memory broker and for a real one.

Times are upper bounds for the real broker; the in-memory one answers at the first poll.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from oppu.kafka.port import Broker, Consumer, Producer, TopicSpec, TransactionalProducer
from oppu.values import OutRecord, Partition, Record

PATIENCE_SECONDS = 20.0
TOPIC_BYTES = 2 * 2**20


def earliest(new: frozenset[Partition], committed: Mapping[Partition, int | None]) -> dict[Partition, int]:
    """Begin at the committed offset, or at the start of the log."""
    return {partition: committed[partition] or 0 for partition in new}


@dataclass
class World:
    """One broker, with names that no other test uses, and clients that are closed at the end."""

    broker: Broker
    prefix: str = field(default_factory=lambda: f"c{uuid.uuid4().hex[:12]}")
    opened: list[Consumer | Producer | TransactionalProducer] = field(default_factory=list)

    def topic(self, partitions: int = 1, name: str = "t") -> str:
        """Create a topic and return its name."""
        admin = self.broker.admin()
        spec = TopicSpec(f"{self.prefix}.{name}", partitions, 1, {"max.message.bytes": str(TOPIC_BYTES)})
        assert admin.create_topics([spec]) == [spec.name]
        admin.close()
        return spec.name

    def consumer(self, *topics: str, start: Callable[..., Mapping[Partition, int]] = earliest) -> Consumer:
        """Open a member of the test's group."""
        self.opened.append(self.broker.consumer(f"{self.prefix}-g", topics, start, client_id="test"))
        return self.opened[-1]  # type: ignore[return-value]

    def producer(self) -> Producer:
        """Open a producer."""
        self.opened.append(self.broker.producer(client_id="test"))
        return self.opened[-1]  # type: ignore[return-value]

    def transactions(self, slot: str = "0") -> TransactionalProducer:
        """Open a transactional producer in a slot."""
        self.opened.append(self.broker.transactional_producer(f"{self.prefix}-{slot}"))
        return self.opened[-1]  # type: ignore[return-value]

    def write(self, topic: str, *values: str) -> None:
        """Produce values, all with the same key."""
        self.producer().send([out(topic, value) for value in values])


def out(topic: str, value: str | None, key: str | None = "k") -> OutRecord:
    """Make a record to be produced."""
    return OutRecord(topic, key if key is None else key.encode(), value if value is None else value.encode())


def collect(
    consumers: Sequence[Consumer], until: Callable[[list[Record]], bool], seconds: float = PATIENCE_SECONDS
) -> list[Record]:
    """Poll all in turn until what came satisfies ``until``."""
    records: list[Record] = []
    deadline = time.monotonic() + seconds
    while not until(records):
        assert time.monotonic() < deadline, f"gave up after {len(records)} records"
        for consumer in consumers:
            records += consumer.poll(0.05, 100)
    return records


def take(consumer: Consumer, count: int) -> list[str]:
    """Poll until so many records came; return their values."""
    return values(collect([consumer], lambda records: len(records) >= count))


def quiet(consumer: Consumer, polls: int = 6) -> list[str]:
    """Poll a few more times and return what came."""
    return values([record for _ in range(polls) for record in consumer.poll(0.05, 100)])


def settle(*consumers: Consumer, partitions: int) -> None:
    """Poll until the members hold all partitions, each one once, and all in the same generation."""

    def shared(_: list[Record]) -> bool:
        held = [partition for consumer in consumers for partition in consumer.assignment()]
        generations = {consumer.group_metadata().generation for consumer in consumers}
        return len(held) == len(set(held)) == partitions and len(generations) == 1 and generations != {-1}

    collect(consumers, shared)


def values(records: Sequence[Record]) -> list[str]:
    """Return the records' values as text."""
    return [(record.value or b"").decode() for record in records]


def consume_transform(
    transactions: TransactionalProducer, consumer: Consumer, offsets: Mapping[Partition, int], *records: OutRecord
) -> None:
    """Open a transaction with records and offsets."""
    transactions.begin()
    transactions.send(records)
    transactions.send_offsets(offsets, consumer.group_metadata())
