"""What may be answered to each item, and how outputs are spelt. Pure.

Choices come from the record; else from a given list; else from the task, where its labels cover what may be learnt
from; else they are what may be learnt from. Invariant: a label that occurs in a test part alone is no choice: such a
query stays, cannot be answered rightly, and is counted. An output that is one of the choices but for case and space,
or the same number, or names one by its place (``[2]``, ``2``) or text, is taken as that choice. A rating may bring its
unit or scale (``4 stars``, ``4/5``, ``4,5``), which is left out, where all name the same one. Places count from 1, or
from 0 where some item says 0 and none the number of its choices.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from evaluation.corpus import Item
from oppu.errors import ConfigError
from oppu.tasks import Task

_PLACE = re.compile(r"\[?(\d{1,4})\]?")
_LEADING = re.compile(r"(?:\[(\d{1,4})\]|\((\d{1,4})\)|(\d{1,4})[.:)])(?!\d)")
_RATED = re.compile(
    r"\s*(\d+)(?:\.(\d+)|,(\d{1,2}))?\s*(?:stars?|points?|\u2605+|(?:/|out of)\s*(\d+))?\s*", re.IGNORECASE
)
_BETWEEN = "\"'\u201c\u201d.,; "
"""What separates candidates, and is no part of them."""
_CANDIDATE = re.compile(r"\[(\d{1,4})\]\s*:")

Learnable = Callable[[Sequence[Item]], list[Item]]
"""Returns the items, given in order of day, that lie in no test part."""
Key = Callable[[str], object]
"""What two spellings of one label have in common."""


@dataclass(frozen=True, slots=True)
class Settled:
    """Items with their choices, oldest first, and what is to be said of them in the result."""

    items: tuple[Item, ...] = field(repr=False)
    notes: dict[str, object]


def settle(items: Sequence[Item], task: Task, learnable: Learnable, given: Sequence[str] | None = None) -> Settled:
    """Give every item its choices and spell its output as one of them.

    Args:
        items: Of one task, as read.
        task: The task.
        learnable: Which of them labels may be learnt from.
        given: The labels, if they are given.

    Returns:
        The items; those whose own choices lack their output, or whose rating is no number, are left out and counted.

    Raises:
        ConfigError: Nothing is left, or there are not two labels.
    """
    if task.kind == "rating":
        items = _without_units(items)
    if task.kind == "text":
        made, source = [replace(item, choices=()) for item in items], "none"
    else:
        made, source = _choosable(items, task, learnable, given)
    if not made:
        if items and task.kind == "rating" and not any(_are_numbers(_said(item)) for item in items):
            few = f"none of {len(items)} items has one"
            raise ConfigError(f"events: output: expected a number, such as 4, for task {task.name}; {few}")
        unfit = f" that fits it; {len(items)} do not" if items else ""
        raise ConfigError(f"events: expected some item of task {task.name}{unfit}")
    numbers = {len(item.choices) for item in made}
    notes: dict[str, object] = {
        "items": len(made),
        "items_left_out": len(items) - len(made),
        "items_without_output": sum(item.bare for item in made),
        "items_of_unknown_label": sum(not item.learnable for item in made),
        "labels_from": source,
        "choices": [min(numbers), max(numbers)],
    }
    return Settled(tuple(sorted(made, key=lambda item: item.day)), notes)


def read_labels(path: Path) -> list[str]:
    """Read labels, one a line.

    Args:
        path: A text file; blank lines are passed over.

    Returns:
        At least two different labels, in order.

    Raises:
        ConfigError: Naming the file.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels: cannot read {path}: {error}") from error
    labels = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(labels) < 2:
        raise ConfigError(f"--labels: {path}: expected at least two labels, one a line")
    return labels


def _choosable(
    items: Sequence[Item], task: Task, learnable: Learnable, given: Sequence[str] | None
) -> tuple[list[Item], str]:
    key: Key = _key
    if task.kind == "rating":
        if not _are_numbers(given or ()):
            raise ConfigError("--labels: a rating task expects numbers")
        items, key = [item for item in items if _are_numbers(_said(item))], _number
    placed = bool(task.labels) and not given and task.labels == _places(len(task.labels))
    own = _first_place((item.output, item.choices) for item in items if item.choices)
    bare = _first_place(
        (item.output, task.labels) for item in items if not item.choices and not candidates(item.input)[0]
    )
    read = [
        _by_place(item, _places(len(task.labels), bare), task.answer)
        if placed and not item.choices
        else _by_own(item, key, own)
        for item in items
    ]
    fit = sorted((item for item in read if item is not None), key=lambda item: item.day)
    return _labelled(fit, task, key, learnable, given)


def _first_place(said: Iterable[tuple[str, Sequence[str]]]) -> int:
    """Return what outputs call the first of their choices, 1 or 0; those that are choices word for word say nothing."""
    named = [(_PLACE.fullmatch(output), offered) for output, offered in said]
    places = [
        (int(m[1]), len(offered)) for m, offered in named if m and (m[0] not in offered or _PLACE.fullmatch(offered[0]))
    ]
    from_zero = any(place == 0 for place, _ in places) and all(place < count for place, count in places)
    return 0 if from_zero else 1


def _by_own(item: Item, key: Key, first: int) -> Item | None:
    """Spell the output as one of the item's own choices; ``None`` where it is none of them.

    ``first`` is what outputs call the first one.
    """
    if not item.choices or item.bare or item.output in item.choices:
        return item
    found = next((choice for choice in item.choices if key(choice) == key(item.output)), None)
    place = _PLACE.fullmatch(item.output) if key is _key else None
    if found is None and place and 0 <= int(place[1]) - first < len(item.choices):
        found = item.choices[int(place[1]) - first]
    return replace(item, output=found) if found is not None else None


def _by_place(item: Item, usual: tuple[str, ...], cue: str) -> Item | None:
    """Read the candidates ``[1]: …`` of the input, and the output as the place of one of them, or what stands there.

    ``None`` where it is none of those that are offered, ``usual`` ones where the input has none. What asks nothing (a
    paper and one that it cites) is a text of the user's own, with ``cue`` between them.
    """
    names, texts = candidates(item.input)
    offered = names or usual
    if item.bare:
        return replace(item, choices=offered)
    place = _PLACE.fullmatch(item.output)
    if place and f"[{place[1]}]" in offered:
        return replace(item, choices=offered, output=f"[{place[1]}]")
    said = _key(item.output, _BETWEEN)
    found = next((n for n, text in zip(names, texts, strict=True) if _key(text, _BETWEEN) == said), None)
    leading = _LEADING.match(item.output)
    if found is None and leading:
        found = next((name for name in offered if name[1:-1] in leading.groups()), None)
    if found is not None:
        return replace(item, choices=offered, output=found)
    if names or place:
        return None
    return replace(item, choices=offered, input=f"{item.input} {cue} {item.output}", output="")


def candidates(text: str) -> tuple[tuple[str, ...], list[str]]:
    """Return the places that a text offers, at least two in order from 1 or 0, or none, and what stands at each."""
    marks = list(_CANDIDATE.finditer(text))
    names = tuple(f"[{mark[1]}]" for mark in marks)
    if len(names) < 2 or names not in (_places(len(names)), _places(len(names), 0)):
        return (), []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return names, [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]


def _places(count: int, first: int = 1) -> tuple[str, ...]:
    return tuple(f"[{at}]" for at in range(first, first + count))


def _labelled(
    items: Sequence[Item], task: Task, key: Key, learnable: Learnable, given: Sequence[str] | None
) -> tuple[list[Item], str]:
    """Give the items without choices the task's."""
    if all(item.choices for item in items):
        return list(items), "record"
    seen = [item.output for item in learnable(items) if not item.choices and not item.bare]
    known = given or task.labels
    source = "file" if given else "task"
    if not given and not {key(output) for output in seen} <= {key(label) for label in task.labels}:
        known, source = _commonest(seen, task.labels, key), "training events"
    spelt = {key(label): label for label in reversed(known)}
    labels = tuple(
        sorted(spelt.values(), key=float) if task.kind == "rating" else dict.fromkeys(spelt[key(x)] for x in known)
    )
    if len(labels) < 2:
        raise ConfigError(f"events: expected at least two labels for task {task.name}, found {len(labels)} (--labels)")
    return [
        item if item.choices else replace(item, choices=labels, output=spelt.get(key(item.output), item.output))
        for item in items
    ], source


def _commonest(outputs: Sequence[str], labels: Sequence[str], key: Key) -> list[str]:
    """Return each output's spelling once, a label's where it is one, else the commonest; sorted."""
    counts = Counter(outputs)
    spelt = {key(label): label for label in labels}
    best: dict[object, str] = {}
    for text in sorted(counts, key=lambda text: (-counts[text], text)):
        best.setdefault(key(text), spelt.get(key(text), text))
    return sorted(best.values())


def _key(text: str, around: str = "\"'") -> object:
    return " ".join(text.casefold().split()).strip(around)


def _without_units(items: Sequence[Item]) -> list[Item]:
    """Leave units and scales out of ratings; scales stay where there are several, or some number lies past it."""
    rated = [found for item in items for text in _said(item) if (found := _RATED.fullmatch(text))]
    scales = {found[4] for found in rated if found[4]}
    fits = len(scales) < 2 and all(_figure(found) <= float(scale) for scale in scales for found in rated)

    def number(text: str) -> str:
        found = None if _are_numbers([text]) else _RATED.fullmatch(text)
        return f"{_figure(found):g}" if found and (fits or not found[4]) else text

    return [replace(item, output=number(item.output), choices=tuple(map(number, item.choices))) for item in items]


def _figure(found: re.Match[str]) -> float:
    return float(f"{found[1]}.{found[2] or found[3] or 0}")


def _number(text: str) -> object:
    return float(text) if text else text


def _said(item: Item) -> list[str]:
    return [*item.choices, *([] if item.bare else [item.output])]


def _are_numbers(texts: Iterable[str]) -> bool:
    try:
        return all(abs(float(text)) < float("inf") for text in texts)
    except ValueError:
        return False
