"""What the README shows of an application's side runs as it stands there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from oppu.cli import compose
from oppu.clock import ManualClock
from oppu.kafka.memory import MemoryBroker
from oppu.kafka.topics import topic_specs
from oppu.parsing import parse_event, parse_request
from oppu.settings import LimitsSettings, Settings
from oppu.values import Partition, Record
from oppu.wire import BehaviorEvent, Prediction, Topics, record_for

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_event_is_one_that_ingest_takes() -> None:
    [command] = re.findall(r"^echo .*", README, re.MULTILINE)
    line = shlex.split(command)[1]
    event = BehaviorEvent.model_validate(json.loads(line))
    record = Record(Partition("events", 0), 0, 0, event.user_id.encode(), line.encode())
    assert parse_event(record, limits=LimitsSettings(), now=event.occurred_at) == event
    assert event.output in compose.tasks(Settings())[event.task].labels


def test_the_application_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / ".oppu").mkdir()
    (tmp_path / ".oppu" / "oppu.toml").write_text('[kafka]\ntopic_prefix = "mine."\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    broker, topics = MemoryBroker(ManualClock()), Topics("mine.")
    broker.admin().create_topics(topic_specs(Settings.load(tmp_path / ".oppu" / "oppu.toml")))
    producer = broker.producer(client_id="worker")

    def answer(call: str) -> None:
        if call.endswith("poll") and broker.records(topics.requests) and not broker.records(topics.predictions):
            [asked] = [parse_request(record, limits=LimitsSettings()) for record in broker.records(topics.requests)]
            made = Prediction(request_id=asked.request_id, user_id=asked.user_id, status="ok", output="politics")
            producer.send([record_for(topics.predictions, asked.user_id, made)])

    broker.on_call(answer)
    monkeypatch.setattr(compose, "broker", lambda _settings: broker)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "politics\n"
