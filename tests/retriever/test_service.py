"""The retriever as its callers see it: filters, modes, brute force, profiles, shutdown."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oppu.errors import FatalError, TransientError
from oppu.metrics import Metrics
from oppu.values import Event, UserId, UserState
from retriever.port import Degradation, Hit, Query, Retrieved
from retriever.service import Retriever
from retriever.terms import text_key

if TYPE_CHECKING:
    from tests.retriever.conftest import CountingEmbedder, FakeHistory

Make = Callable[..., Retriever]
World = Callable[..., "tuple[FakeHistory, Retriever]"]
MODES = ["dense", "bm25", "recency", "hybrid"]
WORDS = ["red", "green", "blue", "apple", "pie", "sky", "tree", "house"]


def ask(history: "FakeHistory", user: str, text: str, k: int = 4, **options: object) -> Query:
    query = Query(history.state(user), "t", text, k)
    return replace(query, **options)  # type: ignore[arg-type]


def seqs(hits: tuple[Hit, ...]) -> list[int]:
    return [hit.event.seq for hit in hits]


def visible(history: "FakeHistory", query: Query, max_items: int) -> list[Event]:
    """Return the events that a query may see, by the definition."""
    before = query.before_seq if query.before_seq is not None else 10**9
    events = history.users.get(query.user.user_id, [])[-max_items:]
    return [e for e in events if e.task == query.task and e.seq < before and e.input != query.exclude_input]


def check_neighbours(history: "FakeHistory", query: Query, found: Retrieved, max_items: int) -> None:
    """Hold the neighbours against brute force; items that tie within rounding may stand in for each other."""
    vector = history.embedder.embed([query.text])[0]
    events = visible(history, query, max_items)
    cosines = [min(1.0, float(e.embedding @ vector)) for e in events if e.embedding is not None]
    expected = sorted(cosines, reverse=True)
    got = [hit.similarity for hit in found.neighbours]
    np.testing.assert_allclose(got, expected[: query.neighbours], atol=3e-6)
    known = {e.seq: e for e in events}
    assert len({hit.event.seq for hit in found.neighbours}) == len(got)
    for hit in found.neighbours:
        event = known[hit.event.seq]
        assert event.event_id == hit.event.event_id
        assert event.embedding is not None
        assert min(1.0, float(event.embedding @ vector)) == pytest.approx(hit.similarity, abs=3e-6)


def check_hits(history: "FakeHistory", query: Query, found: Retrieved, max_items: int) -> None:
    """Whatever the mode: only visible items, no text twice, and as many as there are up to k."""
    events = visible(history, query, max_items)
    texts = [text_key(hit.event.input) for hit in found.hits]
    assert len(set(texts)) == len(texts) == min(query.k, len({text_key(e.input) for e in events}))
    assert {hit.event.event_id for hit in found.hits} <= {e.event_id for e in events}


class Script:
    """Random users, refreshes, erasures and questions against one small retriever."""

    def __init__(self, world: World, data: st.DataObject, mode: str) -> None:
        self.data = data
        self.max_items = data.draw(st.sampled_from([5, 12, 1000]))
        self.history, self.retriever = world(mode=mode, max_items=self.max_items, resident_bytes=2**20)

    def grow(self) -> None:
        user = self.data.draw(st.sampled_from("abc"))
        for _ in range(self.data.draw(st.integers(1, 25))):
            text = " ".join(self.data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)))
            self.history.add(user, text, task=self.data.draw(st.sampled_from(["t", "other"])))

    def erase(self) -> None:
        self.history.erase(self.data.draw(st.sampled_from("abc")))

    def evict(self) -> None:
        """Make the oldest user go, as a lower bound would."""
        views = self.retriever._views
        if views._views:
            views._drop(next(iter(views._views)))

    def ask(self) -> None:
        queries = [
            ask(
                self.history,
                self.data.draw(st.sampled_from("abcd")),
                self.data.draw(st.sampled_from(WORDS)),
                self.data.draw(st.integers(0, 8)),
                neighbours=self.data.draw(st.integers(0, 30)),
                before_seq=self.data.draw(st.none() | st.integers(-1, 40)),
                exclude_input=self.data.draw(st.none() | st.sampled_from(WORDS)),
                task=self.data.draw(st.sampled_from(["t", "other", "unheard"])),
            )
            for _ in range(self.data.draw(st.integers(1, 6)))
        ]
        for query, found in zip(queries, self.retriever.retrieve(queries), strict=True):
            check_neighbours(self.history, query, found, self.max_items)
            check_hits(self.history, query, found, self.max_items)
            before = query.before_seq if query.before_seq is not None else 10**9
            assert found.through_seq == max(0, min(query.user.last_seq, before - 1))
            assert found.degraded is None


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_brute_force_over_any_history(world: World, mode: str, data: st.DataObject) -> None:
    script = Script(world, data, mode)
    actions = [script.grow, script.grow, script.ask, script.ask, script.erase, script.evict]
    for action in data.draw(st.lists(st.sampled_from(actions), min_size=2, max_size=14)):
        action()
    script.ask()


def test_dense_hits_are_the_nearest_texts_once(history: "FakeHistory", make: Make) -> None:
    for text in ("red apple", "Red  Apple", "blue sky", "red apple", "red apple pie"):
        history.add("u", text)
    found = make(mode="dense").retrieve([ask(history, "u", "red apple", 2, neighbours=4)])[0]
    assert seqs(found.hits) == [4, 5] or text_key(found.hits[1].event.input) != "red apple"
    assert found.hits[0].event.seq == 4
    assert found.hits[0].similarity == pytest.approx(1.0, abs=1e-3)
    assert [text_key(hit.event.input) for hit in found.neighbours].count("red apple") >= 2
    assert found.hits[0].event.embedding is None


def test_many_repeats_do_not_crowd_out_other_texts(history: "FakeHistory", make: Make) -> None:
    history.add("u", "blue sky")
    for _ in range(300):
        history.add("u", "red apple")
    found = make(mode="dense").retrieve([ask(history, "u", "red apple", 4)])[0]
    assert seqs(found.hits) == [301, 1]


def test_bm25_ranks_by_terms_and_fills_up_with_the_newest(history: "FakeHistory", make: Make) -> None:
    for text in ("green tree", "red apple pie", "blue sky", "old house"):
        history.add("u", text)
    found = make(mode="bm25").retrieve([ask(history, "u", "apple", 3)])[0]
    assert seqs(found.hits) == [2, 4, 3]
    assert math.isnan(found.hits[0].similarity)
    assert found.neighbours == ()


def test_recency_needs_no_embedding(history: "FakeHistory", make: Make, counting: "CountingEmbedder") -> None:
    for text in ("one", "two", "three", "two"):
        history.add("u", text)
    found = make(counting, mode="recency").retrieve([ask(history, "u", "any", 3)])[0]
    assert seqs(found.hits) == [4, 3, 1]
    assert counting.calls == []


def test_hybrid_agrees_on_what_all_rankings_like(history: "FakeHistory", make: Make) -> None:
    for text in ("old house", "green tree", "blue sky", "red apple pie", "tall tree"):
        history.add("u", text)
    found = make(mode="hybrid").retrieve([ask(history, "u", "red apple pie", 2)])[0]
    assert found.hits[0].event.seq == 4
    assert found.hits[0].similarity == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_the_past_is_seen_as_it_was(history: "FakeHistory", make: Make, mode: str) -> None:
    """A question with ``before_seq`` gets exactly what it would have got at that time."""
    rng = np.random.default_rng(3)
    retriever, then = make(mode=mode), []
    questions = [" ".join(rng.choice(WORDS, 3)) for _ in range(30)]
    for text in questions:
        then += retriever.retrieve([ask(history, "u", text, 4, neighbours=5)])
        history.add("u", text)
    queries = [ask(history, "u", text, 4, neighbours=5, before_seq=i) for i, text in enumerate(questions, start=1)]
    for now, before in zip(make(mode=mode).retrieve(queries), then, strict=True):
        assert seqs(now.hits) == seqs(before.hits)
        assert seqs(now.neighbours) == seqs(before.neighbours)
        assert now.through_seq == before.through_seq


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_does_not_depend_on_its_batch(history: "FakeHistory", make: Make, mode: str) -> None:
    rng = np.random.default_rng(5)
    for i in range(200):
        history.add(f"u{i % 5}", " ".join(rng.choice(WORDS, 2)))
    queries = [ask(history, f"u{i}", "red tree", 1 + 3 * i, neighbours=4 * i) for i in range(5)]
    together = make(mode=mode).retrieve(queries)
    alone = [make(mode=mode).retrieve([query])[0] for query in queries]
    assert [(seqs(r.hits), seqs(r.neighbours)) for r in together] == [(seqs(r.hits), seqs(r.neighbours)) for r in alone]


def test_texts_are_embedded_in_one_call_and_given_vectors_are_used(
    history: "FakeHistory", make: Make, counting: "CountingEmbedder"
) -> None:
    for user in ("a", "b", "c"):
        history.add(user, "red apple")
        history.add(user, "blue sky")
    retriever = make(counting, mode="dense")
    queries = [ask(history, user, "red apple", 1) for user in ("a", "b", "c", "unknown")]
    vector = history.embedder.embed(["blue sky"])[0]
    found = retriever.retrieve(queries, [None, vector, None, None])
    assert counting.calls == [["red apple", "red apple"]]
    assert [seqs(r.hits) for r in found] == [[1], [2], [1], []]
    with pytest.raises(ValueError, match="2 vectors for 4 queries"):
        retriever.retrieve(queries, [vector, vector])


@pytest.mark.parametrize("mode", MODES)
def test_unknown_user_and_empty_calls(history: "FakeHistory", make: Make, mode: str) -> None:
    retriever = make(mode=mode)
    assert retriever.retrieve([]) == []
    assert retriever.profiles([]) == []
    assert retriever.retrieve([ask(history, "nobody", "x", 4, neighbours=4)]) == [Retrieved((), (), 0, None)]
    profile = retriever.profiles([(history.state("nobody"), "t", None)])[0]
    assert (profile.version, profile.prior, profile.line, profile.through_seq) == ("statistics-2@0", {}, "", 0)
    assert history.calls == []


def test_zero_k_still_has_neighbours(history: "FakeHistory", make: Make) -> None:
    history.add("u", "red apple")
    found = make().retrieve([ask(history, "u", "red", 0, neighbours=3)])[0]
    assert found.hits == ()
    assert seqs(found.neighbours) == [1]


def test_a_wrong_map_is_fatal(history: "FakeHistory", make: Make) -> None:
    history.add("a", "red apple")
    history.add("b", "red apple")
    retriever = make(mode="recency")
    retriever.retrieve([ask(history, "a", "x"), ask(history, "b", "x")])
    views = retriever._views._views
    a, b = views[(UserId("a"), 1)], views[(UserId("b"), 1)]
    a.tasks, b.tasks = b.tasks, a.tasks
    with pytest.raises(FatalError, match="another user"):
        retriever.retrieve([ask(history, "a", "red apple")])


def test_other_embedders_items_are_left_out_and_said(history: "FakeHistory", make: Make) -> None:
    history.add("u", "red apple", embedded=False)
    history.add("u", "blue sky")
    dense, hybrid, recency = make(mode="dense"), make(mode="hybrid"), make(mode="recency")
    found = dense.retrieve([ask(history, "u", "red apple", neighbours=5)])[0]
    assert seqs(found.hits) == seqs(found.neighbours) == [2]
    assert found.degraded == Degradation.EMBEDDER_MISMATCH
    found = hybrid.retrieve([ask(history, "u", "red apple")])[0]
    assert set(seqs(found.hits)) == {1, 2}
    assert found.degraded == "embedder_mismatch"
    assert recency.retrieve([ask(history, "u", "red apple")])[0].degraded is None
    history.add("u", "green tree")
    after = ask(history, "u", "tree", task="other", neighbours=1)
    assert hybrid.retrieve([after])[0].degraded is None


def test_a_damaged_vector_is_not_compared(history: "FakeHistory", make: Make) -> None:
    for vector in (np.full(16, np.inf, np.float32), np.ones(3, np.float32)):
        event = history.add("u", "red apple")
        history.users[UserId("u")][-1] = replace(event, embedding=vector)
    history.add("u", "blue sky")
    found = make(mode="dense").retrieve([ask(history, "u", "red apple", neighbours=9)])[0]
    assert seqs(found.neighbours) == [3]
    assert found.degraded == "embedder_mismatch"


def test_profiles_by_task_and_time(history: "FakeHistory", make: Make) -> None:
    for output in ("politics", "media", "media"):
        history.add("u", "text", output)
    history.add("u", "text", "5", task="rating")
    state, retriever = history.state("u"), make(half_life_events=1.0)
    requests = [(state, "t", None), (state, "t", 2), (state, "rating", None), (state, "t", 1), (state, "x", None)]
    now, then, rating, none, unheard = retriever.profiles(requests)
    assert now.prior == pytest.approx({"media": 1.5, "politics": 0.25})
    assert (now.version, now.through_seq, now.line) == ("statistics-2@4", 4, "mostly: media, politics")
    assert (then.version, then.prior) == ("statistics-2@1", {"politics": 1.0})
    assert rating.line == "mostly: 5"
    assert (none.version, none.prior, none.line) == ("statistics-2@0", {}, "")
    assert (unheard.version, unheard.prior) == ("statistics-2@4", {})
    history.add("u", "text", "sports")
    assert retriever.profiles([(history.state("u"), "t", None)])[0].prior["sports"] == 1.0
    now.prior["media"] = 99.0  # the caller's copy
    assert retriever.profiles([(state, "t", 4)])[0].prior["media"] == pytest.approx(1.5)


def test_metrics_and_close(history: "FakeHistory", make: Make, metrics: Metrics) -> None:
    history.add("u", "red apple")
    retriever = make()
    retriever.retrieve([ask(history, "u", "red")])
    sample = metrics.registry.get_sample_value
    assert sample("oppu_retriever_index_users") == retriever.resident_users == 1
    assert sample("oppu_retriever_index_bytes") == retriever.resident_bytes > 0
    retriever.close()
    retriever.close()
    assert sample("oppu_retriever_index_users") == retriever.resident_users == 0
    for call in (lambda: retriever.retrieve([ask(history, "u", "red")]), lambda: retriever.profiles([])):
        with pytest.raises(FatalError, match="closed"):
            call()


def test_calls_of_several_threads_are_serialised(history: "FakeHistory", make: Make) -> None:
    for i in range(120):
        history.add(f"u{i % 6}", f"{WORDS[i % 8]} {WORDS[i % 5]}")
    retriever, failed = make(resident_bytes=2**20), []  # type: tuple[Retriever, list[BaseException]]

    def work(n: int) -> None:
        try:
            for i in range(40):
                user = f"u{(i + n) % 6}"
                found = retriever.retrieve([ask(history, user, "red tree", 3, neighbours=20)])[0]
                assert len(found.neighbours) == 20
                assert all(hit.event.user_id == user for hit in found.neighbours)
                assert retriever.resident_bytes <= 2**20
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_store_errors_pass_and_leave_views_whole(history: "FakeHistory", make: Make) -> None:
    history.add("u", "red apple")
    retriever = make()
    retriever.retrieve([ask(history, "u", "red")])
    history.add("u", "red tree")
    history.down = True
    with pytest.raises(TransientError):
        retriever.retrieve([ask(history, "u", "red")])
    stale = UserState(UserId("u"), 1, 1, None)
    assert seqs(retriever.retrieve([Query(stale, "t", "red", 4)])[0].hits) == [1]
    history.down = False
    assert set(seqs(retriever.retrieve([ask(history, "u", "red")])[0].hits)) == {1, 2}
