"""Where ingest stands in each partition, by what the store says, and where it must begin to read.

Invariant: the ``expected`` of an advance is what the store held when it was last read or written here, so that a
worker that was overtaken writes nothing. No broker offset is ever reset on its own account.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from oppu.errors import OffsetIdentityChanged, TransientError
from oppu.store.records import OffsetAdvance, StoredOffset
from oppu.values import Partition, Record

logger = logging.getLogger(__name__)

END_GRACE_SECONDS = 15.0
"""A broker that has just restarted may for a moment name an end before the last acknowledged record."""


@dataclass(frozen=True, slots=True)
class Log:
    """What the broker says of one partition: first and next readable offset, and the topic's identity."""

    beginning: int
    end: int
    topic_id: str | None


@dataclass(frozen=True, slots=True)
class _Place:
    expected: int | None
    position: int
    topic_id: str | None


class Offsets:
    """Positions and expected stored offsets of the partitions held now."""

    def __init__(self) -> None:
        self._places: dict[Partition, _Place] = {}
        self._beyond_since: dict[Partition, float] = {}

    def place(
        self, stored: Mapping[Partition, StoredOffset], logs: Mapping[Partition, Log], now: float
    ) -> dict[Partition, int]:
        """Decide where to begin.

        Args:
            stored: What the store has, of any partition.
            logs: What the broker has, of those to be placed.
            now: Monotonic time.

        Returns:
            The first offset to read in each placed partition.

        Raises:
            OffsetIdentityChanged: A stored offset belongs to another topic or, for some time, lies beyond the end.
            TransientError: It lies beyond the end, and the broker may only be starting.
        """
        for partition, log in sorted(logs.items()):
            row = stored.get(partition)
            if row is None:
                self._places[partition] = _Place(None, log.beginning, log.topic_id)
            else:
                self._places[partition] = self._continue(partition, row, log, now)
        return {partition: self._places[partition].position for partition in logs}

    def fresh(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that are not finished yet, dropping those that came again after a seek."""
        return [r for r in records if r.partition in self._places and r.offset >= self._places[r.partition].position]

    def advances(self, records: Iterable[Record]) -> tuple[OffsetAdvance, ...]:
        """Return the compare-and-swaps that finish these records, and those that step over a gap."""
        after = {p: place.position for p, place in self._places.items() if self.gap(p)}
        for record in records:
            after[record.partition] = max(after.get(record.partition, 0), record.offset + 1)
        return tuple(
            OffsetAdvance(partition, self._places[partition].expected, offset, self._places[partition].topic_id)
            for partition, offset in sorted(after.items())
        )

    def gap(self, partition: Partition) -> int:
        """Return how many records before the position the broker had deleted unread, as far as not yet written."""
        place = self._places[partition]
        return 0 if place.expected is None else max(0, place.position - place.expected)

    def written(self, advances: Iterable[OffsetAdvance]) -> int:
        """Note that the store took these, and return how many records were stepped over with them."""
        missed = 0
        for advance in advances:
            missed += self.gap(advance.partition)
            place = _Place(advance.next_offset, advance.next_offset, advance.topic_id)
            self._places[advance.partition] = place
        return missed

    def keep_only(self, assigned: frozenset[Partition]) -> None:
        """Forget partitions that are held no more."""
        for partition in self._places.keys() - assigned:
            del self._places[partition]
        for partition in self._beyond_since.keys() - assigned:
            del self._beyond_since[partition]

    def _continue(self, partition: Partition, row: StoredOffset, log: Log, now: float) -> _Place:
        name = f"{partition.topic} {partition.index}"
        if row.topic_id is not None and log.topic_id is not None and row.topic_id != log.topic_id:
            raise OffsetIdentityChanged(
                f"{name}: offset {row.next_offset} was stored for another topic of this name, which was deleted; "
                f"to go on with the new one: oppu topics adopt {name} --offset {log.beginning}"
            )
        if row.next_offset > log.end:
            if now - self._beyond_since.setdefault(partition, now) < END_GRACE_SECONDS:
                raise TransientError(f"{name}: stored offset {row.next_offset} lies beyond the end {log.end} so far")
            raise OffsetIdentityChanged(
                f"{name}: stored offset {row.next_offset} lies beyond the end {log.end}: the topic was recreated or "
                f"has lost records; to go on from there: oppu topics adopt {name} --offset {log.end}"
            )
        self._beyond_since.pop(partition, None)
        if row.next_offset < log.beginning:
            missing = log.beginning - row.next_offset
            logger.warning(
                "%s: %d records were deleted before they were read; going on at %d", name, missing, log.beginning
            )
        return _Place(row.next_offset, max(row.next_offset, log.beginning), log.topic_id or row.topic_id)
