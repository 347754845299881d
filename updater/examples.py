"""Turn a user's events into what is scored, trained on and held back.

Pure and deterministic. Invariants: the held-back events are the newest and are never trained on, nor is any event
with the same input text; replayed events are older than all new ones. Which evidence stands beside an event, if
any, is the caller's to look up, and must be older than the event.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from oppu.errors import InvalidRecord
from oppu.lm.port import Example
from oppu.settings import UpdaterSettings
from oppu.tasks import Tasks
from oppu.values import Event, UserId

REPLAY_WINDOW = 16
"""Replayed events are drawn from this many times as many older ones, so that a read stays bounded."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands in a prompt beside the event itself: earlier (input, output) pairs, and a line about the user."""

    evidence: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    profile: str = field(default="", repr=False)


NOTHING = Beside()
"""A plain prompt."""


@dataclass(frozen=True, slots=True)
class Cursors:
    """How far a user's history was read: ``trained`` by the head, ``considered`` by the last attempt."""

    trained: int
    considered: int


@dataclass(frozen=True, slots=True)
class Split:
    """One update's events.

    Attributes:
        pending: Events after the last attempt, in order; ``holdout`` is its end.
        train: New and replayed events, in training order.
        new: How many of ``train`` are new, that is after the head's watermark.
        holdout: Events that validate.
        trained_through: The watermark of a head trained on this: the event before the first held back, so that
            the next update trains on these too.
    """

    pending: tuple[Event, ...] = field(repr=False)
    train: tuple[Event, ...] = field(repr=False)
    new: int
    holdout: tuple[Event, ...] = field(repr=False)
    trained_through: int


def window(settings: UpdaterSettings) -> int:
    """Return how many of a user's newest events an update reads."""
    return settings.max_pending + REPLAY_WINDOW * settings.replay


def usable(events: Sequence[Event], tasks: Tasks) -> list[Event]:
    """Return the events whose task is known and whose output the task still allows."""
    return [event for event in events if _fits(event, tasks)]


def split(events: Sequence[Event], at: Cursors, settings: UpdaterSettings, *, seed: int) -> Split:
    """Divide a user's events.

    Args:
        events: The user's newest usable events, in order of seq.
        at: How far head and last attempt have read.
        settings: Sizes and shares.
        seed: Of the replay sample and of the training order.

    Returns:
        The division; ``holdout`` is empty without pending events, ``train`` without new ones.
    """
    fresh = [e for e in events if e.seq > at.trained][-settings.max_pending :]
    pending = [e for e in fresh if e.seq > at.considered]
    if not pending:
        return Split((), (), 0, (), at.trained)
    # at least one, and the rounding keeps a small share of few events from validating on nothing
    held = min(max(1, round(settings.holdout_share * len(pending))), len(pending))
    holdout = pending[-held:]
    hidden = {(e.task, e.input) for e in holdout}
    new = [e for e in fresh if e.seq < holdout[0].seq and (e.task, e.input) not in hidden]
    older = [e for e in events if e.seq < fresh[0].seq and (e.task, e.input) not in hidden]
    return Split(
        pending=tuple(pending),
        train=_mix(new, older, settings, seed) if new else (),
        new=len(new),
        holdout=tuple(holdout),
        trained_through=holdout[0].seq - 1,
    )


def example(event: Event, tasks: Tasks, beside: Beside = NOTHING) -> Example:
    """Phrase a usable event as a training pair; with a blank output, as a text without choices."""
    allowed = tasks[event.task].allowed(event.choices)
    return Example(
        task=event.task,
        input=event.input,
        output=event.output,
        choices=allowed if event.output.strip() or event.output in allowed else (),
        evidence=beside.evidence,
        profile=beside.profile,
    )


def seed_for(user_id: UserId, version: int) -> int:
    """Return the seed of one user's version: the same in every process, below 2**31."""
    digest = hashlib.sha256(f"{version}\0{user_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _mix(new: list[Event], older: list[Event], settings: UpdaterSettings, seed: int) -> tuple[Event, ...]:
    """Mix in older events by the new ones' number; where there are too few, new ones come again.

    So a backlog that is learnt at once is seen as often as if it had come in small updates.
    """
    chance = random.Random(seed)  # noqa: S311 - a reproducible sample, not a secret
    count = round(settings.replay * max(1.0, len(new) / settings.min_pending))
    window = older[-REPLAY_WINDOW * settings.replay :] if count else []
    replayed = chance.sample(window, min(count, len(window)))
    again = min(count - len(replayed), max(len(new) - settings.min_pending, 0))
    replayed += chance.sample(new, again)
    mixed = [*new, *replayed]
    # shuffled, so that no optimizer step sees new events only and forgets the older ones
    chance.shuffle(mixed)
    return tuple(mixed)


def _fits(event: Event, tasks: Tasks) -> bool:
    try:
        tasks.require(event.task).check_output(event.output, event.choices)
    except InvalidRecord:
        return False
    return True
