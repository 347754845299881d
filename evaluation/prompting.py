"""What of a user's past stands in a prompt: the paper's variants, and as much recent history as fits. Pure."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.corpus import Item
from evaluation.history import Past
from oppu.lm.port import Example
from oppu.lm.prompts import Prompts
from oppu.lm.scoring import LABEL_TOKENS
from oppu.tasks import Task

Variant = Literal["plain", "retrieval", "profile"]
_NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Asked:
    """What stands before the query: ``k`` retrieved items, the profile's line."""

    k: int = 0
    profile: bool = False


PLAIN = Asked()
VARIANTS: Mapping[Variant, tuple[Asked, ...]] = {
    "plain": (PLAIN,),
    "retrieval": (Asked(1), Asked(2), Asked(4)),
    "profile": (Asked(0, profile=True), Asked(1, profile=True)),
}
"""What the base of a variant is adapted with: one of these is drawn for each example (OPPU, section 3.2)."""


def example(item: Item, past: Past | None = None, asked: Asked = PLAIN) -> Example:
    """Phrase an item, with what is asked of its past in the prompt."""
    return Example(
        item.task,
        item.input,
        item.output,
        item.choices,
        evidence=past.pairs[: asked.k] if past is not None else (),
        profile=past.line if past is not None and asked.profile else "",
    )


def examples(items: Sequence[Item], pasts: Sequence[Past], asked: Asked = PLAIN) -> list[Example]:
    """Phrase items with their pasts, one past an item."""
    return [example(item, past, asked) for item, past in zip(items, pasts, strict=True)]


def drawn(items: Sequence[Item], pasts: Sequence[Past], variant: Variant, seed: int) -> list[Example]:
    """Phrase items as a variant's base is adapted on them: each with one of ``VARIANTS``, drawn by seed and item."""
    kinds = VARIANTS[variant]
    return [
        example(
            item,
            past,
            kinds[int.from_bytes(hashlib.sha256(f"{seed}:{item.item_id}".encode()).digest()[:4]) % len(kinds)],
        )
        for item, past in zip(items, pasts, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Recent:
    """Held-back items with as many of the most recent earlier items as fit.

    Attributes:
        examples: One an item, newest history first; nothing of it is cut by the prompt's limit.
        offered: How many earlier items there were, over all examples.
        kept: How many of them stand in the prompts.
    """

    examples: tuple[Example, ...]
    offered: int
    kept: int


def recent_history(
    items: Sequence[Item], pasts: Sequence[Past], first: int, prompts: Prompts, task: Task, limit: int
) -> Recent:
    """Put as much recent history before the items from ``first`` on as fits the prompt.

    Args:
        items: All of one user's, oldest first.
        pasts: One an item.
        first: The first item that is asked about.
        prompts: The base's prompt format.
        task: Of the items.
        limit: Most tokens of a prompt.

    Returns:
        The prompts' examples and what was left out.
    """
    bare = [example(item) for item in items]
    blank = Example(task.name, "", "")
    paired = [Example(task.name, "", "", evidence=((item.input, item.output),)) for item in items]
    every = [blank, *paired, *bare[first:]]
    sizes = list(map(len, prompts.build(every, [task] * len(every), [_NO_LIMIT] * len(every))))
    empty, pairs, queries = sizes[0], sizes[1 : 1 + len(items)], sizes[1 + len(items) :]
    found, offered, kept = [], 0, 0
    for at, query in zip(range(first, len(items)), queries, strict=True):
        left, chosen = limit - query, []
        for other in reversed(range(pasts[at].count)):
            left -= pairs[other] - empty
            if left < 0:
                break
            chosen.append((items[other].input, items[other].output))
        offered, kept = offered + pasts[at].count, kept + len(chosen)
        found.append(Example(task.name, items[at].input, items[at].output, items[at].choices, evidence=tuple(chosen)))
    return Recent(tuple(found), offered, kept)


def answer_tokens(items: Sequence[Item], prompts: Prompts, task: Task) -> int:
    """Return the most tokens that an answer to any of the items can have."""
    labels = prompts.continuations({choice for item in items for choice in item.choices})
    return min(LABEL_TOKENS, max(map(len, labels.values()))) if labels else task.max_new_tokens
