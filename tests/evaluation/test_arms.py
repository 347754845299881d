"""From scores to answers, with scores made up so that every answer is known."""

from dataclasses import replace

import numpy as np
import pytest

from evaluation import controls
from evaluation.arms import Table, answer, choice_arms, fit_each, fit_fusion, log_loss, macro_f1, right, squared_error
from evaluation.corpus import Item
from evaluation.history import Past
from evaluation.splits import Person
from evaluation.stacking import Seen, fit
from oppu.fusion import DEFAULT, MOST_SHARE, Fusion, Stack, log_softmax
from tests.evaluation.world import LABELS, item


def person(user: str = "u", count: int = 10, cut: int = 8, outputs: str = "abc") -> Person:
    items = tuple(item(user, at, output=outputs[at % len(outputs)]) for at in range(count))
    return Person(user, items, tuple(range(count)), cut)


def sure(answer: str) -> np.ndarray:
    scores: np.ndarray = np.log([0.98 if label == answer else 0.01 for label in LABELS])
    return scores


def table(own: Person, base: str, follow: str) -> Table:
    half = np.array([0.4, 0.3, 0.3])
    past = [Past(at, None if at == 0 else half, None if at == 0 else half, (), "") for at in range(len(own.items))]
    scores = np.stack([sure(base)] * len(own.items))
    followed = np.stack([sure(follow if follow != "truth" else i.output) for i in own.items])
    return Table(own, past, scores, followed, {"oppu": scores[own.cut :]}, 1)


def offering(one: Item, number: int) -> Item:
    """Offer choices of its own, the right one first."""
    return replace(one, choices=(f"right {number}", f"wrong {number}"), output=f"right {number}")


FUSION = Fusion(
    Stack({"base": (1.0, 0.0)}),
    Stack({"adapter": (1.0, 0.0)}),
    (0.0, 0.0),
)


def test_every_arm_answers_every_query_of_every_user() -> None:
    tables = [table(person("u"), "a", "b"), table(person("v", 12, 9), "c", "a")]
    arms = choice_arms(tables, [FUSION] * len(tables))
    for name, scores in arms.held.items():
        assert [s.shape for s in scores] == [(2, 3), (3, 3)], name
    assert [s.shape for s in arms.stream["fused"]] == [(10, 3), (12, 3)]
    assert {"none", "majority", "recent", "prior", "knn", "evidence", "fused", "follow", "oppu", "oppu+prior"} <= set(
        arms.held
    )


def test_an_adapter_that_foresees_the_user_keeps_its_share_and_one_that_does_not_loses_it() -> None:
    good = choice_arms([table(person(count=40, cut=30), "a", "truth")], [FUSION])
    assert good.trust[0] == MOST_SHARE
    own = person(count=40, cut=30, outputs="a")
    bad = choice_arms([table(own, "a", "b")], [FUSION])
    assert bad.trust[0] < 0.01
    losses = {arm: log_loss(own.test, bad.held[arm][0]).mean() for arm in ("evidence", "fused", "unweighed")}
    assert losses["fused"] < losses["evidence"] + 0.01 < losses["unweighed"]


def test_outcomes_of_a_day_count_from_the_next_day_on() -> None:
    own = person(count=6, cut=5)
    same = Person("u", tuple(item("u", at, output="a", day=1 if at else 0) for at in range(6)), own.groups, 5)
    arms = choice_arms([table(same, "b", "a")], [FUSION])
    streamed = arms.stream["fused"][0]
    np.testing.assert_allclose(streamed[2], streamed[5])  # nothing of the day was used within it


def test_the_commonest_and_the_last_output_so_far() -> None:
    own = person(count=10, cut=8, outputs="aab")  # …a a b a a b a a | b a
    arms = choice_arms([table(own, "a", "a")], [FUSION])
    assert [LABELS[int(row.argmax())] for row in arms.held["majority"][0]] == ["a", "a"]
    assert [LABELS[int(row.argmax())] for row in arms.held["recent"][0]] == ["a", "b"]


def test_an_earlier_output_that_is_not_offered_leaves_the_answer_to_the_base() -> None:
    own = person(count=10, cut=8)
    items = tuple(offering(i, n) for n, i in enumerate(own.items))
    scores = np.tile(np.log([0.3, 0.7]), (10, 1))  # the base is wrong, whatever stands first
    past = [Past(at, None, None, (), "") for at in range(10)]
    arms = choice_arms([Table(replace(own, items=items), past, scores, scores, {}, 1)], [FUSION])
    for name in ("majority", "recent"):
        np.testing.assert_allclose(arms.held[name][0], scores[8:])


def test_each_users_weights_are_fitted_without_them() -> None:
    def told(user: str, says: str) -> Table:
        own = person(user, 40, 30)
        return table(replace(own, groups=tuple(100 * int(user[1:]) + n for n in own.groups)), "a", says)

    names = [f"u{n}" for n in range(7)]
    before = fit_each([told(user, "truth") for user in names], [])
    after = fit_each([told(user, "b" if user == "u0" else "truth") for user in names], [])
    assert before[0] == after[0] and before[1] != after[1]
    assert before[0] == before[5] == after[5]  # of one part
    crossed = [told(user, "truth") for user in names]
    assert fit_each(crossed, [told("u0", "b")])[0] == before[0]  # calibrates in another fold
    assert fit_each([told("u0", "truth")], []) == [DEFAULT]


def test_merits_by_kind() -> None:
    items = [item("u", 0, output="b"), item("u", 1, output="c")]
    scores = np.stack([sure("b"), sure("a")])
    assert right(items, scores, "choice").tolist() == [1.0, 0.0]
    np.testing.assert_allclose(log_loss(items, scores), [-np.log(0.98), -np.log(0.01)])
    assert macro_f1(items, scores) == pytest.approx(1 / 3)
    assert right(items, np.array([[-1.5], [-2.0]]), "text").tolist() == [-1.5, -2.0]


def test_a_rating_is_judged_by_the_median_of_its_distribution() -> None:
    rated = item("u", 0, output="5")
    object.__setattr__(rated, "choices", ("1", "2", "3", "4", "5"))
    scores = np.log(np.array([[0.45, 0.01, 0.01, 0.01, 0.52], [0.3, 0.1, 0.2, 0.1, 0.3]]))
    assert right([rated, rated], scores, "rating").tolist() == [0.0, -2.0]


class TestControls:
    def people(self) -> list[Person]:
        return [
            Person(
                f"u{n}",
                tuple(item(f"u{n}", at, output="aab"[(at + n) % 3]) for at in range(12)),
                tuple(range(100 * n, 100 * n + 12)),
                9,
            )
            for n in range(4)
        ]

    def test_permuted_outputs_are_the_users_own_in_another_order(self) -> None:
        own = self.people()[0]
        made = controls.permuted(own, 0)
        assert [i.input for i in made] == [i.input for i in own.train]
        assert sorted(i.output for i in made) == sorted(i.output for i in own.train)
        assert [i.output for i in made] != [i.output for i in own.train]

    def test_permuted_outputs_of_the_same_choices_in_any_order_are_the_users_own(self) -> None:
        own = self.people()[0]
        items = tuple(
            replace(i, choices=i.choices[at % 3 :] + i.choices[: at % 3], output="a") for at, i in enumerate(own.items)
        )
        assert {i.output for i in controls.permuted(replace(own, items=items), 0)} == {"a"}

    def test_permuted_outputs_of_unequal_choices_stay_among_the_items_own(self) -> None:
        own = self.people()[0]
        offered = [("a", "b", "c"), ("a", "b")]
        items = tuple(replace(i, choices=offered[n % 2], output="b") for n, i in enumerate(own.items))
        items = (replace(items[0], output=""), replace(items[1], output="a"), *items[2:])
        made = controls.permuted(replace(own, items=items), 0)
        assert made[0] == items[0] and all(i.output in i.choices for i in made[1:])

    def test_permuted_outputs_say_nothing_where_the_right_one_always_stands_first(self) -> None:
        own = person(count=60, cut=50)
        items = tuple(offering(i, n) for n, i in enumerate(own.items))
        made = controls.permuted(replace(own, items=items), 0)
        assert 15 < sum(i.output.startswith("wrong") for i in made) < 35

    def test_nobody_else_has_nothing_to_draw(self) -> None:
        [own, *_] = self.people()
        assert controls.volume_matched(own, [own], 0) == []

    def test_volume_matched_items_are_others_with_the_same_outputs(self) -> None:
        everybody = self.people()
        own = everybody[0]
        made = controls.volume_matched(own, everybody, 0)
        assert sorted(i.output for i in made) == sorted(i.output for i in own.train)
        assert all(i.user_id != "u0" for i in made)
        tests = {i.item_id for p in everybody for i in p.test}
        assert not tests & {i.item_id for i in made}

    def test_co_authors_are_never_strangers_nor_a_source(self) -> None:
        everybody = self.people()
        shared = Person("u1", everybody[1].items, (0, *everybody[1].groups[1:]), 9)
        everybody[1] = shared
        assert "u1" not in controls.strangers(everybody, 3, 0)["u0"]
        assert all(i.user_id != "u1" for i in controls.volume_matched(everybody[0], everybody, 0))

    def test_the_nearest_stranger_comes_last(self) -> None:
        everybody = self.people()
        for n in (1, 2):
            everybody[n] = replace(everybody[n], items=tuple(replace(i, output="b") for i in everybody[n].items))
        found = controls.strangers(everybody, 1, 0)
        assert all(user not in others and len(others) == 2 for user, others in found.items())
        assert found["u0"][-1] == "u3"  # the same labels, at the same shares


def test_unequal_choices_are_answered_among_their_own_and_an_unknown_label_is_wrong() -> None:
    own = person(count=10, cut=8)
    offered = [LABELS, LABELS[:2]]
    items = [replace(i, choices=offered[n % 2], output=LABELS[n % 2]) for n, i in enumerate(own.items)]
    items[3] = replace(items[3], output="")
    items[9] = replace(items[9], output="unheard of")
    scores = np.stack([sure("a") + [0.0, 0.0, -np.inf if n % 2 else 0.0] for n in range(10)])
    past = [Past(at, None, np.full(3 - at % 2, 1 / (3 - at % 2)) if at else None, (), "") for at in range(10)]
    made = Table(replace(own, items=tuple(items)), past, scores, scores, {"oppu": scores[8:]}, 1)
    fusion = fit_fusion([made])
    arms = choice_arms([made], [fusion])
    for name, [found] in arms.held.items():
        assert found.shape == (2, 3) and np.isneginf(found[1, 2]) and not np.isnan(found).any(), name
        assert right(items[8:], found, "choice")[1] == 0.0
        assert log_loss(items[8:], found)[1] == 20.0
    assert [LABELS[int(row.argmax())] for row in arms.held["recent"][0]] == ["b", "a"]
    assert macro_f1(items[8:], list(arms.held["none"][0])) == pytest.approx(1 / 3)


def test_what_cannot_be_fitted_stays_as_it_is_built_in() -> None:
    own = table(person(), "a", "b")
    late = replace(own, adapted=99)
    fitted = fit_fusion([late])
    assert (fitted.beside, fitted.share) == (DEFAULT.beside, DEFAULT.share)
    assert fitted.alone != DEFAULT.alone
    assert fit_fusion([replace(late, pasts=[replace(past, count=0) for past in late.pasts])]) == DEFAULT


def test_a_choice_is_normalised_after_a_source_is_added() -> None:
    arms = choice_arms([table(person(), "a", "b")], [FUSION])
    for name in ("prior", "knn", "oppu+prior", "evidence", "fused", "unweighed"):
        for row in arms.held[name][0]:
            np.testing.assert_allclose(row, log_softmax(row), atol=1e-9)


class TestRatings:
    def rated(self, output: str) -> Item:
        return replace(item("u", 0, output=output), choices=("5", "1", "3"))

    def test_the_median_so_far_and_the_mean_squared_error(self) -> None:
        items = tuple(replace(item("u", at, output="135"[at % 3]), choices=("5", "1", "3")) for at in range(9))
        own = Person("u", items, tuple(range(9)), 7)
        past = [Past(at, None, None, (), "") for at in range(9)]
        flat = np.zeros((9, 3))
        arms = choice_arms([Table(own, past, flat, flat, {}, 1)], [FUSION], "rating")
        assert [answer(i, s, "rating") for i, s in zip(own.test, arms.held["median"][0], strict=True)] == ["3", "3"]
        scores = np.log([[0.5, 0.5, 1e-12], [1e-12, 1e-12, 1.0]])
        assert squared_error([self.rated("5"), self.rated("3")], scores) == pytest.approx([4.0, 0.0])

    def test_a_fit_in_order_prefers_what_is_near(self) -> None:
        near, far = np.log([0.1, 0.1, 0.8]), np.log([0.45, 0.45, 0.1])  # of 5, 1, 3
        seen = [Seen({"base": near, "knn": far}, at % 2, 9) for at in range(60)]  # 5 and 1 in turn
        by_log = fit(seen, ("base", "knn"))
        ordered = fit(seen, ("base", "knn"), order=[1, 2, 0])
        share = [float(np.exp(s.scores(seen[0].sources, 9))[2]) for s in (by_log, ordered)]
        assert share[0] < share[1]  # the middle costs half of what the wrong end does

    def test_the_order_of_the_choices_changes_no_fit(self) -> None:
        chance = np.random.default_rng(0)
        said = [np.log(chance.dirichlet(np.ones(3))) for _ in range(80)]
        plain = [Seen({"base": s}, int(s.argmax()), 9) for s in said]
        turned = [Seen({"base": s[[2, 0, 1]]}, [1, 2, 0][int(s.argmax())], 9) for s in said]
        one, other = fit(plain, ("base",), order=[0, 1, 2]), fit(turned, ("base",), order=[1, 2, 0])
        assert one.coefficients["base"] == pytest.approx(other.coefficients["base"], rel=1e-3)


def test_a_ratings_adapter_keeps_its_built_in_share() -> None:
    own = person("u", 40, 30)
    items = tuple(replace(i, output="135"[at % 3], choices=("5", "1", "3")) for at, i in enumerate(own.items))
    flat, told = (
        np.log(np.full((40, 3), 1 / 3)),
        np.log([[0.9 if c == i.output else 0.05 for c in i.choices] for i in items]),
    )
    rated = Table(replace(own, items=items), [Past(at, None, None, (), "") for at in range(40)], flat, told, {}, 1)
    assert fit_fusion([rated], "rating").share == DEFAULT.share != fit_fusion([rated], "choice").share


def test_what_some_user_holds_back_is_not_fitted_on() -> None:
    own, other = person("u", 40, 30, "a"), person("v", 40, 30, "b")
    shared = replace(other, groups=own.groups[30:] + other.groups[10:])  # v's first ten say what u holds back
    tables = [table(own, "a", "b"), table(shared, "a", "b")]
    groups_apart = replace(other, groups=tuple(range(100, 140)))
    apart = [tables[0], table(groups_apart, "a", "b")]
    assert fit_fusion(tables) != fit_fusion(apart)
    short = replace(groups_apart, items=other.items[10:], groups=groups_apart.groups[10:], cut=20)
    rest = apart[1]
    kept = Table(short, rest.pasts[10:], rest.base[10:], rest.follow[10:], {}, 0)
    assert fit_fusion(tables) == fit_fusion([tables[0], kept])
