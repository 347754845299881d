"""Texts to prompt tokens: the one format of training, adaption and serving. Knows no model library.

A prompt is ``[start] [profile line] [evidence pairs] query``; a pair is the task's prompt with its answer, the
query the prompt up to the answer cue; a pair without an output is its bare input. Invariant: evidence is cut first
(whole pairs, last first, then the last one's input), then the profile, and the query only when it alone is too long:
from the end of its input.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from oppu.tasks import Task

PROMPT_FORMAT = "2"
"""Part of every base's fingerprint: raise it with any change to what this module builds."""

Ids = tuple[int, ...]
_ANCHOR = ":"
_MIN_PAIR_TOKENS = 8
"""An evidence input cut shorter than this tells nothing; the pair is dropped."""


class Prompted(Protocol):
    """What a prompt is built from; a ``Row`` or an ``Example``."""

    @property
    def task(self) -> str:
        """Name of the task."""
        ...

    @property
    def input(self) -> str:
        """What is asked about."""
        ...

    @property
    def evidence(self) -> tuple[tuple[str, str], ...]:
        """Earlier (input, output) pairs, best first."""
        ...

    @property
    def profile(self) -> str:
        """A line about the user, or nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Kept:
    """What of an item stands in its prompt: so many of its pairs, the first ones, and its profile's line or not."""

    pairs: int = 0
    profiled: bool = False


class Prompts:
    """Builds prompts over one tokenizer."""

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], *, start: Ids, end: int) -> None:
        """Wrap a tokenizer.

        Args:
            encode: Texts to token ids, without special tokens.
            start: Put before every prompt; kept as ``start``.
            end: The token that ends an answer.
        """
        self._encode = encode
        self.start = start
        self.end = end
        self._anchor = encode([_ANCHOR])[0]
        newline = encode([_ANCHOR + "\n"])[0][len(self._anchor) :]
        self._separator: Ids = tuple(newline) or (end,)
        self._templates: dict[tuple[str, str], tuple[Ids, Ids]] = {}

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a generated text."""
        return frozenset({self.end, *self._separator[:1]})

    def continuations(self, texts: Iterable[str]) -> dict[str, Ids]:
        """Tokenize each text as it reads after other words: with the space before it.

        Args:
            texts: Repeated ones are tokenized once.

        Returns:
            Token ids by text; empty for a blank text.
        """
        unique = list(dict.fromkeys(texts))
        words = [text for text in unique if text.strip()]
        rows = self._encode([f"{_ANCHOR} {text.strip()}" for text in words]) if words else []
        found: dict[str, Ids] = dict.fromkeys(unique, ())
        for text, ids in zip(words, rows, strict=True):
            found[text] = self._after_anchor(text, ids)
        return found

    def build(self, items: Sequence[Prompted], tasks: Sequence[Task], limits: Sequence[int]) -> list[Ids]:
        """Return each item's prompt, of at most its limit of tokens.

        Args:
            items: What to ask.
            tasks: The task of each.
            limits: The maximum of tokens of each.

        Returns:
            Token ids, never empty.
        """
        ids = self.continuations(text for item in items for text in _texts(item))
        return [
            self._one(item, self._template(task), ids, limit)[0]
            for item, task, limit in zip(items, tasks, limits, strict=True)
        ]

    def kept(self, items: Sequence[Prompted], tasks: Sequence[Task], built: Sequence[Ids]) -> list[Kept]:
        """Say what of each item's evidence and profile was not cut from its prompt.

        Args:
            items: What was asked.
            tasks: The task of each.
            built: The prompts that ``build`` made of them.

        Returns:
            One value an item, in order.
        """
        some = [at for at, item in enumerate(items) if item.evidence or item.profile]
        ids = self.continuations(text for at in some for text in _texts(items[at]))
        found = [Kept()] * len(items)
        for at in some:  # a limit that is just reached cuts nothing: it is built once more as it was
            _, found[at] = self._one(items[at], self._template(tasks[at]), ids, len(built[at]))
        return found

    def _after_anchor(self, text: str, ids: list[int]) -> Ids:
        size = len(self._anchor)
        if ids[:size] == self._anchor and len(ids) > size:
            return tuple(ids[size:])
        return tuple(self._encode([text.strip()])[0])  # the tokenizer merged the anchor into the text

    def _template(self, task: Task) -> tuple[Ids, Ids]:
        """Return the tokens before and after the input."""
        key = (task.prompt, task.answer)
        if key not in self._templates:
            head, _, tail = task.prompt.partition("{input}")
            head_ids = tuple(self._encode([head.strip()])[0]) if head.strip() else ()
            rest = self.continuations([tail, task.answer])
            self._templates[key] = head_ids, rest[tail] + rest[task.answer]
        return self._templates[key]

    def _one(self, item: Prompted, template: tuple[Ids, Ids], ids: dict[str, Ids], limit: int) -> tuple[Ids, Kept]:
        head, cue = template
        room = limit - len(self.start) - len(head) - len(cue)
        if room < 0:
            return (*self.start, *head, *cue)[-limit:], Kept()
        query = head + ids[item.input][:room] + cue
        room = limit - len(self.start) - len(query)
        profile = self._line(ids[item.profile], room) if item.profile else ()
        evidence, pairs = self._evidence(item, template, ids, room - len(profile))
        return self.start + profile + evidence + query, Kept(pairs, bool(profile))

    def _line(self, ids: Ids, room: int) -> Ids:
        kept = ids[: max(0, room - len(self._separator))]
        return kept + self._separator if kept else ()

    def _evidence(self, item: Prompted, template: tuple[Ids, Ids], ids: dict[str, Ids], room: int) -> tuple[Ids, int]:
        """Return the pairs' tokens, and of how many pairs they are."""
        head, cue = template
        kept: Ids = ()
        for number, (text, output) in enumerate(item.evidence):
            before, rest = (head, cue + ids[output] + self._separator) if ids[output] else ((), self._separator)
            pair = before + ids[text] + rest
            if len(pair) > room:
                cut = room - len(before) - len(rest)
                if number == 0 and cut >= _MIN_PAIR_TOKENS:
                    return before + ids[text][:cut] + rest, 1
                return kept, number
            kept += pair
            room -= len(pair)
        return kept, len(item.evidence)


def _texts(item: Prompted) -> Iterable[str]:
    yield item.input
    yield item.profile
    for pair in item.evidence:
        yield from pair
