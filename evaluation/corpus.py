"""Items to experiment on, from this project's event format or from the benchmarks' published layouts.

``read`` tells the layouts apart by their shape (``evaluation.published`` reads the benchmarks'). Invariants: an
item's id is unique; equal events of a user are one item; texts have no space around them. What may be answered is
not decided here but for ``load``, which takes a task as the service does.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError, field_validator

from oppu.errors import ConfigError, InvalidRecord, Reason
from oppu.parsing import check_version, refusal
from oppu.tasks import Tasks
from oppu.wire import BehaviorEvent

FIRST_DAY = date(2000, 1, 1)
"""Of histories that have no days of their own."""
FEWEST_DAYS = 5
"""Where most users have fewer, days cannot divide what they did."""
_LEAST_DAYS = 3
"""Fewer cannot divide what a user did once the last of them is closed; what has no instants is then taken in turn."""
_FEW_ITEMS = 5
_NAMED = 10
"""So many of a file's faults are said at once."""
_MANY_ITEMS, _INSTRUCTION_WORDS = 20, 6
"""So many inputs that all begin with so many words have an instruction there."""
_GZIP = b"\x1f\x8b"


class _Recorded(BehaviorEvent):
    """An event of a file: a history may hold texts without an output; a rating may be a number, choices be empty."""

    output: str = ""

    @field_validator("output", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
        return str(value) if number else value

    @field_validator("choices", mode="before")
    @classmethod
    def _none_if_empty(cls, value: object) -> object:
        return None if value == [] else value


@dataclass(frozen=True, slots=True)
class Item:
    """One thing a user did. ``day`` orders and separates; ``moment`` is when within it, where that is known.

    ``choices`` are empty for texts; a blank ``output`` means that there is no pair, only the text in ``input``;
    ``query`` that the layout itself holds the item back as a question; not ``dated`` that its day only says its place.
    """

    item_id: str
    user_id: str = field(repr=False)
    task: str
    day: date
    input: str = field(repr=False)
    output: str = field(repr=False)
    choices: tuple[str, ...] = field(default=(), repr=False)
    query: bool = False
    moment: datetime | None = field(default=None, repr=False, compare=False)
    dated: bool = field(default=True, repr=False, compare=False)

    @property
    def bare(self) -> bool:
        """Whether it is a text without an output."""
        return not self.output

    @property
    def answered(self) -> bool:
        """Whether its output can be given as an answer."""
        return not self.bare and (not self.choices or self.output in self.choices)

    @property
    def learnable(self) -> bool:
        """Whether a model may learn it: not where its label is none of the choices."""
        return self.bare or self.answered


@dataclass(frozen=True, slots=True)
class Found:
    """A file's items; how many of its entries had no text and are left out; how many of its questions are, for want of
    an output."""

    items: tuple[Item, ...] = field(repr=False)
    blank: int = 0
    unanswered: int = 0


def load(path: Path, task: str, tasks: Tasks, *, outputs: Path | None = None) -> list[Item]:
    """Read the items of one task, oldest first, as strictly as the service takes events.

    Args:
        path: Events as JSON lines, plain or gzipped, or a LaMP or OPPU JSON file.
        task: Which task's items; a benchmark's file is taken to be of it.
        tasks: The known tasks.
        outputs: LaMP's file of gold outputs.

    Returns:
        The items in order of day; equal days keep the file's order.

    Raises:
        ConfigError: Naming file, line and field.
    """
    found = read(path, task, outputs=outputs, bare=bare_histories(tasks))
    return prepared([i for i in found.items if i.task == task], task, tasks)


def bare_histories(tasks: Tasks) -> frozenset[str]:
    """Return the tasks whose histories may hold texts without an output."""
    return frozenset(name for name, task in tasks.items() if task.bare_history)


def read(
    path: Path, task: str, *, outputs: Path | None = None, bare: Collection[str] = (), option: str = "--outputs"
) -> Found:
    """Read the items of a file, of all tasks, in the file's order.

    Args:
        path: As for ``load``.
        task: What a benchmark's file is taken to be of.
        outputs: LaMP's file of gold outputs; events have theirs.
        bare: The tasks whose events may lack an output.
        option: What ``outputs`` are named by.

    Returns:
        The items, without choices where the file has none, and what is left out.

    Raises:
        ConfigError: Naming file, line and field.
    """
    from evaluation.published import published

    try:
        text = _text(path)
        rows = json.loads(text) if text.lstrip().startswith("[") else None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"events: cannot read {path}: {error}") from error
    try:
        gold = json.loads(_text(outputs)) if outputs is not None else None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{option}: cannot read {outputs}: {error}") from error
    events = rows if rows and any(isinstance(row, dict) and "occurred_at" in row for row in rows) else None
    if rows is not None and events is None:
        found = published(rows, task, gold, option, bare)
        return replace(found, items=tuple(unique(found.items)))
    if outputs is not None:
        raise ConfigError(f"{option}: {path} is of events, which have their outputs: leave {outputs} out")
    placed = enumerate(events) if events is not None else _lines(text)
    return Found(tuple(unique(of_events(_checked(placed, path.name, "line" if events is None else "entry", bare)))))


def of_events(events: Iterable[BehaviorEvent]) -> list[Item]:
    """Return events as items."""
    timed = [(e, e.occurred_at.astimezone(UTC)) for e in events]
    return [
        Item(e.event_id, e.user_id, e.task, at.date(), e.input, e.output, e.choices or (), moment=at) for e, at in timed
    ]


def in_time(*parts: Sequence[Item]) -> tuple[str, list[list[Item]]]:
    """Let instants order and separate where most users have fewer than ``FEWEST_DAYS`` days.

    Args:
        *parts: Items, all of one time line.

    Returns:
        What orders them: ``days``; else ``instants``, or of those too few ``order in the file``, each counted as a day;
        of what has no instants each user's own, queries together last. And the parts.
    """
    every = [item for part in parts for item in part]
    moments = [item.moment for item in every if item.moment is not None]
    days = _usual([i.day for i in own if not i.query] for own in _long(every))
    if days >= (FEWEST_DAYS if len(moments) == len(every) else _LEAST_DAYS):
        return "days" if all(item.dated for item in every) else "order in the file", [list(part) for part in parts]
    if len(moments) < len(every):
        return "order in the file", [_in_turn(part) for part in parts]
    if _usual([i.moment for i in own] for own in _long(every)) >= FEWEST_DAYS:
        rank = {moment: at for at, moment in enumerate(sorted(set(moments)), start=1)}
        numbers, name = iter([rank[moment] for moment in moments]), "instants"
    else:
        numbers, name = iter(range(1, len(every) + 1)), "order in the file"
    dated = name == "instants"
    return name, [[replace(item, day=date.fromordinal(next(numbers)), dated=dated) for item in part] for part in parts]


def _in_turn(items: Sequence[Item]) -> list[Item]:
    """Count each item of a user's history as a day, and let all queries follow it on one."""
    behind = Counter((item.user_id, item.task) for item in items if not item.query)
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for item in items:
        key = item.user_id, item.task
        day = FIRST_DAY + timedelta(days=behind[key] if item.query else seen[key])
        found.append(replace(item, day=day, dated=False))
        seen[key] += 1
    return found


def _long(items: Sequence[Item]) -> list[list[Item]]:
    people = by_user(items).values()
    return [own for own in people if len(own) >= _FEW_ITEMS] or list(people)


def _usual(values: Iterable[Sequence[object]]) -> float:
    """Return how many different values the middle user has."""
    counts = [len(set(own)) for own in values]
    return median(counts) if counts else 0


def unique(items: Iterable[Item]) -> list[Item]:
    """Keep one of a user's items that are equal, and give what shares an id with others one of its own.

    Halves of characters, as where a text was cut, become question marks: no file can hold them.
    """
    first = dict.fromkeys(items)
    count = Counter((item.task, item.item_id) for item in first)
    own: Counter[tuple[str, str, str]] = Counter()
    found = []
    for item in first:
        key = item.user_id, item.task, item.item_id
        own[key] += 1
        # no two lists read alike, whatever stands in them
        names = [item.user_id, item.item_id, *([own[key]] if own[key] > 1 else [])]
        found.append(
            replace(
                item,
                item_id=item.item_id if count[item.task, item.item_id] == 1 else json.dumps(names),
                input=_whole(item.input),
                output=_whole(item.output).strip(),
                choices=tuple(_whole(choice).strip() for choice in item.choices),
            )
        )
    return found


def prepared(items: Sequence[Item], task: str, tasks: Tasks) -> list[Item]:
    """Give every item its choices and order them by day.

    Args:
        items: Of one task.
        task: Its name.
        tasks: The known tasks.

    Returns:
        The items; without labels in task or item, the choices are all outputs that occur.

    Raises:
        ConfigError: There are none, or an output is not among its choices.
    """
    kind = tasks.require(task)
    labels = tuple(sorted({item.output for item in items})) if kind.kind != "text" and not kind.labels else ()
    problems, found = [], []
    for item in items:
        offered = item.choices or labels or None
        try:
            kind.check_output(item.output, offered)
            found.append(replace(item, choices=kind.allowed(offered)))
        except InvalidRecord as error:
            problems.append(f"events: item {item.item_id}: {error.message}")
    if problems or not items:
        raise ConfigError(*(problems[:10] or [f"events: expected some item of task {task}"]))
    return sorted(found, key=lambda item: item.day)


def by_user(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Return each user's items in the given order, users by name."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.user_id, []).append(item)
    return dict(sorted(found.items()))


def _text(path: Path) -> str:
    """Return a file's text; what is gzipped is told by its first bytes."""
    content = path.read_bytes()
    return (gzip.decompress(content) if content.startswith(_GZIP) else content).decode("utf-8-sig")


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    """Return the numbers and contents of the lines that are not blank; of what does not parse, the error."""
    for number, line in enumerate(text.split("\n"), start=1):  # a text may hold other ends of lines
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                at = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
                yield number, InvalidRecord(Reason.INVALID_RECORD, f"expected one JSON object, it does not parse{at}")


def _checked(
    placed: Iterable[tuple[int, object]], name: str, word: str, bare: Collection[str]
) -> Iterator[BehaviorEvent]:
    """Check all events; the first of those that will not do are refused together."""
    refused: list[str] = []
    for at, row in placed:
        try:
            event = _event(row, bare)
        except InvalidRecord as error:
            refused.append(f"events: {name} {word} {at}: {error.message}")
            if len(refused) == _NAMED:
                break
        else:
            yield event
    if refused:
        raise ConfigError(*refused)


def without_instructions(items: Sequence[Item]) -> tuple[list[Item], str]:
    """Leave out what all inputs of a task begin with, as LaMP's instructions: the tasks' own prompts say it.

    Args:
        items: Of one task.

    Returns:
        The items, and what was left out: some words, whole, or nothing where there are few items or one would be left
        without a text.
    """
    words = [item.input.split() for item in items if not item.query]
    if len(words) < _MANY_ITEMS:
        return list(items), ""
    low, high = min(words), max(words)  # what the first and the last in order share, all share
    same = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    if same < _INSTRUCTION_WORDS or same == min(map(len, words)):
        return list(items), ""
    said = low[:same]

    def rest(text: str) -> str:
        own = text.split(maxsplit=same)
        return own[same] if own[:same] == said and len(own) > same else text

    return [replace(item, input=rest(item.input)) for item in items], " ".join(said)


def _event(row: object, bare: Collection[str]) -> BehaviorEvent:
    """Check an event as the service does, but that a history of the ``bare`` tasks may lack outputs."""
    if isinstance(row, InvalidRecord):
        raise row
    if not isinstance(row, Mapping):
        raise InvalidRecord(Reason.INVALID_RECORD, "expected a JSON object")
    try:
        check_version(row)
        event = _Recorded.model_validate(row)
        event.occurred_at.astimezone(UTC)
    except ValidationError as error:
        raise refusal(error) from error
    except OverflowError as error:
        raise InvalidRecord(Reason.INVALID_RECORD, "occurred_at: out of range") from error
    if not event.output.strip() and event.task not in bare:
        only = f", which only {', '.join(sorted(bare))} may lack" if bare else ""
        raise InvalidRecord(Reason.INVALID_RECORD, f"output: expected text that is not blank{only}")
    return event
