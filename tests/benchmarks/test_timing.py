"""The benchmarks' own arithmetic: what would be wrong here would be quoted."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.bank_train import accuracies, shown
from benchmarks.residency import ROWS, Draw
from benchmarks.timing import Timing, interleaved, rounded
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


def test_accuracies_come_from_a_result_of_the_experiment(tmp_path: Path) -> None:
    assert set(accuracies(None).values()) == {None}
    path = tmp_path / "result.json"
    arms = {"frozen": {"query_mean": 0.6}, "oppu": {"query_mean": 0.58}}
    path.write_text(json.dumps({"arms": arms, "tests": {"increments up to the cut - oppu": {"ci": [-0.005, 0.03]}}}))
    assert accuracies(path) == {"accuracy": 0.6, "accuracy_oppu": 0.58, "accuracy_difference_low": -0.005}
    for content in ("{", "{}", '{"arms": {}, "tests": {}}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match="--results"):
            accuracies(path)


def test_the_well_run_loop_is_the_faster_one_of_the_same_type() -> None:
    seconds = {
        "oppu": 10.0,
        "targets only float32": 4.0,
        "length buckets float32": 5.0,
        "bank float32": 2.0,
        "targets only bfloat16": 3.0,
        "length buckets bfloat16": 2.5,
        "bank bfloat16": 2.0,
    }
    rows = {row["rung"]: row for row in shown("x", {name: Timing((time,)) for name, time in seconds.items()}, 100)}
    assert rows["bank float32"]["ratio_to_well_run_peft"] == 2.0
    assert rows["bank bfloat16"]["ratio_to_well_run_peft"] == 1.25
    assert rows["bank bfloat16"]["ratio_to_oppu"] == 5.0
    assert rows["oppu"]["examples_per_second"] == 10.0
