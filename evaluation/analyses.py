"""The paper's analyses on one fold: what a history's length, format and likeness to the query do to each arm.

Each gives every user's merits ``[q]`` under (analysis, row, arm), on the same held-back queries as the arms. What full
training after every chunk would foresee is said of all events instead, as increments are judged.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from evaluation import controls
from evaluation.arms import Array, right
from evaluation.bases import Study, opened
from evaluation.corpus import Item, by_user
from evaluation.duplicates import SAME_COSINE, normal
from evaluation.history import Past, pasts
from evaluation.prompting import Asked, example, examples
from evaluation.splits import Person
from evaluation.training import Bench, follow, full_config, score, stage, train_once
from oppu.embedder import Embedder
from oppu.lm.port import Example, TrainJob, is_bare
from oppu.settings import RetrieverSettings
from oppu.values import UserId, Vector

LEVELS = (10, 25, 50, 100, 200)
"""Newest training events an adapter learns, in the analysis within users."""
FORMAT_K, SHIFT_K = 4, 2
WITHIN, FORMATS, SHIFT, UNADAPTED_BASE, ALL_TASKS, COST = (
    "activity within users",
    "history formats",
    "behaviour shift",
    "no task adaption",
    "one adapter for all tasks",
    "cost by history length",
)
PROMPT, ADAPTER = "in the prompt", "in the adapter"

Key = tuple[str, str, str]
Merits = dict[Key, dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Extra:
    """What the analyses need beside a study: embeddings by item id, also as queries where these have an encoder of
    their own, and the users' items of other tasks."""

    vectors: Mapping[str, Vector] = field(repr=False)
    embedder: Embedder
    queries: Mapping[str, Vector] | None = field(default=None, repr=False)
    sisters: Sequence[Item] = field(default=(), repr=False)

    def pasts(
        self, items: Sequence[Item], settings: RetrieverSettings, before: Sequence[int] | None = None
    ) -> list[Past]:
        """Look up every item's past, as ``evaluation.history.pasts`` does."""
        return pasts(items, self.vectors, self.embedder, settings, before=before, queries=self.queries)


@dataclass(frozen=True, slots=True)
class Analysed:
    """A fold's merits, and training seconds and file bytes ``[levels, 3]`` (events, seconds, bytes).

    ``retrained``: by user, scores ``[n, c]`` of all items by adapters that were trained on the whole history, as OPPU's
    are, whenever the service would have made an increment.
    """

    merits: Merits = field(repr=False)
    cost: NDArray[np.float64]
    retrained: Mapping[str, Array] = field(repr=False)


def analyse(study: Study, held: Mapping[str, Mapping[str, Array]], extra: Extra) -> Analysed:
    """Run every analysis that needs a model.

    Args:
        study: The fold and seed.
        held: The fold's arms by user, ``oppu-unadapted`` among them.
        extra: Embeddings, and items of other tasks.

    Returns:
        All merits.
    """
    run = _Run(study, held, extra, {})
    with opened(study, "plain") as bench:
        _within(run, bench)
        _formats_in_adapters(run, bench)
        _shift_in_adapters(run, bench)
        _all_tasks(run, bench)
        cost = _cost(run, bench)
        retrained = follow(bench, run.people, afresh=True).scores
    if "retrieval" in study.recipe.variants:
        with opened(study, "retrieval") as bench:
            _formats_in_prompts(run, bench)
            _shift_in_prompts(run, bench)
    for base, arms in (("adapted", ("none", "oppu")), ("not adapted", ("unadapted", "oppu-unadapted"))):
        for label, arm in zip(("none", "oppu"), arms, strict=True):
            run.add((UNADAPTED_BASE, base, label), {p.user_id: held[p.user_id][arm] for p in run.people})
    return Analysed(run.merits, cost, retrained)


@dataclass(frozen=True, slots=True)
class _Run:
    """A fold in work."""

    study: Study
    held: Mapping[str, Mapping[str, Array]]
    extra: Extra
    merits: Merits

    @property
    def people(self) -> tuple[Person, ...]:
        return self.study.fold.target

    def add(self, key: Key, scores: Mapping[str, Array]) -> None:
        """Turn users' scores into merits under a key."""
        kind = self.study.tasks.require(self.people[0].items[0].task).kind
        own = {p.user_id: p.test for p in self.people}
        self.merits[key] = {user: right(own[user], found, kind) for user, found in scores.items()}

    def adapters(self, bench: Bench, key: Key, parts: Mapping[str, Sequence[Example]]) -> None:
        """Train each user's adapter on the given examples and add how it does on his queries."""
        name = _stage(key)
        weights = train_once(bench, name, {user: own for user, own in parts.items() if own})
        tests = {p.user_id: list(map(example, p.test)) for p in self.people}

        def compute() -> dict[str, NDArray[Any]]:
            return {user: score(bench.model, tests[user], own) for user, own in weights.items()}

        self.add(key, stage(bench, f"{name}-scores", compute))

    def prompts(self, bench: Bench, key: Key, queries: Mapping[str, Sequence[Example]]) -> None:
        """Add how the base does on the given prompts."""
        name = f"{_stage(key)}-scores"
        self.add(key, stage(bench, name, lambda: {u: score(bench.model, own, None) for u, own in queries.items()}))


def _stage(key: Key) -> str:
    return "-".join(key).replace(" ", "-")


def _within(run: _Run, bench: Bench) -> None:
    for level in LEVELS:
        able = [p for p in run.people if p.cut >= level]
        if able:
            key = (WITHIN, str(level), "oppu")
            run.adapters(bench, key, {p.user_id: list(map(example, p.train[-level:])) for p in able})
    for row, arm in (("0", "none"), ("all", "oppu")):
        run.add((WITHIN, row, "oppu"), {p.user_id: run.held[p.user_id][arm] for p in run.people})


def _formats_in_prompts(run: _Run, bench: Bench) -> None:
    """Ask with retrieved items, with halves of them, with another user's, and with nothing."""
    retrieved = {
        p.user_id: examples(p.test, run.study.pasts[p.user_id][p.cut : len(p.items)], Asked(FORMAT_K))
        for p in run.people
    }
    others = _strangers(run)
    irrelevant = {p.user_id: [_irrelevant(i, others.get(p.user_id)) for i in p.test] for p in run.people}
    formats = {
        "pairs": retrieved,
        "outputs only": {u: [_kept(e, source=False) for e in own] for u, own in retrieved.items()},
        "inputs only": {u: [_kept(e, source=True) for e in own] for u, own in retrieved.items()},
        "another user's": irrelevant,
        "nothing": {u: [replace(e, evidence=()) for e in own] for u, own in retrieved.items()},
    }
    for row, queries in formats.items():
        run.prompts(bench, (FORMATS, row, PROMPT), queries)


def _formats_in_adapters(run: _Run, bench: Bench) -> None:
    parts = {p.user_id: list(map(example, p.train)) for p in run.people}
    run.add((FORMATS, "pairs", ADAPTER), {p.user_id: run.held[p.user_id]["oppu"] for p in run.people})
    run.add((FORMATS, "nothing", ADAPTER), {p.user_id: run.held[p.user_id]["none"] for p in run.people})
    blind = {user: [replace(e, input="") for e in own if not is_bare(e)] for user, own in parts.items()}
    run.adapters(bench, (FORMATS, "outputs only", ADAPTER), blind)
    texts = {user: [Example(e.task, e.input, "") for e in own] for user, own in parts.items()}
    run.adapters(bench, (FORMATS, "inputs only", ADAPTER), texts)
    others = _strangers(run)
    strange = {user: list(map(example, other.train)) for user, other in others.items()}
    if strange:
        run.adapters(bench, (FORMATS, "another user's", ADAPTER), strange)


def _kept(one: Example, *, source: bool) -> Example:
    """Return an example whose evidence has its inputs only, or its outputs only."""
    return replace(one, evidence=tuple((a, "") if source else ("", b) for a, b in one.evidence))


def _strangers(run: _Run) -> dict[str, Person]:
    by_name = {p.user_id: p for p in run.people}
    names = controls.strangers(run.people, 1, run.study.seed)
    return {user: by_name[others[0]] for user, others in names.items() if others}


def _irrelevant(item: Item, other: Person | None) -> Example:
    """Ask with another user's newest items of earlier days; none of his held-back ones."""
    earlier = [i for i in (other.train if other is not None else ()) if i.day < item.day]
    return replace(example(item), evidence=tuple((i.input, i.output) for i in reversed(earlier[-FORMAT_K:])))


def _shift_in_adapters(run: _Run, bench: Bench) -> None:
    """Learn only the half of the history that is least like the queries; as much by chance, to compare."""
    run.add((SHIFT, "all", ADAPTER), {p.user_id: run.held[p.user_id]["oppu"] for p in run.people})
    for row, part in _halves(run).items():
        if row != "all":
            run.adapters(bench, (SHIFT, row, ADAPTER), {u: list(map(example, own)) for u, own in part.items()})


def _shift_in_prompts(run: _Run, bench: Bench) -> None:
    """Retrieve from the same parts of the training history; nothing later is looked at."""
    for row, part in _halves(run).items():
        queries = {}
        for p in run.people:
            own = part[p.user_id]
            before = [*range(1, len(own) + 1), *(len(own) + 1 for _ in p.test)]
            every = [*own, *p.test]
            found = run.extra.pasts(every, run.study.settings.retriever, before)
            queries[p.user_id] = examples(p.test, found[len(own) :], Asked(SHIFT_K))
        run.prompts(bench, (SHIFT, row, PROMPT), queries)


def _halves(run: _Run) -> dict[str, dict[str, list[Item]]]:
    """Return the training items by row and user: all, the half least like the queries' centroid, a random half."""
    found: dict[str, dict[str, list[Item]]] = {"all": {}, "least similar half": {}, "random half": {}}
    for p in run.people:
        centroid = np.mean([run.extra.vectors[i.item_id] for i in p.test], axis=0)
        likeness = np.array([float(run.extra.vectors[i.item_id] @ centroid) for i in p.train])
        half = max(1, len(p.train) // 2)
        seed = int.from_bytes(p.user_id.encode(), "big") % 2**32
        random = np.random.default_rng([run.study.seed, seed]).permutation(p.cut)
        found["all"][p.user_id] = list(p.train)
        for row, order in (("least similar half", np.argsort(likeness, kind="stable")), ("random half", random)):
            found[row][p.user_id] = [p.train[at] for at in sorted(order[:half])]
    return found


def _all_tasks(run: _Run, bench: Bench) -> None:
    """Learn the user's other tasks too, up to the day of his first query; only where he has some."""
    allowed = sister_items(run.people, run.extra)
    if not allowed:
        run.study.say(f"{ALL_TASKS}: skipped, the events hold no other task of these users")
        return
    own = {p.user_id: p for p in run.people if p.user_id in allowed}
    rows = {
        "other tasks only": {u: allowed[u] for u in own},
        "all tasks": {u: [*p.train, *allowed[u]] for u, p in own.items()},
    }
    run.add((ALL_TASKS, "this task", ADAPTER), {u: run.held[u]["oppu"] for u in own})
    run.add((ALL_TASKS, "none", ADAPTER), {u: run.held[u]["none"] for u in own})
    for row, parts in rows.items():
        run.adapters(bench, (ALL_TASKS, row, ADAPTER), {u: list(map(example, items)) for u, items in parts.items()})


def sister_items(people: Sequence[Person], extra: Extra) -> dict[str, list[Item]]:
    """Return the users' items of other tasks that may be learnt.

    Args:
        people: The target users.
        extra: Items of other tasks, and embeddings of this one's.

    Returns:
        By user, oldest first: days before his first query, and nothing that says the same as anybody's query.
    """
    tests = [item for p in people for item in p.test]
    texts = {normal(item.input) for item in tests}
    first = {p.user_id: p.test[0].day for p in people}
    able = [
        i for i in extra.sisters if i.user_id in first and i.day < first[i.user_id] and normal(i.input) not in texts
    ]
    if not able:
        return {}
    rows = extra.embedder.embed([i.input for i in able])
    queries = np.stack([extra.vectors[i.item_id] for i in tests])
    like = [bool((queries @ row > SAME_COSINE).any()) for row in rows]
    return by_user(item for item, same in zip(able, like, strict=True) if not same)


def _cost(run: _Run, bench: Bench) -> NDArray[np.float64]:
    """Time the training of the fold's longest history's newest events, alone, and measure the file."""
    person = max(run.people, key=lambda p: (p.cut, p.user_id))

    def compute() -> dict[str, NDArray[Any]]:
        rows = []
        for level in (n for n in LEVELS if n <= person.cut):
            job = TrainJob(UserId(person.user_id), None, tuple(map(example, person.train[-level:])))
            started = time.perf_counter()
            [done] = bench.model.train([job], full_config(run.study.recipe), heartbeat=lambda: None)
            rows.append((level, time.perf_counter() - started, len(save(dict(done.tensors or {})))))
        return {"rows": np.array(rows, dtype=np.float64).reshape(-1, 3)}

    return stage(bench, "cost", compute)["rows"]
