"""Small made-up people for the experiment's tests."""

import hashlib
from collections.abc import Sequence
from datetime import date, timedelta

import numpy as np
from numpy.typing import NDArray

from evaluation.corpus import Item
from oppu.embedder import HashEmbedder

LABELS = ("a", "b", "c")
START = date(2024, 1, 1)


def item(user: str, at: int, *, text: str = "", output: str = "", task: str = "pick", day: int | None = None) -> Item:
    return Item(
        item_id=f"{user}/{task}/{at}",
        user_id=user,
        task=task,
        day=START + timedelta(days=at if day is None else day),
        input=text or " ".join(f"{user}w{at}x{k}" for k in range(12)),
        output=output or LABELS[at % 3],
        choices=LABELS,
    )


def people(counts: dict[str, int], *, task: str = "pick") -> list[Item]:
    every = [item(user, at, task=task) for user, count in counts.items() for at in range(count)]
    return sorted(every, key=lambda i: i.day)


def vectors(items: Sequence[Item]) -> dict[str, NDArray[np.float32]]:
    """Random directions, equal for equal texts: only what a test makes similar is similar."""
    found = {}
    for i in items:
        seed = int.from_bytes(hashlib.sha256(i.input.encode()).digest()[:4], "big")
        row = np.random.default_rng(seed).normal(size=64).astype(np.float32)
        found[i.item_id] = row / np.linalg.norm(row)
    return found


def stacked(items: Sequence[Item]) -> NDArray[np.float32]:
    own = vectors(items)
    return np.stack([own[i.item_id] for i in items])


EMBEDDER = HashEmbedder()
