"""Train jobs, many users at once in the slots of a bank, and parts of them side by side, each part in a bank of its
own. Result by result it is as if each user were alone.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from oppu.errors import AdapterUnreadable
from oppu.lm.bank import SlotBank
from oppu.lm.encoding import Target
from oppu.lm.forward import Runner
from oppu.lm.port import Tensors, TrainConfig, Trained, TrainJob
from oppu.lm.training import Calls, SlotResult, slots_for, train_slots

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Learner:
    """A job whose parent fits, and what it learns from."""

    job: TrainJob
    targets: Sequence[Target]

    @property
    def tokens(self) -> int:
        """Of all its targets."""
        return sum(len(target.ids) for target in self.targets)


def fits(bank: SlotBank, job: TrainJob) -> bool:
    """Say whether a job's parent, if any, can be trained on."""
    try:
        if job.parent is not None:
            bank.check(job.parent)
    except AdapterUnreadable as error:
        logger.warning("a parent adapter cannot be trained on: %s", error)
        return False
    return True


def train_jobs(
    runner: Runner,
    new_bank: Callable[[int], SlotBank],
    learners: Sequence[Learner],
    config: TrainConfig,
    heartbeat: Callable[[], None],
) -> list[Trained]:
    """Train users' adapters.

    Args:
        runner: The base.
        new_bank: Makes a trainable bank of so many slots on it.
        learners: One a user.
        config: Common to all.
        heartbeat: Called before every forward, by one thread at a time, not always the caller's.

    Returns:
        One result a learner; without tensors where its weights do not stay finite.

    Raises:
        Exception: What the heartbeat raised, or a forward; nobody's result is kept then.
    """
    if not learners:
        return []
    parts = runner.streams.parts([learner.tokens for learner in learners])
    results: dict[int, SlotResult] = {}
    tensors: dict[int, Tensors] = {}
    beat, banks = _SharedBeat(heartbeat), dict[int, SlotBank]()

    def train_part(part: Sequence[int]) -> None:
        bank, own = banks[part[0]], [learners[number] for number in part]
        calls = Calls(
            beat,
            begin=lambda user, slot: _start(bank, slot, own[user].job),
            end=lambda user, slot: tensors.update({part[user]: bank.read(slot)}),
        )
        targets, seeds = [learner.targets for learner in own], [learner.job.seed for learner in own]
        results.update(zip(part, train_slots(runner, bank, targets, config, calls, seeds=seeds), strict=True))

    try:
        for part in parts:  # before any of them runs: a bank attaches to the layers that they run through
            banks[part[0]] = new_bank(slots_for(runner, len(part), config))
        runner.streams.run(partial(beat.guarded, train_part), parts, beat.fail)
    finally:
        for bank in banks.values():
            bank.close()
    found = [(results[number], tensors[number]) for number in range(len(learners))]
    return [Trained(own if one.finite else None, one.steps, one.mean_loss) for one, own in found]


class _SharedBeat:
    """A heartbeat of several threads: called by one at a time; once one of them has failed, the others' next one raises
    too, so that nobody waits for what will be thrown away."""

    def __init__(self, heartbeat: Callable[[], None]) -> None:
        self._heartbeat, self._lock = heartbeat, threading.Lock()
        self._failure: BaseException | None = None

    def __call__(self) -> None:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                self._heartbeat()
            except BaseException as error:
                self.fail(error)  # before anybody else can ask
                raise

    def fail(self, error: BaseException) -> None:
        """Let everybody's next heartbeat raise."""
        self._failure = self._failure or error

    def guarded(self, work: Callable[[Sequence[int]], None], part: Sequence[int]) -> None:
        """Do the work, and let the others know where it fails."""
        try:
            work(part)
        except BaseException as error:
            self.fail(error)
            raise


def _start(bank: SlotBank, slot: int, job: TrainJob) -> None:
    """Put fresh weights into a slot, and over them a job's parent: what that lacks of layers or rank can be learnt."""
    bank.fresh(slot, job.seed)
    if job.parent is not None:
        bank.load(slot, job.parent, over=True)
