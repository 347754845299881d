"""The worker from outside: requests in Kafka, answers in Kafka."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from oppu.effects import perform
from oppu.errors import FatalError
from oppu.kafka.memory import CLUSTER_ID
from oppu.lm.fake import FakeModel
from oppu.lm.port import Row, Scored
from oppu.settings import Settings
from oppu.values import OutRecord, UserId, UserState
from retriever.port import Profile, Query, Retrieved

if TYPE_CHECKING:
    from tests.inference.conftest import World

LABELS = ("art", "law", "sport", "war")
PAIRS = [("goal match cup", "sport"), ("judge court", "law"), ("goal cup final", "sport"), ("tank front", "war")]


class Watched(FakeModel):
    """Keeps every row that it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def answer(self, asked: Any) -> list[Scored]:
        self.rows.extend(asked)
        return super().answer(asked)


def test_an_unknown_user_is_answered_without_personalization(world: World) -> None:
    world.ask("nobody", "r1")
    outcome = world.turn()
    assert outcome is not None and (outcome.handled, outcome.held) == (1, ())
    answer = world.answer("r1")
    assert (answer.status, answer.user_id, answer.task, answer.error) == ("ok", "nobody", "label", None)
    assert answer.output in LABELS
    assert answer.scores is not None and set(answer.scores) == set(LABELS)
    assert sum(answer.scores.values()) == pytest.approx(1.0)
    assert max(answer.scores, key=lambda label: answer.scores[label]) == answer.output  # type: ignore[index]
    provenance = answer.provenance
    assert provenance is not None and provenance.base == "fake-base"
    assert (provenance.history_sequence, provenance.used, provenance.degraded) == (0, (), ())
    assert {"queue", "history", "retrieve", "adapters", "model"} == set(answer.timings)


def test_full_provenance_of_a_known_user(world: World) -> None:
    world.remember("anna", PAIRS)
    ref = world.publish("anna", "sport")
    world.ask("anna", "r1", input="cup goal")
    world.turn()
    answer = world.answer("r1")
    provenance = answer.provenance
    assert provenance is not None
    assert answer.output == "sport"
    assert provenance.used == ("retrieval", "profile", "adapter")
    assert provenance.adapter_version == ref.version
    assert provenance.profile_version is not None
    assert set(provenance.retrieved) == {"anna-0", "anna-1", "anna-2", "anna-3"}
    assert (provenance.history_sequence, provenance.degraded) == (4, ())
    assert world.sample("oppu_inference_bank_adapters") == 1


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, ("retrieval", "profile", "adapter")),
        ({"retrieve": 0}, ("profile", "adapter")),
        ({"profile": False}, ("retrieval", "adapter")),
        ({"adapter": False}, ("retrieval", "profile")),
        ({"retrieve": 0, "profile": False}, ("adapter",)),
        ({"retrieve": 0, "profile": False, "adapter": False}, ()),
    ],
)
def test_every_part_can_be_switched_off(world: World, options: dict[str, Any], used: tuple[str, ...]) -> None:
    world.remember("anna", PAIRS)
    world.publish("anna", "art")
    world.ask("anna", "r1", options=options)
    world.turn()
    provenance = world.answer("r1").provenance
    assert provenance is not None
    assert provenance.used == used
    assert (provenance.adapter_version is not None) == ("adapter" in used)
    assert bool(provenance.retrieved) == ("retrieval" in used)


def test_nothing_switched_on_is_what_a_stranger_gets(world: World) -> None:
    world.remember("anna", PAIRS)
    world.publish("anna", "art")
    world.ask("anna", "r1", options={"retrieve": 0, "profile": False, "adapter": False})
    world.ask("nobody", "r2")
    world.turn()
    assert world.answer("r1").scores == world.answer("r2").scores


def test_evidence_moves_the_scores_towards_what_the_user_does(world: World) -> None:
    world.remember("anna", [(f"words {i}", "war") for i in range(12)])
    for request_id, options in (("none", {"retrieve": 0, "profile": False}), ("prior", {"retrieve": 0}), ("all", {})):
        world.ask("anna", request_id, input="words 3", options=options)
    world.turn()
    war = {p.request_id: p.scores["war"] for p in world.predictions() if p.scores}
    assert war["none"] < war["prior"] < war["all"]


def test_a_choice_has_its_evidence_in_the_scores_not_in_the_prompt(
    settings: Settings, make_world: Callable[..., World]
) -> None:
    model = Watched()
    world = make_world(settings, model=model)
    world.remember("anna", [(f"text {i}", "war") for i in range(9)])
    world.ask("anna", "r1")
    world.turn()
    assert [(row.evidence, row.profile) for row in model.rows] == [((), "")]
    made = world.answer("r1").provenance
    assert made is not None
    assert "retrieval" in made.used


def test_k_of_the_request_bounds_the_prompt(settings: Settings, make_world: Callable[..., World]) -> None:
    model = Watched()
    everywhere = settings.model.model_copy(update={"prompt_evidence": "all"})
    world = make_world(settings.model_copy(update={"model": everywhere}), model=model)
    world.remember("anna", [(f"text {i}", "war") for i in range(9)])
    world.ask("anna", "r1", options={"retrieve": 2, "max_new_tokens": 7})
    world.ask("anna", "r2")
    world.turn()
    by_size = sorted((len(row.evidence), row.max_new_tokens) for row in model.rows)
    assert by_size == [(2, 7), (settings.retriever.k, 32)]


def test_users_in_one_poll_get_their_own_and_the_same_as_alone(
    settings: Settings, make_world: Callable[..., World]
) -> None:
    def build(tmp: Settings) -> World:
        world = make_world(tmp)
        for number, user in enumerate(users):
            world.remember(user, [(f"{user} text {i}", LABELS[(number + i) % 4]) for i in range(number + 1)])
            if number % 2:
                world.publish(user, LABELS[number % 4])
        return world

    users = [f"user{i}" for i in range(1, 11)]
    together = build(settings)
    for user in users:
        together.ask(user, f"r-{user}", input=f"{user} text 0")
    together.turn()
    url = settings.store.url.replace("history", "alone")
    alone = build(settings.model_copy(update={"store": settings.store.model_copy(update={"url": url})}))
    for user in users:
        alone.ask(user, f"r-{user}", input=f"{user} text 0")
        alone.turn()
    for user in users:
        one, other = together.answer(f"r-{user}"), alone.answer(f"r-{user}")
        assert (one.output, one.provenance) == (other.output, other.provenance)
        assert one.scores == pytest.approx(other.scores)
        assert one.provenance is not None
        assert {event.rsplit("-", 1)[0] for event in one.provenance.retrieved} == {user}


def test_any_unicode_user_id_is_answered_under_its_own_bytes(world: World) -> None:
    users = ["ü", "u\u0308", "日本", "a b", "\u202e", "😀" * 50]
    for number, user in enumerate(users):
        world.remember(user, [("words", LABELS[number % 4])])
        world.ask(user, f"r{number}")
    world.turn()
    for number, user in enumerate(users):
        answer = world.answer(f"r{number}")
        assert answer.user_id == user
        assert answer.provenance is not None and answer.provenance.retrieved == (f"{user}-{number}",)


def test_a_repeated_request_is_answered_again(world: World) -> None:
    world.ask("anna", "r1")
    world.ask("anna", "r1")
    world.turn()
    assert [p.request_id for p in world.predictions()] == ["r1", "r1"]


def test_own_choices_are_scored(world: World) -> None:
    world.remember("anna", [("words", "paper B")] * 3, task="cite")
    world.ask("anna", "r1", task="cite", choices=["paper A", "paper B"])
    world.turn()
    answer = world.answer("r1")
    assert answer.output == "paper B"
    assert answer.scores is not None and list(answer.scores) == ["paper A", "paper B"]


def test_a_rating_is_the_median_of_its_distribution(settings: Settings, make_world: Callable[..., World]) -> None:
    class Torn(FakeModel):
        def answer(self, asked: Any) -> list[Scored]:
            scores = np.log([0.4, 0.0001, 0.0999, 0.25, 0.25])
            return [Scored(scores, scores) for _ in asked]

    world = make_world(settings, model=Torn())
    world.ask("nobody", "r1", task="rate")
    world.turn()
    answer = world.answer("r1")
    assert answer.output == "3"
    assert answer.scores is not None and answer.scores["1"] == pytest.approx(0.4)


def test_texts_are_generated(world: World) -> None:
    world.ask("nobody", "r1", task="write", input="one two three four five six")
    world.turn()
    answer = world.answer("r1")
    assert (answer.status, answer.output, answer.scores) == ("ok", "one two three four", None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"knn", "prior", "input", "adapter"}),
        ({"retrieve": 0}, {"prior", "input", "adapter"}),
        ({"profile": False}, {"knn", "input", "adapter"}),
        ({"adapter": False}, {"knn", "prior", "input"}),
        ({"retrieve": 0, "profile": False, "adapter": False}, {"input"}),
    ],
)
def test_a_text_is_written_from_what_is_switched_on(
    settings: Settings, make_world: Callable[..., World], options: dict[str, Any], expected: set[str]
) -> None:
    model = Watched()
    world = make_world(settings, model=model)
    world.remember("anna", [("goal match", "a headline"), ("judge court", "another")], task="write")
    world.publish("anna", "art", task="write")
    world.ask("anna", "r1", task="write", input="goal match", options=options)
    world.turn()
    answer = world.answer("r1")
    assert answer.status == "ok" and answer.provenance is not None
    [row] = model.rows
    assert row.blend is not None and (row.evidence, row.profile) == ((), "")
    assert set(row.blend.caches) | ({"adapter"} if row.adapter is not None else set()) == expected
    assert ("adapter" in row.blend.weights) == ("adapter" in expected) == ("adapter" in answer.provenance.used)
    if "knn" in expected:
        assert row.blend.caches["knn"][0][0] == "a headline"
        assert "retrieval" in answer.provenance.used


def test_the_deadline_is_looked_at_while_a_text_is_written(
    settings: Settings, make_world: Callable[..., World]
) -> None:
    class Slow(FakeModel):
        def answer(self, asked: Any) -> list[Scored]:
            world.clock.advance(2.0)
            return super().answer(asked)

    world = make_world(settings, model=Slow())
    deadline = (world.clock.now() + timedelta(seconds=1)).isoformat()
    world.ask("anna", "r1", task="write", deadline=deadline)
    world.ask("anna", "r2", task="write")
    world.turn()
    error = world.answer("r1").error
    assert error is not None and error.code == "deadline_exceeded"
    assert world.answer("r2").status == "ok"


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_text_is_an_error_that_says_so(
    settings: Settings, make_world: Callable[..., World], text: str | None
) -> None:
    class Mute(FakeModel):
        def answer(self, asked: Any) -> list[Scored]:
            return [Scored(np.zeros(0), np.zeros(0), text) for _ in asked]

    world = make_world(settings, model=Mute())
    world.ask("nobody", "r1", task="write")
    world.turn()
    error = world.answer("r1").error
    assert error is not None and error.code == "empty_generation"


def test_a_bad_request_is_answered_and_the_rest_goes_on(world: World) -> None:
    world.ask("anna", "r1", task="nope")
    world.ask("anna", "r2")
    world.ask("anna", "r3", schema_version=9)
    outcome = world.turn()
    assert outcome is not None and outcome.handled == 3
    codes = {p.request_id: p.error.code if p.error else None for p in world.predictions()}
    assert codes == {"r1": "unknown_task", "r2": None, "r3": "unsupported_version"}
    assert world.sample("oppu_inference_predictions_total", task="unknown", status="error") == 2
    assert world.sample("oppu_inference_predictions_total", task="label", status="ok") == 1
    assert world.sample("oppu_inference_errors_total", code="unknown_task") == 1


def test_an_answer_too_large_for_its_topic_becomes_an_error(
    settings: Settings, make_world: Callable[..., World]
) -> None:
    class Verbose(FakeModel):
        def answer(self, asked: Any) -> list[Scored]:
            return [Scored(np.zeros(0), np.zeros(0), "x" * 3_000_000) for _ in asked]

    world = make_world(settings, model=Verbose())
    world.ask("nobody", "r1", task="write")
    world.turn()
    error = world.answer("r1").error
    assert error is not None and error.code == "limit_exceeded"


def test_a_late_request_costs_no_model_time(settings: Settings, make_world: Callable[..., World]) -> None:
    model = Watched()
    world = make_world(settings, model=model)
    world.ask("anna", "late")
    world.ask("anna", "own", deadline=(world.clock.now() + timedelta(seconds=60)).isoformat())
    world.clock.advance(31)
    world.turn()
    error = world.answer("late").error
    assert error is not None and error.code == "deadline_exceeded"
    assert world.answer("own").status == "ok"
    assert len(model.rows) == 1


def test_deadlines_are_judged_again_before_each_chunk(settings: Settings, make_world: Callable[..., World]) -> None:
    class Slow(FakeModel):
        calls = 0

        def answer(self, asked: Any) -> list[Scored]:
            self.calls += 1
            world.clock.advance(1.0)
            return super().answer(asked)

    model = Slow()
    world = make_world(settings, model=model)
    deadline = (world.clock.now() + timedelta(seconds=0.5)).isoformat()
    for number in range(8):
        world.ask("anna", f"r{number}", deadline=deadline)
    world.turn()
    codes = [p.error.code if p.error else "ok" for p in world.predictions()]
    assert codes == ["ok"] * 4 + ["deadline_exceeded"] * 4
    assert model.calls == 1


def test_a_step_hands_back_what_it_has_no_time_for(settings: Settings, make_world: Callable[..., World]) -> None:
    class Slow(FakeModel):
        def answer(self, asked: Any) -> list[Scored]:
            world.clock.advance(1.5)
            return super().answer(asked)

    world = make_world(settings, model=Slow())
    for number in range(20):
        world.ask(f"user{number % 5}", f"r{number:02}")
        world.send(b"no json", b"x")
    outcomes = [world.turn()]
    assert outcomes[0] is not None and outcomes[0].held and outcomes[0].retry_after_seconds == 0
    while world.held:
        outcomes.append(world.turn())
    assert sum(outcome.handled for outcome in outcomes if outcome) == 40
    assert len(outcomes) == 3
    assert [p.request_id for p in world.predictions()] == [f"r{number:02}" for number in range(20)]
    assert len(world.dead_letters()) == 20


class TestReadYourWrites:
    def test_waits_until_the_event_is_in_view(self, world: World) -> None:
        world.remember("anna", PAIRS)
        world.ask("anna", "r1", after={"partition": 0, "offset": 4})
        outcome = world.turn()
        assert outcome is not None
        assert (outcome.handled, len(outcome.held)) == (0, 1)
        assert outcome.retry_after_seconds == pytest.approx(0.02)
        assert world.broker.committed("oppu-inference") == {}
        world.clock.advance(0.02)
        assert world.remember("anna", [("late news", "art")]) == 4
        world.turn()
        provenance = world.answer("r1").provenance
        assert provenance is not None
        assert (provenance.history_sequence, provenance.degraded) == (5, ())

    def test_says_so_where_it_did_not_come_in_time(self, world: World) -> None:
        world.remember("anna", PAIRS)
        world.ask("anna", "r1", after={"partition": 2, "offset": 0})
        world.turn()
        world.clock.advance(0.49)
        world.turn()
        assert world.predictions() == []
        world.clock.advance(0.02)
        world.turn()
        answer = world.answer("r1")
        assert answer.status == "ok" and answer.provenance is not None
        assert [(d.part, d.reason) for d in answer.provenance.degraded] == [("history", "history_behind")]
        assert world.sample("oppu_inference_degraded_total", part="history", reason="history_behind") == 1

    def test_a_clock_that_steps_back_does_not_hold_longer(self, world: World) -> None:
        world.ask("anna", "r1", after={"partition": 2, "offset": 0})
        world.turn()
        world.clock.jump(-3600)
        world.clock.advance(0.51)
        world.turn()
        assert world.answer("r1").status == "ok"

    def test_holds_its_partition_in_order_and_no_other(self, world: World) -> None:
        world.ask("anna", "before")
        world.ask("anna", "waits", after={"partition": 0, "offset": 0})
        world.ask("anna", "behind")
        others = [f"user{i}" for i in range(8)]
        for user in others:
            world.ask(user, f"other-{user}")
        outcome = world.turn()
        assert outcome is not None
        waiting = {record.partition for record in outcome.held}
        assert len(waiting) == 1
        answered = {p.request_id for p in world.predictions()}
        assert "before" in answered and not answered & {"waits", "behind"}
        assert len(answered) > 2
        world.remember("anna", PAIRS)
        world.turn()
        assert len(world.predictions()) == 3 + len(others)

    def test_a_late_one_is_not_waited_for(self, world: World) -> None:
        world.ask("anna", "r1", after={"partition": 0, "offset": 0}, deadline=world.clock.now().isoformat())
        world.turn()
        error = world.answer("r1").error
        assert error is not None and error.code == "deadline_exceeded"


class TestModelFaults:
    def test_a_row_the_model_fails_on_costs_only_its_own_answer(
        self, settings: Settings, make_world: Callable[..., World]
    ) -> None:
        class Picky(FakeModel):
            def answer(self, asked: Any) -> list[Scored]:
                if any("poison" in row.input for row in asked):
                    raise ValueError("cannot")
                return super().answer(asked)

        world = make_world(settings, model=Picky())
        for number in range(4):
            world.ask("anna", f"r{number}", input="poison" if number == 2 else "words")
        world.turn()
        codes = [p.error.code if p.error else "ok" for p in world.predictions()]
        assert codes == ["ok", "ok", "internal_error", "ok"]

    def test_scores_that_are_not_numbers_are_an_error(
        self, settings: Settings, make_world: Callable[..., World]
    ) -> None:
        class Broken(FakeModel):
            def answer(self, asked: Any) -> list[Scored]:
                nan = np.full(4, np.nan)
                return [Scored(nan, nan) for _ in asked]

        world = make_world(settings, model=Broken())
        world.ask("anna", "r1")
        world.turn()
        error = world.answer("r1").error
        assert error is not None and error.code == "internal_error"

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ],
    )
    def test_exhausted_memory_is_not_swallowed(
        self, settings: Settings, make_world: Callable[..., World], error: Exception
    ) -> None:
        class Hungry(FakeModel):
            def answer(self, asked: Any) -> list[Scored]:
                raise error

        world = make_world(settings, model=Hungry())
        world.ask("anna", "r1")
        with pytest.raises(type(error)):
            world.turn()
        assert world.predictions() == []


class TestOthersData:
    def test_a_hit_of_another_user_stops_the_worker(self, settings: Settings, make_world: Callable[..., World]) -> None:
        class Leaking:
            def expect(self, queries: list[Query]) -> None:
                pass

            def retrieve(self, queries: list[Query]) -> list[Retrieved]:
                other = UserState(UserId("bert"), 0, 1, None)
                return world.retriever.retrieve([dataclasses.replace(query, user=other) for query in queries])

            def profiles(self, requests: Any) -> list[Profile]:
                return world.retriever.profiles(requests)

        world = make_world(settings, retriever=Leaking())
        world.remember("anna", PAIRS)
        world.remember("bert", PAIRS[:1])
        world.ask("anna", "r1")
        with pytest.raises(FatalError):
            world.turn()
        assert world.predictions() == []

    def test_a_profile_of_another_user_stops_the_worker(
        self, settings: Settings, make_world: Callable[..., World]
    ) -> None:
        class Leaking:
            def expect(self, queries: list[Query]) -> None:
                pass

            def retrieve(self, queries: list[Query]) -> list[Retrieved]:
                return world.retriever.retrieve(queries)

            def profiles(self, requests: Any) -> list[Profile]:
                found = world.retriever.profiles(requests)
                return [dataclasses.replace(profile, user_id=UserId("bert")) for profile in found]

        world = make_world(settings, retriever=Leaking())
        world.remember("anna", PAIRS)
        world.ask("anna", "r1")
        with pytest.raises(FatalError):
            world.turn()
        assert world.predictions() == []


def test_an_erased_user_is_a_stranger(world: World) -> None:
    world.remember("anna", PAIRS)
    world.publish("anna", "art")
    world.ask("anna", "before")
    world.turn()
    tombstone = OutRecord(world.topics.updates, b"anna", None)
    world.store.erase(UserId("anna"), cluster_id=CLUSTER_ID, end_offsets={}, now=world.clock.now(), announce=tombstone)
    world.ask("anna", "after")
    world.ask("nobody", "stranger")
    world.turn()
    after = world.answer("after")
    assert after.provenance is not None
    assert (after.provenance.used, after.provenance.history_sequence) == ((), 0)
    made = [world.answer(name).provenance for name in ("before", "after", "stranger")]
    assert [provenance.epoch for provenance in made if provenance is not None] == [1, 2, 1]
    assert after.scores == world.answer("stranger").scores


def test_an_empty_step_does_nothing(world: World) -> None:
    assert perform(world.worker.step([], world.clock.now())).handled == 0


def test_timings_and_latency_come_from_the_clocks(world: World) -> None:
    world.ask("anna", "r1")
    world.clock.advance(0.25)
    world.turn()
    assert world.answer("r1").timings["queue"] == pytest.approx(250.0)
    assert world.sample("oppu_inference_request_to_answer_seconds_sum") == pytest.approx(0.25)


def test_answers_say_where_their_request_lies(world: World) -> None:
    world.ask("anna", "r1")
    world.ask("anna", "late", deadline="2020-01-01T00:00:00Z")
    world.ask("anna", "refused", task="unheard of")
    world.turn()
    asked = {json.loads(r.value or b"")["request_id"]: r for r in world.broker.records(world.topics.requests)}
    for name, record in asked.items():
        found = world.answer(name).request
        assert found is not None and (found.partition, found.offset) == (record.partition.index, record.offset)


def test_headers_carry_the_request_id(world: World) -> None:
    world.ask("anna", "r-1")
    world.turn()
    (record,) = world.broker.records(world.topics.predictions)
    assert dict(record.headers) == {"request_id": b"r-1"}
    assert json.loads(record.value or b"")["user_id"] == "anna"
