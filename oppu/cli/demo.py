"""``oppu demo``: the main job on real events, through the real broker and the real workers, and what it gained.

Authors' articles are streamed in time order; the scheduler trains; requests are sent with each part switched on and
off. What is asked about was never trained on by anybody: a request comes before its event is sent, as it would in an
application (predict, then learn).
"""

import gzip
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import click

from oppu.cli import Session, compose
from oppu.cli.adapt import adapt_base
from oppu.cli.demo_arms import ARMS, Asked, WrongUser, ask_arms
from oppu.cli.demo_report import Report, draw_picture, print_report
from oppu.cli.stack_settings import apart
from oppu.cli.up import Stack, stack
from oppu.client import Client
from oppu.errors import ConfigError, FatalError
from oppu.settings import Settings
from oppu.store.port import HistoryStore
from oppu.store.records import ClaimState
from oppu.wire import BehaviorEvent

MARKER = "oppu-demo.folder"
RECIPE: dict[str, Any] = {"method": "full", "epochs": 2, "learning_rate": 5e-4, "batch": 32, "seed": 0}
OVERRIDES = """
[model]
base = {base}
[updater]
interval_seconds = 1.0
"""
WAVES = 8
ASKED_EVERY = 2
"""One in so many live events is asked about."""
SETTLE_SECONDS, INGEST_SECONDS = 180.0, 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The packaged events by role, oldest first."""

    population: list[BehaviorEvent]
    history: list[BehaviorEvent]
    live: list[BehaviorEvent]


@click.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), default=Path(".oppu-demo"), show_default=True)
@click.pass_obj
def demo(session: Session, folder: Path) -> None:
    """Stream real events of 24 authors, train their adapters live, and compare the arms."""
    started = time.monotonic()
    _prepare(folder)
    sample = read_sample()
    with apart(OVERRIDES.format(base='""'), tell=False):
        base = _adapted_base(session.settings, sample, folder)
    _say(started, "starting Kafka and the workers")
    with stack(session, folder, overrides=OVERRIDES.format(base=json.dumps(str(base)))) as running:
        addresses = running.addresses()
        _say(started, f"Kafka at {running.bootstrap_servers}, workers ready")
        client = Client(compose.broker(running.settings), compose.topics(running.settings))
        try:
            report = _run(running, client, sample, started)
        finally:
            client.close()
        report.urls.update({worker: f"{url}/metrics" for worker, url in addresses.items()})
        print_report(report, folder)
    (folder / "report.json").write_text(json.dumps(report.fields(), indent=2) + "\n", encoding="utf-8")
    if report.lost or report.duplicated:
        raise FatalError(f"{report.lost} lost, {report.duplicated} duplicated: see {folder}")


def read_sample() -> Sample:
    """Read the packaged sample."""
    packed = resources.files("oppu.cli").joinpath("demo_news.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]

    def role(name: str) -> list[BehaviorEvent]:
        return [BehaviorEvent.model_validate(row) for row in rows if row["role"] == name]

    return Sample(role("population"), role("history"), role("live"))


def _run(running: Stack, client: Client, sample: Sample, started: float) -> Report:
    store = compose.store(running.settings)
    client.send_events(sample.history)
    _await_events(store, len(sample.history))
    _say(started, f"{len(sample.history)} events stored and retrievable")
    _settle(store, running.settings)
    _say(started, f"{_heads(store)} users have an adapter")
    waves = list(_waves(running, client, store, sample.live, started))
    sent, stored = len(sample.history) + len(sample.live), store.counts()["events"]
    return Report(
        seconds=time.monotonic() - started,
        waves=waves,
        expected=len(ARMS) * sum(len(wave) for wave in waves),
        answered=len(client.answers.first),
        duplicated=client.answers.duplicated + max(0, stored - sent),
        events_lost=max(0, sent - stored),
        adapters=_heads(store),
        quality=store.quality(),
        lift=store.lift(store.bases()[0]),
        picture=draw_picture(waves, running.folder / "accuracy.png"),
    )


def _waves(
    running: Stack, client: Client, store: HistoryStore, events: Sequence[BehaviorEvent], started: float
) -> Iterator[list[Asked]]:
    """Ask about each wave in every arm before it is sent, then send it: predict, then learn."""
    wrong = WrongUser(running.settings, store)
    size, sent, settings = -(-len(events) // WAVES), store.counts()["events"], running.settings
    for number in range(WAVES):
        wave = events[number * size : (number + 1) * size]
        asked = wave[::ASKED_EVERY]
        answers = ask_arms(client, asked, ARMS, prefix="live")
        answers = [replace(a, wrong=own) for a, own in zip(answers, wrong.outputs(asked), strict=True)]
        named = {event.event_id for event in asked}
        client.send_events([_reply(e) if e.event_id in named else e for e in wave])
        sent += len(wave)
        _await_events(store, sent)
        _settle(store, settings)  # the stream's months pass in seconds here: give the scheduler its months
        shares = ", ".join(f"{arm} {sum(a.right(arm) for a in answers) / len(answers):.2f}" for arm in ARMS)
        _say(started, f"wave {number + 1}/{WAVES}, to {wave[-1].occurred_at:%Y-%m}: {shares}; {_heads(store)} adapters")
        yield answers


def _reply(event: BehaviorEvent) -> BehaviorEvent:
    return event.model_copy(update={"in_reply_to": f"live-all-{event.event_id}"})


def _prepare(folder: Path) -> None:
    """Clear what an earlier demo left, its adapted base excepted; refuse a folder that is not the demo's."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"--dir: {folder} has files and is not a demo's folder; name another")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    for path in folder.iterdir():
        if path.name == MARKER or path.name.startswith("base-"):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _adapted_base(settings: Settings, sample: Sample, folder: Path) -> Path:
    """Adapt the base on the other authors, once."""
    content = json.dumps([e.event_id for e in sample.population]) + json.dumps(RECIPE) + settings.model_dump_json()
    base = folder.resolve() / f"base-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if (base / "oppu.json").exists():
        click.echo(f"base model: adapted by an earlier run, in {base.name}")
        return base
    if base.exists():
        shutil.rmtree(base)  # an interrupted adaption
    click.echo(f"base model: adapting MiniLM on {len(sample.population)} articles of other authors (once)")
    done = adapt_base(settings, sample.population, base, RECIPE)
    click.echo(f"base model: {done}")
    return base


def _await_events(store: HistoryStore, count: int) -> None:
    deadline = time.monotonic() + INGEST_SECONDS
    while store.counts()["events"] < count:
        if time.monotonic() > deadline:
            raise FatalError(f"{store.counts()['events']} of {count} events stored after {INGEST_SECONDS:g} s")
        time.sleep(0.05)


def _settle(store: HistoryStore, settings: Settings) -> None:
    """Wait until nobody is due and nobody is being trained."""
    deadline, [base] = time.monotonic() + SETTLE_SECONDS, store.bases()
    while time.monotonic() < deadline:
        due = store.due_count(base, now=datetime.now(UTC), min_pending=settings.updater.min_pending)
        busy = any(status.state == ClaimState.CLAIMED for status in store.adapters(base, limit=1000))
        if not due and not busy:
            return
        time.sleep(0.3)
    raise FatalError(f"the updater did not catch up within {SETTLE_SECONDS:g} s")


def _heads(store: HistoryStore) -> int:
    return store.counts()["adapters"]


def _say(started: float, text: str) -> None:
    click.echo(f"[{time.monotonic() - started:5.0f} s] {text}")
