"""What the live benchmarks share: events, a client, answers, metrics, and versions published by hand."""

import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from oppu.cli import compose
from oppu.cli.demo import read_sample
from oppu.client import Client
from oppu.errors import FatalError
from oppu.lm.port import AdapterRef, Example, LanguageModel, Tensors, TrainConfig, TrainJob
from oppu.settings import Settings
from oppu.store.records import Candidate
from oppu.values import BaseId, UserId
from oppu.wire import AdapterUpdate, BehaviorEvent, Coordinates, PredictionRequest, Provenance, record_for

STORED_SECONDS, ANSWER_SECONDS = 120.0, 60.0
CLAIM_SECONDS = 60.0


class Publisher:
    """An update from claim to publication; the weights come from one small training before it."""

    def __init__(self, settings: Settings, base: BaseId, event: BehaviorEvent) -> None:
        self._store, self._topics = compose.store(settings), compose.topics(settings)
        model = compose.model(settings, slots=1)
        self.tensors = _trained(model, event)
        self._registry = compose.registry(settings, base, model.adapter_config())
        self._registry.open(in_use=())
        self._base = base

    def publish(self, user: UserId) -> int:
        claim = self._store.claim(self._base, user, holder="freshness", ttl_seconds=CLAIM_SECONDS)
        if claim is None:
            raise FatalError("the user is claimed by somebody else")
        parent, ref = claim.head.version if claim.head else None, AdapterRef(user, claim.epoch, claim.next_version)
        written = self._registry.write(
            ref, self.tensors, parent=parent, trained_through=claim.last_seq, metrics={}, token=claim.token
        )
        candidate = Candidate(
            ref.version, parent, claim.last_seq, claim.last_seq, written.path, written.digest, metrics={}
        )
        update = AdapterUpdate(user_id=user, base=self._base, version=ref.version, parent=parent, cause="published")
        announce = record_for(self._topics.updates, user, update)
        if not self._store.publish(claim, candidate, now=datetime.now(UTC), announce=announce):
            raise FatalError("the version was not published")
        return ref.version


def _trained(model: LanguageModel, event: BehaviorEvent) -> Tensors:
    example = Example(event.task, event.input, event.output, event.choices or ())
    job = TrainJob(UserId(event.user_id), None, (example,))
    [trained] = model.train([job], TrainConfig(1e-3, 0.0, passes=1, batch=1), heartbeat=lambda: None)
    if trained.tensors is None:
        raise FatalError("the training ended with weights that are not finite")
    return trained.tensors


@contextmanager
def client_of(settings: Settings) -> Iterator[Client]:
    """Hold a client of the running stack; closed afterwards."""
    client = Client(compose.broker(settings), compose.topics(settings))
    try:
        yield client
    finally:
        client.close()


def samples(url: str, name: str) -> list[Sample]:
    """Return a worker's samples of this name, from where it shows its metrics."""
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own loopback address
        text = response.read().decode()
    return [
        sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name
    ]


def events(count: int) -> list[BehaviorEvent]:
    """The packaged events in time order, repeated under other names where they do not suffice."""
    sample = read_sample()
    every = sorted(sample.population + sample.history + sample.live, key=lambda event: event.occurred_at)
    copies = (
        event.model_copy(update={"event_id": f"{event.event_id}-{n}", "user_id": f"{event.user_id}-{n}"})
        for n in range(-(-count // len(every)))
        for event in every
    )
    return [event for event, _ in zip(copies, range(count), strict=False)]


def await_events(counts: Callable[[], Mapping[str, int]], wanted: int) -> None:
    """Wait until ``counts`` knows of so many stored events.

    Raises:
        FatalError: They are not there in time.
    """
    deadline = time.monotonic() + STORED_SECONDS
    while (stored := counts()["events"]) < wanted:
        if time.monotonic() > deadline:
            raise FatalError(f"{stored} of {wanted} events stored after {STORED_SECONDS:g} s")
        time.sleep(0.1)


def provenance(client: Client, event: BehaviorEvent, request_id: str, after: Coordinates | None = None) -> Provenance:
    """Ask about an event's input and return what the answer was made of."""
    request = PredictionRequest(
        request_id=request_id,
        user_id=event.user_id,
        task=event.task,
        input=event.input,
        choices=event.choices,
        after=after,
    )
    answer = client.ask([request], timeout_seconds=ANSWER_SECONDS).get(request_id)
    if answer is None or answer.provenance is None:
        raise FatalError(f"{request_id}: {'no answer' if answer is None else answer.error}")
    return answer.provenance
