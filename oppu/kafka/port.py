"""What the workers ask of Kafka; held on the in-memory broker and on real Kafka by one contract suite.

Invariant: a consumer never delivers a record before its partition was positioned by the ``Start`` callback, and
never resets an offset by itself. Errors are ours: ``TransientError``, ``ProducerFenced``, ``OffsetOutOfRange``,
``InvalidRecord`` for a record that is too large, ``FatalError`` where the cluster refuses us for good.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from oppu.values import OutRecord, Partition, Record

Start = Callable[[frozenset[Partition], Mapping[Partition, int | None]], Mapping[Partition, int]]
"""Given newly assigned partitions and their committed offsets, say where to begin reading each."""


@dataclass(frozen=True, slots=True)
class GroupMetadata:
    """Proof of group membership that a transaction carries; ``raw`` is the client library's own value."""

    group_id: str
    generation: int
    member_id: str
    raw: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Produced:
    """Where an acknowledged record lies."""

    partition: Partition
    offset: int


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic to create. ``config`` is passed to the broker as it is."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str] = field(default_factory=dict)


class Consumer(Protocol):
    """A member of a consumer group that reads committed records only."""

    def poll(self, timeout_seconds: float, max_records: int) -> list[Record]:
        """Join, heartbeat and fetch; records of one partition are in offset order.

        Args:
            timeout_seconds: How long to wait where there is nothing.
            max_records: At most so many.

        Returns:
            The records; none while the group rebalances.

        Raises:
            OffsetOutOfRange: A position lies outside the log.
            TransientError: The broker cannot be reached.
        """
        ...

    def assignment(self) -> frozenset[Partition]:
        """Return the partitions held now."""
        ...

    def seek(self, partition: Partition, offset: int) -> None:
        """Move the position; the next record delivered is the one at ``offset``.

        Does nothing for a partition that is not held, as a rebalance may just have taken it; so do pause and resume.
        """
        ...

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Stop fetching from these partitions while still heartbeating."""
        ...

    def resume(self, partitions: Iterable[Partition]) -> None:
        """Fetch from these partitions again."""
        ...

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        """Return the group's committed next offsets.

        Raises ``TransientError`` while a transaction that is still open is about to move one of them.
        """
        ...

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return the first offset that the broker still holds."""
        ...

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return the next offset that will be readable (the last stable offset)."""
        ...

    def peek_end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return the same without patience: for a gauge, between two polls.

        Args:
            partitions: Any.

        Returns:
            Next offsets by partition.

        Raises:
            TransientError: The broker did not answer at the first attempt.
        """
        ...

    def group_metadata(self) -> GroupMetadata:
        """Return the membership under which the present assignment was given; generation -1 before the first."""
        ...

    def close(self) -> None:
        """Leave the group and release the connection."""
        ...


class Producer(Protocol):
    """Sends records and waits for their acknowledgement by all in-sync replicas."""

    def send(self, records: Sequence[OutRecord]) -> list[Produced]:
        """Send and wait until all are acknowledged.

        Args:
            records: To be sent, in this order where the key is the same.

        Returns:
            Where each of them lies.

        Raises:
            TransientError: At least one was not acknowledged; some may have been written.
            InvalidRecord: One is larger than its topic takes; some may have been written.
        """
        ...

    def close(self) -> None:
        """Release the connection."""
        ...


class TransactionalProducer(Protocol):
    """One transaction at a time under a stable ``transactional.id``; a newer instance fences the older."""

    def begin(self) -> None:
        """Open a transaction.

        Raises:
            ProducerFenced: A newer producer holds the id, or this one can no longer be used: open another.
        """
        ...

    def send(self, records: Sequence[OutRecord]) -> None:
        """Add records to the transaction; acknowledged at the latest by :meth:`commit`.

        Args:
            records: To be sent, in this order where the key is the same.

        Raises:
            InvalidRecord: One is larger than its topic takes, here or in :meth:`commit`: abort.
        """
        ...

    def send_offsets(self, offsets: Mapping[Partition, int], group: GroupMetadata) -> None:
        """Add the group's next offsets to the transaction.

        Args:
            offsets: The next offset of each partition.
            group: Proof that the caller holds them.

        Raises:
            ProducerFenced: The generation is stale.
        """
        ...

    def commit(self) -> None:
        """Make records and offsets visible together.

        Raises:
            TransientError: The outcome is unknown; seek back to the committed offsets.
        """
        ...

    def abort(self) -> None:
        """Drop the transaction; does nothing where none is open."""
        ...

    def close(self) -> None:
        """Abort what is open and release the connection."""
        ...


class Admin(Protocol):
    """Topics and the cluster."""

    def cluster_id(self) -> str:
        """Return the cluster's own id."""
        ...

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        """Return each existing topic's identity (its UUID); a topic that was recreated has another."""
        ...

    def create_topics(self, topics: Sequence[TopicSpec]) -> list[str]:
        """Create the missing ones and return their names."""
        ...

    def describe_topics(self, topics: Sequence[str]) -> dict[str, TopicSpec]:
        """Return partitions, replication and non-default configuration of the existing ones."""
        ...

    def high_watermarks(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return where partitions end, records of transactions that are still open included."""
        ...

    def close(self) -> None:
        """Release the connection."""
        ...


class Broker(Protocol):
    """Opens clients against one cluster."""

    def consumer(self, group: str, topics: Sequence[str], start: Start, *, client_id: str) -> Consumer:
        """Open a group member; ``start`` is called with every new assignment before its records are read."""
        ...

    def producer(self, *, client_id: str) -> Producer:
        """Open an idempotent producer (``acks=all``)."""
        ...

    def transactional_producer(self, transactional_id: str) -> TransactionalProducer:
        """Open a transactional producer, which aborts its predecessor's open transaction at once."""
        ...

    def admin(self) -> Admin:
        """Open an administrative client."""
        ...
