"""One tick of the updater: claim who is due, score, train together, validate, publish what is better.

A generator of effects: claims, lift, registry writes, publishing, conclusions and collection are each one; reads
and compute are direct, and so is the renewal of claims from within training, which safety does not rest on.
One user's failure ends that user's attempt only. ``TransientError`` and ``FatalError`` end the tick: claims that
were left behind expire. A failed attempt has considered nothing: it is repeated after its back-off.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

import numpy as np

from oppu.clock import Clock, SystemClock
from oppu.effects import Effect, Steps
from oppu.errors import AdapterUnreadable, FatalError, OppuError, TransientError
from oppu.lm.faults import device_fault
from oppu.lm.port import LanguageModel, TrainConfig, Trained
from oppu.metrics import Metrics
from oppu.privacy import UserHash
from oppu.registry import AdapterRegistry, Written
from oppu.settings import RegistrySettings, UpdaterSettings
from oppu.store.port import HistoryStore
from oppu.store.records import Candidate, Claim
from oppu.tasks import Tasks
from oppu.values import UserId
from oppu.wire import AdapterUpdate, Topics, record_for
from updater import plan as planning
from updater.earning import Judge
from updater.ending import Endings, Tick
from updater.job import Ended, Job, Scores, Stranded, TickOutcome, newest
from updater.lease import Drained, Leases
from updater.material import Gatherer, Prompts
from updater.scoring import Verdict, assess, verdict
from updater.state import Machine, State
from updater.sweeping import Sweeper

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_AHEAD = 4
"""Due users read for each that may be trained, so that planning has a choice."""


class _NotFinite(OppuError):
    """Training ended in weights that are not numbers."""


class _Killer(OppuError):
    """The process has died in each of this user's last attempts."""


def _nothing() -> None:
    return None


@dataclass(slots=True, eq=False)
class Updater:
    """Trains the adapters of users who are due on one base; any number of processes may.

    Attributes:
        store: Events, claims, heads.
        registry: Where versions go; opened with the model's adapter configuration.
        model: Scores and trains.
        tasks: The known tasks.
        settings: Sizes, shares, budgets.
        topics: Where heads are announced.
        holder: Names this process in its claims.
        metrics: Counts.
        user_hash: Names users in logs.
        clock: Dates what is written; tells when claims need renewal.
        collection: Which old versions are kept.
        prompts: Says what stands beside training examples, as in serving; ``None``: plain prompts.
        judge: Says what each live adapter has earned; ``None``: nothing moves.
        alive: Called between pieces of work, for ``/healthz``.
    """

    store: HistoryStore
    registry: AdapterRegistry
    model: LanguageModel
    tasks: Tasks
    settings: UpdaterSettings
    _: KW_ONLY
    topics: Topics
    holder: str
    metrics: Metrics
    user_hash: UserHash
    clock: Clock = field(default_factory=SystemClock)
    collection: RegistrySettings = field(default_factory=RegistrySettings)
    prompts: Prompts | None = None
    judge: Judge | None = None
    alive: Callable[[], None] = _nothing
    _draining: bool = field(default=False, init=False)
    _sweeper: Sweeper = field(init=False)

    def __post_init__(self) -> None:
        self._sweeper = Sweeper(self.store, self.registry, self.clock)

    def open(self) -> Steps[None]:
        """Make users trainable on this base, in a registry that is there; to be driven once before the first tick."""
        base = self.model.base
        yield Effect("store.register_base", lambda: self.store.register_base(base), base)
        in_use = self.store.bases() if self.store.counts()["adapters"] else []
        yield Effect("registry.open", lambda: self.registry.open(in_use=in_use))

    def drain(self) -> None:
        """Claim nobody new, and give back at the next heartbeat what is not trained yet; safe in a signal handler."""
        self._draining = True

    def tick(self, now: datetime) -> Steps[TickOutcome]:
        """Train whoever is due at ``now``, up to the budget; yields each write, returns what became of whom."""
        yield from self._sweeper.step()
        tick = Tick(self._leases())
        begun = self.clock.monotonic()
        try:
            yield from self._claim(tick, now)
            for group in _groups(tick.jobs):
                yield from self._score(tick, group)
                yield from self._train(tick, group)
                yield from self._finish(tick, group)
            yield from self._endings.settle(tick)
        except TransientError:
            yield from self._endings.abandon(tick)
            raise
        if tick.jobs:
            self.metrics.job.observe(self.clock.monotonic() - begun)
        return TickOutcome(len(tick.jobs), tick.ended)

    @property
    def _endings(self) -> Endings:
        return Endings(self.store, self.settings, self.metrics, self.clock)

    def _leases(self) -> Leases:
        return Leases(
            self.store,
            self.clock,
            seconds=self.settings.claim_seconds,
            alive=self.alive,
            draining=lambda: self._draining,
        )

    # --- claim
    def _claim(self, tick: Tick, now: datetime) -> Steps[None]:
        size, base = self.settings.users_per_tick, self.model.base
        due = self.store.due(base, now=now, min_pending=self.settings.min_pending, limit=LOOK_AHEAD * size)
        if due:
            self.registry.check()  # what is trained while it is away could not be kept
        for user_id in planning.plan(due, now=now, budget_users=size):
            if self._draining:
                return
            user = self.user_hash(user_id)[:12]
            claim: Claim | None = yield Effect("store.claim", self._claiming(user_id), user)
            if claim is None:
                continue
            job = Job(claim, Machine(user, self.metrics), user)
            job.machine.advance(State.CLAIMED)
            tick.jobs.append(job)
            tick.leases.hold(claim)
            if claim.attempts > 1:
                return  # it is trained last and alone, and nobody after it may be held up by it

    def _claiming(self, user_id: UserId) -> Callable[[], Claim | None]:
        seconds = self.settings.claim_seconds
        return lambda: self.store.claim(self.model.base, user_id, holder=self.holder, ttl_seconds=seconds)

    # --- score
    def _score(self, tick: Tick, jobs: Sequence[Job]) -> Steps[None]:
        gatherer = Gatherer(
            self.store, self.registry, self.tasks, self.settings, self.metrics, self.model.check, self.prompts
        )
        for job in jobs:
            fault = self._caught(lambda job=job: self._prepare(job, gatherer, tick))  # type: ignore[misc]
            if isinstance(fault, Stranded):
                tick.unread.append((job, fault))
            elif isinstance(fault, Exception):
                yield from self._endings.give_up(tick, job, fault)
            elif job.machine.state is State.CLAIMED:
                yield from self._endings.conclude(tick, job, Ended.SKIPPED, "no usable new events to train on")
            else:
                yield from self._record_lift(job)

    def _prepare(self, job: Job, gatherer: Gatherer, tick: Tick) -> None:
        tick.leases.beat()
        if job.claim.attempts > self.settings.quarantine_after:
            raise _Killer(f"{job.claim.attempts - 1} attempts in a row ended with the process")
        job.material = gatherer.gather(job)
        tick.read |= job.parent_ref is not None
        if not job.material.train:
            return
        job.machine.advance(State.SCORING)
        pending, parent = job.material.pending, job.material.parent
        none = assess(self.model, pending, None, tick.leases.beat)
        live = assess(self.model, pending, parent, tick.leases.beat) if parent is not None else None
        job.scores = Scores(live, none)
        job.earned = self.judge.earned(job) if self.judge is not None else None

    def _record_lift(self, job: Job) -> Steps[None]:
        lift = job.scored().lift()
        if lift is None:
            return
        through, now = job.work().split.pending[-1].seq, self.clock.now()
        yield Effect(
            "store.record_lift",
            lambda: self.store.record_lift(job.claim, lift, through=through, now=now),
            f"{job.user} through {through}",
        )

    # --- train
    def _train(self, tick: Tick, jobs: Sequence[Job]) -> Steps[None]:
        ready = _at(jobs, State.SCORING)
        for job in ready:
            job.machine.advance(State.TRAINING)
        begun = self.clock.monotonic()
        results = self._train_all(ready, tick.leases)
        if ready:
            self.metrics.train.observe(self.clock.monotonic() - begun)
        for job, result in zip(ready, results, strict=True):
            if isinstance(result, Exception):
                yield from self._endings.give_up(tick, job, result)
            elif result.tensors is None or not all(np.isfinite(t).all() for t in result.tensors.values()):
                yield from self._endings.give_up(tick, job, _NotFinite("weights are not finite"))
            else:
                job.trained = result

    def _train_all(self, jobs: Sequence[Job], leases: Leases) -> Sequence[Trained | Exception]:
        """Train all in one call; where that breaks, each alone, so that only the one at fault fails."""
        if not jobs:
            return []
        together = self._caught(lambda: self._run_training(jobs, leases))
        if not isinstance(together, Exception):
            return together
        if len(jobs) == 1 or isinstance(together, Drained):
            return [together] * len(jobs)
        logger.warning("training %d users together failed (%s): one by one", len(jobs), type(together).__name__)
        return [result for job in jobs for result in self._train_all([job], leases)]

    def _run_training(self, jobs: Sequence[Job], leases: Leases) -> Sequence[Trained]:
        leases.beat()
        s = self.settings
        config = TrainConfig(
            s.learning_rate, s.weight_decay, s.passes, s.batch, clip_norm=s.clip_norm, dropout=s.dropout
        )
        results = self.model.train([job.train_job() for job in jobs], config, heartbeat=leases.beat)
        if len(results) != len(jobs):
            raise FatalError(f"model: {len(results)} results of {len(jobs)} training jobs")
        return results

    # --- validate and publish
    def _finish(self, tick: Tick, jobs: Sequence[Job]) -> Steps[None]:
        """Judge and publish user by user, so that nobody's new adapter waits for the others'."""
        for job in _at(jobs, State.TRAINING):
            if tick.leases.lost(job.user_id):
                yield from self._endings.discard(tick, job, "the claim was lost while training")
                continue
            job.machine.advance(State.VALIDATING)
            judged = self._caught(lambda job=job: self._judge(job, tick.leases))  # type: ignore[misc]
            if isinstance(judged, Exception):
                yield from self._endings.give_up(tick, job, judged)
            elif not judged.publish:
                yield from self._endings.conclude(tick, job, Ended.REJECTED, judged.reason, judged)
            else:
                yield from self._publish(tick, job, judged)

    def _judge(self, job: Job, leases: Leases) -> Verdict:
        material, scores, trained = job.work(), job.scored(), job.result()
        held = len(material.holdout)
        # not abandoned when draining: scoring the few held-back events is short, the training behind it was not
        candidate = assess(self.model, material.holdout, trained.tensors, leases.touch)
        judged = verdict(candidate, scores.live.last(held) if scores.live else None, scores.none.last(held))
        judged.metrics.update(
            new_events=float(material.split.new),
            train_events=float(len(material.train)),
            train_loss=trained.mean_loss,
            steps=float(trained.steps),
            parent_unreadable=float(bool(material.parent_fault)),
        )
        return judged

    def _publish(self, tick: Tick, job: Job, judged: Verdict) -> Steps[None]:
        job.machine.advance(State.PUBLISHING)
        tick.leases.touch()  # what is left of the claim has to last for the write
        try:
            written: Written = yield Effect("registry.write", lambda: self._write(job, judged), job.label)
        except AdapterUnreadable as error:
            tick.read = True
            yield from self._endings.give_up(tick, job, error)
            return
        except TransientError as error:
            tick.unwritten.append((job, Stranded(str(error))))
            # what was begun must not fill a full disk further
            yield from self._tidy(Effect("registry.delete", lambda: self.registry.delete(job.ref), job.label))
            return
        tick.wrote = True
        candidate = Candidate(
            version=job.ref.version,
            parent=job.parent,
            trained_through=job.work().split.trained_through,
            considered_through=job.work().considered_through,
            path=written.path,
            digest=written.digest,
            metrics=judged.metrics,
            earned=job.earned_by_line(),
        )
        now = self.clock.now()
        update = AdapterUpdate(
            user_id=job.user_id,
            base=self.model.base,
            version=candidate.version,
            parent=candidate.parent,
            cause="published",
        )
        announce = record_for(self.topics.updates, job.user_id, update)
        published: bool = yield Effect(
            "store.publish",
            lambda: self.store.publish(job.claim, candidate, now=now, announce=announce),
            job.label,
        )
        if published:
            self._published(tick, job, now)
            yield from self._collect(job, now)
        else:
            # nobody can have loaded it: only a head is ever read
            yield from self._tidy(Effect("registry.delete", lambda: self.registry.delete(job.ref), job.label))
            yield from self._endings.discard(tick, job, "claim, parent or epoch had moved at publishing")

    def _write(self, job: Job, judged: Verdict) -> Written:
        tensors = job.result().tensors
        return self.registry.write(
            job.ref,
            tensors if tensors is not None else {},
            parent=job.parent,
            trained_through=job.work().split.trained_through,
            metrics=judged.metrics,
            token=job.claim.token,
        )

    def _published(self, tick: Tick, job: Job, now: datetime) -> None:
        split = job.work().split
        self.metrics.trained_events.inc(split.new)
        self.metrics.served.observe(max((now - newest(split.train).recorded_at).total_seconds(), 0.0))
        self._endings.end(tick, job, Ended.PUBLISHED, job.work().parent_fault)

    def _collect(self, job: Job, now: datetime) -> Steps[None]:
        older_than = now - timedelta(seconds=self.collection.grace_seconds)
        keep = self._kept(job)

        def collect() -> list[int]:
            return self.registry.collect(job.user_id, job.claim.epoch, keep, older_than=older_than)

        yield from self._tidy(Effect("registry.collect", collect, job.user))

    def _kept(self, job: Job) -> set[int]:
        state = self.store.users([job.user_id], self.model.base).get(job.user_id)
        # beside what was just published: the head may have moved on, by another holder or an operator
        head = state.head if state else None
        named = {job.ref.version, job.parent} | ({head.version, head.parent} if head else set())
        served = {version for version in named if version is not None}
        versions = [v.version for v in self.store.versions(self.model.base, job.user_id)]
        return served | set([v for v in versions if v not in served][-self.collection.keep_versions :])

    def _tidy(self, effect: Effect) -> Steps[None]:
        """Delete files; what cannot be deleted now is collected after a later version, or swept after an erasure."""
        try:
            yield effect
        except TransientError as error:
            logger.warning("%s: left for later: %s", effect.name, error)

    def _caught(self, action: Callable[[], T]) -> T | Exception:
        """Run one user's compute: what breaks there is that user's failure and must not stop the others."""
        try:
            return action()
        except (TransientError, FatalError):
            raise
        except Exception as error:  # the worker's one boundary: concluded as failed, with back-off
            if (lost := device_fault(error)) is not None:
                logger.exception("the device failed")
                raise lost from error  # its claims stay, as a dead process's do
            return error


def _groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Separate who may have killed a process before: alone and last, so that only the culprit is held to account."""
    fresh = [job for job in jobs if job.claim.attempts == 1]
    suspects = [[job] for job in jobs if job.claim.attempts > 1]
    return [fresh, *suspects] if fresh else suspects


def _at(jobs: Sequence[Job], state: State) -> list[Job]:
    return [job for job in jobs if job.machine.state is state]
