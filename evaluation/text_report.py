"""What texts are worth beside their likelihood: ROUGE by arm, contrasts with lead-k, and written examples.

A ROUGE claim is made only for an arm that beats the input's first words by user (protocol section 2).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.arms import Array, Table
from evaluation.rouge import is_copied, is_repeated, rouge_1, rouge_l, words
from evaluation.splits import Person
from evaluation.statistics import Contrast, contrast, mean_interval

Texts = Mapping[str, Sequence[Sequence[str]]]
"""Written texts by arm and user."""

MEASURES: Mapping[str, Callable[[str, str], float]] = {"rouge_1": rouge_1, "rouge_l": rouge_l}
LEAD = "lead"
MEASURE = "rouge_l"
"""What arms that only write, without a loss, are measured by."""
_LENGTH = 110
_CLAIMED_BELOW = 0.05


def written(tables: Sequence[Table], runs: Sequence[Texts]) -> dict[str, dict[str, float]]:
    """Score what was written.

    Args:
        tables: Of the target users.
        runs: A seed's texts each; the first one has all arms, another what it wrote.

    Returns:
        By arm: ``rouge_1``, ``rouge_l`` over queries and as the mean over users (``..._user_mean``), and the shares of
        ``empty``, ``repeated`` and ``copied`` texts.
    """
    found = {}
    for name in runs[0]:
        own: dict[str, float] = {}
        for measure in MEASURES:
            values = rouges(tables, runs, name, measure)
            own[measure] = float(np.concatenate(values).mean())
            own[f"{measure}_user_mean"] = float(np.mean([v.mean() for v in values]))
        found[name] = own | _shares(tables, [run for run in runs if name in run], name)
    return found


def rouges(tables: Sequence[Table], runs: Sequence[Texts], name: str, measure: str) -> list[Array]:
    """Return each user's ROUGE by query, averaged over the seeds that wrote."""
    by_seed = [
        [
            np.array([MEASURES[measure](text, item.output) for text, item in zip(own, t.person.test, strict=False)])
            for own, t in zip(run[name], tables, strict=True)
        ]
        for run in runs
        if name in run
    ]
    return [np.mean(same, axis=0) for same in zip(*by_seed, strict=True)]


def measured(tables: Sequence[Table], runs: Sequence[Texts], name: str, units: Sequence[int]) -> dict[str, Any]:
    """Return what stands for the loss of an arm that has none, and under ``metric`` what that is.

    Args:
        tables: Of the target users.
        runs: As for ``written``.
        name: Of the arm.
        units: What each user is resampled with.

    Returns:
        ``query_mean``, ``user_mean``, ``ci`` and by seed ``seeds``.
    """
    values = rouges(tables, runs, name, MEASURE)
    by_seed = [rouges(tables, [run], name, MEASURE) for run in runs if name in run]
    return {
        "metric": MEASURE,
        "query_mean": float(np.concatenate(values).mean()),
        "user_mean": float(np.mean([v.mean() for v in values])),
        "ci": mean_interval(values, units),
        "seeds": [float(np.concatenate(own).mean()) for own in by_seed],
    }


def lead_contrasts(tables: Sequence[Table], runs: Sequence[Texts], clusters: Sequence[int]) -> dict[str, Contrast]:
    """Compare every arm with the input's first words, and fused with evidence, in both measures."""
    pairs = [(name, LEAD) for name in runs[0] if name != LEAD]
    pairs += [("fused", "evidence")] if {"fused", "evidence"} <= set(runs[0]) else []
    found = {}
    for measure in MEASURES:
        values = {name: rouges(tables, runs, name, measure) for name in runs[0]}
        for one, other in pairs:
            gains = [a - b for a, b in zip(values[one], values[other], strict=True)]
            found[f"{measure} {one} - {other}"] = contrast(gains, clusters)
    return found


def claims(tests: Mapping[str, Contrast]) -> list[str]:
    """Return the arms whose ROUGE-1 and ROUGE-L lie above lead-k's: both intervals over users above 0, and both tests.

    The interval of a few users who all gain is the range of their gains, which says less than their test.
    """
    arms = [name.split()[1] for name in tests if name.startswith("rouge_1") and name.endswith(f" - {LEAD}")]
    return [a for a in arms if all(_above(tests[f"{m} {a} - {LEAD}"]) for m in MEASURES)]


def _above(less: Contrast) -> bool:
    return less.user_ci is not None and less.user_ci[0] > 0 and less.user_p < _CLAIMED_BELOW


def table(arms: Mapping[str, Mapping[str, Any]], claimed: Sequence[str]) -> str:
    """Render the written arms as Markdown."""
    rows = sorted(((n, a) for n, a in arms.items() if "rouge_1" in a), key=lambda pair: -pair[1]["rouge_1"])
    if not rows:
        return ""
    lines = ["", "| written by | ROUGE-1 | ROUGE-L | empty | repeated | copied |", "|---|---|---|---|---|---|"]
    for name, arm in rows:
        shares = " | ".join(f"{arm[share]:.2f}" for share in ("empty", "repeated", "copied"))
        lines.append(f"| {name} | {arm['rouge_1']:.3f} | {arm['rouge_l']:.3f} | {shares} |")
    said = ", ".join(claimed) if claimed else "none, so no claim is made of ROUGE"
    return "\n".join([*lines, "", f"Arms that beat the input's first words in both measures, by user: {said}.", ""])


def examples(
    people: Sequence[Person], merits: Mapping[str, Sequence[Array]], texts: Texts, shown: int
) -> tuple[list[str], list[str]]:
    """Return Markdown rows of the texts that fused foresaw better than evidence, and worse, the largest first.

    Args:
        people: Target users.
        merits: Of ``evidence`` and ``fused``: minus the loss a token by user and query.
        texts: What was written.
        shown: Rows of each.

    Returns:
        Better and worse.
    """
    found: list[tuple[float, str]] = []
    for at, person in enumerate(people):
        gains = merits["fused"][at] - merits["evidence"][at]
        for k, (item, gain) in enumerate(zip(person.test[: len(texts["fused"][at])], gains, strict=False)):
            cells = (item.input, item.output, texts["evidence"][at][k], texts["fused"][at][k])
            row = " | ".join(" ".join(cell.split())[:_LENGTH].replace("|", "/") for cell in cells)
            found.append((float(gain), f"| {row} | {gain:+.2f} |"))
    found.sort(key=lambda pair: -pair[0])
    better = [row for gain, row in found[:shown] if gain > 0]
    worse = [row for gain, row in reversed(found[-shown:]) if gain < 0]
    return better, worse


def _shares(tables: Sequence[Table], runs: Sequence[Texts], name: str) -> dict[str, float]:
    empty, repeated, copied = [], [], []
    for run in runs:
        for own, t in zip(run[name], tables, strict=True):
            for k, text in enumerate(own):
                past = t.pasts[t.person.cut + k]
                earlier = [output for cache in ("knn", "prior") for output, _ in past.caches.get(cache, ())]
                empty.append(not words(text))
                repeated.append(is_repeated(text))
                copied.append(is_copied(text, t.person.test[k].input, earlier))
    return {n: float(np.mean(x)) for n, x in (("empty", empty), ("repeated", repeated), ("copied", copied))}
