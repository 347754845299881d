"""Texts: every expert's probabilities of what the user wrote, and how they are mixed (protocol sections 2 and 3).

Letters: n items of a user, t tokens of the longest output, e experts in the order of ``EXPERTS``. What lies after an
output's end is NaN. Each output counts alike in a fit, as it does in the loss a token that is reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.arms import Arms, Table, earned_before, held_back, without_each
from evaluation.history import Past
from evaluation.prompting import example
from evaluation.splits import Person
from evaluation.stacking import minimised
from evaluation.training import MATCHED, Bench, padded, part_key, stage
from evaluation.writing import Writer, lengths, plain, write
from inference.blending import DEFAULT, FILE, Coefficients, TextFusion
from oppu.errors import ConfigError
from oppu.fusion import length
from oppu.lm.blend import CACHE_EXPERTS, EXPERTS, mixed
from oppu.lm.port import Tensors

Array = NDArray[np.float64]
Adapters = Mapping[str, Tensors | None]

PRIOR_DEVIATION = 2.0
"""Of a coefficient about the built-in one, in a sample of ``_OUTPUTS``: short streams say little of long ones."""
_OUTPUTS = 100
_FAR = 1e4


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What one user's experts say: ``said`` ``[n, t, e]`` probabilities (NaN: silent), ``matched`` ``[n, t, e]``,
    ``real`` ``[n, t]`` whether there is a token."""

    table: Table
    said: Array = field(repr=False)
    matched: NDArray[np.int64] = field(repr=False)

    @property
    def real(self) -> NDArray[np.bool_]:
        """Where there is a token, ``[n, t]``."""
        return ~np.isnan(self.table.base)

    def earned(self) -> list[float]:
        """Return what the adapter has earned before each item: on its tokens against the base's, as in the service."""
        items, table = self.table.person.items, self.table
        asked = [at for at in range(table.adapted, len(items)) if not items[at].bare and self.real[at].any()]
        return earned_before(items, {at: float(np.nansum(table.follow[at] - table.base[at])) for at in asked})

    def log_p(self, fusion: TextFusion, *, adapter: bool, earned: Sequence[float] = ()) -> Array:
        """Return ``[n, t]`` log probabilities under the mixture that would be served.

        Args:
            fusion: The weights.
            adapter: Whether the adapter has a say.
            earned: By it, before each item; none: nothing.

        Returns:
            NaN where there is no token.
        """
        found = np.full(self.real.shape, np.nan)
        for at, past in enumerate(self.table.pasts):
            learnt = adapter and at >= self.table.adapted
            said = self.said[at].copy()
            if not learnt:
                said[:, EXPERTS.index("adapter")] = np.nan
            real = self.real[at]
            if real.any():
                weights = fusion.weights(past.count, adapter=learnt, earned=earned[at] if earned else 0.0)
                found[at, real] = np.log(mixed(said[real], self.matched[at][real], weights))
        return found


def cached(
    bench: Bench, people: Sequence[Person], pasts: Mapping[str, Sequence[Past]]
) -> dict[str, tuple[Array, Array]]:
    """Let every cache foresee every item, prequentially; a stage.

    Args:
        bench: The fold's model.
        people: Whose items, all of them.
        pasts: By user, one past an item.

    Returns:
        By user, probabilities and matched tokens, each ``[n, t, cache experts]``.
    """

    def compute() -> dict[str, NDArray[np.float64]]:
        found: dict[str, NDArray[np.float64]] = {}
        for p in people:
            said, matched = _foreseen(bench, p, pasts[p.user_id])
            found |= {part_key(p.user_id): said, part_key(p.user_id, MATCHED): matched}
        return found

    kept = stage(bench, "caches", compute)
    return {p.user_id: (kept[part_key(p.user_id)], kept[part_key(p.user_id, MATCHED)]) for p in people}


def _foreseen(bench: Bench, person: Person, pasts: Sequence[Past]) -> tuple[Array, Array]:
    """Return ``[n, t, cache experts]`` probabilities and matched tokens; NaN and 0 where there is no output."""
    asked = [at for at, item in enumerate(person.items) if not item.bare]
    shape = (len(person.items), bench.model.longest_output(person.items[0].task), len(CACHE_EXPERTS))
    said, matched = np.full(shape, np.nan), np.zeros(shape)
    if asked:
        parts = bench.model.cached([example(person.items[at]) for at in asked], [pasts[at].caches for at in asked])
        said[asked] = padded([part for part, _ in parts], shape[1])
        matched[asked] = np.nan_to_num(padded([part.astype(np.float64) for _, part in parts], shape[1]))
    return said, matched


def foreseen(table: Table, found: Mapping[str, tuple[Array, Array]]) -> Foreseen:
    """Put a user's experts side by side."""
    probabilities, counts = found[table.person.user_id]
    models = np.exp(np.stack([table.base, table.follow], axis=-1))
    matched = counts.astype(np.int64)
    none = np.zeros((*models.shape[:-1], 2), dtype=np.int64)
    return Foreseen(table, np.concatenate([models, probabilities], axis=-1), np.concatenate([none, matched], axis=-1))


def fit_text_fusion(tables: Sequence[Foreseen]) -> TextFusion:
    """Fit both sets of coefficients on calibrate users' items and on targets' items before their cut.

    Args:
        tables: Of all of them.

    Returns:
        The fit.

    Raises:
        ConfigError: No user has items after an adapter's first training.
    """
    closed = _closed(tables)
    if not _pairs(tables, closed, adapter=True):
        raise ConfigError("calibration: expected some user with more items than an adapter's first training takes")
    return text_fusion(tables, closed)


def text_fusion(tables: Sequence[Foreseen], closed: frozenset[int] | None = None) -> TextFusion:
    """Fit as ``fit_text_fusion`` does; what has no items to be fitted on, stays as it is built in.

    Args:
        tables: Of all of them.
        closed: Groups of which no item is used; ``None``: those of the tables' held-back items.

    Returns:
        The fit. No item is used that says the same as some user's held-back one.
    """
    closed = _closed(tables) if closed is None else closed
    alone = _fit(tables, DEFAULT.alone, closed, adapter=False)
    return TextFusion(alone, _fit(tables, DEFAULT.beside, closed, adapter=True))


def fit_each(targets: Sequence[Foreseen], others: Sequence[Foreseen]) -> list[TextFusion]:
    """Fit for each target user without that user's items; users of one part share their fit.

    Args:
        targets: Whose texts the fits are for.
        others: Calibrate users.

    Returns:
        One fit a target, in order.
    """
    every = [*targets, *others]
    closed = _closed(every)
    return without_each(
        [own.table.person for own in targets],
        lambda users: text_fusion([own for own in every if own.table.person.user_id not in users], closed),
    )


def text_arms(tables: Sequence[Foreseen], fusions: Sequence[TextFusion]) -> Arms:
    """Judge every held-back text in every arm, by its tokens' log probabilities.

    Args:
        tables: Of the target users.
        fusions: Fitted beforehand, one a user.

    Returns:
        All arms; ``stream`` has evidence, fused and unweighed (what adapters have earned left out) on all items.
    """
    held: dict[str, list[Array]] = {}
    stream: dict[str, list[Array]] = {"evidence": [], "fused": [], "unweighed": []}
    trust = []
    for own, fusion in zip(tables, fusions, strict=True):
        table, cut, earned = own.table, own.table.person.cut, own.earned()
        streamed = {
            "evidence": own.log_p(fusion, adapter=False),
            "fused": own.log_p(fusion, adapter=True, earned=earned),
            "unweighed": own.log_p(fusion, adapter=True),
        }
        for name, scores in streamed.items():
            stream[name].append(scores)
        arms = {"none": table.base[cut:], "follow": table.follow[cut:], **table.held}
        for name, scores in (arms | {name: scores[cut:] for name, scores in streamed.items()}).items():
            held.setdefault(name, []).append(scores)
        trust.append(fusion.adapter_share(table.pasts[-1].count, earned[-1]))
    return Arms(held, stream, trust)


def text_run(bench: Bench, tables: Mapping[str, Table], adapters: Mapping[str, Adapters]) -> Arms:
    """Fit, judge and write: all arms of one fold's text task on its plain base.

    Args:
        bench: The fold's model.
        tables: Of target and calibrate users, by user.
        adapters: Target users' weights: ``oppu`` trained once, ``fused`` as they followed the stream up to the cut.

    Returns:
        The arms of the target users.
    """
    people = (*bench.fold.target, *bench.fold.calibrate)
    own = [tables[p.user_id] for p in people]
    said = cached(bench, people, {t.person.user_id: t.pasts for t in own})
    experts = [foreseen(table, said) for table in own]
    fusion = text_fusion(experts)
    fusion.save(bench.folder / FILE)
    targets, calibrate = own[: len(bench.fold.target)], own[len(bench.fold.target) :]
    limits = lengths(calibrate or targets)
    people_of = ((one.table.person, one.earned()) for one in experts[: len(targets)])
    at_cut = {person.user_id: earned[person.cut] for person, earned in people_of}
    writers = [
        Writer("none"),
        Writer("oppu", adapters["oppu"]),
        Writer("evidence", fusion=fusion),
        Writer("fused", adapters["fused"], fusion=fusion, earned=at_cut),
    ]
    texts = {w.name: write(bench, targets, w, limits.most) for w in writers}
    arms = text_arms(experts[: len(targets)], fit_each(experts[: len(targets)], experts[len(targets) :]))
    return replace(arms, texts=texts | plain(targets, limits.lead, bench.recipe.written))


def _fit(tables: Sequence[Foreseen], begin: Coefficients, closed: frozenset[int], *, adapter: bool) -> Coefficients:
    """Minimise the mean loss a token plus the distance from ``begin``; without items that is ``begin``."""
    pairs = _pairs(tables, closed, adapter=adapter)
    if not pairs:
        return begin
    names = list(begin)
    columns = [EXPERTS.index(name) for name in names]
    said, matched, lengths, worth = _tokens(pairs, columns)
    start = torch.tensor([begin[name] for name in names], dtype=torch.float64)
    found = start.clone().requires_grad_(True)
    scale = 1 / (2 * PRIOR_DEVIATION**2 * _OUTPUTS)

    def loss() -> torch.Tensor:
        levels = found[:, 0] + found[:, 1] * lengths[:, None] + found[:, 2] * matched
        weights = torch.where(said.isnan(), -_FAR, levels).log_softmax(-1)
        mixed_p = (weights + said.nan_to_num(1.0).clamp(min=1e-12).log()).logsumexp(-1)
        return -(worth * mixed_p).sum() + scale * ((found - start) ** 2).sum()

    values = minimised(found, loss)
    return {name: (float(a), float(b), float(c)) for name, (a, b, c) in zip(names, values, strict=True)}


def _closed(tables: Sequence[Foreseen]) -> frozenset[int]:
    return held_back([own.table for own in tables])


def _pairs(tables: Sequence[Foreseen], closed: frozenset[int], *, adapter: bool) -> list[tuple[Foreseen, int]]:
    """Return the training items that have an output and lie in no closed group, those after an adapter's first training
    or all."""
    return [
        (own, at)
        for own in tables
        for at in range(own.table.adapted if adapter else 0, own.table.person.cut)
        if not own.table.person.items[at].bare and own.table.person.groups[at] not in closed
    ]


def _tokens(
    pairs: Sequence[tuple[Foreseen, int]], columns: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return every token's probabilities and matches ``[m, e]``, its user's length and its worth ``[m]``."""
    said, matched, lengths, worth = [], [], [], []
    for own, at in pairs:
        real = own.real[at]
        said.append(own.said[at][real][:, columns])
        matched.append(np.maximum(own.matched[at][real][:, columns] - 1, 0))
        lengths.append(np.full(real.sum(), length(own.table.pasts[at].count)))
        worth.append(np.full(real.sum(), 1 / real.sum()))
    weights = torch.from_numpy(np.concatenate(worth))
    return (
        torch.from_numpy(np.concatenate(said)),
        torch.from_numpy(np.concatenate(matched)).double(),
        torch.from_numpy(np.concatenate(lengths)),
        weights / weights.sum(),
    )
