"""Intervals and tests over users (protocol section 4). Letters: u users, q queries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float] | None
"""Bounds of 95 %; ``None`` where there are too few clusters to resample."""

EXACT_USERS = 20
DRAWS, RESAMPLES = 100_000, 10_000
_BLOCK_RESAMPLES = 2_000
LEAST_CLUSTERS = 3
"""Resamples of fewer clusters are a handful of points: no interval."""
_MANY_CLUSTERS, _USERS_A_CLUSTER = 5, 4
"""Fewer clusters than so many, or of more users each than so many, say next to nothing of a sample of users."""
BY_USERS, BY_CLUSTERS = "users", "users who share items"
LEAST_QUERIES = 8
"""Of one user: blocks of fewer are a handful of points: no interval."""
_NOTHING = 1e-9
"""A user's mean difference below it is none: seeds that cancel out leave a rounding error."""
_TOLERANCE = 1e-12
"""Of the sum of all sizes: patterns of signs that add up to the same do so but for rounding."""
TOP_USERS = 3
"""So many users who carry most of a difference are left out to see what it is without them."""
CASE_STUDY_BELOW = 7
"""Fewer users than this are a case study: their own intervals are reported, and no p of a population."""
_POWER_QUANTILES = 1.959964 + 0.841621
"""Normal quantiles of a two-sided 5 % test and of 80 % power."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """One arm less another, over users' mean differences.

    Attributes:
        difference: Mean over queries.
        ci: Its 95 % interval, clusters resampled.
        user_difference: Mean over users.
        user_ci: Its interval.
        p: Two-sided sign-flip test by user of the mean over queries.
        user_p: The same of the mean over users.
        wins: Users with a positive difference.
        ties: With none.
        losses: With a negative one.
        detectable: The least difference over users that this many would have shown with 80 % power.
        clusters: How many clusters the users form.
        without_top: The mean over queries without the ``TOP_USERS`` who carry most of the difference; ``None`` where
            nobody else is left.
    """

    difference: float
    ci: Interval
    user_difference: float
    user_ci: Interval
    p: float
    user_p: float
    wins: int
    ties: int
    losses: int
    detectable: float
    clusters: int
    without_top: float | None


def units(clusters: Sequence[int]) -> tuple[list[int], str]:
    """Choose what is resampled: users who share items together, or each alone where hardly any stand apart.

    Where all act on the same things, as on the same films, clusters are one or few: of five users or more it is then
    each user, and what intervals say is of these things.

    Args:
        clusters: Each user's cluster number.

    Returns:
        Each user's number, and what a number stands for: ``BY_USERS`` or ``BY_CLUSTERS``.
    """
    users, count = len(clusters), len(set(clusters))
    few = count < _MANY_CLUSTERS or _USERS_A_CLUSTER * count < users
    if count == users or (users >= _MANY_CLUSTERS and few):
        return list(range(users)), BY_USERS
    return list(clusters), BY_CLUSTERS


def contrast(differences: Sequence[Array], clusters: Sequence[int], seed: int = 0) -> Contrast:
    """Compare two arms on the same queries.

    Args:
        differences: Each user's per-query differences; positive is better.
        clusters: Each user's cluster number; users of one cluster are resampled together.
        seed: Of draws and resamples.

    Returns:
        Estimates, intervals and tests.
    """
    sums = np.array([d.sum() for d in differences])
    counts = np.array([len(d) for d in differences], dtype=np.float64)
    means = sums / counts
    ci, user_ci, error = _intervals(sums, counts, clusters, seed)
    rest = np.argsort(-sums * np.sign(sums.sum()), kind="stable")[TOP_USERS:]
    return Contrast(
        difference=float(sums.sum() / counts.sum()),
        ci=ci,
        user_difference=float(means.mean()),
        user_ci=user_ci,
        p=sign_flip(sums, seed),
        user_p=sign_flip(means, seed),
        wins=int((means > _NOTHING).sum()),
        ties=int((np.abs(means) <= _NOTHING).sum()),
        losses=int((means < -_NOTHING).sum()),
        detectable=_POWER_QUANTILES * error,
        clusters=len(set(clusters)),
        without_top=float(sums[rest].sum() / counts[rest].sum()) if len(rest) else None,
    )


def sign_flip(values: Array, seed: int = 0) -> float:
    """Return the two-sided p of a mean of zero: exact up to 20 values, else by 100,000 draws; NaN where one is NaN."""
    if np.isnan(values).any():
        return float("nan")
    least = abs(values.sum()) - _TOLERANCE * max(1.0, np.abs(values).sum())
    if len(values) <= EXACT_USERS:
        signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float((np.abs(signs @ values) >= least).mean())
    chance = np.random.default_rng(seed)
    hits, done = 0, 0
    while done < DRAWS:
        signs = 2 * chance.integers(0, 2, size=(min(10_000, DRAWS - done), len(values))) - 1
        hits += int((np.abs(signs @ values) >= least).sum())
        done += len(signs)
    return (hits + 1) / (DRAWS + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the given order; NaN stays NaN, and counts as one that was tested."""
    order = np.argsort(p)  # NaN last
    adjusted, worst = np.full(len(p), np.nan), 0.0
    for rank, at in enumerate(order[: np.count_nonzero(~np.isnan(p))]):
        worst = max(worst, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = worst
    return [float(x) for x in adjusted]


def max_t(differences: Mapping[str, Sequence[Array]], clusters: Sequence[int], seed: int = 0) -> dict[str, float]:
    """Return how likely so large a loss were in any of several contrasts, if none of them had one (max-T bootstrap).

    What is picked because it came out worst is judged by the worst of all contrasts in each resample (Westfall and
    Young, Resampling-Based Multiple Testing, 1993, single step).

    Args:
        differences: By contrast, each user's per-query differences; negative is a loss.
        clusters: Each user's cluster number; users of one cluster are resampled together.
        seed: Of the resamples.

    Returns:
        One-sided p by contrast; none where there are too few clusters to resample.
    """
    drawn = _resampled(clusters, seed)
    if drawn is None or not differences:
        return {}
    sums = np.array([[d.sum() for d in users] for users in differences.values()])
    counts = np.array([len(d) for d in next(iter(differences.values()))], dtype=np.float64)
    means = sums.sum(axis=1) / counts.sum()
    moved = means - (drawn @ sums.T) / (drawn @ counts)[:, None]
    errors = np.maximum(moved.std(axis=0), np.finfo(np.float64).tiny)
    worst = (moved / errors).max(axis=1)
    return {name: float((worst >= -t).mean()) for name, t in zip(differences, means / errors, strict=True)}


def mean_interval(values: Sequence[Array], clusters: Sequence[int], seed: int = 0) -> Interval:
    """Return the 95 % interval of a mean over queries, clusters of users resampled."""
    sums = np.array([v.sum() for v in values])
    counts = np.array([len(v) for v in values], dtype=np.float64)
    return _intervals(sums, counts, clusters, seed)[0]


def block_interval(values: Array, seed: int = 0) -> Interval:
    """Return the 95 % interval of one user's mean by moving-block bootstrap (Kuensch, Annals of Statistics 17, 1989).

    Blocks of n^(1/3) neighbouring queries are drawn, for queries of one time resemble each other.

    Args:
        values: The user's per-query values in order of time.
        seed: Of the draws.

    Returns:
        Lower and upper bound; ``None`` of fewer than ``LEAST_QUERIES``.
    """
    count = len(values)
    if count < LEAST_QUERIES:
        return None
    size = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, count - size + 1, size=(_BLOCK_RESAMPLES, -(-count // size)))
    drawn = (starts[:, :, None] + np.arange(size)).reshape(len(starts), -1)[:, :count]
    return _bounds(values[drawn].mean(axis=1))


def _intervals(sums: Array, counts: Array, clusters: Sequence[int], seed: int) -> tuple[Interval, Interval, float]:
    """Return the intervals over queries and over users, and the standard error of the latter (NaN without)."""
    drawn = _resampled(clusters, seed)
    if drawn is None:
        return None, None, float("nan")
    over_queries = (drawn @ sums) / (drawn @ counts)
    over_users = (drawn @ (sums / counts)) / drawn.sum(axis=1)
    # a resample of n clusters varies by (n - 1) / n of what another sample would
    count = len(set(clusters))
    error = over_users.std() * np.sqrt(count / (count - 1))
    return _bounds(over_queries), _bounds(over_users), float(error)


def _resampled(clusters: Sequence[int], seed: int) -> NDArray[np.int64] | None:
    """Return how often each user is drawn in each resample of clusters; ``None`` where there are too few of them."""
    names, of_user = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < LEAST_CLUSTERS:
        return None
    chance = np.random.default_rng(seed)
    drawn: NDArray[np.int64] = chance.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return drawn[:, of_user]


def _bounds(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
