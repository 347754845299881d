"""The shell around the updater: it owns the schedule, retries and the drain. The only module that imports APScheduler.

The scheduled tick only says "look now": what is due lives in the store, so that a late or missed tick loses nothing.
Ticks run in the caller's thread, one after another, until nothing is due. A ``TransientError`` is retried for ever
with capped backoff; every other error leaves :meth:`UpdaterRunner.run`.
"""

import logging
import queue
from collections.abc import Callable
from datetime import UTC
from typing import Any, Protocol

from apscheduler.schedulers.background import BackgroundScheduler

from oppu.clock import Clock, next_look
from oppu.effects import Steps, perform
from oppu.errors import TransientError
from oppu.metrics import Metrics
from oppu.settings import UpdaterSettings
from updater.worker import Updater

logger = logging.getLogger(__name__)

WORKER = "updater"
"""Its name in metrics and in ``/readyz``."""
NAP_SECONDS = 0.5
"""How often the loop shows that it is alive while nothing is due."""
GAUGES_SECONDS = 5.0
"""While there is much to train, totals are read from the store no more often than this."""
FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 10.0


class Vitals(Protocol):
    """Where the runner says how it is; ``oppu.health.Health``."""

    def alive(self) -> None:
        """Note that the work advanced."""
        ...

    def ready(self, part: str) -> None:
        """Say that a part can do its work."""
        ...

    def not_ready(self, part: str, reason: str) -> None:
        """Say that a part cannot do its work for now."""
        ...


class UpdaterRunner:
    """Runs an updater until it is told to stop."""

    def __init__(
        self,
        updater: Updater,
        settings: UpdaterSettings,
        *,
        clock: Clock,
        metrics: Metrics,
        health: Vitals,
        drive: Callable[[Steps[Any]], Any] = perform,
    ) -> None:
        """Take an updater; nothing runs yet.

        Args:
            updater: What ticks; its heartbeats are passed on to ``health``.
            settings: The schedule.
            clock: Time for ticks and backoff.
            metrics: Gauges and retry counts.
            health: Liveness and readiness.
            drive: Performs a tick's effects.
        """
        self._updater = updater
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._health = health
        self._drive = drive
        # its put is safe in a signal handler, an event's set is not
        self._looks: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopping = False
        self._opened = False
        self._attempts = 0
        self._retry_at = self._gauges_at = self._gauges_idle_at = clock.monotonic()
        updater.alive = health.alive

    def look(self) -> None:
        """Ask for a look at what is due, soon."""
        self._looks.put(None)

    def stop(self) -> None:
        """Drain: training is given up at its next step, what is trained is finished; safe in a signal handler."""
        self._stopping = True
        self._updater.drain()
        self._looks.put(None)

    def run(self) -> None:
        """Run until :meth:`stop`; returns once drained.

        Raises:
            FatalError: The worker must not go on.
        """
        scheduler = self._schedule()
        try:
            self._set_ready(reason="opening")
            scheduler.start()
            self.look()
            while not self._stopping:
                self._wait()
                self.catch_up()
        finally:
            self._set_ready(reason="stopped")
            if scheduler.running:
                scheduler.shutdown(wait=True)  # its one job never blocks

    def catch_up(self) -> int:
        """Run ticks until nothing is due, the store fails, or the worker stops.

        Returns:
            How many users were claimed.
        """
        claimed = 0
        while not self._stopping and self._clock.monotonic() >= self._retry_at:
            self._health.alive()
            try:
                of_tick = self._tick()
            except TransientError as error:
                self._failed(error)
                break
            self._recovered()
            claimed += of_tick
            if not of_tick:
                break
        return claimed

    def _tick(self) -> int:
        if not self._opened:
            self._drive(self._updater.open())
            self._opened = True
        claimed: int = self._drive(self._updater.tick(self._clock.now())).claimed
        began = self._clock.monotonic()
        if began >= (self._gauges_at if claimed else self._gauges_idle_at):
            self._refresh_gauges()
            ended = self._clock.monotonic()
            self._gauges_at = next_look(began, ended, every_seconds=GAUGES_SECONDS)
            self._gauges_idle_at = next_look(began, ended, every_seconds=0.0)
        return claimed

    def _refresh_gauges(self) -> None:
        """Show totals of the store: every updater shows the same, and a restart changes none."""
        store, base = self._updater.store, self._updater.model.base
        due = store.due_count(base, now=self._clock.now(), min_pending=self._settings.min_pending)
        lift, held = store.lift(base), store.counts().get("held", 0)
        self._metrics.due.set(due)
        self._metrics.rolled_back.set(held)
        self._metrics.lift_events.set(lift.events)
        for arm, loss, correct in (
            ("live", lift.loss_live, lift.correct_live),
            ("none", lift.loss_none, lift.correct_none),
        ):
            self._metrics.lift_loss.labels(arm).set(loss)
            self._metrics.lift_correct.labels(arm).set(correct)

    def _schedule(self) -> BackgroundScheduler:
        scheduler = BackgroundScheduler(timezone=UTC)
        scheduler.add_job(
            self.look,
            "interval",
            seconds=self._settings.interval_seconds,
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None,
        )
        return scheduler

    def _wait(self) -> None:
        """Wait for a look, awake often enough for ``/healthz`` and for a retry to be on time."""
        pause = NAP_SECONDS
        if self._attempts:
            pause = min(max(self._retry_at - self._clock.monotonic(), 0.0), NAP_SECONDS)
        looked = False
        while not looked and not self._stopping:
            self._health.alive()
            try:
                self._looks.get(timeout=pause)
                looked = True
            except queue.Empty:
                looked = bool(self._attempts) and self._clock.monotonic() >= self._retry_at
        while not self._looks.empty():  # one look answers all that were asked for
            self._looks.get_nowait()

    def _failed(self, error: TransientError) -> None:
        delay = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(self._attempts, 30))
        self._attempts += 1
        self._retry_at = self._clock.monotonic() + delay
        kind = type(error).__name__
        self._metrics.worker_retries.labels(WORKER, kind).inc()
        self._set_ready(reason=f"retrying after {kind}")
        logger.warning("updater: trying again in %.1f s: %s", delay, error)

    def _recovered(self) -> None:
        if self._attempts:
            logger.info("updater: working again")
        self._attempts = 0
        self._set_ready(reason=None)

    def _set_ready(self, *, reason: str | None) -> None:
        self._metrics.worker_ready.labels(WORKER).set(0 if reason else 1)
        if reason:
            self._health.not_ready(WORKER, reason)
        else:
            self._health.ready(WORKER)
