"""Inference workers between two Kafka topics, on a real broker, against their model alone on the same rows.

Every user has a history and an adapter. A round's requests lie in the topic at once, so the workers are never idle;
broker, workers and client share the machine. Between the rounds, while they wait, the same rows are answered with the
model alone, in each of ``WAYS``: a ratio is of neighbours in time.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

from benchmarks.live import Publisher, await_events, client_of, events, provenance, samples
from benchmarks.timing import REPEATS, Cell, Timing, rounded, timed
from oppu.cli import Session, compose
from oppu.cli.up import stack
from oppu.cli.workers import settle_heap
from oppu.client import Client
from oppu.errors import FatalError
from oppu.lm import streams
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Row, Tensors
from oppu.settings import Settings
from oppu.tasks import Tasks
from oppu.values import BaseId, UserId
from oppu.wire import BehaviorEvent, PredictionRequest

OVERRIDES = """
[inference]
default_deadline_seconds = 0
"""
HISTORY = 20
"""Events of each user."""
ANSWER_SECONDS = 600.0
SETTLED_SECONDS = 0.2
"""By then a worker has counted the step whose answers were just read."""
STAGES = "oppu_inference_stage_duration_seconds"
WAYS = {
    "model_only": "the model alone, in as many processes as there are workers, as they run it",
    "model_only_on_all_cores": "the model alone in one process on all cores",
    "model_only_without_streams": "the model alone in one process, one forward after the other on all cores",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each round through Kafka, in all and by stage, and of the model alone in each of ``WAYS``."""

    requests: int
    kafka: Timing
    alone: Mapping[str, Timing]
    stages: list[dict[str, Cell]] = field(repr=False)

    def ratios(self, way: str) -> list[float]:
        """Return the workers' rate over that of the model alone, by round."""
        return [rounded(o / k) for o, k in zip(self.alone[way].seconds, self.kafka.seconds, strict=True)]

    def ratio(self, way: str) -> float:
        """Return the median of ``ratios``."""
        return statistics.median(self.ratios(way))


def measure(requests: int, users: int, *, workers: int = 1, repeats: int = REPEATS) -> Measured:
    """Run it.

    Args:
        requests: How many are asked in a round.
        users: Whose; no more than the bank has places.
        workers: Inference workers, and processes of the model alone.
        repeats: Rounds that count, after one that does not.

    Returns:
        Timings and stages.

    Raises:
        FatalError: Not every request was answered with its user's adapter.
    """
    kafka, alone, spent = list[float](), defaultdict[str, list[float]](list), defaultdict[str, float](float)
    with tempfile.TemporaryDirectory(prefix="oppu-end-to-end-") as folder:
        started = ("ingest", *("infer",) * workers)
        with stack(Session(None), Path(folder) / "stack", workers=started, overrides=OVERRIDES) as running:
            history = _histories(users)
            with client_of(running.settings) as client:
                urls = [url for name, url in running.addresses().items() if name.startswith("inference")]
                tensors = _prepared(running.settings, client, history, users)
                settle_heap()  # the client shares a process with torch, whose heap no application's client has
                with _baselines(running.settings, tensors, users, workers) as models:
                    for number in range(-1, repeats):
                        asked = [_request(n, number, history[n % len(history)], users) for n in range(requests)]
                        first = _timed_each(models, asked) if number % 2 else None
                        seconds, stages = _through_kafka(urls, client, asked)
                        beside = first or _timed_each(models, asked)
                        if number >= 0:
                            kafka.append(seconds)
                            for way, took in beside.items():
                                alone[way].append(took)
                            for stage, took in stages.items():
                                spent[stage] += took
    shown = _shown(spent, workers * sum(kafka))
    return Measured(requests, Timing(tuple(kafka)), {way: Timing(tuple(took)) for way, took in alone.items()}, shown)


def _timed_each(models: "Mapping[str, _Answering]", asked: Sequence[PredictionRequest]) -> dict[str, float]:
    """Return the seconds of each way; of two that are one, the same."""
    took = {id(model): timed(partial(model, asked)) for model in {id(m): m for m in models.values()}.values()}
    return {way: took[id(model)] for way, model in models.items()}


def _histories(users: int) -> list[BehaviorEvent]:
    named = enumerate(events(users * HISTORY))
    return [event.model_copy(update={"user_id": f"user-{number % users}"}) for number, event in named]


def _request(number: int, turn: int, event: BehaviorEvent, users: int) -> PredictionRequest:
    user = f"user-{number * 7 % users}"  # neighbours in the topic are different users
    text = f"{event.input} {turn}-{number}"  # no text is asked about twice: its vector may be at hand
    return PredictionRequest(
        request_id=f"ask-{turn}-{number}", user_id=user, task=event.task, input=text, choices=event.choices
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
    client.ask([_request(n, -2, history[n % len(history)], users) for n in range(64)], timeout_seconds=ANSWER_SECONDS)
    return publisher.tensors


def _through_kafka(
    urls: Sequence[str], client: Client, asked: Sequence[PredictionRequest]
) -> tuple[float, Mapping[str, float]]:
    before, began = _stages(urls), time.monotonic()
    answers = client.ask(asked, timeout_seconds=ANSWER_SECONDS)
    seconds = time.monotonic() - began
    time.sleep(SETTLED_SECONDS)
    after = _stages(urls)
    made = [answers[request.request_id].provenance for request in asked if request.request_id in answers]
    personal = sum(p is not None and p.adapter_version is not None and bool(p.retrieved) for p in made)
    if personal < len(asked):
        raise FatalError(f"{personal} of {len(asked)} answers used adapter and history")
    return seconds, {stage: after[stage] - before.get(stage, 0.0) for stage in after}


@contextmanager
def _baselines(settings: Settings, tensors: Tensors, users: int, workers: int) -> Iterator[Mapping[str, "_Answering"]]:
    """Hold the model alone in each of ``WAYS``; once, where one is another."""
    every = settings.model_copy(update={"model": settings.model.model_copy(update={"threads": None})})
    alike = workers == 1 and settings.model.threads in {None, os.cpu_count()}
    with ExitStack() as held:
        whole = held.enter_context(_alone(every, tensors, users, 1))
        own = whole if alike else held.enter_context(_alone(settings, tensors, users, workers))
        plain = held.enter_context(_alone(every, tensors, users, 1, in_streams=False))
        yield dict(zip(WAYS, (own, whole, plain), strict=True))


@contextmanager
def _alone(
    settings: Settings, tensors: Tensors, users: int, processes: int, *, in_streams: bool = True
) -> Iterator["_Answering"]:
    """Hold processes, each with the model and everybody's adapter in its bank."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as open_pools:
        load = (settings, tensors, users, in_streams)
        pools = [ProcessPoolExecutor(1, context, _load, load) for _ in range(processes)]
        yield _Answering([open_pools.enter_context(pool) for pool in pools])


@dataclass(frozen=True, slots=True)
class _Answering:
    """Answers requests with the model alone, an equal part of them in each process."""

    pools: Sequence[ProcessPoolExecutor]

    def __call__(self, asked: Sequence[PredictionRequest]) -> None:
        parts = [asked[first :: len(self.pools)] for first in range(len(self.pools))]
        for running in [pool.submit(_answer, part) for pool, part in zip(self.pools, parts, strict=True)]:
            running.result()


class _Loaded:
    """What a process of the model alone holds."""

    settings: Settings
    model: TorchModel
    tasks: Tasks


def _load(settings: Settings, tensors: Tensors, users: int, in_streams: bool) -> None:
    _Loaded.settings, _Loaded.tasks = settings, compose.tasks(settings)
    with nullcontext() if in_streams else mock.patch.object(streams, "MOST", 1):
        _Loaded.model = compose.model(settings, slots=settings.inference.resident_adapters)
    for number in range(users):
        _Loaded.model.install(AdapterRef(UserId(f"user-{number}"), 0, 1), tensors)
    settle_heap()


def _answer(asked: Sequence[PredictionRequest]) -> None:
    """Answer in the worker's chunks."""
    size = _Loaded.settings.inference.batch
    rows = [
        Row(
            r.task,
            r.input,
            choices=_Loaded.tasks.require(r.task).allowed(r.choices),
            adapter=AdapterRef(UserId(r.user_id), 0, 1),
        )
        for r in asked
    ]
    for first in range(0, len(rows), size):
        _Loaded.model.answer(rows[first : first + size])


def _stages(urls: Sequence[str]) -> Mapping[str, float]:
    """Return the seconds that the workers have spent by stage so far."""
    found = defaultdict[str, float](float)
    for url in urls:
        for sample in samples(f"{url}/metrics", f"{STAGES}_sum"):
            found[sample.labels["phase"]] += sample.value
    return found


def _shown(stages: Mapping[str, float], seconds: float) -> list[dict[str, Cell]]:
    rows = {**stages, "kafka, parsing, fusion, waiting": seconds - sum(stages.values())}
    return [
        {"stage": name, "seconds": rounded(spent), "share": rounded(spent / seconds)} for name, spent in rows.items()
    ]
