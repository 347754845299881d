"""``oppu up``: broker, topics, store and the workers, supervised on one machine.

Each worker is a process of its own, restarted with a growing delay when it dies. Everything ends with this process:
on SIGTERM in order, on kill -9 because the children die with their parent.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oppu.cli import Session
from oppu.cli.stack_settings import apart, write_config
from oppu.errors import ConfigError, FatalError
from oppu.settings import Settings

if TYPE_CHECKING:
    from oppu.kafka.embedded import EmbeddedBroker

logger = logging.getLogger(__name__)

WORKERS = ("ingest", "update", "infer")
FIRST_RESTART_SECONDS, LAST_RESTART_SECONDS = 0.2, 10.0
STEADY_SECONDS = 30.0
"""A worker that ran so long starts its delays afresh."""
LOOK_AT_BROKER_SECONDS = 0.5
READY_SECONDS = 120.0
DRAIN_SECONDS = 20.0
"""Time for a worker to finish its step before it is killed; a train batch takes a few seconds."""


@click.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), default=Path(".oppu"), show_default=True)
@click.option(
    "--inference-workers",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Share the requests; one uses all cores, unless OPPU_MODEL__THREADS says fewer.",
)
@click.pass_obj
def up(session: Session, folder: Path, *, inference_workers: int) -> None:
    """Run everything on this machine until interrupted."""
    from oppu.logs import configure_logging

    with apart(tell=False):
        configure_logging(session.settings.service)
    stop: queue.SimpleQueue[int] = queue.SimpleQueue()  # an event's lock may be held where the signal comes
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: stop.put(number))
    with stack(session, folder, workers=(*WORKERS, *("infer",) * (inference_workers - 1))) as running:
        click.echo(f"Kafka at {running.bootstrap_servers}; data in {folder}; Ctrl-C stops everything.")
        click.echo(f"In another terminal: export OPPU_CONFIG={running.config}")
        while not _asked_to_stop(stop, LOOK_AT_BROKER_SECONDS):
            running.keep_broker()
        click.echo("Stopping …")


def _asked_to_stop(stop: "queue.SimpleQueue[int]", seconds: float) -> bool:
    try:
        stop.get(timeout=seconds)
    except queue.Empty:
        return False
    return True


@dataclass
class Child:
    """One supervised worker process; ``name`` is its own, ``command`` what it runs."""

    name: str
    command: str
    process: subprocess.Popen[bytes]
    started: float
    delay: float = FIRST_RESTART_SECONDS
    restart_at: float | None = None
    restarts: int = 0


@dataclass
class Stack:
    """What ``oppu up`` runs. ``config`` is a settings file with which every other command finds it."""

    bootstrap_servers: str
    settings: Settings
    config: Path
    folder: Path
    environment: Mapping[str, str] = field(repr=False)  # of the workers
    kafka: "EmbeddedBroker"
    children: dict[str, Child] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    changing: threading.Lock = field(default_factory=threading.Lock)

    def start_workers(self, names: Sequence[str] = WORKERS) -> None:
        """Start the workers and watch over them; a name that comes again is a further process of the same."""
        for place, command in enumerate(names):
            again = names[:place].count(command)
            name = f"{command}-{again + 1}" if again else command
            self.children[name] = Child(name, command, self._spawn(name, command), time.monotonic())
        threading.Thread(target=self._supervise, name="supervisor", daemon=True).start()

    def addresses(self) -> dict[str, str]:
        """Wait until all workers are ready.

        Returns:
            The URL of each one's ``/metrics`` and ``/readyz``, without the path, by what it calls itself: ``ingest``,
            ``updater``, ``inference-0``, and further ones of the machine ``inference-0.1`` and so on.

        Raises:
            FatalError: One of them is not ready in time.
        """
        waiting, found = self._own_names(), dict[str, str]()
        deadline = time.monotonic() + READY_SECONDS
        while True:
            for name in list(waiting):
                url = _ready_at(self.settings.service.state_dir / f"{name}.url")
                if url is not None:
                    found[name] = url
                    del waiting[name]
            if not waiting:
                return found
            if time.monotonic() > deadline:
                logs = ", ".join(str(self._log(child)) for child in waiting.values())
                raise FatalError(f"not ready within {READY_SECONDS:g} s: {', '.join(waiting)}; see {logs}")
            time.sleep(0.1)

    def _own_names(self) -> dict[str, str]:
        """Return what the workers call themselves, with the name of a child that is the one or another like it."""
        stems = {"ingest": "ingest", "update": "updater", "infer": f"inference-{self.settings.inference.slot}"}
        names: dict[str, str] = {}
        for child in self.children.values():
            stem, again = stems[child.command], child.name.removeprefix(child.command).removeprefix("-")
            names[f"{stem}.{int(again) - 1}" if again else stem] = child.name
        return names

    def keep_broker(self) -> None:
        """Start the broker again where it has died; the workers wait for it meanwhile.

        Raises:
            FatalError: It does not start, or not at the address that everybody knows.
        """
        if self.kafka.is_running():
            return
        logger.error("Kafka ended by itself; its log is %s; starting it again", self.kafka.data_dir / "kafka.log")
        if self.kafka.start() != self.bootstrap_servers:
            raise FatalError(f"Kafka's address {self.bootstrap_servers} was taken by another process: start again")

    def stop(self) -> None:
        """Let every worker drain, then kill what is left."""
        with self.changing:
            self.stopping.set()
        try:
            self._drain()
        finally:
            self.stopped.set()

    def _drain(self) -> None:
        alive = [child.process for child in self.children.values() if child.process.poll() is None]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + DRAIN_SECONDS
        for process in alive:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _supervise(self) -> None:
        """Look after the workers; lives until the last has ended, since a child dies with the thread that made it."""
        while not self.stopped.wait(0.1):
            with self.changing:
                if self.stopping.is_set():
                    continue
                now = time.monotonic()
                for child in self.children.values():
                    self._look_after(child, now)

    def _look_after(self, child: Child, now: float) -> None:
        code = child.process.poll()
        if code is None:
            return
        if child.restart_at is None:
            if now - child.started > STEADY_SECONDS:
                child.delay = FIRST_RESTART_SECONDS
            child.restart_at = now + child.delay
            child.delay = min(2 * child.delay, LAST_RESTART_SECONDS)
            logger.warning("%s ended with %s; its log is %s", child.name, code, self._log(child.name))
        elif now >= child.restart_at:
            child.process, child.started, child.restart_at = self._spawn(child.name, child.command), now, None
            child.restarts += 1

    def _spawn(self, name: str, worker: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "oppu", "--config", str(self.config), worker]
        with self._log(name).open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own command line
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, "OPPU_PARENT": str(os.getpid())},
                start_new_session=True,  # Ctrl-C reaches us alone; we stop the workers in order
            )

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@contextlib.contextmanager
def stack(session: Session, folder: Path, *, workers: Sequence[str] = WORKERS, overrides: str = "") -> Iterator[Stack]:
    """Start broker, topics, store and workers, and stop them on leaving.

    Args:
        session: The command's session; its settings file is merged into the written one.
        folder: Holds everything: Kafka's log, store, adapters, worker logs, the settings file.
        workers: Which workers to start.
        overrides: TOML text put after the session's own. It and what ties the workers to this folder stand against
            environment variables too, which elsewhere win over a settings file.

    Yields:
        The running stack.

    Raises:
        ConfigError: The folder cannot be used.
    """
    from oppu.cli.operation import create_topics
    from oppu.kafka.embedded import EmbeddedBroker
    from oppu.store.sql import migrate

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # all in it is users' text, or tells of users
    except OSError as error:
        raise ConfigError(f"--dir: cannot make {folder}: {error.strerror}") from error
    folder = folder.resolve()
    with EmbeddedBroker(folder / "kafka") as kafka:
        config = write_config(session, folder, kafka.bootstrap_servers, overrides)
        with apart(overrides):
            settings, environment = Settings.load(config), dict(os.environ)
        migrate(settings.store)
        create_topics(settings)
        running = Stack(kafka.bootstrap_servers, settings, config, folder, environment, kafka)
        running.start_workers(workers)
        try:
            yield running
        finally:
            running.stop()


def _ready_at(place: Path) -> str | None:
    """Return the address in a worker's file where it says there that it is ready."""
    try:
        url = place.read_text(encoding="utf-8").strip()
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as response:  # noqa: S310 - our own loopback address
            return url if response.status == HTTPStatus.OK else None
    except (OSError, ValueError, HTTPException):  # no file yet, half a file, nobody there, or somebody else
        return None


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends (Linux; elsewhere nothing happens).

    A parent that died before the call is noticed by comparing ``OPPU_PARENT``.
    """
    expected = os.environ.get("OPPU_PARENT")
    if expected is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(expected):
        os.kill(os.getpid(), signal.SIGKILL)
