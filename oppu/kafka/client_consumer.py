"""A group member on kafka-python.

Decides nothing about offsets: where to begin comes from the ``Start`` callback, and automatic reset is off.
Invariant: a partition is paused from within the rebalance until ``Start`` has positioned it, so that nothing of
it is delivered earlier; an error of ``Start`` leaves :meth:`poll`, and the next poll tries again.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kafka import ConsumerRebalanceListener, IsolationLevel, KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import OffsetSpec
from kafka.structs import ConsumerGroupMetadata

from oppu.kafka.client_errors import translated
from oppu.kafka.client_records import read_any_header_name
from oppu.kafka.port import GroupMetadata, Start
from oppu.values import Headers, Partition, Record

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
"""The library's poll returns nothing, without an error, while the broker is away; so after this long without a
record the broker is asked something that it must answer."""

PROBE_MILLISECONDS = 5_000

CLOSE_MILLISECONDS = 3_000
"""Leaving the group is one request; a broker that does not answer it will expire the member anyway."""


class _KeptJoin:
    """Keeps the outcome of a join that ended between two polls, for the next poll to take up.

    The library drops it and joins again, which sends the whole group into another rebalance, and with polls as short
    as ours there may be no end to that.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._coordinator = consumer._coordinator  # noqa: SLF001 - there is no public way in
        self._join = self._coordinator._do_join_and_sync_async  # noqa: SLF001
        self._coordinator._do_join_and_sync_async = self._join_or_resume  # noqa: SLF001
        self._kept: tuple[Any, bytes] | None = None

    def taken(self) -> None:
        """The assignment was adopted: the next join is a real one."""
        self._kept = None

    async def _join_or_resume(self) -> bytes:
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == self._coordinator._generation:  # noqa: SLF001
            return kept[1]
        assignment: bytes = await self._join()
        self._kept = (self._coordinator._generation, assignment)  # noqa: SLF001
        return assignment


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Keeps book during a rebalance. It runs in the client's network thread, so it may not call the broker.

    ``owned`` is what we hold, ``unplaced`` what of it still awaits its first position. ``membership`` is the
    generation in which we were given it, not the client's latest: a rebalance may end in the background between two
    polls, and a proof of the new generation over the old assignment would let a transaction move offsets of
    partitions that another member already has.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer
        self._kept = _KeptJoin(consumer)
        self.owned: frozenset[TopicPartition] = frozenset()
        self.unplaced: frozenset[TopicPartition] = frozenset()
        self.membership: ConsumerGroupMetadata | None = None

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Wait: what stays ours keeps its position, and the assignment that follows says what does."""

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Hold back what is new."""
        self._kept.taken()
        now = frozenset(assigned)
        new = now - self.owned
        for partition in new:
            # a position of any kind keeps the client from asking for a reset; the pause keeps it from fetching
            self._consumer.pause(partition)
            self._consumer.seek(partition, 0)
        self.unplaced = (self.unplaced & now) | new
        self.owned = now
        self.membership = self._consumer.group_metadata()

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """Forget all: another member may have had them in between, so they are new when they come back."""
        gone = frozenset(lost)
        self.owned -= gone
        self.unplaced -= gone


class KafkaGroupConsumer:
    """A member of a consumer group that reads committed records only (the port's ``Consumer``)."""

    def __init__(
        self,
        consumer: KafkaConsumer,
        group: str,
        topics: Sequence[str],
        start: Start,
        open_admin: Callable[[], KafkaAdminClient],
    ) -> None:
        self._consumer = consumer
        self._open_admin = open_admin
        self._admin: KafkaAdminClient | None = None
        self._group = group
        self._start = start
        self._topics = tuple(topics)
        self._paused: frozenset[Partition] = frozenset()
        self._heard = time.monotonic()
        self._listener = _Listener(consumer)
        read_any_header_name()
        consumer.subscribe(topics=list(topics), listener=self._listener)
        for topic in topics:
            # Know the topics before the first join: the library joins without, gets nothing, and now and then takes
            # the metadata that it was fetching meanwhile for an answer about them, to wait for their next refresh.
            consumer.partitions_for_topic(topic)

    def poll(self, timeout_seconds: float, max_records: int) -> list[Record]:
        """Join, heartbeat and fetch; records of one partition are in offset order."""
        self._place()
        self._unpark()
        with translated():
            batches = self._consumer.poll(timeout_ms=math.ceil(timeout_seconds * 1000), max_records=max_records)
        self._paused &= self.assignment()
        self._place()
        if batches:
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard >= PROBE_SECONDS:
            self._probe()
        return [_record(raw) for batch in batches.values() for raw in batch]

    def assignment(self) -> frozenset[Partition]:
        """Return the partitions held now."""
        return frozenset(ours(tp) for tp in self._listener.owned)

    def seek(self, partition: Partition, offset: int) -> None:
        """Move the position; does nothing for a partition that is not held."""
        tp = theirs(partition)
        if tp in self._listener.owned:
            with translated():
                self._consumer.seek(tp, offset)

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Stop fetching from these partitions; does nothing for those not held."""
        held = frozenset(partitions) & self.assignment()
        self._paused |= held
        with translated():
            self._consumer.pause(*map(theirs, held))

    def resume(self, partitions: Iterable[Partition]) -> None:
        """Fetch from these partitions again; does nothing for those not held."""
        held = frozenset(partitions) & self.assignment()
        self._paused -= held
        with translated():
            self._consumer.resume(*(tp for tp in map(theirs, held) if tp not in self._listener.unplaced))

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        """Return the group's committed next offsets, waiting for a transaction that is about to move them."""
        timeout = self._consumer.config["request_timeout_ms"]
        with translated():
            return {p: self._consumer.committed(theirs(p), timeout_ms=timeout) for p in partitions}

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return the first offset that the broker still holds."""
        return self._offsets(self._consumer.beginning_offsets, partitions)

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return the last stable offset: the consumer's isolation level makes the broker answer with it."""
        return self._offsets(self._consumer.end_offsets, partitions)

    def peek_end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Ask once, over a connection of its own.

        A broker answers a connection's requests one after the other, and a fetch waits there for half a second
        where nothing new comes.
        """
        asked = list(partitions)
        if not asked:
            return {}
        if self._admin is None:
            self._admin = self._open_admin()
        return ends(self._admin, asked, IsolationLevel.READ_COMMITTED)

    def group_metadata(self) -> GroupMetadata:
        """Return the membership under which the present assignment was given; generation -1 before the first."""
        raw = self._listener.membership
        if raw is None:
            return GroupMetadata(self._group, -1, "")
        return GroupMetadata(self._group, raw.generation_id, raw.member_id, raw)

    def close(self) -> None:
        """Leave the group and release the connection."""
        with translated():
            try:
                if self._admin is not None:
                    self._admin.close()
            finally:
                self._consumer.close(autocommit=False, timeout_ms=CLOSE_MILLISECONDS)

    def _unpark(self) -> None:
        """Let the library deliver what it had fetched of a partition before that was paused.

        It parks such records, and takes them up after the resume only where its slot for the records in hand is
        ``None``; but the slot keeps the last, exhausted ones, so the partition would stay silent for ever.
        """
        fetcher = self._consumer._fetcher  # noqa: SLF001 - there is no public way in
        if not fetcher._next_partition_records:  # noqa: SLF001
            fetcher._next_partition_records = None  # noqa: SLF001

    def _probe(self) -> None:
        """Raise ``TransientError`` unless the broker answers."""
        asked = next(iter(self._listener.owned), TopicPartition(self._topics[0], 0))
        with translated():
            if asked in self._listener.owned or self._consumer.partitions_for_topic(asked.topic):
                self._consumer.end_offsets([asked], timeout_ms=PROBE_MILLISECONDS)
        self._heard = time.monotonic()

    def _place(self) -> None:
        """Position what was newly assigned, then let it be fetched."""
        unplaced = self._listener.unplaced
        if not unplaced:
            return
        new = frozenset(ours(tp) for tp in unplaced)
        positions = self._start(new, self.committed(sorted(new)))
        with translated():
            for partition in sorted(new):
                self._consumer.seek(theirs(partition), positions[partition])
            self._listener.unplaced -= unplaced
            self._consumer.resume(*map(theirs, new - self._paused))
        logger.info("group %s: placed %d new partitions", self._group, len(new))

    def _offsets(
        self,
        ask: Callable[[list[TopicPartition]], dict[TopicPartition, int]],
        partitions: Iterable[Partition],
    ) -> dict[Partition, int]:
        asked = [theirs(partition) for partition in partitions]
        if not asked:
            return {}
        with translated():
            return {ours(tp): offset for tp, offset in ask(asked).items()}


def _record(raw: Any) -> Record:
    partition = Partition(raw.topic, raw.partition)
    headers: Headers = tuple((name, value or b"") for name, value in raw.headers)
    return Record(
        partition,
        raw.offset,
        raw.timestamp,
        raw.key,
        raw.value,
        headers,
    )


def ends(client: KafkaAdminClient, partitions: Iterable[Partition], isolation: IsolationLevel) -> dict[Partition, int]:
    """Say where partitions end.

    Args:
        client: Asked once.
        partitions: Whose ends.
        isolation: Of the readers they are for.

    Returns:
        Next offsets by partition.

    Raises:
        TransientError: A partition has no leader, or it is not known, at this moment.
    """
    asked = {theirs(partition): OffsetSpec.LATEST for partition in partitions}
    with translated():
        found = client.list_partition_offsets(asked, isolation_level=isolation) if asked else {}
    return {ours(tp): int(end.offset) for tp, end in found.items()}


def ours(tp: TopicPartition) -> Partition:
    """Return the library's partition as ours."""
    return Partition(tp.topic, tp.partition)


def theirs(partition: Partition) -> TopicPartition:
    """Return our partition as the library's."""
    return TopicPartition(partition.topic, partition.index)
