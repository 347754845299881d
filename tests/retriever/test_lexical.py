"""BM25 windows against plain bm25s over the window's texts alone."""

from typing import Any

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retriever.lexical import LexicalIndex
from retriever.terms import terms, text_key

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "the", "x"]
texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), min_size=1, max_size=15)


def plain(corpus: list[str], query: str) -> NDArray[Any]:
    documents = [terms(text) for text in corpus]
    if not any(documents):
        return np.zeros(len(corpus))
    index = bm25s.BM25(method="lucene")
    index.index(documents, show_progress=False)
    known = [word for word in terms(query) if word in index.vocab_dict]
    return np.asarray(index.get_scores(known)) if known else np.zeros(len(corpus))


@settings(max_examples=80, deadline=None)
@given(texts, texts, st.data())
def test_equals_bm25s_over_the_window_alone(first: list[str], later: list[str], data: st.DataObject) -> None:
    index, corpus = LexicalIndex(), list(first)
    index.extend(first)
    for added in ([], later):
        index.extend(added)
        corpus += added
        low = data.draw(st.integers(0, len(corpus)))
        high = data.draw(st.integers(0, len(corpus)))
        query = data.draw(st.lists(st.sampled_from([*WORDS, "unheard"]), max_size=5).map(" ".join))
        expected = plain(corpus[low:high], query) if low < high else np.zeros(0)
        np.testing.assert_allclose(index.scores(query, low, high), expected, rtol=1e-4, atol=1e-6)


def test_a_window_older_than_a_word_does_not_know_it() -> None:
    index = LexicalIndex()
    index.extend(["red apple", "green apple"])
    assert index.scores("apple", 0, 2).tolist() != [0, 0]
    index.extend(["yellow banana"])
    assert index.scores("banana", 0, 2).tolist() == [0, 0]
    assert index.scores("banana", 0, 3)[2] > 0


def test_later_items_do_not_change_scores_of_the_past() -> None:
    index = LexicalIndex()
    index.extend(["red apple", "green apple pie", "blue sky"])
    before = index.scores("green apple", 0, 3)
    index.extend(["green green"] * 20)
    index.scores("green apple", 0, 23)
    np.testing.assert_array_equal(index.scores("green apple", 0, 3), before)


def test_size_grows_with_the_texts() -> None:
    index = LexicalIndex()
    empty = index.nbytes
    index.extend(["some words here"])
    assert len(index) == 1
    assert index.nbytes > empty


def test_texts_without_terms() -> None:
    index = LexicalIndex()
    index.extend(["", "the"])
    assert index.scores("apple", 0, 2).tolist() == index.scores("", 0, 2).tolist() == [0, 0]


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    index = LexicalIndex()
    index.extend(["red apple"] * 50)
    index.scores("apple", 0, 50)
    assert capfd.readouterr() == ("", "")


def test_terms_and_keys() -> None:
    assert terms("The Cats, and a DOG's straße!") == ["cats", "dog", "strasse"]
    assert terms("") == []
    assert text_key("  Same\n Text ") == text_key("same text") != text_key("same texts")
