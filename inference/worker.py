"""The inference worker: a poll's requests in, their answers out in one Kafka transaction with their offsets.

Invariants: every readable request gets exactly one answer under read_committed, any other record exactly one dead
letter; a transaction is opened only when all of a step's answers are computed; after an abort every partition
stands at its committed offset again. What an answer says is the engine's business.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from functools import partial

from prometheus_client import Counter as CounterMetric

from inference.adapters import AdapterShelf
from inference.admission import Ask, HistoryGate, Refusal, Verdict, admit, refuse
from inference.answers import Answer, AnswerWriter
from inference.blending import DEFAULT as DEFAULT_TEXT
from inference.blending import TextFusion
from inference.engine import Engine, Parts, late_answer, waited_seconds
from inference.evidence import HistoryRetriever
from oppu.clock import Clock
from oppu.effects import Effect, Steps
from oppu.errors import FatalError, OffsetOutOfRange, ProducerFenced, Reason, TransientError
from oppu.fusion import DEFAULT, Fusion
from oppu.kafka.port import Broker, Consumer, GroupMetadata, TransactionalProducer
from oppu.lm.port import AdapterSource, LanguageModel
from oppu.metrics import Metrics
from oppu.settings import Settings
from oppu.store.port import HistoryStore
from oppu.store.records import StoredOffset
from oppu.tasks import Tasks
from oppu.values import Partition, Record
from oppu.wire import Topics
from oppu.worker import StepOutcome

logger = logging.getLogger(__name__)

HOLD_RETRY_SECONDS = 0.02
"""How soon a request that waits for its history is offered again."""


class Transaction(StrEnum):
    """Where the producer's transaction stands, which decides how to leave it after an error."""

    NONE = "none"
    OPEN = "open"
    COMMITTING = "committing"


@dataclass(slots=True)
class _Plan:
    """A poll's records, sorted out, in arrival order: ``admitted`` to be finished now, ``held`` for later."""

    admitted: list[Ask | Refusal]
    held: list[Record]


class InferenceWorker:
    """Answers prediction requests. See :class:`oppu.worker.Worker` for what the loop expects of it."""

    def __init__(  # noqa: PLR0913 - the composition root names every port once
        self,
        broker: Broker,
        store: HistoryStore,
        retriever: HistoryRetriever,
        model: LanguageModel,
        adapters: AdapterSource,
        tasks: Tasks,
        settings: Settings,
        metrics: Metrics,
        *,
        clock: Clock,
        cluster_id: str,
        fusion: Fusion = DEFAULT,
        text_fusion: TextFusion = DEFAULT_TEXT,
    ) -> None:
        self._broker, self._store, self._tasks, self._settings = broker, store, tasks, settings
        self._metrics, self._clock, self._cluster_id = metrics, clock, cluster_id
        self._topics = Topics(settings.kafka.topic_prefix)
        self._writer = AnswerWriter(settings)
        shelf = AdapterShelf(
            adapters, model, store, metrics, clock, wait_seconds=settings.inference.adapter_wait_seconds
        )
        parts = Parts(store, retriever, model, shelf)
        self._engine = Engine(parts, self._writer, settings, metrics, clock, fusion=fusion, text_fusion=text_fusion)
        self._gate = HistoryGate(settings.inference.history_wait_seconds)
        self._consumer: Consumer | None = None
        self._producer: TransactionalProducer | None = None
        self._transaction = Transaction.NONE
        self._reopen_due = False
        self._next: dict[Partition, int] = {}
        self._parsed: dict[Record, Ask | Refusal] = {}

    @property
    def name(self) -> str:
        """Short name for logs and metrics."""
        return "inference"

    @property
    def consumer(self) -> Consumer:
        """The open consumer."""
        if self._consumer is None:
            raise FatalError("inference: used before open()")
        return self._consumer

    def open(self) -> None:
        """Open the producer, then the consumer.

        In this order a predecessor's transaction is over before the group's committed offsets are read.
        """
        kafka = self._settings.kafka
        group = f"{kafka.group_prefix}inference"
        identity = f"{group}-{self._settings.inference.slot}"
        if self._producer is None:
            self._producer = self._broker.transactional_producer(identity)
        if self._consumer is None:
            self._consumer = self._broker.consumer(group, [self._topics.requests], self.start, client_id=identity)
        self._transaction = Transaction.NONE

    def start(
        self, assigned: frozenset[Partition], committed: Mapping[Partition, int | None]
    ) -> Mapping[Partition, int]:
        """Begin at the committed offset, else at the first record there is.

        A committed offset beyond the end is kept: right after a broker's restart the end may lag behind. Where it
        is really gone the next poll says so, and ``recover`` goes back to the beginning.
        """
        beginnings = self.consumer.beginning_offsets(assigned)
        positions = {p: _begin(p, committed.get(p), beginnings[p]) for p in assigned}
        self._next.update(positions)
        return positions

    def step(self, records: Sequence[Record], now: datetime) -> Steps[StepOutcome]:
        """Answer one poll's records; those that wait for their history, or for time, are handed back as held.

        The effects are one transaction: begin, send, send_offsets, commit.
        """
        fresh = self._fresh(records)
        if not fresh:
            self._parsed.clear()
            return StepOutcome(0)
        group = self.consumer.group_metadata()
        plan = self._plan(fresh, now)
        waiting = bool(plan.held)
        answers = self._answer(plan.admitted, now)
        done = {(a.record.partition, a.record.offset) for a in answers}
        held = tuple(r for r in fresh if (r.partition, r.offset) not in done)
        self._gate.keep_only(self.consumer.assignment())
        self._gate.hold(held, self._clock.monotonic())
        self._parsed = {record: self._parsed[record] for record in held if record in self._parsed}
        if answers:
            yield from self._publish(answers, group)
        return StepOutcome(len(answers), held, HOLD_RETRY_SECONDS if waiting else 0.0)

    def poison(self, record: Record, now: datetime) -> Steps[StepOutcome]:
        """Answer, or set aside, one record that killed the process; nothing, where it was finished already."""
        if not self._fresh([record]):
            return StepOutcome(0)
        refusal = refuse(record, Reason.WORKER_CRASHED, "this record ended the worker's process")
        yield from self._publish([self._writer.refusal(refusal)], self.consumer.group_metadata())
        return StepOutcome(1)

    def recover(self, error: Exception) -> Steps[None]:
        """Leave the transaction and go back to the committed offsets; start afresh where fenced.

        It can be repeated until it succeeds: what it still owes does not hang on the error it is called with.
        """
        self._forget()
        if isinstance(error, ProducerFenced):
            self._reopen_due = True
        if not self._reopen_due:
            try:
                yield from self._leave_transaction()
            except ProducerFenced:
                self._reopen_due = True
        if self._reopen_due:
            yield Effect("clients.reopen", self._reopen)
            self._reopen_due = False
            return
        yield from self._seek_back(error)

    def close(self) -> None:
        """Leave the group and release both clients; an open transaction is aborted."""
        self._forget()
        producer, consumer = self._producer, self._consumer
        self._producer = self._consumer = None
        self._next.clear()
        try:
            if producer is not None:
                _close_quietly(producer)
        finally:
            if consumer is not None:
                consumer.close()

    def _forget(self) -> None:
        """Drop what was read and begun for records that may not come again."""
        self._parsed.clear()
        self._engine.forget()

    # --- sorting out

    def _fresh(self, records: Iterable[Record]) -> list[Record]:
        """Drop what is no longer ours and what was already finished: no record is answered twice from here."""
        owned = self.consumer.assignment()
        expected = dict(self._next)
        fresh: list[Record] = []
        for record in records:
            if record.partition in owned and record.offset >= expected.get(record.partition, 0):
                expected[record.partition] = record.offset + 1
                fresh.append(record)
        return fresh

    def _plan(self, records: Sequence[Record], now: datetime) -> _Plan:
        plan, blocked = _Plan([], []), set[Partition]()
        reached: Mapping[Partition, StoredOffset] | None = None
        at = self._clock.monotonic()
        for record in records:
            if record.partition in blocked:
                plan.held.append(record)
                continue
            item = self._parsed.get(record) or admit(record, self._tasks, self._settings)
            self._parsed[record] = item
            if isinstance(item, Ask) and item.request.after is not None and not item.late(now):
                if reached is None:  # read once, and before the users' states
                    reached = self._store.offsets(self._cluster_id, [self._topics.events])
                verdict = self._gate.judge(item, reached, self._topics.events, now=now, at=at)
                if verdict is Verdict.HOLD:
                    blocked.add(record.partition)
                    plan.held.append(record)
                    continue
                item = replace(item, behind=verdict is Verdict.BEHIND)
            plan.admitted.append(item)
        return plan

    def _answer(self, admitted: Sequence[Ask | Refusal], now: datetime) -> list[Answer]:
        """Answer what time allows: in each partition a gapless beginning of what was admitted."""
        asks = [item for item in admitted if isinstance(item, Ask) and not item.late(now)]
        computed = {(a.record.partition, a.record.offset): a for a in self._engine.answer(asks, now)}
        stopped: set[Partition] = set()
        answers: list[Answer] = []
        for item in admitted:
            if item.record.partition in stopped:
                continue
            if isinstance(item, Refusal):
                answers.append(self._writer.refusal(item))
            elif item.late(now):
                answers.append(late_answer(self._writer, item))
            elif (answer := computed.get((item.record.partition, item.record.offset))) is not None:
                answers.append(answer)
            else:
                stopped.add(item.record.partition)
        return answers

    # --- effects

    def _publish(self, answers: Sequence[Answer], group: GroupMetadata) -> Steps[None]:
        producer = self._open_producer()
        offsets = _next_offsets(answers)
        outgoing = [answer.out for answer in answers]
        began = self._clock.monotonic()
        self._transaction = Transaction.OPEN
        yield Effect("producer.begin", producer.begin)
        yield Effect("producer.send", partial(producer.send, outgoing), f"{len(outgoing)} records")
        yield Effect("producer.send_offsets", partial(producer.send_offsets, offsets, group), _describe(offsets))
        self._transaction = Transaction.COMMITTING
        yield Effect("producer.commit", producer.commit)
        self._transaction = Transaction.NONE
        self._next.update(offsets)
        self._gate.release(answer.record for answer in answers)
        self._metrics.inference_stage.labels("publish").observe(self._clock.monotonic() - began)
        self._count(answers)

    def _leave_transaction(self) -> Steps[None]:
        """Abort; where a commit's outcome is unknown, a new producer makes the broker finish it one way first."""
        if self._transaction is Transaction.COMMITTING:
            yield Effect("producer.reopen", self._reopen_producer)
        elif self._transaction is Transaction.OPEN:
            yield Effect("producer.abort", self._open_producer().abort)
        self._transaction = Transaction.NONE

    def _seek_back(self, error: Exception) -> Steps[None]:
        consumer = self.consumer
        assigned = consumer.assignment()
        positions = dict(self.start(assigned, consumer.committed(assigned)))
        if isinstance(error, OffsetOutOfRange):
            self._leave_lost_positions(error, positions)
        for partition, offset in sorted(positions.items()):
            where = f"{partition.topic}-{partition.index}:{offset}"
            yield Effect("consumer.seek", partial(consumer.seek, partition, offset), where)

    def _leave_lost_positions(self, error: OffsetOutOfRange, positions: dict[Partition, int]) -> None:
        lost = [p for p in positions if (p.topic, p.index) in error.offsets]
        beginnings, ends = self.consumer.beginning_offsets(lost), self.consumer.end_offsets(lost)
        for partition in lost:
            if positions[partition] > ends[partition]:
                logger.error(
                    "%s-%d: committed offset %d lies beyond the end %d: the topic was recreated or cut short; "
                    "beginning at %d",
                    partition.topic,
                    partition.index,
                    positions[partition],
                    ends[partition],
                    beginnings[partition],
                )
                positions[partition] = beginnings[partition]
        self._next.update(positions)

    def _reopen_producer(self) -> None:
        """Open the new one first: it fences the old, whose close then cannot harm."""
        old, self._producer = self._producer, None
        try:
            self.open()
        finally:
            if self._producer is None:
                self._producer = old
            elif old is not None:
                _close_quietly(old)

    def _reopen(self) -> None:
        """Rejoin with new clients; until they are there the old consumer stays, so that the loop can poll it."""
        self._reopen_producer()
        old, self._consumer = self._consumer, None
        self._next.clear()
        try:
            self.open()
        finally:
            if self._consumer is None:
                self._consumer = old
            elif old is not None:
                _close_quietly(old)

    def _open_producer(self) -> TransactionalProducer:
        if self._producer is None:
            raise FatalError("inference: used before open()")
        return self._producer

    def _count(self, answers: Sequence[Answer]) -> None:
        """Count what is committed, once."""
        now, metrics = self._clock.now(), self._metrics
        counts = Counter[tuple[CounterMetric, tuple[str | None, ...]]]()
        for answer in answers:
            if answer.status == "dead_letter":
                counts[metrics.dead_letters, (answer.code,)] += 1
                continue
            counts[metrics.predictions, (answer.task, answer.status)] += 1
            if answer.code is not None:
                counts[metrics.errors, (answer.code,)] += 1
            counts.update((metrics.degraded, (fault.part, fault.reason)) for fault in answer.degraded)
            metrics.answer_latency.observe(waited_seconds(answer.record, now))
        for (counter, labels), number in counts.items():
            counter.labels(*labels).inc(number)


def _begin(partition: Partition, committed: int | None, beginning: int) -> int:
    if committed is None:
        return beginning
    if committed < beginning:
        logger.warning(
            "%s-%d: %d requests were deleted by the broker before they were answered",
            partition.topic,
            partition.index,
            beginning - committed,
        )
        return beginning
    return committed


def _next_offsets(answers: Iterable[Answer]) -> dict[Partition, int]:
    offsets: dict[Partition, int] = {}
    for answer in answers:
        partition = answer.record.partition
        offsets[partition] = max(offsets.get(partition, 0), answer.record.offset + 1)
    return offsets


def _describe(offsets: Mapping[Partition, int]) -> str:
    return " ".join(f"{p.topic}-{p.index}:{offset}" for p, offset in sorted(offsets.items()))


def _close_quietly(client: TransactionalProducer | Consumer) -> None:
    try:
        client.close()
    except TransientError as error:
        logger.info("closing a client that is given up: %s", error)
