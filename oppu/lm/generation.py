"""Greedy decoding with a key-value cache for rows of mixed users.

Prompts are padded on the left and masked, with explicit positions, so that every row's distances (a sliding
window's too) are those it has alone.
"""

from collections.abc import Sequence

import torch

from oppu.lm.bank import SlotBank
from oppu.lm.encoding import Reading
from oppu.lm.forward import Runner


def greedy(
    runner: Runner, bank: SlotBank, prompts: Sequence[Reading], limits: Sequence[int], stops: frozenset[int]
) -> list[list[int]]:
    """Generate the most likely token after token.

    Args:
        runner: The base.
        bank: The adapters; each prompt names its slot.
        prompts: Token ids of similar length (positions are not used).
        limits: Most new tokens of each.
        stops: Tokens that end a text; they are not part of it.

    Returns:
        New token ids of each prompt.
    """
    base = runner.base
    longest = max(len(prompt.ids) for prompt in prompts)
    sizes = torch.tensor([len(prompt.ids) for prompt in prompts], device=base.device)
    ids = torch.tensor([[*(0,) * (longest - len(p.ids)), *p.ids] for p in prompts], device=base.device)
    at = torch.arange(longest, device=base.device)[None]
    mask = (at >= longest - sizes[:, None]).long()
    positions = (at - (longest - sizes[:, None])).clamp(min=0)
    found: list[list[int]] = [[] for _ in prompts]
    open_rows = {row for row, limit in enumerate(limits) if limit > 0}
    cache = None
    with bank.use([prompt.slot for prompt in prompts]), torch.no_grad():
        while open_rows:
            out = base.model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **runner.given_positions(positions),
            )
            cache = out.past_key_values
            chosen = runner.widened(out.logits[:, -1]).argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                if row in open_rows:
                    _append(found[row], token, open_rows, row, limits[row], stops)
            ids = chosen[:, None]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
    return found


def _append(text: list[int], token: int, open_rows: set[int], row: int, limit: int, stops: frozenset[int]) -> None:
    if token in stops:
        open_rows.discard(row)
        return
    text.append(token)
    if len(text) >= limit:
        open_rows.discard(row)
