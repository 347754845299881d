"""Texts to unit vectors, by sentence-transformers; the only module that imports it."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Embedder(Protocol):
    """Maps texts to unit vectors; ``fingerprint`` names the mapping and is stored with each vector."""

    @property
    def fingerprint(self) -> str:
        """Identity of model weights and settings: unequal ones are never compared."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return ``[len(texts), dim] float32``, each row of unit length."""
        ...


class HashEmbedder:
    """A deterministic stand-in without a model: hashed words, for the simulator and fast tests."""

    def __init__(self, dim: int = 16) -> None:
        self._dim = dim

    @property
    def fingerprint(self) -> str:
        """Identity of the hashing."""
        return f"hash-{self._dim}"

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return ``[len(texts), dim] float32``, each row of unit length."""
        vectors = np.zeros((len(texts), self._dim), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.split() or [""]:
                digest = hashlib.sha256(word.encode()).digest()
                row[digest[0] % self._dim] += 1.0 if digest[1] % 2 else -1.0
                row[digest[2] % self._dim] += 0.5
            row /= np.linalg.norm(row) or 1.0
            if not row.any():
                row[0] = 1.0
        return vectors
