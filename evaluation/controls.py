"""What control adapters are trained on, and whose adapter stands in for a user's own (protocol section 2). Pure."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from evaluation.corpus import Item
from evaluation.splits import Person


def permuted(person: Person, seed: int) -> list[Item]:
    """Return a user's training items with the outputs shuffled among them; where choices differ by item, one is drawn.

    Items without an output stay as they are.
    """
    paired = [item for item in person.train if not item.bare]
    chance = _chance(seed, person.user_id)
    if len({frozenset(item.choices) for item in paired}) > 1:
        outputs = [chance.choice(item.choices) for item in paired]  # a shuffle of places changes none if all are alike
    else:
        outputs = [item.output for item in paired]
        chance.shuffle(outputs)
    drawn = iter(outputs)
    return [item if item.bare else replace(item, output=next(drawn)) for item in person.train]


def volume_matched(person: Person, people: Sequence[Person], seed: int) -> list[Item]:
    """Return as many items of each output as the user has, drawn from other users' training parts.

    An output that nobody else gave is replaced by items of any output; other people's text outputs are never the
    same, so there only the number is matched. Co-authors, who share a group with the user, are left out, or where all
    others do, their items that the user is asked about; where nobody else is there, nothing is returned.
    """
    own = set(person.groups)
    others = [p for p in people if p.user_id != person.user_id]
    others = [p for p in others if not own & set(p.groups)] or others
    pool: dict[str, list[Item]] = defaultdict(list)
    every = [item for p in others for item in not_asked(p, [person])]
    for item in every:
        pool[item.output].append(item)
    if not every:
        return []
    chance = _chance(seed, person.user_id)
    drawn: list[Item] = []
    for output, count in sorted(Counter(item.output for item in person.train).items()):
        choice = pool.get(output) or every
        drawn += chance.sample(choice, count) if count <= len(choice) else chance.choices(choice, k=count)
    return drawn


def not_asked(person: Person, people: Sequence[Person]) -> list[Item]:
    """Return a user's training items that say the same as nothing that some people are asked about."""
    asked = {group for p in people for group in p.groups[p.cut :]}
    return [item for item, group in zip(person.train, person.groups, strict=False) if group not in asked]


def strangers(people: Sequence[Person], count: int, seed: int) -> dict[str, list[str]]:
    """Return for each user the others whose adapters stand in: some at random, then the nearest in label shares."""
    shares = {p.user_id: _shares(p) for p in people}
    groups = {p.user_id: set(p.groups) for p in people}
    found: dict[str, list[str]] = {}
    for p in people:
        able = [q.user_id for q in people if q.user_id != p.user_id and not groups[p.user_id] & groups[q.user_id]]
        if not able:
            found[p.user_id] = []
            continue
        drawn = _chance(seed, p.user_id).sample(able, min(count, len(able)))
        nearest = min(able, key=lambda other: (_distance(shares[p.user_id], shares[other]), other))
        found[p.user_id] = [*drawn, nearest]
    return found


def _shares(person: Person) -> Mapping[str, float]:
    return {output: n / person.cut for output, n in Counter(item.output for item in person.train).items()}


def _distance(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    return sum(abs(a.get(output, 0.0) - b.get(output, 0.0)) for output in sorted({*a, *b}))


def _chance(seed: int, user: str) -> random.Random:
    return random.Random(f"{seed}:{user}")  # noqa: S311 - a reproducible sample
