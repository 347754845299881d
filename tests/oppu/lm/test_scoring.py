"""The trie of allowed outputs: probabilities add up, shared beginnings cost one more reading, prefixes end."""

import math

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
    return trie.scores(nodes)


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
    assert trie.lines == () and trie.scores([]).tolist() == [0.0]


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
