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
_MIN_SLACK_BYTES = 2**18

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
    capacity: int = 0  # vectors that fit the memory faiss holds for this list

    def __len__(self) -> int:
        return len(self.seqs)


_NOTHING = Found(np.empty(0, np.int64), np.empty(0, np.float32))


class DenseIndex:
    """All loaded users' vectors.

    Args:
        dim: Length of a vector.
        lists: Inverted lists to begin with; doubled when they run out.
    """

    def __init__(self, dim: int, lists: int = 256) -> None:
        self._dim = dim
        self._lists: dict[ListKey, _List] = {}
        self._owners: dict[int, ListKey] = {}
        self._next_token = 0
        self._nbytes = 0
        self._index: Any  # faiss's own stubs miss its Python wrappers
        self._arrays: Any
        self._retained_ids: dict[int, int] = {}  # ids that faiss has room for in a list, by list number
        self._build(lists)

    @property
    def nbytes(self) -> int:
        """Memory of all lists, that which faiss keeps for the next owner of a list included."""
        return self._nbytes + self._slack_bytes

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
        seqs, vectors = owned.seqs[keep:], self._vectors(owned)[keep:]
        if not seqs:
            self.free(key)
            return
        self._nbytes -= self._bytes(owned)
        self._clear(owned)
        self._nbytes += self._bytes(owned)
        self._append(owned, np.asarray(seqs, dtype=np.int64), vectors)

    def free(self, key: ListKey) -> None:
        """Forget a list; its number goes to the next owner. Freeing an unknown list does nothing."""
        owned = self._lists.pop(key, None)
        if owned is None:
            return
        self._nbytes -= self._bytes(owned)
        del self._owners[owned.token]
        self._clear(owned)
        self._free_numbers.append(owned.number)
        self._slack_bytes += self._retained_ids.get(owned.number, 0) * _ID_BYTES
        if self._slack_bytes > max(_MIN_SLACK_BYTES, self._nbytes // 16):
            self._build(self._index.nlist)

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
        vectors = np.ascontiguousarray([p.vector for p in probes], dtype=np.float32)
        if vectors.shape != (len(probes), self._dim):
            raise FatalError(f"queries of shape {vectors.shape}, expected {(len(probes), self._dim)}")
        numbers = np.array([[self._lists[p.key].number] for p in probes], dtype=np.int64)
        with _mapped():
            similarities, ids = self._index.search_preassigned(
                vectors, fetch, numbers, np.zeros(numbers.shape, dtype=np.float32)
            )
        return [self._settle(p, s, i) for p, s, i in zip(probes, similarities, ids, strict=True)]

    def _settle(self, probe: Probe, similarities: Floats, ids: Ints) -> Found | None:
        """Filter and order one row; ``None`` where unfetched items might belong among the best ``want``."""
        valid = ids >= 0
        ids, similarities = ids[valid], similarities[valid]
        self._check_owner(probe.key, ids)
        seqs = ids & ((1 << _SEQ_BITS) - 1)
        keep = (seqs >= probe.first_seq) & (seqs < probe.before_seq)
        if probe.hidden:
            keep &= ~np.isin(seqs, list(probe.hidden))
        rounded = np.round(similarities, _ROUND)
        if len(valid) < self.size(probe.key) and len(rounded):
            if int((rounded[keep] > rounded.min()).sum()) < probe.want:
                return None
        order = np.lexsort((-seqs[keep], -rounded[keep]))[: probe.want]
        return Found(seqs[keep][order], np.clip(similarities[keep][order], -1.0, 1.0))

    def _check_owner(self, key: ListKey, ids: Ints) -> None:
        for token in np.unique(ids >> _SEQ_BITS):
            if self._owners.get(int(token)) != key:
                raise FatalError("a vector of another owner was found in a user's list: nothing may be answered")

    def _open(self, key: ListKey) -> _List:
        if not self._free_numbers:
            self._build(2 * self._index.nlist)
        number = self._free_numbers.pop()
        self._slack_bytes -= self._retained_ids.get(number, 0) * _ID_BYTES
        owned = self._lists[key] = _List(number, self._next_token)
        self._owners[owned.token] = key
        self._next_token += 1
        self._nbytes += self._bytes(owned)
        return owned

    def _append(self, owned: _List, seqs: Ints, vectors: Floats) -> None:
        self._nbytes -= self._bytes(owned)
        self._write(owned, seqs, vectors)
        before = len(owned)
        owned.seqs.extend(seqs.tolist())
        owned.capacity = _grown(owned.capacity, before, len(seqs))
        held = self._retained_ids.get(owned.number, 0)
        self._retained_ids[owned.number] = _grown(held, before, len(seqs))
        self._nbytes += self._bytes(owned)

    def _write(self, owned: _List, seqs: Ints, vectors: Floats) -> None:
        ids = seqs | (owned.token << _SEQ_BITS)
        vectors = np.ascontiguousarray(vectors)
        numbers = np.full(len(seqs), owned.number, dtype=np.int64)
        with _mapped():
            self._index.add_core(len(seqs), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(numbers))

    def _vectors(self, owned: _List) -> Floats:
        """Return a copy of a list's vectors, ``[n, dim] float32``, in seq order (faiss appends)."""
        lists = self._index.invlists
        codes = faiss.rev_swig_ptr(lists.get_codes(owned.number), len(owned) * 4 * self._dim)
        vectors: Floats = codes.view(np.float32).reshape(len(owned), self._dim).copy()
        return vectors

    def _clear(self, owned: _List) -> None:
        """Empty a list at once: ``remove_ids`` would pass over everybody's."""
        with _mapped():
            self._index.ntotal -= len(owned)
            self._index.invlists.resize(owned.number, 0)
            codes = self._arrays.codes.at(owned.number)
            codes.owned_data.swap(faiss.UInt8Vector())  # resizing alone keeps the memory
            codes.resize(0)  # lets faiss see the swapped memory
        owned.seqs = array("q")
        owned.capacity = 0

    def _bytes(self, owned: _List) -> int:
        ids = self._retained_ids.get(owned.number, 0) * _ID_BYTES
        return _LIST_BYTES + owned.capacity * 4 * self._dim + ids + len(owned) * owned.seqs.itemsize

    def _build(self, lists: int) -> None:
        """Make an index of ``lists`` lists and move everything there: for more lists, or to give memory back."""
        held = [(owned, self._vectors(owned)) for owned in self._lists.values()]
        with _mapped():
            self._quantizer = faiss.IndexFlatIP(self._dim)  # never asked: lists are named by us
            self._index = faiss.IndexIVFFlat(self._quantizer, self._dim, lists, faiss.METRIC_INNER_PRODUCT)
            self._index.is_trained = True
            self._index.nprobe = 1
            self._arrays = faiss.downcast_InvertedLists(self._index.invlists)
        self._retained_ids = {}
        self._slack_bytes = 0
        self._nbytes = 0
        for number, (owned, vectors) in enumerate(held):
            owned.number, owned.capacity = number, len(owned)
            self._retained_ids[number] = len(owned)
            self._nbytes += self._bytes(owned)
            if len(owned):
                self._write(owned, np.asarray(owned.seqs, dtype=np.int64), vectors)
        self._free_numbers = list(range(lists - 1, len(held) - 1, -1))


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
