"""What the bank is measured on and against: bases, random adapters, and the same adapters in PEFT.

Every subject computes the next-token logits at each row's last position from the same token ids.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from oppu.errors import ConfigError
from oppu.lm.bank import SlotBank
from oppu.lm.base import LoadedBase, load_base, ready
from oppu.lm.encoding import Reading
from oppu.lm.forward import Runner
from oppu.lm.generation import left_padded
from oppu.lm.kv_cache import roomy_cache
from oppu.lm.port import Tensors
from oppu.lm.reading import read
from oppu.lm.targets import find_targets
from oppu.lm.transfer import sent
from oppu.settings import ModelSettings

LLAMA_1B = "llama-1b"
"""A Llama of 1.2 billion random weights: speed does not depend on their values."""
_LLAMA = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 4096,
}  # fmt: skip
_SCALE = 0.01
Inputs = Mapping[str, torch.Tensor]
"""A model's arguments by name, ``[n, t]`` each."""


def base_named(name: str, *, device: str, dtype: str) -> LoadedBase:
    """Load a base, or make the random Llama.

    Args:
        name: As ``model.base``, or ``llama-1b``.
        device: Where.
        dtype: ``float32`` or ``bfloat16``.

    Returns:
        The base.

    Raises:
        ConfigError: It cannot be loaded.
    """
    settings = ModelSettings(base="offline" if name == LLAMA_1B else name, device=device, dtype=dtype)
    loaded = load_base(settings)
    if name != LLAMA_1B:
        return loaded
    if loaded.device.type == "cpu":
        raise ConfigError(f"--base {LLAMA_1B}: expected --device cuda")
    torch.manual_seed(0)
    with torch.device(loaded.device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**_LLAMA), dtype=loaded.dtype)
    return ready(name, model, loaded.tokenizer, "0" * 32, device=loaded.device, dtype=loaded.dtype)


def adapted_layers(base: LoadedBase) -> dict[str, nn.Module]:
    """Return the layers that the service adapts by default, for all subjects alike."""
    return find_targets(base.model, None, ModelSettings().lora_upper)


def random_adapter(bank: SlotBank, seed: int) -> Tensors:
    """Return weights that fit a bank, in PEFT's naming, none of them zero."""
    generator = np.random.default_rng(seed)
    return {
        name: (generator.standard_normal(tensor.shape) * _SCALE).astype(np.float32)
        for name, tensor in bank.read(0).items()
    }


@dataclass(slots=True)
class Banked:
    """The base under a bank that holds an adapter a slot."""

    base: LoadedBase
    bank: SlotBank
    runner: Runner = field(init=False)

    def __post_init__(self) -> None:
        self.runner = Runner(self.base, adapted_layers(self.base))

    def run(self, ids: Sequence[tuple[int, ...]], slots: Sequence[int]) -> torch.Tensor:
        """Return ``[n, vocabulary]`` for rows of mixed users."""
        readings = [Reading(row, (len(row) - 1,), slot) for row, slot in zip(ids, slots, strict=True)]
        found = torch.empty(len(ids), self.runner.vocabulary, device=self.base.device)
        with torch.no_grad():
            for members, logits in read(self.runner, self.bank, readings):
                found[sent(members, found.device)] = logits.to(found.dtype)
        return found

    def decoder(self, ids: Sequence[tuple[int, ...]], slots: Sequence[int]) -> "Decoder":
        """Return a decoder of rows of mixed users, side by side by slot as the service has them."""

        @contextmanager
        def use() -> Iterator[None]:
            with self.bank.use(slots):
                yield

        return Decoder(self.base.model, torch.tensor(ids, device=self.base.device), use, roomy=True)

    def close(self) -> None:
        """Take both off the base."""
        self.bank.close()
        self.runner.close()


def banked(base: LoadedBase, *, slots: int, rank: int, alpha: float, distinct: int | None = None) -> Banked:
    """Fill a bank over a copy of a base, which stays as it comes; slots beyond ``distinct`` hold copies: their
    values do not matter."""
    base = replace(base, model=copy.deepcopy(base.model))
    targets = adapted_layers(base)
    bank = SlotBank(targets, slots=slots, rank=rank, alpha=alpha)
    made = min(slots, distinct or slots)
    adapters = [random_adapter(bank, seed) for seed in range(made)]
    for slot in range(1, slots + 1):
        bank.load(slot, adapters[(slot - 1) % made])
    return Banked(base, bank)


class Decoder:
    """Decodes one token a row after a cached prompt, again and again the same."""

    def __init__(
        self, model: Any, ids: torch.Tensor, use: Callable[[], AbstractContextManager[None]], *, roomy: bool = False
    ) -> None:
        """Read the prompt.

        Args:
            model: The language model, adapters attached.
            ids: ``[n, t] int64``; the last column is the token that each step decodes.
            use: Opens the context that gives the rows their adapters.
            roomy: Whether keys and values lie in the service's cache instead of the library's own.
        """
        self._model, self._use = model, use
        self._last = ids[:, -1:]
        cache = roomy_cache(model.config, 1) if roomy else None
        with torch.no_grad(), use():
            out = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values

    def run(self, steps: int) -> torch.Tensor:
        """Decode so many times as one batch; return the last ``[n, vocabulary]``."""
        with torch.no_grad(), self._use():
            for _ in range(steps):
                out = self._model(input_ids=self._last, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
                self._cache.crop(-1)
        logits: torch.Tensor = out.logits[:, -1]
        return logits


def inputs_of(base: LoadedBase, ids: Sequence[tuple[int, ...]]) -> Inputs:
    """Return what a user of transformers gives a model: rows of unequal length padded on the left, and masked."""
    if len({len(row) for row in ids}) == 1:
        return {"input_ids": torch.tensor(ids, device=base.device)}
    padded, mask, positions = left_padded(ids, base.device)
    return {"input_ids": padded, "attention_mask": mask, "position_ids": positions}


def bare(base: LoadedBase, inputs: Inputs) -> torch.Tensor:
    """Return ``[n, vocabulary]`` of the base alone, as a user of transformers would."""
    with torch.no_grad():
        logits: torch.Tensor = base.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits


class Peft:
    """The same adapters in PEFT, on a copy of the base."""

    def __init__(
        self, base: LoadedBase, adapters: Sequence[Tensors], *, rank: int, alpha: float, widened: bool = True
    ) -> None:
        """Add every adapter.

        Args:
            base: Copied.
            adapters: One a user.
            rank: Theirs.
            alpha: Theirs.
            widened: Whether adapters are in float32 over any base, as PEFT has them by default; if not, in the base's
                type.
        """
        self.names = [f"user{number:04d}" for number in range(len(adapters))]
        targets = list(adapted_layers(base))
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=targets)
        model = copy.deepcopy(base.model)
        self.model: Any = get_peft_model(model, config, adapter_name=self.names[0], autocast_adapter_dtype=widened)
        for name in self.names[1:]:
            self.model.add_adapter(name, config, autocast_adapter_dtype=widened)
        for name, tensors in zip(self.names, adapters, strict=True):
            self._load(name, tensors)
        self.model.eval()

    def by_set_adapter(self, inputs: Inputs, users: Sequence[int]) -> torch.Tensor:
        """Switch the active adapter for every user's rows; users follow each other."""
        found, first = [], 0
        with torch.no_grad():
            for user, count in _runs(users):
                self.model.set_adapter(self.names[user])
                own = {name: rows[first : first + count] for name, rows in inputs.items()}
                part = self.model(**own, use_cache=False, logits_to_keep=1)
                found.append(part.logits[:, -1])
                first += count
        return torch.cat(found)

    def by_adapter_names(self, inputs: Inputs, users: Sequence[int]) -> torch.Tensor:
        """Run all rows in one call that names each row's adapter."""
        names = [self.names[user] for user in users]
        with torch.no_grad():
            out = self.model(**inputs, use_cache=False, logits_to_keep=1, adapter_names=names)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def decode_by_set_adapter(
        self, ids: torch.Tensor, steps: int, *, each_token: bool = False
    ) -> Callable[[], torch.Tensor]:
        """Return what decodes for each user in turn, every user with a cache of its own.

        Args:
            ids: As for ``Decoder``.
            steps: Tokens a user.
            each_token: Whether users take turns at every token, or each has all of his at once.
        """

        def using(name: str) -> Callable[[], AbstractContextManager[None]]:
            @contextmanager
            def use() -> Iterator[None]:
                self.model.set_adapter(name)
                yield

            return use

        rows = [Decoder(self.model, ids[user : user + 1], using(name)) for user, name in enumerate(self.names)]
        turns, length = (steps, 1) if each_token else (1, steps)
        return lambda: [torch.cat([row.run(length) for row in rows]) for _ in range(turns)][-1]

    def decode_by_adapter_names(self, ids: torch.Tensor, steps: int) -> Callable[[], torch.Tensor]:
        """Return what decodes for all users in one call a step."""
        decoder = Decoder(functools.partial(self.model, adapter_names=self.names), ids, nullcontext)
        return lambda: decoder.run(steps)

    def _load(self, name: str, tensors: Tensors) -> None:
        own: Mapping[str, nn.Parameter] = dict(self.model.named_parameters())
        with torch.no_grad():
            for key, value in tensors.items():
                own[key.removesuffix(".weight") + f".{name}.weight"].copy_(torch.from_numpy(np.array(value)))


def _runs(users: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for user in users:
        if runs and runs[-1][0] == user:
            runs[-1] = (user, runs[-1][1] + 1)
        else:
            runs.append((user, 1))
    return runs
