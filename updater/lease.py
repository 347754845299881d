"""Keep claims alive while their users are trained, and stop the training where the process drains.

Expiry is efficiency, not safety: publishing checks the token. So a renewal that cannot reach the store is only
logged, and a claim that was lost is noted, for its result to be dropped.
"""

import logging
from collections.abc import Callable

from oppu.clock import Clock
from oppu.errors import OppuError, TransientError
from oppu.store.port import HistoryStore
from oppu.store.records import Claim
from oppu.values import UserId

logger = logging.getLogger(__name__)


_NOT_YET = 0.4
"""Of a claim's time: what could not be renewed at half of it is due again after another tenth."""


class Drained(OppuError):
    """Raised out of a heartbeat: the process stops, the work at hand is given up."""


class Leases:
    """The claims of one tick."""

    def __init__(
        self,
        store: HistoryStore,
        clock: Clock,
        *,
        seconds: float,
        alive: Callable[[], None],
        draining: Callable[[], bool],
    ) -> None:
        """Hold no claim yet.

        Args:
            store: Where claims are renewed.
            clock: Tells when half their time is over.
            seconds: How long a claim lasts.
            alive: Called with every heartbeat, for ``/healthz``.
            draining: Says whether to stop.
        """
        self._store = store
        self._clock = clock
        self._seconds = seconds
        self._alive = alive
        self._draining = draining
        self._claims: dict[UserId, Claim] = {}
        self._lost: set[UserId] = set()
        self._renewed = clock.monotonic()

    def hold(self, claim: Claim) -> None:
        """Take charge of a claim that was just made."""
        self._claims[claim.user_id] = claim

    def release(self, user_id: UserId) -> None:
        """Stop renewing: the attempt was concluded."""
        self._claims.pop(user_id, None)

    def lost(self, user_id: UserId) -> bool:
        """Say whether a renewal found that somebody else holds the claim."""
        return user_id in self._lost

    def touch(self) -> None:
        """Give a sign of life, and renew where half the claims' time is over."""
        self._alive()
        if self._clock.monotonic() - self._renewed >= self._seconds / 2:
            self.renew()

    def beat(self) -> None:
        """As :meth:`touch`, from inside long work that can be given up.

        Raises:
            Drained: The process stops.
        """
        self.touch()
        if self._draining():
            raise Drained("draining")

    def renew(self) -> None:
        """Extend every claim held."""
        self._renewed = self._clock.monotonic()
        for user_id, claim in list(self._claims.items()):
            try:
                kept = self._store.renew(claim, self._seconds)
            except TransientError as error:
                logger.warning("cannot renew claims now: %s", error)
                self._renewed -= _NOT_YET * self._seconds
                return
            if not kept:
                self._lost.add(user_id)
                self.release(user_id)
