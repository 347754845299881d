"""The costly part: bases, adapters, and every model's score on every item, each kept in a file once it is there.

A run that is killed goes on where it was: a stage is a file ``STAGE.npz``, written beside and renamed. All models
see the same items in the same order; which weights answered is the only difference.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.corpus import Item
from evaluation.history import Past
from evaluation.splits import Fold, Person
from inference.fusion import log_softmax
from oppu.lm.adaption import AdaptConfig, adapt
from oppu.lm.base import load_base
from oppu.lm.model import TorchModel
from oppu.lm.port import Example, Tensors, TrainConfig, TrainJob
from oppu.settings import Settings
from oppu.tasks import Tasks
from oppu.values import UserId

Scores = list[NDArray[np.float64]]
Say = Callable[[str], None]
TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
_AT_ONCE = 16
"""Users trained together: bounds the bank's memory, changes no result."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that was chosen, before the test part was opened; its hash names the run.

    ``passes`` and ``learning_rate`` are the paper's full training; ``chunk`` new items with ``replay`` older ones,
    ``chunk_passes`` times at ``chunk_learning_rate``, are the service's increments. The base is adapted for 1, 2, …
    ``base_epochs`` epochs until more do not help, or with ``base_search`` off for ``base_epochs``.
    """

    base_epochs: int = 4
    base_learning_rate: float = 5e-4
    base_batch: int = 32
    passes: int = 3
    learning_rate: float = 1e-3
    batch: int = 16
    weight_decay: float = 0.01
    chunk: int = 16
    replay: int = 16
    chunk_passes: int = 2
    chunk_learning_rate: float = 2e-3
    strangers: int = 3
    base_method: Literal["full", "lora"] = "full"
    base_search: bool = True
    schedule: Literal["constant", "linear"] = "constant"

    def digest(self) -> str:
        """Return a hash of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Bench:
    """One fold's model and where its results are kept."""

    fold: Fold
    model: TorchModel
    folder: Path
    recipe: Recipe
    seed: int
    say: Say


def adapted(fold: Fold, settings: Settings, tasks: Tasks, folder: Path, recipe: Recipe, seed: int, say: Say) -> Path:
    """Adapt the base on a fold's adapt users until the calibrate users' loss stops improving.

    Each number of epochs is a run of its own, whose rate decays to zero; the curve is kept in ``base.json``. The
    loss is taken at its best temperature, since fusion scales a base's scores anyhow.

    Args:
        fold: Whose adapt items are learnt; the loss of its calibrate items decides.
        settings: Names the base to begin with.
        tasks: The known tasks.
        folder: Of this fold and seed.
        recipe: Most epochs, and rates.
        seed: Of order and sampling.
        say: Told of progress.

    Returns:
        The folder of the best base; the configured one where there is nobody to adapt it on.
    """
    if not fold.adapt:
        say("base: nobody's items to adapt it on, it is used as it is")
        return Path(settings.model.base)
    losses: list[float] = []
    judged = [example(i) for p in fold.calibrate for i in p.items if i.answered]
    first = 1 if recipe.base_search else recipe.base_epochs
    for epochs in range(first, recipe.base_epochs + 1):
        out = folder / f"base-{epochs}"
        if not (out / "oppu.json").exists():
            _adapt(fold, settings, tasks, out, replace(recipe, base_epochs=epochs), seed, say)
        own = settings.model.model_copy(update={"base": str(out)})
        model = TorchModel(load_base(own), tasks, settings=own, slots=1)
        losses.append(_tempered_loss(model, judged) if judged else -float(epochs))
        model.close()
        say(f"base: {epochs} epochs, calibrate users' loss {losses[-1]:.4f}")
        if losses[-1] > min(losses):
            break
    (folder / "base.json").write_text(json.dumps({"calibrate_loss_by_epochs": losses}) + "\n", encoding="utf-8")
    return folder / f"base-{first + losses.index(min(losses))}"


def _tempered_loss(model: TorchModel, judged: Sequence[Example]) -> float:
    """Return the mean loss; of a choice task, at the best of the temperatures."""
    scores = score(model, judged, None)
    if not judged[0].choices:
        return float(-scores.mean())
    right = [e.choices.index(e.output) for e in judged]
    return min(
        -float(np.mean([log_softmax(row / t)[at] for row, at in zip(scores, right, strict=True)])) for t in TEMPERATURES
    )


def _adapt(fold: Fold, settings: Settings, tasks: Tasks, out: Path, recipe: Recipe, seed: int, say: Say) -> None:
    config = AdaptConfig(
        recipe.base_method, recipe.base_epochs, recipe.base_learning_rate, recipe.base_batch, seed=seed
    )

    def progress(done: int, steps: int, loss: float) -> None:
        if done % max(1, steps // 5) == 0:
            say(f"base: step {done} of {steps}, loss {loss:.3f}")

    adapt(
        load_base(settings.model, adapting=True),
        tasks,
        [example(item) for item in fold.adapt],
        out,
        config=config,
        settings=settings.model,
        progress=progress,
    )


def example(item: Item, past: Past | None = None, *, k: int = 0, profile: bool = False) -> Example:
    """Phrase an item, with ``k`` items of its past and the profile's line in the prompt."""
    return Example(
        item.task,
        item.input,
        item.output,
        item.choices,
        evidence=past.pairs[:k] if past is not None else (),
        profile=past.line if past is not None and profile else "",
    )


def score(model: TorchModel, examples: Sequence[Example], tensors: Tensors | None) -> NDArray[np.float64]:
    """Return ``[n, c]`` log probabilities of the choices, or ``[n, 1]`` minus the loss an output token for text."""
    if not examples:
        return np.zeros((0, 1))
    if not any(e.choices for e in examples):
        return -model.losses(examples, tensors)[:, None]
    found = model.scores(examples, tensors)
    table = np.full((len(found), max(map(len, found))), -np.inf)
    for row, scores in zip(table, found, strict=True):
        row[: len(scores)] = scores
    return table


def stage(bench: Bench, name: str, compute: Callable[[], Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Return a stage's arrays by name, from its file where there is one."""
    path = bench.folder / f"{name}.npz"
    if not path.exists():
        fresh = path.with_suffix(".part")
        with fresh.open("wb") as file:
            np.savez(file, **dict(compute()))  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        bench.say(f"{name}: done")
    with np.load(path) as kept:
        return {key: kept[key] for key in kept.files}


def base_scores(
    bench: Bench,
    people: Sequence[Person],
    name: str,
    pasts: Mapping[str, Sequence[Past]],
    *,
    k: int = 0,
    profile: bool = False,
) -> dict[str, NDArray[Any]]:
    """Score all items of some people without an adapter.

    Args:
        bench: The fold's model.
        people: Whose items.
        name: Of the stage.
        pasts: By user, for the prompt.
        k: Past items in the prompt.
        profile: Whether the profile's line is in it.

    Returns:
        By user, ``[n, c]``; with evidence in the prompt only the held-back items.
    """

    def compute() -> dict[str, NDArray[Any]]:
        found = {}
        for person in people:
            first = person.cut if k or profile else 0
            own = [
                example(i, p, k=k, profile=profile) for i, p in zip(person.items, pasts[person.user_id], strict=True)
            ]
            found[person.user_id] = score(bench.model, own[first:], None)
        return found

    return stage(bench, name, compute)


def train_once(bench: Bench, name: str, parts: Mapping[str, Sequence[Item]]) -> dict[str, dict[str, NDArray[Any]]]:
    """Train each user's adapter once, offline, on the given items (the paper's way), and keep the weights.

    Args:
        bench: The fold's model.
        name: Of the stage; part of the order's seed.
        parts: Training items by user.

    Returns:
        Weights by user.
    """
    recipe = bench.recipe
    config = TrainConfig(recipe.learning_rate, recipe.weight_decay, recipe.passes, recipe.batch, recipe.schedule)
    users = sorted(parts)
    weights: dict[str, dict[str, NDArray[Any]]] = {}
    for first in range(0, len(users), _AT_ONCE):
        some = users[first : first + _AT_ONCE]

        def compute(some: Sequence[str] = some) -> dict[str, NDArray[Any]]:
            jobs = [TrainJob(UserId(u), None, _shuffled(parts[u], bench.seed, u), _seed(bench.seed, u)) for u in some]
            return _flat(dict(zip(some, _train(bench, jobs, config), strict=True)))

        weights |= _deep(stage(bench, f"{name}-{first // _AT_ONCE}", compute))
    return weights


def follow(bench: Bench, people: Sequence[Person]) -> dict[str, NDArray[Any]]:
    """Let each user's adapter follow the stream: score a chunk, then learn it with some replay (prequential).

    Args:
        bench: The fold's model.
        people: Whose items, all of them.

    Returns:
        By user, ``[n, c]``: each item as scored before anything of its chunk was learnt; and under ``USER/frozen``
        the held-back items by the adapter as it was at the cut.
    """

    def compute(some: Sequence[Person]) -> dict[str, NDArray[Any]]:
        heads: dict[str, Tensors | None] = {p.user_id: None for p in some}
        found: dict[str, list[NDArray[Any]]] = {p.user_id: [] for p in some}
        frozen: dict[str, NDArray[Any]] = {}
        chunks = {p.user_id: chunks_of(p.items, bench.recipe.chunk) for p in some}
        for number in range(max(map(len, chunks.values()))):
            jobs = []
            for p in some:
                if number >= len(chunks[p.user_id]):
                    continue
                begin, end = chunks[p.user_id][number]
                head = heads[p.user_id]
                if begin <= p.cut < end:
                    frozen[f"{p.user_id}/frozen"] = score(bench.model, [example(i) for i in p.test], head)
                found[p.user_id].append(score(bench.model, [example(i) for i in p.items[begin:end]], head))
                jobs.append(_increment(bench, p, begin, end, head))
            for job, tensors in zip(jobs, _train(bench, jobs, _chunk_config(bench.recipe)), strict=True):
                heads[str(job.user_id)] = tensors
        return {user: np.concatenate(parts) for user, parts in found.items()} | frozen

    results: dict[str, NDArray[Any]] = {}
    order = sorted(people, key=lambda p: len(p.items))  # users of like length together keep the bank full
    for first in range(0, len(order), _AT_ONCE):
        some = order[first : first + _AT_ONCE]
        results |= stage(bench, f"follow-{first // _AT_ONCE}", lambda some=some: compute(some))  # type: ignore[misc]
    return results


def chunks_of(items: Sequence[Item], size: int) -> list[tuple[int, int]]:
    """Cut at ends of days: nothing of an item's own day is learnt before it is scored."""
    found, begin = [], 0
    while begin < len(items):
        end = min(begin + size, len(items))
        while end < len(items) and items[end].day == items[end - 1].day:
            end += 1
        found.append((begin, end))
        begin = end
    return found


def _increment(bench: Bench, person: Person, begin: int, end: int, head: Tensors | None) -> TrainJob:
    chance = random.Random(_seed(bench.seed, person.user_id) + begin)  # noqa: S311 - a reproducible sample
    older = [i for i in person.items[max(0, begin - 8 * bench.recipe.replay) : begin] if i.learnable]
    mixed = [
        *(i for i in person.items[begin:end] if i.learnable),
        *chance.sample(older, min(bench.recipe.replay, len(older))),
    ]
    chance.shuffle(mixed)
    return TrainJob(UserId(person.user_id), head, tuple(map(example, mixed)), _seed(bench.seed, person.user_id))


def _chunk_config(recipe: Recipe) -> TrainConfig:
    return TrainConfig(recipe.chunk_learning_rate, recipe.weight_decay, recipe.chunk_passes, recipe.batch)


def _train(bench: Bench, jobs: Sequence[TrainJob], config: TrainConfig) -> list[Tensors | None]:
    """Return each job's weights; its parent's where the new ones are not finite."""
    done = bench.model.train(jobs, config, heartbeat=lambda: None)
    return [
        result.tensors if result.tensors is not None else job.parent for job, result in zip(jobs, done, strict=True)
    ]


def _shuffled(items: Sequence[Item], seed: int, user: str) -> tuple[Example, ...]:
    order = list(items)
    random.Random(_seed(seed, user)).shuffle(order)  # noqa: S311 - a reproducible order
    return tuple(map(example, order))


def _seed(seed: int, user: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{user}".encode()).digest()[:4], "big") >> 1


def _flat(weights: Mapping[str, Tensors | None]) -> dict[str, NDArray[Any]]:
    return {f"{user}|{name}": np.asarray(a) for user, own in weights.items() for name, a in (own or {}).items()}


def _deep(arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for key, value in arrays.items():
        user, _, name = key.rpartition("|")
        found.setdefault(user, {})[name] = value
    return found
