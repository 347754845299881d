"""Decide what may be asked of the model: parse, check, judge deadlines, and wait for history where asked to.

Pure but for the gate's memory of when a record was first held. Invariant: a record is an ask (it can be
answered), a refusal to its sender, or a refusal to nobody (a dead letter), and never two of them.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from oppu.errors import InvalidRecord, Reason
from oppu.parsing import addressee, parse_request, user_key
from oppu.settings import Settings
from oppu.store.records import StoredOffset
from oppu.tasks import Task, Tasks
from oppu.values import Partition, Record, UserId
from oppu.wire import PredictionRequest

DEADLINE_MARGIN_SECONDS = 0.1
"""Waiting for history ends this long before the deadline: a degraded answer in time beats a late one."""

_MESSAGE_CHARACTERS = 1_000
"""A list of ten thousand wrong choices must not make an error answer larger than its request."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that can be answered.

    Attributes:
        record: Where it came from.
        request: What is asked.
        task: Its task.
        choices: The allowed outputs; empty for texts.
        deadline_ms: When it is late, in milliseconds since the epoch; ``None`` = never.
        behind: The history it asked to see had not arrived in time.
    """

    record: Record
    request: PredictionRequest = field(repr=False)
    task: Task
    choices: tuple[str, ...] = field(repr=False)
    deadline_ms: float | None
    behind: bool = False

    @property
    def user_id(self) -> UserId:
        """The user who asks, and the only one whose data may answer."""
        return user_key(self.request.user_id)

    def late(self, now: datetime) -> bool:
        """Say whether its deadline has passed."""
        return self.deadline_ms is not None and now.timestamp() * 1000 >= self.deadline_ms


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record that cannot be answered as asked. ``to`` is (request_id, user_id), or ``None``: a dead letter."""

    record: Record
    reason: Reason
    message: str
    to: tuple[str, str] | None = field(repr=False)


def admit(record: Record, tasks: Tasks, settings: Settings) -> Ask | Refusal:
    """Parse and check one record.

    Args:
        record: As read.
        tasks: The known tasks.
        settings: Limits and the default deadline.

    Returns:
        The ask, or why there is none.
    """
    try:
        request = parse_request(record, limits=settings.limits)
        task = tasks.require(request.task)
        choices = task.allowed(request.choices)
        _check_ratings(task, choices)
    except InvalidRecord as error:
        return refuse(record, error.reason, error.message)
    deadline = _deadline_ms(record, request, settings.inference.default_deadline_seconds)
    return Ask(record, request, task, choices, deadline)


def refuse(record: Record, reason: Reason, message: str) -> Refusal:
    """Refuse a record: to the request and user that it names, where it does."""
    text = message.encode("utf-8", "replace").decode()
    if len(text) > _MESSAGE_CHARACTERS:
        text = text[: _MESSAGE_CHARACTERS - 1] + "…"
    return Refusal(record, reason, text, addressee(record))


class Verdict(StrEnum):
    """What to do with a request that asks to see an event of its own."""

    READY = "ready"
    HOLD = "hold"
    BEHIND = "behind"


class HistoryGate:
    """Read-your-writes on demand: holds a request until ingest has passed the coordinates it names.

    Time is the caller's monotonic clock, so that a wall clock that steps back cannot hold a partition for long.
    """

    def __init__(self, wait_seconds: float) -> None:
        self._wait_seconds = wait_seconds
        self._first_held: dict[tuple[Partition, int], float] = {}

    def judge(
        self, ask: Ask, reached: Mapping[Partition, StoredOffset], events: str, *, now: datetime, at: float
    ) -> Verdict:
        """Judge one ask; those without ``after`` are ready.

        Args:
            ask: The request.
            reached: Where ingest stands.
            events: Name of the events topic.
            now: Wall-clock time, for its deadline.
            at: Monotonic seconds.

        Returns:
            Whether to answer, to hold, or to answer without.
        """
        after = ask.request.after
        if after is None:
            return Verdict.READY
        stored = reached.get(Partition(events, after.partition))
        if stored is not None and stored.next_offset > after.offset:
            return Verdict.READY
        waited = at - self._first_held.get(_key(ask.record), at)
        if waited >= self._wait_seconds:
            return Verdict.BEHIND
        margin_ms = DEADLINE_MARGIN_SECONDS * 1000
        if ask.deadline_ms is not None and now.timestamp() * 1000 + margin_ms >= ask.deadline_ms:
            return Verdict.BEHIND
        return Verdict.HOLD

    def hold(self, records: Iterable[Record], at: float) -> None:
        """Remember when each held record was first held, those behind a waiting one too.

        So a partition waits ``wait_seconds`` in all for the requests of one poll, not for each in turn.
        """
        for record in records:
            self._first_held.setdefault(_key(record), at)

    def release(self, records: Iterable[Record]) -> None:
        """Forget records that are finished."""
        for record in records:
            self._first_held.pop(_key(record), None)

    def keep_only(self, partitions: Collection[Partition]) -> None:
        """Forget records of partitions that are another worker's now."""
        self._first_held = {key: at for key, at in self._first_held.items() if key[0] in partitions}


def _key(record: Record) -> tuple[Partition, int]:
    return (record.partition, record.offset)


def _deadline_ms(record: Record, request: PredictionRequest, default_seconds: float) -> float | None:
    if request.deadline is not None:
        return request.deadline.timestamp() * 1000
    if default_seconds == 0 or record.timestamp_ms < 0:  # Kafka's -1: the record carries no time
        return None
    return record.timestamp_ms + default_seconds * 1000


def _check_ratings(task: Task, choices: tuple[str, ...]) -> None:
    if task.kind != "rating":
        return
    for index, choice in enumerate(choices):
        try:
            number = float(choice)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InvalidRecord(Reason.INVALID_RECORD, f"choices.{index}: task {task.name} expects numbers, as texts")
