"""One partition's log in memory, with transactions as Kafka keeps them.

Invariant: readers see committed records only and nothing at or beyond the last stable offset; aborted records and
the control markers that end a transaction take offsets that nobody ever sees.
"""

from dataclasses import dataclass, field
from enum import Enum

from oppu.values import OutRecord, Partition, Record


class Fate(Enum):
    """What became of a transaction."""

    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(slots=True, eq=False)
class Transaction:
    """What one transaction has touched so far.

    ``offsets`` are the next offsets it will commit, by group. ``began`` is on the clock's monotonic scale, at its
    first write, which is when the broker's transaction timeout starts.
    """

    transactional_id: str
    began: float
    fate: Fate = Fate.OPEN
    logs: list["Log"] = field(default_factory=list)
    offsets: dict[str, dict[Partition, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Entry:
    record: Record | None
    transaction: Transaction | None

    def readable(self) -> bool:
        return self.record is not None and (self.transaction is None or self.transaction.fate is Fate.COMMITTED)


class Log:
    """An append-only partition."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.start = 0
        self._entries: list[_Entry] = []
        self._dropped = 0
        self._open: dict[Transaction, int] = {}

    @property
    def end(self) -> int:
        """The next offset to be written."""
        return self._dropped + len(self._entries)

    def append(self, out: OutRecord, timestamp_ms: int, transaction: Transaction | None) -> int:
        """Write one record and return its offset."""
        offset = self.end
        record = Record(self.partition, offset, timestamp_ms, out.key, out.value, out.headers)
        self._entries.append(_Entry(record, transaction))
        if transaction is not None and transaction not in self._open:
            self._open[transaction] = offset
            transaction.logs.append(self)
        return offset

    def mark(self, transaction: Transaction) -> None:
        """Write the control marker that ends a transaction."""
        self._entries.append(_Entry(None, None))
        del self._open[transaction]

    def last_stable(self) -> int:
        """Return the first offset of the oldest open transaction, or the end."""
        return min(self._open.values(), default=self.end)

    def holds(self, position: int) -> bool:
        """Tell whether a reader may stand there; the end counts, since the next record will be there."""
        return self.start <= position <= self.end

    def read(self, position: int, limit: int) -> tuple[list[Record], int]:
        """Read committed records.

        Args:
            position: Where to begin.
            limit: At most so many records.

        Returns:
            The records and the position after them, moved past all that a reader never sees.
        """
        records: list[Record] = []
        position, stable = max(position, self.start), self.last_stable()
        while position < stable and len(records) < limit:
            entry = self._entries[position - self._dropped]
            if entry.readable() and entry.record is not None:
                records.append(entry.record)
            position += 1
        return records, position

    def delete(self, before: int) -> None:
        """Drop all records before an offset, as retention does."""
        self.start = max(self.start, min(before, self.end))
        self._entries = self._entries[self.start - self._dropped :]
        self._dropped = self.start
