"""Bring the right adapter version of each user into the bank, or say which lesser one serves instead.

Invariant: an adapter is known only by (user, epoch, version), taken from the head read in this step; nothing is
remembered by user alone. A version that cannot be read, or is not here in time, falls back to its parent, then to the
base: nobody's slow disk holds up the other users of a batch for longer than ``wait_seconds``, and for that in one batch
only; nobody's bad file does.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from inference.faults import Faults
from inference.host_cache import HostCache
from oppu.clock import Clock
from oppu.errors import AdapterNotReady, AdapterUnreadable, FatalError, TransientError
from oppu.lm.port import AdapterRef, AdapterSource, LanguageModel
from oppu.metrics import Metrics
from oppu.store.port import HistoryStore
from oppu.values import Head, UserId, UserState

logger = logging.getLogger(__name__)

_PASSES = 4
"""Placing a train of users may evict one placed before; every pass leaves its users the most recent."""


class Fallback(StrEnum):
    """What served instead of the head; the ``reason`` of a degraded adapter. The last one is known only afterwards."""

    PARENT = "unreadable_fell_back_to_parent"
    BASE = "unreadable_used_base"
    LATE = "not_loaded_in_time"
    UNSOUND = "not_finite_used_base"


@dataclass(frozen=True, slots=True)
class Placed:
    """A resident adapter (``None``: the base alone), and what went wrong on the way."""

    ref: AdapterRef | None
    fallback: Fallback | None = None


@dataclass(slots=True)
class _Batch:
    """What one ``place`` may still wait for, and what became of its loads."""

    until: float
    answered: bool = False
    failures: dict[AdapterRef, TransientError] = field(default_factory=dict)


class AdapterShelf:
    """Places the adapters of one chunk of rows."""

    def __init__(
        self,
        adapters: AdapterSource,
        model: LanguageModel,
        store: HistoryStore,
        metrics: Metrics,
        clock: Clock,
        *,
        wait_seconds: float = 0.0,
    ) -> None:
        self._wait_seconds = wait_seconds
        self._ahead = adapters if isinstance(adapters, HostCache) else None
        self._adapters, self._model, self._store = adapters, model, store
        self._metrics, self._clock = metrics, clock
        self._held: set[AdapterRef] = set()
        self._faults = Faults(clock)
        self._waited: set[AdapterRef] = set()

    def expect(self, states: Iterable[UserState], *, wait_seconds: float = 0.0) -> None:
        """Let the source read these users' adapters ahead, as far as they are not in the bank.

        Args:
            states: Most urgent first.
            wait_seconds: How long to wait for them.
        """
        missing = self._missing(states)
        if missing and self._ahead is not None:
            self._ahead.expect(missing, wait_seconds=wait_seconds)

    def place(self, states: Iterable[UserState]) -> dict[UserId, Placed]:
        """Make each user's adapter resident, all at once.

        Args:
            states: Distinct users, no more than the bank has places.

        Returns:
            What serves each of them; every ``ref`` is resident.

        Raises:
            FatalError: The bank cannot hold them together.
            TransientError: The store is unavailable, or the registry: every load of this batch met an I/O error, and
                nobody in it is served by an adapter that the bank holds.
        """
        users = {state.user_id: state for state in states}
        batch = _Batch(self._clock.monotonic() + self._wait_seconds)
        self._touch(users.values())
        self._await(self._missing(users.values()), batch)
        placed = {user: self._choose(state, batch) for user, state in users.items()}
        # who is served by what the bank holds must not wait until it is known whose fault this is
        served = batch.answered or any(one.ref is not None for one in placed.values())
        if batch.failures and self._faults.away(batch.failures, answered=served):
            raise next(iter(batch.failures.values()))
        for _ in range(_PASSES):
            lost = [u for u, p in placed.items() if p.ref is not None and not self._model.resident(p.ref)]
            if not lost:
                self._measure()
                return placed
            placed.update({user: self._choose(users[user], batch) for user in lost})
        raise FatalError(f"bank: cannot hold the adapters of {len(users)} users at once")

    def _touch(self, states: Iterable[UserState]) -> None:
        """Who is here already must not be given up for those of the same batch who are not; heads least of all."""
        heads = [(state, head) for state in states if (head := _head(state)) is not None]
        absent = [(s, h.parent) for s, h in heads if not self._model.resident(_ref(s, h.version))]
        self._model.touch(_ref(state, parent) for state, parent in absent if parent is not None)
        self._model.touch(_ref(state, head.version) for state, head in heads)

    def _missing(self, states: Iterable[UserState]) -> list[AdapterRef]:
        """Return what will be loaded: heads, or parents of those heads that are held back."""
        wanted = []
        for state in states:
            head = _head(state)
            if head is not None:
                versions = (head.version, head.parent)
                refs = [_ref(state, version) for version in versions if version is not None]
                wanted += [ref for ref in refs if not self._faults.held_back(ref)][:1]
        return [ref for ref in wanted if not self._model.resident(ref)]

    def _await(self, refs: Iterable[AdapterRef], batch: _Batch) -> None:
        """Begin to read what is not here, and wait as long as the batch may; for a version in one batch only."""
        if self._ahead is None:
            return
        wanted = list(refs)
        unknown = [ref for ref in wanted if not self._ahead.known(ref)]
        if unknown:
            self._ahead.expect(unknown)
        fresh = [ref for ref in wanted if self._ahead.reading(ref) and ref not in self._waited]
        left = batch.until - self._clock.monotonic()
        if fresh and left > 0:
            self._ahead.expect(fresh, wait_seconds=left)
            self._waited.update(ref for ref in fresh if self._ahead.reading(ref))

    def _choose(self, state: UserState, batch: _Batch) -> Placed:
        head = _head(state)
        if head is None:
            return Placed(None)
        try:
            for head in self._heads(state, head):  # noqa: B020 - the last one is whose parent serves
                if self._ready(_ref(state, head.version), batch):
                    return Placed(_ref(state, head.version))
            if head.parent is not None and self._ready(_ref(state, head.parent), batch):
                return Placed(_ref(state, head.parent), Fallback.PARENT)
        except AdapterNotReady:
            return self._meanwhile(state, head)
        return Placed(None, Fallback.BASE)

    def _heads(self, state: UserState, head: Head) -> Iterator[Head]:
        """Yield the head, then the newer one, if any, that is looked for when the head turns out to be bad."""
        known_bad = self._faults.held_back(_ref(state, head.version))
        yield head
        newer = None if known_bad else self._newer_head(state)
        if newer is not None:
            yield newer

    def _meanwhile(self, state: UserState, head: Head) -> Placed:
        """Serve the parent while it still lies in the bank; nothing more is read for an answer that is late already."""
        self._metrics.bank_events.labels("late").inc()
        parent = None if head.parent is None else _ref(state, head.parent)
        if parent is None or not self._model.resident(parent):
            return Placed(None, Fallback.LATE)
        self._model.touch([parent])
        return Placed(parent, Fallback.LATE)

    def _newer_head(self, state: UserState) -> Head | None:
        """Read the head again, once: its files may be gone because a newer version replaced it meanwhile."""
        fresh = self._store.users([state.user_id], self._model.base).get(state.user_id)
        if fresh is None or fresh.head is None or fresh.epoch != state.epoch or fresh.head == state.head:
            return None
        return fresh.head if fresh.head.epoch == state.epoch else None

    def _ready(self, ref: AdapterRef, batch: _Batch) -> bool:
        if self._model.resident(ref):
            self._metrics.bank_events.labels("hit").inc()
            self._model.touch([ref])
            return True
        if self._faults.held_back(ref):
            return False
        self._metrics.bank_events.labels("miss").inc()
        try:
            self._load(ref, batch)
        except AdapterUnreadable as error:
            batch.answered = True
            self._faults.unreadable(ref)
            self._report(ref, error)
            return False
        except TransientError as error:
            batch.failures[ref] = error
            self._faults.failed(ref)
            self._report(ref, error)
            return False
        batch.answered = True
        self._faults.read(ref)
        return True

    def _load(self, ref: AdapterRef, batch: _Batch) -> None:
        self._await([ref], batch)
        tensors = self._adapters.load(ref)
        self._model.install(ref, tensors)
        self._metrics.bank_events.labels("load").inc()
        self._held.add(ref)

    def _report(self, ref: AdapterRef, error: Exception) -> None:
        self._metrics.adapter_faults.inc()
        logger.warning("adapter version %d cannot be read, using a lesser one: %s", ref.version, error)

    def _measure(self) -> None:
        gone = {ref for ref in self._held if not self._model.resident(ref)}
        self._held -= gone
        self._faults.forget()
        if self._ahead is not None:
            self._waited = {ref for ref in self._waited if self._ahead.reading(ref)}
        self._metrics.bank_events.labels("evict").inc(len(gone))
        self._metrics.bank_resident.set(len(self._held))
        self._metrics.bank_bytes.set(self._model.bank_bytes)


def _head(state: UserState) -> Head | None:
    """Return the head where it is of the user's epoch."""
    return state.head if state.head is not None and state.head.epoch == state.epoch else None


def _ref(state: UserState, version: int) -> AdapterRef:
    return AdapterRef(state.user_id, state.epoch, version)
