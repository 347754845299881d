"""The worker commands: build, serve metrics and health, run until told to stop, drain.

SIGTERM and SIGINT drain; a second one of them ends at once. A broker or store that is away at the start is waited
for, with ``/healthz`` up and ``/readyz`` off, as is the model while it loads.
"""

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import click

from oppu.cli import Session, compose
from oppu.cli.exposition import metrics_of
from oppu.cli.up import die_with_parent
from oppu.clock import SystemClock
from oppu.crash_guard import CrashGuard
from oppu.errors import TransientError
from oppu.health import START, Health, Server, serve
from oppu.logs import configure_logging
from oppu.loop import Loop
from oppu.metrics import Metrics
from oppu.settings import Settings
from oppu.worker import Worker

logger = logging.getLogger(__name__)
T = TypeVar("T")
_NAP_SECONDS = 0.2
_SWITCH_SECONDS = 0.0005
"""How long Python lets one thread keep the others waiting, a tenth of what is usual: the model's thread wants its turn
again after every operation, and would each time wait so long behind the one that embeds queries."""


@click.command()
@click.pass_obj
def ingest(session: Session) -> None:
    """Run an ingest worker: events in, stored, embedded, retrievable. Up to one a partition."""
    _run_consumer(session.settings, "ingest", compose.ingest_worker)


@click.command()
@click.pass_obj
def infer(session: Session) -> None:
    """Run an inference worker: requests in, predictions out. Give each machine's its own inference.slot."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    _run_consumer(session.settings, f"inference-{session.settings.inference.slot}", compose.inference_worker)


@click.command()
@click.pass_obj
def update(session: Session) -> None:
    """Run an updater: train the adapters of users who are due. Any number may run."""
    from updater.runner import UpdaterRunner

    settings = session.settings
    with _process(settings, "updater") as (metrics, health, stopping):
        worker = _wait_for(lambda: compose.updater(settings, metrics), settings, health, stopping)
        if worker is None:
            return
        runner = UpdaterRunner(worker, settings.updater, clock=SystemClock(), metrics=metrics, health=health)
        stopping.call(runner.stop)
        settle_heap()
        runner.run()


class _Stopping:
    """Turns the first signal into a drain and the second into the default."""

    def __init__(self) -> None:
        self.requested = False
        self._stop: Callable[[], None] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)

    def call(self, stop: Callable[[], None]) -> None:
        """Register what drains; called at once where the signal came before."""
        self._stop = stop
        if self.requested:
            stop()

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        if self._stop is not None:
            self._stop()


def _run_consumer(settings: Settings, name: str, build: Callable[[Settings, Metrics], Worker]) -> None:
    guard = CrashGuard.claim(compose.state_dir(settings), name)
    process = name if guard.slot == 0 else f"{name}.{guard.slot}"  # a further one has an address of its own
    with _process(settings, process) as (metrics, health, stopping):
        own = settings if name == "ingest" else _own_slot(settings, guard.slot)
        worker = _wait_for(lambda: build(own, metrics), settings, health, stopping)
        if worker is None:
            return
        loop = Loop(worker, settings=settings, clock=SystemClock(), metrics=metrics, health=health, guard=guard)
        stopping.call(loop.stop)
        settle_heap()
        loop.run()


def settle_heap() -> None:
    """Keep what start-up made out of later garbage collections.

    It stays to the end, and half a million objects of models and libraries make each full collection a pause of some
    300 ms, of all threads.
    """
    gc.collect()
    gc.freeze()


def _own_slot(settings: Settings, number: int) -> Settings:
    """Give a further process of this machine a transactional.id of its own: two of the same fence each other."""
    if number == 0:
        return settings
    slot = f"{settings.inference.slot}.{number}"  # no configured one has a dot
    logger.warning("inference.slot %s is taken on this machine, taking %s", settings.inference.slot, slot)
    return settings.model_copy(update={"inference": settings.inference.model_copy(update={"slot": slot})})


@contextmanager
def _process(settings: Settings, name: str) -> Iterator[tuple[Metrics, Health, _Stopping]]:
    die_with_parent()
    configure_logging(settings.service)
    if settings.service.key_is_public:
        logger.warning("service.deployment_key is a public one: anybody can tell which paths and log lines are whose")
    folder = compose.state_dir(settings)
    stage = name.partition(".")[0].partition("-")[0]
    stopping, metrics = _Stopping(), metrics_of(stage, list(compose.tasks(settings)))
    health = Health(SystemClock(), live_within_seconds=settings.service.live_within_seconds)
    server = serve(settings.service.metrics_host, settings.service.metrics_port, metrics.registry, health)
    address = _announce(folder, name, settings, server)
    try:
        yield metrics, health, stopping
        logger.info("%s drained", name)
    finally:
        address.unlink(missing_ok=True)
        server.close()


def _announce(folder: Path, name: str, settings: Settings, server: Server) -> Path:
    """Write where the metrics are, for ``oppu up`` and scripts: port 0 picks one that nobody knows before."""
    url = f"http://{settings.service.metrics_host}:{server.port}"
    logger.info("%s: metrics at %s/metrics", name, url)
    path = folder / f"{name}.url"
    path.write_text(url + "\n", encoding="utf-8")
    return path


def _wait_for(build: Callable[[], T], settings: Settings, health: Health, stopping: _Stopping) -> T | None:
    """Build the worker, for as long as broker or store are away."""
    delay, clock = 0.5, SystemClock()
    health.not_ready(START, "starting")
    while not stopping.requested:
        try:
            worker = build()
        except TransientError as error:
            logger.warning("cannot start yet, trying again in %.1f s: %s", delay, error)
            health.not_ready(START, "broker or store is away")
            again = clock.monotonic() + delay
            while not stopping.requested and clock.monotonic() < again:
                clock.sleep(_NAP_SECONDS)  # a signal does not end a sleep
            delay = min(2 * delay, settings.service.max_backoff_seconds)
        else:
            health.ready(START)
            return worker
    return None
