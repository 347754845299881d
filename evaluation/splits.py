"""Who is what, and which item lies on which side (protocol section 1). Pure, given the items' embeddings.

Users fall by hash and number of items into adapt, calibrate and target. Invariants: items that say the same (equal
text, near-duplicates) form one group, and a group lies on one side only: a target's test wins over calibrate, that
over a target's training part, that over adapt; what loses is dropped. Within a user a group's first item is kept; where
other choices were put, as of other papers to cite, the first of each answer.
Where users act on the same few things, as on films, that would leave targets or the base nothing to learn: then a
target may learn what others are asked about, which none of his arms but controls can see, controls leave out what he is
asked about, and of the things that calibrate users and others have in common every second one adapts the base.
Role and cut of a user are those of all tasks that share its items (sister tasks), so that an article lies on the same
side whichever task is asked about.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from enum import IntEnum

from evaluation.answers import candidates
from evaluation.corpus import Item, by_user
from evaluation.duplicates import Vectors, normal, phrases, same_between, same_groups
from evaluation.roles import Bounds, roles
from oppu.errors import ConfigError

TRAIN_SHARE = 0.8
MOST_LOST = 0.5
"""Of targets' training items, or of what adapts the base, to other users' sides: past it they are shared things."""


class Side(IntEnum):
    """Where an item lies; where a group's items disagree the highest wins."""

    ADAPT = 0
    TRAIN = 1
    CALIBRATE = 2
    TEST = 3


@dataclass(frozen=True, slots=True)
class Person:
    """A user's items in order of day; those from ``cut`` on are held back."""

    user_id: str = field(repr=False)
    items: tuple[Item, ...] = field(repr=False)
    groups: tuple[int, ...] = field(repr=False)
    cut: int

    @property
    def train(self) -> tuple[Item, ...]:
        """What may be trained on."""
        return self.items[: self.cut]

    @property
    def test(self) -> tuple[Item, ...]:
        """What is asked about."""
        return self.items[self.cut :]


@dataclass(frozen=True, slots=True)
class Fold:
    """One base's users: the base is adapted on ``adapt``, everything is chosen on ``calibrate``.

    ``held`` are the normalised inputs of sister tasks' test parts; ``before`` the day that all of ``adapt`` precedes,
    where that was asked for; ``repeats`` is how many items stand in no part, for they say what another one says, of
    which ``lost`` is the share of targets' training items, or of ``adapt`` if that is more; ``shared``: targets may
    learn what others are asked about.
    """

    name: str
    adapt: tuple[Item, ...] = field(repr=False)
    calibrate: tuple[Person, ...] = field(repr=False)
    target: tuple[Person, ...] = field(repr=False)
    held: frozenset[str] = field(default=frozenset(), repr=False)
    before: date | None = None
    repeats: int = 0
    lost: float = 0.0
    shared: bool = False


@dataclass(frozen=True, slots=True)
class _Days:
    """A user's items are opened before ``end`` and held back from ``cut`` on; ``None``: never."""

    end: date | None
    cut: date | None

    def opened(self, items: Iterable[Item]) -> list[Item]:
        return [item for item in items if self.end is None or item.day < self.end]

    def tested(self, item: Item) -> bool:
        return self.cut is not None and item.day >= self.cut


_ALL = _Days(None, None)


@dataclass(frozen=True, slots=True)
class _Question:
    """What was put with an item: the choices offered, and what its output stands for among them."""

    offered: frozenset[str]
    answer: str


@dataclass(frozen=True, slots=True)
class _World:
    """What every fold divides: each user's items, their groups, what was put with each, and the days that divide a
    target's. ``most`` is the number of items of each user in the task where he has most; ``closed`` are, of who is a
    target in some fold, the days where he is none: what is not opened exists there neither."""

    people: Mapping[str, list[Item]]
    groups: Mapping[str, int]
    questions: Mapping[str, _Question]
    days: Mapping[str, _Days]
    sisters: tuple[Item, ...]
    most: Mapping[str, int]
    bounds: Bounds
    closed: Mapping[str, _Days]


def make_folds(
    items: Sequence[Item], vectors: Vectors, bounds: Bounds, *, final: bool, sisters: Sequence[Item] = ()
) -> list[Fold]:
    """Divide users and items.

    Args:
        items: Of one task, oldest first.
        vectors: ``[n, dim] float32`` embeddings of the inputs, of unit length, or zero where they tell nothing.
        bounds: Who can be what.
        final: Whether the last fifth is opened; else it does not exist, and the fifth before it is held back.
        sisters: Items of other tasks with some of the same inputs.

    Returns:
        One fold, or several that leave targets out by turns, where there are few or nobody else to adapt a base on.

    Raises:
        ConfigError: Nobody can be a target, or nobody's items divide.
    """
    groups = _grouped(items, vectors)
    people = by_user(items)
    days = _days(items, sisters, final=final)
    most = _most(items, sisters)
    parts = roles(people, most, bounds)
    targets = {user for role in parts.values() for user, kind in role.items() if kind == "target"}
    closed = {user: _Days(days[user].end, None) for user in targets}
    questions = {item.item_id: _question(item) for item in items}
    world = _World(people, groups, questions, days, tuple(sisters), most, bounds, closed)
    folds = [_fold(name, world, role) for name, role in parts.items()]
    if sum(fold.lost for fold in folds) > MOST_LOST * len(folds):
        folds = [_fold(name, world, role, shared=True) for name, role in parts.items()]
    repeats = max(fold.repeats for fold in folds)
    folds = [fold for fold in folds if fold.target]
    if not folds:
        bare = "; histories without outputs are asked about by their file's queries alone, with --final"
        raise ConfigError(
            "events: no target has items on both sides of a day that divides them"
            + (f"; {repeats} of {len(items)} items say what another one says, and stand once" if repeats else "")
            + (bare if all(item.bare or item.query for item in items) else "")
        )
    return folds


def sharing(items: Iterable[Item], others: Iterable[Item]) -> list[Item]:
    """Return other tasks' items, oldest first, of those tasks that share some input with these items: the sisters."""
    inputs, others = {normal(item.input) for item in items}, list(others)
    shared = {item.task for item in others if normal(item.input) in inputs}
    return sorted((item for item in others if item.task in shared), key=lambda item: item.day)


def not_tested(items: Sequence[Item], sisters: Sequence[Item], bounds: Bounds, *, final: bool) -> list[Item]:
    """Return the items that lie in no test part, whoever is a target: what labels may be learnt from.

    Args:
        items: Of one task, in order of day.
        sisters: As for ``make_folds``.
        bounds: Who can be a target.
        final: As for ``make_folds``; what is not opened is not returned either.

    Returns:
        The items, users by name.
    """
    days = _days(items, sisters, final=final)
    found: list[Item] = []
    for user, own in by_user(items).items():
        mine = days[user] if bounds.able(user, own) else _ALL
        found += [item for item in mine.opened(own) if not mine.tested(item)]
    return found


def cut_index(items: Sequence[Item], *, answered: bool = False) -> int:
    """Return where the file's queries begin; without any where the last fifth does (``answered``: of the items that
    have an output), moved back to the beginning of its day, or on where all is one day."""
    asked = next((k for k, item in enumerate(items) if item.query), None)
    if asked is not None:
        return asked
    able = [item for item in items if not (answered and item.bare)] or items
    day = able[min(int(TRAIN_SHARE * len(able)), len(able) - 1)].day
    first = next(k for k in range(len(items)) if items[k].day == day)
    if first > 0:
        return first
    return next((k for k in range(len(items)) if items[k].day > day), len(items))


def clusters(people: Sequence[Person]) -> list[int]:
    """Return a cluster number for each person: persons who share a test group are one cluster (protocol section 4)."""
    owner: dict[int, int] = {}
    number = list(range(len(people)))
    for at, person in enumerate(people):
        for group in person.groups[person.cut :]:
            other = number[owner.setdefault(group, at)]
            if other != number[at]:
                number = [min(other, number[at]) if n in (other, number[at]) else n for n in number]
    return number


def _grouped(items: Sequence[Item], vectors: Vectors) -> dict[str, int]:
    """Return each item's group; a text without an output is the same as what has it, or nearly it, for an output."""
    texts = [item.input for item in items]
    written = [at for at, item in enumerate(items) if item.bare]
    said = [at for at, item in enumerate(items) if not item.bare] if written else []
    alike = same_between([texts[at] for at in written], [items[at].output for at in said], phrases(texts))
    found = same_groups(texts, vectors, [(written[a], said[b]) for a, b in alike])
    return {item.item_id: group for item, group in zip(items, found, strict=True)}


def _days(items: Sequence[Item], sisters: Sequence[Item], *, final: bool) -> dict[str, _Days]:
    """Return the days that divide each user's items, over this task and its sisters, each input once."""
    found = {}
    for user, every in by_user([*items, *sisters]).items():
        seen: dict[str, Item] = {}
        for item in every:
            seen.setdefault(normal(item.input), item)
        own = sorted(seen.values() if sisters else every, key=lambda item: item.day)
        for answered in (False, True):  # where all outputs are new, a fifth of all items would leave none to ask about
            last = cut_index(own, answered=answered)
            end = None if final or last == len(own) else own[last].day
            opened = _Days(end, None).opened(own)
            cut = cut_index(opened, answered=answered) if opened else 0
            found[user] = _Days(end, opened[cut].day if cut < len(opened) else None)
            if any(not item.bare for item in opened[cut:]):
                break
    return found


def _most(items: Sequence[Item], sisters: Sequence[Item]) -> dict[str, int]:
    """Return each user's number of items in the task where he has most."""
    found: dict[str, int] = defaultdict(int)
    for (user, _), count in Counter((item.user_id, item.task) for item in (*items, *sisters)).items():
        found[user] = max(found[user], count)
    return found


def _fold(name: str, world: _World, role: Mapping[str, str], *, shared: bool = False) -> Fold:
    days = {user: world.days[user] if role[user] == "target" else world.closed.get(user, _ALL) for user in role}
    held = _held_elsewhere(world, role)
    sides: dict[int, Side] = defaultdict(lambda: Side.ADAPT)
    mine: dict[tuple[str, int], Side] = defaultdict(lambda: Side.ADAPT)
    placed: list[tuple[Item, Side]] = []
    for user in role:
        kind = {"adapt": Side.ADAPT, "calibrate": Side.CALIBRATE, "target": Side.TRAIN}[role[user]]
        opened = days[user].opened(world.people[user])
        placed += [(item, Side.TEST if days[user].tested(item) else kind) for item in opened]
    for item, side in placed:
        group = world.groups[item.item_id]
        own = Side.TEST if normal(item.input) in held else side
        sides[group] = max(sides[group], own)
        mine[item.user_id, group] = max(mine[item.user_id, group], own)

    adapting = {world.groups[item.item_id] for item, side in placed if side == Side.ADAPT}
    second = frozenset(sorted(group for group in adapting if sides[group] == Side.CALIBRATE)[1::2])

    def stays(item: Item, side: Side, *, shared: bool) -> bool:
        group = world.groups[item.item_id]
        wins = sides[group]
        if shared and side == Side.TRAIN:
            return mine[item.user_id, group] == side
        if shared and wins == Side.CALIBRATE and group in second:
            wins = Side.ADAPT
        return wins == side or (shared and (side, wins) == (Side.ADAPT, Side.TRAIN))

    stay = {
        which: _first_of_group([(i, side) for i, side in placed if stays(i, side, shared=which)], world)
        for which in (False, True)
    }
    left = {which: Counter(side for _, side in own) for which, own in stay.items()}
    kept = by_user(item for item, _ in stay[shared])
    side_of = {item.item_id: side for item, side in placed}

    def person(user: str) -> Person:
        own = tuple(i for i in kept[user] if (not i.bare if side_of[i.item_id] == Side.TEST else i.learnable))
        cut = sum(side_of[item.item_id] != Side.TEST for item in own)
        return Person(user, own, tuple(world.groups[item.item_id] for item in own), cut)

    adapt = sorted(
        (i for u, own in kept.items() if role[u] == "adapt" for i in own if i.learnable),
        key=lambda i: (i.day, i.item_id),
    )
    chosen = {kind: [person(u) for u in kept if role[u] == kind] for kind in ("calibrate", "target")}
    able = tuple(p for p in chosen["target"] if 0 < p.cut < len(p.items))
    repeats = len(placed) - sum(map(len, kept.values()))
    calibrate = tuple(p for p in chosen["calibrate"] if p.items)
    lost = max(_lost(left[False][side], left[True][side]) for side in (Side.TRAIN, Side.ADAPT))
    made = Fold(name, tuple(adapt), calibrate, able, held, repeats=repeats, lost=lost, shared=shared)
    return _before_test(made) if world.bounds.before_test and able else made


def _lost(kept: int, of: int) -> float:
    return 1 - kept / of if of else 0.0


def _held_elsewhere(world: _World, role: Mapping[str, str]) -> frozenset[str]:
    """Return the inputs that sister tasks hold back: of this fold's targets, and of users who are theirs alone."""
    theirs = {user for user, count in world.most.items() if count >= world.bounds.target and user not in role}
    users = theirs | {user for user, kind in role.items() if kind == "target"}
    asked = [i for i in world.sisters if i.user_id in users]
    return frozenset(
        normal(i.input) for i in asked if world.days[i.user_id].tested(i) and world.days[i.user_id].opened([i])
    )


def _before_test(fold: Fold) -> Fold:
    if not all(item.dated for item in (*fold.adapt, *(item for p in fold.target for item in p.train))):
        raise ConfigError("--population-before-test: expected days in the histories, which say their order alone")
    first = min(p.test[0].day for p in fold.target)
    adapt = tuple(item for item in fold.adapt if item.day < first)
    if fold.adapt and not adapt:
        raise ConfigError(
            f"--population-before-test: no other user's item is from before {first}, the first test's day"
        )
    return replace(fold, adapt=adapt, before=first)


def _first_of_group(placed: Sequence[tuple[Item, Side]], world: _World) -> list[tuple[Item, Side]]:
    offered: dict[tuple[str, int], set[frozenset[str]]] = defaultdict(set)
    for item, _ in placed:
        offered[item.user_id, world.groups[item.item_id]].add(world.questions[item.item_id].offered)
    first: dict[tuple[str, int, str], tuple[Item, Side]] = {}
    for item, side in placed:
        key = item.user_id, world.groups[item.item_id]
        answer = world.questions[item.item_id].answer if len(offered[key]) > 1 else ""
        first.setdefault((*key, answer), (item, side))
    return list(first.values())


def _question(item: Item) -> _Question:
    """Read what was put; where the input shows candidates, an output stands for the one at its place."""
    names, texts = candidates(item.input)
    answer = texts[names.index(item.output)] if item.output in names else item.output
    return _Question(frozenset(map(normal, texts or item.choices)), normal(answer))
