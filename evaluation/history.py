"""What each item's own past says about it, by the service's own retriever: neighbours, prior, items for the prompt.

Invariant: the past of an item is its user's items of strictly earlier days.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from evaluation.corpus import Item
from inference.blending import caches
from oppu.embedder import Embedder
from oppu.errors import ConfigError
from oppu.fusion import recency_prior
from oppu.lm.blend import Texts
from oppu.metrics import fresh
from oppu.settings import RetrieverSettings
from oppu.store.port import HistoryStore
from oppu.values import Event, EventId, UserId, UserState, Vector
from retriever.port import Query, knn_distribution
from retriever.service import Retriever

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Past:
    """One item's past.

    Attributes:
        count: How many items it has.
        knn: The neighbours' vote over the item's choices ``[c]``; ``None`` without one.
        prior: The recency-weighted prior ``[c]``; ``None`` without one.
        pairs: (input, output) of the best items, for the prompt.
        line: The profile's line.
        seen: Ids of all items that have a say, the profile's aside.
        caches: What a text may be written from, as the service takes it; empty for choices.
    """

    count: int
    knn: Array | None = field(repr=False)
    prior: Array | None = field(repr=False)
    pairs: tuple[tuple[str, str], ...] = field(repr=False)
    line: str = field(repr=False)
    seen: frozenset[str] = field(default=frozenset(), repr=False)
    caches: Mapping[str, Texts] = field(default_factory=dict, repr=False)


class _Shelf:
    """The little of a history store that a retriever reads."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = list(events)

    def events(self, cursors: Mapping[UserId, int], *, embedder: str, limit: int) -> dict[UserId, list[Event]]:
        return {user: [e for e in self._events if e.seq > after][-limit:] for user, after in cursors.items()}


def pasts(
    items: Sequence[Item],
    vectors: Mapping[str, Vector],
    embedder: Embedder,
    settings: RetrieverSettings,
    *,
    before: Sequence[int] | None = None,
    queries: Mapping[str, Vector] | None = None,
) -> list[Past]:
    """Look up every item's past.

    Args:
        items: Of one user and task, oldest first.
        vectors: ``[dim] float32`` unit embedding of each input, by item id.
        embedder: Names the vectors.
        settings: Mode, k, neighbours, half-life.
        before: For each item the first seq, from 1, that it may not see; absent: its day's first.
        queries: The inputs as a query encoder embeds them, by item id; absent: they are ``vectors``.

    Returns:
        One past an item.
    """
    if not items:
        return []
    user, before = UserId(items[0].user_id), _before(items) if before is None else before
    shelf = cast(HistoryStore, _Shelf([_event(item, at, vectors) for at, item in enumerate(items, start=1)]))
    retriever = Retriever(shelf, embedder, settings, fresh())
    state = UserState(user, 1, len(items), None)
    asked = [
        Query(state, item.task, item.input, settings.k, settings.neighbours, before_seq=seq, exclude_input=item.input)
        for item, seq in zip(items, before, strict=True)
    ]
    found = retriever.retrieve(asked, [(queries or vectors)[item.item_id] for item in items])
    profiles = retriever.profiles([(state, item.task, seq) for item, seq in zip(items, before, strict=True)])
    retriever.close()
    return [
        Past(
            count=seq - 1,
            knn=knn_distribution(result.neighbours, item.choices),
            prior=recency_prior(profile.prior, item.choices) if item.choices else None,
            pairs=tuple((hit.event.input, hit.event.output) for hit in result.hits),
            line=profile.line,
            seen=frozenset(hit.event.event_id for hit in (*result.hits, *result.neighbours)),
            caches={} if item.choices else caches(item.input, result.neighbours, profile.prior),
        )
        for item, seq, result, profile in zip(items, before, found, profiles, strict=True)
    ]


def embedded(items: Sequence[Item], embedder: Embedder, *, keep: Path | None = None) -> dict[str, Vector]:
    """Embed the items' inputs.

    Args:
        items: Any.
        embedder: The embedder, or, not to be kept, a query encoder, which goes by its name.
        keep: A folder where an earlier run's vectors may lie, and these are kept.

    Returns:
        ``[dim] float32`` by item id.
    """
    content = hashlib.sha256(embedder.fingerprint.encode())
    for item in items:
        content.update(f"\0{item.item_id}\0{item.input}".encode())
    path = None if keep is None else keep / f"vectors-{content.hexdigest()[:12]}.npy"
    rows = np.load(path) if path is not None and path.exists() else embedder.embed([item.input for item in items])
    if path is not None and not path.exists():
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, rows)
        part.replace(path)
    return {item.item_id: row for item, row in zip(items, rows, strict=True)}


def check_pasts(items: Sequence[Item], found: Sequence[Past]) -> None:
    """Look for an item in some past that does not belong there.

    Args:
        items: Of one user, oldest first.
        found: Their pasts.

    Raises:
        ConfigError: An item has itself, another user's item or one that is not of an earlier day in its past.
    """
    by_id = {item.item_id: item for item in items}
    for item, past in zip(items, found, strict=True):
        if any(other not in by_id for other in past.seen):
            raise ConfigError(f"history: item {item.item_id} retrieves another user's item")
        if any(by_id[other].day >= item.day for other in past.seen):
            raise ConfigError(f"history: item {item.item_id} retrieves itself or an item that is not earlier")
        if past.count != sum(other.day < item.day for other in items):
            raise ConfigError(f"history: item {item.item_id} counts items that are not earlier")


def _before(items: Sequence[Item]) -> list[int]:
    """Return the first seq that each item may not see: its day's first."""
    first: dict[object, int] = {}
    return [first.setdefault(item.day, seq) for seq, item in enumerate(items, start=1)]


def _event(item: Item, seq: int, vectors: Mapping[str, Vector]) -> Event:
    at = datetime.combine(item.day, time(), UTC)
    return Event(
        user_id=UserId(item.user_id),
        seq=seq,
        event_id=EventId(item.item_id),
        task=item.task,
        occurred_at=at,
        recorded_at=at,
        input=item.input,
        output=item.output,
        choices=item.choices or None,
        embedding=vectors[item.item_id],
    )
