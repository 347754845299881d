"""The whole experiment of one task: split, adapt, train, score, compare; every stage kept, so that a kill costs one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from evaluation import controls, inputs
from evaluation.analyses import Analysed, Extra, analyse
from evaluation.arms import Arms, Array, Table, choice_arms, fit_each
from evaluation.bases import Study, curve, opened
from evaluation.budget import Progress, measured, options, phases
from evaluation.corpus import Item, by_user
from evaluation.duplicates import phrases
from evaluation.history import Past, check_pasts, embedded
from evaluation.leaks import check
from evaluation.material import settled
from evaluation.methods import PREFIX, MethodResult, merged, run_methods
from evaluation.prompting import example
from evaluation.quick import FOLDS, shortened
from evaluation.roles import Bounds
from evaluation.splits import Fold, Person, make_folds, sharing
from evaluation.text import Adapters, text_run
from evaluation.training import Bench, Recipe, Say, base_scores, chunks_of, follow, score, stage, train_once, widened
from evaluation.variants import ANALYSED, FURTHER, PROMPTED, Chosen, compared, judges, only_chosen, rated, weights_of
from evaluation.writing import Writer, lengths, write
from oppu.embedder import Embedder
from oppu.lm.port import Tensors
from oppu.settings import Settings
from oppu.tasks import Task, Tasks


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, and where its stages are kept.

    ``sisters`` are the other tasks' items, as read: those of tasks that share an article with this one decide who is
    what and which side it lies on, and the analyses learn users' own. ``profiles`` are written profiles by user, which
    stand in the prompt in place of the statistics one. ``users`` limits each fold's targets, and the folds.
    """

    task: str
    folder: Path
    seeds: tuple[int, ...]
    recipe: Recipe
    bounds: Bounds
    final: bool
    users: int | None
    say: Say
    all_arms: bool = False
    methods: bool = False
    analyses: bool = False
    sisters: tuple[Item, ...] = field(default=(), repr=False)
    profiles: Mapping[str, str] = field(default_factory=dict, repr=False)
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed's arms over all folds' target users, in order of ``people``.

    ``chosen`` is each fold's choice for P1, ``curves`` each base's loss after each number of epochs by fold and
    variant, ``cut_share`` the share of recent items that did not fit the prompts, ``methods`` each PEFT method's cost,
    ``analysed`` each fold's analyses, ``left_out`` the arms that not all users had, ``repeats`` how many items of each
    fold are left out because they say what another one says, ``adapting`` how many adapt its base, ``judging`` how many
    users choose on it, ``unread`` how many items are in a script that the embedder does not know, ``shared`` whether
    targets learnt what others are asked.
    """

    seed: int
    people: tuple[Person, ...]
    arms: Arms
    tables: tuple[Table, ...]
    chosen: tuple[Chosen, ...] = ()
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    cut_share: float | None = None
    methods: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    analysed: tuple[Analysed, ...] = ()
    left_out: tuple[str, ...] = ()
    repeats: Mapping[str, int] = field(default_factory=dict)
    adapting: Mapping[str, int] = field(default_factory=dict)
    judging: Mapping[str, int] = field(default_factory=dict)
    unread: int = 0
    shared: bool = False


def run(
    plan: Plan,
    items: Sequence[Item],
    settings: Settings,
    tasks: Tasks,
    embedder: Embedder,
    *,
    queries: Embedder | None = None,
) -> list[Outcome]:
    """Run every seed.

    The first one searches for the bases' numbers of epochs, lets the calibrate users choose the arms of P1, and runs
    whatever else is asked for; the others repeat what P1, P2 and P3 stand on, with what it chose.

    Args:
        plan: What to run.
        items: Of the task, oldest first.
        settings: Base and retriever.
        tasks: The known tasks.
        embedder: For near-duplicates and neighbours.
        queries: The query encoder, where queries for neighbours have one of their own.

    Returns:
        One outcome a seed.

    Raises:
        ConfigError: The items do not suffice, or a split leaks.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    vectors = embedded(items, embedder, keep=plan.folder)
    readable = embedder.reads([i.input for i in items])
    if not readable.all():
        plan.say(
            f"{(~readable).sum()} items are in a script that the embedder does not know: compared by their words alone"
        )
    told = {i.item_id: vectors[i.item_id] * known for i, known in zip(items, readable, strict=True)}
    common = phrases([i.input for i in items])
    stacked = np.stack([told[i.item_id] for i in items])
    folds = make_folds(items, stacked, plan.bounds, final=plan.final, sisters=sharing(items, plan.sisters))
    if plan.users is not None:
        folds = [shortened(fold, plan.users) for fold in folds[:FOLDS]]
    for fold in folds:
        check(fold, told, common)
        count = sum(len(p.test) for p in fold.target)
        plan.say(
            f"{fold.name}: {len(fold.adapt)} items adapt the base, {len(fold.calibrate)} users calibrate, "
            f"{len(fold.target)} targets with {count} queries; {fold.repeats} items are left out, for they say what "
            "another one says"
        )
    inputs.keep(plan.folder, items, plan.bounds, settings, _more(plan, tasks.require(plan.task), queries))
    if plan.final:
        inputs.opened(plan.folder, {"task": plan.task, "recipe": plan.recipe.digest(), **asdict(plan.recipe)})
    _announce(plan, folds, items, settings, tasks)
    extra = Extra(vectors, embedder, None if queries is None else embedded(items, queries))
    pasts_of = [_pasts(fold, extra, settings, plan.profiles) for fold in folds]
    others = settled(plan.sisters, tasks, plan.bounds, final=plan.final) if plan.analyses else []
    world = _World(folds, pasts_of, settings, tasks, replace(extra, sisters=others))
    outcomes = [_outcome(plan, plan.seeds[0], world.seed(plan, plan.seeds[0], None), tasks)]
    further = replace(plan, all_arms=False, methods=False, analyses=False)
    for seed in plan.seeds[1:]:
        outcomes.append(_outcome(plan, seed, world.seed(further, seed, outcomes[0].chosen), tasks))
    return [replace(outcome, unread=int((~readable).sum())) for outcome in outcomes]


@dataclass(frozen=True, slots=True)
class _World:
    """What all seeds have in common."""

    folds: Sequence[Fold]
    pasts: Sequence[Mapping[str, Sequence[Past]]]
    settings: Settings
    tasks: Tasks
    extra: Extra

    def seed(self, plan: Plan, seed: int, chosen: Sequence[Chosen] | None) -> list["_Part"]:
        """Run one seed; ``chosen`` is each fold's choice for P1 by the first one, which this one then follows."""
        first = plan.seeds[0]
        recipe = plan.recipe if chosen is None else only_chosen(plan.recipe, chosen)
        parts = []
        for at, (fold, past) in enumerate(zip(self.folds, self.pasts, strict=True)):
            folder = plan.folder / f"{fold.name}-seed-{seed}{'' if chosen is None else f'-after-{first}'}"
            folder.mkdir(exist_ok=True)
            done = _done(plan, fold.name, seed)
            study = Study(fold, past, self.settings, self.tasks, folder, recipe, seed, plan.say, done)
            if chosen is not None:
                own = recipe.at(chosen[at].rate)
                arms = chosen[at].prompt, chosen[at].oppu
                study = replace(study, recipe=own, arms=arms, searched=plan.folder / f"{fold.name}-seed-{first}")
            parts.append(_fold(plan, study, self.extra))
        return parts


def _more(plan: Plan, task: Task, queries: Embedder | None) -> dict[str, object]:
    """Return what decides results beside items, bounds and settings."""
    sisters = [(i.task, i.item_id, i.user_id, str(i.day), i.input, i.output, i.query) for i in plan.sisters]
    return {
        "profiles": dict(plan.profiles),
        "other tasks": sisters,
        "the task's definition": asdict(task),
        "query encoder": "" if queries is None else queries.own_fingerprint,
    }


def _announce(plan: Plan, folds: Sequence[Fold], items: Sequence[Item], settings: Settings, tasks: Tasks) -> None:
    """Measure the machine and say how long all this will take."""
    if plan.progress is None:
        return
    rates = measured(items, settings, tasks, plan.recipe.base_method)
    found: dict[str, float] = {}
    for seed in plan.seeds:
        first = seed == plan.seeds[0]
        recipe = plan.recipe if first else replace(plan.recipe, base_search=False, rates=(1.0,))
        more = {name: first and getattr(plan, name) for name in ("all_arms", "methods", "analyses")}
        chosen = options(settings, recipe, **more)
        for fold in folds:
            found |= {f"{fold.name}, seed {seed}, {p}": s for p, s in phases(fold, rates, chosen).items()}
    plan.progress.begin(found)


def _done(plan: Plan, fold: str, seed: int) -> Callable[[str], None]:
    progress = plan.progress
    return lambda phase: progress.done(f"{fold}, seed {seed}, {phase}") if progress is not None else None


@dataclass(frozen=True, slots=True)
class _Part:
    """One fold's share of an outcome: its targets' tables, its calibrate users', and of a text task the arms."""

    tables: list[Table]
    others: list[Table]
    arms: Arms | None
    chosen: Chosen
    curves: dict[str, list[float]]
    cut_share: float | None
    methods: dict[str, MethodResult]
    analysed: Analysed | None
    fold: Fold
    judging: int


def _pasts(fold: Fold, extra: Extra, settings: Settings, profiles: Mapping[str, str]) -> dict[str, Sequence[Past]]:
    """Look up the past of every item of a fold, each user's by its own items; a written profile has the line."""
    own: dict[str, Sequence[Item]] = {**by_user(fold.adapt)}
    own |= {p.user_id: p.items for p in (*fold.target, *fold.calibrate)}
    found: dict[str, Sequence[Past]] = {}
    for user, items in own.items():
        found[user] = extra.pasts(items, settings.retriever)
        check_pasts(items, found[user])
        if user in profiles:
            found[user] = [replace(one, line=profiles[user]) for one in found[user]]
    return found


def _fold(plan: Plan, study: Study, extra: Extra) -> _Part:
    fold, people = study.fold, (*study.fold.target, *study.fold.calibrate)
    with opened(study, "plain") as bench:
        plain = base_scores(bench, people, "base-scores")
        followed = follow(bench, people)
        study.done("follow")
        study, rates = rated(study, bench)
        bench = replace(bench, recipe=study.recipe)
        variants = compared(study, bench, FURTHER if plan.all_arms else ANALYSED if plan.analyses else ())
        held = variants.held
        _add_controls(study, bench, held)
        study.done("controls")
    for p in fold.target:
        held[p.user_id]["frozen"] = followed.frozen[p.user_id]
    methods = run_methods(study) if plan.methods else {}
    for name, result in methods.items():
        for user, scores in result.scores.items():
            held[user][PREFIX + name] = scores
    study.done("methods")
    common = set.intersection(*map(set, held.values()))  # few have as many strangers as others
    own_arms = {user: {name: arms[name] for name in arms if name in common} for user, arms in held.items()}
    tables = {p.user_id: _table(plan, study, p, (plain, followed.scores), own_arms.get(p.user_id, {})) for p in people}
    targets = [tables[p.user_id] for p in fold.target]
    arms = None
    if not targets[0].person.items[0].choices:
        arms = _text_arms(study, tables, followed.heads, variants.chosen)
    analysed = None
    if plan.analyses:
        own = {t.person.user_id: {**t.held, "none": t.base[t.person.cut :]} for t in targets}
        analysed = analyse(study, own, extra)
        study.done("analyses")
    curves = {str(variant): losses for variant in plan.recipe.variants if (losses := curve(study, variant))}
    others, chosen = [tables[p.user_id] for p in fold.calibrate], replace(variants.chosen, rates=rates)
    judging = len(judges(study))
    return _Part(targets, others, arms, chosen, curves, variants.cut_share, methods, analysed, fold, judging)


def _table(
    plan: Plan, study: Study, person: Person, scores: tuple[Mapping[str, Array], ...], held: Mapping[str, Array]
) -> Table:
    """Gather a user's scores (of the base, and of the adapter that followed), all as wide as the longest choices."""
    width = max(len(item.choices) for item in person.items)
    base, follow = (widened(own[person.user_id], width) for own in scores)
    wide = {name: widened(own, width) for name, own in held.items()} if width else held
    begun = chunks_of(person.items, plan.recipe.chunk)[0][1]
    return Table(person, study.pasts[person.user_id], base, follow, wide, begun)


def _text_arms(study: Study, tables: Mapping[str, Table], heads: Adapters, chosen: Chosen) -> Arms:
    """Judge and write all arms of a text task, the prompt-only one that the calibrate users think best among them.

    ``heads`` are the weights as they followed the stream up to the cut; those of ``oppu`` were trained once on it.
    """
    people = [*study.fold.target, *judges(study)]
    targets = [tables[p.user_id] for p in study.fold.target]
    with opened(study, "plain") as bench:
        arms = text_run(bench, tables, {"oppu": weights_of(study, bench, "oppu", people), "fused": heads})
    if not chosen.prompt or study.arms is not None:  # written once, with the first seed
        return arms
    name = max(PROMPTED, key=lambda arm: chosen.merits.get(arm, -np.inf))
    calibrate = [tables[p.user_id] for p in study.fold.calibrate]
    with opened(study, PROMPTED[name].base) as bench:
        texts = write(bench, targets, Writer(name, asked=PROMPTED[name].asked), lengths(calibrate or targets).most)
    return replace(arms, texts={**arms.texts, name: texts})


def _outcome(plan: Plan, seed: int, parts: Sequence[_Part], tasks: Tasks) -> Outcome:
    tables = tuple(table for part in parts for table in part.tables)
    written = [part.arms for part in parts if part.arms is not None]
    ran = [set(t.held) for t in tables]
    common = set.intersection(*ran)  # small folds lack some controls
    if written:
        arms = _joined(written)
    else:  # weights are fitted over all folds: a user left out alone would have only their own events to go by
        kind = tasks.require(plan.task).kind
        tables = tuple(replace(t, held={name: t.held[name] for name in t.held if name in common}) for t in tables)
        arms = choice_arms(tables, fit_each(tables, [t for part in parts for t in part.others], kind), kind)
    shares = [part.cut_share for part in parts if part.cut_share is not None]
    return Outcome(
        seed,
        tuple(t.person for t in tables),
        arms,
        tables,
        tuple(part.chosen for part in parts),
        {f"{part.chosen.fold}/{name}": losses for part in parts for name, losses in part.curves.items()},
        float(np.mean(shares)) if shares else None,
        merged([part.methods for part in parts]),
        tuple(part.analysed for part in parts if part.analysed is not None),
        tuple(sorted(set.union(*ran) - common)),
        {part.fold.name: part.fold.repeats for part in parts},
        {part.fold.name: len(part.fold.adapt) for part in parts},
        {part.fold.name: part.judging for part in parts},
        shared=any(part.fold.shared for part in parts),
    )


def _add_controls(study: Study, bench: Bench, held: Mapping[str, dict[str, Array]]) -> None:
    """Score the held-back items with the adapters of every control, on the plain base."""
    people = study.fold.target
    permuted = {p.user_id: controls.permuted(p, bench.seed) for p in people}
    _add(bench, study.fold, "permuted", _trained(bench, "permuted", permuted), held)
    if len(people) == 1:
        return  # a crossed fold: nobody else's adapter stands on this base
    volume = {p.user_id: controls.volume_matched(p, people, bench.seed) for p in people}
    if all(volume.values()):  # else somebody has nobody else's items to draw from
        _add(bench, study.fold, "volume", _trained(bench, "volume", volume), held)
    _add_strangers(study, bench, held)
    union = [i for p in people for i in controls.not_asked(p, people)]
    everybody = _trained(bench, "union", {"everybody": union})["everybody"]
    _add(bench, study.fold, "union", {p.user_id: everybody for p in people}, held)


def _trained(bench: Bench, name: str, parts: Mapping[str, Sequence[Item]]) -> dict[str, Tensors | None]:
    return train_once(bench, name, {user: list(map(example, items)) for user, items in parts.items()})


def _add(
    bench: Bench, fold: Fold, name: str, weights: Mapping[str, Tensors | None], held: Mapping[str, dict[str, Array]]
) -> None:
    def compute() -> dict[str, Array]:
        return {p.user_id: score(bench.model, list(map(example, p.test)), weights[p.user_id]) for p in fold.target}

    for user, scores in stage(bench, f"{name}-scores", compute).items():
        held[user][name] = scores


def _add_strangers(study: Study, bench: Bench, held: Mapping[str, dict[str, Array]]) -> None:
    people = study.fold.target
    weights = weights_of(study, bench, "oppu", [*people, *judges(study)])
    names = controls.strangers(people, bench.recipe.strangers, bench.seed)

    def compute() -> dict[str, Array]:
        found = {}
        for p in people:
            tests = list(map(example, p.test))
            for number, other in enumerate(names[p.user_id]):
                found[f"{p.user_id}|{number}"] = score(bench.model, tests, weights[other])
        return found

    for key, scores in stage(bench, "strangers", compute).items():
        user, _, number = key.rpartition("|")
        last = int(number) == len(names[user]) - 1
        held[user]["stranger-nearest" if last else f"stranger-{number}"] = scores


def _joined(parts: Sequence[Arms]) -> Arms:
    names = set.intersection(*(set(part.held) for part in parts))
    written = sorted(set.intersection(*(set(part.texts) for part in parts)))
    return Arms(
        {name: [x for part in parts for x in part.held[name]] for name in sorted(names)},
        {name: [x for part in parts for x in part.stream[name]] for name in parts[0].stream},
        [x for part in parts for x in part.trust],
        {name: [x for part in parts for x in part.texts[name]] for name in written},
    )
