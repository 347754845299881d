"""The ``statistics`` profile: what a user's outputs in one task are usually like, from events alone.

Pure; needs no model. The newest of the events counts 1, one ``half_life_events`` events older counts a half.
Columns grow by each new event once; a summary of any window of them is a few numpy operations, so that an
earlier point in time (``before_seq``) gives exactly what was known then. Of an event without an output, its input is
the user's own text: it has no part in the prior.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oppu.values import Event
from retriever.terms import terms

ALGORITHM = "statistics-2"
"""Goes into each profile's version: change it with anything that changes a profile's content."""

_PRIOR_OUTPUTS = 256  # heaviest outputs kept in a prior
_LINE_OUTPUTS = 3
_LINE_TERMS = 5
_LINE_SHARE = 0.1  # an output with less than this share of the weight is not "mostly"
_SHOWN_CHARACTERS = 40  # of one output in the line
_LABEL_WORDS = 4.0  # outputs of more words on average that do not repeat are texts
_TIE_DECIMALS = 9  # counts that are equal so far differ by the order of summation alone
_ENTRY_BYTES = 160
_BARE = -1  # the code of an event without an output


@dataclass(frozen=True, slots=True)
class Summary:
    """``prior`` maps outputs to recency-weighted counts; ``line`` describes the user in a few words."""

    prior: dict[str, float] = field(repr=False)
    line: str = field(repr=False)


class Columns:
    """A task's outputs as columns of codes, in seq order."""

    def __init__(self) -> None:
        self._outputs: dict[str, int] = {}
        self._codes: list[int] = []
        self._words: list[int] = []
        self._choices: list[bool] = []
        self._terms: dict[str, int] = {}
        self._term_codes: list[int] = []
        self._term_items: list[int] = []
        self._term_ends: list[int] = [0]

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def nbytes(self) -> int:
        """Estimated memory."""
        entries = len(self._outputs) + len(self._terms)
        return _ENTRY_BYTES * entries + 32 * len(self) + 16 * len(self._term_codes)

    def extend(self, events: Iterable[Event]) -> None:
        """Append events, oldest first."""
        for event in events:
            item = len(self._codes)
            bare = not event.output.strip()
            text = event.input if bare else event.output
            self._codes.append(_BARE if bare else self._outputs.setdefault(text, len(self._outputs)))
            self._words.append(len(text.split()))
            self._choices.append(event.choices is not None)
            for term in sorted(set(terms(text))):
                self._term_codes.append(self._terms.setdefault(term, len(self._terms)))
                self._term_items.append(item)
            self._term_ends.append(len(self._term_codes))

    def summary(self, low: int, high: int, *, half_life_events: float) -> Summary:
        """Summarise the events ``low`` to ``high`` (exclusive).

        Args:
            low: First event of the window.
            high: One past its last.
            half_life_events: After how many events one counts half.

        Returns:
            The summary; empty for an empty window.
        """
        if low >= high:
            return Summary({}, "")
        weights = np.exp2((np.arange(low, high) - (high - 1)) / half_life_events)
        prior = self._prior(low, high, weights)
        if self._are_labels(low, high):
            return Summary(prior, _label_line(prior, float(weights.sum())))
        return Summary(prior, self._text_line(low, high, weights))

    def _prior(self, low: int, high: int, weights: NDArray[np.float64]) -> dict[str, float]:
        codes = np.asarray(self._codes[low:high], dtype=np.int64)
        said = codes != _BARE
        counts = np.bincount(codes[said], weights[said], len(self._outputs)).astype(np.float64)
        names = list(self._outputs)
        return {names[code]: float(counts[code]) for code in _heaviest(counts, names, _PRIOR_OUTPUTS)}

    def _are_labels(self, low: int, high: int) -> bool:
        """Tell labels and ratings from free texts: offered as choices, repeated, or short."""
        if any(self._choices[low:high]):
            return True
        codes = np.asarray(self._codes[low:high])
        said = codes != _BARE
        if not said.any():
            return False
        short = float(np.mean(np.asarray(self._words[low:high])[said])) <= _LABEL_WORDS
        return short or 2 * len(np.unique(codes[said])) <= int(said.sum())

    def _text_line(self, low: int, high: int, weights: NDArray[np.float64]) -> str:
        length = round(float(np.average(self._words[low:high], weights=weights)))
        line = f"usually about {length} words"
        first, last = self._term_ends[low], self._term_ends[high]
        codes = np.asarray(self._term_codes[first:last], dtype=np.int64)
        items = np.asarray(self._term_items[first:last], dtype=np.int64) - low
        size = len(self._terms)
        counts = np.bincount(codes, weights[items], size).astype(np.float64)
        counts[np.bincount(codes, minlength=size) < 2] = 0.0  # a word used once is no favourite
        names = list(self._terms)
        favourites = [names[code] for code in _heaviest(counts, names, _LINE_TERMS)]
        return f"{line}; often: {', '.join(favourites)}" if favourites else line


def summarise(events: Sequence[Event], *, half_life_events: float) -> Summary:
    """Summarise one task's events, oldest first."""
    columns = Columns()
    columns.extend(events)
    return columns.summary(0, len(columns), half_life_events=half_life_events)


def _heaviest(counts: NDArray[np.float64], names: Sequence[str], limit: int) -> list[int]:
    """Return the codes of the largest positive counts; equal ones by name, so that no other event decides."""
    rounded = np.round(counts, _TIE_DECIMALS)
    least = np.partition(rounded, -limit)[-limit] if len(rounded) > limit else 0.0
    codes = np.flatnonzero((rounded >= least) & (counts > 0)).tolist()
    return sorted(codes, key=lambda code: (-rounded[code], names[code]))[:limit]


def _label_line(prior: dict[str, float], total: float) -> str:
    shown = [name for name, weight in list(prior.items())[:_LINE_OUTPUTS] if weight >= _LINE_SHARE * total]
    return f"mostly: {', '.join(_shown(name) for name in shown)}" if shown else ""


def _shown(output: str) -> str:
    text = " ".join(output.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
