"""The benchmarks' published layouts: LaMP's questions with outputs, OPPU's users with profile and queries.

LaMP: a list of {id, input, profile} with {golds: [{id, output}]} in a second file. OPPU: one list of {user_id,
profile, query} (``user_others.json``, ``user_top_100_history.json``) whose queries bring their ``gold``; and a list of
{id, output} for written profiles. What the user did is in ``profile``, oldest first; queries are what is asked, and
become items of the day after the history, so that none is another's past. History without a date counts as one item
a day, in order. Queries lose the instruction before the text, which a task's prompt says already.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from evaluation.corpus import FIRST_DAY, Found, Item
from oppu.errors import ConfigError

_NUMBERED = re.compile(r"(\d{4})(?:\.0)?(?:-(\d{1,2})(?:-(\d{1,2})(?:[ T].*)?)?)?")
_COMPACT = re.compile(r"(?:19|20)\d{6}")
_TWEETED = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2} \d{1,2}) [\d:]{8} (?:[A-Z+\-\d]+ )?(\d{4})")
_OUTPUT_FIELDS = ("output", "gold", "score", "category", "tag", "title", "citation")
_INPUT_FIELDS = ("input", "text", "abstract", "description", "title")
_CUES: Mapping[str, str] = {
    "movie_tagging": "description:",
    "news_categorize": "article:",
    "news_headline": "article:",
    "product_rating": "review:",
    "scholarly_title": "paper:",
    "tweet_paraphrase": "after it:",
}
"""What ends the instruction of a query, by task; the citation query is taken whole, with its candidates."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Fields of a history entry: ``output`` ``None`` means that entries are texts without an answer."""

    inputs: tuple[str, ...]
    output: str | None


_LAYOUTS: Mapping[str, _Layout] = {
    "citation": _Layout(("title", "abstract"), "citation"),
    "movie_tagging": _Layout(("description",), "tag"),
    "news_categorize": _Layout(("text",), "category"),
    "news_headline": _Layout(("text",), "title"),
    "product_rating": _Layout(("text",), "score"),
    "scholarly_title": _Layout(("abstract",), "title"),
    "tweet_paraphrase": _Layout(("text",), None),
}


def published(
    rows: object, task: str, gold: object = None, option: str = "--outputs", bare: Collection[str] | None = None
) -> Found:
    """Turn a published file's content into items.

    Args:
        rows: The parsed questions or users.
        task: Which task it is of.
        gold: The parsed file of outputs, if there is one.
        option: What that is named by.
        bare: The tasks whose histories may hold no output at all; ``None``: any.

    Returns:
        The items, user by user, each user's in order of day; what has no text, or asks without an output, left out.

    Raises:
        ConfigError: Naming entry and field; or no output of ``gold`` is of a question; or no history has an output.
    """
    answers = _answers(gold, option)
    asked_ids: set[str] = set()
    blank = unanswered = 0
    made: dict[str, dict[str, Item]] = {}
    for number, row in enumerate(_list(rows, "events")):
        if not isinstance(row, Mapping) or not isinstance(row.get("profile"), Sequence):
            raise ConfigError(f"events: entry {number}: expected an object with profile")
        user = str(row.get("user_id", row.get("id", number)))
        given = row.get("query")
        given = [given] if isinstance(given, Mapping) else given
        entries = given if isinstance(given, Sequence) else [row] if "input" in row else []
        asked = [(at, e) for at, e in enumerate(entries) if isinstance(e, Mapping) and _filled(e.get("input"))]
        asked_ids.update(str(e["id"]) for _, e in asked if "id" in e)
        history = _history(row["profile"], user, task)
        queries = _queries(asked, user, task, answers, history)
        blank += len(row["profile"]) - len(history) + len(entries) - len(asked)
        unanswered += len(asked) - len(queries)
        made.setdefault(user, {}).update((item.item_id, item) for item in (*history, *queries))
    if gold is not None and not asked_ids & set(answers):
        raise ConfigError(f"{option}: none of its {len(answers)} ids is of a question of the events: another split's?")
    found = tuple(item for own in made.values() for item in own.values())
    layout, learnt = _LAYOUTS.get(task), [item for item in found if not item.query]
    if bare is not None and task not in bare and layout is not None and learnt and all(item.bare for item in learnt):
        raise ConfigError(f"events: profile: expected entries with {layout.output}, none of {len(learnt)} has it")
    return Found(found, blank, unanswered)


def read_profiles(path: Path) -> dict[str, str]:
    """Read written profiles.

    Args:
        path: A JSON list of {id, output}, or an object of texts by user.

    Returns:
        Texts by user id, white space made single.

    Raises:
        ConfigError: Naming file and entry.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--profiles: cannot read {path}: {error}") from error
    if isinstance(content, Mapping):
        content = [{"id": user, "output": text} for user, text in content.items()]
    found = {}
    for number, row in enumerate(_list(content, "--profiles")):
        identity = row.get("id", row.get("user_id")) if isinstance(row, Mapping) else None
        if identity is None or not isinstance(row.get("output"), str):
            raise ConfigError(f"--profiles: entry {number}: expected an object with id and output")
        found[str(identity)] = " ".join(row["output"].split())
    return found


def _history(entries: Sequence[Any], user: str, task: str) -> list[Item]:
    days = [_day(entry, user) for entry in entries]
    dated = None not in days
    if not dated:
        days = [FIRST_DAY + timedelta(days=at) for at in range(len(entries))]
    made = []
    names: Counter[str] = Counter()
    for at, (entry, day) in enumerate(zip(entries, days, strict=True)):
        name, pair = f"{user}/{_identity(entry, user, at)}", _pair(entry, user, task)
        names[name] += 1
        if pair is not None:
            again = f"#{names[name]}" if names[name] > 1 else ""  # the file's ids need not tell entries apart
            made.append(Item(name + again, user, task, day or FIRST_DAY, *pair, dated=dated))
    return sorted(made, key=lambda item: item.day)


def _queries(
    asked: Iterable[tuple[int, Mapping[str, Any]]],
    user: str,
    task: str,
    answers: Mapping[str, str],
    history: Sequence[Item],
) -> list[Item]:
    """Return the queries whose gold output is known, all of one day after the history."""
    known = [
        (
            at,
            e,
            next((str(o) for o in (answers.get(str(e.get("id"))), e.get("gold"), e.get("output")) if _filled(o)), ""),
        )
        for at, e in asked
    ]
    day = history[-1].day + timedelta(days=1) if history else FIRST_DAY
    day = max([day, *(d for _, e, _ in known if (d := _day(e, user)) is not None)])
    taken = {item.item_id for item in history}
    found = []
    for at, entry, output in known:
        name = f"{user}/{_identity(entry, user, at)}"
        while name in taken:
            name += "?"
        taken.add(name)
        if output:
            found.append(Item(name, user, task, day, _asked(str(entry["input"]), task), output, query=True))
    return found


def _pair(entry: Mapping[str, Any], user: str, task: str) -> tuple[str, str] | None:
    """Return an entry's input and output; ``None`` where its input is there and blank.

    Other fields than the layout's stand in for its inputs only where it has none of them.
    """
    layout = _LAYOUTS.get(task)
    there = [name for name in layout.inputs if name in entry] if layout is not None else []
    if layout is not None and there:
        answer = entry.get(layout.output) if layout.output is not None else None
        answered = _filled(answer)
        texts = [str(entry[name]) for name in (there[:1] if answered else there) if _filled(entry[name])]
        return (" ".join(texts), str(answer) if answered else "") if texts else None
    there = [name for name in _INPUT_FIELDS if name in entry]
    if not there:
        named = f"events: user {user}, entry {entry.get('id', '')}"
        raise ConfigError(f"{named}: expected one of {', '.join(_INPUT_FIELDS)}")
    source = next((name for name in there if _filled(entry[name])), None)
    if source is None:
        return None
    target = next((name for name in _OUTPUT_FIELDS if _filled(entry.get(name)) and name != source), None)
    return str(entry[source]), str(entry[target]) if target is not None else ""


def _filled(value: object) -> bool:
    """Whether there is something to read: a number 0 is."""
    return value is not None and bool(str(value).strip())


def _asked(text: str, task: str) -> str:
    _, cue, rest = text.partition(_CUES.get(task, "\0"))
    return rest.strip() if cue and rest.strip() else text


def _identity(entry: object, user: str, at: int) -> str:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"events: user {user}, entry {at}: expected an object")
    return str(entry.get("id", at))


def _day(entry: object, user: str) -> date | None:
    text = str(entry.get("date") or "") if isinstance(entry, Mapping) else ""
    if not text:
        return None
    try:
        return _date(text)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"events: user {user}: date: expected YYYY-MM-DD, got {text[:20]!r}") from error


def _date(text: str) -> date:
    """Read a year, a month or a day however padded, a time behind it, seconds since 1970, or as tweets are dated."""
    if found := _NUMBERED.fullmatch(text):
        return date(int(found[1]), int(found[2] or 1), int(found[3] or 1))
    if _COMPACT.fullmatch(text):
        return datetime.strptime(text, "%Y%m%d").date()
    if text.isdecimal():
        return datetime.fromtimestamp(int(text), UTC).date()
    if found := _TWEETED.fullmatch(text):
        return datetime.strptime(f"{found[1]} {found[2]}", "%b %d %Y").date()
    return datetime.fromisoformat(text).date()


def _answers(gold: object, option: str) -> dict[str, str]:
    if gold is None:
        return {}
    rows = gold.get("golds") if isinstance(gold, Mapping) else gold
    found = {}
    for number, row in enumerate(_list(rows, option)):
        if not isinstance(row, Mapping) or "id" not in row or "output" not in row:
            raise ConfigError(f"{option}: entry {number}: expected an object with id and output")
        found[str(row["id"])] = str(row["output"])
    return found


def _list(rows: object, name: str) -> list[Any]:
    if not isinstance(rows, list):
        raise ConfigError(f"{name}: expected a JSON list")
    return rows
