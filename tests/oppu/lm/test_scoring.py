"""The trie of allowed outputs: probabilities add up, shared beginnings cost one more reading, prefixes end."""

import gc
import math
import random
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oppu.lm.scoring import Aim, Tries, aim_log_probs, allowed_log_probs, build_trie, choice_logits

END = 9
Labels = list[tuple[int, ...]]


def scores(labels: Labels, seed: int = 0) -> np.ndarray:
    """Score labels with logits that depend on the path, as a model's would."""
    trie = build_trie(labels, END)
    nodes = [allowed_log_probs(path_logits(node.path, seed)[None], node.allowed)[0].numpy() for node in trie.nodes]
    [found] = trie.scores(np.concatenate([[], *nodes])[None])
    return np.asarray(found)


def path_logits(path: tuple[int, ...], seed: int) -> torch.Tensor:
    state = int(str(seed) + "".join(map(str, path)) or "0", 10) % (2**31)
    return torch.randn(10, generator=torch.Generator().manual_seed(state), dtype=torch.float64)


def by_hand(label: tuple[int, ...], labels: Labels, seed: int = 0) -> float:
    """Walk the label; at each step renormalise over what any label allows there."""
    total = 0.0
    for depth, token in enumerate((*label, END)):
        allowed = sorted({(*other, END)[depth] for other in labels if other[:depth] == label[:depth]})
        logits = path_logits(label[:depth], seed)[allowed]
        total += float(logits.log_softmax(-1)[allowed.index(token)])
    return total - math.log(labels.count(label))


def test_different_first_tokens_need_the_prompt_only() -> None:
    trie = build_trie([(1,), (2, 3), (4, 5, 6)], END)
    assert [line.path for line in trie.lines] == [()]
    assert [node.allowed for node in trie.nodes] == [(1, 2, 4)]
    assert trie.depth == 0


def test_forced_first_tokens_are_read_through() -> None:
    trie = build_trie([(7, 1, 8), (7, 2, 8)], END)
    assert [(line.path, line.nodes) for line in trie.lines] == [((7,), (0,))]


def test_a_choice_that_is_anothers_beginning_ends_there() -> None:
    trie = build_trie([(1,), (1, 2)], END)
    assert trie.nodes[0].path == (1,) and trie.nodes[0].allowed == (2, END)


def test_equal_tokens_share_their_mass() -> None:
    found = scores([(1,), (1,), (2,)])
    assert found[0] == found[1]
    assert math.isclose(np.exp(found).sum(), 1.0)


def test_a_single_choice_is_certain_and_needs_no_reading() -> None:
    trie = build_trie([(1, 2)], END)
    assert trie.lines == () and trie.scores(np.zeros((2, 0))).tolist() == [[0.0], [0.0]]


@given(st.lists(st.lists(st.integers(1, 3), max_size=4).map(tuple), min_size=1, max_size=12), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_equals_the_walk_by_hand_and_adds_up(labels: Labels, seed: int) -> None:
    found = scores(labels, seed)
    assert math.isclose(np.exp(found).sum(), 1.0, rel_tol=1e-9)
    for at, label in enumerate(labels):
        assert math.isclose(found[at], by_hand(label, labels, seed), rel_tol=1e-9, abs_tol=1e-9)


@given(st.lists(st.lists(st.integers(1, 3), max_size=4).map(tuple), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_every_node_is_read_once_on_a_line_through_it(labels: Labels) -> None:
    trie = build_trie(labels, END)
    read = [node for line in trie.lines for node in line.nodes]
    assert sorted(read) == list(range(len(trie.nodes)))
    for line in trie.lines:
        assert all(line.path[: len(trie.nodes[n].path)] == trie.nodes[n].path for n in line.nodes)


def test_tries_are_kept_by_choices_and_long_choices_are_cut() -> None:
    calls: list[tuple[str, ...]] = []

    def tokenize(texts: object) -> dict[str, tuple[int, ...]]:
        assert isinstance(texts, tuple)
        calls.append(texts)
        return {text: tuple(int(c) for c in text) for text in texts}

    tries = Tries(tokenize, END, longest=3)
    assert tries.of(("12", "2")) is tries.of(("12", "2"))
    assert len(calls) == 1
    assert tries.of(("1231", "1232")).shared == pytest.approx([math.log(2)] * 2)


class Counted:
    """A tokenizer of digits that notes which sets it was asked for."""

    def __init__(self) -> None:
        self.calls: list[Sequence[str]] = []

    def __call__(self, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        self.calls.append(texts)
        return {text: tuple(int(digit) for digit in text) for text in texts}


SETS = [tuple(f"{first}{second}" for second in "123") for first in "1234"]
"""Sets of choices of one size in memory."""


def one_bytes() -> int:
    """Return what one of the sets takes."""
    tries = Tries(Counted(), END)
    tries.of(SETS[0])
    return tries._bytes


def test_the_least_recently_used_tries_give_way_by_size_not_by_number() -> None:
    tokenize = Counted()
    tries = Tries(tokenize, END, kept_bytes=3 * one_bytes())
    for at in (0, 1, 2, 0, 3, 0, 2, 1):  # the fourth puts out the second, which was used longest ago
        tries.of(SETS[at])
    assert tokenize.calls == [*SETS[:3], SETS[3], SETS[1]]
    assert tries._bytes == 3 * one_bytes() and len(tries._kept) == 3
    tries.of(tuple(f"4{second}{third}" for second in "12" for third in "12"))
    assert len(tries._kept) < 3 and tries._bytes <= 3 * one_bytes()  # a larger one puts out several


def test_a_trie_over_the_bound_is_used_and_not_kept() -> None:
    tokenize = Counted()
    tries = Tries(tokenize, END, kept_bytes=one_bytes())
    tries.of(SETS[0])
    large = tuple(f"{first}{second}" for first in "123" for second in "123")
    assert len(tries.of(large).steps) == len(tries.of(large).steps) == 9
    tries.of(SETS[0])
    assert tokenize.calls == [SETS[0], large, large]


def test_the_texts_of_long_choices_count() -> None:
    tries = Tries(Counted(), END, longest=3, kept_bytes=20_000)
    tries.of(("1" * 30_000, "2"))
    assert not tries._kept


@pytest.mark.parametrize("kind", ["late", "nested", "binary", "short"])
def test_the_memory_of_a_trie_is_as_estimated(kind: str) -> None:
    chance = random.Random(0)
    labels = {
        "late": [(7,) * 50 + tuple(chance.randrange(300, 30_000) for _ in range(14)) for _ in range(500)],
        "nested": [(7,) * (at % 64) for at in range(500)],
        "binary": [tuple(chance.choice((500, 600)) for _ in range(64)) for _ in range(500)],
        "short": [tuple(chance.randrange(300, 30_000) for _ in range(3)) for _ in range(500)],
    }[kind]
    gc.collect()
    tracemalloc.start()
    try:
        trie = build_trie(labels, END)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.5 * trie.bytes < taken < 1.1 * trie.bytes


def test_only_the_allowed_columns_are_copied_and_say_the_same() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(1), requires_grad=True)
    rows, allowed = torch.tensor([5, 0, 3]), (2, 9, 40)
    picked = choice_logits(logits, rows, allowed)
    assert torch.equal(picked.double().log_softmax(-1), allowed_log_probs(logits[rows].double(), allowed))
    [grad] = torch.autograd.grad(picked.square().sum(), logits)
    [whole] = torch.autograd.grad(logits[rows][:, list(allowed)].square().sum(), logits)
    assert torch.equal(grad, whole)


def test_aims_pick_among_what_is_allowed() -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = aim_log_probs(logits, [Aim(None, 4), Aim((2, 5), 1), Aim(None, 0)])
    assert torch.equal(found[1], logits[1, [2, 5]].log_softmax(-1)[1])
    assert torch.allclose(found[[0, 2]], logits[[0, 2]].log_softmax(-1)[[0, 1], [4, 0]])
