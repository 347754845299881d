"""Serving: a batch of rows of many users through the bank, against the base alone and against PEFT's two ways.

First checks that all of them compute the same logits, for rows of equal length and for prompts as they come. The base
is run as a user of transformers would, and well: through the bank's own ``Runner``, packed matrices and shared rows
included, with every row in slot 0, so that ``ratio_to_well_run_base`` is what adapters cost and nothing else. PEFT's
adapters are in float32, its default, and over another base in the base's type too; each of its ways is compared in the
faster one. ``sweep_users`` keeps the rows and varies how many users they belong to; there another ratio is to one user,
and PEFT is not run.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.bank_train import jobs_of
from benchmarks.subjects import Banked, Decoder, Peft, banked, bare, inputs_of, random_adapter
from benchmarks.timing import REPEATS, Cell, Timing, interleaved, rounded, type_name
from benchmarks.train_at_once import NOT_MEASURED, Device
from oppu.errors import FatalError
from oppu.lm.base import LoadedBase
from oppu.lm.encoding import Encoder
from oppu.settings import ModelSettings
from oppu.tasks import Tasks

_Case = Callable[[], torch.Tensor]
_Ways = tuple[_Case, dict[str, _Case]]
"""The bank's, and the others by name."""
CACHED = 32
"""Tokens before the one that is decoded where ``tokens`` is 1; every other length is a prompt read at once."""
DECODED = 16
"""Steps of one batch, a short answer: what is done once a batch, the bank's gather, is spread over them. To give all
users their next token, as one step of the bank does, PEFT's loop switches at every one; beside it stands the loop that
finishes a user's whole answer before it begins the next one's, which lets the last user wait for all others."""
SWITCHED = 2
"""Steps of the loop that switches for every token."""
TOKENS, RANKS = (1, 8, 32, 96), (8, 16)
ROWS, WIDE_ROWS = 64, 1024
USERS, WIDE_TOKENS = (1, 4, 16, 64, 256, 1024), (1, 32)
GPU_USERS = 4096
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of logits to PEFT's, over the largest logit; both sum in their own order."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What is swept."""

    tokens: Sequence[int] = TOKENS
    ranks: Sequence[int] = RANKS
    users: Sequence[int] = USERS
    wide_tokens: Sequence[int] = WIDE_TOKENS
    repeats: int = REPEATS


def against_others(base: LoadedBase, scope: Scope) -> Iterator[dict[str, Cell]]:
    """Measure 64 rows of 64 users.

    Args:
        base: The base.
        scope: What is swept.

    Yields:
        One row a rank and length.

    Raises:
        FatalError: Bank and PEFT disagree.
    """
    for rank in scope.ranks:
        subject, pefts = _subjects(base, rank)
        for tokens in scope.tokens:
            decodes = tokens == 1
            ways = _decoding(base, subject, pefts) if decodes else _reading(base, subject, pefts, _ids(ROWS, tokens))
            yield {"rows": ROWS, "tokens": tokens, **_compared(subject, pefts, ways, scope.repeats, decodes=decodes)}
        subject.close()


def on_prompts(base: LoadedBase, tasks: Tasks, scope: Scope) -> dict[str, Cell]:
    """Measure 64 prompts of 64 users, of the unequal lengths that events have; others pad them to the longest.

    Args:
        base: The base.
        tasks: The known tasks.
        scope: Its first rank is taken.

    Returns:
        A row, ``tokens`` being the mean.

    Raises:
        FatalError: Bank and PEFT disagree.
    """
    settings = ModelSettings()
    encoder = Encoder(base.prompts(), tasks, max_tokens=settings.max_tokens, max_positions=base.max_positions)
    prompts = encoder.prompts([one for [one] in jobs_of(ROWS, 1, tasks)], [1] * ROWS)
    subject, pefts = _subjects(base, scope.ranks[0])
    found = _compared(subject, pefts, _reading(base, subject, pefts, prompts), scope.repeats)
    subject.close()
    lengths = [len(prompt) for prompt in prompts]
    mean = rounded(sum(lengths) / ROWS)
    return {"rows": ROWS, "tokens": mean, "shortest": min(lengths), "longest": max(lengths), **found}


def _subjects(base: LoadedBase, rank: int) -> tuple[Banked, dict[str, Peft]]:
    """Return a bank of as many users as rows, and the same adapters in PEFT, by their type."""
    subject = banked(base, slots=ROWS, rank=rank, alpha=2 * rank)
    adapters = [random_adapter(subject.bank, seed) for seed in range(ROWS)]
    types = ["float32"] if base.dtype == torch.float32 else ["float32", type_name(base.dtype)]
    made = {dtype: Peft(base, adapters, rank=rank, alpha=2 * rank, widened=dtype == "float32") for dtype in types}
    return subject, made


def sweep_users(base: LoadedBase, scope: Scope, gpu: Device | None, *, rank: int = 8) -> Iterator[dict[str, Cell]]:
    """Measure 1,024 rows (or as many as there are users) of 1 to so many users, and a GPU's memory; yields one row
    each."""
    rows = max(WIDE_ROWS, *scope.users)
    subject = banked(base, slots=max(scope.users), rank=rank, alpha=2 * rank, distinct=ROWS)
    for tokens in scope.wide_tokens:
        ids = _ids(rows, tokens)
        inputs = inputs_of(base, ids)

        def run(count: int, ids: list[tuple[int, ...]] = ids) -> object:
            return subject.run(ids, sorted(1 + row % count for row in range(rows)))  # as the service sorts its rows

        cases = {str(count): (lambda count=count, run=run: run(count)) for count in scope.users}
        bases = {
            "base": lambda inputs=inputs: bare(base, inputs),
            "well run": lambda ids=ids: subject.run(ids, [0] * rows),
        }
        times = interleaved({**bases, **cases}, repeats=scope.repeats)
        for count in scope.users:
            yield {
                "rows": rows,
                "tokens": tokens,
                "distinct_users": count,
                "rank": rank,
                "ratio_to_base": _ratio(times["base"], times[str(count)]),
                "ratio_to_well_run_base": _ratio(times["well run"], times[str(count)]),
                "ratio_to_peft_set_adapter": None,
                "ratio_to_peft_adapter_names": None,
                "ratio_to_one_user": _ratio(times[str(scope.users[0])], times[str(count)]),
                "memory_bytes": gpu.peak(cases[str(count)]) if gpu else NOT_MEASURED,
                "spread": rounded(times[str(count)].spread),
            }
    subject.close()


def bytes_moved(base: LoadedBase, rows: int, rank: int) -> int:
    """Return the adapter bytes that a batch of so many users has to read once."""
    subject = banked(base, slots=1, rank=rank, alpha=2 * rank)
    size = subject.bank.bytes // 2 * rows  # half of it is the zero adapter
    subject.close()
    return size


def _compared(
    subject: Banked, pefts: Mapping[str, Peft], ways: _Ways, repeats: int, *, decodes: bool = False
) -> dict[str, Cell]:
    own, cases = ways
    for name in [name for name in cases if name.startswith(("names", "set"))]:
        _agree(own(), cases[name](), name)
    taken = interleaved({"bank": own, **cases}, repeats=repeats)
    times = {name: time.each(_steps(name) if decodes else 1) for name, time in taken.items()}
    names, names_type = fastest(times, "names", pefts)
    switching, switching_type = fastest(times, "set each" if decodes else "set", pefts)
    answers, _ = fastest(times, "set", pefts)
    return {
        "distinct_users": ROWS,
        "rank": subject.bank.rank,
        "ratio_to_base": _ratio(times["base"], times["bank"]),
        "ratio_to_well_run_base": _ratio(times["well run"], times["bank"]),
        "ratio_to_peft_set_adapter": _ratio(switching, times["bank"]),
        "ratio_to_peft_set_adapter_each_answer": _ratio(answers, times["bank"]) if decodes else None,
        "ratio_to_peft_adapter_names": _ratio(names, times["bank"]),
        "set_adapter_type": switching_type,
        "adapter_names_type": names_type,
        "milliseconds": rounded(1000 * times["bank"].median),
        "spread": rounded(times["bank"].spread),
        "spread_base": rounded(times["base"].spread),
        "spread_well_run_base": rounded(times["well run"].spread),
        "spread_set_adapter": rounded(switching.spread),
        "spread_adapter_names": rounded(names.spread),
    }


def fastest(times: Mapping[str, Timing], way: str, types: Iterable[str]) -> tuple[Timing, str]:
    """Return PEFT's timing in the type of its adapters in which it is fastest, and that type.

    Args:
        times: By way and type.
        way: One of PEFT's.
        types: At least one.

    Returns:
        Timing and type.
    """
    found = min(types, key=lambda dtype: times[f"{way} {dtype}"].median)
    return times[f"{way} {found}"], found


def _steps(name: str) -> int:
    return SWITCHED if name.startswith("set each") else DECODED


def _reading(base: LoadedBase, subject: Banked, pefts: Mapping[str, Peft], ids: Sequence[tuple[int, ...]]) -> _Ways:
    """Read prompts: scoring, and the start of a generation."""
    users, inputs = list(range(ROWS)), inputs_of(base, ids)
    cases: dict[str, _Case] = {
        "base": lambda: bare(base, inputs),
        "well run": lambda: subject.run(ids, [0] * ROWS),
    }
    for dtype, peft in pefts.items():
        cases |= {
            f"names {dtype}": functools.partial(peft.by_adapter_names, inputs, users),
            f"set {dtype}": functools.partial(peft.by_set_adapter, inputs, users),
        }
    return lambda: subject.run(ids, [1 + user for user in users]), cases


def _decoding(base: LoadedBase, subject: Banked, pefts: Mapping[str, Peft]) -> _Ways:
    """Decode one token after a cached prompt, again and again in one batch as generation does."""
    ids = _ids(ROWS, CACHED + 1)
    tensor = torch.tensor(ids, device=base.device)
    own = subject.decoder(ids, [1 + row for row in range(ROWS)])
    plain, well_run = Decoder(base.model, tensor, nullcontext), subject.decoder(ids, [0] * ROWS)
    cases: dict[str, _Case] = {
        "base": lambda: plain.run(DECODED),
        "well run": lambda: well_run.run(DECODED),
    }
    for dtype, peft in pefts.items():
        cases |= {
            f"names {dtype}": peft.decode_by_adapter_names(tensor, DECODED),
            f"set {dtype}": peft.decode_by_set_adapter(tensor, DECODED),
            f"set each {dtype}": peft.decode_by_set_adapter(tensor, SWITCHED, each_token=True),
        }
    return lambda: own.run(DECODED), cases


def _agree(own: torch.Tensor, other: torch.Tensor, name: str) -> None:
    difference = float((own.float() - other.float()).abs().max() / other.float().abs().max())
    allowed = AGREEMENT[other.dtype]
    if difference > allowed:
        raise FatalError(f"bank and PEFT's {name} differ by {difference:.2g} of the largest logit, over {allowed:g}")


def _ids(rows: int, tokens: int) -> list[tuple[int, ...]]:
    drawn = np.random.default_rng(tokens).integers(1000, 20_000, size=(rows, tokens))
    return [tuple(int(token) for token in row) for row in drawn]


def _ratio(baseline: Timing, own: Timing) -> float:
    return rounded(baseline.median / own.median)
