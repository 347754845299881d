"""What the arms write for a text task: greedy decoding, and the answers that need no model (protocol section 2).

Decoding is slow, so only the first ``Recipe.written`` held-back items of a user are written, cut at a length that
nearly all outputs of calibrate users keep to.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluation.arms import Table
from evaluation.corpus import Item
from evaluation.history import Past
from evaluation.prompting import PLAIN, Asked
from evaluation.rouge import words
from evaluation.training import Bench, stage
from inference.blending import TextFusion
from oppu.lm.port import AdapterRef, Row, Tensors
from oppu.values import UserId

_NEARLY_ALL = 0.95


@dataclass(frozen=True, slots=True)
class Lengths:
    """Chosen on calibrate users: ``lead`` words of a lead (their outputs' median), ``most`` tokens of a text."""

    lead: int
    most: int


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes in an arm: an adapter a user (``None``: the base), what is in the prompt, whether caches and base mix
    in, and what each user's adapter has earned then."""

    name: str
    adapters: Mapping[str, Tensors | None] | None = field(default=None, repr=False)
    asked: Asked = PLAIN
    fusion: TextFusion | None = field(default=None, repr=False)
    earned: Mapping[str, float] = field(default_factory=dict, repr=False)


def lengths(tables: Sequence[Table]) -> Lengths:
    """Measure outputs.

    Args:
        tables: Of users whose outputs may be looked at.

    Returns:
        The lengths, each at least 1. Of histories without outputs the texts themselves give the lead, and the task
        the most tokens.
    """
    learnt = [i for t in tables for i in t.person.train]
    outputs = [i.output for i in learnt if not i.bare] or [i.input for i in learnt]
    tokens = np.concatenate([(~np.isnan(t.base[: t.person.cut])).sum(axis=1) for t in tables])
    most = np.quantile(tokens[tokens > 0], _NEARLY_ALL) if tokens.any() else tables[0].base.shape[1]
    return Lengths(max(1, round(float(np.median([len(words(o)) for o in outputs])))), max(1, int(most)))


def plain(tables: Sequence[Table], lead: int, most: int) -> dict[str, list[list[str]]]:
    """Answer without a model: the input's first words, the nearest item's output, the commonest words of outputs.

    Args:
        tables: Of target users.
        lead: Words of an answer.
        most: Items of a user.

    Returns:
        Texts by arm and user.
    """
    found: dict[str, list[list[str]]] = {"lead": [], "nearest": [], "frequent": []}
    for table in tables:
        asked = _asked(table, most)
        found["lead"].append([" ".join(item.input.split()[:lead]) for item, _ in asked])
        found["nearest"].append([next((text for text, _ in past.caches.get("knn", ())), "") for _, past in asked])
        found["frequent"].append([_commonest(past, lead) for _, past in asked])
    return found


def write(bench: Bench, tables: Sequence[Table], writer: Writer, most: int) -> list[list[str]]:
    """Write each user's first held-back items in one arm; a stage.

    Args:
        bench: The fold's model.
        tables: Of target users.
        writer: Who writes.
        most: Tokens of a text.

    Returns:
        Texts by user.
    """

    def compute() -> dict[str, NDArray[np.str_]]:
        found = {}
        for table in tables:
            user = table.person.user_id
            tensors = writer.adapters.get(user) if writer.adapters is not None else None
            ref = AdapterRef(UserId(f"{writer.name}|{user}"), 0, 0) if tensors else None
            if ref is not None and tensors:
                bench.model.install(ref, tensors)
            rows = [_row(item, past, writer, ref, most) for item, past in _asked(table, bench.recipe.written)]
            found[user] = np.array([scored.text or "" for scored in bench.model.answer(rows)], dtype=np.str_)
        return found

    kept = stage(bench, f"written-{writer.name}", compute)
    return [[str(text) for text in kept[t.person.user_id]] for t in tables]


def _asked(table: Table, most: int) -> list[tuple[Item, Past]]:
    cut = table.person.cut
    return list(zip(table.person.items[cut : cut + most], table.pasts[cut : cut + most], strict=True))


def _row(item: Item, past: Past, writer: Writer, ref: AdapterRef | None, most: int) -> Row:
    asked, fusion, learnt = writer.asked, writer.fusion, ref is not None
    earned = writer.earned.get(item.user_id, 0.0)
    return Row(
        task=item.task,
        input=item.input,
        evidence=past.pairs[: asked.k],
        profile=past.line if asked.profile else "",
        adapter=ref,
        max_new_tokens=most,
        blend=fusion.blend(past.caches, past.count, adapter=learnt, earned=earned) if fusion is not None else None,
    )


def _commonest(past: Past, count: int) -> str:
    counts: Counter[str] = Counter()
    for text, weight in past.caches.get("prior", ()):
        for word in words(text):
            counts[word] += weight  # type: ignore[assignment]
    return " ".join(word for word, _ in counts.most_common(count))
