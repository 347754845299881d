"""Find the record that kills the process, without losing one that was merely there when it died.

Before a step the loop marks its records in a small file, and clears the mark afterwards; a mark that a new
process finds is a death. Two deaths in overlapping ranges of a partition: what both ranges share is taken one
record at a time. Two deaths with the same single record marked: that record is poison and is set aside. So
kill -9 by an operator costs speed at worst; to be set aside, a record must have been alone in two deaths. Where one
after the other is poison, and no step in between ends well, it is rather what they run on that fails: each time twice
as many deaths are asked for, up to 64, so that a night of it costs some tens of records and not all.

Not here: exceptions that the loop handles are no deaths. A mark that cannot be written (disk full) is skipped
with a warning, since the guard must not stop the work that it guards.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from oppu.values import Partition, Record

logger = logging.getLogger(__name__)

DEATHS_BEFORE_SINGLE = 2
DEATHS_BEFORE_POISON = 2
_MOST_DOUBLINGS = 5
SLOTS = 256
"""Processes of one stage on one machine for which a file is looked for."""


class Guard(Protocol):
    """What the loop asks before and after every step."""

    def split(self, records: Sequence[Record]) -> list[list[Record]]:
        """Cut a poll batch into groups to be stepped one after the other; order within partitions is kept."""
        ...

    def poisonous(self, group: Sequence[Record]) -> bool:
        """Tell whether the group is one record that has killed the process too often."""
        ...

    def entering(self, group: Sequence[Record]) -> None:
        """Mark the group before its step."""
        ...

    def leaving(self, next_offsets: Mapping[Partition, int]) -> None:
        """Clear the mark; what lies below ``next_offsets`` is finished and can be suspected no more."""
        ...


class NullGuard:
    """Guards nothing, for tests and for the simulator, whose crashes are no fault of a record."""

    def split(self, records: Sequence[Record]) -> list[list[Record]]:
        """Return the records as one group."""
        return [list(records)]

    def poisonous(self, group: Sequence[Record]) -> bool:
        """Return false."""
        return False

    def entering(self, group: Sequence[Record]) -> None:
        """Do nothing."""

    def leaving(self, next_offsets: Mapping[Partition, int]) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class _Range:
    """Offsets ``first`` to ``last`` of one partition, and how many deaths they have in common."""

    topic: str
    index: int
    first: int
    last: int
    deaths: int = 0

    @property
    def partition(self) -> Partition:
        return Partition(self.topic, self.index)

    def holds(self, record: Record) -> bool:
        return record.partition == self.partition and self.first <= record.offset <= self.last


@dataclass(slots=True)
class _Notes:
    """The file's content: the mark, ranges that died, and single records that died."""

    mark: list[_Range] = field(default_factory=list)
    single: bool = False
    suspects: dict[Partition, _Range] = field(default_factory=dict)
    alone: dict[tuple[Partition, int], int] = field(default_factory=dict)
    poisons: int = 0
    """Records set aside since a step ended well."""


class CrashGuard:
    """A guard whose notes survive the process. One file belongs to one running process.

    ``slot`` is the number of the claimed file: processes of one stage on one machine have different ones.
    """

    def __init__(self, path: Path) -> None:
        self.slot = 0
        self._path = path
        self._lock: int | None = None
        self._warned = False
        self._notes = _read(path)
        if self._notes.mark:
            self._count_death()

    @classmethod
    def claim(cls, folder: Path, name: str) -> "CrashGuard":
        """Take the first file of a stage that no living process holds, so that a restart finds its own again.

        Args:
            folder: Where the files lie.
            name: The stage's or slot's name.

        Returns:
            The guard; its file stays locked until :meth:`close` or the process ends.

        Raises:
            OSError: The folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for slot in range(SLOTS):
            path = folder / f"{name}.{slot}.inflight.json"
            lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            guard = cls(path)
            guard._lock, guard.slot = lock, slot
            return guard
        raise OSError(f"{folder}: all {SLOTS} files of {name} are in use")

    def close(self) -> None:
        """Give the file back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def split(self, records: Sequence[Record]) -> list[list[Record]]:
        """Cut out each suspected record as a group of its own; order within partitions is kept."""
        groups: list[list[Record]] = []
        joined = False  # whether the last group may take further records
        for record in records:
            if self._suspected(record):
                groups.append([record])
                joined = False
            elif joined:
                groups[-1].append(record)
            else:
                groups.append([record])
                joined = True
        return groups or [[]]

    def poisonous(self, group: Sequence[Record]) -> bool:
        """Tell whether the group is one record in which the process died alone too often."""
        if len(group) != 1:
            return False
        deaths = self._notes.alone.get((group[0].partition, group[0].offset), 0)
        return deaths >= DEATHS_BEFORE_POISON << min(self._notes.poisons, _MOST_DOUBLINGS)

    def entering(self, group: Sequence[Record]) -> None:
        """Mark the group: should the process die now, the next one finds it."""
        if not group:
            return
        self._notes.mark = _ranges(group)
        self._notes.single = len(group) == 1 and self._suspected(group[0])
        self._write()

    def leaving(self, next_offsets: Mapping[Partition, int]) -> None:
        """Clear the mark, and forget suspicions of what is finished."""
        notes = self._notes
        if not notes.mark and not notes.suspects:
            return
        done = [k for k in notes.alone if k[1] < next_offsets.get(k[0], 0)]
        if next_offsets:
            notes.poisons = 0 if notes.mark else notes.poisons + len(done)  # what is set aside bears no mark
        notes.mark, notes.single = [], False
        for partition, next_offset in next_offsets.items():
            suspect = notes.suspects.get(partition)
            if suspect is not None and suspect.last < next_offset:
                del notes.suspects[partition]
        for key in done:
            del notes.alone[key]
        self._write()

    def _suspected(self, record: Record) -> bool:
        suspect = self._notes.suspects.get(record.partition)
        return suspect is not None and suspect.deaths >= DEATHS_BEFORE_SINGLE and suspect.holds(record)

    def _count_death(self) -> None:
        notes = self._notes
        logger.warning(
            "the last process died in a step: %s",
            ", ".join(f"{r.topic}/{r.index} offsets {r.first} to {r.last}" for r in notes.mark),
        )
        if notes.single:
            mark = notes.mark[0]
            key = (mark.partition, mark.first)
            notes.alone[key] = notes.alone.get(key, 0) + 1
        else:
            for mark in notes.mark:
                notes.suspects[mark.partition] = _common(notes.suspects.get(mark.partition), mark)
        notes.mark, notes.single = [], False
        self._write()

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(_encode(self._notes), encoding="utf-8")
            os.replace(new, self._path)
        except OSError as error:
            if not self._warned:
                logger.warning("cannot mark records in %s, going on without: %s", self._path, error)
            self._warned = True


def _common(earlier: _Range | None, mark: _Range) -> _Range:
    """Return what two deaths have in common; the later one alone where they have nothing."""
    if earlier is not None:
        first, last = max(earlier.first, mark.first), min(earlier.last, mark.last)
        if first <= last:
            return _Range(mark.topic, mark.index, first, last, earlier.deaths + 1)
    return _Range(mark.topic, mark.index, mark.first, mark.last, 1)


def _ranges(records: Iterable[Record]) -> list[_Range]:
    spans: dict[Partition, tuple[int, int]] = {}
    for record in records:
        first, last = spans.get(record.partition, (record.offset, record.offset))
        spans[record.partition] = (min(first, record.offset), max(last, record.offset))
    return [_Range(p.topic, p.index, first, last) for p, (first, last) in spans.items()]


def _encode(notes: _Notes) -> str:
    return json.dumps(
        {
            "mark": [asdict(r) for r in notes.mark],
            "single": notes.single,
            "suspects": [asdict(r) for r in notes.suspects.values()],
            "poisons": notes.poisons,
            "alone": [[p.topic, p.index, offset, deaths] for (p, offset), deaths in notes.alone.items()],
        }
    )


def _read(path: Path) -> _Notes:
    """Read the notes; an unreadable file is as good as none, since it only ever costs a recount."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        suspects = [_Range(**r) for r in content["suspects"]]
        return _Notes(
            mark=[_Range(**r) for r in content["mark"]],
            single=bool(content["single"]),
            poisons=int(content.get("poisons", 0)),
            suspects={r.partition: r for r in suspects},
            alone={(Partition(t, i), offset): deaths for t, i, offset, deaths in content["alone"]},
        )
    except FileNotFoundError:
        return _Notes()
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("cannot read %s, starting without its marks: %s", path, error)
        return _Notes()
