"""The contract of writing and reading histories, on every database."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from sqlalchemy import select

from oppu.errors import OffsetConflict
from oppu.settings import StoreSettings
from oppu.store import sql, transport
from oppu.store.records import IngestBatch, IngestResult, NewRefusal, OffsetAdvance, StoredOffset
from oppu.store.schema import users
from oppu.store.sql import SqlStore
from oppu.values import EventId, OutRecord, Partition, UserId
from tests.oppu.store.conftest import Opener
from tests.oppu.store.support import (
    ADA,
    BASE,
    BOB,
    CLUSTER,
    EMBEDDER,
    EVENTS,
    NOW,
    Writer,
    new_answer,
    new_event,
    some,
    vector,
)

UNICODE_IDS = (
    "a\x00b",
    "a",
    "a\x00",
    "\U0001f600",
    "é",
    "e\u0301",
    "\u212b",
    "Å",
    "A",
    "ａ",
    " ",
    "a ",
    "\uffff",
    "' --",
)


def history(store: SqlStore, user_id: str, after: int = 0, limit: int = 1000) -> list[tuple[int, str]]:
    """Sequence numbers and event ids."""
    found = store.events({UserId(user_id): after}, embedder=EMBEDDER, limit=limit)[UserId(user_id)]
    return [(event.seq, event.event_id) for event in found]


def test_events_come_back_as_written(store: SqlStore, writer: Writer) -> None:
    event = new_event("ada", "e1", text="nul \x00 \U0001f600 e\u0301", choices=("é", "e\u0301", '"'), in_reply_to="r")
    assert writer.write([event]) == IngestResult(written=1)
    (stored,) = store.events({ADA: 0}, embedder=EMBEDDER, limit=10)[ADA]
    assert (stored.user_id, stored.seq, stored.event_id, stored.task) == (ADA, 1, "e1", "task")
    assert (stored.input, stored.output, stored.choices) == (event.input, "yes", event.choices)
    assert (stored.occurred_at, stored.recorded_at) == (event.occurred_at, event.recorded_at)
    assert stored.recorded_at.tzinfo is not None and stored.in_reply_to == "r"
    assert stored.embedding is not None and stored.embedding.dtype == np.float32
    np.testing.assert_array_equal(stored.embedding, vector(2).astype(np.float32))


def test_a_foreign_embedding_is_none(store: SqlStore, writer: Writer) -> None:
    writer.write([new_event("ada", "e1"), replace(new_event("ada", "e2"), embedder="other")])
    first, second = store.events({ADA: 0}, embedder=EMBEDDER, limit=10)[ADA]
    assert first.embedding is not None and second.embedding is None


def test_sequences_are_gapless_and_in_batch_order(store: SqlStore, writer: Writer) -> None:
    writer.write([new_event(*pair) for pair in (("bob", "x"), ("ada", "z"), ("bob", "w"), ("ada", "y"))])
    writer.write([new_event("ada", "a"), new_event("bob", "b")])
    assert history(store, "ada") == [(1, "z"), (2, "y"), (3, "a")]
    assert history(store, "bob") == [(1, "x"), (2, "w"), (3, "b")]


def test_events_after_a_cursor_are_the_newest(store: SqlStore, writer: Writer) -> None:
    writer.write([*some("ada", 10), *some("bob", 3)])
    assert [seq for seq, _ in history(store, "ada", after=4, limit=3)] == [8, 9, 10]
    assert [seq for seq, _ in history(store, "ada", after=8, limit=3)] == [9, 10]
    assert history(store, "ada", after=10) == [] and history(store, "ada", limit=0) == []
    both = store.events({ADA: 9, BOB: 0, UserId("nobody"): 0}, embedder=EMBEDDER, limit=2)
    assert {user: [event.seq for event in listed] for user, listed in both.items()} == {
        "ada": [10],
        "bob": [2, 3],
        "nobody": [],
    }


def test_many_users_in_one_call(store: SqlStore, writer: Writer) -> None:
    names = [UserId(f"u{n:04}") for n in range(950)]  # more than two chunks
    assert writer.write([new_event(name, "e") for name in names]).written == 950
    assert all(
        len(listed) == 1 for listed in store.events(dict.fromkeys(names, 0), embedder=EMBEDDER, limit=5).values()
    )
    assert set(store.users(names, BASE)) == set(names)
    assert [state.user_id for state in store.list_users(limit=3, after=names[10])] == names[11:14]
    assert writer.write([new_event(name, "e") for name in names]).duplicates == 950


def test_duplicates_and_conflicts(store: SqlStore, writer: Writer) -> None:
    first = new_event("ada", "e1")
    again = new_event("ada", "e1", output="no")
    assert writer.write([first, first, again]) == IngestResult(written=1, duplicates=1, conflicts=1)
    assert writer.write([again, first, new_event("bob", "e1")]) == IngestResult(written=1, duplicates=1, conflicts=1)
    assert [row.record for row in store.outbox(10)] == [again.conflict, again.conflict]
    assert history(store, "ada") == [(1, "e1")]


def test_any_unicode_makes_distinct_users(store: SqlStore, writer: Writer) -> None:
    writer.write([new_event(name, f"e-{name}") for name in UNICODE_IDS])
    for name in UNICODE_IDS:
        assert history(store, name) == [(1, f"e-{name}")]
    ordered = sorted(UNICODE_IDS, key=str.encode)
    listed = store.list_users(limit=4)
    listed += store.list_users(limit=100, after=listed[-1].user_id)
    assert [state.user_id for state in listed] == ordered


def test_any_unicode_makes_distinct_events(store: SqlStore, writer: Writer) -> None:
    writer.write([new_event("ada", name) for name in UNICODE_IDS])
    assert [event_id for _, event_id in history(store, "ada")] == list(UNICODE_IDS)
    assert writer.write([new_event("ada", name) for name in UNICODE_IDS]).duplicates == len(UNICODE_IDS)


def test_an_offset_moves_only_from_the_expected_value(store: SqlStore) -> None:
    def move(expected: int | None, following: int, topic_id: str | None = None) -> None:
        advance = OffsetAdvance(EVENTS, expected, following, topic_id)
        events = (new_event("ada", f"{expected}-{following}"),)
        store.write_events(IngestBatch(CLUSTER, (advance,), events, now=NOW))

    move(None, 5)
    move(5, 9, "T1")
    move(9, 10)
    for expected, topic_id in ((None, None), (5, None), (11, None), (10, "T2")):
        with pytest.raises(OffsetConflict):
            move(expected, 20, topic_id)
    assert store.offsets(CLUSTER, [EVENTS.topic]) == {EVENTS: StoredOffset(10, "T1")}
    assert store.offsets("another", [EVENTS.topic]) == {} and store.offsets(CLUSTER, ["another"]) == {}
    assert [event_id for _, event_id in history(store, "ada")] == ["None-5", "5-9", "9-10"]


def test_one_lost_offset_undoes_the_whole_batch(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 2))
    before = store.counts()
    other = Partition(EVENTS.topic, 1)
    advances = (OffsetAdvance(other, None, 7), OffsetAdvance(EVENTS, 77, 78))
    dead = (NewRefusal(OutRecord("dead-letters", None, b"x"), EVENTS, 77),)
    batch = IngestBatch(
        CLUSTER, advances, (new_event("new", "e"), new_event("ada", "e9")), (new_answer("ada", "r"),), dead, now=NOW
    )
    with pytest.raises(OffsetConflict):
        store.write_events(batch)
    assert store.counts() == before and set(store.offsets(CLUSTER, [EVENTS.topic])) == {EVENTS}
    assert store.users([ADA, UserId("new")], BASE).keys() == {ADA}


def test_a_zombie_writes_nothing(settings: StoreSettings, opener: Opener) -> None:
    live, zombie = Writer(opener(settings)), Writer(opener(settings))
    live.write(some("ada", 1))
    zombie.expected = live.expected
    live.write(some("ada", 2, start=2))
    with pytest.raises(OffsetConflict):
        zombie.write([*some("ada", 4, start=2), new_event("bob", "e")])
    assert len(history(live.store, "ada")) == 3 and history(live.store, "bob") == []


def test_an_operator_adopts_an_offset(store: SqlStore, writer: Writer) -> None:
    store.adopt_offset(CLUSTER, EVENTS, 40, "T")
    store.adopt_offset(CLUSTER, EVENTS, 30, None)
    assert store.offsets(CLUSTER, [EVENTS.topic]) == {EVENTS: StoredOffset(30, None)}
    writer.expected = 30
    assert writer.write(some("ada", 1)).written == 1


def test_outbox_keeps_order_and_binary_headers(store: SqlStore, writer: Writer) -> None:
    headers = (("b", b"\xff\x00"), ("a", b""), ("b", "é".encode()), ("ключ", b"1"))
    records = [OutRecord("t", None, None, headers), OutRecord("t", b"", b"\x00\xff", ()), OutRecord("u", b"k", b"v")]
    writer.write(dead_letters=records)
    rows = store.outbox(10)
    assert [row.record for row in rows] == records
    assert [row.record for row in store.outbox(1)] == records[:1]
    store.delete_outbox([rows[0].id, rows[2].id])
    store.delete_outbox([])
    assert store.outbox(10) == [rows[1]]


def test_the_outbox_is_read_in_pieces_that_fit_into_memory(
    store: SqlStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "READ_BYTES", 1000)
    sizes = [5000, 400, 500, 101, 0]
    writer.write(dead_letters=[OutRecord("t", b"" if size else None, b"x" * size or None) for size in sizes])
    found, after = [], 0
    while rows := store.outbox(10, after=after):
        found.append([len(row.record.value or b"") for row in rows])
        after = rows[-1].id
    assert found == [[5000], [400, 500], [101, 0]]


def test_headers_count_in_what_is_read_of_the_outbox(
    store: SqlStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "READ_BYTES", 1000)
    writer.write(dead_letters=[OutRecord("t", None, None, (("h", b"x" * 900),)) for _ in range(3)])
    assert len(store.outbox(10)) == 1


def test_an_outbox_id_never_comes_back(store: SqlStore, writer: Writer) -> None:
    writer.write(dead_letters=[OutRecord("t", None, b"1")])
    (sent,) = store.outbox(1)
    store.delete_outbox([sent.id])
    writer.write(dead_letters=[OutRecord("t", None, b"2")])
    store.delete_outbox([sent.id])  # a slow relay acknowledges the first once more
    assert [row.record.value for row in store.outbox(9)] == [b"2"]


def test_users_counts_and_lists(store: SqlStore, writer: Writer) -> None:
    writer.write([*some("bob", 2), *some("ada", 3)], answers=[new_answer("carl", "r1")])
    states = store.users([ADA, BOB, ADA, UserId("nobody")], BASE)
    assert {user: (state.epoch, state.last_seq, state.head) for user, state in states.items()} == {
        "ada": (1, 3, None),
        "bob": (1, 2, None),
    }
    assert [state.user_id for state in store.list_users(limit=9)] == [ADA, BOB]
    assert store.users([], BASE) == {} and store.events({}, embedder=EMBEDDER, limit=3) == {}
    assert store.counts() == {
        "users": 2,
        "events": 5,
        "outbox": 0,
        "answers": 1,
        "adapters": 0,
        "held": 0,
        "quarantined": 0,
    }


@pytest.mark.parametrize("event_first", [True, False])
def test_answers_match_whichever_comes_second(store: SqlStore, writer: Writer, event_first: bool) -> None:
    events = [new_event("ada", "e1", in_reply_to="r1"), new_event("ada", "e2", in_reply_to="r2", output="no")]
    events.append(new_event("bob", "e1", in_reply_to="r3"))
    answers = [new_answer("ada", "r1"), new_answer("ada", "r2"), new_answer("ada", "r3"), new_answer("ada", "r4")]
    if event_first:
        assert (writer.write(events).matched, writer.write(answers=answers).matched) == (0, 2)
    else:
        assert (writer.write(answers=answers).matched, writer.write(events).matched) == (0, 2)
    (quality,) = store.quality()
    assert (quality.task, quality.arm) == ("task", "all")
    assert (quality.answered, quality.matched, quality.correct) == (4, 2, 1)


def test_an_answer_is_kept_and_matched_once(store: SqlStore, writer: Writer) -> None:
    reply = new_event("ada", "e1", in_reply_to="r1")
    later = new_event("ada", "e2", in_reply_to="r1", output="no")
    assert writer.write([later, reply], answers=[new_answer("ada", "r1")]).matched == 1
    again = writer.write([new_event("ada", "e3", in_reply_to="r1")], answers=[new_answer("ada", "r1", arm="none")])
    assert again.matched == 0
    (quality,) = store.quality()
    assert (quality.arm, quality.answered, quality.matched, quality.correct) == ("all", 1, 1, 0)


def test_quality_by_arm_and_purge(store: SqlStore, writer: Writer) -> None:
    old = NOW - timedelta(days=8)
    writer.write(
        [new_event("ada", "e1", in_reply_to="r1")],
        answers=[new_answer("ada", "r1", arm="none"), new_answer("ada", "r2", at=old), new_answer("bob", "r1")],
    )
    assert [(q.arm, q.answered, q.matched) for q in store.quality()] == [("all", 2, 0), ("none", 1, 1)]
    assert store.purge_answers(before=NOW - timedelta(days=7)) == 1
    assert [(q.arm, q.answered) for q in store.quality()] == [("all", 1), ("none", 1)]


def test_who_only_asked_is_forgotten_with_the_last_answer(store: SqlStore, writer: Writer) -> None:
    old = NOW - timedelta(days=8)
    writer.write(some("ada", 1), answers=[new_answer("ada", "r1", at=old), new_answer("bob", "r2", at=old)])
    writer.write(answers=[new_answer("carl", "r3", at=old), new_answer("carl", "r4")])
    assert store.purge_answers(before=NOW - timedelta(days=7)) == 3
    with store.database.read() as connection:
        left = connection.execute(select(users.c.user_id).order_by(users.c.user_id)).scalars().all()
    assert left == ["ada", "carl"]


def test_answers_are_purged_in_pieces(store: SqlStore, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "PURGED_AT_ONCE", 2)
    writer.write(answers=[new_answer("ada", f"r{n}", at=NOW - timedelta(days=9 + n)) for n in range(5)])
    assert [store.purge_answers(before=NOW) for _ in range(4)] == [2, 2, 1, 0]


def test_a_naive_time_is_refused(store: SqlStore, writer: Writer) -> None:
    naive = replace(new_event("ada", "e1"), recorded_at=NOW.replace(tzinfo=None))
    with pytest.raises(Exception, match="offset-naive"):
        writer.write([naive])
    assert store.counts()["users"] == 0


def test_event_ids_are_what_was_given(store: SqlStore, writer: Writer) -> None:
    writer.write([new_event("ada", EventId("x" * 256)), new_event("u" * 512, "\U0001f600" * 256)])
    assert history(store, "ada") == [(1, "x" * 256)]
    assert history(store, "u" * 512) == [(1, "\U0001f600" * 256)]
