"""The loop around a steppable worker: it owns network, clock, retries and the records not taken yet.

``NEW → RUNNING``, ``RUNNING ⇄ RECOVERING``, any → ``CLOSED``. Invariant: a record is offered again only after every
earlier one of its partition is finished or held, and nothing is offered between a ``TransientError`` and the end of
``recover``. Signals are the caller's: they call :meth:`Loop.stop`.
"""

import logging
import random
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol, TypeVar

from oppu.clock import Clock
from oppu.crash_guard import Guard
from oppu.effects import Steps, perform
from oppu.errors import (
    Backpressure,
    FatalError,
    IllegalTransition,
    ModelLost,
    OffsetConflict,
    OffsetOutOfRange,
    ProducerFenced,
    TransientError,
)
from oppu.health import Health
from oppu.held import Held, next_offsets
from oppu.metrics import Metrics
from oppu.settings import Settings
from oppu.values import Partition, Record
from oppu.watchdog import Watchdog
from oppu.worker import StepOutcome, Worker

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_BACKOFF_SECONDS = 0.1
"""A leader election or a short lock is over by then; it doubles up to ``service.max_backoff_seconds``."""

SETTLED_SECONDS = 1.0
"""Working for so long without an error ends a back-off, where no record came to prove it earlier."""

LAG_EVERY_SECONDS = 5.0
"""End offsets are a request to the broker, and a scrape comes every 10 s or less often."""

SHORTEST_POLL_SECONDS = 0.005
"""Of a poll while there is work: a client with every partition paused sleeps as long as it may, but one that is joining
its group needs some time."""

NAP_SECONDS = 0.2
"""Longest pause while there is no client to poll, so that :meth:`Loop.stop` is heard in time."""


class LoopState(StrEnum):
    """Where the loop stands."""

    NEW = "new"  # no clients are open
    RUNNING = "running"  # polls and steps
    RECOVERING = "recovering"  # after a transient error: heartbeats only, until durable offsets are reread
    CLOSED = "closed"  # drained, or left by an error


_EDGES: dict[LoopState, frozenset[LoopState]] = {
    LoopState.NEW: frozenset({LoopState.RUNNING, LoopState.CLOSED}),
    LoopState.RUNNING: frozenset({LoopState.RECOVERING, LoopState.NEW, LoopState.CLOSED}),
    LoopState.RECOVERING: frozenset({LoopState.RUNNING, LoopState.CLOSED}),
    LoopState.CLOSED: frozenset(),
}

_KINDS = (OffsetConflict, ProducerFenced, OffsetOutOfRange)


class Drive(Protocol):
    """Runs a step to its end; :func:`oppu.effects.perform`, or the simulator's own with faults."""

    def __call__(self, steps: Steps[T], /) -> T:
        """Perform the effects and return what the step returns."""
        ...


class Loop:
    """Runs one worker."""

    def __init__(  # noqa: PLR0913 - everything impure arrives here, once, from the composition root
        self,
        worker: Worker,
        *,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        health: Health,
        guard: Guard,
        jitter: Callable[[], float] = random.random,
        drive: Drive = perform,
    ) -> None:
        self._worker = worker
        self._kafka = settings.kafka
        self._max_backoff = settings.service.max_backoff_seconds
        self._clock, self._metrics, self._health, self._guard = clock, metrics, health, guard
        self._jitter, self._drive = jitter, drive
        self._state = LoopState.NEW
        self._stopping = False
        self._held = Held()
        self._held_under: tuple[int, str] | None = None  # the membership under which records were held
        self._paused: frozenset[Partition] = frozenset()
        self._error: TransientError | None = None
        self._more = False
        self._attempts = 0
        self._retry_at = self._recovered_at = self._lag_at = clock.monotonic()
        self._steady = False
        self._watchdog = Watchdog(metrics.lag, worker.name, stuck_after_seconds=settings.kafka.stuck_after_seconds)
        health.not_ready("loop", "starting")

    @property
    def state(self) -> LoopState:
        """Where the loop stands."""
        return self._state

    def stop(self) -> None:
        """Ask for a drain: the running step ends, nothing is polled any more. Safe in a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Run until :meth:`stop`, then close the worker.

        Raises:
            FatalError: Must not be retried; nothing of the running step was committed by the loop.
        """
        try:
            while not self._stopping:
                self.turn()
        except Exception as error:
            expected = isinstance(error, FatalError)
            logger.error("%s stops: %s", self._worker.name, error, exc_info=not expected)
            raise
        finally:
            self.close()

    def turn(self) -> None:
        """Advance once: open, or poll and step, or heartbeat and recover. Never waits longer than a poll.

        Raises:
            FatalError: From the worker, unchanged.
        """
        self._health.alive()
        try:
            if self._state is LoopState.NEW:
                self._open()
            elif self._state is LoopState.RECOVERING:
                self._recover()
            elif self._state is LoopState.RUNNING:
                self._work()
            else:
                raise IllegalTransition(f"{self._worker.name}: a closed loop cannot go on")
        except TransientError as error:
            self._back_off(error)
        except ModelLost:
            raise  # the mark stays: what the process was computing may have done it
        except FatalError:
            self._guard.leaving({})  # a decision to stop is no death that a record caused
            raise
        self._metrics.worker_ready.labels(self._worker.name).set(self._health.is_ready())

    def close(self) -> None:
        """Leave the group and release everything; a repeated call does nothing."""
        if self._state is LoopState.CLOSED:
            return
        self._health.not_ready("loop", "stopped")
        self._metrics.worker_ready.labels(self._worker.name).set(0)
        if self._state is not LoopState.NEW:
            self._release()
        self._advance(LoopState.CLOSED)

    # --- states

    def _open(self) -> None:
        wait = self._retry_at - self._clock.monotonic()
        if wait > 0:
            self._clock.sleep(min(wait, NAP_SECONDS))
            return
        self._worker.open()
        self._error = None
        self._recovered_at = self._clock.monotonic()
        self._advance(LoopState.RUNNING)

    def _work(self) -> None:
        consumer = self._worker.consumer
        due = self._clock.monotonic() if self._more else self._held.due
        polled = consumer.poll(self._patience(due), self._kafka.max_poll_records)
        assigned = consumer.assignment()
        self._held.keep_only(assigned)
        self._watchdog.keep_only(assigned)
        if self._held and self._membership() != self._held_under:
            # a partition may have been elsewhere in between: what is held is no longer known to be next
            self._reread(TransientError("the group rebalanced while records were held"))
            return
        offered = self._held.offer(polled, self._clock.monotonic())
        for group in self._guard.split(offered):
            self._step(group)
        self._pause(assigned)
        self._settle(progressed=bool(offered))
        self._watch(assigned, heard=bool(polled))

    def _recover(self) -> None:
        self._heartbeat()
        if self._clock.monotonic() >= self._retry_at:
            self._reread(self._error or TransientError("recovering"))
            self._error = None
            self._recovered_at = self._clock.monotonic()
            self._advance(LoopState.RUNNING)

    # --- steps

    def _step(self, group: Sequence[Record]) -> None:
        records = self._held.queue(group)
        if group and not records:
            return
        started = self._clock.monotonic()
        outcome = self._outcome(records)
        if outcome.held:
            self._held.hold(outcome.held, due=self._clock.monotonic() + outcome.retry_after_seconds)
            self._held_under = self._membership()
        self._more = outcome.more
        after = next_offsets(records, outcome.held)
        self._guard.leaving(after)
        self._watchdog.handled(after)
        if records:
            self._metrics.worker_step.labels(self._worker.name).observe(self._clock.monotonic() - started)

    def _outcome(self, records: Sequence[Record]) -> StepOutcome:
        now = self._clock.now()
        if self._guard.poisonous(records):
            logger.error("%s: %s killed the process again and again: set aside", self._worker.name, records[0])
            return self._drive(self._worker.poison(records[0], now))
        self._guard.entering(records)
        try:
            return self._drive(self._worker.step(records, now))
        except Backpressure as pressure:
            return StepOutcome(0, tuple(records), pressure.retry_after_seconds)

    def _pause(self, assigned: frozenset[Partition]) -> None:
        """Read on behind records that are merely left over, so that the worker sees what comes, until they fill a poll.

        Of a partition whose records wait for a time nothing more is read.
        """
        now = self._clock.monotonic()
        full = self._held.left_over(now) >= self._kafka.max_poll_records
        wanted = assigned if full else self._held.waiting(now)
        if wanted == self._paused:
            return
        self._worker.consumer.pause(sorted(wanted - self._paused))
        self._worker.consumer.resume(sorted(self._paused - wanted))
        self._paused = wanted

    def _membership(self) -> tuple[int, str]:
        metadata = self._worker.consumer.group_metadata()
        return (metadata.generation, metadata.member_id)

    # --- errors

    def _back_off(self, error: TransientError) -> None:
        """Forget every record and try again later: at once after a first error, then ever more slowly."""
        self._attempts += 1
        delay = 0.0
        if self._attempts > 1:
            delay = min(self._max_backoff, FIRST_BACKOFF_SECONDS * 2 ** min(self._attempts - 2, 30))
            delay *= 0.5 + self._jitter() / 2
        kind = next((k.__name__ for k in _KINDS if isinstance(error, k)), TransientError.__name__)
        logger.warning("%s: %s, trying again in %.2f s: %s", self._worker.name, kind, delay, error)
        self._metrics.worker_retries.labels(self._worker.name, kind).inc()
        self._health.not_ready("loop", f"retrying after {kind}")
        self._steady = False
        self._retry_at = self._clock.monotonic() + delay
        if self._error is None or isinstance(error, ProducerFenced):
            self._error = error  # the first one says what must be rebuilt; later ones are the retries'
        self._held.clear()
        self._guard.leaving({})
        if self._state is LoopState.RUNNING:
            self._advance(LoopState.RECOVERING)

    def _reread(self, error: TransientError) -> None:
        """Let the worker put every partition at its durable offset, with nothing of it left here."""
        self._held.clear()
        self._drive(self._worker.recover(error))
        self._worker.consumer.resume(sorted(self._worker.consumer.assignment()))
        self._paused = frozenset()
        self._watchdog.forget_positions()

    def _heartbeat(self) -> None:
        """Stay in the group with every partition paused; what comes all the same is sought back afterwards."""
        consumer = self._worker.consumer
        try:
            consumer.pause(sorted(consumer.assignment()))
            consumer.poll(self._patience(self._retry_at), 1)
        except TransientError as error:
            logger.debug("%s: no heartbeat: %s", self._worker.name, error)
            self._clock.sleep(self._patience(self._retry_at))

    def _patience(self, due: float | None) -> float:
        """Return how many seconds a poll may wait where something is to be done at ``due``."""
        longest = self._kafka.poll_timeout_seconds
        if due is None:
            return longest
        return min(longest, max(SHORTEST_POLL_SECONDS, due - self._clock.monotonic()))

    def _settle(self, *, progressed: bool) -> None:
        """Call it ready once the group is joined and, after an error, once work has succeeded again."""
        if self._steady:
            return
        settled = progressed or self._clock.monotonic() - self._recovered_at >= SETTLED_SECONDS
        if (self._attempts and not settled) or self._membership()[0] < 0:
            return
        self._steady, self._attempts, self._error = True, 0, None
        self._health.ready("loop")

    # --- watchdog

    def _watch(self, assigned: frozenset[Partition], *, heard: bool) -> None:
        if heard or self._held:
            self._watchdog.heard()
        now = self._clock.monotonic()
        if now < self._lag_at:
            return
        self._lag_at = now + LAG_EVERY_SECONDS
        try:
            ends = self._worker.consumer.peek_end_offsets(sorted(assigned))
        except TransientError as error:  # a poll finds out whether the broker is away
            logger.debug("%s: lag unknown: %s", self._worker.name, error)
            return
        if self._watchdog.stuck(ends, now):
            logger.error("%s: records wait and polls bring nothing: rebuilding the clients", self._worker.name)
            self._metrics.worker_rebuilds.labels(self._worker.name).inc()
            self._release()
            self._advance(LoopState.NEW)

    def _release(self) -> None:
        self._held.clear()
        self._paused = frozenset()
        self._watchdog.close()
        self._watchdog.forget_positions()
        try:
            self._worker.close()
        except TransientError as error:
            logger.warning("%s: did not close cleanly: %s", self._worker.name, error)

    def _advance(self, state: LoopState) -> None:
        if state not in _EDGES[self._state]:
            raise IllegalTransition(f"{self._worker.name}: loop from {self._state} to {state}")
        logger.debug("%s: loop from %s to %s", self._worker.name, self._state, state)
        self._state = state
