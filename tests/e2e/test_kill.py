"""Every worker is killed (kill -9) and restarted at random moments while events and requests stream in.

Run large with ``OPPU_KILL_EVENTS=10000 pytest tests/e2e/test_kill.py``; the suite runs it smaller.
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from oppu.cli import Session, compose
from oppu.cli.dead_letters import _read as read_dead_letters
from oppu.cli.demo import read_sample
from oppu.cli.up import WORKERS, Stack, stack
from oppu.client import Client
from oppu.values import OutRecord
from oppu.wire import BehaviorEvent, PredictionRequest

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(1500)]

EVENTS = int(os.environ.get("OPPU_KILL_EVENTS", "1200"))
REQUESTS = EVENTS // 6
KILLS = 5
RUBBISH = 20
SEED = int(os.environ.get("OPPU_KILL_SEED", "7"))
OVERRIDES = """
[model]
threads = 1
[updater]
interval_seconds = 1.0
users_per_tick = 2
[inference]
default_deadline_seconds = 0
"""


def real_events(count: int) -> list[BehaviorEvent]:
    """The packaged events, repeated under other names where they do not suffice, in time order."""
    sample = read_sample()
    every = sorted(sample.population + sample.history + sample.live, key=lambda event: event.occurred_at)
    copies = [
        event.model_copy(update={"event_id": f"{event.event_id}-{n}", "user_id": f"{event.user_id}-{n}"})
        for n in range(-(-count // len(every)))
        for event in every
    ]
    return copies[:count]


class Killer(threading.Thread):
    """Kills every worker ``KILLS`` times, at random moments, each time after it was restarted."""

    def __init__(self, running: Stack, seed: int) -> None:
        super().__init__(name="killer", daemon=True)
        self._running, self._random = running, random.Random(seed)
        self.kills: Counter[str] = Counter()

    def run(self) -> None:
        while any(self.kills[name] < KILLS for name in self._running.children):
            time.sleep(self._random.uniform(0.3, 2.5))
            name = self._random.choice([n for n in self._running.children if self.kills[n] < KILLS])
            child = self._running.children[name]
            if child.process.poll() is None and time.monotonic() - child.started > self._random.uniform(1, 8):
                os.kill(child.process.pid, signal.SIGKILL)
                self.kills[name] += 1


@pytest.fixture
def running(tmp_path: Path, kafka_classpath: list[Path]) -> Iterator[Stack]:
    with stack(Session(None), tmp_path / "stack", workers=(*WORKERS, "infer"), overrides=OVERRIDES) as opened:
        yield opened


def test_killed_workers_lose_and_double_nothing(running: Stack) -> None:
    events, rubbish_sent = real_events(EVENTS), 0
    broker, topics = compose.broker(running.settings), compose.topics(running.settings)
    client = Client(broker, topics)
    raw = broker.producer(client_id="rubbish")
    killer = Killer(running, SEED)
    killer.start()
    chance = random.Random(SEED)
    asked = [
        PredictionRequest(request_id=f"r{n}", user_id=event.user_id, task=event.task, input=event.input)
        for n, event in enumerate(chance.sample(events, REQUESTS))
    ]
    step = 50
    for start in range(0, EVENTS, step):
        client.send_events(events[start : start + step])
        client.send_events(chance.sample(events[: start + step], 3))  # resent, as producers do
        client.send_requests(asked[start * REQUESTS // EVENTS : (start + step) * REQUESTS // EVENTS])
        if rubbish_sent < RUBBISH:
            raw.send([OutRecord(topics.events, b"nobody", b"\xff rubbish %d" % rubbish_sent)])
            rubbish_sent += 1
        client.poll()
        time.sleep(chance.uniform(0, 0.8))
    killer.join(timeout=600)
    assert all(killer.kills[name] >= KILLS for name in running.children), killer.kills

    answers = client.collect([request.request_id for request in asked], timeout_seconds=300)
    assert len(answers) == REQUESTS
    assert {answer.status for answer in answers.values()} == {"ok"}
    _check_store(running, events)
    # whatever a zombie might still send would come now
    for _ in range(40):
        client.poll()
    assert client.answers.duplicated == 0
    assert all(answers[r.request_id].user_id == r.user_id for r in asked)
    origins = {(d.origin, d.origin_offset) for _, d in read_dead_letters(running.settings)}
    assert len(origins) == rubbish_sent
    raw.close()
    client.close()


def _check_store(running: Stack, events: list[BehaviorEvent]) -> None:
    """Each event is there once, and each user's sequence has no gap."""
    store = compose.store(running.settings)
    deadline = time.monotonic() + 120
    while store.counts()["events"] < len(events) and time.monotonic() < deadline:
        time.sleep(0.2)
    engine = create_engine(running.settings.store.url)
    with engine.connect() as connection:
        stored = connection.execute(text("select user_id, event_id, seq from events")).all()
    engine.dispose()
    ids = Counter((bytes(user), bytes(event)) for user, event, _ in stored)
    assert ids == Counter((event.user_id.encode(), event.event_id.encode()) for event in events)
    sequences: dict[bytes, list[int]] = {}
    for user, _, seq in stored:
        sequences.setdefault(bytes(user), []).append(seq)
    assert all(sorted(own) == list(range(1, len(own) + 1)) for own in sequences.values())
    store.close()
