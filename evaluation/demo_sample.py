"""Draw the demo's sample from the news events: some authors to follow, and other authors to adapt the base on.

Run as ``python -m evaluation.demo_sample SOURCE.jsonl.gz TARGET.jsonl.gz``. The draw depends on hashes of user ids,
on counts and on one cut in time, never on labels. Before the cut lies what other authors wrote (``population``, adapts
the base) and what the followed ones did (``history``); after it, what these did next (``live``). Population shares no
article with followed authors and is older than all that is asked about.
"""

import gzip
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

CUT = "2019-01-01"
FOLLOWED = 24
MIN_BEFORE, MAX_BEFORE = 24, 160
"""A followed author has at least so many events before the cut; the newest so many are taken."""
MIN_AFTER, MAX_AFTER = 20, 80
"""And at least so many after it; the first so many are taken."""

Row = dict[str, Any]


def draw(rows: list[Row]) -> list[Row]:
    """Choose the sample's rows.

    Args:
        rows: All events, oldest first.

    Returns:
        The chosen ones, oldest first, each with a ``role``: ``population``, ``history`` or ``live``.
    """
    counts = Counter(row["user_id"] for row in rows)
    before, after = _by_user(rows, lambda day: day < CUT), _by_user(rows, lambda day: day >= CUT)
    able = [u for u in counts if len(before[u]) >= MIN_BEFORE and len(after[u]) >= MIN_AFTER]
    users = sorted(able, key=_draw_key)[:FOLLOWED]
    history = [row for user in users for row in before[user][-MAX_BEFORE:]]
    live = [row for user in users for row in after[user][:MAX_AFTER]]
    followed_articles = {_normal(row["input"]) for row in history + live}
    population = [
        row
        for row in rows
        if row["user_id"] not in users and row["occurred_at"] < CUT and _normal(row["input"]) not in followed_articles
    ]
    roles = {"population": population, "history": history, "live": live}
    chosen = [{**row, "role": role} for role, own in roles.items() for row in own]
    return sorted(chosen, key=lambda row: (row["occurred_at"], row["event_id"]))


def main(source: str, target: str) -> None:
    """Read all events, draw, and write the sample."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = draw(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in chosen)
    Path(target).write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))
    roles = Counter(row["role"] for row in chosen)
    sys.stdout.write(f"{dict(roles)}, {Path(target).stat().st_size} bytes\n")


def _by_user(rows: list[Row], within: Callable[[str], bool]) -> dict[str, list[Row]]:
    chosen: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if within(row["occurred_at"]):
            chosen[row["user_id"]].append(row)
    return chosen


def _draw_key(user_id: str) -> str:
    return hashlib.sha256(f"demo:{user_id}".encode()).hexdigest()


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


if __name__ == "__main__":
    main(*sys.argv[1:])
