"""The whole experiment of one task: split, adapt, train, score, compare; every stage kept, so that a kill costs one."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from evaluation import controls, inputs
from evaluation.arms import Arms, Array, Table, choice_arms, fit_fusion
from evaluation.corpus import Item
from evaluation.history import Past, check_pasts, pasts
from evaluation.leaks import check
from evaluation.roles import Bounds
from evaluation.splits import Fold, Person, make_folds
from evaluation.training import (
    Bench,
    Recipe,
    Say,
    adapted,
    base_scores,
    chunks_of,
    example,
    follow,
    score,
    stage,
    train_once,
)
from oppu.embedder import Embedder
from oppu.lm.base import load_base
from oppu.lm.model import TorchModel
from oppu.lm.port import Tensors
from oppu.settings import Settings
from oppu.tasks import Tasks
from oppu.values import Vector

PROMPTS: Mapping[str, tuple[int, bool]] = {
    "retrieval-1": (1, False),
    "retrieval-2": (2, False),
    "retrieval-4": (4, False),
    "profile": (0, True),
    "profile-retrieval-1": (1, True),
}
"""Prompt-only arms: items of the past and the profile's line in the prompt."""
QUICK_FOLDS, QUICK_ITEMS = 3, 1500
"""Of a run on some of the users: each fold adapts a base of its own, on at most so many items."""
CONTROLS = ("oppu", "permuted", "volume")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, and where its stages are kept.

    ``sisters`` are other tasks' items of the same articles; ``profiles`` written profiles by user, which stand in the
    prompt in place of the statistics one.
    """

    task: str
    folder: Path
    seeds: tuple[int, ...]
    recipe: Recipe
    bounds: Bounds
    final: bool
    users: int | None
    say: Say
    sisters: tuple[Item, ...] = field(default=(), repr=False)
    profiles: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed's arms over all folds' target users, in order of ``people``."""

    seed: int
    people: tuple[Person, ...]
    arms: Arms
    tables: tuple[Table, ...]


def run(plan: Plan, items: Sequence[Item], settings: Settings, tasks: Tasks, embedder: Embedder) -> list[Outcome]:
    """Run every seed.

    Args:
        plan: What to run.
        items: Of the task, oldest first.
        settings: Base and retriever.
        tasks: The known tasks.
        embedder: For near-duplicates and neighbours.

    Returns:
        One outcome a seed.

    Raises:
        ConfigError: The items do not suffice, or a split leaks.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    vectors = _embedded(plan, items, embedder)
    stacked = np.stack([vectors[i.item_id] for i in items])
    folds = make_folds(items, stacked, plan.bounds, final=plan.final, sisters=plan.sisters)
    if plan.users is not None:
        folds = [_shortened(fold, plan.users) for fold in folds[:QUICK_FOLDS]]
    for fold in folds:
        check(fold, vectors)
        queries = sum(len(p.test) for p in fold.target)
        plan.say(
            f"{fold.name}: {len(fold.adapt)} items adapt the base, {len(fold.calibrate)} users calibrate, "
            f"{len(fold.target)} targets with {queries} queries"
        )
    inputs.keep(plan.folder, items, plan.bounds, settings, {"profiles": dict(plan.profiles)})
    if plan.final:
        _log_opening(plan)
    outcomes = []
    for seed in plan.seeds:
        found: list[tuple[list[Table], Arms]] = [
            _fold(plan, fold, seed, settings, tasks, embedder, vectors) for fold in folds
        ]
        tables = [table for part, _ in found for table in part]
        outcomes.append(Outcome(seed, tuple(t.person for t in tables), _joined([a for _, a in found]), tuple(tables)))
    return outcomes


def _fold(
    plan: Plan,
    fold: Fold,
    seed: int,
    settings: Settings,
    tasks: Tasks,
    embedder: Embedder,
    vectors: Mapping[str, Vector],
) -> tuple[list[Table], Arms]:
    folder = plan.folder / f"{fold.name}-seed-{seed}"
    folder.mkdir(exist_ok=True)
    base = adapted(fold, settings, tasks, folder, plan.recipe, seed, plan.say)
    own = settings.model.model_copy(update={"base": str(base)})
    bench = Bench(fold, TorchModel(load_base(own), tasks, settings=own, slots=1), folder, plan.recipe, seed, plan.say)
    people = (*fold.target, *fold.calibrate)
    past = {p.user_id: pasts(p.items, vectors, embedder, settings.retriever) for p in people}
    for user in past.keys() & plan.profiles.keys():
        past[user] = [replace(one, line=plan.profiles[user]) for one in past[user]]
    for p in people:
        check_pasts(p.items, past[p.user_id])
    plain = base_scores(bench, people, "base-scores", past)
    followed = follow(bench, people)
    held = _held(bench, fold, past, followed)
    bench.model.close()
    tables = {
        p.user_id: Table(
            p,
            past[p.user_id],
            plain[p.user_id],
            followed[p.user_id],
            held.get(p.user_id, {}),
            chunks_of(p.items, plan.recipe.chunk)[0][1],
        )
        for p in people
    }
    targets = [tables[p.user_id] for p in fold.target]
    if not fold.target[0].items[0].choices:
        arms = {name: [t.held[name] for t in targets] for name in targets[0].held}
        arms |= {
            "none": [t.base[t.person.cut :] for t in targets],
            "follow": [t.follow[t.person.cut :] for t in targets],
        }
        return targets, Arms(arms, {}, [])
    return targets, choice_arms(targets, fit_fusion([tables[p.user_id] for p in people]))


def _held(
    bench: Bench, fold: Fold, past: Mapping[str, Sequence[Past]], followed: Mapping[str, Array]
) -> dict[str, dict[str, Array]]:
    """Score the held-back items with prompts and with every offline adapter."""
    held: dict[str, dict[str, Array]] = {p.user_id: {"frozen": followed[f"{p.user_id}/frozen"]} for p in fold.target}
    for name, (k, profile) in PROMPTS.items():
        for user, scores in base_scores(bench, fold.target, name, past, k=k, profile=profile).items():
            held[user][name] = scores
    parts: dict[str, dict[str, Sequence[Item]]] = {
        "oppu": {p.user_id: p.train for p in fold.target},
        "permuted": {p.user_id: controls.permuted(p, bench.seed) for p in fold.target},
        "volume": {p.user_id: controls.volume_matched(p, fold.target, bench.seed) for p in fold.target},
        "union": {"everybody": [i for p in fold.target for i in p.train]},
    }
    for name in CONTROLS:
        if not all(parts[name].values()):
            continue  # nobody else's items to draw from
        _add(bench, fold, name, train_once(bench, name, parts[name]), held)
    if len(fold.target) > 1:
        _add_strangers(bench, fold, held)
        everybody = train_once(bench, "union", parts["union"])["everybody"]
        _add(bench, fold, "union", {p.user_id: everybody for p in fold.target}, held)
    common = set.intersection(*(set(own) for own in held.values()))
    return {user: {name: own[name] for name in own if name in common} for user, own in held.items()}


def _add(
    bench: Bench, fold: Fold, name: str, weights: Mapping[str, Tensors], held: Mapping[str, dict[str, Array]]
) -> None:
    def compute() -> dict[str, Array]:
        return {p.user_id: score(bench.model, list(map(example, p.test)), weights[p.user_id]) for p in fold.target}

    for user, scores in stage(bench, f"{name}-scores", compute).items():
        held[user][name] = scores


def _add_strangers(bench: Bench, fold: Fold, held: dict[str, dict[str, Array]]) -> None:
    weights = train_once(bench, "oppu", {p.user_id: p.train for p in fold.target})
    names = controls.strangers(fold.target, bench.recipe.strangers, bench.seed)

    def compute() -> dict[str, Array]:
        found = {}
        for p in fold.target:
            tests = list(map(example, p.test))
            for number, other in enumerate(names[p.user_id]):
                found[f"{p.user_id}|{number}"] = score(bench.model, tests, weights[other])
        return found

    for key, scores in stage(bench, "strangers", compute).items():
        user, _, number = key.rpartition("|")
        last = int(number) == len(names[user]) - 1
        held[user]["stranger-nearest" if last else f"stranger-{number}"] = scores


def _shortened(fold: Fold, users: int) -> Fold:
    return replace(fold, target=fold.target[:users], calibrate=fold.calibrate[:users], adapt=fold.adapt[:QUICK_ITEMS])


def _embedded(plan: Plan, items: Sequence[Item], embedder: Embedder) -> dict[str, Vector]:
    content = hashlib.sha256("\0".join(f"{i.item_id}\0{i.input}" for i in items).encode()).hexdigest()[:12]
    path = plan.folder / f"vectors-{content}.npy"
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, embedder.embed([item.input for item in items]))
        part.replace(path)
    return {item.item_id: row for item, row in zip(items, np.load(path), strict=True)}


def _log_opening(plan: Plan) -> None:
    line = {
        "at": datetime.now(UTC).isoformat(),
        "task": plan.task,
        "recipe": plan.recipe.digest(),
        **asdict(plan.recipe),
    }
    with (plan.folder / "final.log").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, sort_keys=True) + os.linesep)


def _joined(parts: Sequence[Arms]) -> Arms:
    names = set.intersection(*(set(part.held) for part in parts))
    return Arms(
        {name: [x for part in parts for x in part.held[name]] for name in sorted(names)},
        {name: [x for part in parts for x in part.stream[name]] for name in parts[0].stream},
        [x for part in parts for x in part.trust],
    )
