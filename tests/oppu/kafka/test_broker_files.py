"""Ports, properties and the probe, without a broker."""

import logging
import socket
import struct
import threading
from pathlib import Path

import pytest

from oppu.errors import ConfigError, FatalError
from oppu.kafka import broker_files
from oppu.kafka.broker_files import HOST, BrokerFiles, choose_ports, is_free
from oppu.kafka.probe import cluster_behind


def test_ports_are_chosen_once_and_kept(tmp_path: Path) -> None:
    chosen = BrokerFiles(tmp_path).claim_ports()
    assert chosen.broker != chosen.controller
    assert chosen.broker in broker_files.PORT_RANGE
    assert BrokerFiles(tmp_path).claim_ports() == chosen == BrokerFiles(tmp_path).kept_ports()


def test_a_taken_port_is_replaced_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = BrokerFiles(tmp_path)
    kept = files.claim_ports()
    with socket.socket() as foreign, caplog.at_level(logging.WARNING):
        foreign.bind((HOST, kept.broker))
        foreign.listen()
        assert not is_free(kept.broker)
        chosen = files.claim_ports()
    assert chosen.broker != kept.broker
    assert "taken by another process" in caplog.text
    assert files.claim_ports() == chosen


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"broker": "x", "controller": 1}'])
def test_a_damaged_port_file_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "ports.json").write_text(text)
    files = BrokerFiles(tmp_path)
    assert files.kept_ports() is None
    assert files.claim_ports() == files.kept_ports()


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_files, "is_free", lambda port: False)
    with pytest.raises(FatalError, match="no free port"):
        choose_ports(2)


def test_properties_are_written_as_java_reads_them(tmp_path: Path) -> None:
    files = BrokerFiles(tmp_path / "a b\\ü 😀")
    files.write_properties(files.claim_ports())
    text = files.properties.read_bytes().decode("ascii")
    assert "a b\\\\\\u00fc \\ud83d\\ude00/logs\n" in text
    listeners = [line for line in text.splitlines() if "listeners=" in line or "voters=" in line]
    assert len(listeners) == 3
    assert all(HOST in line and "0.0.0.0" not in line for line in listeners)


def test_paths_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="comma"):
        BrokerFiles(tmp_path / "a,b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        BrokerFiles(tmp_path / "file" / "data")


def test_a_log_folder_that_kafka_did_not_format_is_not_touched(tmp_path: Path) -> None:
    files = BrokerFiles(tmp_path)
    files.logs.mkdir()
    (files.logs / "precious").write_text("x")
    with pytest.raises(FatalError, match="was not formatted"):
        files.format(["false"], files.claim_ports())
    assert (files.logs / "precious").exists()


def test_a_format_that_fails_leaves_no_log_folder(tmp_path: Path) -> None:
    files = BrokerFiles(tmp_path)
    with pytest.raises(FatalError, match="failed with 3: why"):
        files.format(["sh", "-c", "echo why; exit 3"], files.claim_ports())
    with pytest.raises(FatalError, match="could not be run"):
        files.format([str(tmp_path / "no-java")], files.claim_ports())
    assert files.cluster_id() is None
    assert not files.logs.exists()


def test_the_log_is_rotated_and_its_end_quoted(tmp_path: Path) -> None:
    files = BrokerFiles(tmp_path)
    assert files.log_tail() == "(no log)"
    files.rotate_log()
    files.log.write_text("".join(f"line {n}\n" for n in range(30)))
    assert files.log_tail(2) == "line 28\nline 29"
    files.rotate_log()
    assert not files.log.exists()
    assert (tmp_path / "kafka.log.1").exists()


def answering(answer: bytes) -> tuple[threading.Thread, int]:
    """Serve one connection with these bytes."""
    listener = socket.create_server((HOST, 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(1024)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread, listener.getsockname()[1]


def test_a_closed_port_is_no_broker() -> None:
    assert cluster_behind(HOST, choose_ports(1)[0], 0.5) is None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        struct.pack(">i", 2**30),
        struct.pack(">i", 100) + b"short",
        struct.pack(">iii", 8, 1, 1),
        struct.pack(">iiih2sh", 14, 1, 0, 2, b"id", 0),  # a broker that is still fenced lists none
    ],
)
def test_other_answers_are_no_broker(answer: bytes) -> None:
    thread, port = answering(answer)
    assert cluster_behind(HOST, port, 0.5) is None
    thread.join()


def test_a_broker_is_told_by_its_cluster_and_its_address() -> None:
    def metadata(port: int) -> bytes:
        body = struct.pack(">iiih9sihh2si", 1, 1, 1, 9, HOST.encode(), port, -1, 2, b"id", 1)
        return struct.pack(">i", len(body)) + body

    thread, port = answering(metadata(1))
    assert cluster_behind(HOST, port, 0.5) is None  # advertises another address
    thread.join()
    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(1024)
            connection.sendall(metadata(port))

    thread = threading.Thread(target=serve)
    thread.start()
    assert cluster_behind(HOST, port, 30.0) == "id"
    thread.join()
