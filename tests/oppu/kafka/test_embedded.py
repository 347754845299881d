"""The embedded broker's life cycle, on a real Kafka: its data, its owner, its ports and its orphans."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic

from oppu.errors import ConfigError, FatalError
from oppu.kafka import embedded, ownership
from oppu.kafka.broker_files import HOST, BrokerFiles, java_command
from oppu.kafka.embedded import EmbeddedBroker
from oppu.kafka.ownership import end_orphan, find_orphan
from oppu.kafka.probe import cluster_behind

pytestmark = pytest.mark.usefixtures("kafka_classpath")

HEAP_MEGABYTES = 192
BROKEN_PROXY = "http://127.0.0.1:9"  # the discard port: any attempt to fetch fails

OWNER = """
import sys, time
from pathlib import Path
from oppu.kafka import jars
from oppu.kafka.embedded import EmbeddedBroker

def unreachable(work):
    raise AssertionError("a warm cache must not be resolved")

jars._resolve = unreachable
broker = EmbeddedBroker(Path(sys.argv[1]), heap_megabytes=192)
print(broker.start(), broker.pid, flush=True)
time.sleep(600)
"""


def broker_in(folder: Path) -> EmbeddedBroker:
    return EmbeddedBroker(folder, heap_megabytes=HEAP_MEGABYTES)


def write(servers: str, values: list[bytes]) -> None:
    admin = KafkaAdminClient(bootstrap_servers=servers)
    admin.create_topics([NewTopic("kept", 1, 1)])
    admin.close()
    producer = KafkaProducer(bootstrap_servers=servers, acks="all")
    for value in values:
        producer.send("kept", value, partition=0)
    producer.flush()
    producer.close()


def read(servers: str, count: int) -> list[bytes]:
    consumer = KafkaConsumer(bootstrap_servers=servers, enable_auto_commit=False)
    consumer.assign([TopicPartition("kept", 0)])
    consumer.seek_to_beginning()
    values: list[bytes] = []
    deadline = time.monotonic() + 20
    while len(values) < count and time.monotonic() < deadline:
        for records in consumer.poll(500).values():
            values += [record.value for record in records]
    consumer.close()
    return values


def wait_until_gone(pid: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {pid} still runs"
            time.sleep(0.02)


def write_record(files: BrokerFiles, broker: psutil.Process, started: float | None = None) -> None:
    """Write a pid file that names this process as the broker, and a keeper that is long gone."""
    started = broker.create_time() if started is None else started
    gone = {"pid": 2**22 - 3, "started": 1.0}
    record = {"broker": {"pid": broker.pid, "started": started}, "keeper": gone}
    files.record.write_text(json.dumps({**record, "owner": 1, "bootstrap_servers": "127.0.0.1:1"}))


@pytest.fixture
def idle_process() -> Iterator[psutil.Popen]:
    """A process that has nothing to do with us."""
    process = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def formatted(tmp_path_factory: pytest.TempPathFactory, kafka_classpath: list[Path]) -> BrokerFiles:
    """A folder that was formatted and is not running."""
    files = BrokerFiles(tmp_path_factory.mktemp("formatted"))
    ports = files.claim_ports()
    files.format(java_command(kafka_classpath, HEAP_MEGABYTES), ports)
    files.write_properties(ports)
    return files


def test_data_port_and_cluster_survive_a_restart_and_a_foreign_pid_is_left_alone(
    tmp_path: Path, idle_process: psutil.Popen
) -> None:
    folder = tmp_path / "data of Zoë 日"
    broker = broker_in(folder)
    starter = threading.Thread(target=broker.start)
    starter.start()
    starter.join()  # the broker belongs to the process, not to the thread that started it
    assert broker.is_running()
    assert not broker.adopted
    servers, pid, cluster = broker.bootstrap_servers, broker.pid, BrokerFiles(folder).cluster_id()
    write(servers, [b"one", b"two"])
    assert broker.start() == servers  # a second call changes nothing
    assert broker.pid == pid
    broker.stop()
    assert not psutil.pid_exists(pid)
    assert not BrokerFiles(folder).record.exists()

    write_record(BrokerFiles(folder), idle_process)
    with broker:
        assert broker.bootstrap_servers == servers
        assert BrokerFiles(folder).cluster_id() == cluster
        assert read(servers, 2) == [b"one", b"two"]
    assert idle_process.is_running()


@pytest.mark.slow
@pytest.mark.parametrize("broker_too", [False, True], ids=["owner", "owner_and_broker"])
def test_kill_9_loses_nothing_and_the_next_start_works_offline(tmp_path: Path, broker_too: bool) -> None:
    environment = dict(os.environ, http_proxy=BROKEN_PROXY, https_proxy=BROKEN_PROXY, HTTPS_PROXY=BROKEN_PROXY)
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, env=environment, cwd=root, text=True
    ) as owner:
        assert owner.stdout is not None
        servers, pid = owner.stdout.readline().split()
        write(servers, [b"acknowledged"])
        if broker_too:
            os.kill(int(pid), signal.SIGKILL)
        owner.kill()
        owner.wait()
    with broker_in(tmp_path) as again:
        assert not psutil.pid_exists(int(pid))
        assert again.pid != int(pid)
        assert again.bootstrap_servers == servers
        assert read(servers, 1) == [b"acknowledged"]


def test_a_folder_has_one_owner(embedded_kafka: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LOCK_SECONDS", 0.05)
    with pytest.raises(ConfigError, match=rf"run by process {os.getpid()} .* {embedded_kafka.bootstrap_servers}"):
        broker_in(embedded_kafka.data_dir).start()
    assert embedded_kafka.is_running()


def test_listens_on_loopback_only(embedded_kafka: EmbeddedBroker) -> None:
    connections = psutil.Process(embedded_kafka.pid).net_connections("inet")
    addresses = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    assert addresses in ({HOST}, {f"::ffff:{HOST}"})


def test_dies_with_its_keeper_and_starts_again(formatted: BrokerFiles) -> None:
    broker = broker_in(formatted.data_dir)
    try:
        broker.start()
        pid = broker.pid
        keeper = psutil.Process(pid).parent()
        assert keeper is not None
        keeper.kill()
        wait_until_gone(pid)
        assert not broker.is_running()
        broker.start()
        assert broker.is_running()
        assert broker.pid != pid
    finally:
        broker.stop()


def test_a_healthy_orphan_is_adopted_and_then_dies_with_us(
    formatted: BrokerFiles, kafka_classpath: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "DYING_SECONDS", 0.1)
    ports = formatted.claim_ports()
    formatted.write_properties(ports)
    command = [*java_command(kafka_classpath, HEAP_MEGABYTES), "kafka.Kafka", str(formatted.properties)]
    with psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as orphan:
        while cluster_behind(HOST, ports.broker) is None:
            assert orphan.poll() is None
            time.sleep(0.05)
        write_record(formatted, orphan)
        with broker_in(formatted.data_dir) as broker:
            assert broker.adopted
            assert broker.pid == orphan.pid
            assert broker.bootstrap_servers == f"{HOST}:{ports.broker}"
        assert orphan.wait(1) is not None
    assert not formatted.record.exists()


def test_an_orphan_that_does_not_serve_is_stopped_by_its_id(
    formatted: BrokerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "DYING_SECONDS", 0.1)
    stuck = [sys.executable, "-c", "import time; time.sleep(600)", str(formatted.properties)]
    with psutil.Popen(stuck) as orphan:
        write_record(formatted, orphan)
        with broker_in(formatted.data_dir) as broker:
            assert not broker.adopted
            assert broker.pid != orphan.pid
        assert orphan.wait(1) == -signal.SIGTERM


def test_a_reused_pid_is_never_ours(tmp_path: Path, idle_process: psutil.Popen) -> None:
    files = BrokerFiles(tmp_path)
    same_words = [sys.executable, "-c", "import time; time.sleep(600)", str(files.properties)]
    with psutil.Popen(same_words) as later:
        write_record(files, later, started=later.create_time() - 60)  # our command line, another start
        assert find_orphan(files, 1) is None
        end_orphan(files, 1)
        write_record(files, idle_process)  # our start time, another command line
        assert find_orphan(files, 1) is None
        end_orphan(files, 1)
        assert later.poll() is None
        assert idle_process.poll() is None
        later.kill()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"broker": {"pid": "x"}}'])
def test_a_damaged_pid_file_is_ignored(tmp_path: Path, text: str) -> None:
    files = BrokerFiles(tmp_path)
    files.record.write_text(text)
    assert find_orphan(files, 1) is None


def test_a_failed_start_quotes_the_log_and_frees_the_folder(
    tmp_path: Path, formatted: BrokerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = BrokerFiles(tmp_path)
    files.logs.mkdir()
    meta = (formatted.logs / "meta.properties").read_text()
    (files.logs / "meta.properties").write_text(meta.replace("node.id=1", "node.id=7"))
    with pytest.raises(FatalError, match=r"(?s)ended while starting.*kafka\.log.*node") as caught:
        broker_in(tmp_path).start()
    assert "Exiting Kafka due to fatal exception" in str(caught.value)
    assert not files.record.exists()
    monkeypatch.setattr(ownership, "LOCK_SECONDS", 0.05)
    ownership.lock_folder(files).release()


def test_a_broker_that_never_serves_is_given_up(formatted: BrokerFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "START_SECONDS", 0.2)
    broker = broker_in(formatted.data_dir)
    with pytest.raises(FatalError, match=r"did not serve within 0\.2 s"):
        broker.start()
    assert not broker.is_running()
    assert not formatted.record.exists()


def test_nothing_can_be_asked_of_a_stopped_broker(tmp_path: Path) -> None:
    broker = broker_in(tmp_path)
    broker.stop()
    with pytest.raises(FatalError, match="not running"):
        _ = broker.pid
    with pytest.raises(FatalError, match="not running"):
        _ = broker.bootstrap_servers
