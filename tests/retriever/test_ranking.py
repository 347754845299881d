"""Orders and fusion."""

import numpy as np

from retriever.ranking import by_score, fused, without_repeats


def test_by_score_prefers_the_newest_of_equals() -> None:
    scores = np.array([0.0, 2.0, 1.0, 2.0, 0.0], np.float32)
    assert by_score(scores, 10, positive_only=False) == [13, 11, 12, 14, 10]
    assert by_score(scores, 10, positive_only=True) == [13, 11, 12]


def test_fused_sums_reciprocal_ranks() -> None:
    # 7: 1/61 + 1/62; 8: 1/62 + 1/61; 9: 1/63 alone
    assert fused([[7, 8, 9], [8, 7]]) == [8, 7, 9]
    assert fused([[1, 2], [3, 2], [2]]) == [2, 3, 1]
    assert fused([[], []]) == []


def test_being_found_twice_beats_being_first_once() -> None:
    assert fused([[1, 5], [2, 5], [3, 5]])[0] == 5


def test_without_repeats_keeps_the_first_of_each_key() -> None:
    assert without_repeats([4, 14, 5, 24, 6], lambda i: i % 10, 3) == [4, 5, 6]
    assert without_repeats([1, 2], lambda i: i, 0) == []
