"""Adapter versions that could not be read: how long each is held back, and when the registry as a whole is away.

Decides from what it is told; reads nothing. Invariant: one bad file costs its own user a lesser adapter. Whoever shares
its batch waits for nothing as long as anybody in it is served; where nobody is, for at most ``AWAY_SECONDS``, which it
takes to tell the file from a registry that is away.
"""

from collections.abc import Iterable

from oppu.clock import Clock
from oppu.lm.port import AdapterRef

RETRY_SECONDS = 60.0
"""An unreadable version is read again after this long: a mount may have come back, a tampered file will not."""

HOLD_BACK_SECONDS = 5.0
"""The same after an I/O error, which a reconnected mount or a failed-over server ends within seconds."""

AWAY_SECONDS = 10.0
"""A version that has failed for longer does not count as a sign that the registry is away."""

_FORGET_SECONDS = 3600.0
"""How long it is remembered that a version failed, where nobody reads it with success meanwhile."""


class Faults:
    """Remembers versions that failed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: dict[AdapterRef, float] = {}
        self._failing_since: dict[AdapterRef, float] = {}

    def held_back(self, ref: AdapterRef) -> bool:
        """Say whether a version is not to be read now."""
        until = self._until.get(ref)
        return until is not None and self._clock.monotonic() < until

    def unreadable(self, ref: AdapterRef) -> None:
        """Hold a version back whose files are not what they should be."""
        self._until[ref] = self._clock.monotonic() + RETRY_SECONDS

    def failed(self, ref: AdapterRef) -> None:
        """Hold a version back whose read met an error of the file system."""
        now = self._clock.monotonic()
        self._until[ref] = now + HOLD_BACK_SECONDS
        self._failing_since.setdefault(ref, now)

    def read(self, ref: AdapterRef) -> None:
        """Take back what was held against a version: it has been read."""
        self._until.pop(ref, None)
        self._failing_since.pop(ref, None)

    def away(self, refs: Iterable[AdapterRef], *, answered: bool) -> bool:
        """Judge a batch in which versions failed.

        Args:
            refs: They.
            answered: Whether anything else of the batch was read or found unreadable, or lay in the bank.

        Returns:
            Whether the registry as a whole is away; then none of them is held back.
        """
        failing, since = list(refs), self._clock.monotonic() - AWAY_SECONDS
        if answered:
            self._failing_since.update(dict.fromkeys(failing, since))  # it is these files and no more
        if not any(self._failing_since.get(ref, since) > since for ref in failing):
            return False
        for ref in failing:
            self._until.pop(ref, None)
        return True

    def forget(self) -> None:
        """Drop what is over."""
        now = self._clock.monotonic()
        self._until = {ref: until for ref, until in self._until.items() if until > now}
        for ref in [ref for ref, since in self._failing_since.items() if since <= now - _FORGET_SECONDS]:
            del self._failing_since[ref]
