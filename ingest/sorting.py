"""What each record of a poll batch is: an event to write, an answer to keep, or something refused.

Pure. Invariant: every record comes out exactly once; a refused event carries its dead letter, a prediction that
cannot be used is only counted, since it is our own and nobody waits for it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from oppu.dead_letters import dead_letter
from oppu.errors import InvalidRecord, Reason
from oppu.kafka.topics import largest_record_bytes
from oppu.parsing import parse_event, parse_prediction
from oppu.settings import Settings
from oppu.store.records import NewAnswer
from oppu.tasks import Tasks
from oppu.values import OutRecord, Partition, Record, RequestId, UserId
from oppu.wire import BehaviorEvent, Prediction, Topics

logger = logging.getLogger(__name__)

NO_ARM = "none"
"""The arm of an answer to which nothing personal contributed."""

IDENTIFIER_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Accepted:
    """A valid event and where it came from."""

    record: Record
    event: BehaviorEvent = field(repr=False)
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class Refused:
    """A record that is set aside, with its dead letter."""

    record: Record
    reason: Reason
    letter: OutRecord


@dataclass(slots=True)
class Sorted:
    """A poll batch by kind; ``skipped`` counts predictions that are of no use here."""

    accepted: list[Accepted] = field(default_factory=list)
    answers: list[NewAnswer] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    skipped: int = 0


class Sorter:
    """Sorts poll batches under fixed settings."""

    def __init__(self, tasks: Tasks, settings: Settings) -> None:
        self._tasks = tasks
        self._limits = settings.limits
        self._topics = Topics(settings.kafka.topic_prefix)
        self._room = largest_record_bytes(settings)

    def sort(self, records: Sequence[Record], now: datetime) -> Sorted:
        """Sort a poll batch.

        Args:
            records: Of the events and the predictions topic.
            now: Current time.

        Returns:
            The batch by kind, each kind in the records' order.
        """
        result = Sorted()
        for record in records:
            if record.partition.topic == self._topics.predictions:
                self._sort_prediction(record, now, result)
            else:
                self._sort_event(record, now, result)
        return result

    def refuse(self, record: Record, reason: Reason, message: str) -> Refused:
        """Set a record aside."""
        letter = dead_letter(record, reason, message, topic=self._topics.dead_letters, max_bytes=self._room)
        return Refused(record, reason, letter)

    def conflict(self, record: Record) -> OutRecord:
        """Return the dead letter of an event whose id is stored with other content."""
        message = "event_id: this user has an event of this id with other content"
        return self.refuse(record, Reason.DUPLICATE_CONFLICT, message).letter

    def _sort_event(self, record: Record, now: datetime, result: Sorted) -> None:
        try:
            event = parse_event(record, limits=self._limits, now=now)
            self._tasks.require(event.task).check_output(event.output, event.choices)
        except InvalidRecord as error:
            where = record.partition
            logger.info("%s/%d offset %d is refused: %s", where.topic, where.index, record.offset, error.reason)
            result.refused.append(self.refuse(record, error.reason, error.message))
        else:
            result.accepted.append(Accepted(record, event, recorded_at(record, now)))

    def _sort_prediction(self, record: Record, now: datetime, result: Sorted) -> None:
        try:
            prediction = parse_prediction(record)
        except InvalidRecord as error:
            where = record.partition
            logger.warning(
                "%s/%d offset %d is no prediction: %s", where.topic, where.index, record.offset, error.reason
            )
            result.skipped += 1
            return
        answer = self._answer(record, prediction, now)
        if answer is None:
            result.skipped += 1
        else:
            result.answers.append(answer)

    def _answer(self, record: Record, prediction: Prediction, now: datetime) -> NewAnswer | None:
        """Return the answer to keep, or ``None`` for an error answer and for what the store could not hold."""
        user_id, request_id, output = prediction.user_id, prediction.request_id, prediction.output
        if prediction.status != "ok" or output is None or prediction.task not in self._tasks:
            return None
        if record.key != user_id.encode() or not 0 < len(record.key) <= self._limits.user_id_bytes:
            return None
        if not 0 < len(request_id) <= IDENTIFIER_CHARACTERS or "\0" in user_id + request_id + output:
            return None
        made, asked = prediction.provenance, prediction.request
        used = made.used if made is not None else ()
        return NewAnswer(
            request_id=RequestId(request_id),
            user_id=UserId(user_id),
            task=str(prediction.task),
            output=output,
            arm="+".join(sorted(set(used))) or NO_ARM,
            answered_at=recorded_at(record, now),
            partition=record.partition,
            offset=record.offset,
            epoch=made.epoch if made is not None else None,
            request=(Partition(self._topics.requests, asked.partition), asked.offset) if asked is not None else None,
        )


def recorded_at(record: Record, now: datetime) -> datetime:
    """Return the record's Kafka time; ``now`` where it has none, or one ahead of us, or one that is no time.

    Producers may set it, so it is not to be trusted with anything but measuring.
    """
    if not 0 <= record.timestamp_ms <= now.timestamp() * 1000:
        return now
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=record.timestamp_ms)
