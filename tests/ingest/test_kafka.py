"""The ingest worker on a real broker: offsets from the store, dead letters, markers, a restart."""

import time
from pathlib import Path

import pytest

from ingest.step import IngestWorker
from oppu.clock import SystemClock
from oppu.crash_guard import CrashGuard
from oppu.dead_letters import DeadLetter, read_dead_letter
from oppu.embedder import HashEmbedder
from oppu.errors import OffsetIdentityChanged, Reason
from oppu.health import Health
from oppu.kafka.client import KafkaBroker
from oppu.kafka.topics import largest_record_bytes, topic_specs
from oppu.loop import Loop
from oppu.metrics import fresh
from oppu.settings import KafkaSettings, Settings, StoreSettings
from oppu.store.sql import SqlStore, open_store
from oppu.values import OutRecord, Partition, UserId
from oppu.wire import Prediction, Topics, record_for
from tests.ingest.world import TASKS, event_bytes

pytestmark = pytest.mark.kafka
SECONDS = 60.0


class Live:
    """A worker that can be ended and begun again on the same store and topics."""

    def __init__(self, kafka: KafkaSettings, database: Path, notes: Path) -> None:
        self.settings = Settings(kafka=kafka, store=StoreSettings(url=f"sqlite:///{database}"))
        self.topics = Topics(kafka.topic_prefix)
        self.broker = KafkaBroker(kafka, max_record_bytes=largest_record_bytes(self.settings))
        admin = self.broker.admin()
        admin.create_topics(topic_specs(self.settings))
        self.cluster_id = admin.cluster_id()
        admin.close()
        self.store: SqlStore = open_store(self.settings.store, deployment_key="key")
        self.metrics = fresh()
        self.health = Health(SystemClock(), live_within_seconds=60)
        self.notes = notes

    def loop(self) -> Loop:
        worker = IngestWorker(
            self.broker, self.store, HashEmbedder(), TASKS, self.settings, self.metrics, clock=SystemClock()
        )
        return Loop(
            worker,
            settings=self.settings,
            clock=SystemClock(),
            metrics=self.metrics,
            health=self.health,
            guard=CrashGuard(self.notes),
        )

    def send(self, *records: OutRecord) -> None:
        producer = self.broker.producer(client_id="application")
        producer.send(records)
        producer.close()

    def run_until(self, events: int, answers: int = 0) -> None:
        loop = self.loop()
        wanted, end, found = (events, answers, 0), time.monotonic() + SECONDS, None
        while not (self.health.is_ready() and found == wanted) and time.monotonic() < end:
            loop.turn()
            counts = self.store.counts()
            found = (counts["events"], counts["answers"], counts["outbox"])
        loop.close()
        assert found == wanted

    def letters(self, number: int) -> list[DeadLetter]:
        reader = self.broker.consumer(
            f"{self.topics.prefix}letters",
            [self.topics.dead_letters],
            lambda partitions, committed: dict.fromkeys(partitions, 0),
            client_id="letters",
        )
        found: list[DeadLetter] = []
        end = time.monotonic() + SECONDS
        while len(found) < number and time.monotonic() < end:
            found += [read_dead_letter(record) for record in reader.poll(0.1, 100)]
        found += [read_dead_letter(record) for record in reader.poll(0.5, 100)]
        reader.close()
        return found


@pytest.fixture
def live(fresh_kafka_settings: KafkaSettings, template: Path, tmp_path: Path) -> Live:
    database = tmp_path / "history.db"
    database.write_bytes(template.read_bytes())
    return Live(fresh_kafka_settings, database, tmp_path / "notes.json")


def test_events_answers_and_dead_letters_survive_restarts(live: Live) -> None:
    events, predictions = live.topics.events, live.topics.predictions
    transactions = live.broker.transactional_producer(f"{live.topics.prefix}t")
    answer = Prediction(request_id="r1", user_id="u1", task="news", status="ok", output="politics")
    transactions.begin()
    transactions.send([record_for(predictions, "u1", answer)])
    transactions.commit()
    transactions.close()
    live.send(
        *[OutRecord(events, f"u{n % 5}".encode(), event_bytes(f"e{n}", f"u{n % 5}")) for n in range(50)],
        OutRecord(events, b"u1", b"{"),
        OutRecord(events, b"u1", event_bytes("big", "u1", input="x" * 1_000_000)),
    )
    live.run_until(50, 1)
    live.send(OutRecord(events, b"u1", event_bytes("reply", "u1", in_reply_to="r1")))
    live.run_until(51, 1)
    live.run_until(51, 1)
    letters = live.letters(2)
    assert sorted(letter.reason for letter in letters) == [Reason.INVALID_JSON, Reason.LIMIT_EXCEEDED]
    assert {letter.value for letter in letters} >= {b"{"}
    assert live.store.counts()["events"] == 51
    (quality,) = live.store.quality()
    assert (quality.answered, quality.matched, quality.correct) == (1, 1, 1)
    stored = live.store.events({UserId("u1"): 0}, embedder=HashEmbedder().fingerprint, limit=100)[UserId("u1")]
    assert [event.seq for event in stored] == list(range(1, 12))


def test_another_identity_of_the_topic_stops_the_worker(live: Live) -> None:
    live.store.adopt_offset(live.cluster_id, Partition(live.topics.events, 0), 0, "another topic")
    loop = live.loop()
    end = time.monotonic() + SECONDS
    try:
        with pytest.raises(OffsetIdentityChanged, match="oppu topics adopt"):
            while time.monotonic() < end:
                loop.turn()
    finally:
        loop.close()
