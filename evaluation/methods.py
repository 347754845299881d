"""LoRA, IA3 and prompt tuning on the same footing: the same users, examples, order, passes and optimiser, by ``peft``.

A plain loop, one user after the other, with logits at the targets only. Each method has the same number of trials:
its learning rate is the one of ``RATES`` with which the calibrate users' adapters lose least on their later halves.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model

from evaluation.arms import Array
from evaluation.bases import Study, adapted
from evaluation.prompting import example
from evaluation.splits import Person
from evaluation.training import RATES, full_config, shuffled, stage
from evaluation.variants import best_rate, judges
from oppu.errors import ConfigError
from oppu.lm.base import LoadedBase, load_base
from oppu.lm.encoding import Encoder, Reading, Target
from oppu.lm.forward import Runner, target_buckets, target_losses
from oppu.lm.port import Example, TrainConfig
from oppu.lm.scoring import Trie, allowed_log_probs
from oppu.lm.sequence_packing import Layout
from oppu.lm.targets import find_targets
from oppu.lm.trunk import Memory
from oppu.settings import ModelSettings

METHODS = ("lora", "ia3", "prompt-tuning")
PREFIX = "peft-"
"""Before a method's name among the arms."""
VIRTUAL_TOKENS = 8
_WARM_UP_SHARE = 0.1
_COST = ""
"""Key of a stage's array that is no user's: rate, parameters, bytes, seconds a thousand examples."""


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method on a fold.

    Attributes:
        scores: ``[q, c]`` by user, as in ``Arms``.
        rate: The learning rate that was chosen.
        parameters: Of one user's module.
        bytes: Of its file.
        seconds: Of training, a thousand examples.
    """

    scores: Mapping[str, Array] = field(repr=False)
    rate: float
    parameters: int
    bytes: int
    seconds: float


def run_methods(study: Study) -> dict[str, MethodResult]:
    """Train and score every method on the plain base.

    Args:
        study: The fold and seed.

    Returns:
        Results by method.
    """
    return {name: _run(study, name) for name in METHODS}


def merged(parts: Sequence[Mapping[str, MethodResult]]) -> dict[str, dict[str, object]]:
    """Return each method's cost over folds: the rates chosen, parameters, bytes, and mean seconds."""
    return {
        name: {
            "rates": [part[name].rate for part in parts],
            "parameters": parts[0][name].parameters,
            "bytes": parts[0][name].bytes,
            "seconds": float(np.mean([part[name].seconds for part in parts])),
        }
        for name in (parts[0] if parts else ())
    }


def _run(study: Study, name: str) -> MethodResult:
    def compute() -> dict[str, Array]:
        with tuned(study, name) as tuner:
            rate = _best_rate(study, tuner)
            seconds, found, count = 0.0, {}, 0
            for person in study.fold.target:
                started = time.perf_counter()
                count += _train(study, tuner, person, rate)
                seconds += time.perf_counter() - started
                found[person.user_id] = tuner.scores([example(i) for i in person.test])
            cost = np.array([rate, tuner.parameters, tuner.bytes(), 1000 * seconds / max(1, count)])
            return {**found, _COST: cost}

    kept = stage(study, f"method-{name}", compute)
    rate, parameters, size, seconds = kept.pop(_COST)
    return MethodResult(kept, float(rate), int(parameters), int(size), float(seconds))


def _best_rate(study: Study, tuner: "Tuner") -> float:
    """Return the rate whose adapters lose least on the judges' later halves; without judges the recipe's."""
    people, losses = judges(study), []
    rates = [share * study.recipe.learning_rate for share in RATES]
    for rate in rates if people else []:
        total = 0.0
        for person in people:
            _train(study, tuner, person, rate)
            total += float(tuner.losses([example(i) for i in person.test if i.answered]).sum())
        losses.append(total)
    return best_rate(rates, losses) if losses else study.recipe.learning_rate


def _train(study: Study, tuner: "Tuner", person: Person, rate: float) -> int:
    """Train a user's module afresh; return how many examples were seen, each pass counted."""
    own = shuffled([example(i) for i in person.train], study.seed, person.user_id)
    tuner.train(own, replace(full_config(study.recipe), learning_rate=rate))
    return study.recipe.passes * len(own)


class Tuner:
    """One module on one base, trained for one user at a time."""

    def __init__(self, model: Any, runner: Runner, encoder: Encoder) -> None:
        """Take a PEFT model over a runner's base.

        Args:
            model: A ``PeftModel``; its trainable parameters as they are now are every user's beginning.
            runner: Runs that model.
            encoder: Examples to tokens.
        """
        self._model, self._runner, self._encoder = model, runner, encoder
        self._own = [p for p in model.parameters() if p.requires_grad]
        self._begin = [p.detach().clone() for p in self._own]

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self._own)

    def bytes(self) -> int:
        """Return the size of the module's file."""
        with TemporaryDirectory(prefix="oppu-method-") as folder:
            self._model.save_pretrained(folder)
            return (Path(folder) / "adapter_model.safetensors").stat().st_size

    def train(self, examples: Sequence[Example], config: TrainConfig) -> None:
        """Train from the beginning, as the bank does, but without dropout: AdamW, norm clipped, linear warm-up over a
        tenth of the steps, then a constant rate or one that falls to zero."""
        with torch.no_grad():
            for parameter, value in zip(self._own, self._begin, strict=True):
                parameter.copy_(value)
        targets = [t for t in self._encoder.targets(examples) if t.positions]
        batches = [targets[at : at + config.batch] for at in range(0, len(targets), config.batch)] * config.passes
        warm_up = max(1, math.ceil(_WARM_UP_SHARE * len(batches)))
        optimizer = torch.optim.AdamW(self._own, lr=config.learning_rate, weight_decay=config.weight_decay)
        linear = config.schedule == "linear"
        for step, part in enumerate(batches, start=1):
            falls = (len(batches) - step + 1) / max(1, len(batches) - warm_up) if linear else 1.0
            optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / warm_up, falls)
            for group in target_buckets(self._runner, part):
                losses = target_losses(self._runner, [part[at] for at in group], [0] * len(group))
                torch.autograd.backward(losses.sum() / len(part))
            torch.nn.utils.clip_grad_norm_(self._own, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def losses(self, examples: Sequence[Example]) -> Array:
        """Return each example's loss ``[n]``, nats: of the choice, or a token of a text."""
        targets: list[Target] = self._encoder.targets(examples)
        found = np.array([t.offset for t in targets])
        live = [at for at, t in enumerate(targets) if t.positions]
        for group in target_buckets(self._runner, [targets[at] for at in live]):
            members = [live[at] for at in group]
            part = target_losses(self._runner, [targets[at] for at in members], [0] * len(members))
            found[members] = part.double().cpu().numpy()
        return found

    def scores(self, examples: Sequence[Example]) -> Array:
        """Return ``[n, c]`` log probabilities of the choices, or ``[n, 1]`` minus the loss a token."""
        if not examples[0].choices:
            return -self.losses(examples)[:, None]
        rows = [self._choice(e, self._encoder.tries.of(e.choices)) for e in examples]
        table = np.full((len(rows), max(map(len, rows))), -np.inf)
        for into, row in zip(table, rows, strict=True):
            into[: len(row)] = row
        return table

    @torch.no_grad()
    def _choice(self, one: Example, trie: Trie) -> Array:
        [prompt] = self._encoder.prompts([one], [trie.depth])
        found: list[Array] = [np.zeros(0)] * len(trie.nodes)
        for line in trie.lines:
            positions = tuple(len(prompt) - 1 + len(trie.nodes[node].path) for node in line.nodes)
            logits = self._runner.logits([Reading(prompt + line.path, positions)])
            for node, row in zip(line.nodes, logits, strict=True):
                allowed = trie.nodes[node].allowed
                found[node] = allowed_log_probs(row[None].double(), allowed)[0].cpu().numpy()
        scores: Array = trie.scores(np.concatenate([np.zeros(0), *found])[None])[0]
        return scores


class _Prefixed(Runner):
    """Runs a model that puts virtual tokens before each sequence: every position lies so much further on."""

    def __init__(self, base: LoadedBase, model: Any) -> None:
        super().__init__(base)
        self.base, self.packs = replace(base, model=model), False  # a row has one prefix

    def logits(
        self, readings: Sequence[Reading], _memory: Memory | None = None, layouts: Sequence[Layout] = ()
    ) -> torch.Tensor:
        """Run sequences as ``Runner.logits`` does, their positions counted without the virtual tokens."""
        return super().logits(
            [replace(r, positions=tuple(at + VIRTUAL_TOKENS for at in r.positions)) for r in readings]
        )

    def given_positions(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return nothing: the model counts positions itself, from its first virtual token."""
        return {}


@contextmanager
def tuned(study: Study, name: str) -> Iterator[Tuner]:
    """Load the plain base with one method's module.

    Args:
        study: The fold and seed.
        name: One of ``METHODS``.

    Yields:
        The tuner; its base is this one's alone.

    Raises:
        ConfigError: The base has no layers that the method is known for.
    """
    settings = study.settings.model.model_copy(update={"base": str(adapted(study, "plain"))})
    base = load_base(settings)
    torch.manual_seed(study.seed)
    try:
        runner = Runner(base)
        model = get_peft_model(base.model, _config(name, base, settings)).eval()
    except ValueError as error:
        raise ConfigError(f"--methods: {name} does not fit this base: {error}") from error
    room = 0
    if name == "prompt-tuning":
        runner.close()
        runner, room = _Prefixed(base, model), VIRTUAL_TOKENS
    encoder = Encoder(
        base.prompts(), study.tasks, max_tokens=settings.max_tokens, max_positions=base.max_positions - room
    )
    try:
        yield Tuner(model, runner, encoder)
    finally:
        runner.close()


def _config(name: str, base: LoadedBase, settings: ModelSettings) -> PeftConfig:
    turned = base.model.config.model_type == "gpt2"
    if name == "ia3":
        return IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=turned)
    if name == "prompt-tuning":
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=int(settings.lora_alpha),
        target_modules=list(find_targets(base.model, settings.lora_targets, settings.lora_upper)),
        fan_in_fan_out=turned,
    )
