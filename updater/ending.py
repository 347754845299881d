"""How one user's update ends when it publishes nothing, and what is noted of every end.

Invariant: a failed, abandoned or drained attempt has considered nothing, so its events stay pending. Failures are
repeated after a back-off and quarantined in the end, but for those of files or memory, which are not the user's; what
is given back neither adds to them nor forgives them. A claim that has moved on is never written under.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from oppu.clock import Clock
from oppu.effects import Effect, Steps
from oppu.errors import OppuError, TransientError
from oppu.lm.faults import out_of_memory
from oppu.metrics import Metrics
from oppu.settings import UpdaterSettings
from oppu.store.port import HistoryStore
from oppu.store.records import Outcome
from updater import plan as planning
from updater.job import Ended, Job, Stranded
from updater.lease import Drained, Leases
from updater.scoring import Verdict
from updater.state import State

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Tick:
    """What one tick has in hand."""

    leases: Leases
    read: bool = False
    """Whether the registry has given somebody's files."""
    wrote: bool = False
    """Whether it has taken somebody's: a full or read-only one gives and does not take."""
    unread: list[tuple[Job, Stranded]] = field(default_factory=list)
    unwritten: list[tuple[Job, Stranded]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    ended: Counter[Ended] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Endings:
    """Concludes attempts in the store, counts and logs them."""

    store: HistoryStore
    settings: UpdaterSettings
    metrics: Metrics
    clock: Clock

    def give_up(self, tick: Tick, job: Job, error: Exception) -> Steps[None]:
        """End an attempt that an error broke: drained work is given back, anything else failed."""
        if isinstance(error, Drained):
            yield from self.give_back(tick, job, "the updater stops")
            return
        stage = job.machine.state
        job.machine.advance(State.FAILED)
        logger.warning("user %s: failed when %s: %s", job.user, stage, type(error).__name__)
        logger.debug("user %s: where it failed", job.user, exc_info=error)
        # messages of our own quote no content; a library's may quote the user's text
        said = str(error) if isinstance(error, OppuError) else type(error).__name__
        blameless = isinstance(error, Stranded) or out_of_memory(error)
        yield from self.conclude(tick, job, Ended.FAILED, f"{stage}: {said}", blameless=blameless)

    def give_back(self, tick: Tick, job: Job, why: str) -> Steps[None]:
        """Release a claim as if it had never been made; or find that it has moved on."""
        if job.machine.state is not State.DRAINING:  # else the store did not answer when it was given back before
            job.machine.advance(State.DRAINING)
        given: bool = yield Effect("store.give_back", lambda: self.store.give_back(job.claim), job.label)
        if given:
            self.end(tick, job, Ended.SKIPPED, why)
        else:
            self._discarded(tick, job, "the claim had moved before it was given back")

    def settle(self, tick: Tick) -> Steps[None]:
        """End the attempts that the registry stranded: failed, if it did the same for others; else it is away, or
        full, and a ``TransientError`` says so. A lone one that was read and cannot be written fails and backs off."""
        away = bool(tick.unread) and not (tick.read or tick.wrote)
        full = bool(tick.unwritten) and not tick.wrote and (len(tick.unwritten) > 1 or not tick.read)
        if away or full:
            raise TransientError(str((tick.unread if away else tick.unwritten)[0][1]))
        for job, error in (*tick.unread, *tick.unwritten):
            if tick.leases.lost(job.user_id):
                yield from self.discard(tick, job, "the claim was lost")
            else:
                yield from self.give_up(tick, job, error)

    def abandon(self, tick: Tick) -> Steps[None]:
        """Give back what a transient error left unfinished, so that nobody waits for the claims to expire.

        Without this a registry that is away for long would look like users who kill the process.
        """
        for job in tick.jobs:
            if job.machine.state is State.IDLE:
                continue
            try:
                yield from self.give_back(tick, job, "store or registry is away")
            except TransientError as error:
                logger.warning("claims cannot be given back, they expire: %s", error)
                return

    def conclude(
        self,
        tick: Tick,
        job: Job,
        how: Ended,
        reason: str,
        judged: Verdict | None = None,
        *,
        blameless: bool = False,
    ) -> Steps[None]:
        """End an attempt, from the state that the job is in, and release its claim; or find that it has moved on.

        ``how`` is rejected, skipped or failed; ``reason`` goes into the audit trail and never quotes content. A
        ``blameless`` failure backs off and is never quarantined.
        """
        now = self.clock.now()
        retry, quarantine = self._after_failure(job, now, blameless) if how is Ended.FAILED else (None, False)

        def conclude() -> bool:
            return self.store.conclude(
                job.claim,
                Outcome(how.value),
                considered_through=job.considered(),
                reason=reason,
                now=now,
                retry_at=retry,
                quarantine=quarantine,
                metrics=judged.metrics if judged else None,
                earned=job.earned,
            )

        concluded: bool = yield Effect("store.conclude", conclude, f"{job.label} {how}")
        if concluded:
            self.end(tick, job, how, reason)
        else:
            yield from self.discard(tick, job, "the claim had moved before it was concluded")

    def discard(self, tick: Tick, job: Job, why: str) -> Steps[None]:
        """End an attempt whose claim belongs to somebody else by now: nothing is written, but that we outlived it.

        Else a registry slower than claims would look like users who kill the process.
        """
        self._discarded(tick, job, why)
        try:
            yield Effect("store.give_back", lambda: self.store.give_back(job.claim), job.label)
        except TransientError as error:
            logger.warning("user %s: the attempt still counts as one that ended with its process: %s", job.user, error)

    def _discarded(self, tick: Tick, job: Job, why: str) -> None:
        if job.machine.state not in (State.FAILED, State.DRAINING):
            job.machine.advance(State.FAILED)
        self.end(tick, job, Ended.DISCARDED, why)

    def end(self, tick: Tick, job: Job, how: Ended, reason: str) -> None:
        """Note an end."""
        job.machine.advance(State.IDLE)
        tick.leases.release(job.user_id)
        tick.ended[how] += 1
        self.metrics.updates.labels(how.value).inc()
        logger.info("user %s: version %d %s%s", job.user, job.ref.version, how, f": {reason}" if reason else "")

    def _after_failure(self, job: Job, now: datetime, blameless: bool) -> tuple[datetime | None, bool]:
        limit = self.settings.quarantine_after
        status = self.store.adapter(job.claim.base, job.user_id)
        failures = max((status.failures if status else 0) + 1, job.claim.attempts - 1)
        if not blameless and planning.should_quarantine(failures, after=limit):
            logger.error("user %s: quarantined after %d failures in a row", job.user, failures)
            return None, True
        return planning.retry_at(failures, now=now, first_seconds=self.settings.retry_seconds), False
