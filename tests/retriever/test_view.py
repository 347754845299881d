"""Views: read your writes, epochs, bounds, and what the store must not do."""

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from oppu.embedder import HashEmbedder
from oppu.errors import FatalError
from oppu.metrics import Metrics
from oppu.values import Event, EventId, UserId, UserState
from retriever.dense import ListKey
from retriever.port import Query, Retrieved
from retriever.service import Retriever
from retriever.view import TaskItems

if TYPE_CHECKING:
    from tests.retriever.conftest import FakeHistory

Make = Callable[..., Retriever]
START = datetime(2026, 1, 1, tzinfo=UTC)


def look(retriever: Retriever, state: UserState, **options: object) -> Retrieved:
    query = Query(state, "t", "text", 1000, neighbours=1000)
    return retriever.retrieve([replace(query, **options)])[0]  # type: ignore[arg-type]


def shown(found: Retrieved) -> list[int]:
    return sorted(hit.event.seq for hit in found.neighbours)


def fill(history: "FakeHistory", user: str, n: int) -> None:
    for _ in range(n):
        history.add(user, f"text {len(history.users.get(UserId(user), []))}")


def test_reads_its_own_writes_by_the_callers_state(history: "FakeHistory", make: Make) -> None:
    retriever = make()
    for n in range(1, 6):
        fill(history, "u", 1)
        found = look(retriever, history.state("u"))
        assert shown(found) == list(range(1, n + 1))
        assert found.through_seq == n
    assert history.calls == [{"u": n} for n in range(5)]


def test_only_users_that_are_behind_are_read_in_one_query(history: "FakeHistory", make: Make) -> None:
    for user in "abc":
        fill(history, user, 2)
    retriever = make()
    queries = [Query(history.state(user), "t", "x", 1) for user in "abc"]
    retriever.retrieve(queries)
    assert history.calls == [{"a": 0, "b": 0, "c": 0}]
    retriever.retrieve(queries)
    assert len(history.calls) == 1
    fill(history, "b", 1)
    retriever.retrieve([Query(history.state(user), "t", "x", 1) for user in "abc"])
    assert history.calls[1:] == [{"b": 2}]


def test_an_older_state_of_the_same_epoch_is_served_from_what_is_loaded(history: "FakeHistory", make: Make) -> None:
    fill(history, "u", 3)
    retriever, state = make(), history.state("u")
    look(retriever, state)
    assert look(retriever, replace(state, last_seq=1)).through_seq == 3


def test_a_store_that_lags_is_said(history: "FakeHistory", make: Make) -> None:
    fill(history, "u", 4)
    history.visible[UserId("u")] = 2
    retriever = make()
    found = look(retriever, history.state("u"))
    assert (shown(found), found.through_seq, found.degraded) == ([1, 2], 2, "history_behind")
    del history.visible[UserId("u")]
    found = look(retriever, history.state("u"))
    assert (shown(found), found.degraded) == ([1, 2, 3, 4], None)


def test_a_store_that_shows_nothing_yet_is_said(history: "FakeHistory", make: Make) -> None:
    fill(history, "u", 1)
    history.visible[UserId("u")] = 0
    found = look(make(), history.state("u"))
    assert (found.hits, found.through_seq, found.degraded) == ((), 0, "history_behind")


def test_erased_items_never_come_back(history: "FakeHistory", make: Make) -> None:
    fill(history, "u", 8)
    retriever, old = make(), history.state("u")
    assert len(look(retriever, old).hits) == 8
    history.erase("u")
    assert look(retriever, history.state("u")) == Retrieved((), (), 0, None)
    assert retriever.resident_users == 0
    assert retriever._views.dense.size(_key(1)) == 0
    for n in (1, 2, 3):
        fill(history, "u", 1)
        found = look(retriever, history.state("u"))
        assert {hit.event.event_id for hit in (*found.hits, *found.neighbours)} == {f"u-2-{i}" for i in range(1, n + 1)}


def test_a_stale_epoch_gets_nothing_and_spoils_nothing(history: "FakeHistory", make: Make) -> None:
    fill(history, "u", 8)
    retriever, old = make(), history.state("u")
    history.erase("u")
    fill(history, "u", 2)
    assert len(look(retriever, history.state("u")).hits) == 2
    found = look(retriever, old)
    assert (found.hits, found.neighbours, found.through_seq) == ((), (), 0)
    assert found.degraded == "epoch_behind"
    assert retriever.profiles([(old, "t", None)])[0].version == "statistics-2@0"
    both = retriever.retrieve([Query(old, "t", "x", 9), Query(history.state("u"), "t", "x", 9)])
    assert [len(r.hits) for r in both] == [0, 2]
    assert len(history.calls) == 1


def test_the_newest_of_two_states_in_one_call_counts(history: "FakeHistory", make: Make) -> None:
    fill(history, "u", 2)
    old = history.state("u")
    fill(history, "u", 2)
    both = make().retrieve([Query(old, "t", "x", 9), Query(history.state("u"), "t", "x", 9)])
    assert [r.through_seq for r in both] == [4, 4]
    assert len(history.calls) == 1


@pytest.mark.parametrize("step", [1, 3, 40])
def test_only_the_newest_items_are_shown(history: "FakeHistory", make: Make, step: int) -> None:
    retriever = make(max_items=16)
    for _ in range(8):
        fill(history, "u", step)
        last = history.state("u").last_seq
        found = look(retriever, history.state("u"))
        assert shown(found) == list(range(max(1, last - 15), last + 1))
        assert sorted(hit.event.seq for hit in found.hits) == shown(found)
    view = retriever._views._views[(UserId("u"), 1)]
    assert len(view.tasks["t"].events) <= 18
    assert retriever._views.dense.size(_key(1)) <= 18


def test_a_task_that_went_out_of_the_window_is_let_go(history: "FakeHistory", make: Make) -> None:
    retriever = make(max_items=8)
    history.add("u", "old", task="rare")
    fill(history, "u", 3)
    assert look(retriever, history.state("u"), task="rare").hits
    fill(history, "u", 30)
    assert not look(retriever, history.state("u"), task="rare").hits
    assert list(retriever._views._views[(UserId("u"), 1)].tasks) == ["t"]


def test_memory_is_bounded_and_the_least_recently_used_goes(
    history: "FakeHistory", make: Make, metrics: Metrics
) -> None:
    users = [f"u{i}" for i in range(30)]
    for user in users:
        fill(history, user, 120)
    retriever = make(resident_bytes=2**20)
    for user in users:
        look(retriever, history.state(user))
        look(retriever, history.state("u0"))
        assert retriever.resident_bytes <= 2**20
    loaded = [user for user, _ in retriever._views._views]
    assert 2 <= len(loaded) < 30
    assert loaded[-2:] == ["u29", "u0"]
    assert loaded[:-1] == users[-len(loaded) + 1 :]
    evicted = metrics.registry.get_sample_value("oppu_retriever_index_events_total", {"event": "eviction"})
    assert evicted == 30 - len(loaded)
    found = look(retriever, history.state("u1"))
    assert shown(found) == list(range(1, 121))


def test_what_evicted_lists_leave_behind_counts_too(history: "FakeHistory", make: Make) -> None:
    history.embedder = HashEmbedder(512)
    for i in range(12):
        fill(history, f"u{i}", 100)
    retriever = make(resident_bytes=2**20)
    for i in range(12):
        look(retriever, history.state(f"u{i}"))
        assert retriever.resident_bytes <= 2**20


def test_one_user_larger_than_the_bound_is_answered_and_dropped(history: "FakeHistory", make: Make) -> None:
    for i in range(60):
        history.add("u", f"{i} " + "x" * 20_000)
    retriever = make(resident_bytes=2**20)
    assert len(look(retriever, history.state("u")).hits) == 60
    assert (retriever.resident_users, len(retriever._views)) == (0, 0)
    assert retriever.resident_bytes <= 2**20


def test_a_poll_of_more_users_than_load_at_once_keeps_its_order(history: "FakeHistory", make: Make) -> None:
    users = [f"u{i}" for i in range(150)]
    for user in users:
        fill(history, user, 2)
    order = users + users[::-1]
    found = make().retrieve([Query(history.state(user), "t", "text", 4) for user in order])
    assert [{hit.event.user_id for hit in r.hits} for r in found] == [{user} for user in order]
    assert [len(call) for call in history.calls] == [64, 64, 22]


def test_accounting_ends_at_nothing(history: "FakeHistory", make: Make) -> None:
    for user in "abc":
        fill(history, user, 30)
    retriever = make(max_items=10)
    for user in "abc":
        look(retriever, history.state(user))
        retriever.profiles([(history.state(user), "t", None)])
        fill(history, user, 30)
        look(retriever, history.state(user))
    retriever.close()
    assert retriever._views._charged == 0
    assert retriever._views.dense.live_bytes == 0


@pytest.mark.parametrize("fault", ["owner", "order"])
def test_a_store_that_breaks_its_contract_is_fatal(history: "FakeHistory", make: Make, fault: str) -> None:
    fill(history, "u", 3)
    events = history.users[UserId("u")]
    if fault == "owner":
        events[1] = replace(events[1], user_id=UserId("other"))
    else:
        events[1], events[2] = events[2], events[1]
    with pytest.raises(FatalError, match="the store returned"):
        look(make(), history.state("u"))


def _key(epoch: int) -> ListKey:
    return ListKey(UserId("u"), epoch, "t")


def _texts(kind: str, number: int) -> tuple[str, str, tuple[str, ...] | None]:
    """Return an input, an output and choices, all of them new objects."""
    if kind == "choices":
        return f"input {number}", f"choice {number}", tuple(f"{number} choice {at}" for at in range(1000))
    if kind == "long choices":
        return f"input {number}", f"choice {number}", tuple(f"{at} " + "выбор " * 200 for at in range(10))
    words = {"short": "", "ascii": "word " * 400, "cyrillic": "слово " * 400, "emoji": "🙂 " * 400}[kind]
    return f"input {number} {words}", f"output {number} {words[:100]}", None


def _read(kind: str, number: int) -> Event:
    """Return an event as a store reads it: every value of it an object of its own."""
    text, output, choices = _texts(kind, number)
    user, task = (bytes(name, "ascii").decode() for name in ("a user's name", "a task"))
    at, event_id = START + timedelta(seconds=number), EventId(f"{number:036}")
    return Event(UserId(user), number, event_id, task, at, at + timedelta(seconds=1), text, output, choices)


@pytest.mark.parametrize("kind", ["short", "ascii", "cyrillic", "emoji", "choices", "long choices"])
def test_the_estimate_is_near_what_python_takes(kind: str) -> None:
    gc.collect()
    tracemalloc.start()
    try:
        items = TaskItems(ListKey(UserId("u"), 1, "t"))
        for number in range(1, 101):
            items.append(_read(kind, number))
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / 1.5 <= items.nbytes <= taken * 1.5


def test_of_choices_it_is_kept_that_there_were_any(history: "FakeHistory", make: Make) -> None:
    outputs = [f"a rather long answer of {n} words that is not said again" for n in range(8)]
    for number, output in enumerate(outputs):
        history.add("u", f"text {number}", output, choices=tuple(outputs))
    retriever, state = make(), history.state("u")
    assert {hit.event.choices for hit in look(retriever, state).hits} == {()}
    assert retriever.profiles([(state, "t", None)])[0].line.startswith("mostly: ")
    history.add("v", "text")
    assert {hit.event.choices for hit in look(retriever, history.state("v")).hits} == {None}
