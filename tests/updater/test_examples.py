"""The division of a user's events: nothing held back is ever trained on."""

from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from oppu.settings import UpdaterSettings
from oppu.tasks import Task, Tasks
from oppu.values import Event, EventId, UserId
from updater.examples import Beside, Cursors, example, seed_for, split, usable, window

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TASKS = Tasks(
    {
        "mood": Task("mood", "choice", "{input}", "mood:", labels=("glad", "sad")),
        "pick": Task("pick", "choice", "{input}", "pick:"),
        "title": Task("title", "text", "{input}", "title:"),
    }
)
SETTINGS = UpdaterSettings(max_pending=20, replay=5, holdout_share=0.2)


def event(
    seq: int, text: str = "", *, task: str = "mood", output: str = "glad", choices: tuple[str, ...] | None = None
) -> Event:
    return Event(UserId("u"), seq, EventId(str(seq)), task, NOW, NOW, text or f"text {seq}", output, choices)


def seqs(events: tuple[Event, ...]) -> list[int]:
    return sorted(e.seq for e in events)


def test_new_events_train_the_newest_are_held_back_and_older_are_replayed() -> None:
    events = [event(n) for n in range(1, 31)]
    parts = split(events, Cursors(20, 20), SETTINGS, seed=1)
    assert seqs(parts.pending) == list(range(21, 31))
    assert seqs(parts.holdout) == [29, 30]
    assert [s for s in seqs(parts.train) if s > 20] == list(range(21, 29))
    assert parts.new == 8
    assert len(parts.train) == 8 + 5
    assert parts.trained_through == 28


def test_what_was_held_back_or_rejected_before_is_trained_on_next() -> None:
    parts = split([event(n) for n in range(1, 31)], Cursors(trained=10, considered=25), SETTINGS, seed=1)
    assert seqs(parts.pending) == list(range(26, 31))
    assert seqs(parts.holdout) == [30]
    assert set(range(11, 30)) <= set(seqs(parts.train))
    assert parts.new == 19


def test_at_most_max_pending_the_newest() -> None:
    parts = split([event(n) for n in range(1, 101)], Cursors(0, 0), SETTINGS, seed=1)
    assert seqs(parts.pending) == list(range(81, 101))
    assert parts.new == 16
    assert len(parts.train) == 16 + 5


def test_without_pending_events_there_is_nothing() -> None:
    parts = split([event(1), event(2)], Cursors(1, 2), SETTINGS, seed=1)
    assert (parts.pending, parts.train, parts.holdout, parts.trained_through) == ((), (), (), 1)


def test_one_pending_event_is_held_back_and_leaves_nothing_to_train() -> None:
    first = split([event(1)], Cursors(0, 0), SETTINGS, seed=1)
    assert (seqs(first.holdout), first.train) == ([1], ())
    second = split([event(1), event(2)], Cursors(0, 1), SETTINGS, seed=1)
    assert (seqs(second.holdout), seqs(second.train)) == ([2], [1])


def test_the_same_text_is_never_on_both_sides() -> None:
    events = [event(n, "again" if n in (2, 12, 20) else "") for n in range(1, 21)]
    parts = split(events, Cursors(10, 10), SETTINGS, seed=1)
    assert 20 in seqs(parts.holdout)
    assert not {2, 12} & set(seqs(parts.train))


def test_the_same_text_in_another_task_is_another_item() -> None:
    events = [*(event(n) for n in range(1, 10)), event(10, "text 3", task="title", output="x")]
    assert 3 in seqs(split(events, Cursors(0, 0), SETTINGS, seed=1).train)


@given(
    texts=st.lists(st.integers(0, 30), min_size=0, max_size=80),
    trained=st.integers(0, 80),
    more=st.integers(0, 40),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31 - 1),
)
def test_holdout_and_training_never_meet(texts: list[int], trained: int, more: int, share: float, seed: int) -> None:
    events = [event(n, f"text {t}") for n, t in enumerate(texts, 1)]
    settings = SETTINGS.model_copy(update={"holdout_share": share})
    at = Cursors(trained, trained + more)
    parts = split(events, at, settings, seed=seed)
    assert parts == split(events, at, settings, seed=seed)
    assert bool(parts.holdout) == bool(parts.pending) == (len(events) > at.considered)
    assert not {e.input for e in parts.train} & {e.input for e in parts.holdout}
    assert len(parts.train) <= parts.new + settings.replay * max(1, parts.new / settings.min_pending) + 1
    assert len(set(seqs(parts.train))) == len(parts.train) or parts.new > settings.min_pending
    assert parts.pending[len(parts.pending) - len(parts.holdout) :] == parts.holdout
    assert at.trained <= parts.trained_through
    if parts.train:
        assert max(seqs(parts.train)) <= parts.trained_through
        oldest_new = max(trained, len(events) - settings.max_pending)
        assert parts.new == sum(e.seq > oldest_new for e in parts.train) > 0


def test_a_backlog_learnt_at_once_is_seen_as_often_as_in_small_updates() -> None:
    settings = UpdaterSettings(min_pending=16, replay=16, holdout_share=0.01)
    backlog = split([event(n) for n in range(1, 66)], Cursors(0, 0), settings, seed=1)
    assert backlog.new == 64
    assert len(backlog.train) == 64 + 48  # one small update's worth would have had nothing older
    assert set(seqs(backlog.train)) == set(range(1, 65))
    steady = split([event(n) for n in range(1, 82)], Cursors(64, 64), settings, seed=1)
    assert (steady.new, len(steady.train)) == (16, 32)


def test_replay_depends_on_user_and_version_alone() -> None:
    events = [event(n) for n in range(1, 101)]
    at = Cursors(90, 90)
    one, two = (split(events, at, SETTINGS, seed=seed_for(UserId("u"), version)) for version in (1, 2))
    assert one.train != two.train
    assert seed_for(UserId("u"), 1) == seed_for(UserId("u"), 1) < 2**31
    assert seed_for(UserId("u"), 1) != seed_for(UserId("v"), 1)


def test_events_that_the_tasks_no_longer_allow_are_left_out() -> None:
    good = [event(1), event(2, task="title", output="any"), event(3, task="pick", output="x", choices=("x", "y"))]
    bad = [
        event(4, task="gone"),
        event(5, output="neither"),
        event(6, task="pick", output="x"),
        event(7, task="pick", output="z", choices=("x", "y")),
    ]
    assert usable([*good, *bad], TASKS) == good


def test_examples_carry_the_allowed_choices_and_what_stood_beside() -> None:
    made = example(event(1), TASKS, Beside((("a", "glad"),), "a line"))
    assert (made.input, made.output, made.choices) == ("text 1", "glad", ("glad", "sad"))
    assert (made.evidence, made.profile) == ((("a", "glad"),), "a line")
    assert example(event(2, task="title", output="x"), TASKS).choices == ()


def test_an_event_without_an_output_is_a_text_where_histories_may_be_bare() -> None:
    blank = event(1, output=" ")
    assert usable([blank], TASKS) == []
    bare = Tasks({**TASKS, blank.task: replace(TASKS[blank.task], bare_history=True)})
    assert usable([blank], bare) == [blank]
    made = example(blank, bare)
    assert (made.input, made.output, made.choices) == ("text 1", " ", ())


def test_a_read_is_bounded() -> None:
    assert window(SETTINGS) == 20 + 16 * 5
    assert window(SETTINGS.model_copy(update={"replay": 0})) == 20
