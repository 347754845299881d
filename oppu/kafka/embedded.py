"""A real single-node Kafka that lives in a data folder and as long as the process that started it.

One owner a folder, by a lock that the kernel drops with its holder. The broker dies with its owner; one that was left
behind nevertheless is adopted where it is healthy and otherwise stopped by its id. A process is only ever
touched where its id, start time and command line all say that it is ours. Survives ``kill -9``; power loss may cost
acknowledged records, since Kafka does not force each to disk.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, cast

from oppu.errors import FatalError
from oppu.kafka.broker_files import HOST, BrokerFiles, Ports, java_command
from oppu.kafka.jars import kafka_jars, require_extra
from oppu.kafka.probe import cluster_behind

if TYPE_CHECKING:
    from filelock import FileLock

    from oppu.kafka.supervise import Order

logger = logging.getLogger(__name__)

START_SECONDS = 90.0
"""After an unclean stop of a busy machine Kafka checks its logs first; two to seven seconds are usual."""
STOP_SECONDS = 30.0
"""From SIGTERM to SIGKILL; half a second is usual."""
KEEPER_EXTRA_SECONDS = 5.0
PROBE_EVERY_SECONDS = 0.05
KEEPER = Path(__file__).with_name("supervise.py")


class EmbeddedBroker:
    """One broker in one data folder.

    Args:
        data_dir: Its logs, ports, pid file and ``kafka.log``; created where missing.
        heap_megabytes: Java's ``-Xmx``.
        jars_dir: Where checked jars are kept; none = the user's cache.
    """

    def __init__(self, data_dir: Path, *, heap_megabytes: int = 512, jars_dir: Path | None = None) -> None:
        self.data_dir = data_dir
        self.adopted = False
        self._heap_megabytes = heap_megabytes
        self._jars_dir = jars_dir
        self._pid: int | None = None
        self._ports: Ports | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._lock: FileLock | None = None

    @property
    def pid(self) -> int:
        """The broker's process id."""
        if self._pid is None:
            raise FatalError("the embedded broker is not running")
        return self._pid

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect, as ``host:port``."""
        if self._ports is None:
            raise FatalError("the embedded broker is not running")
        return f"{HOST}:{self._ports.broker}"

    def is_running(self) -> bool:
        """Tell whether the broker that :meth:`start` returned is still there."""
        return self._keeper is not None and self._keeper.poll() is None

    def start(self) -> str:
        """Start the broker, or adopt a healthy one left behind in this folder, and wait until it serves.

        Returns:
            Where clients connect, as ``host:port``. The port is the one of earlier starts, unless another
            process holds it now: then a new one is chosen, kept, and logged as a warning.

        Raises:
            ConfigError: The extra is missing, or another process runs the broker of this folder.
            FatalError: The jars are wrong or cannot be had, or Kafka does not start; the end of its log is quoted.
        """
        if self.is_running():
            return self.bootstrap_servers
        self.stop()  # after a crash: lets go of what the dead broker left
        require_extra()
        files = BrokerFiles(self.data_dir)
        java = java_command(kafka_jars(self._jars_dir), self._heap_megabytes)
        from oppu.kafka.ownership import lock_folder  # imported here: needs the extra, checked above

        self._lock = lock_folder(files)
        try:
            if not self._adopt(files):
                self._launch(files, java)
        except BaseException:
            self.stop()
            raise
        return self.bootstrap_servers

    def stop(self) -> None:
        """Stop the broker and free the folder; does nothing where it does not run. Data and ports stay."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            self._end(keeper)
        self._pid, self._ports, self.adopted = None, None, False
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def __enter__(self) -> "EmbeddedBroker":
        """Start it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    def _adopt(self, files: BrokerFiles) -> bool:
        from oppu.kafka.ownership import end_orphan, find_orphan

        orphan, ports = find_orphan(files, STOP_SECONDS + KEEPER_EXTRA_SECONDS), files.kept_ports()
        if orphan is None:
            return False
        if ports is None or cluster_behind(HOST, ports.broker) != files.cluster_id():
            logger.warning("stopping the unhealthy broker %d left behind in %s", orphan, files.data_dir)
            end_orphan(files, STOP_SECONDS)
            return False
        logger.info("adopting the broker %d left behind in %s", orphan, files.data_dir)
        self._ports, self.adopted = ports, True
        self._keep(files, command=[], pid=orphan)
        return True

    def _launch(self, files: BrokerFiles, java: Sequence[str]) -> None:
        self._ports = files.claim_ports()
        files.format(java, self._ports)
        files.write_properties(self._ports)
        files.rotate_log()
        started = time.monotonic()
        self._keep(files, command=[*java, "kafka.Kafka", str(files.properties)], pid=0)
        self._await_ready(files, started + START_SECONDS)
        logger.info(
            "Kafka serves on %s after %.1f s (pid %d, data in %s)",
            *(self.bootstrap_servers, time.monotonic() - started, self.pid, files.data_dir),
        )

    def _keep(self, files: BrokerFiles, *, command: Sequence[str], pid: int) -> None:
        order: Order = {
            "parent": os.getpid(),
            "command": list(command),
            "pid": pid,
            "record": str(files.record),
            "log": str(files.log),
            "grace_seconds": STOP_SECONDS,
            "bootstrap_servers": self.bootstrap_servers,
        }
        with files.log.open("ab") as log:
            self._keeper = subprocess.Popen(  # noqa: S603 - our own script
                # -P: this folder's modules must not shadow others'
                [sys.executable, "-P", str(KEEPER), json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=files.data_dir,
                start_new_session=True,  # a terminal's Ctrl-C is for the workers first, not for their broker
            )
        with cast(IO[bytes], self._keeper.stdout) as answer:
            line = answer.readline()
        if not line.strip().isdigit():
            raise FatalError(f"the broker's keeper failed; the end of {files.log}:\n{files.log_tail()}")
        self._pid = int(line)

    def _await_ready(self, files: BrokerFiles, deadline: float) -> None:
        ports, cluster = self._ports, files.cluster_id()
        while ports is not None and cluster_behind(HOST, ports.broker) != cluster:
            if not self.is_running():
                raise FatalError(f"Kafka ended while starting; the end of {files.log}:\n{files.log_tail()}")
            if time.monotonic() > deadline:
                raise FatalError(
                    f"Kafka did not serve within {START_SECONDS:g} s; the end of {files.log}:\n{files.log_tail()}"
                )
            time.sleep(PROBE_EVERY_SECONDS)

    def _end(self, keeper: subprocess.Popen[bytes]) -> None:
        from oppu.kafka.ownership import end_orphan

        keeper.terminate()
        if keeper.stdin is not None:
            keeper.stdin.close()
        try:
            keeper.wait(STOP_SECONDS + KEEPER_EXTRA_SECONDS)
        except subprocess.TimeoutExpired:
            logger.error("the broker's keeper %d hangs: ending the broker without it", keeper.pid)
            end_orphan(BrokerFiles(self.data_dir), STOP_SECONDS)
            keeper.kill()
            keeper.wait()
