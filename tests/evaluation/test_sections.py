"""What a page says beside its tables of arms and contrasts."""

from typing import Any

from evaluation.sections import worst_rows


def judged(**found: tuple[float, float | None]) -> dict[str, Any]:
    return {f"fused - {arm}": {"difference": less, "max_t_p": p} for arm, (less, p) in found.items()}


def test_of_arms_of_one_p_the_nearest_stands_worst() -> None:
    [_, line] = worst_rows(judged(none=(0.4972, 1.0), unweighed=(0.2, 1.0), knn=(0.3, 1.0)))
    assert line.startswith("The arm that fused stands worst against: unweighed (+0.2000, one-sided p 1.000")
    [_, line] = worst_rows(judged(none=(0.4972, 1.0), oppu=(-0.01, 0.2), noisy=(-0.02, 0.6)))
    assert "against: oppu (-0.0100, one-sided p 0.200 by max-T bootstrap over 3 arms)" in line


def test_nothing_is_said_where_nothing_could_be_judged() -> None:
    assert worst_rows(judged(none=(0.5, None), oppu=(-0.3, None))) == []
