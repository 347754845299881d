"""Task adaption: OPPU's first stage, which fits the shared base to the tasks on other users' events.

``full`` trains every weight (the offline base also learns to read left to right here: the loss is the answer's
plus half a language-model loss on a share of the prompt's tokens); ``lora`` trains a LoRA and merges it. What is
written is a plain Hugging Face folder. The base handed in is changed in place and must not be used afterwards.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from oppu.errors import ConfigError
from oppu.lm.base import LoadedBase, fingerprint_of, quiet_and_local
from oppu.lm.encoding import Encoder, Reading, Target
from oppu.lm.forward import Runner
from oppu.lm.full_training import Descent, autocast, epoch, folder_problems, write
from oppu.lm.port import Example, is_bare
from oppu.lm.scoring import Aim, aim_log_probs
from oppu.lm.targets import find_targets
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from oppu.values import BaseId

_FROM = "from"
"""In a recipe: the base that it began with."""
_LANGUAGE_MODEL_WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    """The recipe. ``language_model_share`` of the prompt's tokens also carry a language-model loss; without
    ``answers`` that is all that is learnt: the causal warm-up, which sees no output."""

    method: Literal["full", "lora"] = "full"
    epochs: int = 2
    learning_rate: float = 5e-4
    batch: int = 32
    language_model_share: float = 0.3
    seed: int = 0
    answers: bool = True


@dataclass(frozen=True, slots=True)
class AdaptReport:
    """What was made: the new base's fingerprint and folder, and the answer loss of the first and last tenth."""

    base: BaseId
    folder: Path
    examples: int
    steps: int
    seconds: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True, slots=True)
class _Job:
    """What every step of a run needs."""

    runner: Runner
    config: AdaptConfig
    autocast: AbstractContextManager[Any]
    chance: random.Random


def adapt(
    base: LoadedBase,
    tasks: Tasks,
    examples: Sequence[Example],
    out_dir: Path,
    *,
    config: AdaptConfig,
    settings: ModelSettings,
    progress: Callable[[int, int, float], None] = lambda _done, _all, _loss: None,
) -> AdaptReport:
    """Train a base on many users' examples and write the result.

    Args:
        base: In float32; changed in place.
        tasks: The known tasks.
        examples: Of users who will not be personalized; with evidence or profile for those variants.
        out_dir: Must be absent, empty, or an earlier result, which is replaced.
        config: The recipe.
        settings: Prompt length and LoRA shape.
        progress: Told (steps done, steps in all, answer loss) after each step.

    Returns:
        What was made.

    Raises:
        ConfigError: No examples, a folder that is not ours, or a loss that is no longer finite.
    """
    _check(base, examples, out_dir)
    started = time.perf_counter()
    encoder = Encoder(base.prompts(), tasks, max_tokens=settings.max_tokens, max_positions=base.max_positions)
    pairs = [(e, t) for e, t in zip(examples, encoder.targets(examples), strict=True) if t.positions]
    if not pairs:
        raise ConfigError("adapt: every example has a single choice: nothing to learn")
    targets = [t if config.answers else _unanswered(e, t) for e, t in pairs]
    losses, model = _train(base, targets, config, settings, progress)
    _save(base, model, out_dir, {**asdict(config), _FROM: base.fingerprint, "examples": len(examples)})
    tenth = max(1, len(losses) // 10)
    return AdaptReport(
        base=fingerprint_of(out_dir),
        folder=out_dir,
        examples=len(examples),
        steps=len(losses),
        seconds=time.perf_counter() - started,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
    )


def _unanswered(example: Example, target: Target) -> Target:
    """Return what may be read of a target before any answer: its prompt, or the whole text where there is no pair."""
    ids = target.ids if is_bare(example) else target.ids[: target.prompt_tokens]
    return replace(target, ids=ids, prompt_tokens=len(ids), positions=(), aims=())


def _check(base: LoadedBase, examples: Sequence[Example], out_dir: Path) -> None:
    problems = []
    if not examples:
        problems.append("adapt: expected at least one example")
    if base.dtype not in (torch.float32, torch.float64):
        problems.append("model.dtype: task adaption needs float32 weights")
    problems += folder_problems(out_dir, _FROM)
    if problems:
        raise ConfigError(*problems)


def _train(
    base: LoadedBase,
    targets: Sequence[Target],
    config: AdaptConfig,
    settings: ModelSettings,
    progress: Callable[[int, int, float], None],
) -> tuple[list[float], Any]:
    """Run all steps; return each step's answer loss and the model to save."""
    model, parameters = _trainable(base, config, settings)
    chance = random.Random(config.seed)  # noqa: S311 - order of examples, not a secret
    lengths = [len(target.ids) for target in targets]
    batches = [b for _ in range(config.epochs) for b in epoch(lengths, config.batch, chance)]
    descent = Descent(parameters, config.learning_rate, len(batches))
    runner = Runner(base)
    job = _Job(runner, config, autocast(base.device, base.dtype), chance)
    losses = []
    try:
        for done, batch in enumerate(batches, start=1):
            losses.append(_step(job, [targets[at] for at in batch], descent))
            progress(done, len(batches), losses[-1])
    finally:
        runner.close()
        base.model.requires_grad_(False)
    return losses, (model.merge_and_unload() if config.method == "lora" else model)


def _trainable(base: LoadedBase, config: AdaptConfig, settings: ModelSettings) -> tuple[Any, list[torch.nn.Parameter]]:
    torch.manual_seed(config.seed)
    model: Any = base.model
    if config.method == "full":
        model.requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        names = list(find_targets(model, settings.lora_targets))
        shape = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=names,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        model = get_peft_model(model, shape).eval()
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def _step(job: _Job, batch: Sequence[Target], descent: Descent) -> float:
    """Take one optimizer step; return the batch's mean answer loss."""
    guesses = [_guesses(target, job) for target in batch]
    readings = [Reading(t.ids, (*t.positions, *more)) for t, more in zip(batch, guesses, strict=True)]
    aims: list[Aim] = []
    answer, guess = [], []
    guessed = max(1, sum(len(more) for more in guesses))
    for target, more in zip(batch, guesses, strict=True):
        aims += [*target.aims, *(Aim(None, target.ids[at + 1]) for at in more)]
        answer += [target.scale / len(batch)] * len(target.aims) + [0.0] * len(more)
        guess += [0.0] * len(target.aims) + [_LANGUAGE_MODEL_WEIGHT / guessed] * len(more)
    with job.autocast:
        logits = job.runner.logits(readings)
    log_probs = aim_log_probs(logits, aims)
    answer_weights, guess_weights = (torch.tensor(x).to(log_probs) for x in (answer, guess))
    torch.autograd.backward(-(log_probs * (answer_weights + guess_weights)).sum())
    if not descent.step():
        raise ConfigError("adapt: the loss is no longer finite: lower the learning rate")
    return float(-(log_probs.detach() * answer_weights).sum())


def _guesses(target: Target, job: _Job) -> list[int]:
    """Choose the prompt positions that also carry a language-model loss."""
    places = range(target.prompt_tokens - 1)
    count = round(job.config.language_model_share * len(places))
    return sorted(job.chance.sample(places, count))


def _save(base: LoadedBase, model: Any, out_dir: Path, recipe: dict[str, object]) -> None:
    def save(folder: str) -> None:
        with quiet_and_local():
            model.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)

    write(out_dir, save, recipe)
