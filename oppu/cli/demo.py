"""``oppu demo``: the main job on real events, through the real broker and the real workers, and what it gained.

Authors' articles are streamed in time order; the scheduler trains; requests are sent with each part switched on and
off. What is asked about was never trained on by anybody: live requests come before their event is sent, and the
final ones are about articles after the cut, with nothing of them in the store.
"""

import gzip
import hashlib
import json
import shutil
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import click

from evaluation.corpus import of_events, prepared
from inference.fusion import FILE
from oppu.cli import Session, compose
from oppu.cli.adapt import adapt_base
from oppu.cli.calibrate import calibrate_base
from oppu.cli.demo_arms import ARMS, Asked, ask_arms, wrong_user_outputs
from oppu.cli.demo_report import Report, draw_picture, print_report
from oppu.cli.up import Stack, stack
from oppu.client import Client
from oppu.errors import ConfigError, FatalError
from oppu.settings import Settings
from oppu.store.port import ClaimState, HistoryStore
from oppu.wire import BehaviorEvent

MARKER = "oppu-demo.folder"
RECIPE: dict[str, Any] = {"method": "full", "epochs": 2, "learning_rate": 5e-4, "batch": 32, "seed": 0}
OVERRIDES = """
[model]
base = {base}
[updater]
interval_seconds = 1.0
"""
CALIBRATE_EVENTS = 17
SILENT_SHARE = 0.4
"""Share of the stream that is sent before the first live request: somebody must have a history first."""
WAVES = 6
ASKED_EVERY = 3
"""One in so many live events is asked about; all of the final ones are."""
READY_SECONDS, SETTLE_SECONDS, INGEST_SECONDS = 120.0, 180.0, 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The packaged events by role, oldest first."""

    population: list[BehaviorEvent]
    stream: list[BehaviorEvent]
    test: list[BehaviorEvent]


@click.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), default=Path(".oppu-demo"), show_default=True)
@click.pass_obj
def demo(session: Session, folder: Path) -> None:
    """Stream real events of 24 authors, train their adapters live, and compare the arms."""
    started = time.monotonic()
    _prepare(folder)
    sample = read_sample()
    base = _adapted_base(session.settings, sample, folder)
    _say(started, "starting Kafka and the workers")
    with stack(session, folder, overrides=OVERRIDES.format(base=json.dumps(str(base)))) as running:
        urls = _wait_until_ready(running)
        _say(started, f"Kafka at {running.bootstrap_servers}, workers ready")
        client = Client(compose.broker(running.settings), compose.topics(running.settings))
        try:
            report = _run(running, client, sample, started)
        finally:
            client.close()
        report.urls.update(urls)
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

    return Sample(role("population"), role("stream"), role("test"))


def _run(running: Stack, client: Client, sample: Sample, started: float) -> Report:
    store = compose.store(running.settings)
    silent = int(len(sample.stream) * SILENT_SHARE)
    client.send_events(sample.stream[:silent])
    _await_events(store, silent)
    _say(started, f"{silent} events stored and retrievable")
    _settle(store, running.settings)
    _say(started, f"{_heads(store)} users have an adapter")
    live = list(_live(running, client, store, sample.stream[silent:], started))
    _say(started, f"{_heads(store)} users have an adapter; asking about later articles")
    final = ask_arms(client, sample.test, ARMS, prefix="final")
    _say(
        started,
        f"{len(final)} requests in {len(ARMS)} arms answered; computing the wrong-user control beside the service",
    )
    wrong = wrong_user_outputs(running.settings, store, sample.test)
    replies = [_reply(event, "final") for event in sample.test]
    client.send_events(replies)
    _await_events(store, len(sample.stream) + len(replies))
    picture = draw_picture(live, final, running.folder / "accuracy.png")
    return Report(
        seconds=time.monotonic() - started,
        final=final,
        wrong=wrong,
        live=live,
        expected=len(ARMS) * (len(final) + sum(len(wave) for wave in live)),
        answered=len(client.answers.first),
        duplicated=client.answers.duplicated + max(0, store.counts()["events"] - len(sample.stream) - len(replies)),
        events_lost=max(0, len(sample.stream) + len(replies) - store.counts()["events"]),
        adapters=_heads(store),
        quality=store.quality(),
        lift=store.lift(store.bases()[0]),
        picture=picture,
    )


def _live(
    running: Stack, client: Client, store: HistoryStore, events: Sequence[BehaviorEvent], started: float
) -> Iterator[list[Asked]]:
    """Ask about each wave in every arm before it is sent, then send it: predict, then learn."""
    size, sent, settings = -(-len(events) // WAVES), store.counts()["events"], running.settings
    for number in range(WAVES):
        wave = events[number * size : (number + 1) * size]
        asked = wave[::ASKED_EVERY]
        answers = ask_arms(client, asked, ARMS, prefix="live")
        named = {event.event_id for event in asked}
        client.send_events([_reply(e, "live") if e.event_id in named else e for e in wave])
        sent += len(wave)
        _await_events(store, sent)
        _settle(store, settings)  # the stream's months pass in seconds here: give the scheduler its months
        shares = ", ".join(f"{arm} {sum(a.right(arm) for a in answers) / len(answers):.2f}" for arm in ARMS)
        _say(started, f"wave {number + 1}/{WAVES}, to {wave[-1].occurred_at:%Y-%m}: {shares}; {_heads(store)} adapters")
        yield answers


def _reply(event: BehaviorEvent, prefix: str) -> BehaviorEvent:
    return event.model_copy(update={"in_reply_to": f"{prefix}-all-{event.event_id}"})


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
    """Adapt the base on some of the other authors and calibrate it on the rest, once."""
    content = json.dumps([e.event_id for e in sample.population]) + json.dumps(RECIPE) + settings.model_dump_json()
    base = folder.resolve() / f"base-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if (base / FILE).exists():
        click.echo(f"base model: made by an earlier run, in {base.name}")
        return base
    if base.exists():
        shutil.rmtree(base)  # it was interrupted
    adapt, judge = _divided(sample.population)
    click.echo(f"base model: adapting MiniLM on {len(adapt)} articles of other authors (once)")
    done = adapt_base(settings, adapt, base, RECIPE)
    click.echo(f"base model: {done}")
    task = judge[0].task
    items = prepared(of_events(judge, task), task, compose.tasks(settings))
    own = settings.model_copy(update={"model": settings.model.model_copy(update={"base": str(base)})})
    click.echo(f"base model: calibrated, {calibrate_base(own, items)}")
    return base


def _divided(population: Sequence[BehaviorEvent]) -> tuple[list[BehaviorEvent], list[BehaviorEvent]]:
    """Part the other authors: every second of those with enough events for an adapter calibrates."""
    counts = Counter(event.user_id for event in population)
    able = sorted(user for user, count in counts.items() if count >= CALIBRATE_EVENTS)
    chosen = set(able[::2])
    return [e for e in population if e.user_id not in chosen], [e for e in population if e.user_id in chosen]


def _wait_until_ready(running: Stack) -> dict[str, str]:
    deadline = time.monotonic() + READY_SECONDS
    state, names = running.settings.service.state_dir, {"ingest": "ingest", "updater": "update", "inference-0": "infer"}
    urls: dict[str, str] = {}
    while time.monotonic() < deadline:
        for name in names:
            path = state / f"{name}.url"
            if name not in urls and path.exists() and _answers(url := path.read_text(encoding="utf-8").strip()):
                urls[name] = f"{url}/metrics"
        if len(urls) == len(names):
            return urls
        time.sleep(0.2)
    missing = ", ".join(f"{running.folder / log}.log" for name, log in names.items() if name not in urls)
    raise FatalError(f"not ready within {READY_SECONDS:g} s; see {missing}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as response:  # noqa: S310 - our own loopback address
            ready: bool = response.status == 200
            return ready
    except (urllib.error.URLError, OSError):
        return False


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
