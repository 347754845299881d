"""BM25 over one user's items of one task; the only module that imports bm25s.

Statistics (document frequencies, mean length) are those of the searched window alone: an item that may see only
its past is scored as it would have been at that time. bm25s holds and sums the eager scores; its own indexing
loops over documents in Python, so its documented hook ``build_index_from_ids`` is replaced by one in numpy that
gives the same numbers (Lù, BM25S, arXiv 2407.03618; variant "lucene").
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import bm25s
import numpy as np
from numpy.typing import NDArray

from retriever.terms import terms

_TERM_BYTES = 24  # a posting here and in the built index
_WORD_BYTES = 150  # a vocabulary entry


class _WindowIndex(bm25s.BM25):  # type: ignore[misc]
    """bm25s over documents given as postings instead of token lists."""

    def __init__(self, postings: NDArray[np.int32], lengths: NDArray[np.int32], vocabulary: int) -> None:
        """Index ``postings`` ``[p, 3]`` (document, term, count), documents from 0; ``lengths`` ``[n]``."""
        super().__init__(method="lucene", csc_backend="numpy", backend="numpy")
        self.vocabulary = vocabulary
        self.nonoccurrence_array = None
        self.scores = self._score(postings, lengths, vocabulary)

    def _score(self, postings: NDArray[np.int32], lengths: NDArray[np.int32], vocabulary: int) -> dict[str, object]:
        documents, ids, counts = postings.T
        frequencies = np.bincount(ids, minlength=vocabulary)
        idf = np.log(1 + (len(lengths) - frequencies + 0.5) / (frequencies + 0.5))
        norm = self.k1 * (1 - self.b + self.b * lengths[documents] / (lengths.mean() or 1.0))
        scores = idf[ids] * counts / (counts + norm)
        order = np.argsort(ids, kind="stable")
        return {
            "data": scores[order].astype(np.float32),
            "indices": documents[order].astype(np.int32),
            "indptr": np.concatenate([[0], np.cumsum(frequencies)]).astype(np.int64),
            "num_docs": len(lengths),
        }


class LexicalIndex:
    """Term postings of a growing list of texts, and BM25 over any window of them."""

    def __init__(self) -> None:
        self._vocabulary: dict[str, int] = {}
        self._postings: list[NDArray[np.int32]] = []
        self._flat = np.empty((0, 3), dtype=np.int32)
        self._ends: list[int] = [0]
        self._lengths: list[int] = []
        self._built: tuple[tuple[int, int], _WindowIndex] | None = None

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def nbytes(self) -> int:
        """Estimated memory."""
        return self._ends[-1] * _TERM_BYTES + len(self._vocabulary) * _WORD_BYTES + 16 * len(self)

    def extend(self, texts: Iterable[str]) -> None:
        """Append documents; an index is built at the next question."""
        for text in texts:
            words = terms(text)
            counts = Counter(self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words)
            document = len(self._lengths)
            rows = [(document, term, count) for term, count in counts.items()]
            self._postings.append(np.array(rows, dtype=np.int32).reshape(-1, 3))
            self._ends.append(self._ends[-1] + len(rows))
            self._lengths.append(len(words))

    def scores(self, text: str, low: int, high: int) -> NDArray[np.float32]:
        """Score the documents ``low`` to ``high`` (exclusive) against a text.

        Args:
            text: The question.
            low: First document of the window.
            high: One past its last.

        Returns:
            ``[high - low] float32``, zero where no term is shared.
        """
        if low >= high:
            return np.empty(0, dtype=np.float32)
        index = self._window(low, high)
        ids = [self._vocabulary.get(word, index.vocabulary) for word in terms(text)]
        known = [term for term in ids if term < index.vocabulary]  # a window may be older than a word
        if not known:
            return np.zeros(high - low, dtype=np.float32)
        scores: NDArray[np.float32] = index.get_scores_from_ids(known)
        return scores

    def _window(self, low: int, high: int) -> _WindowIndex:
        if self._built is not None and self._built[0] == (low, high):
            return self._built[1]
        self._merge(self._postings)
        postings = self._flat[self._ends[low] : self._ends[high]] - np.array([low, 0, 0], dtype=np.int32)
        lengths = np.array(self._lengths[low:high], dtype=np.int32)
        index = _WindowIndex(postings, lengths, len(self._vocabulary))
        self._built = ((low, high), index)
        return index

    def _merge(self, fresh: Sequence[NDArray[np.int32]]) -> None:
        if fresh:
            self._flat = np.concatenate([self._flat, *fresh])
            self._postings = []
