"""The training loops that the bank is measured against: OPPU's own, and what a user of PEFT can have.

OPPU's way is a fresh PEFT adapter a user, on all blocks, logits over the vocabulary at every position, and batches
padded to their longest row. The well-run loop has logits at targets only, AdamW's fused kernel, and where they are
faster length buckets and the library's attention in plain products; its blocks are the library's.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from benchmarks.subjects import adapted_layers
from oppu.lm.base import LoadedBase
from oppu.lm.encoding import Encoder, Target
from oppu.lm.forward import Runner, buckets, target_losses
from oppu.lm.port import Example, TrainConfig
from oppu.lm.targets import find_targets
from oppu.lm.transfer import sent
from oppu.settings import ModelSettings
from oppu.tasks import Tasks

RANK, ALPHA = 8, 16
ATTENTION = ("sdpa", "eager")
"""The library's: its fused kernel, the default, and plain products, which train short bfloat16 rows faster on a CPU."""
_WARM_UP_SHARE, _CLIP_NORM, _IGNORED = 0.1, 1.0, -100

Job = tuple[Example, ...]


class PeftLoop:
    """Trains users one after another with PEFT and a fused ``torch.optim.AdamW``."""

    def __init__(self, base: LoadedBase, tasks: Tasks, config: TrainConfig, *, library: bool) -> None:
        """Attach one adapter, whose weights every user starts afresh.

        Args:
            base: Changed in place.
            tasks: The known tasks.
            config: As for the bank.
            library: Whether the blocks are computed as transformers does.
        """
        self._base, self._config = base, config
        self._encoder = encoder_of(base, tasks)
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(adapted_layers(base)))
        inject_adapter_in_model(lora, base.model)
        self._runner = Runner(base, library=library)
        self._weights = [p for p in base.model.parameters() if p.requires_grad]
        for weight in self._weights:
            weight.data = weight.data.float()

    def train(self, jobs: Sequence[Job], *, bucketed: bool, attention: str = ATTENTION[0]) -> float:
        """Train every user, logits only where there is a target.

        Args:
            jobs: One a user.
            bucketed: Whether a step's rows are run in groups of similar length.
            attention: One of ``ATTENTION``.

        Returns:
            The mean loss of all rows.
        """
        self._base.model.set_attn_implementation(attention)
        losses = [self._one(self._encoder.targets(job), seed, bucketed=bucketed) for seed, job in enumerate(jobs)]
        return sum(losses) / len(losses)

    def _one(self, targets: Sequence[Target], seed: int, *, bucketed: bool) -> float:
        self._start(seed)
        batches = [targets[at : at + self._config.batch] for at in range(0, len(targets), self._config.batch)]
        steps = self._config.passes * len(batches)
        optimizer, schedule = _optimizer(self._weights, self._config, steps, fused=True)
        total = torch.zeros((), device=self._base.device)  # read at the end: a GPU's queue runs dry at each look
        for step in range(steps):
            batch = batches[step % len(batches)]
            lengths = [len(target.ids) for target in batch]
            groups = buckets(lengths, self._runner.tokens) if bucketed else [list(range(len(batch)))]
            for group in groups:
                with torch.autocast(self._base.device.type, dtype=torch.bfloat16, enabled=self._half):
                    losses = target_losses(self._runner, [batch[at] for at in group], [0] * len(group))
                torch.autograd.backward(losses.sum() / len(batch))
                total += losses.detach().sum()
            torch.nn.utils.clip_grad_norm_(self._weights, _CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return float(total) / (self._config.passes * len(targets))

    @property
    def _half(self) -> bool:
        return self._base.dtype == torch.bfloat16

    def _start(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self._base.model.named_parameters():
                if "lora_A" in name:
                    bound = weight.shape[1] ** -0.5
                    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
                elif "lora_B" in name:
                    weight.zero_()


def train_as_oppu(base: LoadedBase, encoder: Encoder, jobs: Sequence[Job], config: TrainConfig) -> None:
    """Train every user as OPPU's code does."""
    prompts = base.prompts()
    for job in jobs:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.05,
            target_modules=list(find_targets(base.model, None)),
        )
        model = get_peft_model(base.model, lora)
        weights = [p for p in model.parameters() if p.requires_grad]
        heads = encoder.prompts(job, [0] * len(job))
        answers = prompts.continuations(example.output for example in job)
        rows = [(head, (*answers[e.output], prompts.end)) for head, e in zip(heads, job, strict=True)]
        batches = [rows[at : at + config.batch] for at in range(0, len(rows), config.batch)]
        optimizer, schedule = _optimizer(weights, config, config.passes * len(batches))
        for batch in batches * config.passes:
            out = model(**padded(batch, base.device), use_cache=False)
            torch.autograd.backward(out.loss)
            torch.nn.utils.clip_grad_norm_(weights, _CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.unload()


def encoder_of(base: LoadedBase, tasks: Tasks) -> Encoder:
    """Return what turns examples into token sequences for a base, as the service does by default."""
    settings = ModelSettings()
    return Encoder(base.prompts(), tasks, max_tokens=settings.max_tokens, max_positions=base.max_positions)


def _optimizer(
    weights: Sequence[torch.Tensor], config: TrainConfig, steps: int, *, fused: bool | None = None
) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
    rise = max(1, math.ceil(_WARM_UP_SHARE * steps))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rise))


def padded(batch: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch of prompts and answers as the model's arguments, each ``[n, longest] int64`` on the device; the
    loss is of the answers."""
    longest = max(len(head) + len(answer) for head, answer in batch)
    ids, labels, mask = [], [], []
    for head, answer in batch:
        blank = longest - len(head) - len(answer)
        ids.append([*head, *answer, *[0] * blank])
        labels.append([*[_IGNORED] * len(head), *answer, *[_IGNORED] * blank])
        mask.append([1] * (longest - blank) + [0] * blank)
    fields = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: sent(values, device) for name, values in fields.items()}
