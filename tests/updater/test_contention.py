"""What may go wrong around a tick: failures, lost claims, erasures, rollbacks, a process that stops or dies."""

from datetime import timedelta

import numpy as np
import pytest

from oppu.errors import ConfigError, FatalError, ModelLost, TransientError
from oppu.lm.fake import TENSOR
from oppu.settings import LONGEST_RETRY_SECONDS
from oppu.store.records import Claim, ClaimState
from oppu.values import OutRecord, UserId
from tests.updater.world import GLAD, SETTINGS, TOPICS, World, announced, published
from updater.job import Ended
from updater.operations import check_readable, release, roll_back


# --- failure
def test_weights_that_are_not_finite_fail_and_back_off(world: World) -> None:
    world.act("ada", GLAD)
    world.model.ruins = {"ada"}
    assert world.tick().ended == {Ended.FAILED: 1}
    status = world.status("ada")
    assert (status.failures, status.state, status.considered_through) == (1, ClaimState.BACKING_OFF, 0)
    assert status.retry_at == world.clock.now() + timedelta(seconds=SETTINGS.retry_seconds)
    assert world.log("ada")[0] == ("failed", "training: weights are not finite")
    assert world.tick().claimed == 0
    world.model.ruins = set()
    world.clock.advance(SETTINGS.retry_seconds)
    assert world.tick().ended == {Ended.PUBLISHED: 1}
    assert world.status("ada").failures == 0


def test_the_back_off_doubles_and_the_fifth_failure_is_quarantined(world: World) -> None:
    world.act("ada", GLAD)
    world.model.ruins = {"ada"}
    for failure in range(1, 5):
        assert world.tick().ended == {Ended.FAILED: 1}
        wait = world.status("ada").retry_at
        assert wait == world.clock.now() + timedelta(seconds=SETTINGS.retry_seconds * 2 ** (failure - 1))
        world.clock.advance(SETTINGS.retry_seconds * 2 ** (failure - 1) - 1)
        assert world.tick().claimed == 0
        world.clock.advance(1)
    assert world.tick().ended == {Ended.FAILED: 1}
    assert world.status("ada").state is ClaimState.QUARANTINED
    world.act("ada", GLAD)
    world.clock.advance(365 * 86_400)
    assert world.tick().claimed == 0
    world.model.ruins = set()
    release(world.store, world.model.base, UserId("ada"), now=world.clock.now())
    assert world.tick().ended == {Ended.PUBLISHED: 1}


def test_one_users_failure_does_not_stop_the_others(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for user in ("ada", "bob", "eve"):
        world.act(user, GLAD)
    world.model.breaks_for = {"bob"}
    assert world.tick().ended == {Ended.PUBLISHED: 2, Ended.FAILED: 1}
    assert world.head("bob") is None
    assert world.log("bob")[0] == ("failed", "training: ValueError")
    assert [len(jobs) for jobs in world.model.jobs] == [3, 1, 1, 1]
    assert "secret" not in caplog.text


def test_scoring_that_breaks_fails_that_user_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("ada", "bob"):
        world.act(user, GLAD, text="" if user == "ada" else "poison 1")
        world.act(user, GLAD[:2])
    scores = world.model.scores

    def brittle(examples, tensors):  # type: ignore[no-untyped-def]
        if any(e.input.startswith("poison") for e in examples):
            raise RuntimeError("out of memory")
        return scores(examples, tensors)

    monkeypatch.setattr(world.model, "scores", brittle)
    assert world.tick().ended == {Ended.PUBLISHED: 1, Ended.FAILED: 1}
    assert world.log("bob")[0] == ("failed", "scoring: RuntimeError")


LOST = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`"


@pytest.mark.parametrize("part", ["train", "scores"])
def test_a_lost_device_stops_the_worker_and_is_no_users_failure(
    world: World, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    for user in ("ada", "bob"):
        world.act(user, GLAD)

    def lost(*_: object, **__: object) -> None:
        raise RuntimeError(LOST)

    with monkeypatch.context() as patch:
        patch.setattr(world.model, part, lost)
        with pytest.raises(ModelLost, match="an illegal memory access"):
            world.tick()
    for user in ("ada", "bob"):
        status = world.status(user)
        assert (status.failures, status.state, status.considered_through) == (0, ClaimState.CLAIMED, 0)
        assert world.log(user) == []
    world.clock.advance(SETTINGS.claim_seconds + 1)
    assert sum(world.tick().ended[Ended.PUBLISHED] for _ in range(2)) == 2


def test_who_finds_no_memory_backs_off_and_is_never_quarantined(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("ada", "bob"):
        world.act(user, GLAD)

    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(world.model, "train", exhausted)
        for _ in range(SETTINGS.quarantine_after + 1):
            assert world.tick().ended == {Ended.FAILED: 2}
            assert {world.status(user).state for user in ("ada", "bob")} == {ClaimState.BACKING_OFF}
            world.clock.advance(LONGEST_RETRY_SECONDS)
    assert world.tick().ended == {Ended.PUBLISHED: 2}


def test_a_user_who_loses_the_device_is_tried_alone_and_quarantined(world: World) -> None:
    for user in ("ada", "bob", "eve"):
        world.act(user, GLAD)

    def lose() -> None:
        if any(job.user_id == "bob" for job in world.model.jobs[-1]):
            raise RuntimeError(LOST)

    world.model.while_training = lose
    deaths = 0
    for _ in range(12):
        try:
            world.tick()
        except ModelLost:
            deaths += 1
        world.clock.advance(SETTINGS.claim_seconds + 1)
    assert world.status("bob").state is ClaimState.QUARANTINED
    assert deaths == SETTINGS.quarantine_after
    for innocent in ("ada", "eve"):
        assert [outcome for outcome, _ in world.log(innocent)] == ["published"]


def test_too_few_results_stop_the_worker(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.act("ada", GLAD)
    monkeypatch.setattr(world.model, "train", lambda jobs, config, heartbeat: [])
    with pytest.raises(FatalError, match="0 results"):
        world.tick()


def test_a_user_who_kills_the_process_is_tried_alone_and_quarantined(world: World) -> None:
    for user in ("ada", "bob", "eve"):
        world.act(user, GLAD)

    def die() -> None:
        if any(job.user_id == "bob" for job in world.model.jobs[-1]):
            raise KeyboardInterrupt

    world.model.while_training = die
    deaths = 0
    for _ in range(12):
        try:
            world.tick()
        except KeyboardInterrupt:
            deaths += 1
        world.clock.advance(SETTINGS.claim_seconds + 1)
    assert world.status("bob").state is ClaimState.QUARANTINED
    assert "ended with the process" in world.log("bob")[0][1]
    assert deaths == SETTINGS.quarantine_after
    for innocent in ("ada", "eve"):
        assert world.head(innocent) is not None
        assert [outcome for outcome, _ in world.log(innocent)] == ["published"]


# --- claims
def test_a_claim_that_moved_before_publishing_publishes_nothing_and_deletes_its_files(world: World) -> None:
    world.act("ada", GLAD)
    winner = world.new_updater("two")

    def overtake() -> None:
        world.clock.advance(SETTINGS.claim_seconds + 1)
        assert World.tick(world, winner).ended == {Ended.PUBLISHED: 1}

    outcome = world.tick(store_publish=overtake)
    assert outcome.ended == {Ended.DISCARDED: 1}
    head = world.head("ada")
    assert head is not None
    assert world.files("ada") == [head.version]
    assert len(announced(world)) == 1
    assert world.updates(Ended.DISCARDED) == 1
    world.registry.load(world.ref("ada", head.version))


def test_a_claim_lost_while_training_is_dropped_before_anything_is_written(world: World) -> None:
    world.act("ada", GLAD)
    world.act("bob", GLAD[:8])
    winner = world.new_updater("two", model=type(world.model)())

    def overtake() -> None:
        world.clock.advance(SETTINGS.claim_seconds + 1)
        claim = world.store.claim(world.model.base, UserId("ada"), holder="two", ttl_seconds=600)
        assert claim is not None

    world.model.while_training = overtake
    outcome = world.tick()
    assert outcome.ended == {Ended.DISCARDED: 1, Ended.PUBLISHED: 1}
    assert world.trace.count("registry.write") == 1
    assert world.files("ada") == []
    assert world.head("ada") is None
    assert world.tick(winner).claimed == 0


def test_claims_are_renewed_while_training(world: World) -> None:
    world.act("ada", GLAD)
    world.model.while_training = lambda: world.clock.advance(SETTINGS.claim_seconds * 0.6)
    outcome = world.tick(registry_write=lambda: world.clock.advance(SETTINGS.claim_seconds * 0.6))
    assert outcome.ended == {Ended.PUBLISHED: 1}
    assert world.store.claim(world.model.base, UserId("ada"), holder="two", ttl_seconds=1) is not None


def test_a_registry_slower_than_claims_does_not_look_like_a_user_who_kills_processes(world: World) -> None:
    world.act("ada", GLAD)
    base, ada, others = world.model.base, UserId("ada"), list[Claim]()

    def overtaken() -> None:
        world.clock.advance(SETTINGS.claim_seconds + 1)
        if others:
            assert not world.store.give_back(others.pop())  # it, too, finds that its claim has moved
        claim = world.store.claim(base, ada, holder="other", ttl_seconds=SETTINGS.claim_seconds)
        assert claim is not None
        others.append(claim)

    for _ in range(2 * SETTINGS.quarantine_after):
        assert world.tick(registry_write=overtaken).ended == {Ended.DISCARDED: 1}
        world.clock.advance(SETTINGS.claim_seconds + 1)
    assert world.tick().ended == {Ended.PUBLISHED: 1}


def test_a_store_that_is_away_when_a_claim_was_lost_ends_nothing_else(world: World) -> None:
    world.act("ada", GLAD)

    def overtake() -> None:
        world.clock.advance(SETTINGS.claim_seconds + 1)
        assert world.store.claim(world.model.base, UserId("ada"), holder="two", ttl_seconds=600) is not None

    def away() -> None:
        raise TransientError("away")

    assert world.tick(store_publish=overtake, store_give_back=away).ended == {Ended.DISCARDED: 1}


def test_a_user_whom_somebody_else_holds_is_passed_over(world: World) -> None:
    world.act("ada", GLAD)
    base, ada = world.model.base, UserId("ada")
    outcome = world.tick(store_claim=lambda: world.store.claim(base, ada, holder="two", ttl_seconds=60))
    assert (outcome.claimed, outcome.ended) == (0, {})


def test_a_user_whom_somebody_else_has_just_trained_is_skipped(world: World) -> None:
    world.act("ada", GLAD)
    others = world.new_updater("two")
    outcome = world.tick(store_claim=lambda: World.tick(world, others))
    assert outcome.ended == {Ended.SKIPPED: 1}
    assert len(world.files("ada")) == 1
    assert world.status("ada").considered_through == 10


def test_an_erasure_while_training_wins(world: World) -> None:
    world.act("ada", GLAD)

    def erase() -> None:
        announce = OutRecord(TOPICS.updates, b"ada", None)
        world.store.erase(UserId("ada"), cluster_id="c", end_offsets={}, now=world.clock.now(), announce=announce)
        world.registry.delete_user(UserId("ada"))

    assert world.tick(store_publish=erase).ended == {Ended.DISCARDED: 1}
    assert world.registry.versions(UserId("ada"), 0) == world.registry.versions(UserId("ada"), 1) == []
    assert world.tick().claimed == 0


def test_a_path_that_is_taken_fails_that_user(world: World) -> None:
    world.act("ada", GLAD)
    world.act("bob", GLAD)
    weights = {TENSOR: np.ones((1, 64), dtype=np.float32)}
    world.registry.write(world.ref("ada", 1), weights, parent=None, trained_through=0, metrics={}, token=0)
    assert world.tick().ended == {Ended.FAILED: 1, Ended.PUBLISHED: 1}
    assert "never written twice" in world.log("ada")[0][1]
    world.clock.advance(SETTINGS.retry_seconds)
    assert world.tick().ended == {Ended.PUBLISHED: 1}


# --- rollback
def test_a_rollback_holds_until_new_evidence(world: World) -> None:
    first, second = published(world), published(world)
    base, ada = world.model.base, UserId("ada")
    check_readable(world.registry, world.ref("ada", first))
    head = roll_back(world.store, base, ada, to=first, reason="bad", now=world.clock.now(), topics=TOPICS)
    assert head is not None
    assert (head.version, head.parent) == (first, None)
    assert announced(world)[-1] == {
        "schema_version": 1, "user_id": "ada", "base": base, "version": first, "cause": "rolled_back",
    }  # fmt: skip
    assert world.status("ada").state is ClaimState.HELD
    world.clock.advance(86_400)
    assert world.tick().claimed == 0
    world.act("ada", GLAD[:4])
    assert world.tick().ended == {Ended.PUBLISHED: 1}
    after = world.head("ada")
    assert after is not None
    assert (after.parent, after.version > second) == (first, True)


def test_a_rollback_to_no_adapter_starts_afresh(world: World) -> None:
    published(world)
    base = world.model.base
    roll_back(world.store, base, UserId("ada"), to=None, reason="bad", now=world.clock.now(), topics=TOPICS)
    assert world.head("ada") is None
    assert "version" not in announced(world)[-1]
    world.act("ada", GLAD[:4])
    assert world.tick().ended == {Ended.PUBLISHED: 1}
    assert world.model.jobs[-1][0].parent is None


def test_a_rollback_while_training_wins(world: World) -> None:
    first = published(world)
    published(world)
    world.act("ada", GLAD)

    def back() -> None:
        base, now = world.model.base, world.clock.now()
        roll_back(world.store, base, UserId("ada"), to=first, reason="bad", now=now, topics=TOPICS)

    assert world.tick(store_publish=back).ended == {Ended.DISCARDED: 1}
    head = world.head("ada")
    assert head is not None
    assert head.version == first


def test_a_rollback_to_an_unknown_or_collected_version_says_so(world: World) -> None:
    version, base, now = published(world), world.model.base, world.clock.now()
    with pytest.raises(ConfigError, match=f"a version of this user .{version}., got 77"):
        roll_back(world.store, base, UserId("ada"), to=77, reason="", now=now, topics=TOPICS)
    world.registry.delete(world.ref("ada", version))
    with pytest.raises(ConfigError, match="cannot be served"):
        check_readable(world.registry, world.ref("ada", version))
    with pytest.raises(ConfigError, match="not known"):
        release(world.store, base, UserId("nobody"), now=now)


# --- draining
def test_draining_claims_nobody(world: World) -> None:
    world.act("ada", GLAD)
    world.updater.drain()
    assert world.tick().claimed == 0
    assert world.trace == []


@pytest.mark.parametrize("when", ["store_claim", "after_store_claim", "training"])
def test_draining_gives_claims_back_untouched(world: World, when: str) -> None:
    for user in ("ada", "bob"):
        world.act(user, GLAD)
    if when == "training":
        world.model.while_training = world.updater.drain
        outcome = world.tick()
    else:
        outcome = world.tick(None, **{when: world.updater.drain})
    assert outcome.ended == {Ended.SKIPPED: outcome.claimed}
    assert outcome.claimed == (2 if when == "training" else 1)
    assert world.due() == 2
    assert world.head("ada") is None
    assert world.count("oppu_updater_transitions_total", state="draining") == outcome.claimed
    assert world.tick(world.new_updater("next")).ended == {Ended.PUBLISHED: 2}


def test_draining_after_training_still_publishes(world: World) -> None:
    for user in ("ada", "bob"):
        world.act(user, GLAD)
    assert world.tick(registry_write=world.updater.drain).ended == {Ended.PUBLISHED: 2}
