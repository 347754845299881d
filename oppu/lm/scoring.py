"""Score the allowed outputs over their token trie, so that an answer is always valid and comes with scores.

Normalisation: at each node of the trie where more than one thing may follow, a softmax over just those tokens
(the end token is one of them where a choice ends and a longer one goes on); forced tokens cost nothing; a
choice's log probability is the sum along its path. So the choices' probabilities add up to one by construction.
Choices with equal tokens (an uncased tokenizer's "US" and "us") share their mass evenly.
Reads as few prompts as possible: one forward where first tokens differ, one more per place where labels part later.
"""

import math
import sys
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from oppu.lm.transfer import sent

Ids = tuple[int, ...]
LABEL_TOKENS = 64
"""Choices that agree so far are taken as equal: a request cannot make the model read pages of choices."""
_KEPT_BYTES = 64 * 2**20
"""Most memory of the tries that are kept with their choices: a thousand long choices take up to some megabytes, and as
many different sets can come as there are requests."""
_OBJECT_BYTES, _STEP_BYTES, _TOKEN_BYTES = 160, 72, 8
"""Memory of a node, a line or a choice; of a step; of a token or number in a tuple. Measured on CPython 3.11: tries of
1,000 choices take 0.7 to 0.9 of what is so estimated."""


@dataclass(frozen=True, slots=True)
class Node:
    """A place in the trie where choices part: ``path`` from the root, ``allowed`` next tokens."""

    path: Ids
    allowed: Ids


@dataclass(frozen=True, slots=True)
class Line:
    """One continuation of the prompt to run: its tokens, and the nodes (by number) that are read along it."""

    path: Ids
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trie:
    """The choices' trie.

    ``steps`` holds for each choice its (node, index into the node's ``allowed``); ``shared`` for each choice the
    log of how many choices have the same tokens.
    """

    nodes: tuple[Node, ...]
    lines: tuple[Line, ...]
    steps: tuple[tuple[tuple[int, int], ...], ...]
    shared: tuple[float, ...]

    @property
    def depth(self) -> int:
        """Tokens that the longest line adds to the prompt."""
        return max((len(line.path) for line in self.lines), default=0)

    @property
    def bytes(self) -> int:
        """Memory, estimated."""
        objects = len(self.nodes) + len(self.lines) + len(self.steps)
        tokens = sum(len(node.path) + len(node.allowed) for node in self.nodes)
        tokens += sum(len(line.path) + len(line.nodes) for line in self.lines)
        steps = sum(len(own) for own in self.steps)
        return objects * _OBJECT_BYTES + steps * _STEP_BYTES + tokens * _TOKEN_BYTES

    def scores(self, log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Add up along the choices' paths.

        Args:
            log_probs: ``[n, s]`` of n prompts, each node's log softmax over its allowed tokens behind the one before.

        Returns:
            ``[n, c] float64`` log probabilities.
        """
        begins = np.cumsum([0, *(len(node.allowed) for node in self.nodes)])
        certain = begins[-1:]  # a column of zeros, for choices that nothing parts from the others
        taken = [[begins[node] + branch for node, branch in steps] or certain for steps in self.steps]
        firsts = np.cumsum([0, *map(len, taken[:-1])])
        padded = np.pad(log_probs, ((0, 0), (0, 1)))
        found: NDArray[np.float64] = np.add.reduceat(padded[:, np.concatenate(taken)], firsts, axis=1) - self.shared
        return found


@dataclass(frozen=True, slots=True)
class Aim:
    """The token wanted at one position: ``index`` into ``allowed``, or a token id where all are allowed."""

    allowed: Ids | None
    index: int


def build_trie(labels: Sequence[Ids], end: int) -> Trie:
    """Build the trie of tokenized choices.

    Args:
        labels: At least one; a blank choice may be empty.
        end: The token that stands for "the choice ends here".

    Returns:
        The trie, nodes in depth-first order.
    """
    following: dict[Ids, dict[int, None]] = {}
    for label in labels:
        for depth, token in enumerate((*label, end)):
            following.setdefault(label[:depth], {})[token] = None
    paths = sorted(path for path, tokens in following.items() if len(tokens) > 1)
    nodes = tuple(Node(path, tuple(sorted(following[path]))) for path in paths)
    number = {node.path: at for at, node in enumerate(nodes)}
    same = {label: math.log(count) for label, count in Counter(labels).items()}
    return Trie(
        nodes=nodes,
        lines=_lines(paths, number),
        steps=tuple(_steps(label, end, nodes, number) for label in labels),
        shared=tuple(same[label] for label in labels),
    )


class Tries:
    """Tries by their choices, of the most recently used ones as many kept as the memory set aside for them holds."""

    def __init__(
        self,
        tokenize: Callable[[Sequence[str]], dict[str, Ids]],
        end: int,
        *,
        longest: int = LABEL_TOKENS,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        """Wrap a tokenizer of answers.

        Args:
            tokenize: Texts to token ids, by text.
            end: The token that ends an answer.
            longest: Tokens of a choice that are looked at.
            kept_bytes: Most memory of what is kept, estimated; a trie that alone needs more is not kept.
        """
        self._tokenize = tokenize
        self._end = end
        self._longest = longest
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[tuple[str, ...], tuple[Trie, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # examples are encoded outside the model's lock

    def of(self, choices: tuple[str, ...]) -> Trie:
        """Return the trie of some choices."""
        with self._lock:
            kept = self._kept.get(choices)
            if kept is not None:
                self._kept.move_to_end(choices)
                return kept[0]
            ids = self._tokenize(choices)
            trie = build_trie([ids[choice][: self._longest] for choice in choices], self._end)
            self._keep(choices, trie)
            return trie

    def _keep(self, choices: tuple[str, ...], trie: Trie) -> None:
        size = trie.bytes + sum(map(sys.getsizeof, choices))
        if size > self._kept_bytes:
            return  # it would put out all others, and then be too large itself
        self._kept[choices] = trie, size
        self._bytes += size
        while self._bytes > self._kept_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed


def aim_log_probs(logits: torch.Tensor, aims: Sequence[Aim]) -> torch.Tensor:
    """Return the log probability of each aim among what is allowed there.

    Args:
        logits: ``[t, vocabulary]``.
        aims: One a row of ``logits``.

    Returns:
        ``[t]``, differentiable.
    """
    groups: dict[Ids, list[int]] = defaultdict(list)
    for at, aim in enumerate(aims):
        if aim.allowed is not None:
            groups[aim.allowed].append(at)
    if any(aim.allowed is None for aim in aims):
        # over all rows: cheaper than copying most of a [t, vocabulary] tensor
        tokens = sent([aim.index if aim.allowed is None else 0 for aim in aims], logits.device)
        found = -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    else:
        found = torch.zeros(len(aims), dtype=logits.dtype, device=logits.device)
    for allowed, members in groups.items():
        rows = sent(members, logits.device)
        wanted = sent([aims[at].index for at in members], logits.device)
        picked = choice_logits(logits, rows, allowed).log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        found = found.index_put((rows,), picked)
    return found


def allowed_log_probs(logits: torch.Tensor, allowed: Ids | None) -> torch.Tensor:
    """Return ``[n, len(allowed)]`` log softmax over the allowed tokens of ``[n, vocabulary]`` logits."""
    if allowed is not None:
        logits = logits[:, sent(allowed, logits.device)]
    return logits.log_softmax(-1)


def choice_logits(logits: torch.Tensor, rows: torch.Tensor, allowed: Ids) -> torch.Tensor:
    """Return ``[n, len(allowed)]``, the allowed columns of some rows of ``[t, vocabulary]``; copies no others."""
    return logits[rows[:, None], sent(allowed, logits.device)]


def _lines(paths: Sequence[Ids], number: dict[Ids, int]) -> tuple[Line, ...]:
    """Cover all nodes by the fewest continuations; a node on several is read on the first."""
    lines: list[Line] = []
    read: set[int] = set()
    for at, path in enumerate(paths):
        if at + 1 < len(paths) and paths[at + 1][: len(path)] == path:
            continue  # sorted: a longer line through here follows, and passes this node
        along = [number[path[:depth]] for depth in range(len(path) + 1) if path[:depth] in number]
        fresh = tuple(node for node in along if node not in read)
        read.update(fresh)
        lines.append(Line(path, fresh))
    return tuple(lines)


def _steps(label: Ids, end: int, nodes: Sequence[Node], number: dict[Ids, int]) -> tuple[tuple[int, int], ...]:
    steps = []
    for depth, token in enumerate((*label, end)):
        at = number.get(label[:depth])
        if at is not None:
            steps.append((at, nodes[at].allowed.index(token)))
    return tuple(steps)
