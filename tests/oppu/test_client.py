"""The application's client, on the in-memory broker: no answer is lost, whatever happens to its group."""

import logging

import pytest

from oppu.client import Client
from oppu.clock import ManualClock
from oppu.kafka.memory import MemoryBroker
from oppu.kafka.port import TopicSpec
from oppu.values import OutRecord, Partition
from oppu.wire import Prediction, Topics, record_for

TOPICS = Topics("t.")
NOT_POLLED_SECONDS = 301.0
"""More than the broker's patience with a member that runs and does not poll."""


def create(broker: MemoryBroker, partitions: int) -> None:
    broker.admin().create_topics([TopicSpec(TOPICS.predictions, partitions, 1)])


@pytest.fixture
def clock() -> ManualClock:
    """A clock of the test's own."""
    return ManualClock()


@pytest.fixture
def broker(clock: ManualClock) -> MemoryBroker:
    """A broker that has the predictions' topic."""
    made = MemoryBroker(clock)
    create(made, 2)
    return made


def answer(broker: MemoryBroker, *numbers: int) -> None:
    """Answer requests, each of a user of its own."""
    made = [Prediction(request_id=f"r{n}", user_id=f"u{n}", status="ok", output="yes") for n in numbers]
    send(broker, *(record_for(TOPICS.predictions, one.user_id, one) for one in made))


def send(broker: MemoryBroker, *records: OutRecord) -> None:
    broker.producer(client_id="test").send(records)


def read(client: Client) -> list[str]:
    """Return what comes in a few polls, of which the first may be spent on joining."""
    return sorted(prediction.request_id for _ in range(4) for prediction in client.poll())


def test_answers_are_read_from_the_opening_on(broker: MemoryBroker) -> None:
    answer(broker, 1, 2)
    client = Client(broker, TOPICS)
    answer(broker, 3, 4)
    assert read(client) == ["r3", "r4"]
    assert client.answers.first.keys() == {"r3", "r4"}


def test_answers_that_came_while_nobody_polled_are_read(broker: MemoryBroker, clock: ManualClock) -> None:
    answer(broker, *range(8))
    client = Client(broker, TOPICS)
    answer(broker, *range(8, 12))
    assert read(client) == ["r10", "r11", "r8", "r9"]
    for first in (20, 30):  # it may happen again and again
        answer(broker, first)
        clock.advance(NOT_POLLED_SECONDS)
        answer(broker, first + 1, first + 2, first + 3)
        assert read(client) == [f"r{first + n}" for n in range(4)]
    assert client.answers.duplicated == 0


def test_a_client_that_has_read_nothing_yet_loses_nothing_either(broker: MemoryBroker, clock: ManualClock) -> None:
    answer(broker, *range(8))
    client = Client(broker, TOPICS)
    answer(broker, *range(8, 12))
    clock.advance(NOT_POLLED_SECONDS)
    assert read(client) == ["r10", "r11", "r8", "r9"]


def test_a_partition_that_is_new_is_read_from_its_beginning(broker: MemoryBroker) -> None:
    client = Client(broker, TOPICS)
    broker.delete_topic(TOPICS.predictions)  # the broker in memory has no other way to more partitions
    create(broker, 5)
    answer(broker, *range(20))
    assert {record.partition.index for record in broker.records(TOPICS.predictions)} > {0, 1}
    assert len(read(client)) == 20


def test_a_topic_made_anew_is_read_from_its_beginning(broker: MemoryBroker, clock: ManualClock) -> None:
    answer(broker, *range(20))
    client = Client(broker, TOPICS)
    broker.delete_topic(TOPICS.predictions)
    create(broker, 2)
    answer(broker, *range(100, 103))
    clock.advance(NOT_POLLED_SECONDS)
    assert read(client) == ["r100", "r101", "r102"]


def test_answers_that_retention_took_do_not_stop_the_client(broker: MemoryBroker, clock: ManualClock) -> None:
    client = Client(broker, TOPICS)
    answer(broker, *range(20))
    clock.advance(NOT_POLLED_SECONDS)
    broker.delete_records(Partition(TOPICS.predictions, 0), 3)
    held = [record for record in broker.records(TOPICS.predictions) if record.partition.index]
    assert len(read(client)) == 20 - 3 and held


@pytest.mark.parametrize("rubbish", [b"{}", b"\xff secret", b"[" * 100_000 + b"secret", None])
def test_a_record_that_is_no_prediction_takes_no_other_with_it(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, rubbish: bytes | None
) -> None:
    client = Client(broker, TOPICS)
    answer(broker, 1)
    send(broker, OutRecord(TOPICS.predictions, b"u1", rubbish))
    answer(broker, 1, 2)
    with caplog.at_level(logging.WARNING):
        assert read(client) == ["r1", "r1", "r2"]
    assert client.answers.duplicated == 1
    [where] = [r for r in broker.records(TOPICS.predictions) if r.value == rubbish]
    [warned] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned.startswith(f"{TOPICS.predictions}/{where.partition.index} offset {where.offset} is no prediction: ")
    assert "secret" not in caplog.text
