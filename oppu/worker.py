"""The shape of a steppable worker, and the loop that owns its network, clock and retries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from oppu.effects import Steps
from oppu.kafka.port import Consumer
from oppu.values import Partition, Record


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """How a step ended.

    Attributes:
        handled: Records finished, durable with their offsets.
        held: Records not taken yet, in order; the loop keeps them and offers them again, before those behind them.
        retry_after_seconds: When to offer ``held`` again; until then nothing more is read of their partitions. With 0
            more is read, as long as fewer than ``kafka.max_poll_records`` are left over.
        more: Whether there is more to do at once, even if no record comes.
    """

    handled: int
    held: tuple[Record, ...] = ()
    retry_after_seconds: float = 0.0
    more: bool = False


class Worker(Protocol):
    """A stage fed from Kafka.

    The loop: ``open`` → poll → ``step`` → … → ``close``. When a step or a poll raises ``TransientError`` the loop
    forgets every record it holds and drives ``recover`` (with capped backoff, still polling paused partitions)
    until it succeeds; afterwards every partition stands at its durable next offset.
    """

    @property
    def name(self) -> str:
        """Short name for logs and metrics: ``ingest``, ``inference``."""
        ...

    @property
    def consumer(self) -> Consumer:
        """The open consumer."""
        ...

    def open(self) -> None:
        """Open clients (a repeated call after ``close`` opens new ones)."""
        ...

    def start(
        self, assigned: frozenset[Partition], committed: Mapping[Partition, int | None]
    ) -> Mapping[Partition, int]:
        """Say where to begin in newly assigned partitions: the consumer's ``Start`` callback."""
        ...

    def step(self, records: Sequence[Record], now: datetime) -> Steps[StepOutcome]:
        """Process one poll batch. An empty one is a chance for upkeep (outbox relay).

        ``Backpressure`` raised before the first effect holds the whole batch, as ``held`` does with a part of it.
        """
        ...

    def poison(self, record: Record, now: datetime) -> Steps[StepOutcome]:
        """Set aside one record that killed the process, as ``worker_crashed``, with its offset."""
        ...

    def recover(self, error: Exception) -> Steps[None]:
        """Abort what is open, reread durable offsets and seek there; rebuild clients where fenced."""
        ...

    def close(self) -> None:
        """Leave the group and release everything."""
        ...
