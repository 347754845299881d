"""The analyses' rows, over all folds and seeds. No model runs here."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.analyses import ADAPTER, COST, PROMPT, WITHIN, Merits
from evaluation.arms import Array, right
from evaluation.experiment import Outcome
from evaluation.splits import Person, clusters
from evaluation.statistics import contrast, mean_interval, units
from oppu.tasks import Kind

BETWEEN, LENGTH, POLICY = "activity between users", "by history length", "increments against full training"
BOUNDS = (0, 16, 50, 100, 200, 10**9)
"""Part users by training events, and prequential events by how many came before."""
SHOWN = ("none", "chosen-prompt", "oppu", "chosen-oppu", "evidence", "fused")
FOLLOW = "oppu (increments)"
"""The adapter alone as it follows the stream, in the analysis by history length."""
RETRAINED = "oppu (trained on all so far)"
"""As ``FOLLOW``, but in place of every increment comes OPPU's training on the whole history up to there."""
INCREMENTS_LESS_FULL = "increments - full training"
DIFFERENCES = {"adapter - prompt": (ADAPTER, PROMPT), INCREMENTS_LESS_FULL: (FOLLOW, RETRAINED)}
"""What is shown of two arms where a row has both: the first less the second."""

Rows = list[dict[str, Any]]


def analysis_rows(outcomes: Sequence[Outcome], kind: Kind) -> dict[str, Rows]:
    """Compute every analysis's rows.

    Args:
        outcomes: One a seed; merits are averaged over seeds.
        kind: Of the task.

    Returns:
        Rows by analysis: ``row``, ``users``, ``queries``, and by arm ``mean``, ``user_mean``, ``ci``.
    """
    of = units(clusters(outcomes[0].people))[0]
    found = {LENGTH: _by_length(outcomes, kind, of), BETWEEN: _between(outcomes, kind, of)}
    if not outcomes[0].analysed:
        return found
    found[POLICY] = _policies([o for o in outcomes if o.analysed], kind, of)
    unit = {person.user_id: own for person, own in zip(outcomes[0].people, of, strict=True)}
    merits = _over_seeds([_one_seed(o) for o in outcomes if o.analysed])
    for name in dict.fromkeys(key[0] for key in merits):
        own = {(row, arm): users for (analysis, row, arm), users in merits.items() if analysis == name}
        found[name] = _rows(_same_users(own) if name == WITHIN else own, unit)
    found[COST] = [
        {"row": str(int(events)), "seconds": float(seconds), "bytes": int(size)}
        for events, seconds, size in max((a.cost for a in outcomes[0].analysed), key=len)
    ]
    return found


def _one_seed(outcome: Outcome) -> Merits:
    """Join folds: each has its own users."""
    found: Merits = {}
    for part in outcome.analysed:
        for key, users in part.merits.items():
            found.setdefault(key, {}).update(users)
    return found


def _over_seeds(seeds: Sequence[Merits]) -> Merits:
    return {
        key: {u: np.mean([s[key][u] for s in seeds], axis=0) for u in users if all(u in s[key] for s in seeds)}
        for key, users in seeds[0].items()
        if all(key in s for s in seeds)
    }


def _same_users(own: Mapping[tuple[str, str], Mapping[str, Array]]) -> dict[tuple[str, str], dict[str, Array]]:
    """Keep the rows up to the greatest level that two users or more reach, and those users only."""
    levels = [key for key in own if key[0].isdigit() and int(key[0]) and len(own[key]) > 1]
    if not levels:
        return {key: dict(users) for key, users in own.items()}
    most = max(levels, key=lambda key: int(key[0]))
    rows = [key for key in own if not key[0].isdigit() or int(key[0]) <= int(most[0])]
    order = sorted(rows, key=lambda key: int(key[0]) if key[0].isdigit() else 10**9)
    return {key: {u: own[key][u] for u in own[most]} for key in order}


def _rows(own: Mapping[tuple[str, str], Mapping[str, Array]], unit: Mapping[str, int]) -> Rows:
    """Return the rows of an analysis, each over the users who have all of its arms; ``unit`` is what each is resampled
    with."""
    found = []
    for row in dict.fromkeys(key[0] for key in own):
        arms = {arm: users for (name, arm), users in own.items() if name == row}
        common = [u for u in next(iter(arms.values())) if all(u in users for users in arms.values())]
        if common:
            values = {arm: [users[u] for u in common] for arm, users in arms.items()}
            found.append(_row(row, values, [unit[u] for u in common]))
    return found


def _row(name: str, arms: Mapping[str, Sequence[Array]], of: Sequence[int]) -> dict[str, Any]:
    """Return one row, with the difference where two arms are to be compared; ``of`` are what users are resampled by."""
    some = next(iter(arms.values()))
    row: dict[str, Any] = {"row": name, "users": len(some), "queries": sum(map(len, some))}
    for arm, values in arms.items():
        row[arm] = {
            "mean": float(np.concatenate(values).mean()),
            "user_mean": float(np.mean([v.mean() for v in values])),
            "ci": mean_interval(values, of),
        }
    for label, (first, second) in DIFFERENCES.items():
        if {first, second} <= set(arms) and len(some) > 1:
            less = contrast([a - b for a, b in zip(arms[first], arms[second], strict=True)], of)
            row[label] = {"mean": less.difference, "user_mean": less.user_difference, "ci": less.ci}
    return row


def _between(outcomes: Sequence[Outcome], kind: Kind, of: Sequence[int]) -> Rows:
    """Part the users by how many events they trained on."""
    people, found = outcomes[0].people, []
    arms = [arm for arm in SHOWN if arm in outcomes[0].arms.held]
    for low, high in zip(BOUNDS, BOUNDS[1:], strict=False):
        some = [at for at, p in enumerate(people) if low <= p.cut < high]
        if some:
            values = {
                arm: [
                    np.mean([right(people[at].test, o.arms.held[arm][at], kind) for o in outcomes], axis=0)
                    for at in some
                ]
                for arm in arms
            }
            found.append(_row(_band(low, high), values, [of[at] for at in some]))
    return found


def _by_length(outcomes: Sequence[Outcome], kind: Kind, of: Sequence[int]) -> Rows:
    """Part all events of the stream, each answered before it was learnt, by the user's events before it."""
    streams = [
        {"none": [t.base for t in o.tables], FOLLOW: [t.follow for t in o.tables], **o.arms.stream} for o in outcomes
    ]
    merits = [_merits_of(o, own, kind) for o, own in zip(outcomes, streams, strict=True)]
    return _banded(merits, tuple(zip(BOUNDS, BOUNDS[1:], strict=False)), of)


def _policies(outcomes: Sequence[Outcome], kind: Kind, of: Sequence[int]) -> Rows:
    """Compare increments with full training at the same places of the stream, on what comes before the next of them.

    Events before the first of them are in no row: both say there what the base says.
    """
    merits = []
    for o in outcomes:
        retrained = {user: scores for part in o.analysed for user, scores in part.retrained.items()}
        both = {FOLLOW: [t.follow for t in o.tables], RETRAINED: [retrained[p.user_id] for p in o.people]}
        merits.append(_merits_of(o, both, kind))
        for users in merits[-1].values():
            for table, own in zip(o.tables, users, strict=True):
                own[: table.adapted] = np.nan
    bands = ((BOUNDS[1], BOUNDS[-1]), *zip(BOUNDS[1:], BOUNDS[2:], strict=False))
    return _banded(merits, bands, of)


def _banded(
    seeds: Sequence[Mapping[str, Sequence[Array]]], bands: Sequence[tuple[int, int]], of: Sequence[int]
) -> Rows:
    """Return a row a band of the events before an item, over the seeds' mean merits ``[n]`` by arm and user."""
    means = {arm: [np.mean(same, axis=0) for same in zip(*(s[arm] for s in seeds), strict=True)] for arm in seeds[0]}
    found = []
    for low, high in bands:
        own = {arm: [users[low:high][~np.isnan(users[low:high])] for users in every] for arm, every in means.items()}
        some = [at for at in range(len(of)) if all(len(users[at]) for users in own.values())]
        if some:
            arms = {arm: [users[at] for at in some] for arm, users in own.items()}
            found.append(_row(_band(low, high), arms, [of[at] for at in some]))
    return found


def _merits_of(outcome: Outcome, streams: Mapping[str, Sequence[Array]], kind: Kind) -> dict[str, list[Array]]:
    return {
        arm: [_merits(p, s, kind) for p, s in zip(outcome.people, scores, strict=True)]
        for arm, scores in streams.items()
    }


def _merits(person: Person, scores: Array, kind: Kind) -> Array:
    """Return the merit of every item ``[n]``, NaN where it has no output."""
    asked = [at for at, item in enumerate(person.items) if not item.bare]
    found = np.full(len(person.items), np.nan)
    found[asked] = right([person.items[at] for at in asked], scores[asked], kind)
    return found


def _band(low: int, high: int) -> str:
    return f"{low} to {high - 1}" if high < BOUNDS[-1] else f"{low} and more"
