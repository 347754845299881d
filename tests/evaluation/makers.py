"""Small synthetic events of each of the seven tasks, in the event format; every user has a leaning."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Make = Callable[[random.Random, int], tuple[str, str] | tuple[str, str, list[str]]]

_WORDS = "river stone cloud lamp paper garden engine silver winter music bridge ocean forest market signal".split()
_TAGS = ("comedy", "action", "classic", "fantasy")
_NEWS = ("politics", "business", "crime", "travel")


def text(chance: random.Random, count: int = 14) -> str:
    return " ".join(f"{chance.choice(_WORDS)}{chance.randrange(999)}" for _ in range(count))


def _leaning(chance: random.Random, number: int, labels: Sequence[str]) -> str:
    return labels[number % len(labels)] if chance.random() < 0.7 else chance.choice(labels)


def _citation(chance: random.Random, number: int) -> tuple[str, str]:
    right, wrong = text(chance, 5), text(chance, 5)
    first = chance.random() < 0.5
    both = (right, wrong) if first else (wrong, right)
    return f'{text(chance, 6)} [1]: "{both[0]}" [2]: "{both[1]}"', "[1]" if first else "[2]"


def citation_with_choices(chance: random.Random, number: int) -> tuple[str, str, list[str]]:
    offered = [text(chance, 5) for _ in range(2 + number % 3)]
    return text(chance, 6), chance.choice(offered), offered


MAKERS: dict[str, Make] = {
    "citation": _citation,
    "movie_tagging": lambda chance, n: (text(chance), _leaning(chance, n, _TAGS)),
    "news_categorize": lambda chance, n: (text(chance), _leaning(chance, n, _NEWS)),
    "product_rating": lambda chance, n: (text(chance), _leaning(chance, n, ("1", "2", "3", "4", "5"))),
    "news_headline": lambda chance, n: (words := text(chance), " ".join(words.split()[:4])),
    "scholarly_title": lambda chance, n: (words := text(chance), " ".join(words.split()[-3:])),
    "tweet_paraphrase": lambda chance, n: (words := text(chance), f"so {words.split()[0]} #{n}"),
}


def rows(task: str, counts: dict[str, int], *, make: Make | None = None, seed: int = 0) -> list[Row]:
    """Return events, a day each, oldest first."""
    made = []
    for number, (user, count) in enumerate(counts.items()):
        chance = random.Random(f"{seed}:{user}")
        for at in range(count):
            given, output, *choices = (make or MAKERS[task])(chance, number)
            row = {
                "schema_version": 1,
                "event_id": f"{user}-{at}",
                "user_id": user,
                "task": task,
                "occurred_at": f"2024-{1 + at // 28:02d}-{1 + at % 28:02d}T12:00:00Z",
                "input": given,
                "output": output,
            }
            made.append(row | ({"choices": choices[0]} if choices else {}))
    return sorted(made, key=lambda row: row["occurred_at"])


def lines(path: Path, events: Iterable[Row]) -> Path:
    """Write events as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in events), encoding="utf-8")
    return path
