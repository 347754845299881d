"""The records a worker was offered and did not take yet, in the order in which they came.

Invariants: a partition with held records has none of its later records stepped before them, and no partition's new
records are offered before another's held ones that are due, so that none starves. Pausing partitions and the clock
belong to the loop.
"""

from collections.abc import Iterable, Mapping, Sequence

from oppu.values import Partition, Record


class Held:
    """Held records, and when those of each partition are offered again."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._due: dict[Partition, float] = {}

    def __bool__(self) -> bool:
        return bool(self._records)

    def waiting(self, now: float) -> frozenset[Partition]:
        """Return the partitions whose records are to be offered again only after ``now``."""
        return frozenset(partition for partition, at in self._due.items() if at > now)

    def left_over(self, now: float) -> int:
        """Return how many records are to be offered at once."""
        waiting = self.waiting(now)
        return sum(record.partition not in waiting for record in self._records)

    @property
    def due(self) -> float | None:
        """When the first of them is offered again, by the loop's monotonic time; ``None``: nothing is held."""
        return min(self._due.values(), default=None)

    def clear(self) -> None:
        """Forget everything."""
        self._records.clear()
        self._due.clear()

    def keep_only(self, assigned: frozenset[Partition]) -> None:
        """Forget records of partitions that are no longer assigned."""
        self._due = {partition: at for partition, at in self._due.items() if partition in assigned}
        self._records = [record for record in self._records if record.partition in assigned]

    def hold(self, records: Iterable[Record], *, due: float) -> None:
        """Put records behind those already held; each of their partitions is offered again at ``due``."""
        for record in records:
            self._records.append(record)
            self._due[record.partition] = due

    def offer(self, polled: Sequence[Record], now: float) -> list[Record]:
        """Take what may be stepped now.

        Args:
            polled: New records; those of a held partition go behind its held ones.
            now: The loop's monotonic time.

        Returns:
            Held records whose time has come, then new records, in order within each partition.
        """
        waiting = self.waiting(now)
        offered = [record for record in self._records if record.partition not in waiting]
        self._records = [record for record in self._records if record.partition in waiting]
        self._due = {partition: at for partition, at in self._due.items() if partition in waiting}
        return offered + self.queue(polled)

    def queue(self, records: Sequence[Record]) -> list[Record]:
        """Put records of held partitions behind the held ones, and return the others."""
        free = []
        for record in records:
            if record.partition in self._due:
                self._records.append(record)
            else:
                free.append(record)
        return free


def next_offsets(offered: Sequence[Record], held: Sequence[Record]) -> Mapping[Partition, int]:
    """Return where each offered partition stands after a step that left ``held``: the first offset not finished."""
    after: dict[Partition, int] = {}
    for record in offered:
        after[record.partition] = max(after.get(record.partition, 0), record.offset + 1)
    for record in held:
        after[record.partition] = min(after.get(record.partition, record.offset), record.offset)
    return after
