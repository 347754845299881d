"""The paper's arms on its three bases: prompt-only and OPPU, and which of each stand in P1.

The choice is made by the fold's calibrate users, whose earlier half trains and whose later half judges: no query of
a target has a say in it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from evaluation.arms import Array, log_loss, right
from evaluation.bases import BaseName, Study, opened
from evaluation.prompting import PLAIN, Asked, answer_tokens, example, examples, recent_history
from evaluation.splits import Person
from evaluation.training import Bench, Recipe, score, stage, train_once
from oppu.lm.base import load_base
from oppu.lm.port import Tensors
from oppu.tasks import Kind


@dataclass(frozen=True, slots=True)
class Way:
    """How an arm answers: on which base, with what in the prompt; with an adapter trained with the same prompts."""

    base: BaseName
    asked: Asked = PLAIN


PROMPTED: Mapping[str, Way] = {
    "retrieval-1": Way("retrieval", Asked(1)),
    "retrieval-2": Way("retrieval", Asked(2)),
    "retrieval-4": Way("retrieval", Asked(4)),
    "profile": Way("profile", Asked(0, profile=True)),
    "profile-retrieval-1": Way("profile", Asked(1, profile=True)),
}
RECENT = "recent-history"
"""As many of the most recent items as fit the prompt, on the retrieval base; prompt-only."""
TRAINED: Mapping[str, Way] = {
    "oppu": Way("plain"),
    "oppu-1": Way("retrieval", Asked(1)),
    "oppu-profile": Way("profile", Asked(0, profile=True)),
}
FURTHER: Mapping[str, Way] = {
    "oppu-2": Way("retrieval", Asked(2)),
    "oppu-4": Way("retrieval", Asked(4)),
    "oppu-profile-1": Way("profile", Asked(1, profile=True)),
    "oppu-unadapted": Way("unadapted"),
}
"""OPPU arms that run only where all arms are asked for."""
ANALYSED = ("oppu-unadapted",)
"""Those of them that the analyses compare with."""
UNADAPTED = "unadapted"
"""Non-personal, on the base before task adaption: what ``oppu-unadapted`` is to be compared with."""
CHOSEN_PROMPT, CHOSEN_OPPU = "chosen-prompt", "chosen-oppu"

Held = dict[str, dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A fold's and seed's choice for P1, and the calibrate users' mean merit by arm (empty: nobody judged, or the
    first seed's have).

    ``prompt`` is empty where the recipe has no base with anything in its prompts. ``rate`` is the learning rate of all
    adapters that are trained once, ``rates`` the calibrate users' mean loss by rate, as ``rated`` returns it.
    """

    fold: str
    seed: int
    prompt: str
    oppu: str
    rate: float
    merits: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Compared:
    """The variants' arms of a fold: by user and arm ``[q, c]``, the choice, and the share of recent items that did
    not fit (``None`` where there were none)."""

    held: Held = field(repr=False)
    chosen: Chosen
    cut_share: float | None


def only_chosen(recipe: Recipe, chosen: Sequence[Chosen]) -> Recipe:
    """Return a recipe for a run's further seeds: with the bases that the first one's choices for P1 stand on."""
    ways = {**PROMPTED, **TRAINED, **FURTHER, RECENT: Way("retrieval")}
    bases = {ways[arm].base for one in chosen for arm in (one.prompt, one.oppu) if arm}
    return replace(recipe, variants=tuple(v for v in recipe.variants if v == "plain" or v in bases))


def judges(study: Study) -> list[Person]:
    """Return the calibrate users with their first items, the later half held back at a day's beginning.

    Who has no output in that half judges nothing; items without one may stand in it, and are not judged by.
    """
    found = []
    for person in study.fold.calibrate:
        items = person.items[: study.recipe.judge_items]
        day = items[len(items) // 2].day if items else None
        cut = sum(item.day < day for item in items) if day is not None else 0
        if 0 < cut < len(items) and any(not item.bare for item in items[cut:]):
            found.append(replace(person, items=items, groups=person.groups[: len(items)], cut=cut))
    return found


def compared(study: Study, plain: Bench, further: Collection[str] = ()) -> Compared:
    """Run the prompt-only and the OPPU arms on every base they need.

    Args:
        study: The fold and seed.
        plain: The plain base, open.
        further: Which of the further OPPU arms run too.

    Returns:
        The arms of the fold's targets, and the choice made by its calibrate users.
    """
    people = [*study.fold.target, *judges(study)]
    held: Held = {p.user_id: {} for p in people}
    variants = study.recipe.variants
    trained = {**TRAINED, **{n: way for n, way in FURTHER.items() if n in (*further, *(study.arms or ()))}}
    arms = _Arms(study, people, held)
    arms.on_base(plain, {}, _on("plain", trained))
    share = None
    for base in (variant for variant in variants if variant != "plain"):
        with opened(study, base) as bench:
            arms.on_base(bench, _on(base, PROMPTED), _on(base, trained))
            if base == "retrieval":
                share = _recent(study, bench, people, held)
    if _on("unadapted", trained):
        with opened(study, "unadapted") as bench:
            arms.on_base(bench, {UNADAPTED: Way("unadapted")}, _on("unadapted", trained))
    chosen = _choose(study, people[len(study.fold.target) :], held)
    for person in study.fold.target:
        own = held[person.user_id]
        own[CHOSEN_OPPU] = own[chosen.oppu]
        if chosen.prompt:
            own[CHOSEN_PROMPT] = own[chosen.prompt]
    return Compared({p.user_id: held[p.user_id] for p in study.fold.target}, chosen, share)


def rated(study: Study, plain: Bench) -> tuple[Study, dict[str, float]]:
    """Put the learning rate into a study's recipe with which its judges' adapters foresee their later halves best.

    Args:
        study: The fold and seed.
        plain: The plain base, open.

    Returns:
        The study, its recipe with that rate and no others to try, and the judges' mean loss by rate in nats, of an
        output token where outputs are texts; as given and empty where there is one rate, or nobody to judge.
    """
    recipe, people, losses = study.recipe, judges(study), dict[str, float]()
    rates = [share * recipe.learning_rate for share in recipe.rates]
    for rate in rates if len(rates) > 1 and people else []:
        bench = replace(plain, recipe=recipe.at(rate))
        kept = stage(study, f"rate-{rate:g}", partial(_judged, study, bench, people))
        losses[f"{rate:g}"] = float(kept[""])
    study.done("rates")
    return replace(study, recipe=recipe.at(best_rate(rates, losses.values()))) if losses else study, losses


def best_rate(rates: Sequence[float], losses: Iterable[float]) -> float:
    """Return the rate of the least loss, the first of equals; before any whose loss is not a finite number."""
    finite = [loss if np.isfinite(loss) else np.inf for loss in losses]
    return rates[finite.index(min(finite))]


def _judged(study: Study, bench: Bench, people: Sequence[Person]) -> dict[str, Array]:
    """Train the judges' adapters at a bench's rate; return their mean loss, under an empty name."""
    parts = {p.user_id: list(map(example, p.train)) for p in people}
    weights = train_once(bench, f"rate-{bench.recipe.learning_rate:g}-oppu", parts)
    kind, losses = study.tasks.require(people[0].items[0].task).kind, list[Array]()
    for p in people:
        items = [item for item in p.test if not item.bare]
        scores = score(bench.model, list(map(example, items)), weights[p.user_id])
        if np.isnan(scores).all(axis=1).any():
            return {"": np.array(np.inf)}  # so far off that its scores are no numbers
        losses.append(-right(items, scores, kind) if kind == "text" else log_loss(items, scores))
    return {"": np.array(np.concatenate(losses).mean())}


def weights_of(study: Study, bench: Bench, name: str, people: Sequence[Person]) -> dict[str, Tensors | None]:
    """Return the weights of an OPPU arm's adapters by user, trained now where they are not kept.

    Args:
        study: The fold and seed.
        bench: The arm's base, open.
        name: Of the arm.
        people: Whose adapters.

    Returns:
        Tensors by user.
    """
    asked = {**TRAINED, **FURTHER}[name].asked
    parts = {p.user_id: examples(p.train, study.pasts[p.user_id][: p.cut], asked) for p in people}
    return train_once(bench, name, parts)


def _on(base: BaseName, ways: Mapping[str, Way]) -> dict[str, Way]:
    return {name: way for name, way in ways.items() if way.base == base}


@dataclass(frozen=True, slots=True)
class _Arms:
    """The arms of a fold and seed as they come in: ``held`` by user and arm, of all ``people``."""

    study: Study
    people: Sequence[Person]
    held: Held

    def on_base(self, bench: Bench, prompted: Mapping[str, Way], trained: Mapping[str, Way]) -> None:
        """Add all arms of one base."""
        for name, way in prompted.items():
            self._add(bench, name, way.asked, dict.fromkeys(self.held))
        for name, way in trained.items():
            self._add(bench, name, way.asked, weights_of(self.study, bench, name, self.people))

    def _add(self, bench: Bench, name: str, asked: Asked, weights: Mapping[str, Tensors | None]) -> None:
        def compute() -> dict[str, Array]:
            found = {}
            for p in self.people:
                queries = examples(p.test, self.study.pasts[p.user_id][p.cut : len(p.items)], asked)
                found[p.user_id] = score(bench.model, queries, weights[p.user_id])
            return found

        for user, scores in stage(bench, f"{name}-scores", compute).items():
            self.held[user][name] = scores
        self.study.done(name)


def _recent(study: Study, bench: Bench, people: Sequence[Person], held: Held) -> float | None:
    """Add the arm of recent history; return the share of earlier items that the prompts had no room for."""

    def compute() -> dict[str, Array]:
        settings = study.settings.model
        base = load_base(settings)
        prompts = base.prompts()
        found, counts = {}, np.zeros(2)
        for p in people:
            task = study.tasks.require(p.items[0].task)
            limit = min(settings.max_tokens, base.max_positions - answer_tokens(p.items, prompts, task))
            made = recent_history(p.items, study.pasts[p.user_id], p.cut, prompts, task, limit)
            found[p.user_id] = score(bench.model, made.examples, None)
            counts += (made.offered, made.kept)
        return {**found, "": counts}

    scores = stage(bench, f"{RECENT}-scores", compute)
    offered, kept = scores.pop("")
    for user, own in scores.items():
        held[user][RECENT] = own
    study.done(RECENT)
    return float(1 - kept / offered) if offered else None


def _choose(study: Study, people: Sequence[Person], held: Held) -> Chosen:
    """Choose by the mean merit over all the judges' queries; the first of equals; without judges the first of all."""
    rate = study.recipe.learning_rate
    if study.arms is not None:
        return Chosen(study.fold.name, study.seed, *study.arms, rate)
    ran = next(iter(held.values()))
    prompts, adapters = ([n for n in names if n in ran] for names in ((*PROMPTED, RECENT), (*TRAINED, *FURTHER)))
    if not people:
        return Chosen(study.fold.name, study.seed, prompts[0] if prompts else "", adapters[0], rate)
    kind = study.tasks.require(people[0].items[0].task).kind
    asked = {p.user_id: [at for at, item in enumerate(p.test) if not item.bare] for p in people}
    merits = {
        name: float(np.concatenate([_merits(p, held[p.user_id][name], asked[p.user_id], kind) for p in people]).mean())
        for name in (*prompts, *adapters)
    }
    prompt, adapter = (max(names, key=lambda name: merits[name], default="") for names in (prompts, adapters))
    return Chosen(study.fold.name, study.seed, prompt, adapter, rate, merits)


def _merits(person: Person, scores: Array, asked: Sequence[int], kind: Kind) -> Array:
    return right([person.test[at] for at in asked], scores[asked], kind)
