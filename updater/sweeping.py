"""Sweep the registry for adapter files of erased users: an updater may have written them after the erasure.

A version is written before it is published, so whoever is killed in between leaves files that no row names. The
first pass goes through every erasure that the store remembers, later ones through those of the last days: files that
are written even later wait for the next updater's first pass. One chunk a tick, so that training waits for none.
"""

import logging
from dataclasses import dataclass, field
from datetime import timedelta

from oppu.clock import Clock
from oppu.effects import Effect, Steps
from oppu.errors import TransientError
from oppu.registry import AdapterRegistry
from oppu.store.port import HistoryStore

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 3600.0
"""Between the end of a pass and the next."""
LATE = timedelta(days=2)
"""A claim lasts a minute unless renewed; the rest is for machines that were suspended and for clocks that differ."""
CHUNK = 50
"""Users of one step: each costs a listing in every base's folder, some 30 ms of an object store."""


@dataclass(slots=True, eq=False)
class Sweeper:
    """Walks through the erasures in the order of the users' hashes."""

    store: HistoryStore
    registry: AdapterRegistry
    clock: Clock
    _after: str = field(default="", init=False)
    _next_at: float = field(default=float("-inf"), init=False)
    _all: bool = field(default=True, init=False)
    _failed: bool = field(default=False, init=False)

    def step(self) -> Steps[None]:
        """Sweep the next chunk, where a pass is under way or due; what cannot be removed now is left for the next."""
        if self.clock.monotonic() < self._next_at:
            return
        since = None if self._all else self.clock.now() - LATE
        erased = self.store.erasures(after=self._after, since=since, limit=CHUNK)
        if erased:
            try:
                yield Effect("registry.sweep", lambda: self._sweep(erased), f"{len(erased)} erasures")
            except TransientError as error:
                logger.warning("registry.sweep: left for later: %s", error)
                self._failed = True
        self._after = max(erased, default="")
        if len(erased) < CHUNK:
            self._end_pass()

    def _end_pass(self) -> None:
        # after a pass that failed somewhere the next one leaves nothing out
        self._after, self._all, self._failed = "", self._failed, False
        self._next_at = self.clock.monotonic() + PAUSE_SECONDS

    def _sweep(self, erased: dict[str, int]) -> None:
        if removed := self.registry.sweep(erased):
            logger.info("registry: %d folders of erased users removed", removed)
