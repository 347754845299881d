"""The inference worker between two Kafka topics, on a real broker, against its model alone on the same rows.

Every user has a history and an adapter. All requests lie in the topic at once, so the worker is never idle; broker,
worker and client share the machine. The model's own rate is taken in this process when they are gone.
"""

import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.live import Publisher, await_events, client_of, events, provenance, ready
from benchmarks.timing import Cell, rounded
from oppu.cli import Session, compose
from oppu.cli.up import Stack, stack
from oppu.client import Client
from oppu.errors import FatalError
from oppu.lm.port import AdapterRef, Row, Tensors
from oppu.settings import Settings
from oppu.values import BaseId, UserId
from oppu.wire import BehaviorEvent, PredictionRequest

OVERRIDES = """
[inference]
default_deadline_seconds = 0
"""
HISTORY = 20
"""Events of each user."""
ANSWER_SECONDS = 600.0
STAGES = "oppu_inference_stage_duration_seconds"


@dataclass(frozen=True, slots=True)
class Measured:
    """Requests a second through Kafka and of the model alone, and seconds by stage of the former."""

    requests: int
    rate: float
    model_rate: float
    stages: list[dict[str, Cell]] = field(repr=False)

    @property
    def ratio(self) -> float:
        """The worker's rate over the model's."""
        return rounded(self.rate / self.model_rate)


def measure(requests: int, users: int) -> Measured:
    """Run it.

    Args:
        requests: How many are asked.
        users: Whose.

    Returns:
        Rates and stages.

    Raises:
        FatalError: Not every request was answered with its user's adapter.
    """
    with tempfile.TemporaryDirectory(prefix="oppu-end-to-end-") as folder:
        with stack(Session(None), Path(folder) / "stack", workers=("ingest", "infer"), overrides=OVERRIDES) as running:
            settings = running.settings
            history = _histories(users)
            asked = [_request(number, history[number % len(history)], users) for number in range(requests)]
            with client_of(settings) as client:
                ready(running)
                tensors = _prepared(settings, client, history, users)
                seconds, stages = _through_kafka(running, client, asked)
        rate = requests / seconds
        model_rate = requests / _model_only(settings, asked, tensors)
    return Measured(requests, rate, model_rate, _shown(stages, seconds))


def _histories(users: int) -> list[BehaviorEvent]:
    named = enumerate(events(users * HISTORY))
    return [event.model_copy(update={"user_id": f"user-{number % users}"}) for number, event in named]


def _request(number: int, event: BehaviorEvent, users: int) -> PredictionRequest:
    user = f"user-{number * 7 % users}"  # neighbours in the topic are different users
    return PredictionRequest(
        request_id=f"ask-{number}", user_id=user, task=event.task, input=event.input, choices=event.choices
    )


def _prepared(settings: Settings, client: Client, history: Sequence[BehaviorEvent], users: int) -> Tensors:
    """Store the histories, publish an adapter for everybody, and let the first answers pay for warming up."""
    client.send_events(history)
    store = compose.store(settings)
    await_events(store.counts, len(history))
    base = BaseId(provenance(client, history[0], "base").base)
    store.register_base(base)
    store.close()
    publisher = Publisher(settings, base, history[0])
    for user in range(users):
        publisher.publish(UserId(f"user-{user}"))
    client.ask([_request(-1 - n, history[n], users) for n in range(64)], timeout_seconds=ANSWER_SECONDS)
    return publisher.tensors


def _through_kafka(
    running: Stack, client: Client, asked: Sequence[PredictionRequest]
) -> tuple[float, Mapping[str, float]]:
    url = (running.settings.service.state_dir / "inference-0.url").read_text(encoding="utf-8").strip() + "/metrics"
    before, began = _stages(url), time.monotonic()
    answers = client.ask(asked, timeout_seconds=ANSWER_SECONDS)
    seconds, after = time.monotonic() - began, _stages(url)
    made = [answers[request.request_id].provenance for request in asked if request.request_id in answers]
    personal = sum(p is not None and p.adapter_version is not None and bool(p.retrieved) for p in made)
    if personal < len(asked):
        raise FatalError(f"{personal} of {len(asked)} answers used adapter and history")
    return seconds, {stage: after[stage] - before.get(stage, 0.0) for stage in after}


def _model_only(settings: Settings, asked: Sequence[PredictionRequest], tensors: Tensors) -> float:
    """Return the seconds that the model takes for the same rows in the worker's chunks."""
    model, tasks = compose.model(settings, slots=settings.inference.resident_adapters), compose.tasks(settings)
    refs = {user: AdapterRef(UserId(user), 0, 1) for user in dict.fromkeys(request.user_id for request in asked)}
    rows = [
        Row(r.task, r.input, choices=tasks.require(r.task).allowed(r.choices), adapter=refs[r.user_id]) for r in asked
    ]
    size, total = settings.inference.batch, 0.0
    for first in range(-size, len(rows), size):
        chunk = rows[max(first, 0) : max(first, 0) + size]
        for row in chunk:
            if row.adapter is not None:
                model.install(row.adapter, tensors)
        began = time.monotonic()
        model.answer(chunk)
        total += time.monotonic() - began if first >= 0 else 0.0  # the first chunk runs twice, once to warm up
    return total


def _stages(url: str) -> dict[str, float]:
    """Return the seconds that the worker has spent by stage so far."""
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own loopback address
        text = response.read().decode()
    return {
        sample.labels["phase"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"{STAGES}_sum"
    }


def _shown(stages: Mapping[str, float], seconds: float) -> list[dict[str, Cell]]:
    rows = {**stages, "kafka, parsing, fusion, waiting": seconds - sum(stages.values())}
    return [
        {"stage": name, "seconds": rounded(spent), "share": rounded(spent / seconds)} for name, spent in rows.items()
    ]
