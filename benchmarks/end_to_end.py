"""Inference workers between two Kafka topics, on a real broker, against their model alone on the same rows.

Every user has a history and an adapter. A round's requests lie in the topic at once, so the workers are never idle;
broker, workers and client share the machine. Between the rounds, while they wait, as many processes as there are
workers answer the same rows with the model alone, and so does one process on all cores, where that is not the same: a
ratio is of neighbours in time.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.live import Publisher, await_events, client_of, events, provenance, samples
from benchmarks.timing import REPEATS, Cell, Timing, rounded, timed
from oppu.cli import Session, compose
from oppu.cli.up import stack
from oppu.client import Client
from oppu.errors import FatalError
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


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each round through Kafka, of the model alone (in as many processes as there are workers, and in one on
    all cores), and of the first by stage."""

    requests: int
    kafka: Timing
    model: Timing
    all_cores: Timing
    stages: list[dict[str, Cell]] = field(repr=False)

    @property
    def ratios(self) -> list[float]:
        """The workers' rate over the model's, by round."""
        return self._over_kafka(self.model)

    @property
    def ratios_to_all_cores(self) -> list[float]:
        """The workers' rate over that of the model in one process on all cores, by round."""
        return self._over_kafka(self.all_cores)

    @property
    def ratio(self) -> float:
        """The median of ``ratios``."""
        return statistics.median(self.ratios)

    @property
    def ratio_to_all_cores(self) -> float:
        """The median of ``ratios_to_all_cores``."""
        return statistics.median(self.ratios_to_all_cores)

    def _over_kafka(self, other: Timing) -> list[float]:
        return [rounded(o / k) for o, k in zip(other.seconds, self.kafka.seconds, strict=True)]


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
    kafka, model, all_cores, spent = list[float](), list[float](), list[float](), defaultdict[str, float](float)
    with tempfile.TemporaryDirectory(prefix="oppu-end-to-end-") as folder:
        started = ("ingest", *("infer",) * workers)
        with stack(Session(None), Path(folder) / "stack", workers=started, overrides=OVERRIDES) as running:
            history = _histories(users)
            with client_of(running.settings) as client:
                urls = [url for name, url in running.addresses().items() if name.startswith("inference")]
                tensors = _prepared(running.settings, client, history, users)
                with _baselines(running.settings, tensors, users, workers) as (alone, whole):
                    for number in range(-1, repeats):
                        asked = [_request(n, number, history[n % len(history)], users) for n in range(requests)]
                        first = [timed(partial(alone, asked))] if number % 2 else []
                        seconds, stages = _through_kafka(urls, client, asked)
                        beside = first or [timed(partial(alone, asked))]
                        on_all_cores = beside if whole is alone else [timed(partial(whole, asked))]
                        if number >= 0:
                            kafka.append(seconds)
                            model += beside
                            all_cores += on_all_cores
                            for stage, took in stages.items():
                                spent[stage] += took
    shown = _shown(spent, workers * sum(kafka))
    return Measured(requests, Timing(tuple(kafka)), Timing(tuple(model)), Timing(tuple(all_cores)), shown)


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
def _baselines(
    settings: Settings, tensors: Tensors, users: int, workers: int
) -> Iterator[tuple["_Answering", "_Answering"]]:
    """Hold the model alone as the workers run it, and in one process on all cores; once, where that is the same."""
    with _alone(settings, tensors, users, workers) as alone:
        if workers == 1 and settings.model.threads in {None, os.cpu_count()}:
            yield alone, alone
            return
        every = settings.model_copy(update={"model": settings.model.model_copy(update={"threads": None})})
        with _alone(every, tensors, users, 1) as whole:
            yield alone, whole


@contextmanager
def _alone(settings: Settings, tensors: Tensors, users: int, processes: int) -> Iterator["_Answering"]:
    """Hold processes, each with the model and everybody's adapter in its bank."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as open_pools:
        load = (settings, tensors, users)
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


def _load(settings: Settings, tensors: Tensors, users: int) -> None:
    _Loaded.settings, _Loaded.tasks = settings, compose.tasks(settings)
    _Loaded.model = compose.model(settings, slots=settings.inference.resident_adapters)
    for number in range(users):
        _Loaded.model.install(AdapterRef(UserId(f"user-{number}"), 0, 1), tensors)


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
