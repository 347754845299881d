"""Items to experiment on, from this project's event format or from the benchmarks' published layouts.

``load`` tells the layouts apart by their shape. LaMP: ``questions`` (a list of {id, input, profile}) with
``outputs`` ({golds: [{id, output}]}) in a second file. OPPU: one list of {user_id, profile, query} in one file
(``user_others.json``, ``user_top_100_history.json``). Published items without a date count as one a day, in order.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from oppu.errors import ConfigError, InvalidRecord
from oppu.tasks import Tasks
from oppu.wire import BehaviorEvent

_FIRST_DAY = date(2000, 1, 1)
_OUTPUT_FIELDS = ("output", "gold", "score", "category", "tag", "title", "abstract", "text")
_INPUT_FIELDS = ("input", "text", "abstract", "description", "title")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing a user did. ``day`` orders and separates; ``output`` is empty in histories that have none."""

    item_id: str
    user_id: str = field(repr=False)
    task: str
    day: date
    input: str = field(repr=False)
    output: str = field(repr=False)
    choices: tuple[str, ...] = field(default=(), repr=False)


def load(path: Path, task: str, tasks: Tasks, *, outputs: Path | None = None) -> list[Item]:
    """Read the items of one task, oldest first.

    Args:
        path: Events as JSON lines (gzip by name), or a LaMP or OPPU JSON file.
        task: Which task's items; a benchmark's file is taken to be of it.
        tasks: The known tasks.
        outputs: LaMP's file of gold outputs.

    Returns:
        The items in order of day; equal days keep the file's order.

    Raises:
        ConfigError: Naming file, line and field.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        gold = json.loads(outputs.read_text(encoding="utf-8")) if outputs is not None else None
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"events: cannot read {path}: {error}") from error
    items = _published(text, task, gold) if text.lstrip().startswith("[") else of_events(_events(text, path), task)
    return prepared(items, task, tasks)


def of_events(events: Iterable[BehaviorEvent], task: str) -> list[Item]:
    """Return one task's events as items."""
    return [
        Item(e.event_id, e.user_id, task, e.occurred_at.astimezone(UTC).date(), e.input, e.output, e.choices or ())
        for e in events
        if e.task == task
    ]


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


def _events(text: str, path: Path) -> Iterator[BehaviorEvent]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield BehaviorEvent.model_validate_json(line)
            except ValueError as error:
                raise ConfigError(f"events: {path.name} line {number}: {error}") from error


def _published(text: str, task: str, gold: Mapping[str, Any] | None) -> list[Item]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"events: not JSON: {error}") from error
    answers = {str(row["id"]): str(row["output"]) for row in (gold or {}).get("golds", [])}
    items: list[Item] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or "profile" not in row:
            raise ConfigError(f"events: entry {number}: expected an object with profile")
        user = str(row.get("user_id", row.get("id")))
        queries = row.get("query") if isinstance(row.get("query"), Sequence) else [row]
        made = [_item(entry, user, task, answers) for entry in (*row["profile"], *(queries or ()))]
        items += [_dated(item, at) for at, item in enumerate(m for m in made if m is not None)]
    return items


def _item(entry: Mapping[str, Any], user: str, task: str, answers: Mapping[str, str]) -> Item | None:
    """Return a history entry or query as an item; ``None`` for a query whose gold output is not known."""
    identity = str(entry.get("id", ""))
    source = next((name for name in _INPUT_FIELDS if entry.get(name)), None)
    if source is None:
        raise ConfigError(f"events: user {user}, entry {identity}: expected one of {', '.join(_INPUT_FIELDS)}")
    target = next((name for name in _OUTPUT_FIELDS if entry.get(name) and name != source), None)
    output = answers.get(identity, str(entry[target]) if target is not None else "")
    if "profile" in entry and not output:
        return None
    day = _FIRST_DAY
    if entry.get("date"):
        day = datetime.fromisoformat(str(entry["date"])).date()
    return Item(f"{user}/{identity}", user, task, day, str(entry[source]), output)


def _dated(item: Item, at: int) -> Item:
    if item.day != _FIRST_DAY:
        return item
    day = _FIRST_DAY + timedelta(days=at)
    return replace(item, day=day)
