"""Greedy decoding with a key-value cache for rows of mixed users, each text under its own mixture of experts.

Prompts are padded on the left and masked, with explicit positions, so that every row's distances (a sliding
window's too) are those it has alone. A text that has a blend and an adapter takes two rows: the base's and its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from oppu.lm.bank import SlotBank
from oppu.lm.blend import Blend, Cache, shares
from oppu.lm.forward import Runner
from oppu.lm.kv_cache import roomy_cache
from oppu.lm.prompts import Ids


@dataclass(frozen=True, slots=True)
class Writing:
    """One text to write: at most ``limit`` tokens after ``prompt``, under the adapter in bank slot ``slot``.

    ``blend`` with its ``caches`` mixes base, adapter and caches; without one the adapter (or base) writes alone.
    ``late`` is asked before every token; once it says so the text is given up.
    """

    prompt: Ids = field(repr=False)
    slot: int
    limit: int
    blend: Blend | None = field(default=None, repr=False)
    caches: tuple[Cache, ...] = field(default=(), repr=False)
    late: Callable[[], bool] | None = field(default=None, repr=False)

    @property
    def voices(self) -> dict[str, int]:
        """Bank slot of each expert that is a model."""
        if self.blend is None:
            return {"base": self.slot}
        return {"base": 0, "adapter": self.slot} if self.slot else {"base": 0}


@dataclass(frozen=True, slots=True)
class Written:
    """A text's new token ids, ``None`` where it was given up; and whether its adapter once said what is no number."""

    ids: list[int] | None = field(repr=False)
    unsound: bool = False


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the batch: who speaks in it, for which text."""

    slot: int
    text: int
    expert: str


@dataclass(frozen=True, slots=True)
class _Cast:
    """Who speaks for which text: the same at every token.

    ``voices`` ``[2, texts]`` are the rows of each text's base and adapter (the base's again where there is none; a text
    without a blend has one row), ``text`` ``[rows]`` is each row's text. ``blends`` are by text, ``blended`` ``[b]``
    their texts.
    """

    voices: torch.Tensor
    text: torch.Tensor
    blends: Mapping[int, Blend]
    blended: torch.Tensor


def greedy(runner: Runner, bank: SlotBank, writings: Sequence[Writing], stops: frozenset[int]) -> list[Written]:
    """Generate the most likely token after token.

    Args:
        runner: The base.
        bank: The adapters; each text names its slot.
        writings: Prompts of similar length.
        stops: Tokens that end a text; they are not part of it.

    Returns:
        One value a text, in order.
    """
    base = runner.base
    rows = sorted(
        (_Row(slot, text, expert) for text, w in enumerate(writings) for expert, slot in w.voices.items()),
        key=lambda row: row.slot,
    )
    ids, mask, positions = left_padded([writings[row.text].prompt for row in rows], base.device)
    cast = _cast(rows, writings, base.device)
    found: list[list[int] | None] = [[] for _ in writings]
    unsound: set[int] = set()
    open_texts = {text for text, w in enumerate(writings) if w.limit > 0}
    cache = roomy_cache(base.model.config, max((w.limit for w in writings), default=0))
    with bank.use([row.slot for row in rows]), torch.no_grad():
        while open_texts := _timely(open_texts, writings, found):
            out = base.model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **runner.given_positions(positions),
            )
            said = runner.widened(out.logits[:, -1]).softmax(-1)
            chosen = next_tokens(said, cast, writings, found)
            silent = said[cast.voices[1], 0].isnan()
            for text, (token, is_silent) in enumerate(torch.stack([chosen, silent.to(chosen)], dim=1).tolist()):
                own = found[text]
                if text in open_texts and own is not None:
                    if is_silent and writings[text].slot:
                        unsound.add(text)
                    _append(own, token, open_texts, text, writings[text].limit, stops)
            ids = chosen[cast.text][:, None]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            # a text that is written already is stepped along with the others, and must not pass the model's end
            positions = (positions[:, -1:] + 1).clamp(max=base.max_positions - 1)
    return [Written(ids, text in unsound) for text, ids in enumerate(found)]


def next_tokens(
    said: torch.Tensor, cast: _Cast, writings: Sequence[Writing], written: Sequence[Sequence[int] | None]
) -> torch.Tensor:
    """Choose each text's next token.

    Args:
        said: ``[rows, vocabulary]`` probabilities; a row may be none at all (NaN), and then says nothing.
        cast: Whose they are.
        writings: The texts.
        written: Each text's tokens so far; ``None``: given up.

    Returns:
        ``[texts] int64``, the most likely ones.
    """
    if len(cast.blends) == len(writings):
        return mixture(said, cast, writings, written).argmax(-1)
    chosen = said.argmax(-1)[cast.voices[0]]
    if cast.blends:
        chosen.index_copy_(0, cast.blended, mixture(said, cast, writings, written).argmax(-1))
    return chosen


def mixture(
    said: torch.Tensor, cast: _Cast, writings: Sequence[Writing], written: Sequence[Sequence[int] | None]
) -> torch.Tensor:
    """Mix the rows' distributions with the caches', for the texts that have a blend.

    Args:
        said: As in ``next_tokens``.
        cast: Whose they are.
        writings: The texts.
        written: Each text's tokens so far; ``None``: given up.

    Returns:
        ``[b, vocabulary]`` probabilities of the next token.
    """
    weights, extra = np.zeros((2, len(cast.blends), 1)), []
    for at, (text, blend) in enumerate(cast.blends.items()):
        cached = [one for cache in writings[text].caches for one in cache.after(tuple(written[text] or ()))]
        speaking = dict.fromkeys(writings[text].voices, 0) | {one.expert: one.matched for one in cached}
        share = shares(blend.weights, speaking)
        weights[:, at, 0] = share.get("base", 0.0), share.get("adapter", 0.0)
        extra += [(at, one.tokens, share[one.expert] * one.probabilities) for one in cached if one.expert in share]
    base, adapter = (_heard(said, rows) for rows in cast.voices[:, cast.blended])
    of_base, of_adapter = torch.from_numpy(weights).to(said)
    mixed = base.mul_(of_base).addcmul_(adapter, of_adapter)
    if extra:
        at_text = torch.from_numpy(np.concatenate([np.full(len(tokens), at) for at, tokens, _ in extra]))
        at_token = torch.from_numpy(np.concatenate([tokens for _, tokens, _ in extra]))
        mass = torch.from_numpy(np.concatenate([mass for *_, mass in extra]))
        mixed.index_put_((at_text.to(said.device), at_token.to(said.device)), mass.to(said), accumulate=True)
    return mixed


def _heard(said: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return some rows, zero where one is not a number: a softmax is so in all its places or in none."""
    return said[rows].masked_fill_(said[rows, :1].isnan(), 0.0)


def _cast(rows: Sequence[_Row], writings: Sequence[Writing], device: torch.device) -> _Cast:
    spoken = {(row.text, row.expert): at for at, row in enumerate(rows)}
    base = [spoken[text, "base"] for text in range(len(writings))]
    adapter = [spoken.get((text, "adapter"), row) for text, row in enumerate(base)]
    blends = {text: writing.blend for text, writing in enumerate(writings) if writing.blend is not None}
    voices, text, blended = (
        torch.tensor(part, dtype=torch.int64, device=device)
        for part in ([base, adapter], [row.text for row in rows], list(blends))
    )
    return _Cast(voices, text, blends, blended)


def left_padded(prompts: Sequence[Ids], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and positions ``[n, longest]``, padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[*(0,) * (longest - len(p)), *p] for p in prompts], device=device)
    at = torch.arange(longest, device=device)[None]
    return ids, (at >= longest - sizes[:, None]).long(), (at - (longest - sizes[:, None])).clamp(min=0)


def _timely(open_texts: set[int], writings: Sequence[Writing], found: list[list[int] | None]) -> set[int]:
    """Give up what is late; return what is still to be written."""
    for text in open_texts:
        late = writings[text].late
        if late is not None and late():
            found[text] = None
    return {text for text in open_texts if found[text] is not None}


def _append(text: list[int], token: int, open_rows: set[int], row: int, limit: int, stops: frozenset[int]) -> None:
    if token in stops:
        open_rows.discard(row)
        return
    text.append(token)
    if len(text) >= limit:
        open_rows.discard(row)
