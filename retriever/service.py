"""The retriever: queries of many users in, evidence and profiles out.

Reads at least as far as the ``UserState`` a query carries (read your writes), says so where the store does not,
and never mixes users, tasks or epochs. What is loaded and evicted is ``view``'s business, the searches are
``dense``'s and ``lexical``'s. One lock serialises calls; sizes may be read by another thread without it.
"""

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from oppu.embedder import Embedder
from oppu.errors import FatalError
from oppu.metrics import Metrics
from oppu.settings import RetrieverSettings
from oppu.store.port import HistoryStore
from oppu.values import UserId, UserState, Vector
from retriever.dense import Found, Probe
from retriever.port import Degradation, Hit, Profile, Query, Retrieved
from retriever.profile import ALGORITHM, Summary
from retriever.ranking import by_score, fused, without_repeats
from retriever.vectors import QueryVectors
from retriever.view import TaskItems, View, Views

logger = logging.getLogger(__name__)

_USERS_AT_ONCE = 64  # views that are loaded together: bounds how far residency is passed within a call
_DEPTH = 50  # items of each ranking that are fused, and at least 4 k
_EMPTY = Summary({}, "")
_NOTHING = Found(np.empty(0, np.int64), np.empty(0, np.float32))

ProfileRequest = tuple[UserState, str, int | None]
"""User, task and ``before_seq``."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A query beside the window of items that it may see: positions ``low`` to ``high``."""

    query: Query
    items: TaskItems
    first_seq: int
    before_seq: int
    low: int
    high: int
    excluded: frozenset[int]


class Retriever:
    """Evidence from users' histories.

    Args:
        store: The history store.
        embedder: What embeds the query texts; by its fingerprint the stored vectors that these are compared with.
        settings: Mode, bounds, half-life.
        metrics: Index sizes and events are shown here.
        executor: Embeds queries, one call at a time, so that it can be done ahead (``expect``); closed with the
            retriever. ``None``: they are embedded when they are asked.
    """

    def __init__(
        self,
        store: HistoryStore,
        embedder: Embedder,
        settings: RetrieverSettings,
        metrics: Metrics,
        executor: Executor | None = None,
    ) -> None:
        self._vectors = QueryVectors(embedder, executor)
        self._settings = settings
        self._views = Views(store, embedder.fingerprint, embedder.dim, settings, metrics)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def resident_bytes(self) -> int:
        """Memory of all loaded views; at most ``settings.resident_bytes`` between calls."""
        return self._views.nbytes

    @property
    def resident_users(self) -> int:
        """How many users' views are loaded."""
        return len(self._views)

    def expect(self, queries: Sequence[Query]) -> None:
        """Begin to embed what will be asked, where there is an executor, and forget all else. Returns at once.

        Args:
            queries: Most urgent first.
        """
        self._vectors.expect([query.text for query in queries if self._compares(query)])

    def retrieve(self, queries: Sequence[Query], vectors: Sequence[Vector | None] | None = None) -> list[Retrieved]:
        """Search each query's own user's items of its task.

        Args:
            queries: Of any users, a user any number of times.
            vectors: Each query text's ``[dim] float32`` unit vector where the caller has it already.

        Returns:
            One result a query, in order. A user without events gets an empty one that is not degraded.

        Raises:
            TransientError: The store cannot be read.
            FatalError: A hit belongs to another user; or the retriever is closed.
        """
        with self._lock:
            self._check_open()
            embedded = self._embedded(queries, vectors)
            results: dict[int, Retrieved] = {}
            for part in _parts([query.user.user_id for query in queries]):
                views = self._views.prepare(queries[i].user for i in part)
                asked = [queries[i] for i in part]
                answers = self._answers(asked, [embedded.get(i) for i in part], views)
                results.update(zip(part, answers, strict=True))
                self._views.charge(views.values())
                self._views.settle()
            return [results[i] for i in range(len(queries))]

    def profiles(self, requests: Sequence[ProfileRequest]) -> list[Profile]:
        """Summarise each user's items of a task.

        Args:
            requests: User, task, and the seq from which on events are hidden (``None``: nothing is).

        Returns:
            One profile a request, in order; an empty one where there are no items.

        Raises:
            TransientError: The store cannot be read.
            FatalError: The retriever is closed.
        """
        with self._lock:
            self._check_open()
            results: dict[int, Profile] = {}
            for part in _parts([state.user_id for state, _, _ in requests]):
                views = self._views.prepare(requests[i][0] for i in part)
                results.update((i, self._profile(requests[i], views)) for i in part)
                self._views.charge(views.values())
                self._views.settle()
            return [results[i] for i in range(len(requests))]

    def close(self) -> None:
        """Release everything; repeating it does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._vectors.close()
                self._views.clear()
                logger.debug("retriever closed")

    def _check_open(self) -> None:
        if self._closed:
            raise FatalError("the retriever is closed")

    # --- dense part
    def _embedded(self, queries: Sequence[Query], vectors: Sequence[Vector | None] | None) -> dict[int, Vector]:
        """Return the vectors of those queries that will be compared, embedding the missing ones in one call."""
        if vectors is not None and len(vectors) != len(queries):
            raise ValueError(f"{len(vectors)} vectors for {len(queries)} queries")
        found: dict[int, Vector] = {}
        missing: list[int] = []
        for i, query in enumerate(queries):
            if self._compares(query):
                given = vectors[i] if vectors is not None else None
                if given is None:
                    missing.append(i)
                else:
                    found[i] = given
        if missing:
            found.update(zip(missing, self._vectors.of([queries[i].text for i in missing]), strict=True))
        return found

    def _compares(self, query: Query) -> bool:
        """Say whether a query's text is compared with anything by likeness."""
        return query.user.last_seq > 0 and self._wanted(query) > 0

    def _wanted(self, query: Query) -> int:
        """Return how many items a query wants of the dense ranking, repeats aside."""
        for_hits = {"dense": query.k, "hybrid": self._depth(query)}.get(self._settings.mode, 0)
        return max(query.neighbours, for_hits if query.k > 0 else 0)

    @staticmethod
    def _depth(query: Query) -> int:
        return max(_DEPTH, 4 * query.k)

    def _answers(
        self, queries: Sequence[Query], vectors: Sequence[Vector | None], views: dict[UserId, View]
    ) -> list[Retrieved]:
        plans = [_plan(query, views.get(query.user.user_id)) for query in queries]
        probes: dict[int, Probe] = {}
        for i, (plan, vector) in enumerate(zip(plans, vectors, strict=True)):
            if plan is not None and vector is not None:
                probes[i] = self._probe(plan, vector)
        searched = dict(zip(probes, self._views.dense.search(list(probes.values())), strict=True))
        return [
            self._answer(query, views.get(query.user.user_id), plan, searched.get(i))
            for i, (query, plan) in enumerate(zip(queries, plans, strict=True))
        ]

    def _probe(self, plan: _Plan, vector: Vector) -> Probe:
        hidden = frozenset(plan.items.seqs[position] for position in plan.excluded)
        want = self._wanted(plan.query) + plan.items.repeats
        return Probe(plan.items.key, vector, want, plan.first_seq, plan.before_seq, hidden)

    # --- one answer
    def _answer(self, query: Query, view: View | None, plan: _Plan | None, found: Found | None) -> Retrieved:
        through = 0 if view is None or view.epoch != query.user.epoch else view.before(query.before_seq) - 1
        degraded = _degraded(query, view, plan, searched=found is not None)
        if plan is None:
            return Retrieved((), (), max(0, through), degraded)
        similar = _positions(plan, found or _NOTHING)
        hits = self._hits(plan, list(similar))
        return Retrieved(
            hits=tuple(_hit(plan, p, similar.get(p, math.nan)) for p in hits),
            neighbours=tuple(_hit(plan, p, s) for p, s in list(similar.items())[: max(0, query.neighbours)]),
            through_seq=max(0, through),
            degraded=degraded,
        )

    def _hits(self, plan: _Plan, dense: list[int]) -> list[int]:
        query, key, mode = plan.query, plan.items.text_keys.__getitem__, self._settings.mode
        if query.k <= 0:
            return []
        if mode == "dense":
            return without_repeats(dense, key, query.k)
        if mode == "recency":
            return without_repeats(_recent(plan), key, query.k)
        if mode == "bm25":
            return without_repeats(_lexical(plan, positive_only=False), key, query.k)
        rankings = [dense, _lexical(plan, positive_only=True), _recent(plan)]
        depth = self._depth(query)
        short = [without_repeats(ranking, key, depth) for ranking in rankings]
        return without_repeats(fused(short), key, query.k)

    def _profile(self, request: ProfileRequest, views: dict[UserId, View]) -> Profile:
        state, task, before_seq = request
        view = views.get(state.user_id)
        summary, through = _EMPTY, 0
        if view is not None and view.epoch == state.epoch:
            before = view.before(before_seq)
            through = max(0, before - 1)
            items = view.items(task)
            if items is not None:
                low, high = items.window(view.first_seq, before)
                summary = items.summary(low, high, half_life_events=self._settings.half_life_events)
        return Profile(
            user_id=state.user_id,
            version=f"{ALGORITHM}@{through}",
            through_seq=through,
            prior=dict(summary.prior),
            line=summary.line,
        )


def _parts(users: Sequence[UserId]) -> Iterator[list[int]]:
    """Yield the indexes of ``users``, all of one user's together, for so many users at a time."""
    by_user: dict[UserId, list[int]] = {}
    for i, user in enumerate(users):
        by_user.setdefault(user, []).append(i)
    groups = list(by_user.values())
    for start in range(0, len(groups), _USERS_AT_ONCE):
        yield [i for group in groups[start : start + _USERS_AT_ONCE] for i in group]


def _plan(query: Query, view: View | None) -> _Plan | None:
    """Return what the query may see; ``None`` where that is nothing."""
    if view is None or view.epoch != query.user.epoch:
        return None
    items = view.items(query.task)
    if items is None:
        return None
    before = view.before(query.before_seq)
    low, high = items.window(view.first_seq, before)
    if low == high:
        return None
    excluded: frozenset[int] = frozenset()
    if query.exclude_input is not None:
        excluded = frozenset(p for p in range(low, high) if items.events[p].input == query.exclude_input)
    return _Plan(query, items, view.first_seq, before, low, high, excluded)


def _degraded(query: Query, view: View | None, plan: _Plan | None, *, searched: bool) -> Degradation | None:
    """Return the gravest lack."""
    if query.user.last_seq > 0 and (view is None or view.epoch != query.user.epoch):
        return Degradation.EPOCH_BEHIND
    if view is not None and view.cursor < query.user.last_seq:
        return Degradation.HISTORY_BEHIND
    if searched and plan is not None and plan.items.lacks_vectors(plan.first_seq, plan.before_seq):
        return Degradation.EMBEDDER_MISMATCH
    return None


def _positions(plan: _Plan, found: Found) -> dict[int, float]:
    """Return similarity by position, best first."""
    seqs, similarities = found.seqs.tolist(), found.similarities.tolist()
    return {plan.items.position(seq): similarity for seq, similarity in zip(seqs, similarities, strict=True)}


def _recent(plan: _Plan) -> Iterator[int]:
    return (p for p in range(plan.high - 1, plan.low - 1, -1) if p not in plan.excluded)


def _lexical(plan: _Plan, *, positive_only: bool) -> list[int]:
    scores = plan.items.lexical().scores(plan.query.text, plan.low, plan.high)
    ranking = by_score(scores, plan.low, positive_only=positive_only)
    return [p for p in ranking if p not in plan.excluded]


def _hit(plan: _Plan, position: int, similarity: float) -> Hit:
    """Return the item as a hit, once more sure of whose it is."""
    event = plan.items.events[position]
    if event.user_id != plan.query.user.user_id or event.task != plan.query.task:
        raise FatalError("an item of another user or task was found: nothing may be answered")
    return Hit(event, similarity)
