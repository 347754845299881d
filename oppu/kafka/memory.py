"""Kafka in one process, for tests and the simulator: real semantics, no threads, no clock of its own.

What it models: the default partitioner, generations and eager rebalances, the last stable offset, aborted records
and control markers, fencing, unstable offset commits, timeouts by the clock that is passed in, retention. The
contract suite holds it to real Kafka. Invariant: the same calls in the same order give the same results.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from oppu.clock import Clock
from oppu.errors import InvalidRecord, OffsetOutOfRange, OppuError, ProducerFenced, TransientError
from oppu.kafka.memory_cluster import Cluster, Timeouts
from oppu.kafka.memory_group import Member
from oppu.kafka.memory_log import Fate, Transaction
from oppu.kafka.port import GroupMetadata, Produced, Start, TopicSpec
from oppu.values import OutRecord, Partition, Record

CLUSTER_ID = "memory"


class MemoryBroker:
    """A whole cluster (the port's ``Broker``)."""

    def __init__(self, clock: Clock, timeouts: Timeouts | None = None) -> None:
        """Start empty.

        Args:
            clock: Gives records their timestamps, and decides when sessions and transactions time out.
            timeouts: Other than Kafka's defaults.
        """
        self._cluster = Cluster(clock, timeouts or Timeouts())

    @property
    def unavailable(self) -> bool:
        """While true every call of every client raises ``TransientError``."""
        return self._cluster.unavailable

    @unavailable.setter
    def unavailable(self, value: bool) -> None:
        self._cluster.unavailable = value

    def on_call(self, fault: Callable[[str], None] | None) -> None:
        """Have ``fault`` called with ``client.verb`` before every call; what it raises, the call raises."""
        self._cluster.fault = fault

    def consumer(self, group: str, topics: Sequence[str], start: Start, *, client_id: str) -> "MemoryConsumer":
        """Open a group member; ``start`` is called with every new assignment before its records are read."""
        return MemoryConsumer(self._cluster, group, tuple(topics), start, client_id)

    def producer(self, *, client_id: str) -> "MemoryProducer":
        """Open a producer."""
        self._cluster.enter("producer.open")
        return MemoryProducer(self._cluster, client_id)

    def transactional_producer(self, transactional_id: str) -> "MemoryTransactions":
        """Open a transactional producer, which aborts its predecessor's open transaction at once."""
        return MemoryTransactions(self._cluster, transactional_id)

    def admin(self) -> "MemoryAdmin":
        """Open an administrative client."""
        return MemoryAdmin(self._cluster)

    def expire(self, consumer: "MemoryConsumer") -> None:
        """Expel a member, as the broker does with one that it has not heard for the session timeout."""
        consumer.expel()

    def delete_records(self, partition: Partition, before: int) -> None:
        """Drop the records before an offset, as retention does."""
        self._cluster.log(partition).delete(before)

    def delete_topic(self, name: str) -> None:
        """Delete a topic; created again it is another one."""
        self._cluster.drop(name)

    def records(self, topic: str) -> list[Record]:
        """Return all committed records of a topic that are still held, partition by partition: for assertions."""
        logs = [self._cluster.log(Partition(topic, index)) for index in range(self._cluster.counts()[topic])]
        return [record for log in logs for record in log.read(log.start, log.end)[0]]

    def committed(self, group: str) -> dict[Partition, int]:
        """Return a group's committed next offsets: for assertions."""
        return dict(self._cluster.group(group).committed)


class MemoryConsumer:
    """A group member (the port's ``Consumer``)."""

    def __init__(self, cluster: Cluster, group: str, topics: tuple[str, ...], start: Start, client_id: str) -> None:
        cluster.enter("consumer.open")
        self._cluster = cluster
        self._group = cluster.group(group)
        self._topics, self._start, self._client_id = topics, start, client_id
        self._member: Member | None = None
        self._owned: frozenset[Partition] = frozenset()
        self._unplaced: frozenset[Partition] = frozenset()
        self._paused: frozenset[Partition] = frozenset()
        self._positions: dict[Partition, int] = {}
        self._metadata = GroupMetadata(group, -1, "")
        self._turn = 0
        self._closed = False

    def poll(self, timeout_seconds: float, max_records: int) -> list[Record]:
        """Take part in the group and fetch; it never waits."""
        self._enter("poll")
        member = self._joined()
        member.heard = self._cluster.clock.monotonic()
        if not self._group.sync(member, self._cluster.counts()):
            return []
        self._adopt(member)
        self._place()
        return self._fetch(max_records)

    def assignment(self) -> frozenset[Partition]:
        """Return the partitions held now."""
        return self._owned

    def seek(self, partition: Partition, offset: int) -> None:
        """Move the position; does nothing for a partition that is not held."""
        if partition in self._owned:
            self._positions[partition] = offset

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Stop fetching from these partitions; does nothing for those not held."""
        self._paused |= frozenset(partitions) & self._owned

    def resume(self, partitions: Iterable[Partition]) -> None:
        """Fetch from these partitions again."""
        self._paused -= frozenset(partitions)

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        """Return the group's committed next offsets; transient while a transaction is about to move them."""
        self._enter("committed")
        return {p: self._cluster.committed(self._group.name, p) for p in partitions}

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return the first offset that is still held."""
        self._enter("beginning_offsets")
        return {p: self._cluster.log(p).start for p in partitions}

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return the last stable offset."""
        self._enter("end_offsets")
        return {p: self._cluster.log(p).last_stable() for p in partitions}

    def peek_end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return the last stable offset."""
        return self.end_offsets(partitions)

    def group_metadata(self) -> GroupMetadata:
        """Return the membership under which the present assignment was given; generation -1 before the first."""
        return self._metadata

    def close(self) -> None:
        """Leave the group."""
        if not self._closed:
            self.expel()
            self._closed = True

    def crash(self) -> None:
        """Vanish without leaving: the group learns of it after the session timeout."""
        if self._member is not None:
            self._member.alive = False
            self._member.heard = self._cluster.clock.monotonic()
        self._closed = True

    def expel(self) -> None:
        """Be taken out of the group; a consumer that lives on learns of it in its next poll."""
        if self._member is not None:
            self._group.leave(self._member.id)

    def _enter(self, verb: str) -> None:
        if self._closed:
            raise TransientError("the consumer is closed")
        self._cluster.enter(f"consumer.{verb}")

    def _joined(self) -> Member:
        member = self._member
        if member is not None and self._group.members.get(member.id) is member:
            return member
        # never joined, or expelled: what it held is lost and is new when it comes back
        self._owned = self._unplaced = self._paused = frozenset()
        self._positions.clear()
        name = f"{self._client_id}-{self._cluster.number():06d}"
        self._member = Member(name, self._topics, self._cluster.clock.monotonic())
        self._group.join(self._member)
        return self._member

    def _adopt(self, member: Member) -> None:
        if self._metadata.member_id == member.id and self._metadata.generation == member.generation:
            return
        new = member.assigned - self._owned
        self._owned = member.assigned
        self._unplaced = (self._unplaced & self._owned) | new
        self._paused &= self._owned
        self._positions = {p: n for p, n in self._positions.items() if p in self._owned - new}
        self._metadata = GroupMetadata(self._group.name, member.generation, member.id)

    def _place(self) -> None:
        if self._unplaced:
            ours = self._unplaced
            positions = self._start(ours, self.committed(sorted(ours)))
            self._positions.update({partition: positions[partition] for partition in ours})
            self._unplaced = frozenset()

    def _fetch(self, max_records: int) -> list[Record]:
        ready = sorted(self._owned - self._paused)
        logs = {partition: self._cluster.log(partition) for partition in ready}
        outside = {p: self._positions[p] for p in ready if not logs[p].holds(self._positions[p])}
        if outside:
            raise OffsetOutOfRange({(p.topic, p.index): offset for p, offset in outside.items()})
        self._turn += 1
        first = self._turn % len(ready) if ready else 0
        records: list[Record] = []
        for partition in ready[first:] + ready[:first]:
            room = max_records - len(records)
            read, self._positions[partition] = logs[partition].read(self._positions[partition], room)
            records += read
        return records


class MemoryProducer:
    """A plain producer (the port's ``Producer``)."""

    def __init__(self, cluster: Cluster, client_id: str) -> None:
        self._cluster, self._client_id = cluster, client_id
        self._closed = False

    def send(self, records: Sequence[OutRecord]) -> list[Produced]:
        """Write the records, up to the first that is refused."""
        if self._closed:
            raise TransientError("the producer is closed")
        self._cluster.enter("producer.send")
        return [self._cluster.append(record, None) for record in records]

    def close(self) -> None:
        """Send no more."""
        self._closed = True

    def crash(self) -> None:
        """Vanish."""
        self._closed = True


class MemoryTransactions:
    """A transactional producer (the port's ``TransactionalProducer``)."""

    def __init__(self, cluster: Cluster, transactional_id: str) -> None:
        cluster.enter("transactions.open")
        self._cluster, self._id = cluster, transactional_id
        self._epoch = cluster.register(transactional_id)
        self._open = False
        self._written: Transaction | None = None
        self._error: OppuError | None = None

    def begin(self) -> None:
        """Open a transaction."""
        self._cluster.enter("transactions.begin")
        self._cluster.require_epoch(self._id, self._epoch)
        if self._open:
            raise ProducerFenced("a transaction is open already")
        self._open, self._written, self._error = True, None, None

    def send(self, records: Sequence[OutRecord]) -> None:
        """Write records that stay hidden until :meth:`commit`."""
        self._enter("send")
        try:
            for record in records:
                self._written = self._cluster.transaction(self._id)
                self._cluster.append(record, self._written)
        except (InvalidRecord, TransientError) as error:
            self._error = error
            raise

    def send_offsets(self, offsets: Mapping[Partition, int], group: GroupMetadata) -> None:
        """Add next offsets; raises ``ProducerFenced`` where the generation is stale."""
        self._enter("send_offsets")
        if not self._cluster.group(group.group_id).is_current(group.member_id, group.generation):
            self._error = ProducerFenced(f"generation {group.generation} of {group.group_id} is stale")
            raise self._error
        if offsets:
            self._written = self._cluster.transaction(self._id)
            self._written.offsets.setdefault(group.group_id, {}).update(offsets)

    def commit(self) -> None:
        """Make records and offsets visible together."""
        self._enter("commit")
        if self._written is not None:
            self._cluster.finish(self._written, Fate.COMMITTED)
        self._open, self._written = False, None

    def abort(self) -> None:
        """Drop the transaction; does nothing where none is open."""
        if not self._open:
            return
        self._open = False
        written, self._written = self._written, None
        self._cluster.enter("transactions.abort")
        if written is not None and written.fate is Fate.OPEN:
            self._cluster.finish(written, Fate.ABORTED)

    def close(self) -> None:
        """Abort what is open."""
        self.abort()

    def crash(self) -> None:
        """Vanish: what is open stays open until a successor or the transaction timeout ends it."""
        self._open = False

    def _enter(self, verb: str) -> None:
        self._cluster.enter(f"transactions.{verb}")
        self._cluster.require_epoch(self._id, self._epoch)
        if not self._open:
            raise ProducerFenced("no transaction is open")
        if self._error is not None:
            raise self._error


class MemoryAdmin:
    """Topics and the cluster (the port's ``Admin``)."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def cluster_id(self) -> str:
        """Return the cluster's own id."""
        self._cluster.enter("admin.cluster_id")
        return CLUSTER_ID

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        """Return each existing topic's identity."""
        self._cluster.enter("admin.topic_ids")
        return {name: self._cluster.topic_id(name) for name in topics if name in self._cluster.specs()}

    def create_topics(self, topics: Sequence[TopicSpec]) -> list[str]:
        """Create the missing ones and return their names."""
        self._cluster.enter("admin.create_topics")
        return [spec.name for spec in topics if self._cluster.create(spec)]

    def describe_topics(self, topics: Sequence[str]) -> dict[str, TopicSpec]:
        """Return the existing ones as they were created."""
        self._cluster.enter("admin.describe_topics")
        specs = self._cluster.specs()
        return {name: specs[name] for name in topics if name in specs}

    def high_watermarks(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return where partitions end, records of open transactions included."""
        self._cluster.enter("admin.high_watermarks")
        return {p: self._cluster.log(p).end for p in partitions}

    def close(self) -> None:
        """Do nothing: there is no connection."""
