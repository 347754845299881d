"""How fresh the service is: events become retrievable, requests see their own events, a new adapter serves at once.

``python -m benchmarks.freshness [--events N] [--rate R] [--json FILE]`` starts a real broker and real workers in a
temporary folder. Times come from the worker's own histogram, so a percentile is known as a bucket's upper bound.
"""

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from benchmarks.live import Publisher, await_events, client_of, events, provenance, samples
from oppu.cli import Session, compose
from oppu.cli.up import stack
from oppu.client import Client
from oppu.settings import Settings
from oppu.values import BaseId, UserId
from oppu.wire import BehaviorEvent, Coordinates

HISTOGRAM = "oppu_ingest_event_to_retrievable_seconds"
OVERRIDES = """
[inference]
default_deadline_seconds = 0
"""
PRELOADED = 20
"""Events sent before the clock starts: the first batch of a process also pays for warming up."""


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
            with client_of(running.settings) as client:
                ingest = f"{running.addresses()['ingest']}/metrics"
                sent = events(PRELOADED + count + asks)
                _warm_up(running.settings, client, sent[:PRELOADED])
                found |= _retrievable(running.settings, client, ingest, sent[PRELOADED:-asks], rate)
                found |= _own_events(client, sent[-asks:])
                found |= _published(running.settings, client, sent[0], trials)
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
    await_events(store.counts, stored + len(events))
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
        reached[event.user_id] = provenance(client, event, f"before-{number}").history_sequence + 1
        [at] = client.send_events([event])
        began = time.monotonic()
        made = provenance(client, event, f"own-{number}", Coordinates(partition=at.partition.index, offset=at.offset))
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
    base = BaseId(provenance(client, event, "base").base)
    store.register_base(base)
    publisher = Publisher(settings, base, event)
    right = 0
    for number in range(trials):
        version = publisher.publish(user)
        right += provenance(client, event, f"adapter-{number}").adapter_version == version
    store.close()
    return {"adapters_published": trials, "adapters_used_by_next_request": right}


def _warm_up(settings: Settings, client: Client, events: Sequence[BehaviorEvent]) -> None:
    """The first batch and the first answer of a process also pay for warming up."""
    store = compose.store(settings)
    client.send_events(events)
    await_events(store.counts, len(events))
    store.close()
    for number, event in enumerate(events):
        provenance(client, event, f"warm-up-{number}")


def _buckets(url: str) -> dict[float, float]:
    """Return the histogram's cumulative counts by upper bound, in seconds."""
    return {float(sample.labels["le"]): sample.value for sample in samples(url, f"{HISTOGRAM}_bucket")}


def _bound(counts: Mapping[float, float], share: float) -> float:
    """Return the smallest bucket bound below which at least this share lies."""
    total = counts[float("inf")]
    return next(bound for bound in sorted(counts) if counts[bound] >= share * total)


if __name__ == "__main__":
    main()
