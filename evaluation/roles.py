"""Who adapts the base, who calibrates and who is a target; in one fold, or in several that leave some out by turns."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from evaluation.corpus import Item, by_user
from oppu.errors import ConfigError

LEAVE_ONE_OUT, CROSS_FOLDS = 6, 5
"""Up to so many targets each are left out alone; more are left out in so many parts, of two at least."""
LEAST_ITEMS, FAIR_ITEMS = 5, 20
ENOUGH_ITEMS, ENOUGH_JUDGES = 200, 3
"""Of users who are no targets: fewer items adapt no base worth the name, and fewer users choose nothing for others."""
_HELPFUL_TARGETS = 12
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Who can be what: least number of items; few targets are crossed, each fold leaving some out.

    ``population`` names users who are never targets; where there are any, all others are targets or nothing.
    ``unasked`` are never targets either, for want of a query with an output; else they are like all others.
    ``before_test`` keeps of the adapt items those from before the earliest target's test part. Without ``strict`` the
    bound on targets is lowered where too few reach it (``reachable``). Targets are crossed too where the others have
    fewer items to adapt a base than ``enough_items``, or fewer who calibrate than ``enough_judges``.
    """

    target: int = 50
    calibrate: int = 20
    folds_below: int = 12
    population: frozenset[str] = field(default=frozenset(), repr=False)
    before_test: bool = False
    strict: bool = True
    unasked: frozenset[str] = field(default=frozenset(), repr=False)
    enough_items: int = ENOUGH_ITEMS
    enough_judges: int = ENOUGH_JUDGES

    @property
    def barred(self) -> frozenset[str]:
        """Who is never a target."""
        return self.population | self.unasked

    def able(self, user: str, items: Sequence[Item]) -> bool:
        """Whether a user with these items is a target."""
        return len(items) >= self.target and user not in self.barred


def reachable(people: Mapping[str, Sequence[Item]], bounds: Bounds) -> Bounds:
    """Lower the bounds where too few reach them.

    Args:
        people: Each user's items.
        bounds: As asked for.

    Returns:
        The given bounds where they may not be lowered, or need not be: a dozen users reach them, or half of fewer, or
        all with ``FAIR_ITEMS``. Else so many become targets, none of them with fewer than ``LEAST_ITEMS``.
    """
    counts = _counts(people, bounds)
    wanted = min(_HELPFUL_TARGETS, max(1, len(counts) // 2, sum(count >= FAIR_ITEMS for count in counts)))
    if bounds.strict or not counts or counts[wanted - 1] >= bounds.target:
        return bounds
    target = max(counts[wanted - 1], LEAST_ITEMS)
    return replace(bounds, target=target, calibrate=min(bounds.calibrate, max(3, target // 2)))


def roles(people: Mapping[str, list[Item]], most: Mapping[str, int], bounds: Bounds) -> dict[str, dict[str, str]]:
    """Give every user a role in each fold.

    Args:
        people: Each user's items.
        most: Each user's number of items in the task, of this one and its sisters, where he has most: nobody is a
            target in one and adapts the base in another.
        bounds: Who can be what.

    Returns:
        By fold, ``adapt``, ``calibrate`` or ``target`` by user; users without a role are left out.

    Raises:
        ConfigError: Nobody can be a target; the message says which bound would do.
    """
    targets = [u for u, own in people.items() if bounds.able(u, own)]
    if not targets:
        raise ConfigError(_too_few(people, bounds))
    if bounds.population:
        others = _population(people, most, bounds)
    else:
        others = {u: _role(u, most[u], bounds) for u in people if most[u] < bounds.target or u in bounds.unasked}
    items = sum(len(people[u]) for u, role in others.items() if role == "adapt")
    judges = sum(role == "calibrate" for role in others.values())
    few = items < bounds.enough_items or judges < bounds.enough_judges
    crossed = len(targets) > 1 and (len(targets) < bounds.folds_below or few)
    if bounds.population or not crossed:
        return {"all": others | dict.fromkeys(targets, "target")}
    if len(targets) < bounds.folds_below:
        others = dict.fromkeys(others, "adapt")
    if len(targets) <= LEAVE_ONE_OUT:
        folds = {f"without-{_plain(user)}": [user] for user in targets}
    else:
        count = min(CROSS_FOLDS, len(targets) // 2)  # alone in a fold one has nobody to be compared with
        folds = {f"fold-{k}": targets[k::count] for k in range(count)}
    parts = list(folds.values())
    crossing = {}
    for at, (name, out) in enumerate(folds.items()):
        held = dict.fromkeys(parts[(at + 1) % len(parts)], "calibrate") | dict.fromkeys(out, "target")
        crossing[name] = others | dict.fromkeys(targets, "adapt") | held
    return crossing


def some_users(items: Sequence[Item], bounds: Bounds, *, users: int, adapt_items: int) -> list[Item]:
    """Return the items of some users, for a first look that takes minutes.

    Args:
        items: Of one task, oldest first.
        bounds: Who can be what.
        users: How many calibrate users are kept, and targets; of these so many that few are not taken for all.
        adapt_items: About how many items adapt the base.

    Returns:
        The items of the users who come first by name, in the given order.
    """
    people = by_user(items)
    targets = [u for u, own in people.items() if bounds.able(u, own)]
    rest = bounds.population or people
    others = {u: _role(u, len(own), bounds) for u, own in people.items() if u not in targets and u in rest}
    kept = {*targets[: max(users, bounds.folds_below)], *[u for u, r in others.items() if r == "calibrate"][:users]}
    for user in (u for u, role in others.items() if role == "adapt"):
        if adapt_items <= 0:
            break
        kept.add(user)
        adapt_items -= len(people[user])
    return [item for item in items if item.user_id in kept]


def _population(people: Mapping[str, object], most: Mapping[str, int], bounds: Bounds) -> dict[str, str]:
    """Return the roles of those who are never targets; where none has the items to calibrate, fewer do."""
    found = {u: _role(u, most[u], bounds) for u in people if u in bounds.population}
    if "calibrate" in found.values() or bounds.strict:
        return found
    return {u: _role(u, most[u], replace(bounds, calibrate=LEAST_ITEMS)) for u in found}


def _role(user: str, count: int, bounds: Bounds) -> str:
    if count >= bounds.calibrate and hashlib.sha256(f"role:{user}".encode()).digest()[0] % 2:
        return "calibrate"
    return "adapt"


def _plain(user: str) -> str:
    """Return a name for a folder."""
    return user if _PLAIN_NAME.fullmatch(user) else hashlib.sha256(user.encode()).hexdigest()[:16]


def _counts(people: Mapping[str, Sequence[Item]], bounds: Bounds) -> list[int]:
    """Return the numbers of items of those who may be targets, the most first."""
    return sorted((len(own) for user, own in people.items() if user not in bounds.barred), reverse=True)


def _helpful(counts: Sequence[int]) -> int:
    """Return the bound that makes targets of about a dozen users, or of half of fewer."""
    return counts[min(_HELPFUL_TARGETS, max(1, len(counts) // 2)) - 1]


def _too_few(people: Mapping[str, list[Item]], bounds: Bounds) -> str:
    counts = _counts(people, bounds)
    if not counts:
        return "events: expected some user who is not in --population"
    bound = max(_helpful(counts), LEAST_ITEMS)
    able = sum(count >= bound for count in counts)
    return (
        f"events: expected some user with at least {bounds.target} items to be a target (--min-target); the longest "
        f"history has {counts[0]}: "
        + (
            f"--min-target {bound} would make {able} of {len(counts)} users targets"
            if able
            else f"a target needs at least {LEAST_ITEMS} items a user"
        )
    )
