"""Vectors of query texts, computed ahead on a thread of their own.

Embedding a query costs about half as much as a small base's answer, so a worker that answers in pieces says what it
will ask, and has the vectors computed while the model runs on this piece and those before. Invariants: while there
is a thread, only it calls the embedder, whose tokenizer does not bear two; nothing is kept, or still begun, but what is
expected.
"""

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oppu.embedder import Embedder
from oppu.values import Vector

FIRST_WINDOW, MOST_WINDOW = 64, 256
"""Texts of one call: the first is the least that a worker waits for, each further one is as many as all before it,
because a call costs something beside its texts."""

NICENESS = 10
"""Of the thread, above its process's: most vectors are needed later than what runs now. Workers of one torch thread on
two cores come 1.03 to 1.15 times as near to their model's own rate for it (``oppu bench end-to-end``)."""


def background() -> ThreadPoolExecutor:
    """Return a thread to compute vectors on, which on Linux gives way to others that want its core."""
    return ThreadPoolExecutor(1, "query-vectors", _give_way)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        own = threading.get_native_id()
        with suppress(OSError):  # a sandbox may forbid it; then it is as urgent as the others
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + NICENESS)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a text's vector will be: a row of what a call returns."""

    call: Future[NDArray[np.float32]]
    row: int

    def vector(self) -> Vector:
        """Wait for it."""
        found: Vector = self.call.result()[self.row]
        return found


class QueryVectors:
    """Vectors by text. Safe from several threads."""

    def __init__(self, embedder: Embedder, executor: Executor | None = None) -> None:
        """Compute nothing yet.

        Args:
            embedder: Turns texts into unit vectors.
            executor: Runs the embedder, one call at a time; ``None``: whoever asks does, and nothing is computed ahead.
        """
        self._embedder, self._executor = embedder, executor
        self._expected: dict[str, _Place] = {}
        self._lock = threading.Lock()

    def expect(self, texts: Sequence[str]) -> None:
        """Begin with those texts that were not expected before, and forget what is expected no longer.

        Args:
            texts: All that will be asked for, most urgent first; none: everything is forgotten.
        """
        if self._executor is None:
            return
        with self._lock:
            before = self._expected
            kept = {text: before[text] for text in texts if text in before}
            needed = {id(place.call) for place in kept.values()}
            for place in before.values():
                if id(place.call) not in needed:
                    place.call.cancel()  # what is urgent now must not wait behind it
            new = (text for text in texts if text not in kept)
            self._expected = {**kept, **self._begin(self._executor, new, len(kept))}

    def of(self, texts: Sequence[str]) -> list[Vector]:
        """Return vectors, waiting for those that are on their way.

        Args:
            texts: Any.

        Returns:
            One ``[dim] float32`` a text, in order.

        Raises:
            Exception: What the embedder raises on these texts.
        """
        if self._executor is None:
            return list(self._embedder.embed(texts)) if texts else []
        with self._lock:
            known = {text: self._expected[text] for text in texts if text in self._expected}
            new = (text for text in texts if text not in known)
            places = {**known, **self._begin(self._executor, new, MOST_WINDOW)}  # all are waited for
        try:
            vectors = {text: place.vector() for text, place in places.items()}
        except Exception:  # it may have been raised on a text that others expect
            distinct = list(places)
            vectors = dict(zip(distinct, self._executor.submit(self._embedder.embed, distinct).result(), strict=True))
        return [vectors[text] for text in texts]

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._expected.clear()

    def _begin(self, executor: Executor, texts: Iterable[str], ahead: int) -> Mapping[str, _Place]:
        """Hand texts to the thread, each once; so many are needed before them."""
        places: dict[str, _Place] = {}
        for part in _windows(list(dict.fromkeys(texts)), ahead):
            call = executor.submit(self._embedder.embed, part)
            places.update({text: _Place(call, row) for row, text in enumerate(part)})
        return places


def _windows(texts: Sequence[str], ahead: int) -> Iterator[Sequence[str]]:
    done = 0
    while done < len(texts):
        size = min(max(ahead + done, FIRST_WINDOW), MOST_WINDOW)
        yield texts[done : done + size]
        done += size
