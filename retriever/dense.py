"""Exact inner-product search inside each user's own vectors; the only module that imports faiss.

One ``IndexIVFFlat`` with one inverted list for each (user, epoch, task), searched by ``search_preassigned``: no
vector of another user or task is ever compared, and queries of many users share one call. A list a task rather
than a list a user makes the task filter free; the seq filter is exact because a search is repeated over the whole
list where its best results do not settle the answer. Every hit's owner is checked against the query's.
Not thread-safe: the owner serialises calls (faiss forbids a write beside anything else).
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from oppu.errors import FatalError
from oppu.values import UserId, Vector

_SEQ_BITS = 28  # a list's events may have seqs below 2^28; the 35 bits above number the lists ever opened
_ROUND = 6  # decimals in which two similarities are equal: below float32's error over a few hundred products
_FIRST_FETCH = 16  # smallest fetch; larger ones grow by fours, so that a poll's queries share a call
_ID_BYTES = 8
_LIST_BYTES = 512  # bookkeeping of a list, here and in faiss
_SPARE = 0  # the number of a list that nobody gets: see ``release``
_MIN_SLACK_BYTES = 2**20

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ListKey:
    """Whose vectors an inverted list holds."""

    user_id: UserId = field(repr=False)
    epoch: int
    task: str


@dataclass(frozen=True, slots=True)
class Probe:
    """One search: the ``want`` best of ``key``'s items with ``first_seq <= seq < before_seq`` but not ``hidden``."""

    key: ListKey
    vector: Vector = field(repr=False)
    want: int
    first_seq: int
    before_seq: int
    hidden: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Found:
    """A probe's result, best first, of equal ones the newest: ``seqs`` ``[k] int64``, ``similarities`` ``[k]``."""

    seqs: Ints
    similarities: Floats


@dataclass(slots=True)
class _List:
    number: int
    token: int
    seqs: "array[int]" = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.seqs)


_NOTHING = Found(np.empty(0, np.int64), np.empty(0, np.float32))


class DenseIndex:
    """All loaded users' vectors.

    Args:
        dim: Length of a vector.
        lists: Inverted lists to begin with; doubled when they run out.
    """

    def __init__(self, dim: int, lists: int = 1024) -> None:
        self._dim = dim
        self._vector_bytes = 4 * dim + _ID_BYTES
        self._lists: dict[ListKey, _List] = {}
        self._owners: dict[int, ListKey] = {}
        self._next_token = 0
        self._index: Any  # faiss's own stubs miss its Python wrappers
        self._capacity: dict[int, int] = {}  # vectors that faiss has memory for, by list number
        self._live_bytes = 0
        self._slack_bytes = 0
        self._free_numbers: list[int] = []
        self._build(max(2, lists))

    @property
    def live_bytes(self) -> int:
        """Memory of the lists that have an owner."""
        return self._live_bytes

    @property
    def nbytes(self) -> int:
        """Memory of all lists, that included which faiss keeps for the next owner of a freed one."""
        return self._live_bytes + self._slack_bytes

    def size(self, key: ListKey) -> int:
        """Return how many vectors a list holds."""
        found = self._lists.get(key)
        return len(found) if found is not None else 0

    def list_bytes(self, key: ListKey) -> int:
        """Return a list's memory."""
        found = self._lists.get(key)
        return self._bytes(found) if found is not None else 0

    def add(self, key: ListKey, seqs: Sequence[int], vectors: Floats) -> None:
        """Append vectors to a list, opening it at its first.

        Args:
            key: The owner.
            seqs: Ascending, above all that the list has.
            vectors: ``[len(seqs), dim] float32``.

        Raises:
            FatalError: Shapes or seqs do not fit, or faiss refuses.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.shape != (len(seqs), self._dim):
            raise FatalError(f"vectors of shape {vectors.shape}, expected {(len(seqs), self._dim)}")
        if not len(seqs):
            return
        owned = self._lists[key] if key in self._lists else self._open(key)
        numbers = np.asarray(seqs, dtype=np.int64)
        last = owned.seqs[-1] if owned.seqs else 0
        if (np.diff(numbers, prepend=last) <= 0).any() or numbers[-1] >> _SEQ_BITS:
            raise FatalError(f"seqs must rise from {last + 1} and stay below 2^{_SEQ_BITS}")
        self._append(owned, numbers, vectors)

    def trim(self, key: ListKey, first_seq: int) -> None:
        """Forget a list's vectors before ``first_seq`` and the memory they took."""
        owned = self._lists.get(key)
        if owned is None or not owned.seqs or owned.seqs[0] >= first_seq:
            return
        keep = bisect_left(owned.seqs, first_seq)
        seqs, vectors = owned.seqs[keep:], self._vectors(owned)[keep:].copy()
        if not seqs:
            self.free(key)
            return
        self._live_bytes -= self._bytes(owned)
        self._clear(owned)
        self._live_bytes += self._bytes(owned)
        self._append(owned, np.asarray(seqs, dtype=np.int64), vectors)

    def free(self, key: ListKey) -> None:
        """Forget a list; its number goes to the next owner. Freeing an unknown list does nothing."""
        owned = self._lists.pop(key, None)
        if owned is None:
            return
        self._live_bytes -= self._bytes(owned)
        del self._owners[owned.token]
        self._clear(owned)
        self._free_numbers.append(owned.number)
        self._slack_bytes += self._capacity.get(owned.number, 0) * self._vector_bytes
        if self._slack_bytes > max(_MIN_SLACK_BYTES, self._live_bytes // 16):
            self.release()

    def release(self) -> None:
        """Give the memory of all freed lists back, without touching the others' vectors.

        An emptied faiss list keeps its memory, and Python cannot reach a single one. ``permute_invlists`` moves
        list ``order[i]`` to ``i``; one that no ``i`` names is destroyed, and who names one that has moved already
        gets an empty one. So each freed list is to become the spare one, again.
        """
        order = np.arange(self._index.nlist, dtype=np.int64)
        order[self._free_numbers] = _SPARE
        lists: Any = faiss.downcast_InvertedLists(self._index.invlists)
        with _mapped():
            lists.permute_invlists(faiss.swig_ptr(order))
        for number in self._free_numbers:
            self._capacity.pop(number, None)
        self._slack_bytes = 0

    def search(self, probes: Sequence[Probe]) -> list[Found]:
        """Search each probe's own list.

        Args:
            probes: Of any users.

        Returns:
            One result a probe, in order; an unknown list has none.

        Raises:
            FatalError: A hit's owner is not the probe's, or faiss refuses.
        """
        results = [_NOTHING] * len(probes)
        pending = {i: self._fetch(p) for i, p in enumerate(probes) if p.want > 0 and self.size(p.key)}
        while pending:
            again: dict[int, int] = {}
            for fetch in sorted(set(pending.values())):
                rows = [i for i, f in pending.items() if f == fetch]
                batch = [probes[i] for i in rows]
                for i, found in zip(rows, self._search(batch, fetch), strict=True):
                    if found is None:
                        again[i] = _rounded_up(self.size(probes[i].key))
                    else:
                        results[i] = found
            pending = again
        return results

    def _fetch(self, probe: Probe) -> int:
        """Return how many results to ask for at first: enough where nothing outside ``want`` ties with it."""
        seqs = self._lists[probe.key].seqs
        visible = bisect_left(seqs, probe.before_seq) - bisect_left(seqs, probe.first_seq)
        return _rounded_up(1 + probe.want + len(probe.hidden) + len(seqs) - visible)

    def _search(self, probes: Sequence[Probe], fetch: int) -> list[Found | None]:
        """Return each probe's result, ``None`` where unfetched items might belong among the best ``want``."""
        vectors = np.ascontiguousarray([p.vector for p in probes], dtype=np.float32)
        if vectors.shape != (len(probes), self._dim):
            raise FatalError(f"queries of shape {vectors.shape}, expected {(len(probes), self._dim)}")
        lists = [self._lists[p.key] for p in probes]
        numbers = np.array([[own.number] for own in lists], dtype=np.int64)
        with _mapped():
            similarities, ids = self._index.search_preassigned(
                vectors, fetch, numbers, np.zeros(numbers.shape, dtype=np.float32)
            )
        valid = ids >= 0  # else fewer are in the list than were asked for
        strangers = valid & (ids >> _SEQ_BITS != np.array([[own.token] for own in lists]))
        if strangers.any() or any(self._owners.get(own.token) != p.key for own, p in zip(lists, probes, strict=True)):
            raise FatalError("a vector of another owner was found in a user's list: nothing may be answered")
        seqs = np.where(valid, ids & ((1 << _SEQ_BITS) - 1), -1)
        return self._settled(probes, np.where(valid, similarities, -1.0), seqs)

    def _settled(self, probes: Sequence[Probe], similarities: Floats, seqs: Ints) -> list[Found | None]:
        """Filter and order rows of ``[n, fetch]``; a seq of -1 is none."""
        first, before, want, size = (
            np.array(column)[:, None]
            for column in zip(*((p.first_seq, p.before_seq, p.want, self.size(p.key)) for p in probes), strict=True)
        )
        valid = seqs >= 0
        keep = valid & (seqs >= first) & (seqs < before)
        for row, probe in enumerate(probes):
            if probe.hidden:
                keep[row] &= ~np.isin(seqs[row], list(probe.hidden))
        rounded = np.round(similarities, _ROUND)
        lowest = np.where(valid, rounded, np.inf).min(axis=1, keepdims=True)
        surely = (keep & (rounded > lowest)).sum(axis=1, keepdims=True)  # better than all that was not fetched
        open_ended = (seqs.shape[1] < size) & valid.any(axis=1, keepdims=True) & (surely < want)
        order = np.lexsort((-seqs, -rounded, ~keep), axis=1)
        best = np.take_along_axis(seqs, order, axis=1)
        likeness = np.clip(np.take_along_axis(similarities, order, axis=1), -1.0, 1.0)
        counts = np.minimum(keep.sum(axis=1), want[:, 0]).tolist()
        return [
            None if undecided else Found(own[:count], alike[:count])
            for own, alike, count, undecided in zip(best, likeness, counts, open_ended[:, 0], strict=True)
        ]

    def _open(self, key: ListKey) -> _List:
        if not self._free_numbers:
            self._build(2 * self._index.nlist)
        number = self._free_numbers.pop()
        self._slack_bytes -= self._capacity.get(number, 0) * self._vector_bytes
        owned = self._lists[key] = _List(number, self._next_token)
        self._owners[owned.token] = key
        self._next_token += 1
        self._live_bytes += self._bytes(owned)
        return owned

    def _append(self, owned: _List, seqs: Ints, vectors: Floats) -> None:
        self._live_bytes -= self._bytes(owned)
        self._write(owned, len(owned), seqs, vectors)
        owned.seqs.extend(seqs.tolist())
        self._live_bytes += self._bytes(owned)

    def _write(self, owned: _List, size: int, seqs: Ints, vectors: Floats) -> None:
        """Put vectors behind the ``size`` ones of a list; in one piece, since faiss grows by doubling."""
        ids = seqs | (owned.token << _SEQ_BITS)
        codes = np.ascontiguousarray(vectors).view(np.uint8)  # a flat index's code is the vector itself
        with _mapped():
            self._index.invlists.add_entries(owned.number, len(seqs), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
            self._index.ntotal += len(seqs)
        self._capacity[owned.number] = _grown(self._capacity.get(owned.number, 0), size, len(seqs))

    def _vectors(self, owned: _List) -> Floats:
        """Return a list's vectors, ``[n, dim] float32``, in seq order: faiss's own memory, until the next write."""
        codes = faiss.rev_swig_ptr(self._index.invlists.get_codes(owned.number), len(owned) * 4 * self._dim)
        vectors: Floats = codes.view(np.float32).reshape(len(owned), self._dim)
        return vectors

    def _clear(self, owned: _List) -> None:
        """Empty a list at once: ``remove_ids`` would pass over everybody's."""
        with _mapped():
            self._index.invlists.resize(owned.number, 0)
            self._index.ntotal -= len(owned)
        owned.seqs = array("q")

    def _bytes(self, owned: _List) -> int:
        held = self._capacity.get(owned.number, 0) * self._vector_bytes
        return _LIST_BYTES + held + len(owned) * owned.seqs.itemsize

    def _build(self, lists: int) -> None:
        """Make an index of ``lists`` lists and copy what is held: faiss cannot add lists to one."""
        held = [(owned, self._vectors(owned)) for owned in self._lists.values()]
        old = getattr(self, "_index", None)  # keeps the memory behind ``held`` until it is copied
        with _mapped():
            self._quantizer = faiss.IndexFlatIP(self._dim)  # never asked: lists are named by us
            self._index = faiss.IndexIVFFlat(self._quantizer, self._dim, lists, faiss.METRIC_INNER_PRODUCT)
            self._index.is_trained = True
            self._index.nprobe = 1
        self._capacity = {}
        self._slack_bytes = 0
        for number, (owned, vectors) in enumerate(held, start=_SPARE + 1):
            owned.number = number
            self._write(owned, 0, np.asarray(owned.seqs, dtype=np.int64), vectors)
        del old
        self._live_bytes = sum(self._bytes(owned) for owned, _ in held)
        self._free_numbers = list(range(lists - 1, len(held) + _SPARE, -1))


def _rounded_up(count: int) -> int:
    fetch = _FIRST_FETCH
    while fetch < count:
        fetch *= 4
    return fetch


def _grown(capacity: int, size: int, added: int) -> int:
    """Mirror how ``std::vector`` grows: to the needed size, but at least doubling."""
    return capacity if size + added <= capacity else size + max(size, added)


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FatalError(f"faiss: {error}") from error
