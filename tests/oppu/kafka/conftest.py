"""The broker that the contract suite runs on."""

from collections.abc import Iterator

import pytest

from oppu.clock import ManualClock
from oppu.kafka.memory import MemoryBroker
from oppu.settings import KafkaSettings
from tests.oppu.kafka.contract import TOPIC_BYTES, World


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A broker of each kind."""
    if request.param == "memory":
        made = World(MemoryBroker(ManualClock()))
    else:
        from oppu.kafka.client import KafkaBroker  # the in-memory half runs without the client library

        settings: KafkaSettings = request.getfixturevalue("kafka_settings")
        settings = settings.model_copy(update={"request_timeout_seconds": 5.0})
        made = World(KafkaBroker(settings, max_record_bytes=TOPIC_BYTES))
    yield made
    for client in reversed(made.opened):
        client.close()
