"""Rows and examples to token sequences with the positions whose logits are wanted. No tensors here.

The same code prepares serving, scoring, per-user training and task adaption, so that they cannot differ.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from oppu.lm.blend import Cache, Texts
from oppu.lm.port import Example, is_bare
from oppu.lm.prompts import Ids, Prompted, Prompts
from oppu.lm.scoring import LABEL_TOKENS, Aim, Tries
from oppu.tasks import Task, Tasks

_MIN_PROMPT_TOKENS = 8
_CHARACTERS_A_TOKEN = 8
"""Of a cached text, so many characters are tokenized for each token that is looked at: usual texts have three to five,
so that only one of unusually long tokens is looked at a little less far; and no text costs what lies behind."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One sequence to run: read the next-token logits at ``positions``, under the adapter in bank slot ``slot``."""

    ids: Ids = field(repr=False)
    positions: tuple[int, ...]
    slot: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """An example ready for its loss: ``offset − scale · Σ log p(aim)``, one aim a position.

    ``prompt_tokens`` is where the answer begins. Without positions the loss is ``offset`` whatever the weights.
    """

    ids: Ids = field(repr=False)
    prompt_tokens: int
    positions: tuple[int, ...]
    aims: tuple[Aim, ...] = field(repr=False)
    scale: float
    offset: float


class Encoder:
    """Builds prompts and targets for one base and its tasks."""

    def __init__(self, prompts: Prompts, tasks: Tasks, *, max_tokens: int, max_positions: int) -> None:
        """Bind the prompt format to tasks and lengths.

        Args:
            prompts: The prompt format.
            tasks: The known tasks.
            max_tokens: Longest prompt.
            max_positions: Longest sequence that the model can read.
        """
        self._prompts = prompts
        self._tasks = tasks
        self._max_tokens = max_tokens
        self._max_positions = max_positions
        self.tries = Tries(prompts.continuations, prompts.end, longest=min(LABEL_TOKENS, max_positions // 4))

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a generated text."""
        return self._prompts.stops

    def prompts(self, items: Sequence[Prompted], rooms: Sequence[int]) -> list[Ids]:
        """Return each item's prompt, leaving room for so many answer tokens within the model's positions."""
        tasks = [self._tasks.require(item.task) for item in items]
        limits = [max(_MIN_PROMPT_TOKENS, min(self._max_tokens, self._max_positions - room)) for room in rooms]
        return self._prompts.build(items, tasks, limits)

    def longest_output(self, task: str) -> int:
        """Return how many tokens of a text task's outputs are looked at, the end included."""
        return self._tasks.require(task).max_new_tokens + 1

    def caches(self) -> "Caches":
        """Return a maker of caches of texts that are cut at the longest prompt, for the rows of one call."""
        return Caches(self._prompts, self._max_tokens)

    def targets(self, examples: Sequence[Example]) -> list[Target]:
        """Return what each example's loss needs: one sequence each.

        Choice examples: the nodes of the choices' trie along the true output. An output that is no longer among
        the choices is scored beside them. Text examples: the output's tokens and the end token; outputs longer
        than the task's ``max_new_tokens``, or than the model has positions behind the shortest prompt, are cut and have
        no end. Examples without an output: the input's tokens
        and the end token, cut in the same way at the longest prompt.
        """
        bare = [at for at, example in enumerate(examples) if is_bare(example)]
        paired = [at for at, example in enumerate(examples) if not is_bare(example)]
        found = dict(zip(bare, self._bare([examples[at].input for at in bare]), strict=True))
        found |= zip(paired, self._paired([examples[at] for at in paired]), strict=True)
        return [found[at] for at in range(len(examples))]

    def _paired(self, examples: Sequence[Example]) -> list[Target]:
        texts = self._prompts.continuations(example.output for example in examples if not example.choices)
        answers = [
            self._choice_answer(example)
            if example.choices
            else self._text_answer(texts[example.output], self._tasks.require(example.task))
            for example in examples
        ]
        prompts = self.prompts(examples, [len(path) for path, *_ in answers])
        return [_target(prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _bare(self, texts: Sequence[str]) -> list[Target]:
        """Aim at each next token of a text; the first one is aimed at where prompts have a start token."""
        ids = self._prompts.continuations(texts)
        start = self._prompts.start
        room = min(self._max_tokens, self._max_positions) - len(start)
        found = []
        for text in texts:
            whole = (*ids[text], self._prompts.end)
            kept = whole if len(whole) <= room else whole[:room]
            context, wanted = (start, kept) if start else (kept[:1], kept[1:])
            aims = {at: Aim(None, token) for at, token in enumerate(wanted)}
            found.append(_target(context, wanted[:-1], aims, 1 / max(1, len(wanted)), 0.0))
        return found

    def _choice_answer(self, example: Example) -> tuple[Ids, dict[int, Aim], float, float]:
        known = example.output in example.choices
        choices = example.choices if known else (*example.choices, example.output)
        trie = self.tries.of(choices)
        at = choices.index(example.output)
        nodes = [(trie.nodes[node], branch) for node, branch in trie.steps[at]]
        path = nodes[-1][0].path if nodes else ()
        return path, {len(n.path): Aim(n.allowed, branch) for n, branch in nodes}, 1.0, trie.shared[at]

    def _text_answer(self, ids: Ids, task: Task) -> tuple[Ids, dict[int, Aim], float, float]:
        kept = ids[: min(task.max_new_tokens, self._max_positions - _MIN_PROMPT_TOKENS)]
        wanted = kept if len(kept) < len(ids) else (*kept, self._prompts.end)
        return wanted[:-1], {at: Aim(None, token) for at, token in enumerate(wanted)}, 1 / len(wanted), 0.0


class Caches:
    """Makes the caches of one call's rows, among which a user's texts come again: no text is tokenized twice, and equal
    texts of equal weights are one cache. Safe from several threads.

    Not to be kept longer than the call: it forgets nothing.
    """

    def __init__(self, prompts: Prompts, longest: int) -> None:
        """Start without any text.

        Args:
            prompts: Tokenizes.
            longest: Tokens of a text that are looked at, the end included.
        """
        self._prompts = prompts
        self._longest = longest
        self._ids: dict[str, Ids] = {}
        self._made: dict[tuple[str, Texts], Cache] = {}
        self._lock = threading.Lock()

    def of(self, texts: Mapping[str, Texts]) -> tuple[Cache, ...]:
        """Return caches of weighted texts, by name; each text is cut, else has its end."""
        with self._lock:
            self._tokenize(text for own in texts.values() for text, _ in own)
            return tuple(self._cache(name, own) for name, own in texts.items())

    def _tokenize(self, texts: Iterable[str]) -> None:
        """Tokenize what is new, in one call."""
        whole = {text: text.strip() for text in texts if text not in self._ids}
        begun = {text: words[: self._longest * _CHARACTERS_A_TOKEN] for text, words in whole.items()}
        ids = self._prompts.continuations(begun.values())
        for text, words in begun.items():
            end = (self._prompts.end,) if words == whole[text] else ()
            self._ids[text] = (*ids[words], *end)[: self._longest]

    def _cache(self, name: str, own: Texts) -> Cache:
        if (name, own) not in self._made:
            self._made[name, own] = Cache(name, [(self._ids[text], weight) for text, weight in own])
        return self._made[name, own]


def _target(prompt: Ids, path: Ids, aims: dict[int, Aim], scale: float, offset: float) -> Target:
    return Target(
        ids=prompt + path,
        prompt_tokens=len(prompt),
        positions=tuple(len(prompt) - 1 + depth for depth in aims),
        aims=tuple(aims.values()),
        scale=scale,
        offset=offset,
    )
