"""Each user's view of the history store: what is loaded, how far it reads, and when it goes.

A view belongs to one (user, epoch) and reads up to its cursor. It is loaded on first use, grows by the events
after its cursor when a caller's state is ahead of it, and is dropped with all its vectors when the epoch moves
(erasure) or when the least recently used must make room. Nothing here is precious: the store has it all.
Not thread-safe: the owner serialises calls.
"""

import logging
import sys
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from oppu.errors import FatalError
from oppu.metrics import Metrics
from oppu.settings import RetrieverSettings
from oppu.store.port import HistoryStore
from oppu.values import Event, UserId, UserState
from retriever.dense import DenseIndex, ListKey
from retriever.lexical import LexicalIndex
from retriever.profile import Columns, Summary
from retriever.terms import text_key

logger = logging.getLogger(__name__)

_EVENT_BYTES = 700  # an event's objects without its texts
_VIEW_BYTES = 2_000
_TRIM_SHARE = 8  # a view holds up to 1/8 more items than are shown, so that trimming is rare


@dataclass(slots=True)
class TaskItems:
    """One task's items of a view, in seq order; derived indexes are built when first asked for.

    ``text_bytes`` is what the items' texts take in memory: up to four bytes a character.
    """

    key: ListKey
    events: list[Event] = field(default_factory=list)
    seqs: list[int] = field(default_factory=list)
    unembedded: list[int] = field(default_factory=list)
    text_bytes: int = 0
    text_keys: list[int] = field(default_factory=list)
    _distinct: set[int] = field(default_factory=set)
    _lexical: LexicalIndex = field(default_factory=LexicalIndex)
    _columns: Columns = field(default_factory=Columns)
    _summary: tuple[int, int, Summary] | None = None

    @property
    def repeats(self) -> int:
        """How many items repeat another one's input (an upper bound where items are out of the window)."""
        return len(self.events) - len(self._distinct)

    @property
    def nbytes(self) -> int:
        """Estimated memory, vectors aside."""
        return self.text_bytes + _EVENT_BYTES * len(self.events) + self._lexical.nbytes + self._columns.nbytes

    def append(self, event: Event) -> None:
        """Add the next event, without its vector, which lies in the dense index alone, and without its choices, which
        nobody reads here and which can be a hundred times its size: where it had any, it has an empty tuple of them."""
        if event.embedding is None:
            self.unembedded.append(event.seq)
        self.events.append(replace(event, embedding=None, choices=None if event.choices is None else ()))
        self.seqs.append(event.seq)
        self.text_keys.append(hash(text_key(event.input)))
        self._distinct.add(self.text_keys[-1])
        self.text_bytes += sys.getsizeof(event.input) + sys.getsizeof(event.output)

    def window(self, first_seq: int, before_seq: int) -> tuple[int, int]:
        """Return the positions of the items with ``first_seq <= seq < before_seq``, as a half-open range."""
        low = bisect_left(self.seqs, first_seq)
        return low, max(low, bisect_left(self.seqs, before_seq))

    def position(self, seq: int) -> int:
        """Return where the item with this seq lies; ``FatalError`` where there is none."""
        position = bisect_left(self.seqs, seq)
        if position == len(self.seqs) or self.seqs[position] != seq:
            raise FatalError("the dense index holds a vector that the user's view does not know")
        return position

    def lacks_vectors(self, first_seq: int, before_seq: int) -> bool:
        """Say whether some item of the window has no comparable embedding."""
        return bisect_left(self.unembedded, first_seq) < bisect_left(self.unembedded, before_seq)

    def lexical(self) -> LexicalIndex:
        """Return BM25 over all items."""
        self._lexical.extend(event.input for event in self.events[len(self._lexical) :])
        return self._lexical

    def summary(self, low: int, high: int, *, half_life_events: float) -> Summary:
        """Return the statistics of a window; the last one is kept."""
        if self._summary is None or self._summary[:2] != (low, high):
            self._columns.extend(self.events[len(self._columns) :])
            summary = self._columns.summary(low, high, half_life_events=half_life_events)
            self._summary = (low, high, summary)
        return self._summary[2]


@dataclass(slots=True)
class View:
    """What is loaded of one user in one epoch, up to ``cursor``; items before ``first_seq`` are not shown."""

    user_id: UserId = field(repr=False)
    epoch: int
    cursor: int = 0
    first_seq: int = 1
    tasks: dict[str, TaskItems] = field(default_factory=dict)
    charged: int = 0

    def items(self, task: str) -> TaskItems | None:
        """Return the items of a task."""
        return self.tasks.get(task)

    def before(self, before_seq: int | None) -> int:
        """Return the first seq that may not be seen."""
        return self.cursor + 1 if before_seq is None else min(before_seq, self.cursor + 1)


class Views:
    """The loaded views, least recently used first, within ``resident_bytes``.

    Args:
        store: Where histories come from.
        embedder: Fingerprint of the embedder whose vectors can be compared.
        dim: Length of a vector.
        settings: Bounds.
        metrics: Counts loads and evictions, shows sizes.
    """

    def __init__(
        self, store: HistoryStore, embedder: str, dim: int, settings: RetrieverSettings, metrics: Metrics
    ) -> None:
        self.dense = DenseIndex(dim)
        self._store = store
        self._embedder = embedder
        self._dim = dim
        self._settings = settings
        self._metrics = metrics
        self._views: OrderedDict[tuple[UserId, int], View] = OrderedDict()
        self._epochs: dict[UserId, int] = {}
        self._charged = 0

    def __len__(self) -> int:
        return len(self._views)

    @property
    def nbytes(self) -> int:
        """Estimated memory of all views and their vectors."""
        return self._charged + self.dense.nbytes

    def prepare(self, states: Iterable[UserState]) -> dict[UserId, View]:
        """Return views that read at least as far as the given states, as far as the store does.

        Args:
            states: What the callers know; of several states of a user the newest counts.

        Returns:
            A view for each user with events; none for a user of whom a later epoch is already loaded.

        Raises:
            TransientError: The store cannot be read; what was loaded before stays as it was.
            FatalError: The store's answer breaks its contract.
        """
        wanted = _newest(states)
        behind = {}
        for user, state in wanted.items():
            view = self._view(state)
            if view is None:
                continue
            if view.cursor < state.last_seq:
                behind[user] = view
            else:
                self._metrics.index_events.labels("hit").inc()
        if behind:
            self._load(behind)
        return self._touched(wanted)

    def settle(self) -> None:
        """Account for what was loaded and built, and evict until the bound holds."""
        bound = self._settings.resident_bytes
        while self._views and self._charged + self.dense.live_bytes > bound:
            self._drop(next(iter(self._views)))
            self._metrics.index_events.labels("eviction").inc()
        if self.nbytes > bound:
            self.dense.release()
        self._metrics.index_bytes.set(self.nbytes)
        self._metrics.index_users.set(len(self._views))

    def charge(self, views: Iterable[View]) -> None:
        """Take note of what views have grown to."""
        for view in views:
            size = _VIEW_BYTES + sum(items.nbytes for items in view.tasks.values())
            self._charged += size - view.charged
            view.charged = size

    def clear(self) -> None:
        """Drop everything."""
        for key in list(self._views):
            self._drop(key)
        self.settle()

    def _view(self, state: UserState) -> View | None:
        """Return the loaded or a new, empty view; ``None`` for a stale state and for a user without events."""
        loaded = self._epochs.get(state.user_id)
        if loaded is not None and loaded > state.epoch:
            return None
        if loaded is not None and loaded < state.epoch:
            logger.info("a user's epoch moved from %d to %d: view dropped", loaded, state.epoch)
            self._drop((state.user_id, loaded))
            self._metrics.index_events.labels("epoch").inc()
        key = (state.user_id, state.epoch)
        return self._views.get(key) or (View(*key) if state.last_seq > 0 else None)

    def _load(self, behind: Mapping[UserId, View]) -> None:
        cursors = {user: view.cursor for user, view in behind.items()}
        fresh = self._store.events(cursors, embedder=self._embedder, limit=self._settings.max_items)
        for user, view in behind.items():
            events = fresh.get(user, [])
            _check_contract(view, events)
            self._metrics.index_events.labels("load" if view.cursor == 0 else "refresh").inc()
            self._views[(user, view.epoch)] = view
            self._epochs[user] = view.epoch
            if events:
                self._grow(view, events)
        self.charge(behind.values())

    def _grow(self, view: View, events: Sequence[Event]) -> None:
        by_task: dict[str, list[Event]] = {}
        for event in events:
            usable = self._usable(event)
            by_task.setdefault(event.task, []).append(usable)
        for task, added in by_task.items():
            key = ListKey(view.user_id, view.epoch, task)
            items = view.tasks.setdefault(task, TaskItems(key))
            self._add_vectors(key, added)
            for event in added:
                items.append(event)
        view.cursor = events[-1].seq
        view.first_seq = max(1, view.cursor - self._settings.max_items + 1)
        if sum(len(i.events) for i in view.tasks.values()) > self._most_items():
            self._trim(view)

    def _most_items(self) -> int:
        return self._settings.max_items + self._settings.max_items // _TRIM_SHARE

    def _usable(self, event: Event) -> Event:
        """Return the event, without an embedding that could not be compared (a damaged row must not spread)."""
        vector = event.embedding
        if vector is None or (vector.shape == (self._dim,) and bool(np.isfinite(vector).all())):
            return event
        return replace(event, embedding=None)

    def _add_vectors(self, key: ListKey, events: Sequence[Event]) -> None:
        vectors = [(event.seq, event.embedding) for event in events if event.embedding is not None]
        if vectors:
            seqs, rows = zip(*vectors, strict=True)
            self.dense.add(key, seqs, np.stack(rows).astype(np.float32, copy=False))

    def _trim(self, view: View) -> None:
        """Let go of the items that are no longer shown."""
        for task, items in list(view.tasks.items()):
            kept = TaskItems(items.key)
            low, high = items.window(view.first_seq, view.cursor + 1)
            unembedded = frozenset(items.unembedded)
            for event in items.events[low:high]:
                kept.append(event)
            kept.unembedded = [seq for seq in kept.seqs if seq in unembedded]
            self.dense.trim(items.key, view.first_seq)
            if kept.events:
                view.tasks[task] = kept
            else:
                self.dense.free(items.key)
                del view.tasks[task]

    def _touched(self, wanted: Mapping[UserId, UserState]) -> dict[UserId, View]:
        found = {}
        for user, state in wanted.items():
            view = self._views.get((user, state.epoch))
            if view is not None:
                self._views.move_to_end((user, state.epoch))
                found[user] = view
        return found

    def _drop(self, key: tuple[UserId, int]) -> None:
        view = self._views.pop(key)
        del self._epochs[view.user_id]
        self._charged -= view.charged
        for items in view.tasks.values():
            self.dense.free(items.key)


def _newest(states: Iterable[UserState]) -> dict[UserId, UserState]:
    newest: dict[UserId, UserState] = {}
    for state in states:
        known = newest.get(state.user_id)
        if known is None or (state.epoch, state.last_seq) > (known.epoch, known.last_seq):
            newest[state.user_id] = state
    return newest


def _check_contract(view: View, events: Sequence[Event]) -> None:
    last = view.cursor
    for event in events:
        if event.user_id != view.user_id or event.seq <= last:
            raise FatalError("the store returned another user's events, or events out of order")
        last = event.seq
