"""Who runs the broker of a data folder: the lock, the pid file, and what to do about a broker without an owner.

A process is ours only where its id, start time and command line all fit the pid file, so that a reused id is never
mistaken for our broker. Imports the extra's packages: imported only once they are known to be there.
"""

import contextlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from oppu.errors import ConfigError
from oppu.kafka.broker_files import BrokerFiles

logger = logging.getLogger(__name__)

START_TOLERANCE_SECONDS = 5.0
"""A start time is derived from the boot time, which moves when the clock is set right."""

LOCK_SECONDS = 3.0
"""A folder's lock is held as long as its broker runs; the wait only covers one that is just stopping."""
DYING_SECONDS = 3.0
"""Where the kernel signals a broker whose keeper died, it needs about half a second to go."""
LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process id with the time (seconds since the epoch) at which that process started."""

    pid: int
    started: float


@dataclass(frozen=True, slots=True)
class BrokerRecord:
    """The pid file: the broker, its keeper, the process it was started for, and where it serves."""

    broker: ProcessId
    keeper: ProcessId
    owner: int
    bootstrap_servers: str


def lock_folder(files: BrokerFiles) -> FileLock:
    """Become the owner of a data folder until the lock is released or this process ends, however it ends.

    Args:
        files: The folder.

    Returns:
        The held lock.

    Raises:
        ConfigError: Another process is the owner (the message says which, and where its broker serves), or the
            folder cannot be written.
    """
    lock = FileLock(files.lock, thread_local=False)  # start and stop may come from different threads
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        record = read_record(files.record)
        detail = f" by process {record.owner} and serves on {record.bootstrap_servers}" if record else ""
        raise ConfigError(f"the broker in {files.data_dir} is already run{detail}") from error
    except OSError as error:
        raise ConfigError(f"the data folder {files.data_dir} cannot be written: {error}") from error
    return lock


def find_orphan(files: BrokerFiles, wait_seconds: float) -> int | None:
    """Find a broker of ours that nobody owns; the caller holds the lock.

    Args:
        files: Its data folder.
        wait_seconds: How long its keeper, which ends the broker once the owner is gone, may take to do so.

    Returns:
        The process id, or none where there is none that goes on running.
    """
    record = read_record(files.record)
    if record is None:
        return None
    keeper = find_ours(record.keeper, files.record)
    if keeper is not None:
        logger.info("waiting for the broker of an earlier process to end")
        if not _ended_within(keeper, wait_seconds):
            logger.warning("process %d hangs: killed", keeper.pid)
            keeper.kill()
    broker = find_ours(record.broker, files.properties)
    return None if broker is None or _ended_within(broker, DYING_SECONDS) else broker.pid


def end_orphan(files: BrokerFiles, grace_seconds: float) -> None:
    """Stop the broker that the pid file names, where it is ours: SIGTERM, then SIGKILL after the grace."""
    record = read_record(files.record)
    broker = find_ours(record.broker, files.properties) if record else None
    if broker is not None:
        _end(broker, grace_seconds)


def read_record(path: Path) -> BrokerRecord | None:
    """Return what the pid file says; none where there is none or it cannot be understood."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        broker, keeper = (ProcessId(int(raw[n]["pid"]), float(raw[n]["started"])) for n in ("broker", "keeper"))
        return BrokerRecord(broker, keeper, int(raw["owner"]), str(raw["bootstrap_servers"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the pid file %s is damaged (%s): ignored", path, error)
        return None


def find_ours(process: ProcessId, argument: Path) -> psutil.Process | None:
    """Find a process of ours that still runs.

    Args:
        process: From the pid file.
        argument: A path of our data folder that the command line must contain.

    Returns:
        The process, or none where it ended or its id now belongs to another.
    """
    try:
        found = psutil.Process(process.pid)
        if not _is_alive(found):
            return None
        same_start = abs(found.create_time() - process.started) <= START_TOLERANCE_SECONDS
        if same_start and any(str(argument) in part for part in found.cmdline()):
            return found
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        logger.debug("process %d belongs to another user", process.pid)
    logger.warning("process %d is not our broker: left alone", process.pid)
    return None


def _end(process: psutil.Process, grace_seconds: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        if not _ended_within(process, grace_seconds):
            logger.warning("process %d did not stop within %g s: killed", process.pid, grace_seconds)
            process.kill()
            _ended_within(process, grace_seconds)


def _ended_within(process: psutil.Process, seconds: float) -> bool:
    """Wait for a process to end; a zombie has ended, though the first process of some containers never reaps it."""
    deadline = time.monotonic() + seconds
    while _is_alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
