"""One tick on the real store and registry: every way in which a user's update may end."""

from pathlib import Path

import numpy as np
import pytest

from oppu.effects import Effect
from oppu.errors import AdapterUnreadable, TransientError
from oppu.lm.fake import TENSOR
from oppu.lm.port import AdapterRef, TrainConfig
from oppu.registry_place import Place
from oppu.store.records import ClaimState, Outcome
from oppu.values import UserId
from tests.updater.world import GLAD, SAD, SETTINGS, World, announced, published
from updater.job import Ended


# --- publishing
def test_a_better_adapter_is_published(world: World) -> None:
    world.act("ada", GLAD)
    outcome = world.tick()
    assert (outcome.claimed, outcome.ended) == (1, {Ended.PUBLISHED: 1})
    head = world.head("ada")
    assert head is not None
    assert (head.parent, head.trained_through) == (None, 8)  # two of ten held back
    assert world.status("ada").considered_through == 10
    assert world.trace == ["store.claim", "registry.write", "store.publish", "registry.collect"]
    assert announced(world) == [
        {"schema_version": 1, "user_id": "ada", "base": "fake-base", "version": head.version, "cause": "published"}
    ]
    weights = world.registry.load(world.ref("ada", head.version))
    assert (
        float(weights[TENSOR].sum()) == (8 + 4) * SETTINGS.passes
    )  # a backlog of two small updates: the second would have replayed
    assert world.count("oppu_updater_trained_events_total") == 8
    assert world.count("oppu_updater_event_to_served_seconds_sum") == 2  # from the eighth event to the tenth
    assert world.count("oppu_updater_job_duration_seconds_count") == 1


def test_the_store_knows_where_the_version_lies_and_what_it_measured(world: World) -> None:
    version = published(world)
    (stored,) = world.store.versions(world.model.base, UserId("ada"))
    assert stored.path == world.registry.path(world.ref("ada", version))
    assert stored.metrics["loss_candidate"] < stored.metrics["loss_none"]
    manifest = world.registry.manifest(world.ref("ada", version))
    assert manifest["metrics"] == dict(stored.metrics)
    assert (manifest["trained_through"], manifest["parent"]) == (8, None)


def test_the_next_version_starts_from_the_last_and_trains_on_what_was_held_back(world: World) -> None:
    first = published(world)
    world.act("ada", GLAD)
    assert world.tick().ended == {Ended.PUBLISHED: 1}
    (job,) = world.model.jobs[-1]
    assert job.parent is not None
    assert (
        float(job.parent[TENSOR].sum()) == (8 + 4) * SETTINGS.passes
    )  # a backlog of two small updates: the second would have replayed
    trained = {e.input for e in job.examples}
    assert {"input 9", "input 10"} <= trained
    assert not {"input 19", "input 20"} & trained
    assert {f"input {n}" for n in range(1, 9)} <= trained  # ten new ones, so as many older ones as there are
    head = world.head("ada")
    assert head is not None
    assert (head.parent, head.trained_through) == (first, 18)


def test_many_users_are_trained_in_one_call_the_most_urgent_first(world: World) -> None:
    for n in range(6):
        world.act(f"user{n}", ["glad"] * (5 + n))
    assert world.tick().ended == {Ended.PUBLISHED: SETTINGS.users_per_tick}
    assert [job.user_id for job in world.model.jobs[0]] == ["user5", "user4", "user3", "user2"]
    assert world.tick().ended == {Ended.PUBLISHED: 2}
    assert world.tick().claimed == 0


def test_text_tasks_are_trained_and_validated_by_loss(world: World) -> None:
    world.act("ada", ["the same title"] * 10, task="title")
    assert world.tick().ended == {Ended.PUBLISHED: 1}


def test_a_user_with_too_few_events_is_left_alone(world: World) -> None:
    world.act("ada", GLAD[: SETTINGS.min_pending - 1])
    assert world.tick().claimed == 0
    assert world.trace == []


# --- lift
def test_the_live_adapter_is_scored_before_it_learns(world: World) -> None:
    published(world)
    assert world.store.lift(world.model.base).events == 0  # there was no live adapter
    world.act("ada", GLAD)
    world.tick()
    lift = world.store.lift(world.model.base)
    assert lift.events == lift.correct_live == 10
    assert lift.loss_live < lift.loss_none
    assert world.trace.index("store.record_lift") < world.trace.index("registry.write")


def test_events_are_scored_once_however_often_they_are_tried(world: World) -> None:
    published(world)
    world.act("ada", GLAD)
    world.model.ruins = {"ada"}
    world.tick()
    assert world.store.lift(world.model.base).events == 10
    world.model.ruins = set()
    world.act("ada", GLAD[:3])
    world.clock.advance(3600)
    assert world.tick().ended == {Ended.PUBLISHED: 1}
    assert world.store.lift(world.model.base).events == 13


# --- rejection
def test_a_candidate_that_is_not_better_is_rejected_and_considered(world: World) -> None:
    world.act("ada", [*GLAD[:8], "sad", "sad"])
    assert world.tick().ended == {Ended.REJECTED: 1}
    assert world.head("ada") is None
    assert world.status("ada").considered_through == 10
    assert world.log("ada")[0] == ("rejected", "not better than no adapter on held-back events")
    assert world.files("ada") == []
    assert world.trace == ["store.claim", "store.conclude"]
    assert announced(world) == []


def test_a_candidate_worse_than_its_parent_leaves_the_parent(world: World) -> None:
    first = published(world)
    world.act("ada", [*SAD[:8], "glad", "glad"])
    assert world.tick().ended == {Ended.REJECTED: 1}
    head = world.head("ada")
    assert head is not None
    assert head.version == first
    assert "parent" in world.log("ada")[0][1]


def test_nobody_is_trained_for_ever(world: World) -> None:
    for user, outputs in (("good", GLAD), ("bad", [*GLAD[:8], "sad", "sad"]), ("odd", ["glad"])):
        world.act(user, outputs)
    world.act("odd", GLAD, task="unknown")
    ticks = [world.tick() for _ in range(4)]
    assert [tick.claimed for tick in ticks] == [3, 0, 0, 0]
    world.clock.advance(30 * 86_400)
    assert world.tick().claimed == 0
    world.act("good", GLAD[:4])
    assert world.tick().claimed == 1


# --- nothing to train on
def test_events_of_unknown_tasks_are_considered_and_skipped(world: World) -> None:
    world.act("ada", GLAD, task="gone")
    assert world.tick().ended == {Ended.SKIPPED: 1}
    assert world.log("ada")[0][0] == "skipped"
    assert (world.status("ada").considered_through, world.due()) == (10, 0)
    assert world.model.jobs == []


def test_a_text_on_both_sides_leaves_nothing_to_train(world: World) -> None:
    world.act("ada", GLAD, text="always this")
    assert world.tick().ended == {Ended.SKIPPED: 1}


# --- parents
def test_an_unreadable_parent_is_trained_over_afresh(world: World) -> None:
    first = published(world)
    world.registry.delete(world.ref("ada", first))
    world.act("ada", GLAD)
    assert world.tick().ended == {Ended.PUBLISHED: 1}
    (job,) = world.model.jobs[-1]
    assert job.parent is None
    head = world.head("ada")
    assert head is not None
    assert head.parent == first
    newest = world.store.versions(world.model.base, UserId("ada"))[-1]
    assert newest.metrics["parent_unreadable"] == 1
    assert "loss_parent" not in newest.metrics
    assert world.count("oppu_inference_adapter_faults_total") == 1
    assert world.store.lift(world.model.base).events == 0


def test_a_parent_of_another_shape_is_trained_over_afresh(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ``lora_rank`` or ``lora_upper`` was made smaller: the update goes on, and no failure is counted."""
    published(world)
    world.act("ada", GLAD)

    def unfit(_: object) -> None:
        raise AdapterUnreadable("rank 8, expected 1 to 4")

    monkeypatch.setattr(world.model, "check", unfit)
    assert world.tick().ended == {Ended.PUBLISHED: 1}
    (job,) = world.model.jobs[-1]
    assert job.parent is None
    assert world.store.versions(world.model.base, UserId("ada"))[-1].metrics["parent_unreadable"] == 1


def test_a_registry_that_is_away_ends_the_tick_and_gives_the_claims_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.act("ada", GLAD)
    world.act("bob", GLAD)

    def away(*args: object, **kwargs: object) -> None:
        raise TransientError("registry: away")

    with monkeypatch.context() as patch:
        patch.setattr(type(world.registry), "write", away)
        for _ in range(7):
            with pytest.raises(TransientError):
                world.tick()
    assert world.due() == 2
    assert {world.status(user).state for user in ("ada", "bob")} == {ClaimState.FREE}
    assert world.tick().ended == {Ended.PUBLISHED: 2}


def test_a_store_that_is_away_leaves_the_claims_to_expire(world: World) -> None:
    world.act("ada", GLAD)

    def away() -> None:
        raise TransientError("store: away")

    with pytest.raises(TransientError):
        world.tick(store_publish=away, store_give_back=away)
    assert world.due() == 0
    world.clock.advance(SETTINGS.claim_seconds + 1)
    assert world.tick().ended == {Ended.PUBLISHED: 1}


def test_a_lost_acknowledgement_of_publishing_neither_publishes_twice_nor_deletes(world: World) -> None:
    world.act("ada", GLAD)

    def lost() -> None:
        raise TransientError("store: connection lost")

    with pytest.raises(TransientError):
        world.tick(after_store_publish=lost)
    head = world.head("ada")
    assert head is not None
    world.registry.load(world.ref("ada", head.version))
    assert world.tick().claimed == 0
    assert len(announced(world)) == 1


# --- collection
def test_old_versions_are_collected_head_parent_and_last_are_spared(world: World) -> None:
    for _ in range(6):
        published(world)
        world.clock.advance(1000)
    versions = [v.version for v in world.store.versions(world.model.base, UserId("ada"))]
    assert world.files("ada") == versions[-3:]  # the head, its parent, and one beside them


def test_a_young_version_is_never_collected(world: World) -> None:
    versions = [published(world) for _ in range(4)]
    assert world.files("ada") == versions


def test_a_registry_that_cannot_delete_does_not_undo_publishing(world: World) -> None:
    world.act("ada", GLAD)

    def away() -> None:
        raise TransientError("registry: away")

    assert world.tick(registry_collect=away).ended == {Ended.PUBLISHED: 1}


def test_training_is_as_the_settings_say(world: World) -> None:
    changes = {"learning_rate": 3e-3, "weight_decay": 0.2, "passes": 3, "clip_norm": 0.3, "dropout": 0.05}
    world.act("ada", GLAD)
    world.tick(world.new_updater(settings=SETTINGS.model_copy(update=changes)))
    assert world.model.configs == [TrainConfig(3e-3, 0.2, 3, SETTINGS.batch, "constant", 0.3, 0.05)]


# --- the shape
def test_every_write_is_an_effect(world: World) -> None:
    """Driven without performing anything, a tick leaves no trace."""
    world.act("ada", GLAD)
    steps = world.updater.tick(world.clock.now())
    effect = next(steps)
    assert isinstance(effect, Effect)
    assert effect.name == "store.claim"
    steps.close()
    assert world.due() == 1


def test_a_tick_has_the_same_trace_each_time(world: World, tmp_path: Path) -> None:
    def run(made: World) -> list[str]:
        for user in ("ada", "bob"):
            made.act(user, GLAD)
        made.tick()
        return made.trace

    folder = tmp_path / "other"
    folder.mkdir()
    other = World(folder)
    assert run(world) == run(other)
    one, two = (w.registry.load(w.ref("ada", 1)) for w in (world, other))
    np.testing.assert_array_equal(one[TENSOR], two[TENSOR])
    other.store.close()


def test_outcomes_are_the_stores() -> None:
    assert {e.value for e in Ended} - {"discarded"} <= {o.value for o in Outcome}


# --- one user's files
def _spoilt(world: World, user: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one user's folder fail as a broken disk or a wrong mode does."""
    real, bad = getattr(type(world.registry), method), world.ref(user, 0).user_id

    def failing(self: object, ref: AdapterRef, *args: object, **kwargs: object) -> object:
        if ref.user_id == bad:
            raise TransientError("registry: input/output error")
        return real(self, ref, *args, **kwargs)

    monkeypatch.setattr(type(world.registry), method, failing)


@pytest.mark.parametrize("method", ["load", "write"])
def test_one_users_files_hold_up_nobody_else(world: World, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    published(world, "ada")
    _spoilt(world, "ada", method, monkeypatch)
    world.act("ada", GLAD * 2)  # the most urgent
    world.act("bob", GLAD)
    world.act("cyd", GLAD)
    assert world.tick().ended == {Ended.PUBLISHED: 2, Ended.FAILED: 1}
    assert world.status("ada").failures == 1
    assert world.log("ada")[0][1].endswith("registry: input/output error")
    assert world.due() == 0  # ada's next attempt waits
    for failures in range(2, SETTINGS.quarantine_after + 1):
        world.clock.advance(24 * 3600)
        world.act("bob", GLAD)
        assert world.tick().ended == {Ended.PUBLISHED: 1, Ended.FAILED: 1}
        assert world.status("ada").failures == failures
    assert world.status("ada").state is not ClaimState.QUARANTINED, "her events are not at fault"
    assert world.head("ada") is not None
    monkeypatch.undo()
    world.clock.advance(24 * 3600)
    assert world.tick().ended == {Ended.PUBLISHED: 1}


def test_a_registry_that_answers_for_nobody_is_nobodys_failure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    published(world, "ada")
    _spoilt(world, "ada", "load", monkeypatch)
    world.act("ada", GLAD)
    for _ in range(SETTINGS.quarantine_after + 2):
        with pytest.raises(TransientError):
            world.tick()
    assert (world.status("ada").failures, world.due()) == (0, 1)
    monkeypatch.undo()
    assert world.tick().ended == {Ended.PUBLISHED: 1}


def test_a_registry_that_gives_and_does_not_take_is_nobodys_failure(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk: every parent can be read, no candidate can be written."""
    published(world, "ada")
    published(world, "bob")
    world.act("ada", GLAD)
    world.act("bob", GLAD)

    def full(self: object, ref: AdapterRef, *args: object, **kwargs: object) -> object:
        raise TransientError("registry: no space left on device")

    monkeypatch.setattr(type(world.registry), "write", full)
    for _ in range(SETTINGS.quarantine_after + 2):
        with pytest.raises(TransientError, match="no space left"):
            world.tick()
    assert [world.status(user).failures for user in ("ada", "bob")] == [0, 0]
    assert world.due() == 2
    monkeypatch.undo()
    assert world.tick().ended == {Ended.PUBLISHED: 2}


def test_a_lone_user_whose_files_cannot_be_written_backs_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not retrained again and again at once, nor quarantined; and what was begun of the version is gone."""
    published(world, "ada")
    world.act("ada", GLAD)
    place, real = world.registry._place, Place.write

    def filling(self: Place, path: str, content: bytes) -> None:
        if path.endswith("manifest.json"):
            raise TransientError("registry: no space left on device")
        real(self, path, content)

    monkeypatch.setattr(Place, "write", filling)
    for failures in range(1, SETTINGS.quarantine_after + 2):
        assert world.tick().ended == {Ended.FAILED: 1}
        assert (world.status("ada").failures, world.due()) == (failures, 0)
        world.clock.advance(24 * 3600)
    assert place.entries(world.registry.path(world.ref("ada", 1)).rpartition("/")[0]) == ["1"]
    monkeypatch.undo()
    assert world.tick().ended == {Ended.PUBLISHED: 1}
