"""Texts to vectors with several texts in a row of an encoder, which attention keeps apart.

Texts of a few dozen tokens, one a row, are mostly padding and small products: packed, 64 of them take .42 to .67 of
sentence-transformers' own time on two cores, texts of 152 tokens .82 to .89 (``python -m benchmarks.embedding``). Its
own layers pool and normalize, as they do after a GPU's kernel for sequences of different lengths.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from oppu.lm.attention import PlainAttention
from oppu.lm.sequence_packing import looks_near, packed, parts
from oppu.lm.streams import Streams

logger = logging.getLogger(__name__)

TOKENS = 8192
"""Of one forward, padding not counted. In bfloat16 MiniLM embeds 512 texts of 21 tokens in .7 of the time that forwards
of 1,024 take and in .95 of that of 4,096; with 16,384 long texts take twice as long."""
_PROBES = (
    *("", "rain", "The senate voted on Tuesday.", "Rain over Spain, then sun."),
    *(" ".join(map(str, range(most))) for most in (90, 600)),  # words that change: nearness in a text must count
)
_LIKENESS = 0.999
"""Least cosine of a probe's two vectors; bfloat16 rounds to .9999."""


class TextPacking:
    """An encoder of texts on a CPU, with as many to a row as fit."""

    def __init__(self, model: Any) -> None:
        """Take a model's parts, and start threads to embed parts of a call side by side.

        Args:
            model: A ``SentenceTransformer``.
        """
        encoder, *self._after = list(model)
        self._encoder, self._tokenizer = encoder.model, encoder.tokenizer
        self._first_position = _first_position(self._encoder)
        self._streams = Streams(torch.device("cpu"))

    @property
    def config(self) -> object:
        """The encoder's."""
        return self._encoder.config

    def encode(self, texts: Sequence[str], most: int = TOKENS) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: Any.
            most: Tokens of one forward of several texts, padding not counted; the longest texts are taken first.

        Returns:
            ``[len(texts), dim] float32``, each row of unit length.
        """
        found = self._tokenizer(list(texts), truncation=True, return_attention_mask=False, return_token_type_ids=False)
        tokens: list[list[int]] = found["input_ids"]
        lengths = [len(text) for text in tokens]
        made: dict[int, torch.Tensor] = {}

        def embed_part(part: Sequence[int]) -> None:
            longest_first = sorted(part, key=lambda text: -lengths[text])
            with torch.inference_mode():
                for forward in parts(longest_first, (lengths, most)):
                    made.update(zip(forward, self._forward([tokens[text] for text in forward]), strict=True))

        self._streams.run(embed_part, self._streams.parts(lengths))
        vectors = torch.stack([made[text] for text in range(len(texts))])
        unit: NDArray[np.float32] = functional.normalize(vectors, dim=1).numpy()
        return unit

    def _forward(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return vectors ``[len(tokens), dim] float32``."""
        layout = packed([len(text) for text in tokens])
        ids, kept, order = layout.filled(tokens), layout.owners() >= 0, layout.in_order
        states = self._encoder(
            input_ids=ids,
            attention_mask=layout.mask(self._encoder.dtype, causal=False),
            position_ids=layout.positions(self._first_position),
        ).last_hidden_state
        ends = np.cumsum([0, *(len(tokens[text]) for text in order)])
        features: dict[str, Any] = {
            "token_embeddings": states[kept][None],
            "input_ids": ids[kept][None],
            "cu_seq_lens_q": torch.from_numpy(ends.astype(np.int32)),
        }
        for module in self._after:
            features = module(features)
        pooled = features["sentence_embedding"].float()
        vectors = torch.empty_like(pooled)
        vectors[order] = pooled
        return vectors


def text_packing(model: Any) -> TextPacking | None:
    """Pack a model's texts where that is known to change nothing.

    It is tried on a few texts: what reads positions, masks or prompts in another way than most encoders do gives other
    vectors, or an error, and then stays as it is. So it is with plain products for its attention.

    Args:
        model: A ``SentenceTransformer`` in its final type.

    Returns:
        The packing, or ``None``: on a device that was not measured, where layers look at near tokens only, or where
        vectors differ.
    """
    if model.device.type != "cpu" or model.default_prompt_name is not None:
        return None
    try:
        packing = TextPacking(model)
        if looks_near(packing.config, math.inf):
            return None
        alone = model.encode(list(_PROBES), batch_size=1, convert_to_tensor=True, show_progress_bar=False).float()
    except Exception:
        return None
    plain = PlainAttention(model)
    if _alike(packing, alone):
        return packing
    logger.info("embedder: its attention stays the library's")
    plain.close()
    return packing if _alike(packing, alone) else None


def _alike(packing: TextPacking, alone: torch.Tensor) -> bool:
    """Say whether the probes have the vectors that each has by itself."""
    try:
        shared = torch.from_numpy(packing.encode(_PROBES))
        return bool(functional.cosine_similarity(shared, alone).min() >= _LIKENESS)
    except Exception:
        return False


def _first_position(encoder: torch.nn.Module) -> int:
    """Return the position of a text's first token: RoBERTa and its kin count from after the padding's."""
    for module in encoder.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0
