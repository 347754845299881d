"""The benchmarks' own arithmetic: what would be wrong here would be quoted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bank_serve, residency
from benchmarks.bank_serve import fastest
from benchmarks.bank_train import WELL_RUN, accuracies, costs, shown
from benchmarks.batch_mates import Changed
from benchmarks.residency import ROWS, Draw, Run, compared
from benchmarks.subjects import Peft, banked, base_named, random_adapter
from benchmarks.timing import REPEATS, Cell, Timing, interleaved, rounded
from evaluation.analysis_tables import FOLLOW, INCREMENTS_LESS_FULL, POLICY, RETRAINED
from oppu.cli.bench import bench
from oppu.errors import ConfigError


def test_every_case_runs_once_a_round_in_turning_order() -> None:
    ran: list[str] = []
    times = interleaved({name: (lambda name=name: ran.append(name)) for name in "abc"}, repeats=3, warm_up=1)  # type: ignore[misc]
    assert "".join(ran) == "abcbcacababc"
    assert {name: len(time.seconds) for name, time in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_timing_is_its_median_and_the_relative_half_distance_of_its_quartiles() -> None:
    time = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert time.median == 3.0
    assert time.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)
    assert Timing((1.0,)).spread == 0.0
    assert Timing((2.0, 8.0)).each(4) == Timing((0.5, 2.0))
    assert rounded(0.123456) == 0.123


def test_users_come_by_their_law() -> None:
    users = Counter(user for batch in Draw(1.0).batches(1000, 50, seed=1) for user in batch)
    assert users.total() == 50 * ROWS
    assert users[0] > 3 * users[9] > 0
    even = Counter(user for batch in Draw(0.0).batches(100, 50, seed=1) for user in batch)
    assert max(even.values()) < 3 * min(even.values())
    assert Draw(0.8).batches(10, 2, seed=1) == Draw(0.8).batches(10, 2, seed=1)


def test_late_rows_are_not_served_and_the_slowest_batch_is_that_of_all_runs() -> None:
    resident = [Run((1.0, 1.0), 128, 0) for _ in range(3)]
    own = [Run((2.0, 2.0), 128, late, hits, 0.5) for late, hits in ((0, 0.1), (64, 0.2), (0, 0.3))]
    row = compared([*own[:2], Run((2.0, 5.0), 128, 0, 0.3)], resident)
    assert row["throughput_ratio_to_resident"] == rounded(2 / 7)  # of 4, 8 and 7 seconds for 128 rows
    assert (row["late_share"], row["bank_hit_rate"], row["host_hit_rate_of_misses"]) == (rounded(64 / 384), 0.2, 0.5)
    assert row["slowest_batch_to_mean"] == rounded(5 / 2.5)
    assert (row["spread"], row["spread_resident"]) == (rounded((7.5 - 5.5) / 2 / 7), 0.0)


def test_an_updates_cost_is_compared_in_one_type() -> None:
    seconds = {"oppu": 12.0, "together float32": 6.0, "alone float32": 3.0}
    seconds |= {"together bfloat16": 3.0, "alone bfloat16": 2.0}
    assert costs({name: Timing((time,)) for name, time in seconds.items()}, users=2) == {
        "update_cost_ratio_to_oppu": 4.0,
        "update_cost_ratio_to_oppu_bfloat16": 8.0,
        "update_cost_ratio_to_oppu_one_user": 4.0,
        "update_cost_ratio_to_oppu_one_user_bfloat16": 6.0,
    }


def test_parts_of_a_benchmark_run_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scopes: list[Any] = []

    def kept(_base: object, scope: object, *_: object) -> list[dict[str, Cell]]:
        scopes.append(scope)
        return []

    monkeypatch.setattr("benchmarks.subjects.base_named", lambda *_, **__: None)
    monkeypatch.setattr(bank_serve, "bytes_moved", lambda *_: 0)
    monkeypatch.setattr(bank_serve, "on_prompts", lambda *_: {"rows": 64})
    monkeypatch.setattr("benchmarks.batch_mates.changed_by_batch_mates", lambda *_, **__: Changed(0, 0.0, 0.0))
    monkeypatch.setattr(residency, "growth", lambda *_: [])
    for module, name in ((bank_serve, "against_others"), (bank_serve, "sweep_users"), (residency, "measure")):
        monkeypatch.setattr(module, name, kept)
    for command in (["bank-serve", "--tokens", "8", "--tokens", "32"], ["bank-serve"], ["residency", "--tokens", "1"]):
        done = CliRunner().invoke(bench, [*command, "--json", str(tmp_path / "out.json")], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    some, _, whole, _, one = scopes
    assert (some.tokens, some.wide_tokens) == ((8, 32), [32])
    assert (whole.tokens, whole.wide_tokens) == (bank_serve.TOKENS, bank_serve.WIDE_TOKENS)
    assert one.tokens == (1,)
    assert {scope.repeats for scope in (some, whole, one)} == {REPEATS}


def test_the_rows_of_serving_vary_length_and_distinct_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, few in {"ROWS": 2, "WIDE_ROWS": 4, "DECODED": 2, "SWITCHED": 1, "CACHED": 4}.items():
        monkeypatch.setattr(bank_serve, name, few)
    monkeypatch.setattr("benchmarks.batch_mates.changed_by_batch_mates", lambda *_, **__: Changed(64, 0.0, 1e-6))
    out = tmp_path / "out.json"
    options = ["--quick", "--users", "4", "--tokens", "8", "--tokens", "1", "--dtype", "bfloat16", "--json", str(out)]
    command = ["bank-serve", *options]
    assert CliRunner().invoke(bench, command, catch_exceptions=False).exit_code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["tokens"], row["distinct_users"]) for row in rows] == [(8, 2), (1, 2), (1, 1), (1, 4)]
    types = {row[way] for row in rows[:2] for way in ("set_adapter_type", "adapter_names_type")}
    assert types <= {"float32", "bfloat16"}
    assert all(row["spread_set_adapter"] > 0 and row["spread_adapter_names"] > 0 for row in rows[:2])
    assert all(row["memory_bytes"] == "not measured" for row in rows[2:])
    assert all(row["rank"] == 8 and row["ratio_to_base"] > 0 for row in rows)
    for peft in ("ratio_to_peft_set_adapter", "ratio_to_peft_adapter_names"):
        assert [row[peft] is None for row in rows] == [False, False, True, True]


def test_peft_is_compared_in_the_type_of_its_adapters_in_which_it_is_faster() -> None:
    seconds = {"set float32": 3.0, "set bfloat16": 2.0, "names float32": 1.0, "names bfloat16": 1.5}
    times = {name: Timing((time,)) for name, time in seconds.items()}
    assert fastest(times, "set", ("float32", "bfloat16")) == (Timing((2.0,)), "bfloat16")
    assert fastest(times, "names", ("float32", "bfloat16")) == (Timing((1.0,)), "float32")
    assert fastest(times, "set", ("float32",)) == (Timing((3.0,)), "float32")


def test_adapters_in_peft_are_in_float32_or_in_the_bases_type() -> None:
    base = base_named("offline", device="cpu", dtype="bfloat16")
    subject = banked(base, slots=2, rank=8, alpha=16)
    adapters = [random_adapter(subject.bank, seed) for seed in range(2)]
    for widened, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        peft = Peft(base, adapters, rank=8, alpha=16, widened=widened)
        assert {weight.dtype for name, weight in peft.model.named_parameters() if "lora_" in name} == {dtype}
    subject.close()


def test_accuracies_come_from_a_result_of_the_experiment(tmp_path: Path) -> None:
    assert set(accuracies(None).values()) == {None}
    path = tmp_path / "result.json"
    row = {FOLLOW: {"mean": 0.6}, RETRAINED: {"mean": 0.58}, INCREMENTS_LESS_FULL: {"ci": [-0.005, 0.03]}}
    path.write_text(json.dumps({"analyses": {POLICY: [row]}}))
    assert accuracies(path) == {"accuracy": 0.6, "accuracy_oppu": 0.58, "accuracy_difference_low": -0.005}
    for content in ("{", "{}", '{"analyses": {}}', json.dumps({"analyses": {POLICY: [{FOLLOW: row[FOLLOW]}]}})):
        path.write_text(content)
        with pytest.raises(ConfigError, match="--results"):
            accuracies(path)


def test_the_well_run_loop_is_the_fastest_one_of_the_same_type() -> None:
    loops = {"float32": (4.0, 5.0, 4.5, 6.0), "bfloat16": (9.0, 8.0, 3.5, 3.0)}
    seconds = {f"{rung} {dtype}": time for dtype in loops for rung, time in zip(WELL_RUN, loops[dtype], strict=True)}
    seconds |= {"oppu": 10.0, "bank float32": 2.0, "bank bfloat16": 2.0}
    rows = {row["rung"]: row for row in shown("x", {name: Timing((time,)) for name, time in seconds.items()}, 100)}
    assert rows["bank float32"]["ratio_to_well_run_peft"] == 2.0
    assert rows["bank float32"]["well_run_peft"] == "targets only float32"
    assert rows["bank bfloat16"]["ratio_to_well_run_peft"] == 1.5
    assert rows["bank bfloat16"]["well_run_peft"] == "length buckets, eager attention bfloat16"
    assert rows["bank float32"]["ratio_to_fastest_peft"] == rows["bank bfloat16"]["ratio_to_fastest_peft"] == 1.5
    assert rows["bank bfloat16"]["ratio_to_oppu"] == 5.0
    assert rows["oppu"]["examples_per_second"] == 10.0
