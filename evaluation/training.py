"""The costly part: adapters, and every model's score on every item, each kept in a file once it is there.

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
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from evaluation.corpus import Item
from evaluation.prompting import VARIANTS, Variant, example
from evaluation.splits import Fold, Person
from oppu.lm.model import TorchModel
from oppu.lm.port import Example, Tensors, TrainConfig, TrainJob, is_bare
from oppu.values import UserId

Scores = list[NDArray[np.float64]]
Say = Callable[[str], None]
_AT_ONCE = 16
"""Users trained together: bounds the bank's memory, changes no result."""
_ESCAPE, _ODD = "=", "~"
FROZEN, HEAD, MATCHED = PARTS = ("/frozen", "/head|", "/matched")
"""What is kept of a user beside the plain scores, after the user's id; each begins with its only slash."""
RATES = (0.3, 1.0, 3.0, 10.0)
"""Learning rates to try, as multiples of the recipe's."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that was chosen, before the test part was opened; its hash names the run.

    ``passes``, ``learning_rate``, ``clip_norm`` and ``dropout`` are the paper's full training, its rate multiplied by
    the one of ``rates`` that calibrate users choose (``evaluation.variants.rated``); ``chunk`` new items, with
    ``replay`` older ones, ``chunk_passes`` times at ``chunk_learning_rate``, are the service's increments. The base is
    adapted for 1, 2, … ``base_epochs`` epochs until more do not help, or with ``base_search`` off for ``base_epochs``,
    on at most ``adapt_items`` drawn items (``None``: all); ``variants`` are the bases that are made, the plain one
    always among them. Calibrate users judge which prompt-only arm and which OPPU arm stand in P1, each by the first
    ``judge_items`` of its items. Of each user of a text task the first ``written`` held-back items are written out,
    greedily, no longer than nearly all of calibrate users' outputs.
    """

    base_epochs: int = 4
    base_learning_rate: float = 5e-4
    base_batch: int = 32
    passes: int = 3
    learning_rate: float = 1e-3
    rates: tuple[float, ...] = RATES
    batch: int = 16
    weight_decay: float = 0.01
    chunk: int = 16
    replay: int = 16
    chunk_passes: int = 2
    chunk_learning_rate: float = 2e-3
    strangers: int = 5
    judge_items: int = 200
    written: int = 20
    base_method: Literal["full", "lora"] = "full"
    base_search: bool = True
    schedule: Literal["constant", "linear"] = "constant"
    clip_norm: float = 1.0
    dropout: float = 0.0
    adapt_items: int | None = None
    variants: tuple[Variant, ...] = tuple(VARIANTS)

    def at(self, rate: float) -> "Recipe":
        """Return the recipe with this learning rate and no others to try."""
        return replace(self, learning_rate=rate, rates=(1.0,))

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


def score(model: TorchModel, examples: Sequence[Example], tensors: Tensors | None) -> NDArray[np.float64]:
    """Return ``[n, c]`` log probabilities of the choices (-inf beyond an item's own), or ``[n, t]`` of the output's
    tokens for text (NaN after; all NaN without an output)."""
    if not examples:
        return np.zeros((0, 1))
    if not any(e.choices for e in examples):
        return _token_scores(model, examples, tensors)
    found = model.scores(examples, tensors)
    table = np.full((len(found), max(map(len, found))), -np.inf)
    for row, scores in zip(table, found, strict=True):
        row[: len(scores)] = scores
    return table


def _token_scores(model: TorchModel, examples: Sequence[Example], tensors: Tensors | None) -> NDArray[np.float64]:
    table = np.full((len(examples), model.longest_output(examples[0].task)), np.nan)
    paired = [at for at, one in enumerate(examples) if not is_bare(one)]
    if paired:
        found = model.token_scores([examples[at] for at in paired], tensors)
        table[paired] = padded(found, table.shape[1])
    return table


def widened(scores: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return choice scores ``[n, c]`` as ``[n, width]``, -inf beyond an item's choices; wider ones as they are."""
    more = max(0, width - scores.shape[1])
    return np.pad(scores, ((0, 0), (0, more)), constant_values=-np.inf)


def padded(rows: Sequence[NDArray[np.float64]], width: int) -> NDArray[np.float64]:
    """Return rows ``[t]`` or ``[t, e]`` of different lengths as one array ``[n, width(, e)]``, NaN after their ends."""
    table = np.full((len(rows), width, *rows[0].shape[1:]), np.nan)
    for at, row in enumerate(rows):
        table[at, : len(row)] = row
    return table


class Keeper(Protocol):
    """Has a folder of stages; a ``Bench`` or a ``Study``."""

    @property
    def folder(self) -> Path:
        """Where stages are kept."""
        ...

    @property
    def say(self) -> Say:
        """Told of progress."""
        ...


def stage(bench: Keeper, name: str, compute: Callable[[], Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Return a stage's arrays by name, from its file where there is one."""
    path = bench.folder / f"{name}.npz"
    if not path.exists():
        fresh = path.with_suffix(".part")
        with fresh.open("wb") as file:
            np.savez(file, **{_escaped(key): array for key, array in compute().items()})  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        bench.say(f"{name}: done")
    with np.load(path) as kept:
        return {key[len(_ESCAPE) : -1] if key.startswith(_ESCAPE) else key: kept[key] for key in kept.files}


def _escaped(key: str) -> str:
    """Keep users whose ids are numpy's own parameter names, end as its files do, or are escaped ones, apart."""
    odd = key in ("file", "allow_pickle") or key.endswith(".npy") or key.startswith(_ESCAPE)
    return f"{_ESCAPE}{key}." if odd else key


def part_key(user: str, part: str = "") -> str:
    """Return the key in a stage of what is a user's, or of a part of it: that of no other user and part.

    A plain id stands as it is. No key of a user holds what begins a part's name, so that a part ends where it seems to.

    Args:
        user: Any id.
        part: One of ``PARTS``, or what begins with one.

    Returns:
        The key.
    """
    odd = user.startswith(_ODD) or any(name in user for name in PARTS)
    return (_ODD + user.replace("~", "~0").replace("/", "~1") if odd else user) + part


def base_scores(bench: Bench, people: Sequence[Person], name: str) -> dict[str, NDArray[Any]]:
    """Score all items of some people without an adapter and with nothing of the past in the prompt.

    Args:
        bench: The fold's model.
        people: Whose items.
        name: Of the stage.

    Returns:
        By user, ``[n, c]``.
    """
    return stage(
        bench, name, lambda: {p.user_id: score(bench.model, list(map(example, p.items)), None) for p in people}
    )


def train_once(bench: Bench, name: str, parts: Mapping[str, Sequence[Example]]) -> dict[str, Tensors | None]:
    """Train each user's adapter once, offline, on the given examples (the paper's way), and keep the weights.

    Args:
        bench: The fold's model.
        name: Of the stage.
        parts: Training examples by user; their order is drawn from the user's seed.

    Returns:
        Weights by user; ``None``, the base alone, where there is nothing to learn or training diverged.
    """
    config = full_config(bench.recipe)
    users = sorted(parts)
    weights: dict[str, Tensors | None] = dict.fromkeys(users)
    for first in range(0, len(users), _AT_ONCE):
        some = users[first : first + _AT_ONCE]

        def compute(some: Sequence[str] = some) -> dict[str, NDArray[Any]]:
            jobs = [_full(bench, user, parts[user]) for user in some]
            return _flat(dict(zip(some, _train(bench, jobs, config), strict=True)))

        weights |= _deep(stage(bench, f"{name}-{first // _AT_ONCE}", compute))
    return weights


@dataclass(frozen=True, slots=True)
class Followed:
    """By user: ``scores`` ``[n, c]`` of each item before anything of its chunk was learnt, ``frozen`` of the held-back
    items by the adapter as it was at the cut, and ``heads``, that adapter's weights, where there were any."""

    scores: dict[str, NDArray[Any]]
    frozen: dict[str, NDArray[Any]]
    heads: dict[str, dict[str, NDArray[Any]]]


def follow(bench: Bench, people: Sequence[Person], *, afresh: bool = False) -> Followed:
    """Let each user's adapter follow the stream: score a chunk, then learn (prequential).

    Args:
        bench: The fold's model.
        people: Whose items, all of them.
        afresh: Whether the paper's full training on all items so far comes after every chunk, from no adapter, in place
            of an increment: the chunk with some replay, from the adapter there is.

    Returns:
        What was scored, and the adapters at the cut.
    """
    results: dict[str, NDArray[Any]] = {}
    order = sorted(people, key=lambda p: len(p.items))  # users of like length together keep the bank full
    for first in range(0, len(order), _AT_ONCE):

        def compute(some: Sequence[Person] = order[first : first + _AT_ONCE]) -> dict[str, NDArray[Any]]:
            return _following(bench, some, afresh=afresh)

        results |= stage(bench, f"{'retrained' if afresh else 'follow'}-{first // _AT_ONCE}", compute)
    return _followed(results, [p.user_id for p in people])


def _following(bench: Bench, some: Sequence[Person], *, afresh: bool) -> dict[str, NDArray[Any]]:
    config = full_config(bench.recipe) if afresh else _chunk_config(bench.recipe)
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
                frozen[part_key(p.user_id, FROZEN)] = score(bench.model, [example(i) for i in p.test], head)
                frozen |= {part_key(p.user_id, HEAD + k): np.asarray(v) for k, v in (head or {}).items()}
            found[p.user_id].append(score(bench.model, [example(i) for i in p.items[begin:end]], head))
            if end < len(p.items):  # nothing is asked after the last chunk
                jobs.append(
                    _full(bench, p.user_id, [example(i) for i in p.items[:end] if i.learnable])
                    if afresh
                    else _increment(bench, p, begin, end, head)
                )
        for job, tensors in zip(jobs, _train(bench, jobs, config), strict=True):
            heads[str(job.user_id)] = tensors
    return {part_key(user): _joined(parts) for user, parts in found.items()} | frozen


def _followed(kept: Mapping[str, NDArray[Any]], users: Sequence[str]) -> Followed:
    heads: dict[str, dict[str, NDArray[Any]]] = {}
    user_of = {part_key(user): user for user in users}
    for key, weights in kept.items():
        owner, found, name = key.partition(HEAD)
        if found:
            heads.setdefault(user_of[owner], {})[name] = weights.astype(np.float32)
    frozen = {u: kept[key] for u in users if (key := part_key(u, FROZEN)) in kept}
    return Followed({user: kept[part_key(user)] for user in users}, frozen, heads)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put chunks' scores under each other, as wide as the widest."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([widened(part, width) for part in parts])


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
    chance = random.Random(user_seed(bench.seed, person.user_id) + begin)  # noqa: S311 - a reproducible sample
    older = [i for i in person.items[max(0, begin - 8 * bench.recipe.replay) : begin] if i.learnable]
    mixed = [
        *(i for i in person.items[begin:end] if i.learnable),
        *chance.sample(older, min(bench.recipe.replay, len(older))),
    ]
    chance.shuffle(mixed)
    return TrainJob(UserId(person.user_id), head, tuple(map(example, mixed)), user_seed(bench.seed, person.user_id))


def _full(bench: Bench, user: str, learnt: Sequence[Example]) -> TrainJob:
    return TrainJob(UserId(user), None, shuffled(learnt, bench.seed, user), user_seed(bench.seed, user))


def full_config(recipe: Recipe) -> TrainConfig:
    """Return the paper's full training."""
    return TrainConfig(
        recipe.learning_rate,
        recipe.weight_decay,
        recipe.passes,
        recipe.batch,
        recipe.schedule,
        recipe.clip_norm,
        recipe.dropout,
    )


def _chunk_config(recipe: Recipe) -> TrainConfig:
    return TrainConfig(recipe.chunk_learning_rate, recipe.weight_decay, recipe.chunk_passes, recipe.batch)


def _train(bench: Bench, jobs: Sequence[TrainJob], config: TrainConfig) -> list[Tensors | None]:
    """Return each job's weights; its parent's where the new ones are not finite."""
    done = bench.model.train(jobs, config, heartbeat=lambda: None)
    return [
        result.tensors if result.tensors is not None else job.parent for job, result in zip(jobs, done, strict=True)
    ]


def shuffled(parts: Sequence[Example], seed: int, user: str) -> tuple[Example, ...]:
    """Return a user's examples in a reproducible random order."""
    order = list(parts)
    random.Random(user_seed(seed, user)).shuffle(order)  # noqa: S311 - a reproducible order
    return tuple(order)


def user_seed(seed: int, user: str) -> int:
    """Return a seed of one user's own."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{user}".encode()).digest()[:4], "big") >> 1


def _flat(weights: Mapping[str, Tensors | None]) -> dict[str, NDArray[Any]]:
    return {f"{user}|{name}": np.asarray(a) for user, own in weights.items() for name, a in (own or {}).items()}


def _deep(arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for key, value in arrays.items():
        user, _, name = key.rpartition("|")
        found.setdefault(user, {})[name] = value
    return found
