"""An item's past: earlier days only, its own user only, never itself."""

from dataclasses import replace

import pytest

from evaluation import history
from evaluation.corpus import Item
from evaluation.history import check_pasts, embedded, pasts
from oppu.errors import ConfigError
from oppu.settings import RetrieverSettings
from tests.evaluation.world import EMBEDDER, item

DAYS = [0, 0, 1, 3, 3, 3, 4, 9]


@pytest.fixture
def items() -> list[Item]:
    return [item("u", n, day=day, text=f"word{n % 2} common") for n, day in enumerate(DAYS)]


def looked_up(items: list[Item]) -> list[history.Past]:
    return pasts(items, embedded(items, EMBEDDER), EMBEDDER, RetrieverSettings(k=4))


def test_a_past_holds_what_was_before_the_day(items: list[Item]) -> None:
    found = looked_up(items)
    assert [past.count for past in found] == [0, 0, 2, 3, 3, 3, 6, 7]
    check_pasts(items, found)
    assert found[0].knn is None and found[0].prior is None and found[0].pairs == ()
    assert found[-1].knn is not None and found[-1].knn.sum() == pytest.approx(1)
    assert found[-1].pairs and found[-1].line


def test_queries_may_have_vectors_of_their_own(items: list[Item]) -> None:
    distinct = [replace(i, input=f"word{n}") for n, i in enumerate(items)]
    own, one = embedded(distinct, EMBEDDER), RetrieverSettings(k=1, mode="dense")
    for other in distinct[:3]:
        asked = {**own, distinct[-1].item_id: own[other.item_id]}
        found = pasts(distinct, own, EMBEDDER, one, queries=asked)
        assert found[-1].pairs == ((other.input, other.output),)
        assert [p.pairs for p in found[:-1]] == [p.pairs for p in pasts(distinct, own, EMBEDDER, one)[:-1]]


def test_nobody_has_no_pasts() -> None:
    assert looked_up([]) == []


@pytest.mark.parametrize(
    "plant",
    [
        lambda items: [len(items) + 1] * len(items),  # the future, and the item itself
        lambda items: list(range(1, len(items) + 1)),  # earlier items of the same day
        lambda items: [n + 1 for n in range(1, len(items) + 1)],  # the item itself
    ],
)
def test_a_planted_leak_in_time_is_seen(items: list[Item], monkeypatch: pytest.MonkeyPatch, plant: object) -> None:
    monkeypatch.setattr(history, "_before", plant)
    distinct = [replace(i, input=f"{i.input} {n}") for n, i in enumerate(items)]
    with pytest.raises(ConfigError, match="not earlier"):
        check_pasts(distinct, looked_up(distinct))


def test_another_users_item_in_a_past_is_seen(items: list[Item]) -> None:
    found = looked_up(items)
    with pytest.raises(ConfigError, match="another user's item"):
        check_pasts(items[2:], found[2:])
