"""Put answers into records: predictions to whoever asked, errors included, and dead letters for the rest.

Invariant: user id and request id of an answer come from the request itself and from nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from inference.admission import Ask, Refusal
from oppu.dead_letters import dead_letter
from oppu.errors import Reason
from oppu.kafka.topics import DEAD_LETTER_OVERHEAD_BYTES, largest_record_bytes
from oppu.settings import Settings
from oppu.values import OutRecord, Record
from oppu.wire import Coordinates, Degraded, ErrorBody, Prediction, Provenance, Topics, record_for

Status = Literal["ok", "error", "dead_letter"]

EMPTY_GENERATION = "empty_generation"
"""Error code of a text task whose model wrote nothing: an invented text would pass for an answer."""

UNKNOWN = "unknown"
"""Metric label of a task that is not known."""

_RECORD_OVERHEAD_BYTES = 4 * 1024
"""Headers, key and batch framing beside a record's value."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one record comes to, ready to be sent.

    Attributes:
        record: The request's record.
        out: What is produced.
        task: Its task, for metrics.
        status: Its kind.
        code: Why it is not ``ok``.
        degraded: What was asked for and not used.
    """

    record: Record
    out: OutRecord = field(repr=False)
    task: str
    status: Status
    code: str | None = None
    degraded: tuple[Degraded, ...] = ()


class AnswerWriter:
    """Makes the records of answers."""

    def __init__(self, settings: Settings) -> None:
        self._topics = Topics(settings.kafka.topic_prefix)
        self._dead_letter_room = largest_record_bytes(settings)
        self._room = self._dead_letter_room - DEAD_LETTER_OVERHEAD_BYTES - _RECORD_OVERHEAD_BYTES

    def ok(
        self,
        ask: Ask,
        output: str,
        scores: dict[str, float] | None,
        provenance: Provenance,
        timings: Mapping[str, float],
    ) -> Answer:
        """Answer an ask; one too large for the topic becomes the error ``limit_exceeded``.

        Args:
            ask: What was asked.
            output: The answer.
            scores: Probability of each choice.
            provenance: What it was made of.
            timings: Milliseconds by stage.

        Returns:
            The answer.
        """
        prediction = Prediction(
            request_id=ask.request.request_id,
            user_id=ask.request.user_id,
            request=_coordinates(ask.record),
            task=ask.task.name,
            status="ok",
            output=output,
            scores=scores,
            provenance=provenance,
            timings=dict(timings),
        )
        out = self._record(prediction)
        size = len(out.value or b"") + len(out.key or b"")
        if size > self._room:
            return self.error(
                ask, Reason.LIMIT_EXCEEDED, f"answer: at most {self._room} bytes can be sent, got {size}", timings
            )
        return Answer(ask.record, out, ask.task.name, "ok", degraded=provenance.degraded)

    def error(self, ask: Ask, code: str, message: str, timings: Mapping[str, float] | None = None) -> Answer:
        """Answer an ask that was admitted and then failed.

        Args:
            ask: What was asked.
            code: The machine-readable cause.
            message: The cause in words, without payload.
            timings: Milliseconds by stage.

        Returns:
            The answer.
        """
        prediction = Prediction(
            request_id=ask.request.request_id,
            user_id=ask.request.user_id,
            request=_coordinates(ask.record),
            task=ask.task.name,
            status="error",
            error=ErrorBody(code=str(code), message=message),
            timings=dict(timings or {}),
        )
        return Answer(ask.record, self._record(prediction), ask.task.name, "error", str(code))

    def refusal(self, refusal: Refusal) -> Answer:
        """Answer a refused record's sender, or set the record aside where it names none.

        Args:
            refusal: Record and cause.

        Returns:
            An error answer or a dead letter.
        """
        code = str(refusal.reason)
        if refusal.to is None:
            letter = dead_letter(
                refusal.record,
                refusal.reason,
                refusal.message,
                topic=self._topics.dead_letters,
                max_bytes=self._dead_letter_room,
            )
            return Answer(refusal.record, letter, UNKNOWN, "dead_letter", code)
        request_id, user_id = refusal.to
        prediction = Prediction(
            request_id=request_id,
            user_id=user_id,
            request=_coordinates(refusal.record),
            status="error",
            error=ErrorBody(code=code, message=refusal.message),
        )
        return Answer(refusal.record, self._record(prediction), UNKNOWN, "error", code)

    def _record(self, prediction: Prediction) -> OutRecord:
        return record_for(
            self._topics.predictions,
            prediction.user_id,
            prediction,
            request_id=prediction.request_id.encode(),
        )


def _coordinates(record: Record) -> Coordinates:
    return Coordinates(partition=record.partition.index, offset=record.offset)
