"""Time as an argument: the only module that reads the clock."""

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Source of the current time and of pauses."""

    def now(self) -> datetime:
        """Return the current aware UTC time."""
        ...

    def monotonic(self) -> float:
        """Return seconds that never go backwards, of no defined origin."""
        ...

    def sleep(self, seconds: float) -> None:
        """Pause the caller."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """Return the current aware UTC time."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return the machine's monotonic seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Pause the calling thread."""
        time.sleep(seconds)


class ManualClock:
    """A clock that moves only when told to, for tests and the simulator."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = start
        self._monotonic = 0.0

    def now(self) -> datetime:
        """Return the time it was last moved to."""
        return self._now

    def monotonic(self) -> float:
        """Return the seconds it was advanced by, jumps excluded."""
        return self._monotonic

    def sleep(self, seconds: float) -> None:
        """Advance instead of waiting."""
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` of real time pass."""
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds

    def jump(self, seconds: float) -> None:
        """Step the wall clock alone, either way, as a time server may."""
        self._now += timedelta(seconds=seconds)


_PAUSES = 50
"""Times as long as something took it is left alone: two hundredths of a worker's time at most."""


def next_look(began: float, ended: float, *, every_seconds: float) -> float:
    """Say when to do again what nobody waits for and what takes longer the more there is.

    Args:
        began: When it was begun, monotonic seconds.
        ended: When it was done.
        every_seconds: How often at most.

    Returns:
        Monotonic seconds.
    """
    return ended + max(every_seconds - (ended - began), _PAUSES * (ended - began))
