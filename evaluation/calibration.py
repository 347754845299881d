"""Fit how a base's sources are weighed, on users whom the base has not seen: what ``oppu calibrate`` does.

Adapters follow these users' events as the service's would; each event is scored before it is learnt. The stacks of a
choice task, or the experts' weights of a text task, are fitted on these scores. A base's coefficients hold for its
adapters' settings; fit again where either changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from evaluation.arms import Table, fit_fusion
from evaluation.corpus import Item, by_user
from evaluation.history import embedded, pasts
from evaluation.splits import Fold, Person
from evaluation.text import cached, fit_text_fusion, foreseen
from evaluation.training import Bench, Recipe, Say, base_scores, chunks_of, follow
from inference.blending import TextFusion
from oppu.embedder import Embedder
from oppu.errors import ConfigError
from oppu.fusion import Fusion
from oppu.lm.base import load_base
from oppu.lm.model import TorchModel
from oppu.settings import Settings
from oppu.tasks import Tasks

LEAST_ITEMS = 100
"""Eight coefficients are fitted, and most users' first events have no evidence yet."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was fitted, on how many items and users."""

    fusion: Fusion | TextFusion
    items: int
    users: int


def calibrate(
    items: Sequence[Item],
    settings: Settings,
    tasks: Tasks,
    embedder: Embedder,
    say: Say,
    *,
    queries: Embedder | None = None,
) -> Calibrated:
    """Fit what is weighed without an adapter and with one.

    Args:
        items: One task's items, oldest first, of users the base was not adapted on.
        settings: Base, updater and retriever as they will be served.
        tasks: The known tasks.
        embedder: For neighbours.
        say: Told of progress.
        queries: The query encoder, where queries have one of their own.

    Returns:
        The fit.

    Raises:
        ConfigError: Items of differing choices, or too few.
    """
    if not items or len({len(i.choices) for i in items}) > 1:
        raise ConfigError("EVENTS: expected items of one task with the same number of choices each")
    vectors = embedded(items, embedder)
    asked = vectors if queries is None else embedded(items, queries)
    people = [Person(u, tuple(own), tuple(range(len(own))), len(own)) for u, own in by_user(items).items()]
    people = [p for p in people if len(p.items) > settings.updater.min_pending]
    if sum(len(p.items) for p in people) < LEAST_ITEMS:
        least = f"at least {LEAST_ITEMS} items of users with more than {settings.updater.min_pending} each"
        raise ConfigError(f"EVENTS: expected {least}")
    past = {p.user_id: pasts(p.items, vectors, embedder, settings.retriever, queries=asked) for p in people}
    fold = Fold("calibrate", (), tuple(people), ())
    model = TorchModel(load_base(settings.model), tasks, settings=settings.model, slots=1)
    with TemporaryDirectory(prefix="oppu-calibrate-") as folder:
        bench = Bench(fold, model, Path(folder), served(settings), 0, say)
        plain = base_scores(bench, people, "base-scores")
        followed = follow(bench, people).scores
        said = cached(bench, people, past) if not items[0].choices else None
    model.close()
    tables = [
        Table(
            p, past[p.user_id], plain[p.user_id], followed[p.user_id], {}, chunks_of(p.items, bench.recipe.chunk)[0][1]
        )
        for p in people
    ]
    if not any(t.adapted < len(t.person.items) for t in tables):
        raise ConfigError("EVENTS: expected some user with more days of items than an adapter's first training takes")
    fitted = (
        fit_fusion(tables, tasks[items[0].task].kind)
        if said is None
        else fit_text_fusion([foreseen(table, said) for table in tables])
    )
    return Calibrated(fitted, sum(len(p.items) for p in people), len(people))


def served(settings: Settings) -> Recipe:
    """Return the recipe that the updater's settings come to."""
    own = settings.updater
    return replace(
        Recipe(),
        chunk_learning_rate=own.learning_rate,
        weight_decay=own.weight_decay,
        batch=own.batch,
        chunk=own.min_pending,
        replay=own.replay,
        chunk_passes=own.passes,
    )
