"""How long a run will take: rates measured on this machine, times what each phase has to read.

A token is taken as four characters, which is near enough for a ratio of two runs of one model on one text.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from evaluation.analyses import LEVELS
from evaluation.corpus import Item
from evaluation.methods import METHODS
from evaluation.prompting import PLAIN, Asked, Variant, example
from evaluation.splits import Fold
from evaluation.training import RATES, Recipe, chunks_of
from evaluation.variants import ANALYSED, FURTHER, PROMPTED, RECENT, TRAINED, UNADAPTED
from oppu.lm.adaption import AdaptConfig, adapt
from oppu.lm.base import OFFLINE, load_base
from oppu.lm.model import TorchModel
from oppu.lm.port import TrainConfig, TrainJob
from oppu.settings import Settings
from oppu.tasks import Tasks
from oppu.values import UserId

_SAMPLE = 32
"""Items in each measured batch."""
_CHARACTERS, _PROFILE_TOKENS, _TEMPLATE_TOKENS = 4, 24, 6
_USUAL: Mapping[Variant, Asked] = {"plain": PLAIN, "retrieval": Asked(2), "profile": Asked(0, profile=True)}
"""What stands in a variant's prompts, about."""
_PEFT_FACTOR = 1.5
"""A plain loop of one user against the bank."""
_QUICK_SHARE = 0.2
"""A phase that took less of its estimate was read from its files and says nothing of the pace."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds a token: to adapt all weights, to train adapters, to score."""

    adapt: float
    train: float
    score: float


def measured(
    items: Sequence[Item], settings: Settings, tasks: Tasks, method: Literal["full", "lora"] = "full"
) -> Rates:
    """Time a batch or two of each kind of work, after one that warms up.

    Args:
        items: Some to try it on.
        settings: Names the base.
        tasks: The known tasks.
        method: How the base is adapted.

    Returns:
        The rates.
    """
    sample = list(items[-_SAMPLE:])
    made = list(map(example, sample))
    tokens = sum(size(item, settings.model.max_tokens) for item in sample)
    base = load_base(settings.model)
    model = TorchModel(base, tasks, settings=settings.model, slots=1)
    config = TrainConfig(1e-4, 0.0, 1, 16)
    jobs = [TrainJob(UserId("u"), None, tuple(made))]
    train = _timed(lambda: model.train(jobs, config, heartbeat=lambda: None))
    judge = _timed(lambda: model.losses(made, None))
    model.close()
    marks: list[float] = []
    with TemporaryDirectory(prefix="oppu-budget-") as folder:
        adapt(
            load_base(settings.model, adapting=True),
            tasks,
            made,
            Path(folder) / "base",
            config=AdaptConfig(method, 3, 1e-5, _SAMPLE),
            settings=settings.model,
            progress=lambda _done, _all, _loss: marks.append(time.perf_counter()),
        )
    return Rates(adapt=(marks[-1] - marks[0]) / (len(marks) - 1) / tokens, train=train / tokens, score=judge / tokens)


def size(item: Item, limit: int, asked: Asked = PLAIN) -> int:
    """Return about how many tokens an item's prompt and answer have."""
    one = (len(item.input) + len(item.output)) // _CHARACTERS + _TEMPLATE_TOKENS
    return min(limit, one * (1 + asked.k) + (_PROFILE_TOKENS if asked.profile else 0))


@dataclass(frozen=True, slots=True)
class Options:
    """What decides how much a run does, beside its data."""

    recipe: Recipe
    limit: int
    offline: bool
    all_arms: bool
    methods: bool
    analyses: bool


def options(settings: Settings, recipe: Recipe, *, all_arms: bool, methods: bool, analyses: bool) -> Options:
    """Return a run's options under some settings."""
    limit, offline = settings.model.max_tokens, settings.model.base == OFFLINE
    return Options(recipe, limit, offline, all_arms, methods, analyses)


def phases(fold: Fold, rates: Rates, chosen: Options) -> dict[str, float]:
    """Estimate the seconds of each phase of one fold and seed, at most: adaption may stop before its last epoch.

    Args:
        fold: Whose items.
        rates: As measured.
        chosen: What runs.

    Returns:
        Seconds by phase.
    """
    work = _Work(fold, rates, chosen)
    recipe = chosen.recipe
    found = {f"base-{variant}": work.base(variant) for variant in recipe.variants}
    per_item = recipe.chunk_passes * (1 + recipe.replay / recipe.chunk) * rates.train + 2 * rates.score
    found["follow"] = work.every() * per_item
    found["rates"] = len(recipe.rates) * work.judged() if len(recipe.rates) > 1 else 0.0
    more = tuple(FURTHER) if chosen.all_arms else ANALYSED if chosen.analyses else ()
    trained = {**TRAINED, **{name: FURTHER[name] for name in more}}
    bases = {*recipe.variants, "unadapted"}
    found |= {name: work.prompted(way.asked) for name, way in PROMPTED.items() if way.base in bases}
    found |= {RECENT: work.prompted(Asked(8))} if "retrieval" in bases else {}
    found |= {name: work.trained(way.asked) for name, way in trained.items() if way.base in bases}
    found["controls"] = 3 * work.trained(PLAIN) + (1 + recipe.strangers) * work.prompted(PLAIN)
    if more:
        found[UNADAPTED] = work.prompted(PLAIN)
        runs = recipe.base_epochs if recipe.base_search else 1
        found["base-unadapted"] = work.base("plain") / runs if chosen.offline else 0.0
    if chosen.methods:
        tries = len(METHODS) * (work.trained(PLAIN) + len(RATES) * work.judged())
        found["methods"] = _PEFT_FACTOR * tries
    if chosen.analyses:
        levels = sum(LEVELS) / max(LEVELS)
        found["analyses"] = (levels + 5) * work.trained(PLAIN) + 8 * work.prompted(Asked(4)) + work.retrained()
    return found


@dataclass(frozen=True, slots=True)
class _Work:
    """Seconds of a fold's kinds of work."""

    fold: Fold
    rates: Rates
    chosen: Options

    def base(self, variant: Variant) -> float:
        """Every number of epochs that is tried is a run of its own, judged by the calibrate users."""
        asked, recipe = _USUAL[variant], self.chosen.recipe
        tried = range(1 if recipe.base_search else recipe.base_epochs, recipe.base_epochs + 1)
        judged = [i for p in self.fold.calibrate for i in p.items if i.answered] if self.fold.adapt else []
        learnt = self.fold.adapt[: recipe.adapt_items]  # as many as are drawn
        runs = self._tokens(learnt, asked) * sum(tried) * self.rates.adapt
        return runs + len(tried) * self._tokens(judged, asked) * self.rates.score

    def every(self) -> float:
        """Return the tokens of all items of targets and calibrate users."""
        return self._tokens([i for p in (*self.fold.target, *self.fold.calibrate) for i in p.items], PLAIN)

    def prompted(self, asked: Asked) -> float:
        """Score the held-back items."""
        return self._tokens([i for p in self.fold.target for i in p.test], asked) * self.rates.score

    def trained(self, asked: Asked) -> float:
        """Train on every training item, then score."""
        tokens = self._tokens([i for p in self.fold.target for i in p.train], asked)
        return tokens * self.chosen.recipe.passes * self.rates.train + self.prompted(asked)

    def retrained(self) -> float:
        """Train on all items so far after every chunk, and score the next one."""
        recipe, tokens = self.chosen.recipe, 0.0
        for p in self.fold.target:
            for begin, _ in chunks_of(p.items, recipe.chunk):
                tokens += self._tokens(p.items[:begin], PLAIN) * recipe.passes * self.rates.train
        return tokens + self._tokens([i for p in self.fold.target for i in p.items], PLAIN) * self.rates.score

    def judged(self) -> float:
        """Train the judges' adapters once."""
        items = [i for p in self.fold.calibrate for i in p.items[: self.chosen.recipe.judge_items]]
        return self._tokens(items, PLAIN) * self.chosen.recipe.passes * self.rates.train / 2

    def _tokens(self, items: Sequence[Item], asked: Asked) -> float:
        return float(sum(size(item, self.chosen.limit, asked) for item in items))


class Progress:
    """Says what happens, and from the phases that are done how long the others will take."""

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Know nothing yet.

        Args:
            tell: Told each line.
            clock: Seconds.
        """
        self._tell, self._clock = tell, clock
        self._left: dict[str, float] = {}
        self._last = self._taken = self._foreseen = 0.0

    def begin(self, phases: Mapping[str, float]) -> None:
        """Take the estimates, seconds by phase, and say their sum."""
        self._left = dict(phases)
        self._last = self._clock()
        self._tell(f"time budget, measured: at most {_minutes(sum(self._left.values()))}")

    def done(self, phase: str) -> None:
        """Count a phase as done, once."""
        foreseen, now = self._left.pop(phase, None), self._clock()
        taken, self._last = now - self._last, now
        if foreseen is None:
            return
        if taken > _QUICK_SHARE * foreseen:
            self._taken, self._foreseen = self._taken + taken, self._foreseen + foreseen
        if self._left:
            self._tell(f"{phase}: done; about {_minutes(self.remaining())} left")

    def remaining(self) -> float:
        """Return the seconds left at the pace so far."""
        pace = self._taken / self._foreseen if self._foreseen else 1.0
        return pace * sum(self._left.values())


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds of the second of two runs."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
