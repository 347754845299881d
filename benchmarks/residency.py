"""Residency: far more adapters on disk than slots in the bank, drawn as users come.

Batches run through the inference worker's own shelf, host cache, registry and bank; the next batches' adapters are
expected while one is computed, as the worker does with the rest of a poll. Baseline: the same batches drawn from users
who all fit into the slots. Throughput counts rows under their own adapter: who is late, and gets the base alone, is not
served. The files were written just before, so where memory suffices they lie in the page cache: what is measured is
reading and installing them, not a disk.
"""

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.subjects import Banked, banked, random_adapter
from benchmarks.timing import REPEATS, Cell, Timing, rounded
from inference.adapters import AdapterShelf
from inference.host_cache import HostCache
from inference.readers import Readers
from oppu.cli.compose import ADAPTER_READERS
from oppu.clock import SystemClock
from oppu.lm.base import LoadedBase
from oppu.lm.port import AdapterRef, Tensors
from oppu.lm.residence import AdapterBank
from oppu.metrics import fresh
from oppu.privacy import UserHash
from oppu.registry import AdapterRegistry
from oppu.values import BaseId, Head, UserId, UserState

ROWS, RANK, ALPHA = 64, 8, 16
AHEAD = 15
"""Batches whose adapters are expected beside the one that runs: a poll has up to 1,000 requests."""
LONG_TOKENS = 32
"""From so many tokens a row the model takes most of the time: fewer combinations show it."""
LOOK_UPS = 200
KEY = b"benchmark-benchmark-benchmark-32"


@dataclass(frozen=True, slots=True)
class Draw:
    """How users come: by Zipf's law with exponent ``s``, uniformly where that is 0."""

    s: float

    @property
    def name(self) -> str:
        """For the table."""
        return f"zipf {self.s:g}" if self.s else "uniform"

    def batches(self, users: int, count: int, seed: int) -> list[list[int]]:
        """Return ``count`` batches of user numbers."""
        weights = np.arange(1, users + 1, dtype=np.float64) ** -self.s
        chosen = np.random.default_rng(seed).choice(users, size=(count, ROWS), p=weights / weights.sum())
        return [[int(user) for user in row] for row in chosen]


@dataclass(frozen=True, slots=True)
class Scope:
    """What is swept."""

    slots: int = 256
    adapters: int = 25_600
    sets: tuple[int, ...] = (1, 4, 16, 100)
    tokens: Sequence[int] = (1, 96)
    draws: Sequence[Draw] = (Draw(1.0), Draw(0.8), Draw(0.0))
    batches: int = 24
    repeats: int = REPEATS


def measure(base: LoadedBase, scope: Scope, say: Callable[[str], None]) -> Iterator[dict[str, Cell]]:
    """Fill a registry on disk and run every combination; yields one row each."""
    with tempfile.TemporaryDirectory(prefix="oppu-residency-") as folder:
        subject = banked(base, slots=scope.slots, rank=RANK, alpha=ALPHA, distinct=1)
        registry = _registry(base.fingerprint, folder)
        registry.open(in_use=())
        began = time.monotonic()
        _fill(registry, subject, scope.adapters)
        say(f"{scope.adapters} adapters written in {time.monotonic() - began:.0f} s")
        for tokens in scope.tokens:
            ids = _ids(tokens)
            whole = tokens < LONG_TOKENS
            draws, sets = (scope.draws, scope.sets) if whole else (scope.draws[:1], scope.sets[:1] + scope.sets[-1:])
            for draw, times in itertools.product(draws, sets):
                yield _row(subject, registry, scope, ids, draw, times)
        subject.close()


def growth(base: LoadedBase, counts: Sequence[int], say: Callable[[str], None]) -> Iterator[dict[str, Cell]]:
    """Register more and more small adapters; yields what opening, a look-up and memory cost at each count, each in a
    process of its own, whose memory has not grown by writing."""
    with tempfile.TemporaryDirectory(prefix="oppu-registered-") as folder:
        small = {"weight": np.ones((1, 8), dtype=np.float32)}
        writer, done = _registry(base.fingerprint, folder), 0
        writer.open(in_use=())
        for count in sorted(counts):
            for number in range(done, count):
                writer.write(_ref(number), small, parent=None, trained_through=1, metrics={}, token=1)
            done = count
            say(f"{count} adapters registered")
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
                yield fresh_process.submit(look_up, base.fingerprint, folder, count).result()


def look_up(base: BaseId, folder: str, count: int) -> dict[str, Cell]:
    """Open a registry of so many adapters and load some of them.

    Args:
        base: Fingerprint of their base.
        folder: Where they lie.
        count: As many as there are.

    Returns:
        What each took, and by how much the process has grown.
    """
    _registry(base, folder).load(_ref(0))  # what the libraries load at their first call is no registry's
    before, began = resident_bytes(), time.perf_counter()
    reader = _registry(base, folder)
    opened = time.perf_counter() - began
    chosen = np.random.default_rng(0).integers(0, count, size=LOOK_UPS)
    began = time.perf_counter()
    for number in chosen:
        reader.load(_ref(int(number)))
    return {
        "registered": count,
        "open_milliseconds": rounded(1000 * opened),
        "load_milliseconds": rounded(1000 * (time.perf_counter() - began) / len(chosen)),
        "grown_mib": rounded((resident_bytes() - before) / 2**20),
    }


def resident_bytes() -> int:
    """Return what this process has in memory now; its high-water mark would hide what earlier work had raised it to."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class _Model:
    """As much of a language model as the shelf asks for."""

    subject: Banked
    slots: AdapterBank = field(init=False)

    def __post_init__(self) -> None:
        self.slots = AdapterBank(self.subject.bank)

    @property
    def bank_bytes(self) -> int:
        return self.subject.bank.bytes

    def resident(self, ref: AdapterRef) -> bool:
        return ref in self.slots

    def touch(self, refs: Iterable[AdapterRef]) -> None:
        self.slots.touch(refs)

    def install(self, ref: AdapterRef, tensors: Tensors) -> None:
        self.slots.install(ref, tensors)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: the seconds of each batch that counts, rows in all and late ones, and what was found where."""

    seconds: tuple[float, ...]
    rows: int
    late: int
    hits: float = 0.0
    host_hits: float = 0.0

    @property
    def row_seconds(self) -> float:
        """Seconds a row that was served with its own adapter."""
        return sum(self.seconds) / max(1, self.rows - self.late)


def compared(own: Sequence[Run], resident: Sequence[Run]) -> dict[str, Cell]:
    """Compare runs with those whose adapters are all resident.

    Args:
        own: At least one.
        resident: As many.

    Returns:
        Ratio and spreads of the throughput, medians of the shares, and the slowest batch of all runs.
    """
    time, baseline = (Timing(tuple(run.row_seconds for run in runs)) for runs in (own, resident))
    batches = [seconds for run in own for seconds in run.seconds]
    return {
        "throughput_ratio_to_resident": rounded(baseline.median / time.median),
        "spread": rounded(time.spread),
        "spread_resident": rounded(baseline.spread),
        "bank_hit_rate": rounded(statistics.median(run.hits for run in own)),
        "host_hit_rate_of_misses": rounded(statistics.median(run.host_hits for run in own)),
        "late_share": rounded(sum(run.late for run in own) / sum(run.rows for run in own)),
        "slowest_batch_to_mean": rounded(max(batches) / statistics.fmean(batches)),
    }


def _row(
    subject: Banked, registry: AdapterRegistry, scope: Scope, ids: Sequence[tuple[int, ...]], draw: Draw, times: int
) -> dict[str, Cell]:
    users = min(scope.slots * times, scope.adapters)
    own, resident = [], []
    for seed in range(scope.repeats):
        own.append(_run(subject, registry, ids, draw.batches(users, scope.batches, seed)))
        resident.append(_run(subject, registry, ids, draw.batches(scope.slots, scope.batches, seed)))
    return {
        "tokens": len(ids[0]), "draw": draw.name, "working_set": times, "users": users, **compared(own, resident)
    }  # fmt: skip


def _run(
    subject: Banked, registry: AdapterRegistry, ids: Sequence[tuple[int, ...]], batches: Sequence[Sequence[int]]
) -> Run:
    """Run batches from the state of a worker that has been running: its slots full of the most frequent users, and a
    third of the batches run before it counts."""
    metrics, clock, model = fresh(), SystemClock(), _Model(subject)
    cache = HostCache(
        registry,
        capacity=1024,
        readers=Readers(ADAPTER_READERS),
        on_hit=metrics.bank_events.labels("host_hit").inc,
    )
    shelf = AdapterShelf(cache, cast(Any, model), cast(Any, None), metrics, clock, wait_seconds=0.25)
    warm = len(batches) // 3
    for first in range(0, subject.bank.slots, ROWS):
        shelf.place([_state(user) for user in range(first, min(first + ROWS, subject.bank.slots))])
    seconds: list[float] = []
    late: list[int] = []
    before: dict[str, float] = {}
    for number, batch in enumerate(batches):
        if number == warm:
            before = _counts(metrics)
        began = time.perf_counter()
        if number % (AHEAD + 1) == 0:  # a poll has come
            shelf.expect(_state(user) for part in batches[number : number + AHEAD + 1] for user in part)
        placed = shelf.place([_state(user) for user in dict.fromkeys(batch)])
        refs = [placed[_user(user)].ref for user in batch]
        _forward(subject, model, ids, refs)
        late.append(refs.count(None))
        seconds.append(time.perf_counter() - began)
    cache.close()
    counted = {event: value - before[event] for event, value in _counts(metrics).items()}
    asked = max(counted["hit"] + counted["miss"], 1)
    return Run(
        seconds=tuple(seconds[warm:]),
        rows=ROWS * (len(batches) - warm),
        late=sum(late[warm:]),
        hits=counted["hit"] / asked,
        host_hits=counted["host_hit"] / max(counted["miss"], 1),
    )


def _forward(subject: Banked, model: _Model, ids: Sequence[tuple[int, ...]], refs: Sequence[AdapterRef | None]) -> None:
    with model.slots.pinned(ref for ref in refs if ref is not None) as held:
        subject.run(ids, sorted(0 if ref is None else held[ref] for ref in refs))


def _counts(metrics: Any) -> dict[str, float]:
    names = ("hit", "miss", "load", "evict", "host_hit")
    return {name: float(metrics.bank_events.labels(name)._value.get()) for name in names}  # noqa: SLF001


def _fill(registry: AdapterRegistry, subject: Banked, count: int) -> None:
    kinds = [random_adapter(subject.bank, seed) for seed in range(8)]
    for number in range(count):
        tensors = kinds[number % len(kinds)]
        registry.write(_ref(number), tensors, parent=None, trained_through=1, metrics={}, token=1)


def _registry(base: BaseId, folder: str) -> AdapterRegistry:
    url = str(Path(folder) / "adapters")
    config = {"r": RANK, "lora_alpha": ALPHA}
    return AdapterRegistry(url, base=base, user_hash=UserHash(KEY), adapter_config=config)


def _ids(tokens: int) -> list[tuple[int, ...]]:
    drawn = np.random.default_rng(tokens).integers(1000, 20_000, size=(ROWS, tokens))
    return [tuple(int(token) for token in row) for row in drawn]


def _user(number: int) -> UserId:
    return UserId(f"user-{number}")


def _ref(number: int) -> AdapterRef:
    return AdapterRef(_user(number), 0, 1)


def _state(number: int) -> UserState:
    return UserState(_user(number), 0, 1, Head(1, None, 1, 0))
