"""The ingest worker: behaviour events into the history store, each once; predictions into its answers.

Invariant: one store transaction holds a poll batch's events, dead letters and next offsets; only after it is
anything sent. Offsets live in the store, never in Kafka's group. What a record is, is decided in ``sorting``.
"""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ingest.gauges import StoreGauges
from ingest.offsets import Log, Offsets
from ingest.relay import Relay
from ingest.sorting import Accepted, Sorted, Sorter
from oppu.clock import Clock, next_look
from oppu.dead_letters import DeadLetterShare
from oppu.effects import Effect, Steps
from oppu.embedder import Embedder
from oppu.errors import FatalError, OppuError, Reason, TransientError
from oppu.kafka.port import Admin, Broker, Consumer
from oppu.metrics import Metrics
from oppu.settings import Settings
from oppu.store.port import PURGED_AT_ONCE, HistoryStore
from oppu.store.records import IngestBatch, IngestResult, NewEvent, NewRefusal, OffsetAdvance
from oppu.tasks import Tasks
from oppu.values import EventId, Partition, Record, RequestId, UserId
from oppu.wire import Topics, content_digest
from oppu.worker import StepOutcome

logger = logging.getLogger(__name__)

RELAY_EVERY_SECONDS = 1.0
"""Others put rows into the outbox as well; a batch's own dead letters are sent right after its write."""

GAUGES_EVERY_SECONDS = 5.0
PURGE_EVERY_SECONDS = 3600.0


class Outcome(StrEnum):
    """What became of a record, as a metric's label."""

    WRITTEN = "written"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    ERASED = "erased"  # older than its user's erasure
    REFUSED = "refused"
    ANSWER = "answer"  # a prediction, kept to be matched
    SKIPPED = "skipped"  # a prediction of no use here


class IngestWorker:
    """Feeds the history store. See :class:`oppu.worker.Worker` for what the loop expects of it."""

    def __init__(  # noqa: PLR0913 - the composition root names every port once
        self,
        broker: Broker,
        store: HistoryStore,
        embedder: Embedder,
        tasks: Tasks,
        settings: Settings,
        metrics: Metrics,
        *,
        clock: Clock,
        cluster_id: str | None = None,
    ) -> None:
        self._broker, self._store, self._embedder = broker, store, embedder
        self._settings, self._metrics, self._clock = settings, metrics, clock
        self._cluster_id = cluster_id
        topics = Topics(settings.kafka.topic_prefix)
        self._topics = (topics.events, topics.predictions)
        self._client_id = f"{settings.kafka.group_prefix}ingest"
        self._sorter = Sorter(tasks, settings)
        self._share = DeadLetterShare(settings.ingest)
        self._noted: dict[Partition, int] = {}
        self._offsets = Offsets()
        self._relay = Relay(broker, store, client_id=self._client_id)
        self._gauges = StoreGauges(store, metrics)
        self._relay_at = self._gauges_at = self._purge_at = clock.monotonic()
        self._consumer: Consumer | None = None
        self._admin: Admin | None = None

    @property
    def name(self) -> str:
        """Short name for logs and metrics."""
        return "ingest"

    @property
    def consumer(self) -> Consumer:
        """The open consumer."""
        if self._consumer is None:
            raise FatalError("ingest: used before open()")
        return self._consumer

    def open(self) -> None:
        """Open the clients.

        Raises:
            TransientError: The broker cannot be reached, or a topic does not exist yet.
        """
        try:
            self._open()
        except TransientError:
            self._close_quietly()
            raise

    def start(
        self, assigned: frozenset[Partition], committed: Mapping[Partition, int | None]
    ) -> Mapping[Partition, int]:
        """Begin where the store says; what the group committed is not looked at.

        Args:
            assigned: Newly assigned partitions.
            committed: Not used.

        Returns:
            The first offset to read in each.
        """
        return self._place(assigned)

    def step(self, records: Sequence[Record], now: datetime) -> Steps[StepOutcome]:
        """Write one poll's records, then send what waits in the outbox.

        ``DeadLetterLimitReached`` leaves it before anything of the poll is written. All records count as handled.
        """
        self._offsets.keep_only(self.consumer.assignment())
        fresh = self._offsets.fresh(records)
        batch = self._sorter.sort(fresh, now)
        self._check_share(fresh, batch)
        yield from self._write(fresh, batch, now)
        yield from self._upkeep(now, urgent=bool(batch.refused))
        return StepOutcome(len(records), more=self._clock.monotonic() >= min(self._relay_at, self._purge_at))

    def poison(self, record: Record, now: datetime) -> Steps[StepOutcome]:
        """Set aside one record that killed the process, without looking into it."""
        fresh = self._offsets.fresh([record])
        if fresh:
            refused = self._sorter.refuse(record, Reason.WORKER_CRASHED, "this record ended the worker's process")
            yield from self._write(fresh, Sorted(refused=[refused]), now)
        return StepOutcome(1)

    def recover(self, error: Exception) -> Steps[None]:
        """Reread the durable offsets and go back to them, with a new producer where the last send failed."""
        yield Effect("producer.reopen", self._relay.reopen_if_suspect)
        for partition, offset in sorted(self._place(self.consumer.assignment()).items()):
            where = f"{partition.topic}-{partition.index}:{offset}"
            yield Effect("consumer.seek", partial(self.consumer.seek, partition, offset), where)

    def close(self) -> None:
        """Leave the group and release every client."""
        consumer, self._consumer = self._consumer, None
        admin, self._admin = self._admin, None
        try:
            if consumer is not None:
                consumer.close()
        finally:
            try:
                self._relay.close()
            finally:
                if admin is not None:
                    admin.close()

    # --- clients

    def _open(self) -> None:
        if self._admin is None:
            self._admin = self._broker.admin()
        if self._cluster_id is None:
            self._cluster_id = self._admin.cluster_id()
        missing = sorted(set(self._topics) - self._admin.topic_ids(self._topics).keys())
        if missing:
            raise TransientError(f"missing topics, waiting for them (oppu topics create): {', '.join(missing)}")
        self._relay.open()
        if self._consumer is None:
            self._consumer = self._broker.consumer(self._client_id, self._topics, self.start, client_id=self._client_id)

    def _close_quietly(self) -> None:
        try:
            self.close()
        except TransientError as error:
            logger.debug("ingest: a client did not close: %s", error)

    def _place(self, partitions: frozenset[Partition]) -> dict[Partition, int]:
        if self._admin is None or self._cluster_id is None:
            raise FatalError("ingest: used before open()")
        stored = self._store.offsets(self._cluster_id, self._topics)  # before the ends, which only grow
        ids = self._admin.topic_ids(self._topics)
        beginnings = self.consumer.beginning_offsets(partitions)
        ends = self.consumer.end_offsets(partitions)
        logs = {p: Log(beginnings[p], ends[p], ids.get(p.topic)) for p in partitions}
        return self._offsets.place(stored, logs, self._clock.monotonic())

    # --- writing

    def _check_share(self, fresh: Sequence[Record], batch: Sorted) -> None:
        """Let the limit see every record once, however often a failing write brings it back."""
        refused = {(item.record.partition, item.record.offset) for item in batch.refused}
        for record in fresh:
            if record.offset >= self._noted.get(record.partition, 0):
                self._noted[record.partition] = record.offset + 1
                self._share.note(record, refused=(record.partition, record.offset) in refused)

    def _write(self, fresh: Sequence[Record], batch: Sorted, now: datetime) -> Steps[None]:
        advances = self._offsets.advances(fresh)
        if not advances or self._cluster_id is None:
            return
        write = IngestBatch(
            self._cluster_id,
            advances,
            self._events(batch.accepted),
            tuple(batch.answers),
            tuple(NewRefusal(item.letter, item.record.partition, item.record.offset) for item in batch.refused),
            now=now,
        )
        detail = f"{len(write.events)} events, {len(write.answers)} answers, {len(write.refused)} dead letters"
        result: IngestResult = yield Effect("store.write_events", partial(self._store.write_events, write), detail)
        self._count(batch, result, advances)

    def _events(self, accepted: Sequence[Accepted]) -> tuple[NewEvent, ...]:
        """Embed a batch in one call and return the events to write."""
        if not accepted:
            return ()
        started = self._clock.monotonic()
        vectors = self._embedded([item.event.input for item in accepted])
        self._metrics.embed.observe(self._clock.monotonic() - started)
        return tuple(
            NewEvent(
                user_id=UserId(item.event.user_id),
                event_id=EventId(item.event.event_id),
                task=item.event.task,
                occurred_at=item.event.occurred_at,
                recorded_at=item.recorded_at,
                input=item.event.input,
                output=item.event.output,
                choices=item.event.choices,
                in_reply_to=None if item.event.in_reply_to is None else RequestId(item.event.in_reply_to),
                digest=content_digest(item.event),
                embedding=vector.tobytes(),
                embedder=self._embedder.fingerprint,
                partition=item.record.partition,
                offset=item.record.offset,
                conflict=self._sorter.conflict(item.record),
            )
            for item, vector in zip(accepted, vectors, strict=True)
        )

    def _embedded(self, texts: Sequence[str]) -> NDArray[np.float16]:
        """Embed texts; what embeds nothing any more is no text's fault, and ends the process without a mark on it."""
        try:
            return self._embedder.embed(texts).astype("<f2")
        except OppuError:
            raise
        except Exception as error:  # whatever a model may raise
            try:
                self._embedder.embed(["words"])
            except Exception as again:
                raise FatalError(f"embedder: fails on any text: {type(error).__name__}: {error}") from again
            raise

    def _count(self, batch: Sorted, result: IngestResult, advances: Sequence[OffsetAdvance]) -> None:
        """Count what is durable, once."""
        self._metrics.ingest_gap.inc(self._offsets.written(advances))
        numbers = {
            Outcome.WRITTEN: result.written,
            Outcome.DUPLICATE: result.duplicates,
            Outcome.CONFLICT: result.conflicts,
            Outcome.ERASED: result.erased,
            Outcome.REFUSED: len(result.set_aside),
            Outcome.ANSWER: result.kept,
            Outcome.SKIPPED: batch.skipped,
        }
        for outcome, number in numbers.items():
            if number:
                self._metrics.ingest_records.labels(outcome).inc(number)
        kept = {(item.partition, item.offset) for item in result.set_aside}
        for refused in batch.refused:
            if (refused.record.partition, refused.record.offset) in kept:
                self._metrics.dead_letters.labels(refused.reason).inc()
        if result.conflicts:
            self._metrics.dead_letters.labels(Reason.DUPLICATE_CONFLICT).inc(result.conflicts)
            self._relay_at = self._clock.monotonic()
        if result.written:
            written_at = self._clock.now()
            for item in batch.accepted:
                self._metrics.retrievable.observe(max(0.0, (written_at - item.recorded_at).total_seconds()))

    # --- upkeep

    def _relays(self) -> bool:
        """Say whether the outbox is ours to send: two workers would overtake each other, and a head his tombstone."""
        return Partition(self._topics[0], 0) in self.consumer.assignment()

    def _upkeep(self, now: datetime, *, urgent: bool) -> Steps[None]:
        at = self._clock.monotonic()
        if urgent or at >= self._relay_at:
            more = (yield from self._relay.run()) if self._relays() else False
            self._relay_at = at if more else at + RELAY_EVERY_SECONDS
        if at >= self._gauges_at:
            began = self._clock.monotonic()
            self._gauges.refresh()
            self._gauges_at = next_look(began, self._clock.monotonic(), every_seconds=GAUGES_EVERY_SECONDS)
        if at >= self._purge_at:
            before = now - timedelta(seconds=self._settings.store.answers_retention_seconds)
            gone: int = yield Effect("store.purge_answers", partial(self._store.purge_answers, before=before))
            self._purge_at = at + (PURGE_EVERY_SECONDS if gone < PURGED_AT_ONCE else 0.0)
