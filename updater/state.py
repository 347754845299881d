"""The states of one user's update, the edges between them, and the one function that takes an edge.

Invariant: a state changes only along ``EDGES``; every change is logged (users as keyed hashes) and counted.
"""

import logging
from enum import StrEnum

from oppu.errors import IllegalTransition
from oppu.metrics import Metrics

logger = logging.getLogger(__name__)


class State(StrEnum):
    """Where one user's update stands."""

    IDLE = "idle"
    """Nothing under way: before the claim, and after the attempt was concluded."""
    CLAIMED = "claimed"
    """The claim's token is ours; events and the parent's weights are being read."""
    SCORING = "scoring"
    """Pending events are scored with the live adapter and with none, before anything learns from them."""
    TRAINING = "training"
    """The candidate's weights are being trained, together with other users'."""
    VALIDATING = "validating"
    """The candidate is scored on the events held back from it."""
    PUBLISHING = "publishing"
    """Files go to the registry, then the head moves in the store."""
    FAILED = "failed"
    """The attempt broke: bad data, weights that are not finite, or a claim lost to another holder."""
    DRAINING = "draining"
    """The process stops, or store or registry are away: the claim is given back as if it had never been made."""


_STRAIGHT = {
    State.IDLE: {State.CLAIMED},
    State.CLAIMED: {State.SCORING, State.IDLE},  # idle: nothing to learn from
    State.SCORING: {State.TRAINING},
    State.TRAINING: {State.VALIDATING},
    State.VALIDATING: {State.PUBLISHING, State.IDLE},  # idle: not better than what is served
    State.PUBLISHING: {State.IDLE},
    State.FAILED: {State.IDLE},
    State.DRAINING: {State.IDLE},
}
EDGES: dict[State, frozenset[State]] = {
    state: frozenset(straight | ({State.FAILED, State.DRAINING} - {state})) for state, straight in _STRAIGHT.items()
}
"""Every allowed edge: the straight path, and from any state to ``FAILED`` and to ``DRAINING``."""


class Machine:
    """The state of one user's update."""

    def __init__(self, user: str, metrics: Metrics) -> None:
        """Start idle.

        Args:
            user: The user's keyed hash, for the log.
            metrics: Counts the changes.
        """
        self._user = user
        self._metrics = metrics
        self._state = State.IDLE

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._state

    def advance(self, to: State) -> None:
        """Take an edge.

        Args:
            to: The next state.

        Raises:
            IllegalTransition: The table has no such edge; the state stays.
        """
        if to not in EDGES[self._state]:
            raise IllegalTransition(f"updater: no edge from {self._state} to {to}")
        logger.debug("user %s: %s to %s", self._user, self._state, to)
        self._metrics.transitions.labels(to.value).inc()
        self._state = to
