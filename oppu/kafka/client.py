"""The cluster through kafka-python: opens the clients, and is the only place that knows their settings.

Only the modules ``oppu.kafka.client*`` import ``kafka``. Invariant: a client whose construction fails leaves no
thread and no socket behind, so a worker may retry for as long as the broker is away.
"""

import logging
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import kafka.errors as k
from kafka import IsolationLevel, KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.net.compat import KafkaNetClient

from oppu.errors import OppuError, TransientError
from oppu.kafka.client_consumer import KafkaGroupConsumer, ends
from oppu.kafka.client_errors import translate, translated
from oppu.kafka.client_producer import KafkaPlainProducer, KafkaTransactions, NullableBytes, Open
from oppu.kafka.port import Start, TopicSpec
from oppu.settings import KafkaSettings
from oppu.values import Partition

logger = logging.getLogger(__name__)

LINGER_MILLISECONDS = 5
"""A send is followed by a flush, so this only lets the first batches fill."""

BATCH_BYTES = 256 * 1024
"""Far under any topic's ``max.message.bytes``, which the broker compares with whole batches."""

RECORD_OVERHEAD_BYTES = 1024
"""Framing of a batch with one record, over its key, value and headers."""

METADATA_MILLISECONDS = 15_000
"""How soon a topic or partition created after us is noticed."""

NO_TOPIC_ID = "00000000-0000-0000-0000-000000000000"

MAX_HEARTBEAT_MILLISECONDS = 1_000
"""A member learns of a rebalance by its heartbeat, so this is how long the others wait for it."""

T = TypeVar("T")


class NetClient(KafkaNetClient):  # type: ignore[misc]  # kafka-python has no types
    """The library's network side, which leaves no socket open.

    The library's own close waits for unsent bytes to be written, by a loop that it stops at once.
    """

    def close(self, node_id: str | int | None = None) -> None:
        """Close one node's connection, or, without a node, everything."""
        connections = list(self._manager._conns.values()) if node_id is None else []  # noqa: SLF001 - not public
        transports = [connection.transport for connection in connections if connection.transport is not None]
        super().close(node_id)
        for transport in transports:
            if (unsent := transport._sock) is not None:  # noqa: SLF001
                unsent.close()


class KafkaBroker:
    """Opens clients against one real cluster (the port's ``Broker``)."""

    def __init__(self, settings: KafkaSettings, *, max_record_bytes: int) -> None:
        """Keep the settings; nothing is connected yet.

        Args:
            settings: Connection and timeouts.
            max_record_bytes: The largest ``max.message.bytes`` of the topics that are read or written.
        """
        self._settings = settings
        self._max_record_bytes = max_record_bytes

    def consumer(self, group: str, topics: Sequence[str], start: Start, *, client_id: str) -> KafkaGroupConsumer:
        """Open a group member; ``start`` is called with every new assignment before its records are read."""
        session = int(self._settings.session_timeout_seconds * 1000)
        settings = {
            **connection(self._settings, client_id),
            "group_id": group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "isolation_level": "read_committed",
            "allow_auto_create_topics": False,
            "session_timeout_ms": session,
            "heartbeat_interval_ms": min(MAX_HEARTBEAT_MILLISECONDS, session // 3),
            "max_partition_fetch_bytes": max(2**20, self._max_record_bytes + RECORD_OVERHEAD_BYTES),
            "metrics_enabled": False,
        }
        client = _opened(KafkaConsumer, settings)
        try:
            with translated():
                return KafkaGroupConsumer(client, group, topics, start, partial(self._open_admin, client_id))
        except BaseException:
            client.close(autocommit=False, timeout_ms=0)
            raise

    def producer(self, *, client_id: str) -> KafkaPlainProducer:
        """Open an idempotent producer (``acks=all``)."""
        return KafkaPlainProducer(self._open_producer(client_id), self._settings.request_timeout_seconds)

    def transactional_producer(self, transactional_id: str) -> KafkaTransactions:
        """Open a transactional producer, which aborts its predecessor's open transaction at once."""
        timeout = int(self._settings.transaction_timeout_seconds * 1000)
        open_client = self._open_producer(
            transactional_id, transactional_id=transactional_id, transaction_timeout_ms=timeout
        )
        return KafkaTransactions(open_client, self._settings.request_timeout_seconds)

    def admin(self) -> "KafkaAdmin":
        """Open an administrative client."""
        return KafkaAdmin(self._open_admin("oppu-admin"))

    def _open_admin(self, client_id: str) -> KafkaAdminClient:
        return _opened(KafkaAdminClient, connection(self._settings, client_id))

    def _open_producer(self, client_id: str, **more: Any) -> Open:
        request = int(self._settings.request_timeout_seconds * 1000)
        settings = {
            **connection(self._settings, client_id),
            "acks": "all",
            "enable_idempotence": True,
            "allow_auto_create_topics": False,
            "linger_ms": LINGER_MILLISECONDS,
            "batch_size": BATCH_BYTES,
            "max_request_size": self._max_record_bytes + RECORD_OVERHEAD_BYTES,
            "max_block_ms": request,
            "delivery_timeout_ms": request + LINGER_MILLISECONDS,
            "key_serializer": NullableBytes(),
            "value_serializer": NullableBytes(),
            "metrics_enabled": False,
            **more,
        }
        return lambda: _opened(KafkaProducer, settings)


class KafkaAdmin:
    """Topics and the cluster (the port's ``Admin``)."""

    def __init__(self, client: KafkaAdminClient) -> None:
        self._client = client

    def cluster_id(self) -> str:
        """Return the cluster's own id."""
        with translated():
            return str(self._client.describe_cluster()["cluster_id"])

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        """Return each existing topic's UUID; a broker too old to have them (before 2.8) makes it empty."""
        ids = {topic["name"]: topic.get("topic_id") for topic in self._existing(topics)}
        return {name: str(id_) for name, id_ in ids.items() if id_ is not None and str(id_) != NO_TOPIC_ID}

    def create_topics(self, topics: Sequence[TopicSpec]) -> list[str]:
        """Create the missing ones, wait until they can be used, and return their names."""
        created = []
        for spec in topics:
            wanted = {
                spec.name: {
                    "num_partitions": spec.partitions,
                    "replication_factor": spec.replication,
                    "configs": dict(spec.config),
                }
            }
            with translated():
                try:
                    self._client.create_topics(wanted)
                except k.TopicAlreadyExistsError:
                    continue
            created.append(spec.name)
        with translated():
            self._client.wait_for_topics(created)
        return created

    def describe_topics(self, topics: Sequence[str]) -> dict[str, TopicSpec]:
        """Return partitions, replication and non-default configuration of the existing ones."""
        found = {topic["name"]: topic["partitions"] for topic in self._existing(topics)}
        if not found:
            return {}
        with translated():
            resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in found]
            described = self._client.describe_configs(resources, config_filter="modified")
        configs = described.get("topic", described)
        return {
            name: TopicSpec(name, len(parts), len(parts[0]["replica_nodes"]), _changed(configs.get(name, {})))
            for name, parts in found.items()
        }

    def high_watermarks(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Return where partitions end, records of transactions that are still open included."""
        return ends(self._client, partitions, IsolationLevel.READ_UNCOMMITTED)

    def close(self) -> None:
        """Release the connection."""
        with translated():
            self._client.close()

    def _existing(self, topics: Sequence[str]) -> list[dict[str, Any]]:
        if not topics:
            return []
        with translated():
            described: list[dict[str, Any]] = self._client.describe_topics(list(topics))
        for topic in described:
            error = k.for_code(topic["error_code"])
            if error not in (k.NoError, k.UnknownTopicOrPartitionError):
                raise translate(error(topic["name"]))
        return [topic for topic in described if topic["error_code"] == 0]


def connection_check(settings: KafkaSettings, timeout_seconds: float = 5.0) -> None:
    """Ask any broker for its API versions: the cheapest proof that it is there and lets us in.

    Args:
        settings: Where the cluster is.
        timeout_seconds: How long to wait.

    Raises:
        TransientError: It cannot be reached in that time.
        FatalError: It refuses our credentials or speaks another protocol.
    """
    limit = int(timeout_seconds * 1000)
    options = {**connection(settings, "oppu-check"), "bootstrap_timeout_ms": limit}
    _opened(KafkaAdminClient, options).close()


def connection(settings: KafkaSettings, client_id: str) -> dict[str, Any]:
    """Return the options that every client shares: addresses, security, timeouts.

    Args:
        settings: The cluster and the credentials.
        client_id: Name that the broker logs.

    Returns:
        kafka-python's keyword arguments. They hold the password in the clear: never log them.
    """
    request = int(settings.request_timeout_seconds * 1000)
    options: dict[str, Any] = {
        "bootstrap_servers": [server.strip() for server in settings.bootstrap_servers.split(",")],
        "client_id": client_id,
        "security_protocol": settings.security_protocol,
        "request_timeout_ms": request,
        "bootstrap_timeout_ms": request,
        "reconnect_backoff_max_ms": 2_000,
        "metadata_max_age_ms": METADATA_MILLISECONDS,
    }
    if settings.sasl_mechanism is not None and settings.sasl_password is not None:
        options["sasl_mechanism"] = settings.sasl_mechanism
        options["sasl_plain_username"] = settings.sasl_username
        options["sasl_plain_password"] = settings.sasl_password.get_secret_value()
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        path = getattr(settings, name)
        if path is not None:
            options[name] = str(path)
    return options


def _opened(make: Callable[..., T], settings: dict[str, Any]) -> T:
    """Construct a client; where that fails, close the network side that it had begun."""
    begun: list[NetClient] = []
    _knock(settings["bootstrap_servers"], settings["bootstrap_timeout_ms"] / 1000)

    def remember(**configs: Any) -> NetClient:
        begun.append(NetClient(**configs))
        return begun[-1]

    try:
        with translated():
            return make(**settings, kafka_client=remember)
    except (OppuError, ValueError) as error:
        for client in begun:
            client.close()
        if isinstance(error, OppuError):
            raise
        raise TransientError(f"Kafka: {error}") from error


def _knock(servers: Sequence[str], timeout_seconds: float) -> None:
    """Raise ``TransientError`` unless one of the servers takes a connection.

    The library would keep trying for the whole timeout where a refusal says at once that nobody is there, and
    would leak a socket at each attempt.
    """
    deadline = time.monotonic() + timeout_seconds
    problems = []
    for server in servers:
        host, _, port = server.rpartition(":")
        try:
            address = (host.strip("[]"), int(port))
            socket.create_connection(address, timeout=max(0.01, deadline - time.monotonic())).close()
        except (OSError, ValueError) as error:
            problems.append(f"{server}: {error}")
        else:
            return
    raise TransientError(f"no Kafka broker can be reached: {'; '.join(problems)}")


def _changed(configs: dict[str, Any]) -> dict[str, str]:
    return {name: str(entry["value"] if isinstance(entry, dict) else entry) for name, entry in configs.items()}
