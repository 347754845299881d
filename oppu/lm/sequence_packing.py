"""Texts to vectors with several texts in a row of an encoder, which attention keeps apart.

Texts of a few dozen tokens, one a row, are mostly padding and small products: packed, 64 of them take .44 to .61 of
sentence-transformers' own time on two cores, and texts of 152 tokens as long (``python -m benchmarks.embedding``). Its
own layers pool and normalize, as they do after a GPU's kernel for sequences of different lengths.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

_WIDTHS = (128, 256)
"""Tokens of a row that are tried, or as many as the longest text has."""
_ATTENTION = 600
"""A token's attention over so many others takes about as long as the rest of a block."""
_PROBES = (
    *("", "rain", "The senate voted on Tuesday.", "Rain over Spain, then sun."),
    *(" ".join(map(str, range(most))) for most in (90, 600)),  # words that change: nearness in a text must count
)
_NEAR = ("sliding_window", "local_attention", "attention_window")
"""Settings of encoders in which some layers look at near tokens only; a mask that we give replaces that."""
_LIKENESS = 0.999
"""Least cosine of a probe's two vectors; bfloat16 rounds to .9999."""
_NOBODY = -1


class SequencePacking:
    """An encoder of texts on a CPU, with as many to a row as fit."""

    def __init__(self, model: Any) -> None:
        """Take a model's parts.

        Args:
            model: A ``SentenceTransformer``.
        """
        encoder, *self._after = list(model)
        self._encoder, self._tokenizer = encoder.model, encoder.tokenizer
        self._first_position = _first_position(self._encoder)

    @property
    def looks_near(self) -> bool:
        """Whether some of the encoder's layers look at near tokens only."""
        config = self._encoder.config
        kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
        return kinds != {"full_attention"} or any(getattr(config, name, None) for name in _NEAR)

    def encode(self, texts: Sequence[str], batch: int) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: Any.
            batch: Texts of one forward; the longest are taken first.

        Returns:
            ``[len(texts), dim] float32``, each row of unit length.
        """
        tokens: list[list[int]] = self._tokenizer(list(texts), truncation=True)["input_ids"]
        longest_first = sorted(range(len(texts)), key=lambda text: -len(tokens[text]))
        parts = [longest_first[first : first + batch] for first in range(0, len(texts), batch)]
        with torch.inference_mode():
            vectors = torch.cat([self._forward([tokens[text] for text in part]) for part in parts])
            ordered = torch.empty_like(vectors)
            ordered[longest_first] = vectors
        found: NDArray[np.float32] = functional.normalize(ordered, dim=1).numpy()
        return found

    def _forward(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return vectors ``[len(tokens), dim] float32``; the longest come first."""
        lengths = [len(text) for text in tokens]
        rows = _rows(lengths)
        known, positions, owned = self._laid_out(tokens, rows, _width(rows, lengths))
        apart = owned[:, None, :, None] != owned[:, None, None, :]  # padding sees padding: no row is masked whole
        mask = torch.zeros(apart.shape, dtype=self._encoder.dtype)
        mask.masked_fill_(apart, torch.finfo(mask.dtype).min)
        states = self._encoder(input_ids=known, attention_mask=mask, position_ids=positions).last_hidden_state
        kept, order = owned != _NOBODY, [text for row in rows for text in row]
        ends = np.cumsum([0, *(lengths[text] for text in order)])
        features: dict[str, Any] = {
            "token_embeddings": states[kept][None],
            "input_ids": known[kept][None],
            "cu_seq_lens_q": torch.from_numpy(ends.astype(np.int32)),
        }
        for module in self._after:
            features = module(features)
        pooled = features["sentence_embedding"].float()
        vectors = torch.empty_like(pooled)
        vectors[order] = pooled
        return vectors

    def _laid_out(
        self, tokens: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids, positions within their text, and the text of each place, all ``[len(rows), width] int64``."""
        ids = np.zeros((len(rows), width), dtype=np.int64)
        positions, owners = np.full_like(ids, self._first_position), np.full_like(ids, _NOBODY)
        for number, row in enumerate(rows):
            for text, place in zip(row, _places([len(tokens[text]) for text in row]), strict=True):
                ids[number, place] = tokens[text]
                positions[number, place] += np.arange(len(tokens[text]))
                owners[number, place] = text
        return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(owners)


def sequence_packing(model: Any) -> SequencePacking | None:
    """Pack a model's texts where that is known to change nothing.

    It is tried on a few texts: what reads positions, masks or prompts in another way than most encoders do gives other
    vectors, or an error, and then stays as it is.

    Args:
        model: A ``SentenceTransformer`` in its final type.

    Returns:
        The packing, or ``None``: on a device that was not measured, where layers look at near tokens only, or where
        vectors differ.
    """
    if model.device.type != "cpu" or model.default_prompt_name is not None:
        return None
    probes = list(_PROBES)
    try:
        packing = SequencePacking(model)
        if packing.looks_near:
            return None
        alone = model.encode(probes, batch_size=1, convert_to_tensor=True, show_progress_bar=False)
        packed = torch.from_numpy(packing.encode(probes, len(probes)))
        likeness = functional.cosine_similarity(packed, alone.float())
    except Exception:
        return None
    return packing if likeness.min() >= _LIKENESS else None


def _first_position(encoder: torch.nn.Module) -> int:
    """Return the position of a text's first token: RoBERTa and its kin count from after the padding's."""
    for module in encoder.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0


def _rows(lengths: Sequence[int]) -> list[list[int]]:
    """Return which texts share a row; ``lengths`` fall."""
    widths = sorted({max(width, lengths[0]) for width in _WIDTHS})
    return min((_first_fit(lengths, width) for width in widths), key=lambda rows: _cost(rows, lengths))


def _first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put each text into the first row that has room for it (first-fit decreasing)."""
    rows, room = list[list[int]](), list[int]()
    for text, length in enumerate(lengths):
        number = next((number for number, left in enumerate(room) if left >= length), None)
        if number is None:
            rows.append([])
            room.append(width)
            number = len(rows) - 1
        rows[number].append(text)
        room[number] -= length
    return rows


def _cost(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    width = _width(rows, lengths)
    return len(rows) * width * (_ATTENTION + width)


def _width(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Return the tokens of the fullest row."""
    return max(sum(lengths[text] for text in row) for row in rows)


def _places(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length
