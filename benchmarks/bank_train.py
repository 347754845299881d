"""Training: many users' adapters through the bank, against a loop over PEFT adapters, one rung of a ladder at a time.

Every rung takes the same optimizer steps on the same rows, apart from the update, which learns the new events and some
older ones instead of the whole history. OPPU's way is a fresh PEFT adapter a user, on all blocks, logits over the
vocabulary at every position, and batches padded to their longest row, in float32. The well-run PEFT loop is what a user
of PEFT can have: logits at targets only, length buckets where they are faster, AdamW's fused kernel; its blocks are the
library's. The next rung is the same loop through the bank's ``Runner``, which computes the last block at targets only
too, and short bfloat16 attention in plain products; the bank adds nothing but that users share the forwards. Ratios are
of one type, float32, unless their name ends in another. None of them saves what it trained.
"""

import functools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from benchmarks.subjects import adapted_layers, base_named
from benchmarks.timing import REPEATS, Cell, Timing, interleaved, rounded
from oppu.cli.demo import read_sample
from oppu.errors import ConfigError, FatalError
from oppu.lm.base import LoadedBase
from oppu.lm.encoding import Encoder, Target
from oppu.lm.forward import Runner, buckets, target_losses
from oppu.lm.model import TorchModel
from oppu.lm.port import Example, TrainConfig, TrainJob
from oppu.lm.targets import find_targets
from oppu.settings import ModelSettings, UpdaterSettings
from oppu.tasks import Tasks
from oppu.values import UserId

RANK, ALPHA = 8, 16
HISTORY, NEW = 200, 16
OPPU_PASSES = 2
"""Epochs of OPPU's released code; the paper's hyper-parameters are its own."""
CASES: Mapping[str, tuple[int, int]] = {"one user": (1, HISTORY), "many users": (16, NEW)}
MIXED = (64, 128, 4)
"""Users of unequal histories: how many, the events of the first, the fewest; the k-th has 1/k of the first's."""
GROUP = 16
UPPER = 0.5
"""Share of the blocks that the last rung adapts, as ``model.lora_upper``: cheaper, and less accurate (docs/results.md).
"""
_WARM_UP_SHARE, _CLIP_NORM, _IGNORED = 0.1, 1.0, -100
AGREEMENT = 0.02
"""Relative difference of mean losses between bank and PEFT, float32: over many steps Adam magnifies rounding."""

Job = tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Subjects:
    """The base in both types, each with PEFT's and the bank's way to train; ``narrowed`` loops compute the last block
    at targets only, ``uppers`` adapt the upper half only."""

    loops: Mapping[str, "PeftLoop"]
    narrowed: Mapping[str, "PeftLoop"]
    banks: Mapping[str, TorchModel]
    uppers: Mapping[str, TorchModel]


def ladder(
    tasks: Tasks,
    *,
    repeats: int = REPEATS,
    cases: Mapping[str, tuple[int, int]] = CASES,
    mixed: tuple[int, int, int] = MIXED,
) -> dict[str, Any]:
    """Climb it.

    Args:
        tasks: The known tasks.
        repeats: Rounds.
        cases: Users and events each, by name.
        mixed: Users of unequal histories, as ``MIXED``.

    Returns:
        ``rows``, one a case and rung; ``examples_per_second_ratio`` by case and ``update_cost_ratio_to_oppu``, of the
        bank in float32 to OPPU's way (``..._bfloat16``: of the bank in bfloat16); and ``full_bank_ratio``, of slots
        that are filled again to groups that last as long as their longest user.

    Raises:
        FatalError: Bank and PEFT do not arrive at the same loss.
    """
    subjects = _subjects(tasks)
    rows: list[dict[str, Cell]] = []
    speed: dict[str, dict[str, float]] = {dtype: {} for dtype in _TYPES}
    for name, (users, events) in cases.items():
        jobs = _jobs(users, events, tasks)
        times = interleaved(_rungs(subjects, jobs, tasks), repeats=repeats)
        rows += shown(name, times, users * events * OPPU_PASSES)
        for dtype, ratios in speed.items():
            ratios[name] = rounded(times["oppu"].median / times[f"bank {dtype}"].median)
    full = interleaved(_turnover(subjects.banks["bfloat16"], tasks, mixed), repeats=repeats)
    cost = interleaved(_updates(subjects, tasks), repeats=repeats)
    return {
        "rows": rows,
        "examples_per_second_ratio": speed["float32"],
        "examples_per_second_ratio_bfloat16": speed["bfloat16"],
        **costs(cost, UpdaterSettings().users_per_tick),
        "full_bank_ratio": rounded(full["groups"].median / full["full"].median),
        "full_bank_spread": rounded(max(time.spread for time in full.values())),
    }


def costs(times: Mapping[str, Timing], users: int) -> dict[str, float]:
    """Return what OPPU's way takes for a user's update, over what the bank takes.

    Args:
        times: OPPU's way; in both types, so many users' updates ``together`` and one ``alone``.
        users: As many.

    Returns:
        A ratio for each of the bank's.
    """
    oppu = times["oppu"].median
    each = {
        f"update_cost_ratio_to_oppu{kind}{suffix}": times[f"{case} {dtype}"].median / count
        for kind, case, count in (("", "together", users), ("_one_user", "alone", 1))
        for suffix, dtype in (("", "float32"), ("_bfloat16", "bfloat16"))
    }
    return {name: rounded(oppu / seconds) for name, seconds in each.items()}


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
        self._encoder = _encoder(base, tasks)
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(adapted_layers(base)))
        inject_adapter_in_model(lora, base.model)
        self._runner = Runner(base, library=library)
        self._weights = [p for p in base.model.parameters() if p.requires_grad]
        for weight in self._weights:
            weight.data = weight.data.float()

    def train(self, jobs: Sequence[Job], *, bucketed: bool) -> float:
        """Train every user, logits only where there is a target; return the mean loss of all rows."""
        losses = [self._one(self._encoder.targets(job), seed, bucketed=bucketed) for seed, job in enumerate(jobs)]
        return sum(losses) / len(losses)

    def _one(self, targets: Sequence[Target], seed: int, *, bucketed: bool) -> float:
        self._start(seed)
        batches = [targets[at : at + self._config.batch] for at in range(0, len(targets), self._config.batch)]
        steps = self._config.passes * len(batches)
        optimizer, schedule = _optimizer(self._weights, self._config, steps, fused=True)
        total = 0.0
        for step in range(steps):
            batch = batches[step % len(batches)]
            groups = buckets([len(t.ids) for t in batch]) if bucketed else [list(range(len(batch)))]
            for group in groups:
                with torch.autocast(self._base.device.type, dtype=torch.bfloat16, enabled=self._half):
                    losses = target_losses(self._runner, [batch[at] for at in group], [0] * len(group))
                torch.autograd.backward(losses.sum() / len(batch))
                total += float(losses.detach().sum())
            torch.nn.utils.clip_grad_norm_(self._weights, _CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return total / (self._config.passes * len(targets))

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
            out = model(**_padded(batch), use_cache=False)
            torch.autograd.backward(out.loss)
            torch.nn.utils.clip_grad_norm_(weights, _CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.unload()


def accuracies(results: Path | None) -> dict[str, Cell]:
    """Read what increments and full training reach from ``oppu evaluate``'s result of ``news_categorize``.

    Args:
        results: The JSON file, if any.

    Returns:
        ``accuracy``, ``accuracy_oppu`` and the lower bound of their difference; ``None``: not measured.

    Raises:
        ConfigError: It is not such a file.
    """
    names = ("accuracy", "accuracy_oppu", "accuracy_difference_low")
    if results is None:
        return dict.fromkeys(names)
    try:
        content = json.loads(results.read_text(encoding="utf-8"))
        test = content["tests"]["increments up to the cut - oppu"]
        arms = content["arms"]
        return dict(zip(names, (arms["frozen"]["query_mean"], arms["oppu"]["query_mean"], test["ci"][0]), strict=True))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"--results: expected a result of oppu evaluate: {error!r}") from error


def _subjects(tasks: Tasks) -> Subjects:
    config = _config()
    settings = ModelSettings(lora_rank=RANK, lora_alpha=ALPHA)
    upper = settings.model_copy(update={"lora_upper": UPPER})
    bases = {dtype: [base_named("offline", device="cpu", dtype=dtype) for _ in range(4)] for dtype in _TYPES}
    return Subjects(
        loops={dtype: PeftLoop(own[0], tasks, config, library=True) for dtype, own in bases.items()},
        narrowed={dtype: PeftLoop(own[3], tasks, config, library=False) for dtype, own in bases.items()},
        banks={dtype: TorchModel(own[1], tasks, settings=settings, slots=1) for dtype, own in bases.items()},
        uppers={dtype: TorchModel(own[2], tasks, settings=upper, slots=1) for dtype, own in bases.items()},
    )


_TYPES = ("float32", "bfloat16")


def _rungs(subjects: Subjects, jobs: Sequence[Job], tasks: Tasks) -> dict[str, Callable[[], object]]:
    config, plain = _config(), base_named("offline", device="cpu", dtype="float32")
    encoder = _encoder(plain, tasks)
    _agree(subjects, jobs)
    rungs: dict[str, Callable[[], object]] = {"oppu": lambda: train_as_oppu(plain, encoder, jobs, config)}
    for dtype in _TYPES:
        loop, bank, upper = subjects.loops[dtype], subjects.banks[dtype], subjects.uppers[dtype]
        narrowed = subjects.narrowed[dtype]
        rungs |= {
            f"targets only {dtype}": functools.partial(loop.train, jobs, bucketed=False),
            f"length buckets {dtype}": functools.partial(loop.train, jobs, bucketed=True),
            f"last block at targets {dtype}": functools.partial(narrowed.train, jobs, bucketed=True),
            f"bank {dtype}": functools.partial(_banked, bank, jobs, config),
            f"bank, upper half of the blocks {dtype}": functools.partial(_banked, upper, jobs, config),
        }
    return rungs


def _turnover(model: TorchModel, tasks: Tasks, mixed: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """Users of unequal histories in any order: in groups of as many as there are slots, or in one call."""
    users, most, fewest = mixed
    longest = _jobs(users, most, tasks)
    jobs = [job[: max(fewest, most // (rank + 1))] for rank, job in enumerate(longest)]
    random.Random(0).shuffle(jobs)  # noqa: S311 - order of users, not a secret
    groups = [jobs[at : at + GROUP] for at in range(0, users, GROUP)]
    return {
        "groups": lambda: [_banked(model, group, _config()) for group in groups],
        "full": lambda: _banked(model, jobs, _config()),
    }


def _updates(subjects: Subjects, tasks: Tasks) -> dict[str, Callable[[], object]]:
    """An update with 16 new events on 200: all of them again, or the new ones beside some older ones."""
    own = UpdaterSettings()
    config = TrainConfig(own.learning_rate, own.weight_decay, own.passes, own.batch)
    plain = base_named("offline", device="cpu", dtype="float32")
    encoder = _encoder(plain, tasks)
    whole, part = _jobs(1, HISTORY + NEW, tasks), _jobs(own.users_per_tick, NEW + own.replay, tasks)
    found: dict[str, Callable[[], object]] = {"oppu": lambda: train_as_oppu(plain, encoder, whole, _config())}
    for dtype, bank in subjects.banks.items():
        for case, jobs in (("together", part), ("alone", part[:1])):
            found[f"{case} {dtype}"] = functools.partial(_banked, bank, jobs, config)
    return found


def _agree(subjects: Subjects, jobs: Sequence[Job]) -> None:
    loop = subjects.loops["float32"].train(jobs, bucketed=True)
    bank = _banked(subjects.banks["float32"], jobs, _config())
    if abs(loop - bank) > AGREEMENT * loop:
        raise FatalError(f"mean loss over training: PEFT {loop:.5f}, bank {bank:.5f}")


def _banked(model: TorchModel, jobs: Sequence[Job], config: TrainConfig) -> float:
    work = [TrainJob(UserId(f"u{at}"), None, job, at) for at, job in enumerate(jobs)]
    done = model.train(work, config, heartbeat=lambda: None)
    return math.fsum(result.mean_loss for result in done) / len(done)


def _encoder(base: LoadedBase, tasks: Tasks) -> Encoder:
    settings = ModelSettings()
    return Encoder(base.prompts(), tasks, max_tokens=settings.max_tokens, max_positions=base.max_positions)


def _jobs(users: int, events: int, tasks: Tasks) -> list[Job]:
    sample = read_sample()
    rows = [Example(e.task, e.input, e.output, tasks.require(e.task).allowed(e.choices)) for e in sample.population]
    return [tuple(rows[(user * events + at) % len(rows)] for at in range(events)) for user in range(users)]


def _config() -> TrainConfig:
    return TrainConfig(learning_rate=1e-3, weight_decay=0.01, passes=OPPU_PASSES, batch=16)


def _optimizer(
    weights: Sequence[torch.Tensor], config: TrainConfig, steps: int, *, fused: bool | None = None
) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
    rise = max(1, math.ceil(_WARM_UP_SHARE * steps))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rise))


def _padded(batch: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    longest = max(len(head) + len(answer) for head, answer in batch)
    ids, labels, mask = [], [], []
    for head, answer in batch:
        blank = longest - len(head) - len(answer)
        ids.append([*head, *answer, *[0] * blank])
        labels.append([*[_IGNORED] * len(head), *answer, *[_IGNORED] * blank])
        mask.append([1] * (longest - blank) + [0] * blank)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def shown(case: str, times: Mapping[str, Timing], examples: int) -> list[dict[str, Cell]]:
    """Return a ladder's rows; the well-run PEFT loop is the faster of its two in the rung's own type.

    Args:
        case: Its name.
        times: By rung, whose last word is its type; OPPU's way is in float32.
        examples: Trained on in each.

    Returns:
        One row a rung.
    """
    rows: list[dict[str, Cell]] = []
    for name, time in times.items():
        dtype = "bfloat16" if name.endswith("bfloat16") else "float32"
        well_run = min(times[f"{loop} {dtype}"].median for loop in ("targets only", "length buckets"))
        rows.append(
            {
                "case": case,
                "rung": name,
                "examples_per_second": rounded(examples / time.median),
                "ratio_to_oppu": rounded(times["oppu"].median / time.median),
                "ratio_to_well_run_peft": rounded(well_run / time.median),
                "spread": rounded(time.spread),
            }
        )
    return rows
