"""The shell around kafka-python: which of its errors become which of ours, and what it is told."""

import inspect
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from kafka import KafkaProducer, TopicPartition, codec
from kafka import errors as k
from kafka.net.connection import KafkaConnection
from kafka.net.transport import KafkaTCPTransport
from kafka.record import default_records, util
from pydantic import SecretStr

from oppu.errors import FatalError, InvalidRecord, OffsetOutOfRange, OppuError, ProducerFenced, TransientError
from oppu.kafka import client_consumer
from oppu.kafka.client import KafkaBroker, NetClient, connection, connection_check
from oppu.kafka.client_errors import FATAL, FENCED, TOO_LARGE, UNACCEPTABLE, translate, translated
from oppu.kafka.port import TopicSpec
from oppu.kafka.topics import topic_specs
from oppu.settings import KafkaSettings, Settings
from oppu.values import OutRecord, Record
from oppu.wire import Topics

FENCED_NAMES = """ProducerFencedError InvalidProducerEpochError InvalidProducerIdMappingError UnknownProducerIdError
    InvalidTxnStateError TransactionCoordinatorFencedError IllegalGenerationError UnknownMemberIdError
    FencedInstanceIdError FencedMemberEpochError StaleMemberEpochError CommitFailedError""".split()
FATAL_NAMES = """AuthorizationError ClusterAuthorizationFailedError DelegationTokenAuthorizationFailedError
    GroupAuthorizationFailedError TopicAuthorizationFailedError TransactionalIdAuthorizationFailedError
    SaslAuthenticationFailedError UnsupportedSaslMechanismError IllegalSaslStateError SecurityDisabledError
    UnsupportedVersionError IncompatibleBrokerVersion UnsupportedForMessageFormatError UnsupportedCodecError
    UnsupportedCompressionTypeError UnrecognizedBrokerVersion KafkaConfigurationError InvalidConfigurationError
    IllegalArgumentError InvalidTopicError InvalidGroupIdError InvalidSessionTimeoutError
    InvalidTransactionTimeoutError InvalidReplicationFactorError InvalidPartitionsError PolicyViolationError
    InconsistentGroupProtocolError""".split()
INVALID_NAMES = "MessageSizeTooLargeError RecordListTooLargeError InvalidRecordError InvalidTimestampError".split()


def expected(name: str) -> type[OppuError]:
    """Return what a library error of this name must become."""
    table: dict[str, type[OppuError]] = {
        **dict.fromkeys(FENCED_NAMES, ProducerFenced),
        **dict.fromkeys(FATAL_NAMES, FatalError),
        **dict.fromkeys(INVALID_NAMES, InvalidRecord),
        "OffsetOutOfRangeError": OffsetOutOfRange,
    }
    return table.get(name, TransientError)


ALL = sorted(
    {cls for _, cls in inspect.getmembers(k, inspect.isclass) if issubclass(cls, k.KafkaError)},
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("kind", ALL, ids=lambda cls: cls.__name__)
def test_every_error_of_the_library_becomes_ours(kind: type[Exception]) -> None:
    error = kind({}) if kind is k.LogTruncationError else kind()
    with pytest.raises(OppuError) as raised, translated():
        raise error
    assert type(raised.value) is expected(kind.__name__)
    assert raised.value.__cause__ is error


def test_every_row_of_the_tables_is_held_by_the_test_above() -> None:
    rows = {kind.__name__ for kind in (*FENCED, *FATAL, *TOO_LARGE, *UNACCEPTABLE)}
    assert rows <= {*FENCED_NAMES, *FATAL_NAMES, *INVALID_NAMES}
    assert {*FENCED_NAMES, *FATAL_NAMES, *INVALID_NAMES} <= {kind.__name__ for kind in ALL}


def test_positions_out_of_range_are_carried_over() -> None:
    error = translate(k.OffsetOutOfRangeError({TopicPartition("t", 3): 7}))
    assert isinstance(error, OffsetOutOfRange)
    assert error.offsets == {("t", 3): 7}


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), RuntimeError("loop closed")])
def test_a_broken_connection_is_transient(error: Exception) -> None:
    with pytest.raises(TransientError), translated():
        raise error


def test_our_own_errors_and_bugs_pass() -> None:
    mine = FatalError("mine")
    with pytest.raises(FatalError) as raised, translated():
        raise mine
    assert raised.value is mine
    with pytest.raises(TypeError), translated():
        raise TypeError


def test_security_settings_are_passed_through(tmp_path: Path) -> None:
    ca, cert, key = (tmp_path / f"{name}.pem" for name in ("ca", "cert", "key"))
    for file in (ca, cert, key):
        file.touch()
    settings = KafkaSettings(
        bootstrap_servers="a:1, b:2",
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="me",
        sasl_password=SecretStr("hush"),
        ssl_cafile=ca,
        ssl_certfile=cert,
        ssl_keyfile=key,
        request_timeout_seconds=7,
    )
    options = connection(settings, "me")
    assert options["bootstrap_servers"] == ["a:1", "b:2"]
    assert (options["security_protocol"], options["sasl_mechanism"]) == ("SASL_SSL", "SCRAM-SHA-512")
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("me", "hush")
    assert [options[f"ssl_{name}file"] for name in ("ca", "cert", "key")] == [str(ca), str(cert), str(key)]
    assert options["request_timeout_ms"] == 7_000
    assert "hush" not in repr(settings)
    assert "sasl_mechanism" not in connection(KafkaSettings(), "me")


def test_nobody_there_is_transient_at_once_and_leaves_nothing_behind() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{free.getsockname()[1]}")
    broker = KafkaBroker(settings, max_record_bytes=1_000)
    threads = set(threading.enumerate())
    with pytest.raises(TransientError, match="no Kafka broker can be reached"):
        connection_check(settings)
    for open_client in (
        lambda: broker.consumer("g", ["t"], lambda new, _: dict.fromkeys(new, 0), client_id="c"),
        lambda: broker.producer(client_id="p"),
        lambda: broker.transactional_producer("id"),
        broker.admin,
    ):
        with pytest.raises(TransientError):
            open_client()
    assert set(threading.enumerate()) <= threads


def test_a_name_that_cannot_be_resolved_is_transient_and_named() -> None:
    with pytest.raises(TransientError, match="no-such-host.invalid:9092"):
        connection_check(KafkaSettings(bootstrap_servers="no-such-host.invalid:9092"), 0.5)


def test_a_server_that_says_nothing_runs_into_the_time_limit() -> None:
    threads = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as mute:
        settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(TransientError):
            connection_check(settings, 0.5)
    assert set(threading.enumerate()) <= threads


def test_a_client_that_is_closed_with_bytes_unsent_leaves_no_socket_open() -> None:
    client = NetClient(bootstrap_servers=["127.0.0.1:1"])
    with socket.create_server(("127.0.0.1", 0)) as mute:
        ours = socket.create_connection(mute.getsockname())
        ours.setblocking(False)
        connection = KafkaConnection(client._net, node_id=1, **client._manager.config)
        client._manager._conns[1] = connection
        connection.connection_made(KafkaTCPTransport(client._net, ours))
        connection._init_future.success(True)
        connection.transport.write(b"x" * 2**24)  # more than the system takes without a reader
        client.close()
    assert ours.fileno() == -1


@pytest.mark.kafka
def test_a_broker_that_is_there_answers(kafka_settings: KafkaSettings) -> None:
    connection_check(kafka_settings)


@pytest.mark.kafka
def test_an_idle_consumer_notices_that_the_broker_is_gone(
    kafka_settings: KafkaSettings, kafka_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = f"{kafka_prefix}t"
    broker = KafkaBroker(kafka_settings, max_record_bytes=1_000)
    admin = broker.admin()
    admin.create_topics([TopicSpec(topic, 1, 1)])
    admin.close()
    consumer = broker.consumer(f"{kafka_prefix}g", [topic], lambda new, _: dict.fromkeys(new, 0), client_id="c")
    monkeypatch.setattr(client_consumer, "PROBE_SECONDS", 0.0)
    assert consumer.poll(0.05, 10) == []

    def gone(*_: object, **__: object) -> None:
        raise k.KafkaTimeoutError("gone")

    monkeypatch.setattr(consumer._consumer, "end_offsets", gone)
    with pytest.raises(TransientError, match="gone"):
        consumer.poll(0.05, 10)
    monkeypatch.undo()
    assert consumer.poll(0.05, 10) == []
    consumer.close()


class _Name(str):
    """A header name that another client wrote: any bytes."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"a\xff"


def test_a_header_name_that_is_no_utf_8_stops_nothing(kafka_settings: KafkaSettings, kafka_prefix: str) -> None:
    broker = KafkaBroker(kafka_settings, max_record_bytes=2**20)
    topic, admin, producer = f"{kafka_prefix}t", broker.admin(), broker.producer(client_id="p")
    consumer = None
    try:
        admin.create_topics([TopicSpec(topic, 1, 1, {})])
        strange = OutRecord(topic, b"k", b"1", (("ü", b"x"), (_Name("?"), b"\xff"), ("z", b"")))
        producer.send([OutRecord(topic, b"k", b"0", (("ü", b"x"),)), strange, OutRecord(topic, b"k", b"2")])
        consumer = broker.consumer(f"{kafka_prefix}g", [topic], lambda new, _: dict.fromkeys(new, 0), client_id="c")
        found: list[Record] = []
        deadline = time.monotonic() + 20
        while len(found) < 3 and time.monotonic() < deadline:
            found += consumer.poll(0.1, 100)
        assert [r.value for r in found] == [b"0", b"1", b"2"]
        assert [r.headers for r in found] == [(("ü", b"x"),), (("ü", b"x"), ("a\\xff", b"\xff"), ("z", b"")), ()]
        producer.send([OutRecord(topic, b"k", b"again", found[1].headers)])  # as its dead letter would be
    finally:
        for client in (consumer, producer, admin):
            if client is not None:
                client.close()


def _snappy(run: bytes) -> bytes:
    """Pack bytes that hold a long run of ``a`` the way the Java client's snappy does."""
    first, last = run.index(b"a" * 9), run.rindex(b"a" * 9) + 9
    head, tail = run[: first + 1], run[last:]
    size, whole = len(run), bytearray()
    while size > 127:
        whole.append(size & 127 | 128)
        size >>= 7
    whole.append(size)
    whole += bytes([61 << 2]) + struct.pack("<H", len(head) - 1) + head
    for start in range(first + 1, last, 64):
        whole += bytes([(min(64, last - start) - 1) << 2 | 2]) + struct.pack("<H", 1)
    whole += bytes([61 << 2]) + struct.pack("<H", len(tail) - 1) + tail
    return b"\x82SNAPPY\0" + struct.pack(">iii", 1, 1, len(whole)) + whole


def test_applications_may_compress_with_any_codec(
    fresh_kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(kafka=fresh_kafka_settings)
    broker, topic = KafkaBroker(settings.kafka, max_record_bytes=2**20), Topics(settings.kafka.topic_prefix).events
    admin = broker.admin()
    admin.create_topics(topic_specs(settings))
    admin.close()
    with monkeypatch.context() as patch:
        patch.setattr(codec, "has_snappy", lambda: True)
        patch.setattr(default_records, "snappy_encode", lambda run: _snappy(bytes(run)))
        patch.setitem(KafkaProducer._COMPRESSORS, "snappy", (lambda: True, 2))
        producer = broker._open_producer("application", compression_type="snappy")()
        sent = producer.send(topic, key=b"k", value=b"a" * 5000).get(10)
        producer.close()
    consumer = broker.consumer(f"{topic}-g", [topic], lambda new, _: dict.fromkeys(new, 0), client_id="c")
    try:
        deadline, found = time.monotonic() + 20, list[Record]()
        while not found and time.monotonic() < deadline:
            found = consumer.poll(0.1, 10)
        assert [(r.offset, r.value) for r in found] == [(sent.offset, b"a" * 5000)]
    finally:
        consumer.close()


def test_checksums_are_not_computed_in_python() -> None:
    assert util.crc32c_c is not None  # kafka-python falls back to its own, 0.14 s a megabyte, without a word
    assert util.calc_crc32c(b"123456789") == 0xE3069283  # CRC-32C's check value, in its catalogue
