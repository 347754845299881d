"""Bring the right adapter version of each user into the bank, or say which lesser one serves instead.

Invariant: an adapter is known only by (user, epoch, version), taken from the head read in this step; nothing is
remembered by user alone. A version that cannot be read, or is not here in time, falls back to its parent, then to the
base: nobody's slow disk holds up the other users of a batch for longer than ``wait_seconds``.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from inference.host_cache import HostCache
from oppu.clock import Clock
from oppu.errors import AdapterNotReady, AdapterUnreadable, FatalError
from oppu.lm.port import AdapterRef, AdapterSource, LanguageModel
from oppu.metrics import Metrics
from oppu.store.port import HistoryStore
from oppu.values import Head, UserId, UserState

logger = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""An unreadable version is read again after this long: a mount may have come back, a tampered file will not."""

_PASSES = 4
"""Placing a train of users may evict one placed before; every pass leaves its users the most recent."""


class Fallback(StrEnum):
    """What served instead of the head; the ``reason`` of a degraded adapter."""

    PARENT = "unreadable_fell_back_to_parent"
    BASE = "unreadable_used_base"
    LATE = "not_loaded_in_time"


@dataclass(frozen=True, slots=True)
class Placed:
    """A resident adapter (``None``: the base alone), and what went wrong on the way."""

    ref: AdapterRef | None
    fallback: Fallback | None = None


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
        self._bytes: dict[AdapterRef, int] = {}
        self._unreadable: dict[AdapterRef, float] = {}

    def expect(self, states: Iterable[UserState], *, wait_seconds: float = 0.0) -> None:
        """Let the source read these users' adapters ahead, as far as they are not in the bank.

        Args:
            states: Most urgent first.
            wait_seconds: How long to wait for them.
        """
        heads = [_ref(s, s.head.version) for s in states if s.head is not None and s.head.epoch == s.epoch]
        missing = [ref for ref in heads if not self._model.resident(ref) and not self._is_known_bad(ref)]
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
            TransientError: Registry or store is unavailable.
        """
        users = {state.user_id: state for state in states}
        # who is here already must not be given up for those of the same batch who are not
        self._model.touch(_ref(s, s.head.version) for s in users.values() if s.head is not None)
        self.expect(users.values(), wait_seconds=self._wait_seconds)
        placed = {user: self._choose(state) for user, state in users.items()}
        for _ in range(_PASSES):
            lost = [u for u, p in placed.items() if p.ref is not None and not self._model.resident(p.ref)]
            if not lost:
                self._measure()
                return placed
            placed.update({user: self._choose(users[user]) for user in lost})
        raise FatalError(f"bank: cannot hold the adapters of {len(users)} users at once")

    def _choose(self, state: UserState) -> Placed:
        head = state.head
        if head is None or head.epoch != state.epoch:
            return Placed(None)
        known_bad = self._is_known_bad(_ref(state, head.version))
        try:
            if self._ready(_ref(state, head.version)):
                return Placed(_ref(state, head.version))
        except AdapterNotReady:
            return self._meanwhile(state, head)
        if not known_bad:
            newer = self._newer_head(state)
            if newer is not None and self._ready(_ref(state, newer.version)):
                return Placed(_ref(state, newer.version))
            head = newer or head
        if head.parent is not None and self._ready(_ref(state, head.parent)):
            return Placed(_ref(state, head.parent), Fallback.PARENT)
        return Placed(None, Fallback.BASE)

    def _meanwhile(self, state: UserState, head: Head) -> Placed:
        """Serve the parent while it still lies in the bank; nothing more is read for an answer that is late already."""
        self._metrics.bank_events.labels("late").inc()
        parent = None if head.parent is None else _ref(state, head.parent)
        return Placed(parent if parent is not None and self._model.resident(parent) else None, Fallback.LATE)

    def _newer_head(self, state: UserState) -> Head | None:
        """Read the head again, once: its files may be gone because a newer version replaced it meanwhile."""
        fresh = self._store.users([state.user_id], self._model.base).get(state.user_id)
        if fresh is None or fresh.head is None or fresh.epoch != state.epoch or fresh.head == state.head:
            return None
        return fresh.head if fresh.head.epoch == state.epoch else None

    def _ready(self, ref: AdapterRef) -> bool:
        if self._model.resident(ref):
            self._metrics.bank_events.labels("hit").inc()
            return True
        if self._is_known_bad(ref):
            return False
        self._metrics.bank_events.labels("miss").inc()
        try:
            tensors = self._adapters.load(ref)
            self._model.install(ref, tensors)
        except AdapterUnreadable as error:
            self._metrics.adapter_faults.inc()
            self._unreadable[ref] = self._clock.monotonic() + RETRY_SECONDS
            logger.warning("adapter version %d is unreadable, using a lesser one: %s", ref.version, error)
            return False
        self._metrics.bank_events.labels("load").inc()
        self._bytes[ref] = sum(tensor.nbytes for tensor in tensors.values())
        return True

    def _is_known_bad(self, ref: AdapterRef) -> bool:
        until = self._unreadable.get(ref)
        return until is not None and self._clock.monotonic() < until

    def _measure(self) -> None:
        gone = [ref for ref in self._bytes if not self._model.resident(ref)]
        for ref in gone:
            del self._bytes[ref]
        at = self._clock.monotonic()
        for ref in [ref for ref, until in self._unreadable.items() if until <= at]:
            del self._unreadable[ref]
        self._metrics.bank_events.labels("evict").inc(len(gone))
        self._metrics.bank_resident.set(len(self._bytes))
        self._metrics.bank_bytes.set(sum(self._bytes.values()))


def _ref(state: UserState, version: int) -> AdapterRef:
    return AdapterRef(state.user_id, state.epoch, version)
