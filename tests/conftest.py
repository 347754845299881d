"""Fixtures of more than one test folder: a real broker, settings for it, and real behaviour events."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from oppu.errors import ConfigError, FatalError
from oppu.kafka.embedded import EmbeddedBroker
from oppu.kafka.jars import kafka_jars, require_extra
from oppu.settings import KafkaSettings

settings.register_profile("oppu", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("oppu")  # a shared machine may stand still for longer than any deadline

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

MARKED_BY = {"kafka_classpath": "kafka", "embedded_kafka": "kafka", "behaviour_events": "data"}
"""Fixtures, with the marker of every test that uses one."""


@pytest.fixture(scope="session")
def kafka_classpath() -> list[Path]:
    """The broker's jars; skips, saying why, where they cannot be had."""
    try:
        require_extra()
        return kafka_jars()
    except (ConfigError, FatalError) as error:
        pytest.skip(f"no embedded Kafka: {error}")


@pytest.fixture(scope="session")
def embedded_kafka(kafka_classpath: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """One real broker for all tests of this process; tests keep apart by their topics' names."""
    with EmbeddedBroker(tmp_path_factory.mktemp("kafka"), heap_megabytes=256) as broker:
        yield broker


@pytest.fixture(scope="session")
def kafka_settings(embedded_kafka: EmbeddedBroker) -> KafkaSettings:
    """Settings of this session on the real broker, under a topic prefix of its own."""
    unique = uuid.uuid4().hex[:8]
    return KafkaSettings(
        bootstrap_servers=embedded_kafka.bootstrap_servers,
        topic_prefix=f"t{unique}.",
        group_prefix=f"g{unique}-",
        partitions=3,
        replication=1,
        min_insync_replicas=1,
    )


@pytest.fixture
def kafka_prefix() -> str:
    """A name that no other test uses, to put before topics, groups and transactional ids."""
    return f"x{uuid.uuid4().hex[:12]}."


@pytest.fixture
def fresh_kafka_settings(kafka_settings: KafkaSettings, kafka_prefix: str) -> KafkaSettings:
    """The session's settings under a topic and group prefix that no other test uses."""
    return kafka_settings.model_copy(update={"topic_prefix": kafka_prefix, "group_prefix": f"g-{kafka_prefix}"})


@pytest.fixture(scope="session")
def behaviour_events() -> Callable[[str], Path]:
    """Return a function from a data set's name to its file; it skips where the file is not there."""

    def find(name: str) -> Path:
        path = DATA / f"{name}.jsonl.gz"
        if not path.is_file():
            pytest.skip(f"no behaviour events at {path}")
        return path

    return find


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use, so that ``-m "not kafka"`` needs no discipline."""
    for item in items:
        used = set(getattr(item, "fixturenames", ()))
        for fixture, marker in MARKED_BY.items():
            if fixture in used:
                item.add_marker(marker)


def pytest_configure(config: pytest.Config) -> None:
    """Let kafka-python load its schemas, for which it uses two functions that Python 3.11 calls deprecated."""
    config.addinivalue_line("filterwarnings", "ignore:(read|open)_text is deprecated:DeprecationWarning")
