"""One user's update while it is under way: its claim, its state, and what was found so far; and how it may end."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from oppu.errors import FatalError, OppuError
from oppu.lm.port import AdapterRef, Example, Tensors, Trained, TrainJob
from oppu.store.records import Claim, Lift
from oppu.values import Event, UserId, UserState
from updater.examples import Cursors, Split, seed_for
from updater.scoring import Assessment
from updater.state import Machine, State

T = TypeVar("T")


class Stranded(OppuError):
    """The registry could not be read or written for one user: his files, or all of it? The tick's end knows."""


class Ended(StrEnum):
    """How one user's update ended; the values of ``oppu_updater_updates_total{outcome}``."""

    PUBLISHED = "published"
    REJECTED = "rejected"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Nothing to learn from, or given back because the process drains or store or registry are away."""
    DISCARDED = "discarded"
    """The claim, the parent or the epoch had moved: somebody else's result stands."""


@dataclass(frozen=True, slots=True)
class TickOutcome:
    """What one tick did. ``claimed`` 0: nothing was due, or others hold all who are."""

    claimed: int
    ended: Mapping[Ended, int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Material:
    """What an update works on: examples beside the events they come from, and the live adapter's weights.

    ``parent_fault`` says why the live adapter could not be read; training then starts afresh.
    """

    split: Split
    pending: tuple[Example, ...] = field(repr=False)
    train: tuple[Example, ...] = field(repr=False)
    parent: Tensors | None = field(repr=False)
    parent_fault: str
    considered_through: int

    @property
    def holdout(self) -> tuple[Example, ...]:
        """The examples that validate: the end of the pending ones."""
        return self.pending[len(self.pending) - len(self.split.holdout) :]


@dataclass(frozen=True, slots=True)
class Scores:
    """The pending examples under the live adapter (``None``: there is none) and under the base alone."""

    live: Assessment | None
    none: Assessment

    def lift(self) -> Lift | None:
        """Return the paired loss, where there is a live adapter."""
        if self.live is None:
            return None
        return Lift(
            events=len(self.none.losses),
            loss_live=float(self.live.losses.sum()),
            loss_none=float(self.none.losses.sum()),
            correct_live=int(self.live.correct.sum()),
            correct_none=int(self.none.correct.sum()),
        )


@dataclass(slots=True, eq=False)
class Job:
    """One claimed user. Mutable: each stage of a tick adds what it found."""

    claim: Claim
    machine: Machine
    user: str
    """The keyed hash, for logs."""
    material: Material | None = field(default=None, repr=False)
    scores: Scores | None = field(default=None, repr=False)
    trained: Trained | None = field(default=None, repr=False)
    earned: float | None = None
    """By the live adapter, through the pending events; ``None`` where that was not judged."""

    @property
    def user_id(self) -> UserId:
        """Whose update it is."""
        return self.claim.user_id

    @property
    def cursors(self) -> Cursors:
        """How far head and last attempt have read."""
        head = self.claim.head
        return Cursors(head.trained_through if head else 0, self.claim.considered_through)

    @property
    def state(self) -> UserState:
        """The user as seen by the claim."""
        return UserState(self.user_id, self.claim.epoch, self.claim.last_seq, self.claim.head)

    @property
    def parent_ref(self) -> AdapterRef | None:
        """The live version."""
        head = self.claim.head
        return AdapterRef(self.user_id, self.claim.epoch, head.version) if head else None

    @property
    def ref(self) -> AdapterRef:
        """The version that this update would publish; the claim alone may write it."""
        return AdapterRef(self.user_id, self.claim.epoch, self.claim.next_version)

    @property
    def seed(self) -> int:
        """Of sample, order and training."""
        return seed_for(self.user_id, self.claim.next_version)

    @property
    def parent(self) -> int | None:
        """The live version's number; the head moves only from it."""
        return self.claim.head.version if self.claim.head else None

    @property
    def label(self) -> str:
        """User and version, for traces."""
        return f"{self.user} version {self.ref.version}"

    def earned_by_line(self) -> float:
        """Return what a version trained from the live one begins with; one trained afresh begins with nothing."""
        head = self.claim.head
        if head is None or self.work().parent is None:
            return 0.0
        return head.earned if self.earned is None else self.earned

    def considered(self) -> int:
        """Return how far this attempt has looked: nowhere, where it failed."""
        done = self.machine.state is not State.FAILED
        return self.material.considered_through if self.material and done else self.claim.considered_through

    def work(self) -> Material:
        """Return the material of a prepared job."""
        return _present(self.material)

    def scored(self) -> Scores:
        """Return the scores of a job that was scored."""
        return _present(self.scores)

    def result(self) -> Trained:
        """Return the result of a job that was trained."""
        return _present(self.trained)

    def train_job(self) -> TrainJob:
        """Return what the model is asked to train."""
        material = self.work()
        return TrainJob(self.user_id, material.parent, material.train, self.seed)


def newest(events: tuple[Event, ...]) -> Event:
    """Return the event with the highest sequence."""
    return max(events, key=lambda event: event.seq)


def _present(value: T | None) -> T:
    if value is None:
        raise FatalError("updater: a stage was reached without the one before it")
    return value
