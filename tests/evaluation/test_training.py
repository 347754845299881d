"""What is kept of one user is never read as another's, whatever their ids are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation import text, training
from evaluation.splits import Fold, Person
from evaluation.training import FROZEN, HEAD, MATCHED, PARTS, Bench, Recipe, follow, full_config, part_key
from oppu.lm.port import TrainConfig, TrainJob
from tests.evaluation.world import item

USERS = ("x", "x/frozen", "x/head|lora", "x/matched", "x/matched/frozen", "~x", "~x~1frozen", "x~1frozen", "a/b", "a|b")


def test_keys_of_users_and_parts_never_meet() -> None:
    ways = ("", FROZEN, MATCHED, f"{HEAD}lora", f"{HEAD}x/frozen")
    assert len({part_key(user, part) for user, part in product(USERS, ways)}) == len(USERS) * len(ways)
    for user, part in product(USERS, ways[3:]):
        assert part_key(user, part).partition(HEAD)[::2] == (part_key(user), part.removeprefix(HEAD))


def test_plain_ids_are_spelt_as_they_are() -> None:
    for user in ("anna", "a/b", "a|b", "x~1frozen", "frozen"):
        assert [part_key(user, part) for part in ("", *PARTS)] == [user, *(user + part for part in PARTS)]


@dataclass
class _Model:
    """Says by what it scores whose adapter it was given."""

    def scores(self, examples: Sequence[Any], tensors: Mapping[str, NDArray[Any]] | None) -> list[list[float]]:
        own = 0.0 if tensors is None else float(tensors["lora"][0])
        return [[own, 0.0, 0.0] for _ in examples]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    def train(_: object, jobs: Sequence[Any], __: object) -> list[dict[str, NDArray[Any]]]:
        return [{"lora": np.full(1, 1.0 + USERS.index(job.user_id), dtype=np.float32)} for job in jobs]

    monkeypatch.setattr(training, "_train", train)
    recipe = replace(Recipe(), chunk=4)
    return Bench(Fold("all", (), (), ()), _Model(), tmp_path, recipe, 0, lambda _: None)  # type: ignore[arg-type]


def test_who_follows_the_stream_gets_only_what_is_his(bench: Bench) -> None:
    people = [Person(u, tuple(item(u, at) for at in range(9)), tuple(range(9)), 8) for u in USERS]
    for found in (follow(bench, people), follow(bench, people)):  # computed, and read again
        for number, user in enumerate(USERS, start=1):
            assert found.scores[user][:, 0].tolist() == [0.0] * 4 + [number] * 5
            assert found.frozen[user].tolist() == [[number, 0.0, 0.0]]
            assert found.heads[user]["lora"].tolist() == [number]


@pytest.mark.parametrize("afresh", [False, True])
def test_following_is_by_increments_or_by_all_so_far(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, afresh: bool
) -> None:
    calls: list[tuple[TrainConfig, TrainJob]] = []

    def train(_: object, jobs: Sequence[TrainJob], config: TrainConfig) -> list[dict[str, NDArray[Any]]]:
        calls.extend((config, job) for job in jobs)
        return [{"lora": np.full(1, len(calls), dtype=np.float32)} for _ in jobs]

    monkeypatch.setattr(training, "_train", train)
    bench = replace(bench, recipe=replace(bench.recipe, replay=2))
    person = Person("x", tuple(item("x", at) for at in range(14)), tuple(range(14)), 9)
    found = follow(bench, [person], afresh=afresh)
    assert found.scores["x"][:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2  # learnt after it was asked
    learnt = [{example.input for example in job.examples} for _, job in calls]
    texts = [one.input for one in person.items]
    if afresh:
        assert learnt == [set(texts[:4]), set(texts[:8]), set(texts[:12])]
        assert all(config == full_config(bench.recipe) and job.parent is None for config, job in calls)
    else:
        assert [set(texts[begin : begin + 4]) <= own for begin, own in zip((0, 4, 8), learnt, strict=True)] == [
            True
        ] * 3
        assert [len(own) for own in learnt] == [4, 6, 6]
        assert [config.passes for config, _ in calls] == [bench.recipe.chunk_passes] * 3
        assert [None if job.parent is None else job.parent["lora"][0] for _, job in calls] == [None, 1, 2]


def test_what_caches_foresee_is_each_users_own(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    people = [Person(u, (item(u, 0),), (0,), 1) for u in USERS]

    def foreseen(_: object, person: Person, __: object) -> tuple[NDArray[Any], NDArray[Any]]:
        own = np.full((1, 2, 3), float(USERS.index(person.user_id)))
        return own, own + 100

    monkeypatch.setattr(text, "_foreseen", foreseen)
    for _ in range(2):
        found = text.cached(bench, people, dict.fromkeys(USERS, ()))
        assert [(said[0, 0, 0], matched[0, 0, 0]) for said, matched in (found[u] for u in USERS)] == [
            (k, k + 100) for k in range(len(USERS))
        ]
