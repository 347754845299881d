"""Encoders of texts of several families, with random weights."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import PreTrainedTokenizerBase


def random_encoder(minilm: Any, folder: Path, model: Any, config: Any, *, longest: int = 256, layers: int = 2) -> str:
    """Save an encoder of another family with random weights and MiniLM's tokenizer as sentence-transformers' model."""
    tokenizer: PreTrainedTokenizerBase = minilm.tokenizer
    torch.manual_seed(0)
    small = config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=300,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    model(small).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    encoder = Transformer(str(folder / "encoder"), max_seq_length=longest)
    SentenceTransformer(modules=[encoder, Pooling(32), Normalize()], device="cpu").save(str(folder / "saved"))
    return str(folder / "saved")
