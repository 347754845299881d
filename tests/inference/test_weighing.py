"""What is said of an ask's choices does not hang on the asks beside it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.adapters import Placed
from inference.admission import Ask
from inference.attempt import Attempt
from inference.evidence import Personal
from inference.weighing import weigh
from oppu.fusion import DEFAULT, log_softmax, recency_prior, sources_of
from oppu.lm.port import AdapterRef, Row, Scored
from oppu.values import Event, EventId, Head, Partition, Record, UserId, UserState
from oppu.wire import PredictionRequest
from retriever.port import Hit, Profile, Retrieved, knn_distribution
from tests.inference.conftest import START, TASKS

SETS = (("war", "law"), ("war", "law", "art"), ("1", "2", "3"))
Pair = tuple[Attempt, Scored | None]


def attempt(user: str, choices: tuple[str, ...], asked: str, adapter: bool, seed: int) -> Pair:
    """Make an ask of a user of whom the named things are known, and what a model says of it."""
    chance = np.random.default_rng(seed)
    events, name = int(chance.integers(1, 400)), UserId(user)
    head = Head(1, None, 0, 1, earned=float(chance.normal())) if adapter else None
    request = PredictionRequest(request_id="r", user_id=user, task="label", input="words", choices=choices or None)
    record = Record(Partition("requests", 0), seed, 0, None, None)
    ask = Ask(record, request, TASKS.require("label" if choices else "write"), choices, None)
    outputs = chance.choice([*choices, "other"], 6)
    hits = tuple(
        Hit(Event(name, seq, EventId(f"e{seq}"), "label", START, START, "words", str(output)), float(chance.uniform()))
        for seq, output in enumerate(outputs, start=1)
    )
    personal = Personal(
        UserState(name, 1, events, head),
        Retrieved((), hits, events) if "knn" in asked else None,
        Profile(name, "v1", events, {str(outputs[0]): 2.0}, "") if "prior" in asked else None,
    )
    placed = Placed(AdapterRef(name, 1, 1) if adapter else None)
    said = [log_softmax(chance.normal(size=len(choices))) for _ in range(2)] if choices else [np.zeros(0)] * 2
    result = None if seed % 11 == 0 else Scored(said[0], said[1], unsound=seed % 7 == 0)
    return Attempt(ask, personal, placed, Row("label", "words", choices=choices)), result


def by_itself(attempt: Attempt, result: Scored | None) -> Any:
    """Weigh one ask by the formulas for one item."""
    choices, personal = attempt.ask.choices, attempt.personal
    if result is None or not choices:
        return None
    adapter = result.scores if attempt.placed.ref is not None and not result.unsound else None
    if personal.retrieved is None and personal.profile is None:
        return np.exp(log_softmax(result.base_scores if adapter is None else adapter))
    prior = recency_prior(personal.profile.prior if personal.profile else {}, choices)
    sources = sources_of(result.base_scores, adapter, knn_distribution(personal.neighbours, choices), prior)
    return np.exp(DEFAULT.scores(sources, personal.sequence, personal.earned))


asks = st.tuples(
    st.sampled_from([*SETS, ()]),
    st.sampled_from(["", "knn", "prior", "knn prior"]),
    st.booleans(),
    st.integers(0, 10**6),
)


@settings(deadline=None)
@given(st.lists(asks, max_size=12))
def test_many_are_weighed_as_each_is_by_itself(drawn: list[Any]) -> None:
    made = [attempt(f"user-{n}", *one) for n, one in enumerate(drawn)]
    found = weigh([a for a, _ in made], [r for _, r in made], DEFAULT)
    for (own, result), weighed in zip(made, found, strict=True):
        expected = by_itself(own, result)
        if expected is None:
            assert weighed is None
        else:
            assert weighed is not None
            np.testing.assert_allclose(weighed.probabilities, expected, rtol=1e-12)
            assert weighed.probabilities.sum() == pytest.approx(1)


def test_who_is_heard_is_each_asks_own() -> None:
    made = [
        attempt("anna", SETS[0], "knn prior", True, 1),
        attempt("bert", SETS[0], "", True, 2),
        attempt("cleo", SETS[0], "", False, 3),
        attempt("dora", SETS[0], "knn prior", True, 7),  # whose adapter's scores are no numbers
    ]
    found = weigh([a for a, _ in made], [r for _, r in made], DEFAULT)
    heard = [None if weighed is None else set(weighed.heard) for weighed in found]
    assert heard == [{"base", "knn", "prior", "adapter"}, {"adapter"}, set(), {"base", "knn", "prior"}]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("adapter", [False, True])
def test_scores_that_are_no_numbers_cost_their_own_ask_alone(adapter: bool) -> None:
    made = [attempt(f"user-{n}", SETS[0], "knn prior", adapter, n) for n in (1, 2, 3)]
    broken = Scored(np.array([0.0, -1.0]), np.array([np.nan, 0.0]))
    found = weigh([a for a, _ in made], [made[0][1], broken, made[2][1]], DEFAULT)
    sound = [None if weighed is None else bool(np.isfinite(weighed.probabilities).all()) for weighed in found]
    assert sound == [True, False, True]
    for at in (0, 2):
        weighed = found[at]
        assert weighed is not None
        np.testing.assert_allclose(weighed.probabilities, by_itself(*made[at]), rtol=1e-12)
