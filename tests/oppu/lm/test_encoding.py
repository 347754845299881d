"""Caches of texts: as much of a text as is looked at is tokenized, once in a call, and nothing for who is late."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from oppu.lm import blend, encoding
from oppu.lm.base import LoadedBase
from oppu.lm.blend import EXPERTS, Blend, Cache, Texts
from oppu.lm.encoding import _CHARACTERS_A_TOKEN, Caches
from oppu.lm.model import TorchModel
from oppu.lm.port import Row
from oppu.lm.prompts import Prompts
from oppu.settings import ModelSettings
from oppu.tasks import Tasks

Make = Callable[..., Any]
LONGEST = 32
FAR = LONGEST * _CHARACTERS_A_TOKEN
WEIGHTS = {name: (0.0, 0.0) for name in EXPERTS}
END = 0


class Letters:
    """A tokenizer of one token a letter, or (``wide``) a word, that keeps what it was asked."""

    def __init__(self, *, wide: bool = False) -> None:
        self.calls: list[list[str]] = []
        self._wide = wide

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return a token a letter, or a word."""
        self.calls.append(texts)
        return [[len(w) for w in text.split(" ")] if self._wide else [ord(c) for c in text] for text in texts]

    def caches(self) -> Caches:
        """Return a maker of caches over it, whose calls are counted from here."""
        prompts = Prompts(self.encode, start=(), end=END)
        self.calls.clear()
        return Caches(prompts, LONGEST)


def line(cache: Cache) -> list[int]:
    return cache._line[1:]


def whole(letters: Letters, text: str) -> list[int]:
    """Return what a text's cache holds where all of it is tokenized."""
    prompts = Prompts(letters.encode, start=(), end=END)
    return [*prompts.continuations([text])[text], END][:LONGEST]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("text", ["", " ", "a", " ab cd ", "x" * (LONGEST - 2), "x y " * LONGEST, "x" * 20_000])
def test_a_texts_tokens_are_those_of_the_whole_text(text: str, wide: bool) -> None:
    [cache] = Letters(wide=wide).caches().of({"knn": ((text, 1.0),)})
    expected = whole(Letters(wide=wide), text)
    assert line(cache) == (expected if len(text) <= FAR or not wide else [FAR])


@pytest.mark.parametrize("text", ["x" * 20_000, " " * 20_000 + "x" * 20_000])
def test_what_is_not_looked_at_is_not_tokenized(text: str) -> None:
    letters = Letters()
    [cache] = letters.caches().of({"prior": ((text, 1.0),)})
    assert max(len(one) for call in letters.calls for one in call) <= FAR + len(": ")
    assert line(cache) == [ord(" "), *[ord("x")] * (LONGEST - 1)]


def test_a_text_that_is_cut_has_no_end() -> None:
    fits, longer = "x" * FAR, "x" * (FAR + 1)
    caches = Letters(wide=True).caches()
    [cache] = caches.of({"knn": ((fits, 1.0), (longer, 1.0))})
    assert line(cache) == [FAR, END, blend._START, FAR]


def test_a_text_is_tokenized_and_indexed_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Counted(Cache):
        def __init__(self, name: str, texts: Sequence[tuple[tuple[int, ...], float]]) -> None:
            made.append(name)
            super().__init__(name, texts)

    monkeypatch.setattr(encoding, "Cache", Counted)
    letters = Letters()
    caches = letters.caches()
    prior: Texts = (("ab", 2.0), ("cd", 1.0))
    first = caches.of({"knn": (("ab", 1.0),), "prior": prior, "input": (("one", 1.0),)})
    assert len(letters.calls) == 1
    again = caches.of({"knn": (("cd", 1.0),), "prior": tuple(prior), "input": (("two", 1.0),)})
    assert letters.calls == [[": ab", ": cd", ": one"], [": two"]]
    assert made == ["knn", "prior", "input", "knn", "input"]
    assert first[1] is again[1]
    assert line(again[0]) == [*map(ord, " cd"), END]


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the texts that are tokenized as continuations from here on."""
    found: list[str] = []
    real = Prompts.continuations

    def spied(self: Prompts, texts: Any) -> Any:
        asked = list(texts)
        found.extend(asked)
        return real(self, asked)

    monkeypatch.setattr(Prompts, "continuations", spied)
    return found


def asked(output: str, late: Callable[[], bool] | None = None, words: str = "words") -> Row:
    caches = {"prior": ((output, 1.0),), "input": ((words, 1.0),)}
    return Row("news_headline", words, blend=Blend(WEIGHTS, caches), max_new_tokens=5, late=late)


@pytest.fixture
def model(make_base: Callable[..., LoadedBase], tasks: Tasks, settings: ModelSettings) -> TorchModel:
    return TorchModel(make_base("llama", torch.float64), tasks, settings=settings, slots=2)


def test_rows_of_one_user_share_what_was_tokenized(model: TorchModel, tokenized: list[str]) -> None:
    rows = [asked("a headline", words=words) for words in ("some", "w " * 60, "others")]  # of several buckets
    found = model.answer(rows)
    assert tokenized.count("a headline") == 1
    assert [one.text for one in found] == [model.answer([row])[0].text for row in rows]


def test_no_cache_is_made_for_a_row_that_is_late(model: TorchModel, tokenized: list[str]) -> None:
    rows = [asked("never", late=lambda: True), asked("of another", late=lambda: False), asked("nor", late=lambda: True)]
    late, timely, last = model.answer(rows)
    assert (late.late, late.text, last.late) == (True, None, True)
    assert not timely.late and timely.text == model.answer([rows[1]])[0].text
    assert "of another" in tokenized and not {"never", "nor"} & set(tokenized)
    assert [one.late for one in model.answer([rows[0], rows[2]])] == [True, True]


def test_a_row_is_given_up_before_the_next_ones_caches(model: TorchModel, tokenized: list[str]) -> None:
    """Each row is asked when its turn has come: the caches of those before it took their time."""
    begun = lambda: "first" in tokenized  # noqa: E731 - the deadline passes while the first row's are made
    found = model.answer([asked("first"), asked("second", late=begun)])
    assert [one.late for one in found] == [False, True]
    assert "second" not in tokenized
