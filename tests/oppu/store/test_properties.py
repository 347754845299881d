"""Properties of any history of batches: gapless numbers, replay that changes nothing, a lossless round trip."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from oppu.settings import StoreSettings
from oppu.store.records import NewEvent
from oppu.store.schema import from_micros, to_micros
from oppu.store.sql import SqlStore, open_store
from oppu.values import BaseId, UserId
from tests.oppu.store.support import EMBEDDER, NOW, Writer, new_event

BASE = BaseId("b")
USERS = ("a", "b", "a\x00")

Item = tuple[int, int, int]  # user, event id, content
batches = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 1)), max_size=12), max_size=6
)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@contextmanager
def fresh(template: Path) -> Iterator[SqlStore]:
    """A store of one example alone."""
    with tempfile.TemporaryDirectory() as folder:
        where = StoreSettings(url=f"sqlite:///{shutil.copy(template, folder)}")
        store = open_store(where, deployment_key="k")
        store.register_base(BASE)
        try:
            yield store
        finally:
            store.close()


def event_of(item: Item) -> NewEvent:
    """The event that an item stands for."""
    user, event_id, content = item
    return new_event(USERS[user], f"e{event_id}", output=str(content))


def content(store: SqlStore) -> dict[str, list[tuple[int, str, str]]]:
    """Everything a reader sees."""
    found = store.events({UserId(user): 0 for user in USERS}, embedder=EMBEDDER, limit=1000)
    return {user: [(e.seq, e.event_id, e.output) for e in events] for user, events in found.items()}


def model(history: list[list[Item]]) -> dict[str, list[tuple[int, str, str]]]:
    """What the store should hold: the first content of each id, numbered in order of arrival."""
    kept: dict[str, dict[str, str]] = {user: {} for user in USERS}
    for user, event_id, output in (item for batch in history for item in batch):
        kept[USERS[user]].setdefault(f"e{event_id}", str(output))
    return {user: [(n, *pair) for n, pair in enumerate(ids.items(), 1)] for user, ids in kept.items()}


@settings(max_examples=25, deadline=None)
@given(history=batches)
def test_numbers_are_gapless_and_replay_changes_nothing(sqlite_template: Path, history: list[list[Item]]) -> None:
    with fresh(sqlite_template) as store:
        writer = Writer(store)
        for batch in history:
            result = writer.write([event_of(item) for item in batch])
            assert result.written + result.duplicates + result.conflicts == len(batch)
        first = content(store)
        assert first == model(history)
        pending = {user.user_id: user.pending for user in store.due(BASE, now=NOW, min_pending=1, limit=9)}
        assert pending == {user: len(events) for user, events in first.items() if events}
        for batch in history:
            assert writer.write([event_of(item) for item in batch]).written == 0
        assert content(store) == first
        assert len(store.outbox(1000)) == sum(result.conflicts for result in writer.results)


@settings(max_examples=15, deadline=None)
@given(
    triples=st.lists(
        st.tuples(unicode_text, unicode_text, unicode_text), min_size=1, max_size=8, unique_by=lambda t: t[:2]
    )
)
def test_any_text_survives(sqlite_template: Path, triples: list[tuple[str, str, str]]) -> None:
    with fresh(sqlite_template) as store:
        Writer(store).write([new_event(user, name, text=words, output=words) for user, name, words in triples])
        for user in {user for user, _, _ in triples}:
            found = store.events({UserId(user): 0}, embedder=EMBEDDER, limit=99)[UserId(user)]
            assert [(user, e.event_id, e.input) for e in found] == [t for t in triples if t[0] == user]


@given(st.datetimes(min_value=datetime(1800, 1, 1), max_value=datetime(3000, 1, 1), timezones=st.just(UTC)))
def test_times_survive_to_the_microsecond(time: datetime) -> None:
    assert from_micros(to_micros(time)) == time
