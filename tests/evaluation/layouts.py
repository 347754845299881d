"""Small made-up files in exactly the layouts that LaMP and OPPU publish."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.evaluation.makers import text

Entry = dict[str, Any]

TAGS = ("sci-fi", "comedy", "violence")
NEWS = ("women", "religion", "sports")
QUESTIONS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "citation": lambda c: (f'Which of them fits "{text(c, 5)}"? [1]: "{text(c, 5)}" [2]: "{text(c, 5)}"', "[2]"),
    "movie_tagging": lambda c: (f"Which tag? tags: [{', '.join(TAGS)}] description: {text(c)}", c.choice(TAGS)),
    "news_categorize": lambda c: (
        f"Which category? categories: [{', '.join(NEWS)}] article: {text(c)}",
        c.choice(NEWS),
    ),
    "product_rating": lambda c: (f"What is the score, 1 to 5? review: {text(c)}", str(c.randint(1, 5))),
    "news_headline": lambda c: (f"Write a headline for this article: {text(c)}", text(c, 4)),
    "scholarly_title": lambda c: (f"Write a title for this abstract of a paper: {text(c)}", text(c, 4)),
    "tweet_paraphrase": lambda c: (f"Paraphrase with nothing before or after it: {text(c)}", text(c, 4)),
}
HISTORIES: dict[str, Callable[[random.Random], Entry]] = {
    "citation": lambda c: {"title": text(c, 5), "abstract": text(c)},
    "movie_tagging": lambda c: {"description": text(c), "tag": c.choice(TAGS)},
    "news_categorize": lambda c: {"text": text(c), "title": text(c, 4), "category": c.choice(NEWS)},
    "product_rating": lambda c: {"text": text(c), "score": str(c.randint(1, 5))},
    "news_headline": lambda c: {"text": text(c), "title": text(c, 4)},
    "scholarly_title": lambda c: {"title": text(c, 4), "abstract": text(c)},
    "tweet_paraphrase": lambda c: {"text": text(c)},
}


def history(task: str, chance: random.Random, count: int, *, dated: bool = False) -> list[Entry]:
    made = [{"id": str(chance.randrange(10**6)), **HISTORIES[task](chance)} for _ in range(count)]
    return [e | {"date": f"2019-{1 + at // 28:02d}-{1 + at % 28:02d}"} for at, e in enumerate(made)] if dated else made


def lamp(folder: Path, task: str, name: str, counts: list[int], *, dated: bool = False) -> tuple[Path, Path]:
    """Write ``NAME_questions.json`` and ``NAME_outputs.json``; one query a user, dated where the split is by time."""
    chance = random.Random(f"{task} {name}")
    questions, golds = [], []
    for number, count in enumerate(counts):
        given, output = QUESTIONS[task](chance)
        identity = f"{name}{number}0"
        questions.append({"id": identity, "input": given, "profile": history(task, chance, count, dated=dated)})
        golds.append({"id": identity, "output": output})
    files = folder / f"{name}_questions.json", folder / f"{name}_outputs.json"
    files[0].write_text(json.dumps(questions))
    files[1].write_text(json.dumps({"task": f"LaMP_{task}", "golds": golds}))
    return files


def oppu(path: Path, task: str, users: dict[int, tuple[int, int]]) -> Path:
    """Write a list of {user_id, profile, query}: numbers of history entries and of queries by user."""
    chance = random.Random(f"{task} {path.name}")
    made = []
    for user, (entries, queries) in users.items():
        asked = [QUESTIONS[task](chance) for _ in range(queries)]
        query = [{"id": f"{user}{at}", "input": given, "gold": gold} for at, (given, gold) in enumerate(asked)]
        made.append({"user_id": user, "profile": history(task, chance, entries), "query": query})
    path.write_text(json.dumps(made))
    return path


def profiles(path: Path, users: list[int]) -> Path:
    """Write ``profile_user_100.json``: a list of {id, output}."""
    path.write_text(json.dumps([{"id": user, "output": f"The user\n  likes {user}."} for user in users]))
    return path
