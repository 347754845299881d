"""How fresh the service is: events become retrievable, requests see their own events, a new adapter serves at once.

``python -m benchmarks.freshness [--events N] [--rate R] [--json FILE]`` starts a real broker and real workers in a
temporary folder. Times come from the worker's own histogram, so a percentile is known as a bucket's upper bound.
"""

import json
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

import click
from prometheus_client.parser import text_string_to_metric_families

from oppu.cli import Session, compose
from oppu.cli.demo import read_sample
from oppu.cli.up import Stack, stack
from oppu.client import Client
from oppu.errors import FatalError
from oppu.lm.port import AdapterRef, Example, LanguageModel, Tensors, TrainConfig, TrainJob
from oppu.settings import Settings
from oppu.store.port import Candidate
from oppu.values import BaseId, UserId
from oppu.wire import AdapterUpdate, After, BehaviorEvent, PredictionRequest, Provenance, record_for

HISTOGRAM = "oppu_ingest_event_to_retrievable_seconds"
OVERRIDES = """
[inference]
default_deadline_seconds = 0
"""
READY_SECONDS, STORED_SECONDS, ANSWER_SECONDS = 120.0, 120.0, 60.0
PRELOADED = 20
"""Events sent before the clock starts: the first batch of a process also pays for warming up."""
CLAIM_SECONDS = 60.0


@click.command()
@click.option("--events", "count", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=50.0, show_default=True, help="A second.")
@click.option("--asks", type=click.IntRange(min=1), default=50, show_default=True, help="Own-event requests.")
@click.option("--trials", type=click.IntRange(min=1), default=30, show_default=True, help="Published adapters.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result there.")
def main(count: int, rate: float, asks: int, trials: int, out: Path | None) -> None:
    """Measure freshness on this machine."""
    found: dict[str, object] = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory(prefix="oppu-freshness-") as folder:
        with stack(Session(None), Path(folder) / "stack", workers=("ingest", "infer"), overrides=OVERRIDES) as running:
            with _client(running.settings) as client:
                ingest = _ready(running)
                events = _events(PRELOADED + count + asks)
                _warm_up(running.settings, client, events[:PRELOADED])
                found |= _retrievable(running.settings, client, ingest, events[PRELOADED:-asks], rate)
                found |= _own_events(client, events[-asks:])
                found |= _published(running.settings, client, events[0], trials)
    found["load_after"] = round(os.getloadavg()[0], 2)
    for name, value in found.items():
        click.echo(f"{name:38} {value}")
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _retrievable(
    settings: Settings, client: Client, url: str, events: Sequence[BehaviorEvent], rate: float
) -> dict[str, object]:
    """Send at a steady rate and read what the ingest worker measured meanwhile."""
    store = compose.store(settings)
    stored, before, began = store.counts()["events"], _buckets(url), time.monotonic()
    for number, event in enumerate(events):
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        client.send_events([event])
    sending = time.monotonic() - began
    _await_events(store.counts, stored + len(events))
    store.close()
    after = _buckets(url)
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    total = counts[float("inf")]
    return {
        "events": int(total),
        "rate_reached_per_second": round(len(events) / sending, 1),
        "retrievable_p50_at_most_seconds": _bound(counts, 0.5),
        "retrievable_p99_at_most_seconds": _bound(counts, 0.99),
        "retrievable_share_within_1_second": round(counts[1.0] / total, 4),
        "retrievable_share_by_bucket": {f"{b:g}": round(n / total, 4) for b, n in counts.items()},
    }


def _own_events(client: Client, events: Sequence[BehaviorEvent]) -> dict[str, object]:
    """Ask right after each event, naming it in ``after``: the answer's history must hold it."""
    seen, degraded, seconds = 0, 0, []
    reached: dict[str, int] = {}
    for number, event in enumerate(events):
        # an event's number in its history is not known to its sender: what a request before it saw, plus one
        reached[event.user_id] = _provenance(client, event, f"before-{number}").history_sequence + 1
        [at] = client.send_events([event])
        began = time.monotonic()
        made = _provenance(client, event, f"own-{number}", After(partition=at.partition.index, offset=at.offset))
        seconds.append(time.monotonic() - began)
        behind = any(part.part == "history" for part in made.degraded)
        degraded += behind
        seen += made.history_sequence >= reached[event.user_id] and not behind
    seconds.sort()
    return {
        "own_event_requests": len(events),
        "own_event_in_view": seen,
        "own_event_degraded_share": round(degraded / len(events), 4),
        "own_event_answer_p50_seconds": round(seconds[len(seconds) // 2], 3),
        "own_event_answer_p99_seconds": round(seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], 3),
    }


def _published(settings: Settings, client: Client, event: BehaviorEvent, trials: int) -> dict[str, object]:
    """Publish versions as an updater does and ask at once: each answer must have used the newest."""
    store, user = compose.store(settings), UserId(event.user_id)
    base = BaseId(_provenance(client, event, "base").base)
    store.register_base(base)
    publisher = _Publisher(settings, base, event)
    right = 0
    for number in range(trials):
        version = publisher.publish(user)
        right += _provenance(client, event, f"adapter-{number}").adapter_version == version
    store.close()
    return {"adapters_published": trials, "adapters_used_by_next_request": right}


class _Publisher:
    """An update from claim to publication; the weights come from one small training before it."""

    def __init__(self, settings: Settings, base: BaseId, event: BehaviorEvent) -> None:
        self._store, self._topics = compose.store(settings), compose.topics(settings)
        model = compose.model(settings, slots=1)
        self._tensors = _trained(model, event)
        self._registry = compose.registry(settings, base, model.adapter_config())
        self._base = base

    def publish(self, user: UserId) -> int:
        claim = self._store.claim(self._base, user, holder="freshness", ttl_seconds=CLAIM_SECONDS)
        if claim is None:
            raise FatalError("the user is claimed by somebody else")
        parent, ref = claim.head.version if claim.head else None, AdapterRef(user, claim.epoch, claim.next_version)
        written = self._registry.write(
            ref, self._tensors, parent=parent, trained_through=claim.last_seq, metrics={}, token=claim.token
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
def _client(settings: Settings) -> Iterator[Client]:
    client = Client(compose.broker(settings), compose.topics(settings))
    try:
        yield client
    finally:
        client.close()


def _ready(running: Stack) -> str:
    """Wait for both workers and return where ingest shows its metrics."""
    deadline, waiting, url = time.monotonic() + READY_SECONDS, {"ingest", "inference-0"}, ""
    while waiting:
        if time.monotonic() > deadline:
            raise FatalError(f"not ready within {READY_SECONDS:g} s: {', '.join(sorted(waiting))}")
        for name in sorted(waiting):
            place = running.settings.service.state_dir / f"{name}.url"
            if place.exists() and _says_ready(at := place.read_text(encoding="utf-8").strip()):
                waiting.discard(name)
                url = f"{at}/metrics" if name == "ingest" else url
        time.sleep(0.1)
    return url


def _says_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as response:  # noqa: S310 - our own loopback address
            return bool(response.status == HTTPStatus.OK)
    except OSError:
        return False


def _events(count: int) -> list[BehaviorEvent]:
    """The packaged events in time order, repeated under other names where they do not suffice."""
    sample = read_sample()
    every = sorted(sample.population + sample.stream + sample.test, key=lambda event: event.occurred_at)
    copies = (
        event.model_copy(update={"event_id": f"{event.event_id}-{n}", "user_id": f"{event.user_id}-{n}"})
        for n in range(-(-count // len(every)))
        for event in every
    )
    return [event for event, _ in zip(copies, range(count), strict=False)]


def _warm_up(settings: Settings, client: Client, events: Sequence[BehaviorEvent]) -> None:
    """The first batch and the first answer of a process also pay for warming up."""
    store = compose.store(settings)
    client.send_events(events)
    _await_events(store.counts, len(events))
    store.close()
    for number, event in enumerate(events):
        _provenance(client, event, f"warm-up-{number}")


def _buckets(url: str) -> dict[float, float]:
    """Return the histogram's cumulative counts by upper bound, in seconds."""
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own loopback address
        text = response.read().decode()
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"{HISTOGRAM}_bucket"
    }


def _await_events(counts: Callable[[], Mapping[str, int]], wanted: int) -> None:
    deadline = time.monotonic() + STORED_SECONDS
    while (stored := counts()["events"]) < wanted:
        if time.monotonic() > deadline:
            raise FatalError(f"{stored} of {wanted} events stored after {STORED_SECONDS:g} s")
        time.sleep(0.1)


def _bound(counts: Mapping[float, float], share: float) -> float:
    """Return the smallest bucket bound below which at least this share lies."""
    total = counts[float("inf")]
    return next(bound for bound in sorted(counts) if counts[bound] >= share * total)


def _provenance(client: Client, event: BehaviorEvent, request_id: str, after: After | None = None) -> Provenance:
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


if __name__ == "__main__":
    main()
