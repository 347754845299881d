"""Commands against a real broker: topics, dead letters, erasure, events."""

import json
from pathlib import Path

import pytest
from sqlalchemy import select

from oppu.cli import compose
from oppu.dead_letters import dead_letter
from oppu.errors import Reason
from oppu.kafka.port import TopicSpec
from oppu.registry_place import MARK
from oppu.settings import KafkaSettings, Settings
from oppu.store.schema import erasures
from oppu.values import OutRecord, Partition, Record, UserId
from tests.oppu.cli.conftest import Run
from tests.updater.world import World

EVENT = {"event_id": "a", "user_id": "ada", "task": "mood", "occurred_at": "2026-01-01T00:00:00Z",
         "input": "it rains", "output": "sad"}  # fmt: skip

pytestmark = pytest.mark.kafka


@pytest.fixture
def settings(on_kafka: KafkaSettings, run: Run) -> Settings:
    """Settings of a broker with our topics."""
    assert run("topics", "create").code == 0
    return Settings.load()


def send(settings: Settings, *records: OutRecord) -> None:
    producer = compose.broker(settings).producer(client_id="test")
    try:
        for record in records:  # one by one, so that their times differ or agree but never go back
            producer.send([record])
    finally:
        producer.close()


def put_dead_letters(settings: Settings, *values: bytes) -> None:
    names = compose.topics(settings)
    letters = []
    for offset, value in enumerate(values):
        record = Record(Partition(names.events, 0), offset, 1_700_000_000_000 + offset, b"ada", value)
        reason = Reason.INVALID_JSON if offset % 2 else Reason.INVALID_UTF8
        letters.append(dead_letter(record, reason, "record: no", topic=names.dead_letters, max_bytes=10_000))
    send(settings, *letters)


def test_topics_are_created_once_and_listed(on_kafka: KafkaSettings, run: Run) -> None:
    assert "behavior-events: missing" in run("topics", "list").out
    [made] = run("topics", "create", "--json").lines
    assert len(made["created"]) == 5
    assert all(name.startswith(on_kafka.topic_prefix) for name in made["created"])
    assert run("topics", "create", "--json").lines == [{"created": []}]
    assert {(line["exists"], line["partitions"]) for line in run("topics", "list", "--json").lines} == {(True, 3)}


@pytest.mark.parametrize(
    "command",
    [
        ["produce", "e.jsonl"],
        ["ask", "--user", "u", "--task", "mood", "x"],
        ["watch"],
        ["dead-letters", "list"],
        ["dead-letters", "replay", "0:0"],
        ["erase", "ada", "--yes"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_topics_that_are_missing(
    on_kafka: KafkaSettings, world: World, run: Run, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "e.jsonl").write_text(json.dumps(EVENT), encoding="utf-8")
    done = run(*command)
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith(": run `oppu topics create`")


def test_produce(settings: Settings, world: World, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    file.write_text("".join(json.dumps({**EVENT, "event_id": str(n)}) + "\n" for n in range(7)), encoding="utf-8")
    assert run("produce", file, "--json").lines == [{"sent": 7}]
    assert sum(ends(settings, compose.topics(settings).events).values()) == 7


def test_ask_without_a_worker(settings: Settings, run: Run) -> None:
    done = run("ask", "--user", "u", "--task", "mood", "--timeout", "0.5", "text")
    assert done.code == 1
    assert done.err.splitlines()[-1] == "oppu: no answer within 0.5 s; is an inference worker running?"


def test_dead_letters(settings: Settings, run: Run) -> None:
    assert run("dead-letters", "list").out == ""
    originals = [b"\xff one", b"two", b"\xff three"]
    put_dead_letters(settings, *originals)
    listed = run("dead-letters", "list", "--json").lines
    assert [line["reason"] for line in listed] == ["invalid_utf8", "invalid_json", "invalid_utf8"]
    assert [line["at"] for line in run("dead-letters", "list", "--limit", "1", "--json").lines] == [listed[-1]["at"]]
    assert len(run("dead-letters", "list", "--reason", "invalid_json", "--json").lines) == 1
    assert "two" not in run("dead-letters", "list").out
    shown = run("dead-letters", "show", listed[1]["at"])
    assert (shown.code, shown.out) == (0, "two")
    assert run("dead-letters", "show", "0:999").err.startswith("oppu: AT: no dead letter at 0:999")


def test_dead_letters_are_replayed(settings: Settings, run: Run) -> None:
    put_dead_letters(settings, b"\xff one", b"two", b"\xff three")
    [at] = [line["at"] for line in run("dead-letters", "list", "--reason", "invalid_json", "--json").lines]
    assert run("dead-letters", "replay", at, "--json").lines == [{"replayed": 1, "repeated": 0, "truncated": 0}]
    assert run("dead-letters", "replay", "--reason", "invalid_utf8", "--json").lines[0]["replayed"] == 2
    assert sum(ends(settings, compose.topics(settings).events).values()) == 3
    assert run("dead-letters", "replay", "--reason", "unknown_task", "--json").lines[0]["replayed"] == 0


def test_an_original_of_several_dead_letters_is_replayed_once(settings: Settings, run: Run) -> None:
    put_dead_letters(settings, *[b"\xff one", b"two"] * 3, b"\xff other")
    assert run("dead-letters", "replay", "--reason", "invalid_utf8", "--json").lines == [
        {"replayed": 2, "repeated": 2, "truncated": 0}
    ]
    assert sum(ends(settings, compose.topics(settings).events).values()) == 2
    listed = [line["at"] for line in run("dead-letters", "list", "--reason", "invalid_json", "--json").lines]
    assert run("dead-letters", "replay", *listed).out == "1 replayed, 2 more told of the same\n"


def test_erase(settings: Settings, world: World, run: Run, tmp_path: Path) -> None:
    names = compose.topics(settings)
    send(settings, OutRecord(names.events, b"ada", json.dumps(EVENT).encode()))
    send(settings, OutRecord(names.requests, b"ada", b"{}"), OutRecord(names.predictions, b"ada", b"{}"))
    assert list((tmp_path / "adapters").rglob("*.safetensors"))
    (tmp_path / "adapters").rename(tmp_path / "elsewhere")  # a share that is not mounted
    away = run("erase", "ada", "--yes")
    assert away.code == 1 and "registry: not there" in away.err and world.head("ada") is not None
    (tmp_path / "elsewhere").rename(tmp_path / "adapters")
    done = run("erase", "ada", "--yes")
    assert (done.code, done.out) == (0, "erased\n")
    assert not list((tmp_path / "adapters").rglob("*.safetensors"))
    assert world.store.events({UserId("ada"): 0}, embedder="", limit=10).get(UserId("ada"), []) == []
    [tombstone] = [row.record for row in world.store.outbox(100) if row.record.topic == names.updates]
    assert (tombstone.key, tombstone.value) == (b"ada", None)
    with world.store.database.read() as connection:
        (trace,) = connection.execute(select(erasures.c.end_offsets)).scalars()
    (reached,) = json.loads(trace).values()
    assert {topic: sum(ends.values()) for topic, ends in reached.items()} == {
        names.events: 1,
        names.requests: 1,
        names.predictions: 1,
    }
    assert run("history", "bob", "--json").code == 0
    assert run("erase", "eve", "--yes").code == 2


def test_adopt(settings: Settings, world: World, run: Run) -> None:
    topic = compose.topics(settings).events
    assert run("topics", "adopt", topic, "1", "--offset", "5").code == 0
    [found] = world.store.offsets(compose.cluster_id(settings), [topic]).values()
    assert found.next_offset == 5
    for wrong in (["nope", "0"], [topic, "77"]):
        assert run("topics", "adopt", *wrong, "--offset", "5").code == 2


def test_doctor(settings: Settings, world: World, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPPU_MODEL__BASE", "/no/such/model")
    done = run("doctor", "--json")
    checks = {line["check"]: line["ok"] for line in done.lines}
    assert [name for name, ok in checks.items() if not ok] == ["model"]
    assert done.code == 1
    monkeypatch.setattr(compose, "model", lambda *_args, **_named: world.model)
    assert run("doctor").code == 0


def test_doctor_finds_a_topic_that_somebody_else_made(
    on_kafka: KafkaSettings, world: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "model", lambda *_args, **_named: world.model)
    settings = Settings.load()
    names, admin = compose.topics(settings), compose.broker(settings).admin()
    admin.create_topics([TopicSpec(names.requests, 3, 1, {"max.message.bytes": "5000"})])
    admin.create_topics([TopicSpec(names.updates, 3, 1, {"cleanup.policy": "delete"})])
    admin.close()
    assert run("topics", "create").code == 0
    [found] = [line["found"] for line in run("doctor", "--json").lines if not line["ok"]]
    assert found.split("; ") == [
        f"{names.requests}: compression.type producer, expected uncompressed",
        f"{names.requests}: max.message.bytes 5000, expected 2097152 at least",
        f"{names.updates}: cleanup.policy delete, expected compact",
    ]


def test_doctor_finds_a_registry_that_is_not_there(
    settings: Settings, world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "model", lambda *_args, **_named: world.model)
    mark = tmp_path / "adapters" / MARK
    mark.unlink()
    done = run("doctor", "--json")
    assert [(line["check"], "is the share mounted" in line["found"]) for line in done.lines if not line["ok"]] == [
        ("registry", True)
    ]
    assert done.code == 1
    mark.touch()
    assert run("doctor").code == 0


def ends(settings: Settings, topic: str) -> dict[Partition, int]:
    """Where each partition of a topic ends."""
    reader = compose.broker(settings).consumer("g", [topic], lambda _assigned, _committed: {}, client_id="g")
    try:
        return dict(reader.end_offsets([Partition(topic, index) for index in range(settings.kafka.partitions)]))
    finally:
        reader.close()
