"""What a CPU multiplies most: a base's matrices, packed against as torch has them, to read and to train, with GELU done
within the product against after it, and attention, as plain products against torch's fused kernel.

``python -m benchmarks.products [--json FILE]``; MiniLM's shapes, no model is loaded. What suits a processor is decided
by such figures: see ``oppu/lm/packed.py`` and ``oppu/lm/attention.py``.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch
from torch import nn
from transformers import BertConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bert.modeling_bert import BertIntermediate

from benchmarks.timing import REPEATS, Cell, interleaved, machine, rounded, show, type_name, write
from oppu.lm.attention import attend
from oppu.lm.hardware import fast_bfloat16, keep_freed_memory
from oppu.lm.packed import Packed

WIDE, INNER, VOCABULARY, HEADS = 384, 1536, 30_522, 12
LAYERS = ((WIDE, WIDE), (WIDE, INNER), (INNER, WIDE), (WIDE, VOCABULARY))
ROWS, TRAINED_ROWS, HEAD_ROWS = (1, 4, 16, 64, 1024), (16, 400, 4000), 64
"""Of a product, of one in training, and the most of the head's: it sees what is read only."""
ACTIVATED_ROWS = (64, 512, 1728, 6144)
READ = ((64, 8), (64, 27), (64, 64), (32, 128), (16, 256), (8, 512))
"""Rows and tokens of what is read at once."""
DECODED = ((1, 48), (8, 48), (64, 48), (8, 200), (64, 200))
"""Rows of a token each, and the tokens before them."""
ROOM = 16
CALLS = 5
"""Of a round: the smallest take some microseconds."""
_Case = Callable[[], object]


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=3 * REPEATS, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result there.")
def main(repeats: int, out: Path | None) -> None:
    """Measure products on this machine."""
    keep_freed_memory()
    dtypes = [torch.float32, *([torch.bfloat16] if fast_bfloat16("cpu") else [])]
    with torch.no_grad():
        matrices = [row for dtype in dtypes for row in _matrices(dtype, repeats)]
        activated = [row for dtype in dtypes for row in _activated(dtype, repeats)]
        attention = [row for dtype in dtypes for row in _attention(dtype, repeats)]
    learnt = [row for dtype in dtypes for row in _matrices(dtype, repeats, learnt=True)]
    show("matrices: packed over as torch has them", matrices)
    show("the same and the gradients of what they multiply", learnt)
    show("384 to 1,536 numbers and GELU: within the packed product over after it", activated)
    show("attention: plain products over torch's kernel", attention)
    write(out, {**machine(), "matrices": matrices, "learnt": learnt, "activated": activated, "attention": attention})


def _matrices(dtype: torch.dtype, repeats: int, *, learnt: bool = False) -> Iterator[dict[str, Cell]]:
    for rows in TRAINED_ROWS if learnt else ROWS:
        for wide, out in LAYERS:
            if out == VOCABULARY and rows > HEAD_ROWS:
                continue
            plain, packed = (nn.Linear(wide, out).to(dtype).requires_grad_(False) for _ in range(2))
            Packed(packed)
            x = torch.randn(rows, wide).to(dtype).requires_grad_(learnt)
            grad = torch.randn(rows, out).to(dtype)
            own, other = (partial(_learnt, one, x, grad) if learnt else partial(one, x) for one in (packed, plain))
            shape: dict[str, Cell] = {"dtype": type_name(dtype), "rows": rows, "in": wide, "out": out}
            yield {**shape, **_compared(own, other, repeats)}


def _activated(dtype: torch.dtype, repeats: int) -> Iterator[dict[str, Cell]]:
    shape = BertConfig(hidden_size=WIDE, intermediate_size=INNER)
    within, after = (BertIntermediate(shape).to(dtype).requires_grad_(False) for _ in range(2))
    Packed(within)
    Packed(after.dense)
    for rows in ACTIVATED_ROWS:
        x = torch.randn(rows, WIDE).to(dtype)
        yield {"dtype": type_name(dtype), "rows": rows, **_compared(partial(within, x), partial(after, x), repeats)}


def _learnt(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> object:
    return torch.autograd.grad(layer(x), x, grad)


def _attention(dtype: torch.dtype, repeats: int) -> Iterator[dict[str, Cell]]:
    module = nn.Identity()
    module.is_causal = True  # type: ignore[assignment]  # what both ways ask a layer
    for rows, tokens in READ:
        query, key, value = (_heads(rows, tokens, dtype) for _ in range(3))
        yield {**_shape(dtype, rows, tokens, 0), **_ways(module, query, key, value, repeats)}
    for rows, before in DECODED:
        query, key, value = _heads(rows, 1, dtype), *(_cached(rows, before + 1, dtype) for _ in range(2))
        yield {**_shape(dtype, rows, 1, before), **_ways(module, query, key, value, repeats)}


def _heads(rows: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return ``[n, h, t, d]`` as a layer's product leaves it."""
    return torch.randn(rows, tokens, HEADS, WIDE // HEADS).to(dtype).transpose(1, 2)


def _cached(rows: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return ``[n, h, t, d]`` as a cache with room for more holds it."""
    return torch.randn(rows, HEADS, tokens + ROOM, WIDE // HEADS).to(dtype)[:, :, :tokens]


def _shape(dtype: torch.dtype, rows: int, tokens: int, before: int) -> dict[str, Cell]:
    return {"dtype": type_name(dtype), "rows": rows, "tokens": tokens, "before": before}


def _ways(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, repeats: int
) -> dict[str, Cell]:
    own, other = (partial(work, module, query, key, value, None) for work in (attend, sdpa_attention_forward))
    return _compared(own, other, repeats)


def _compared(own: _Case, other: _Case, repeats: int) -> dict[str, Cell]:
    found = interleaved({"own": partial(_calls, own), "other": partial(_calls, other)}, repeats=repeats)
    return {
        "milliseconds": rounded(1000 * found["own"].each(CALLS).median),
        "ratio": rounded(found["other"].median / found["own"].median),
        "spread": rounded(found["own"].spread),
        "other_spread": rounded(found["other"].spread),
    }


def _calls(case: _Case) -> None:
    for _ in range(CALLS):
        case()


if __name__ == "__main__":
    main()
