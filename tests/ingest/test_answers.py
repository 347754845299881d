"""Predictions that ingest keeps, and their match with what the user really did."""

from collections.abc import Callable
from typing import Any

import pytest

from oppu.loop import LoopState
from oppu.settings import StoreSettings
from oppu.values import OutRecord, Partition, UserId
from oppu.wire import Coordinates, ErrorBody, Prediction, Provenance, record_for
from tests.ingest.world import TOPICS, World


def prediction(name: str, *used: str, user_id: str = "u1", **changes: Any) -> OutRecord:
    fields = {
        "request_id": name,
        "user_id": user_id,
        "task": "news",
        "status": "ok",
        "output": "politics",
        "provenance": Provenance.model_validate({"base": "b", "used": used}),
        **changes,
    }
    return record_for(TOPICS.predictions, user_id, Prediction.model_validate(fields))


def quality(world: World) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {(q.task, q.arm): (q.answered, q.matched, q.correct) for q in world.store.quality()}


def test_predictions_are_kept_by_arm_and_matched_with_what_the_user_did(world: World) -> None:
    world.producer.send(
        [
            prediction("r1"),
            prediction("r2", "retrieval"),
            prediction("r3", "retrieval", "profile", "adapter"),
            prediction("r4", "adapter", "retrieval", "adapter", user_id="u2"),
        ]
    )
    world.turn()
    world.event("e1", in_reply_to="r1")
    world.event("e2", in_reply_to="r2", output="sports")
    world.event("e4", "u1", in_reply_to="r4")
    world.turn(8, seconds=1.0)
    assert quality(world) == {
        ("news", "none"): (1, 1, 1),
        ("news", "retrieval"): (1, 1, 0),
        ("news", "adapter+profile+retrieval"): (1, 0, 0),
        ("news", "adapter+retrieval"): (1, 0, 0),
    }
    assert world.outcomes() == {"answer": 4, "written": 3}
    assert world.value("oppu_ingest_quality_correct", task="news", arm="none") == 1
    assert world.value("oppu_ingest_quality_matched", task="news", arm="retrieval") == 1
    assert world.value("oppu_ingest_quality_answers", task="news", arm="adapter+retrieval") == 1


def test_an_answer_that_comes_after_the_event_is_matched_as_well(world: World) -> None:
    world.event("e1", in_reply_to="r1")
    world.turn()
    world.producer.send([prediction("r1")])
    world.turn()
    assert quality(world) == {("news", "none"): (1, 1, 1)}


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "error", "output": None, "error": ErrorBody(code="x", message="y")},
        {"output": None},
        {"task": None},
        {"task": "unheard of"},
        {"request_id": ""},
        {"request_id": "r" * 257},
        {"output": "a\0b"},
    ],
    ids=str,
)
def test_answers_that_are_of_no_use_are_skipped(world: World, changes: dict[str, Any]) -> None:
    world.producer.send([prediction("r1", **changes)])
    world.turn()
    assert world.outcomes() == {"skipped": 1}
    assert quality(world) == {}


def test_an_answer_to_what_was_asked_before_an_erasure_is_not_kept(world: World) -> None:
    requests = Partition(TOPICS.requests, 1)
    world.store.erase(
        UserId("u1"),
        cluster_id="memory",
        end_offsets={requests: 7},
        now=world.clock.now(),
        announce=OutRecord(TOPICS.updates, b"u1", None),
    )
    world.clock.advance(1)
    made = Provenance(base="b", epoch=2)
    world.producer.send(
        [
            prediction("waited", request=Coordinates(partition=1, offset=6), provenance=made),
            prediction("elsewhere", request=Coordinates(partition=0, offset=6), provenance=made),
            prediction("computed amid it", provenance=Provenance(base="b", epoch=1)),
        ]
    )
    world.turn()
    assert world.outcomes() == {"answer": 1, "erased": 2}


@pytest.mark.parametrize("key", [None, b"u2", b""])
def test_an_answer_under_another_key_is_skipped(world: World, key: bytes | None) -> None:
    world.send(prediction("r1").value, key, TOPICS.predictions)
    world.turn()
    assert world.outcomes() == {"skipped": 1}


def test_the_markers_of_transactions_are_stepped_over(world: World) -> None:
    transactions = world.broker.transactional_producer("t")
    for n in range(3):
        transactions.begin()
        transactions.send([prediction(f"r{n}")])
        transactions.commit()
    transactions.begin()
    transactions.send([prediction("aborted")])
    transactions.abort()
    world.turn()
    world.restart()
    world.turn(6, seconds=1.0)
    assert world.outcomes() == {"answer": 3}
    assert world.loop.state is LoopState.RUNNING


def test_old_answers_are_purged_and_their_gauges_with_them(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.turn()
    world.producer.send([prediction("r1")])
    world.turn(8, seconds=1.0)
    assert world.value("oppu_ingest_quality_answers", task="news", arm="none") == 1
    world.clock.advance(StoreSettings().answers_retention_seconds + 60)
    world.turn(8, seconds=6.0)
    assert quality(world) == {}
    assert world.value("oppu_ingest_quality_answers", task="news", arm="none") is None
