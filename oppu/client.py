"""The application's side of the wire: send events, ask, and collect answers. Used by commands, demo and tests.

Answers are read under read_committed from the moment the client was opened, however long it was not polled since. The
first answer to a request is kept; further ones are counted in ``duplicated``.
"""

import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from oppu.errors import InvalidRecord, TransientError
from oppu.kafka.port import Broker, Produced
from oppu.parsing import parse_prediction
from oppu.values import OutRecord, Partition, Record
from oppu.wire import BehaviorEvent, Prediction, PredictionRequest, Topics, record_for

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
JOIN_SECONDS = 30.0
SEND_CHUNK = 500


@dataclass
class Answers:
    """What came back so far, by request id, and how often a request was answered again."""

    first: dict[str, Prediction] = field(default_factory=dict)
    duplicated: int = 0


class Client:
    """One application: a producer of events and requests, and a reader of predictions."""

    def __init__(self, broker: Broker, topics: Topics, *, listen: bool = True) -> None:
        self._topics = topics
        self.answers = Answers()
        self._next_offsets: dict[Partition, int] = {}
        name = f"oppu-client-{uuid.uuid4().hex}"
        self._producer = broker.producer(client_id=name)
        self._consumer = broker.consumer(name, [topics.predictions], self._start, client_id=name) if listen else None
        if self._consumer is not None:
            self._join()

    def send_events(self, events: Sequence[BehaviorEvent]) -> list[Produced]:
        """Send events and wait for their acknowledgement.

        Args:
            events: In the order in which they happened.

        Returns:
            Their coordinates, which a request's ``after`` takes.

        Raises:
            TransientError: Some event was not acknowledged; sending all again is safe.
        """
        return self._send([record_for(self._topics.events, event.user_id, event) for event in events])

    def send_requests(self, requests: Sequence[PredictionRequest]) -> None:
        """Send requests and wait for their acknowledgement; the answers come through :meth:`collect`."""
        self._send([record_for(self._topics.requests, request.user_id, request) for request in requests])

    def collect(self, request_ids: Iterable[str], *, timeout_seconds: float) -> Mapping[str, Prediction]:
        """Wait for the answers to these requests.

        Args:
            request_ids: Whose answers to wait for.
            timeout_seconds: How long at most.

        Returns:
            Those that came in time, by request id.
        """
        wanted = set(request_ids)
        missing = wanted - self.answers.first.keys()
        deadline = time.monotonic() + timeout_seconds
        while missing and time.monotonic() < deadline:
            missing.difference_update(prediction.request_id for prediction in self.poll())
        return {name: self.answers.first[name] for name in wanted & self.answers.first.keys()}

    def ask(self, requests: Sequence[PredictionRequest], *, timeout_seconds: float = 30.0) -> Mapping[str, Prediction]:
        """Send requests and wait for their answers."""
        self.send_requests(requests)
        return self.collect([request.request_id for request in requests], timeout_seconds=timeout_seconds)

    def poll(self) -> list[Prediction]:
        """Read what has come, keep first answers, and return all that was read; what is no prediction is left out."""
        if self._consumer is None:
            raise RuntimeError("this client was opened with listen=False")
        came: list[Prediction] = []
        for record in self._consumer.poll(POLL_SECONDS, 1000):
            self._next_offsets[record.partition] = record.offset + 1
            prediction = _prediction(record)
            if prediction is None:
                continue
            came.append(prediction)
            if prediction.request_id in self.answers.first:
                self.answers.duplicated += 1
            else:
                self.answers.first[prediction.request_id] = prediction
        return came

    def close(self) -> None:
        """Leave the group and close the connections."""
        self._producer.close()
        if self._consumer is not None:
            self._consumer.close()

    def _send(self, records: Sequence[OutRecord]) -> list[Produced]:
        sent: list[Produced] = []
        for start in range(0, len(records), SEND_CHUNK):
            sent += self._producer.send(records[start : start + SEND_CHUNK])
        return sent

    def _start(
        self, assigned: frozenset[Partition], committed: Mapping[Partition, int | None]
    ) -> Mapping[Partition, int]:
        consumer = self._consumer
        if consumer is None:
            return {}
        ends = consumer.end_offsets(assigned)
        if not self._next_offsets:  # opened just now: whatever an earlier client read, everything from here on
            self._next_offsets.update(ends)
            return ends
        # the group expelled a client that did not poll for long, or the topic has grown: nothing may be left out
        beginnings = consumer.beginning_offsets(assigned)
        known = {p: self._next_offsets.get(p, beginnings[p]) for p in assigned}
        # retention may have passed a position, and in a topic made anew it may lie past the end
        return {p: offset if beginnings[p] <= offset <= ends[p] else beginnings[p] for p, offset in known.items()}

    def _join(self) -> None:
        consumer = self._consumer
        if consumer is None:
            return
        deadline = time.monotonic() + JOIN_SECONDS
        while not consumer.assignment():
            consumer.poll(POLL_SECONDS, 1)
            if time.monotonic() > deadline:
                raise TransientError(f"no partition of {self._topics.predictions} was assigned in {JOIN_SECONDS:g} s")


def _prediction(record: Record) -> Prediction | None:
    try:
        return parse_prediction(record)
    except InvalidRecord as error:
        where = record.partition
        logger.warning("%s/%d offset %d is no prediction: %s", where.topic, where.index, record.offset, error.reason)
        return None
