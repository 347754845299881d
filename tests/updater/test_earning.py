"""What an adapter earns on its own user's events before it learns them."""

import pytest

from oppu.embedder import HashEmbedder
from oppu.errors import AdapterUnreadable
from oppu.fusion import DEFAULT, earn, recency_prior, sources_of
from oppu.settings import RetrieverSettings
from oppu.values import UserId
from retriever.port import Query, knn_distribution
from retriever.service import Retriever
from tests.updater.world import GLAD, TASKS, World
from updater.earning import Judge
from updater.examples import example
from updater.job import Ended


def test_an_adapter_earns_by_what_it_foresaw_better_than_the_evidence(world: World) -> None:
    retriever = Retriever(world.store, HashEmbedder(), RetrieverSettings(), world.metrics)
    judge = Judge(retriever, DEFAULT, neighbours=8)
    updater = world.new_updater("judging", judge=judge)

    world.act("ada", GLAD)
    world.tick(updater)
    assert _earned(world) == 0.0  # nothing was foreseen by it yet
    world.act("ada", GLAD)
    outcome = world.tick(updater)
    assert outcome.claimed == 1
    assert _earned(world) == pytest.approx(expected(world, retriever, first=len(GLAD)))
    retriever.close()


def expected(world: World, retriever: Retriever, first: int) -> float:
    """Ask about every later event by itself, as the service would have answered it."""
    user = UserId("ada")
    state = world.store.users([user], world.model.base)[user]
    live, earned = world.registry.load(world.ref("ada", 1)), 0.0
    for event in world.store.events({user: first}, embedder="", limit=99)[user]:
        if not event.output:
            continue
        made = example(event, TASKS)
        [none], [own] = (world.model.scores([made], tensors) for tensors in (None, live))
        gain = float(own.sum() - none.sum())
        if made.choices:
            query = Query(state, event.task, event.input, 4, 8, before_seq=event.seq)
            [found], [profile] = retriever.retrieve([query]), retriever.profiles([(state, event.task, event.seq)])
            vote = knn_distribution(found.neighbours, made.choices)
            said = sources_of(none, own, vote, recency_prior(profile.prior, made.choices))
            gain = DEFAULT.gain(said, event.seq - 1, made.choices.index(event.output))
        earned = earn(earned, gain)
    assert earned != 0.0
    return earned


def test_an_adapter_earns_by_its_texts_against_the_base(world: World) -> None:
    retriever = Retriever(world.store, HashEmbedder(), RetrieverSettings(), world.metrics)
    updater = world.new_updater("judging", judge=Judge(retriever, DEFAULT, neighbours=8))
    world.act("ada", GLAD, task="title")
    world.tick(updater)
    world.act("ada", ["glad", "sad", "sad", "glad", "", "odd"], task="title")
    world.act("ada", ["glad"])  # a choice among texts, in its own place
    wanted = expected(world, retriever, first=len(GLAD))
    world.tick(updater)
    assert _earned(world) == pytest.approx(wanted) != 0.0
    retriever.close()


def test_an_update_that_failed_leaves_what_was_earned(world: World) -> None:
    retriever = Retriever(world.store, HashEmbedder(), RetrieverSettings(), world.metrics)
    updater = world.new_updater("judging", judge=Judge(retriever, DEFAULT, neighbours=8))
    world.act("ada", GLAD)
    world.tick(updater)
    world.act("ada", GLAD)

    def broken() -> None:
        raise AdapterUnreadable("checksum")

    assert world.tick(updater, registry_write=broken).ended == {Ended.FAILED: 1}
    assert _earned(world) == 0.0
    retriever.close()


def _earned(world: World) -> float:
    head = world.head("ada")
    assert head is not None
    return head.earned
