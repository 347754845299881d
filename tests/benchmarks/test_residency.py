"""What registered adapters cost."""

import mmap
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import residency
from benchmarks.residency import Draw, Scope, growth, measure, resident_bytes
from benchmarks.subjects import base_named


def test_memory_is_what_is_held_now() -> None:
    size = 64 << 20
    before = resident_bytes()
    with mmap.mmap(-1, size) as held:
        held.write(b"1" * size)
        written = resident_bytes()
    assert written - before > size // 2
    assert written - resident_bytes() > size // 2


def test_every_count_is_looked_up_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "resident_bytes", lambda: pytest.fail("measured in the process that wrote"))
    said: list[str] = []
    base = cast(Any, SimpleNamespace(fingerprint="0" * 32))
    rows = list(growth(base, [8, 4], said.append))
    assert said == ["4 adapters registered", "8 adapters registered"]
    assert [row["registered"] for row in rows] == [4, 8]
    for row in rows:
        assert cast(float, row["open_milliseconds"]) > 0
        assert cast(float, row["load_milliseconds"]) > 0
        assert abs(cast(float, row["grown_mib"])) < 64


@pytest.mark.slow
def test_it_runs_the_workers_own_shelf() -> None:
    scope = Scope(slots=64, adapters=128, sets=(1, 2), tokens=(1,), draws=(Draw(0.0),), batches=3, repeats=1)
    base = base_named("offline", device="cpu", dtype="float32")
    rows = list(measure(base, scope, lambda _: None))
    assert [(row["tokens"], row["users"]) for row in rows] == [(1, 64), (1, 128)]
    for row in rows:
        assert cast(float, row["throughput_ratio_to_resident"]) > 0
        assert cast(float, row["late_share"]) < 1
    assert [row["bank_hit_rate"] == 1 for row in rows] == [True, False]
