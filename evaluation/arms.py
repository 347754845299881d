"""From every model's scores to every arm's answers, on the same queries (protocol section 2). No model runs here.

Letters: n items of a user, q of them held back, c choices. Scores are log probabilities. For text tasks c are the
output's tokens, each with its own log probability, NaN after the last (``evaluation.text``).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluation.corpus import Item
from evaluation.history import Past
from evaluation.splits import Person, clusters
from evaluation.stacking import Seen, fit, mixture_share
from oppu.fusion import DEFAULT, FLOOR, Fusion, earn, log_softmax, pick
from oppu.tasks import Kind

Array = NDArray[np.float64]
T = TypeVar("T")

EVIDENCE = ("base", "knn", "prior")
FIT_PARTS = 5
"""Users are left out of the fits of their weights by so many parts."""


@dataclass(frozen=True, slots=True)
class Table:
    """One user's scores, all ``[n, c]``, or ``[q, c]`` for models that only saw the held-back items (``held``).

    ``c`` is of the longest choices, with -inf beyond an item's own. ``follow`` is the base's own before item
    ``adapted``: nothing was learnt yet.
    """

    person: Person
    pasts: Sequence[Past] = field(repr=False)
    base: Array = field(repr=False)
    follow: Array = field(repr=False)
    held: Mapping[str, Array] = field(repr=False)
    adapted: int

    def sources(self, at: int) -> dict[str, Array | None]:
        """Return what each source says of item ``at``, ``[c]`` of its own choices."""
        past, choices = self.pasts[at], len(self.person.items[at].choices)
        return {
            "base": self.base[at][:choices],
            "knn": None if past.knn is None else np.log(past.knn),
            "prior": None if past.prior is None else np.log(past.prior),
            "adapter": self.follow[at][:choices] if at >= self.adapted else None,
        }


@dataclass(frozen=True, slots=True)
class Arms:
    """Each arm's ``[q, c]`` log probabilities by user; ``stream``: evidence, fused and unweighed on all items
    ``[n, c]``; ``trust``: each user's last share of the adapter in ``fused``; ``texts``: what each arm wrote for
    each user's first held-back items."""

    held: dict[str, list[Array]] = field(repr=False)
    stream: dict[str, list[Array]] = field(repr=False)
    trust: list[float] = field(repr=False)
    texts: Mapping[str, list[list[str]]] = field(default_factory=dict, repr=False)


def held_back(tables: Sequence[Table]) -> frozenset[int]:
    """Return the groups of all held-back items."""
    return frozenset(group for t in tables for group in t.person.groups[t.person.cut :])


def without_each(people: Sequence[Person], fit: Callable[[frozenset[str]], T]) -> list[T]:
    """Fit for each user without that user, by ``FIT_PARTS`` parts; who share a test item lie in one part.

    Args:
        people: Whose answers the fits are for.
        fit: Fits without the users of the given ids.

    Returns:
        One fit a user, in order; users of one part share theirs.
    """
    number = clusters(people)
    order = {name: k % FIT_PARTS for k, name in enumerate(dict.fromkeys(number))}
    users: dict[int, set[str]] = {}
    for person, name in zip(people, number, strict=True):
        users.setdefault(order[name], set()).add(person.user_id)
    fits = {part: fit(frozenset(left_out)) for part, left_out in sorted(users.items())}
    return [fits[order[name]] for name in number]


def fit_each(targets: Sequence[Table], others: Sequence[Table], kind: Kind = "choice") -> list[Fusion]:
    """Fit for each target user without that user's items, as the service's weights are fitted on other people's.

    Args:
        targets: Whose answers the fits are for.
        others: Calibrate users.
        kind: Of the task.

    Returns:
        One fit a target, in order; users of one part share theirs.
    """
    every = [*targets, *others]  # who is left out may calibrate in another fold
    closed = held_back(every)
    return without_each(
        [t.person for t in targets],
        lambda users: fit_fusion([t for t in every if t.person.user_id not in users], kind, closed),
    )


def fit_fusion(tables: Sequence[Table], kind: Kind = "choice", closed: frozenset[int] | None = None) -> Fusion:
    """Fit both stacks on calibrate users' items and on targets' items before their cut.

    What has no items to be fitted on stays as it is built in.

    Args:
        tables: Of all of them, of all folds: each user's scores are those of a base that has not seen him.
        kind: Of the task; ratings are fitted in their order, and their adapter has its built-in share.
        closed: Groups of which no item is used; ``None``: those of the tables' held-back items.

    Returns:
        The fit. No item is used that says the same as some user's held-back one.
    """
    closed = held_back(tables) if closed is None else closed
    seen = [
        Seen(table.sources(at), item.choices.index(item.output), table.pasts[at].count)
        for table in tables
        for at, item in enumerate(table.person.train)
        if table.pasts[at].count and item.answered and table.person.groups[at] not in closed
    ]
    offered = {item.choices for table in tables for item in table.person.items}
    order = _by_value(next(iter(offered))) if kind == "rating" and len(offered) == 1 else None
    alone = fit(seen, EVIDENCE, order) if seen else DEFAULT.alone
    adapted = [item for item in seen if item.sources["adapter"] is not None]
    if not adapted:
        return Fusion(alone, DEFAULT.beside, DEFAULT.share)
    beside = fit(adapted, ("adapter",), order)
    if kind == "rating":  # log losses of ratings ask for less of the adapter than their medians are best with
        return Fusion(alone, beside, DEFAULT.share)
    truths = [[stack.scores(i.sources, i.events)[i.right] for stack in (alone, beside)] for i in adapted]
    return Fusion(alone, beside, mixture_share(np.array(truths), [i.events for i in adapted]))


def choice_arms(tables: Sequence[Table], fusions: Sequence[Fusion], kind: Kind = "choice") -> Arms:
    """Answer every held-back item in every arm.

    Args:
        tables: Of the target users, each with the same arms in ``held``.
        fusions: Fitted beforehand, one a user.
        kind: Of the task; a rating's arms have the user's median too.

    Returns:
        All arms.
    """
    held: dict[str, list[Array]] = {}
    stream: dict[str, list[Array]] = {"evidence": [], "fused": [], "unweighed": []}
    trust = []
    for table, fusion in zip(tables, fusions, strict=True):
        cut = table.person.cut
        streamed, weight = _stream(table, fusion)
        own: dict[str, Array] = {"none": table.base[cut:], "follow": table.follow[cut:], **table.held}
        prior = _logs(table, cut, "prior")
        own |= {"prior": _sum(own["none"], prior), "knn": _sum(own["none"], _logs(table, cut, "knn"))}
        for name in ("oppu", "permuted", "volume", "stranger-0"):
            if name in own:
                own[f"{name}+prior"] = _sum(own[name], prior)
        own |= {"majority": _fixed(table, _commonest), "recent": _fixed(table, lambda seen: seen[-1])}
        if kind == "rating":
            own["median"] = _fixed(table, _middle)
        own |= {name: scores[cut:] for name, scores in streamed.items()}
        for name, scores in own.items():
            held.setdefault(name, []).append(scores)
        for name, scores in streamed.items():
            stream[name].append(scores)
        trust.append(weight)
    return Arms(held, stream, trust)


def right(items: Sequence[Item], scores: Array, kind: Kind) -> Array:
    """Return each item's merit ``[n]``: 1 for a right choice, minus the absolute error of a rating's median, or minus
    a text's loss an output token."""
    if kind == "text":
        merits: Array = np.nanmean(scores, axis=1)
        return merits
    answers = [answer(i, s, kind) for i, s in zip(items, scores, strict=True)]
    if kind == "choice":
        return np.array([float(a == i.output) for a, i in zip(answers, items, strict=True)])
    return -np.array([abs(float(a) - float(i.output)) for a, i in zip(answers, items, strict=True)])


def squared_error(items: Sequence[Item], scores: Array) -> Array:
    """Return each rating's squared error ``[n]``, of the mean of its distribution."""
    shares = [np.exp(log_softmax(s[: len(i.choices)])) for i, s in zip(items, scores, strict=True)]
    means = [float(share @ np.array(i.choices, dtype=np.float64)) for i, share in zip(items, shares, strict=True)]
    found: Array = (np.array(means) - np.array([float(i.output) for i in items])) ** 2
    return found


def answer(item: Item, scores: Array, kind: Kind) -> str:
    """Return what one item is answered with: the likeliest choice, or a rating's median."""
    own = scores[: len(item.choices)]
    return pick(kind, item.choices, np.exp(log_softmax(own)))


def log_loss(items: Sequence[Item], scores: Array) -> Array:
    """Return each choice item's log loss ``[n]``, nats; an output that is none of the choices costs ``-FLOOR``."""
    return np.array([-_truth(i, s) for i, s in zip(items, scores, strict=True)])


def _truth(item: Item, scores: Array) -> float:
    return float(scores[item.choices.index(item.output)]) if item.answered else FLOOR


def macro_f1(items: Sequence[Item], scores: Sequence[Array] | Array) -> float:
    """Return the mean F1 over the labels that occur among outputs or answers."""
    answers = [i.choices[int(s[: len(i.choices)].argmax())] for i, s in zip(items, scores, strict=True)]
    truth, given = Counter(i.output for i in items), Counter(answers)
    both = Counter(a for a, i in zip(answers, items, strict=True) if a == i.output)
    labels = sorted({*truth, *given})  # one order of adding up, whatever the hash seed
    return sum(2 * both[x] / (truth[x] + given[x]) for x in labels) / len(labels)


def earned_before(items: Sequence[Item], gains: Mapping[int, float]) -> list[float]:
    """Return what a user's adapter has earned before each item; it moves at the end of each day, by the day's outcomes.

    Args:
        items: All of the user's, in order.
        gains: By place, how many nats better than without it the adapter foresaw an item.

    Returns:
        Log odds, one an item.
    """
    earned, waiting, found = 0.0, list[float](), list[float]()
    for at, item in enumerate(items):
        if at and item.day != items[at - 1].day:
            for gain in waiting:
                earned = earn(earned, gain)
            waiting.clear()
        found.append(earned)
        if at in gains:
            waiting.append(gains[at])
    return found


def _stream(table: Table, fusion: Fusion) -> tuple[dict[str, Array], float]:
    """Answer all of a user's items in order, as the service would; return the adapter's last share too."""
    items = table.person.items
    said = [(table.sources(at), table.pasts[at].count) for at in range(len(items))]
    gains = {
        at: fusion.gain(sources, count, items[at].choices.index(items[at].output))
        for at, (sources, count) in enumerate(said)
        if sources["adapter"] is not None and items[at].answered
    }
    earned = earned_before(items, gains)
    found = {name: np.full_like(table.base, -np.inf) for name in ("evidence", "fused", "unweighed")}
    for at, (sources, count) in enumerate(said):
        own = slice(len(items[at].choices))
        found["evidence"][at, own] = fusion.alone.scores({**sources, "adapter": None}, count)
        found["fused"][at, own] = fusion.scores(sources, count, earned[at])
        found["unweighed"][at, own] = fusion.scores(sources, count)
    return found, float(fusion.weights(len(items), earned[-1])[1])


def _logs(table: Table, cut: int, source: str) -> Array:
    """Return a source's log probabilities on the held-back items, 0 where it has nothing to say."""
    rows = [table.sources(at)[source] for at in range(cut, len(table.person.items))]
    found = np.zeros((len(rows), table.base.shape[1]))
    for at, row in enumerate(rows):
        if row is not None:
            found[at, : len(row)] = row
    return found


def _sum(scores: Array, more: Array) -> Array:
    return np.stack([log_softmax(row) for row in scores + more])


def _fixed(table: Table, choose: Callable[[Sequence[str]], str]) -> Array:
    """Answer with what is chosen of the user's outputs so far; where that is not offered, with what the base says."""
    items, cut = table.person.items, table.person.cut
    found = np.full((len(items) - cut, table.base.shape[1]), -np.inf)
    first: dict[object, int] = {}
    for at, item in enumerate(items):
        seen = [i.output for i in items[: first.setdefault(item.day, at)] if not i.bare]
        if at >= cut:
            given, own = choose(seen) if seen else None, slice(len(item.choices))
            found[at - cut, own] = (
                [0.0 if choice == given else FLOOR for choice in item.choices]
                if given in item.choices
                else log_softmax(table.base[at, own])
            )
    return found


def _by_value(choices: Sequence[str]) -> list[int]:
    return sorted(range(len(choices)), key=lambda at: float(choices[at]))


def _commonest(seen: Sequence[str]) -> str:
    return Counter(seen).most_common(1)[0][0]


def _middle(seen: Sequence[str]) -> str:
    return sorted(seen, key=float)[(len(seen) - 1) // 2]
