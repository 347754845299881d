"""Log probabilities of rows' choices, read along their tries.

A prompt is read again for each line of its trie, in one forward with other rows' prompts; where choices branch so much
that this costs more than two forwards, it is read once, and its keys and values serve all lines.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from oppu.lm.bank import SlotBank
from oppu.lm.encoding import Reading
from oppu.lm.forward import Runner, buckets
from oppu.lm.kv_cache import roomy_cache
from oppu.lm.prompts import Ids
from oppu.lm.reading import read
from oppu.lm.scoring import Line, Trie, choice_logits
from oppu.lm.transfer import sent

Scores = NDArray[np.float64]
Work = tuple[Ids, Trie, int]
"""A prompt, the trie of what may follow it, and a bank slot."""

NONE: Scores = np.zeros(0)
_AGAIN_SHARE = 4
"""Of a forward's most tokens: what a prompt may cost by being read again, since reading it once takes two forwards."""


def score_choices(runner: Runner, bank: SlotBank, work: Sequence[Work], *, branches: bool = True) -> list[Scores]:
    """Score the choices of rows of mixed users.

    Args:
        runner: The base.
        bank: The adapters.
        work: The rows.
        branches: Whether lines can share what is kept of their prompt.

    Returns:
        ``[c]`` log probabilities of each one's choices, whatever the rows beside it.
    """
    costs = [(len(trie.lines) - 1) * len(prompt) for prompt, trie, _ in work]
    branching = [branches and cost > runner.tokens // _AGAIN_SHARE for cost in costs]
    nodes = [[NONE] * len(trie.nodes) for _, trie, _ in work]
    _read_lines(runner, bank, work, [at for at, own in enumerate(branching) if not own], nodes)
    for at, own in enumerate(branching):
        if own:
            nodes[at] = read_branches(runner, bank, *work[at])
    return _summed([trie for _, trie, _ in work], nodes)


def _summed(tries: Sequence[Trie], nodes: Sequence[Sequence[Scores]]) -> list[Scores]:
    """Return the rows' choices' log probabilities from those of their nodes, rows of one trie together."""
    members: dict[int, list[int]] = {}
    for at, trie in enumerate(tries):
        members.setdefault(id(trie), []).append(at)
    found = [NONE] * len(tries)
    for rows in members.values():
        said = np.stack([np.concatenate([NONE, *nodes[at]]) for at in rows])
        for at, scores in zip(rows, tries[rows[0]].scores(said), strict=True):
            found[at] = scores
    return found


def read_branches(runner: Runner, bank: SlotBank, prompt: Ids, trie: Trie, slot: int) -> list[Scores]:
    """Read a prompt once and then its trie's lines, as many at a time as a forward holds in tokens and in logits.

    Args:
        runner: The base.
        bank: The adapters.
        prompt: The prompt.
        trie: What may follow it.
        slot: Of the adapter.

    Returns:
        Each node's log softmax over what is allowed there.
    """
    found = [NONE] * len(trie.nodes)
    cache = roomy_cache(runner.base.model.config, 0)
    with bank.use([slot]):
        said = runner.logits_after([prompt], [(len(prompt) - 1,)], cache, 0)
    root = [(0, node) for node, one in enumerate(trie.nodes) if not one.path]
    _spread(said, root, [trie], [found])
    places = [_behind(line, trie) for line in trie.lines]
    lengths = [len(prompt) + len(line.path) for line in trie.lines]
    for group in buckets(lengths, runner.tokens, [len(behind) for behind, _ in places], runner.reads):
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(group))
        paths, behind = [trie.lines[at].path for at in group], [places[at][0] for at in group]
        with bank.use([slot] * len(group)):
            said = runner.logits_after(paths, behind, own, len(prompt))
        _spread(said, [(0, node) for at in group for node in places[at][1]], [trie], [found])
    return found


def _behind(line: Line, trie: Trie) -> tuple[tuple[int, ...], list[int]]:
    """Return where behind the prompt a line's nodes are read, and the nodes; the root is read in the prompt itself."""
    nodes = [node for node in line.nodes if trie.nodes[node].path]
    return tuple(len(trie.nodes[node].path) - 1 for node in nodes), nodes


def _read_lines(
    runner: Runner, bank: SlotBank, work: Sequence[Work], some: Sequence[int], found: list[list[Scores]]
) -> None:
    """Read some rows' prompts with each of their lines, parts of them side by side."""
    readings, owners = [], []
    for at in some:
        prompt, trie, slot = work[at]
        for line in trie.lines:
            positions = tuple(len(prompt) - 1 + len(trie.nodes[node].path) for node in line.nodes)
            readings.append(Reading(prompt + line.path, positions, slot))
            owners.append([(at, node) for node in line.nodes])
    tries = [trie for _, trie, _ in work]

    def read_part(part: Sequence[int]) -> None:
        for group, logits in read(runner, bank, [readings[index] for index in part]):
            _spread(logits, [place for at in group for place in owners[part[at]]], tries, found)

    if readings:
        ids = [reading.ids for reading in readings]
        runner.streams.run(read_part, runner.streams.parts([len(own) for own in ids], ids if runner.shares else ()))


def _spread(
    logits: torch.Tensor, places: Sequence[tuple[int, int]], tries: Sequence[Trie], found: list[list[Scores]]
) -> None:
    """Turn read logits into each (row, node)'s log softmax, rows with the same allowed tokens together."""
    groups: dict[Ids, list[int]] = {}
    for entry, (at, node) in enumerate(places):
        groups.setdefault(tries[at].nodes[node].allowed, []).append(entry)
    for allowed, entries in groups.items():
        picked = choice_logits(logits, sent(entries, logits.device), allowed)
        for entry, scores in zip(entries, picked.double().log_softmax(-1).cpu().numpy(), strict=True):
            at, node = places[entry]
            found[at][node] = scores
