"""The broker's keeper: a small process of its own that ends the broker once the process that wanted it is gone.

Run as a script with one JSON argument (:class:`Order`); needs nothing of this project, so that it starts fast.
It holds the read end of a pipe whose write end dies with the parent, whichever of the parent's threads made it: the
kernel's own "signal me when my parent dies" follows the *thread*, so it is used only between keeper and broker,
where there is one thread. Stops the broker by SIGTERM, and by SIGKILL after the grace.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TypedDict

import psutil  # type: ignore[import-untyped]

LOOK_SECONDS = 0.5
"""How often the parent's and an adopted broker's life is looked at, beside the events that wake us at once."""
END_LOOK_SECONDS = 0.02

PR_SET_PDEATHSIG = 1


class Order(TypedDict):
    """What the keeper is to do: start ``command``, or, where that is empty, keep the running ``pid``."""

    parent: int
    command: list[str]
    pid: int
    record: str
    log: str
    grace_seconds: float
    bootstrap_servers: str


def main(order: Order) -> int:
    """Keep the broker until it ends, a signal comes, or the parent is gone.

    Args:
        order: From the parent.

    Returns:
        0 where we ended the broker, 1 where it ended by itself.
    """
    wake = _Wake()
    broker = _spawn(order) if order["command"] else psutil.Process(order["pid"])
    asked = True
    try:
        _write_record(order, broker)
        sys.stdout.write(f"{broker.pid}\n")
        sys.stdout.flush()  # fails where the parent is gone already
        asked = _keep(broker, wake, order["parent"])
    finally:
        if asked:
            _end(broker, order["grace_seconds"])
        Path(order["record"]).unlink(missing_ok=True)
    return 0 if asked else 1


def _spawn(order: Order) -> psutil.Process:
    keeper = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before the fork, where it is safe

    def die_with_keeper() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != keeper:  # it died before the call took effect
                os._exit(1)

    with Path(order["log"]).open("ab") as log:
        child = psutil.Popen(
            order["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_keeper,  # safe: this process has one thread
        )
    return child


def _write_record(order: Order, broker: psutil.Process) -> None:
    record = {
        "broker": {"pid": broker.pid, "started": broker.create_time()},
        "keeper": {"pid": os.getpid(), "started": psutil.Process().create_time()},
        "owner": order["parent"],
        "bootstrap_servers": order["bootstrap_servers"],
    }
    path = Path(order["record"])
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(record), encoding="utf-8")
    part.replace(path)


class _Wake:
    """Makes ``select`` return on a signal, and notes whether one asked us to end."""

    def __init__(self) -> None:
        self.asked = False
        self.reader, writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked |= number != signal.SIGCHLD


def _keep(broker: psutil.Process, wake: _Wake, parent: int) -> bool:
    """Wait; tell whether we are to end the broker, else it ended by itself."""
    while True:
        # the parent's id is looked at too: children it forked may hold the pipe open beyond its end
        readable, _, _ = select.select([0, wake.reader], [], [], LOOK_SECONDS)
        if wake.reader in readable:
            os.read(wake.reader, 4096)
        if wake.asked or os.getppid() != parent or (0 in readable and not os.read(0, 4096)):
            return True
        if not _alive(broker):
            return False


def _alive(broker: psutil.Process) -> bool:
    if isinstance(broker, psutil.Popen):
        return broker.poll() is None
    try:
        return bool(broker.is_running() and broker.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(broker: psutil.Process, grace_seconds: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        broker.terminate()
        if not _ended_within(broker, grace_seconds):
            broker.kill()
            _ended_within(broker, grace_seconds)


def _ended_within(broker: psutil.Process, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _alive(broker):
        if time.monotonic() > deadline:
            return False
        time.sleep(END_LOOK_SECONDS)
    return True


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
