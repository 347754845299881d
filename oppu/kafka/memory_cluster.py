"""The state of the in-memory cluster: topics, groups, transactions, and the faults that tests inject.

Everything happens inside the caller's call: timeouts are noticed when somebody next talks to the cluster, by the
clock that was passed in. Invariant: of one ``transactional.id`` only the newest epoch can write or commit.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from oppu.clock import Clock
from oppu.errors import InvalidRecord, ProducerFenced, Reason, TransientError
from oppu.kafka.memory_group import Group, Member
from oppu.kafka.memory_log import Fate, Log, Transaction
from oppu.kafka.murmur import partition_of
from oppu.kafka.port import Produced, TopicSpec
from oppu.values import OutRecord, Partition

DEFAULT_MESSAGE_BYTES = 1_048_588
"""Kafka's default ``max.message.bytes``."""

BATCH_OVERHEAD_BYTES = 70
"""What Kafka's format adds to a record that is alone in its batch, about."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Kafka's three, in seconds. A member that runs but does not poll is expelled after ``poll``."""

    session: float = 10.0
    transaction: float = 10.0
    poll: float = 300.0


@dataclass(slots=True)
class _Topic:
    spec: TopicSpec
    id: str
    logs: list[Log]
    next_keyless: int = 0

    def max_bytes(self) -> int:
        return int(self.spec.config.get("max.message.bytes", DEFAULT_MESSAGE_BYTES))


@dataclass(slots=True, eq=False)
class Cluster:
    """What all clients of one in-memory broker share.

    Attributes:
        unavailable: Every call raises ``TransientError`` while set.
        fault: Called with the operation's name before it happens; what it raises, the operation raises.
    """

    clock: Clock
    timeouts: Timeouts
    unavailable: bool = False
    fault: Callable[[str], None] | None = None
    _topics: dict[str, _Topic] = field(default_factory=dict)
    _groups: dict[str, Group] = field(default_factory=dict)
    _epochs: dict[str, int] = field(default_factory=dict)
    _open: dict[str, Transaction] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 2**62)))

    def enter(self, operation: str) -> None:
        """Begin any call: injected faults first, then whatever the clock has made due."""
        if self.fault is not None:
            self.fault(operation)
        if self.unavailable:
            raise TransientError(f"in-memory broker is unavailable ({operation})")
        now = self.clock.monotonic()
        for open_ in list(self._open.values()):
            if now - open_.began > self.timeouts.transaction:
                self.finish(open_, Fate.ABORTED)
                self._epochs[open_.transactional_id] += 1
        for group in self._groups.values():
            group.expire(lambda member: now - member.heard > self._patience(member))

    def number(self) -> int:
        """Return the next of a sequence that names members and topics, the same in every run."""
        return next(self._numbers)

    # --- topics

    def create(self, spec: TopicSpec) -> bool:
        """Create a topic; return whether it was missing."""
        if spec.name in self._topics:
            return False
        logs = [Log(Partition(spec.name, index)) for index in range(spec.partitions)]
        self._topics[spec.name] = _Topic(spec, str(uuid.UUID(int=self.number())), logs)
        self._topics_changed()
        return True

    def drop(self, name: str) -> None:
        """Delete a topic with its records, and every group's offsets of it."""
        del self._topics[name]
        for group in self._groups.values():
            group.committed = {p: n for p, n in group.committed.items() if p.topic != name}
        self._topics_changed()

    def specs(self) -> Mapping[str, TopicSpec]:
        """Return the existing topics."""
        return {name: topic.spec for name, topic in self._topics.items()}

    def topic_id(self, name: str) -> str:
        """Return an existing topic's identity."""
        return self._topics[name].id

    def counts(self) -> dict[str, int]:
        """Return the number of partitions of each topic."""
        return {name: len(topic.logs) for name, topic in self._topics.items()}

    def log(self, partition: Partition) -> Log:
        """Return a partition's log."""
        topic = self._topics.get(partition.topic)
        if topic is None or partition.index >= len(topic.logs):
            raise TransientError(f"unknown topic or partition: {partition}")
        return topic.logs[partition.index]

    def append(self, record: OutRecord, transaction: Transaction | None) -> Produced:
        """Write one record where its key sends it; without a key, to the topic's partitions in turn."""
        topic = self._topics.get(record.topic)
        if topic is None:
            raise TransientError(f"unknown topic: {record.topic}")
        if _size(record) > topic.max_bytes():
            raise InvalidRecord(Reason.LIMIT_EXCEEDED, "record: larger than the topic or the producer takes")
        if record.key is None:
            index = topic.next_keyless % len(topic.logs)
            topic.next_keyless += 1
        else:
            index = partition_of(record.key, len(topic.logs))
        timestamp = int(self.clock.now().timestamp() * 1000)
        log = topic.logs[index]
        return Produced(log.partition, log.append(record, timestamp, transaction))

    # --- groups

    def group(self, name: str) -> Group:
        """Return a group, which exists as soon as it is named."""
        return self._groups.setdefault(name, Group(name))

    def committed(self, group: str, partition: Partition) -> int | None:
        """Return a committed offset; raises ``TransientError`` while a transaction is about to move it."""
        for open_ in self._open.values():
            if partition in open_.offsets.get(group, {}):
                raise TransientError(f"unstable offset commit of {partition} by {open_.transactional_id}")
        return self.group(group).committed.get(partition)

    # --- transactions

    def register(self, transactional_id: str) -> int:
        """Let a new producer take over an id: its predecessor is fenced, what that had open is aborted."""
        self._epochs[transactional_id] = self._epochs.get(transactional_id, 0) + 1
        predecessor = self._open.get(transactional_id)
        if predecessor is not None:
            self.finish(predecessor, Fate.ABORTED)
        return self._epochs[transactional_id]

    def require_epoch(self, transactional_id: str, epoch: int) -> None:
        """Raise ``ProducerFenced`` where a newer producer holds the id, or a timeout took it away."""
        if self._epochs.get(transactional_id) != epoch:
            raise ProducerFenced(f"{transactional_id}: epoch {epoch} is no longer the newest")

    def transaction(self, transactional_id: str) -> Transaction:
        """Return the id's open transaction, beginning one where there is none."""
        if transactional_id not in self._open:
            self._open[transactional_id] = Transaction(transactional_id, self.clock.monotonic())
        return self._open[transactional_id]

    def finish(self, transaction: Transaction, fate: Fate) -> None:
        """End a transaction: a marker in every log it touched, and its offsets where it is committed."""
        del self._open[transaction.transactional_id]
        transaction.fate = fate
        for log in transaction.logs:
            log.mark(transaction)
        if fate is Fate.COMMITTED:
            for group, offsets in transaction.offsets.items():
                self.group(group).committed.update(offsets)

    def _patience(self, member: Member) -> float:
        return self.timeouts.poll if member.alive else self.timeouts.session

    def _topics_changed(self) -> None:
        for group in self._groups.values():
            if group.members:
                group.request_rebalance()


def _size(record: OutRecord) -> int:
    headers = sum(len(name.encode()) + len(value) for name, value in record.headers)
    return BATCH_OVERHEAD_BYTES + len(record.key or b"") + len(record.value or b"") + headers
