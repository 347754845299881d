"""Query vectors that are computed ahead: the same as those computed when asked, each text once, nothing else kept."""

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from oppu.embedder import HashEmbedder
from retriever.vectors import FIRST_WINDOW, MOST_WINDOW, NICENESS, QueryVectors, background

TEXTS = [f"text number {n}" for n in range(700)]


class Watched(HashEmbedder):
    """Remembers calls and their threads; refuses one text; may be held back."""

    def __init__(self) -> None:
        super().__init__(16)
        self.calls: list[list[str]] = []
        self.threads: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.go = threading.Event()
        self.go.set()
        self.refused = ""

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.calls.append(list(texts))
        self.threads.add(threading.current_thread().name)
        assert self.go.wait(30)
        self.at_once -= 1
        if self.refused in texts:
            raise ValueError("a text that cannot be embedded")
        return super().embed(texts)


@pytest.fixture
def embedder() -> Watched:
    return Watched()


@pytest.fixture
def vectors(embedder: Watched) -> Iterator[QueryVectors]:
    own = QueryVectors(embedder, ThreadPoolExecutor(1, "ahead"))
    yield own
    embedder.go.set()
    own.close()


def expected(texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return HashEmbedder(16).embed(texts)


def test_they_are_those_of_the_embedder_in_the_order_asked(vectors: QueryVectors) -> None:
    vectors.expect(TEXTS)
    asked = [TEXTS[400], TEXTS[3], "not expected", TEXTS[3], TEXTS[0]]
    assert np.array_equal(np.stack(vectors.of(asked)), expected(asked))
    assert vectors.of([]) == []


def test_each_text_is_embedded_once_and_only_on_the_thread(vectors: QueryVectors, embedder: Watched) -> None:
    vectors.expect([*TEXTS, *TEXTS])
    for first in range(0, len(TEXTS), 64):
        vectors.of(TEXTS[first : first + 64])
    assert sorted(text for call in embedder.calls for text in call) == sorted(TEXTS)
    assert (embedder.threads, embedder.most_at_once) == ({"ahead_0"}, 1)


def test_the_first_call_is_small_and_none_is_large(vectors: QueryVectors, embedder: Watched) -> None:
    vectors.expect(TEXTS)
    vectors.of(TEXTS)
    assert [len(call) for call in embedder.calls] == [FIRST_WINDOW, 64, 128, MOST_WINDOW, 700 - 512]


def test_what_comes_behind_others_is_one_call(vectors: QueryVectors, embedder: Watched) -> None:
    vectors.expect(TEXTS[:300])
    vectors.expect(TEXTS[64:600])
    vectors.of(TEXTS[64:600])
    assert [len(call) for call in embedder.calls] == [FIRST_WINDOW, 64, 128, 300 - 256, 236, 600 - 536]
    vectors.of([f"unexpected {n}" for n in range(300)])
    assert [len(call) for call in embedder.calls[6:]] == [MOST_WINDOW, 300 - MOST_WINDOW]


def test_what_a_step_did_not_reach_is_there_for_the_next(vectors: QueryVectors, embedder: Watched) -> None:
    vectors.expect(TEXTS[:300])
    vectors.of(TEXTS[:64])
    vectors.expect(TEXTS[64:400])
    vectors.of(TEXTS[64:400])
    assert sorted(text for call in embedder.calls for text in call) == sorted(TEXTS[:400])


def test_what_is_no_longer_expected_is_forgotten(vectors: QueryVectors, embedder: Watched) -> None:
    vectors.expect(["gone", "kept"])
    vectors.of(["gone", "kept", "kept"])
    vectors.expect(["kept", "new"])
    vectors.of(["gone", "kept"])
    assert Counter(text for call in embedder.calls for text in call) == {"gone": 2, "kept": 1, "new": 1}


def test_what_is_no_longer_expected_holds_nobody_up(vectors: QueryVectors, embedder: Watched) -> None:
    embedder.go.clear()
    vectors.expect(TEXTS)
    vectors.expect(["urgent"])
    embedder.go.set()
    vectors.of(["urgent"])
    assert len(embedder.calls) <= 2  # one may have begun
    assert embedder.calls[-1] == ["urgent"]


def test_a_call_that_others_still_need_goes_on(vectors: QueryVectors, embedder: Watched) -> None:
    embedder.go.clear()
    vectors.expect(TEXTS)
    vectors.expect(TEXTS[-3:])
    embedder.go.set()
    assert np.array_equal(np.stack(vectors.of(TEXTS[-3:])), expected(TEXTS[-3:]))
    assert len(embedder.calls) <= 2


def test_a_text_that_comes_again_later_does_not_wait_for_the_rest(vectors: QueryVectors, embedder: Watched) -> None:
    vectors.expect([*TEXTS[:64], TEXTS[0], *TEXTS[64:]])
    vectors.of(TEXTS[:64])
    vectors.of([TEXTS[0]])
    vectors.of(TEXTS)
    assert sum(len(call) for call in embedder.calls) == len(TEXTS)


def test_it_goes_on_while_the_caller_works(vectors: QueryVectors, embedder: Watched) -> None:
    embedder.go.clear()
    vectors.expect(["a", "b"])  # returns although nothing is done
    embedder.go.set()
    assert np.array_equal(np.stack(vectors.of(["a", "b"])), expected(["a", "b"]))


def test_a_text_that_fails_costs_only_who_asks_for_it(vectors: QueryVectors, embedder: Watched) -> None:
    embedder.refused = TEXTS[90]
    vectors.expect(TEXTS[:128])
    assert np.array_equal(np.stack(vectors.of(TEXTS[64:80])), expected(TEXTS[64:80]))
    with pytest.raises(ValueError, match="cannot be embedded"):
        vectors.of(TEXTS[80:100])
    embedder.refused = ""
    assert np.array_equal(np.stack(vectors.of(TEXTS[80:100])), expected(TEXTS[80:100]))


def test_without_a_thread_whoever_asks_computes(embedder: Watched) -> None:
    own = QueryVectors(embedder)
    own.expect(TEXTS)
    assert embedder.calls == []
    assert np.array_equal(np.stack(own.of(TEXTS[:5])), expected(TEXTS[:5]))
    assert embedder.threads == {threading.current_thread().name}
    assert own.of([]) == []
    own.close()


def test_closing_waits_for_what_has_begun_and_drops_the_rest(embedder: Watched) -> None:
    class Dropping(ThreadPoolExecutor):
        """Lets the embedder go on once nothing more can begin."""

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            embedder.go.set()
            super().shutdown(wait=wait, cancel_futures=cancel_futures)
            assert embedder.at_once == 0

    own = QueryVectors(embedder, Dropping(1, "ahead"))
    embedder.go.clear()
    own.expect(TEXTS)
    own.close()
    assert len(embedder.calls) <= 1
    with pytest.raises(RuntimeError):
        own.of(["late"])


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_its_thread_gives_way_and_no_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    with background() as thread:
        assert thread.submit(niceness).result() == min(before + NICENESS, 19)
    assert niceness() == before

    def forbidden(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", forbidden)
    with background() as thread:
        assert thread.submit(niceness).result() == before
