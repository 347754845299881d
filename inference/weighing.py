"""Weigh what base, evidence and adapter say of the choices of many asks, those with the same choices at once. Pure.

Invariant: what comes of an ask does not hang on those beside it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inference.attempt import Attempt
from oppu.fusion import Array, Fusion, log_softmax, recency_priors, sources_of
from oppu.lm.port import Scored
from retriever.port import knn_distributions


@dataclass(frozen=True, slots=True)
class Weighed:
    """Probabilities ``[c]`` of an ask's choices, and who had a say in them beside the base."""

    probabilities: Array
    heard: frozenset[str]


_Pair = tuple[Attempt, Scored]


def weigh(attempts: Sequence[Attempt], results: Sequence[Scored | None], fusion: Fusion) -> list[Weighed | None]:
    """Weigh all there is of each ask's choices.

    Args:
        attempts: The asks with what is known of their users.
        results: What the model returned for each; ``None`` where it failed.
        fusion: How sources are weighed.

    Returns:
        One value an ask, in order; ``None`` where it has no choices, or no result.
    """
    groups = defaultdict[tuple[str, ...], list[int]](list)
    pairs: dict[int, _Pair] = {}
    for at, (attempt, result) in enumerate(zip(attempts, results, strict=True)):
        if result is not None and attempt.ask.choices:
            pairs[at] = attempt, result
            groups[attempt.ask.choices].append(at)
    found: list[Weighed | None] = [None] * len(attempts)
    for choices, members in groups.items():
        for at, weighed in zip(members, _weighed(choices, [pairs[at] for at in members], fusion), strict=True):
            found[at] = weighed
    return found


def _weighed(choices: Sequence[str], pairs: Sequence[_Pair], fusion: Fusion) -> list[Weighed]:
    """Weigh asks with the same choices, those of whom the same sources speak at once."""
    votes = knn_distributions([attempt.personal.neighbours for attempt, _ in pairs], choices)
    profiled = [attempt.personal.profiled for attempt, _ in pairs]
    priors = recency_priors([{} if profile is None else profile.prior for profile in profiled], choices)
    silent = np.stack([np.isnan(votes[:, 0]), np.isnan(priors[:, 0])], axis=1).tolist()
    groups = defaultdict[tuple[bool, ...], list[int]](list)
    for at, (attempt, result) in enumerate(pairs):
        groups[attempt.personal.asked, attempt.hears_adapter(result), *silent[at]].append(at)
    found: dict[int, Weighed] = {}
    for (asked, adapted, no_vote, no_prior), members in groups.items():
        own = [pairs[at] for at in members]
        base = np.stack([result.base_scores for _, result in own])
        adapter = np.stack([result.scores for _, result in own]) if adapted else None
        if asked:
            vote, prior = None if no_vote else votes[members], None if no_prior else priors[members]
            sources = sources_of(base, adapter, vote, prior)
            events = np.array([attempt.personal.sequence for attempt, _ in own])
            earned = np.array([attempt.personal.earned for attempt, _ in own])
            log_p, heard = fusion.scores(sources, events, earned), fusion.heard(sources)
        else:  # nothing was to stand beside the model
            log_p = log_softmax(base if adapter is None else adapter)
            heard = frozenset() if adapter is None else frozenset({"adapter"})
        found.update((at, Weighed(said, heard)) for at, said in zip(members, np.exp(log_p), strict=True))
    return [found[at] for at in range(len(pairs))]
