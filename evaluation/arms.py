"""From every model's scores to every arm's answers, on the same queries (protocol section 2). No model runs here.

Letters: n items of a user, q of them held back, c choices. Scores are log probabilities. For text tasks c is 1 and
a score is minus the loss an output token.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluation.corpus import Item
from evaluation.history import Past
from evaluation.splits import Person
from evaluation.stacking import Seen, fit, mixture_share
from inference.fusion import DEFAULT, FLOOR, Fusion, Trust, log_softmax, mix
from oppu.tasks import Kind

Array = NDArray[np.float64]

EVIDENCE = ("base", "knn", "prior")


@dataclass(frozen=True, slots=True)
class Table:
    """One user's scores, all ``[n, c]``, or ``[q, c]`` for models that only saw the held-back items (``held``).

    ``follow`` is the base's own before item ``adapted``: nothing was learnt yet.
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
    """Each arm's ``[q, c]`` log probabilities by user; ``stream``: evidence, fused and trusted on all items
    ``[n, c]``; ``trust``: each user's last share of the adapter in ``trusted``."""

    held: dict[str, list[Array]] = field(repr=False)
    stream: dict[str, list[Array]] = field(repr=False)
    trust: list[float] = field(repr=False)


def fit_fusion(tables: Sequence[Table]) -> Fusion:
    """Fit both stacks on calibrate users' items and on targets' items before their cut.

    What has no items to be fitted on, stays as it is built in.
    """
    seen = [
        Seen(table.sources(at), item.choices.index(item.output), table.pasts[at].count)
        for table in tables
        for at, item in enumerate(table.person.train)
        if table.pasts[at].count and item.answered
    ]
    alone = fit(seen, EVIDENCE) if seen else DEFAULT.alone
    adapted = [item for item in seen if item.sources["adapter"] is not None]
    if not adapted:
        return Fusion(alone, DEFAULT.beside, DEFAULT.share)
    beside = fit(adapted, ("adapter",))
    truths = [[stack.scores(i.sources, i.events)[i.right] for stack in (alone, beside)] for i in adapted]
    return Fusion(alone, beside, mixture_share(np.array(truths), [i.events for i in adapted]))


def choice_arms(tables: Sequence[Table], fusion: Fusion) -> Arms:
    """Answer every held-back item in every arm.

    Args:
        tables: Of the target users.
        fusion: Fitted beforehand.

    Returns:
        All arms.
    """
    held: dict[str, list[Array]] = {}
    stream: dict[str, list[Array]] = {"evidence": [], "fused": [], "trusted": []}
    trust = []
    for table in tables:
        cut = table.person.cut
        streamed, weight = _stream(table, fusion)
        own: dict[str, Array] = {"none": table.base[cut:], "follow": table.follow[cut:], **table.held}
        prior = _logs(table, cut, "prior")
        own |= {"prior": _sum(own["none"], prior), "knn": _sum(own["none"], _logs(table, cut, "knn"))}
        for name in ("oppu", "permuted", "volume", "stranger-0"):
            if name in own:
                own[f"{name}+prior"] = _sum(own[name], prior)
        own |= {"majority": _fixed(table, majority=True), "recent": _fixed(table, majority=False)}
        own |= {name: scores[cut:] for name, scores in streamed.items()}
        for name, scores in own.items():
            held.setdefault(name, []).append(scores)
        for name, scores in streamed.items():
            stream[name].append(scores)
        trust.append(weight)
    return Arms(held, stream, trust)


def right(items: Sequence[Item], scores: Array, kind: Kind) -> Array:
    """Return each item's merit ``[n]``: 1 for a right choice, minus the absolute error of a rating's median, or the
    score of a text's."""
    if kind == "text":
        return scores[:, 0]
    if kind == "choice":
        answers = [i.choices[int(s[: len(i.choices)].argmax())] for i, s in zip(items, scores, strict=True)]
        return np.array([float(a == i.output) for a, i in zip(answers, items, strict=True)])
    return -np.array([abs(_median(i, s) - float(i.output)) for i, s in zip(items, scores, strict=True)])


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
    labels = {*truth, *given}
    return sum(2 * both[x] / (truth[x] + given[x]) for x in labels) / len(labels)


def _stream(table: Table, fusion: Fusion) -> tuple[dict[str, Array], float]:
    """Answer all of a user's items in order, as the service would; trust moves at the end of each day, by that
    day's outcomes."""
    trust, weights = Trust(), fusion.weights(0)
    found = {name: np.full_like(table.base, -np.inf) for name in ("evidence", "fused", "trusted")}
    waiting: list[Array] = []
    items = table.person.items
    for at, item in enumerate(items):
        if at and item.day != items[at - 1].day:
            for losses in waiting:
                weights = trust.after(weights, losses, fusion.weights(table.pasts[at].count))
            waiting.clear()
        sources, count = table.sources(at), table.pasts[at].count
        own = slice(len(item.choices))
        found["evidence"][at, own] = fusion.alone.scores({**sources, "adapter": None}, count)
        found["fused"][at, own] = fusion.scores(sources, count)
        found["trusted"][at] = found["evidence"][at]
        if sources["adapter"] is not None:
            experts = [found["evidence"][at, own], fusion.beside.scores(sources, count)]
            found["trusted"][at, own] = mix(weights, experts)
            if not item.bare:
                waiting.append(np.array([-_truth(item, expert) for expert in experts]))
    return found, float(weights[1])


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


def _fixed(table: Table, *, majority: bool) -> Array:
    """Answer with the user's commonest output so far, or with the last one (rating: so far's median)."""
    items, cut = table.person.items, table.person.cut
    found = np.full((len(items) - cut, table.base.shape[1]), -np.inf)
    first: dict[object, int] = {}
    for at, item in enumerate(items):
        seen = [i.output for i in items[: first.setdefault(item.day, at)] if not i.bare]
        if at >= cut:
            answer = (Counter(seen).most_common(1)[0][0] if majority else seen[-1]) if seen else item.choices[0]
            found[at - cut, : len(item.choices)] = [0.0 if choice == answer else FLOOR for choice in item.choices]
    return found


def _median(item: Item, scores: Array) -> float:
    values = np.array([float(choice) for choice in item.choices])
    order = values.argsort()
    share = np.exp(scores[: len(values)] - scores[: len(values)].max())[order].cumsum()
    return float(values[order][min(int(np.searchsorted(share, 0.5 * share[-1] - 1e-12)), len(values) - 1)])
