"""Who is what, and that every planted leak is seen."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from evaluation import controls, splits
from evaluation.corpus import Item, by_user
from evaluation.duplicates import normal, phrases, same_groups
from evaluation.leaks import check
from evaluation.roles import Bounds, reachable, some_users
from evaluation.splits import Fold, Person, clusters, cut_index, make_folds, not_tested
from oppu.errors import ConfigError
from tests.evaluation.world import START, item, people, stacked, vectors

BOUNDS = Bounds(target=20, calibrate=8, folds_below=2, enough_items=1, enough_judges=1)
COUNTS = {f"t{n}": 25 for n in range(4)} | {f"c{n}": 10 for n in range(12)} | {f"s{n}": 3 for n in range(4)}


def folds(items: list[Item], *, final: bool = True) -> list[Fold]:
    return make_folds(items, stacked(items), BOUNDS, final=final)


def only(items: list[Item], *, final: bool = True) -> Fold:
    [fold] = folds(items, final=final)
    return fold


class TestRoles:
    def test_everybody_has_one_role_and_only_small_users_adapt_the_base(self) -> None:
        fold = only(people(COUNTS))
        targets, calibrate = ({p.user_id for p in some} for some in (fold.target, fold.calibrate))
        adapt = {i.user_id for i in fold.adapt}
        assert targets == {"t0", "t1", "t2", "t3"}
        assert calibrate and calibrate < {f"c{n}" for n in range(12)}
        assert not targets & adapt and not calibrate & adapt
        assert targets | calibrate | adapt == set(COUNTS)

    def test_few_targets_are_crossed_each_left_out_once(self) -> None:
        items = people({f"t{n}": 25 for n in range(4)})
        made = make_folds(items, stacked(items), replace(BOUNDS, folds_below=12), final=True)
        assert [p.user_id for fold in made for p in fold.target] == ["t0", "t1", "t2", "t3"]
        for fold in made:
            check(fold, vectors(items))
            assert len({i.user_id for i in fold.adapt}) == 2

    def test_nobody_with_enough_items_is_an_error_that_says_how_many(self) -> None:
        with pytest.raises(ConfigError, match="at least 20 items"):
            folds(people({"a": 5}))

    def test_no_bound_is_advised_that_is_refused(self) -> None:
        for counts, words in (
            ({"a": 4, "b": 2}, "a target needs at least 5 items a user"),
            ({"a": 6, "b": 2, "c": 2, "d": 2}, "--min-target 5 would make 1 of 4 users targets"),
        ):
            with pytest.raises(ConfigError, match=words):
                folds(people(counts))


class TestCut:
    def test_the_last_fifth_is_held_back(self) -> None:
        fold = only(people(COUNTS))
        assert {len(p.test) for p in fold.target} == {5}

    @pytest.mark.parametrize(("days", "cut"), [([0, 1, 2, 3, 4], 4), ([0, 1, 2, 2, 2], 2), ([0, 0, 0, 0, 0, 1], 5)])
    def test_it_falls_on_the_boundary_of_a_day(self, days: list[int], cut: int) -> None:
        assert cut_index([item("u", n, day=day) for n, day in enumerate(days)]) == cut

    def test_until_the_final_run_the_last_fifth_does_not_exist(self) -> None:
        items = people(COUNTS)
        development, final = only(items, final=False), only(items)
        seen = {i.item_id for p in development.target for i in p.items}
        assert not seen & {i.item_id for p in final.target for i in p.test}
        assert {len(p.items) for p in development.target} == {20}

    @pytest.mark.parametrize("targets", [3, 8])
    def test_nor_does_it_exist_where_another_is_the_target(self, targets: int) -> None:
        items = people({f"t{n}": 25 for n in range(targets)} | {"s": 10})
        bounds = replace(BOUNDS, folds_below=12)
        closed = {f"t{n}/pick/{at}" for n in range(targets) for at in range(20, 25)}
        for final in (False, True):
            for fold in make_folds(items, stacked(items), bounds, final=final):
                others = {*fold.adapt, *(i for p in fold.calibrate for i in p.items)}
                asked = {i for p in fold.target for i in p.items}
                left = {i for i in items if i.user_id not in {p.user_id for p in fold.target}}
                assert others == {i for i in left if final or i.item_id not in closed}
                assert final or not {i.item_id for i in asked} & closed


class TestOneSide:
    def test_the_same_article_in_a_test_part_leaves_every_other_part(self) -> None:
        items = people(COUNTS)
        text = next(i for i in items if i.item_id == "t0/pick/24").input
        again = [item("s0", 50, text=text.upper()), item("t1", 2, text=text), item("c0", 50, text=text)]
        fold = only(sorted([*items, *again], key=lambda i: i.day))
        used = [*fold.adapt, *(i for p in fold.calibrate for i in p.items), *(i for p in fold.target for i in p.train)]
        assert text in {i.input for p in fold.target for i in p.test}
        assert text.lower() not in {i.input.lower() for i in used}

    def test_near_duplicates_by_grams_or_by_embedding_are_one_group(self) -> None:
        text = " ".join(f"w{k}" for k in range(40))
        texts = [text, text + " more", " ".join(f"v{k}" for k in range(40)), "short one", "short two"]
        rows = np.eye(5, dtype=np.float32)
        rows[4] = [0, 0, 0, 0.99, 0.141]
        groups = same_groups(texts, rows)
        assert groups[0] == groups[1] and groups[3] == groups[4]
        assert len(set(groups)) == 3

    def test_what_nearly_all_texts_say_makes_no_two_of_them_the_same(self) -> None:
        asked = "Which tag fits this film best? Answer with the tag alone and nothing before or behind it, please:"
        texts = [f"{asked} " + " ".join(f"w{at}x{k}" for k in range(12)) for at in range(60)]
        texts += [f"{texts[0]} and more"]
        found = same_groups(texts, np.eye(len(texts), dtype=np.float32))
        assert len(set(found)) == 60 and found[0] == found[60]

    def test_dividing_and_checking_agree_on_what_many_texts_say(self) -> None:
        cue = " ".join(f"instruction{k}" for k in range(40))
        asked = [i for i in people(dict.fromkeys("abcdefg", 100)) if i.day.day % 10 in (1, 4, 7)]  # over 200 of them
        some = {i.item_id for i in asked}
        items = [
            replace(i, input=f"{i.input} {cue}") if i.item_id in some else i
            for i in people(dict.fromkeys("abcdefg", 100))
        ]
        [fold, *_] = make_folds(items, stacked(items), Bounds(), final=False)
        assert len(some) > 200 and fold.repeats == 0
        check(fold, vectors(items), phrases([i.input for i in items]))
        with pytest.raises(ConfigError, match="near-duplicate"):
            check(fold, vectors(items))  # of the fold's own items fewer have it than make a phrase

    def test_equal_vectors_are_one_group_and_empty_ones_say_nothing(self) -> None:
        rows = np.zeros((6, 4), dtype=np.float32)
        rows[[1, 3, 5], 0] = 1
        found = same_groups([f"text {at}" for at in range(6)], rows)
        assert found == [0, 1, 2, 1, 4, 1]

    def test_a_repeat_within_a_user_is_kept_once_and_across_the_cut_only_behind_it(self) -> None:
        again = [item("t0", at, text="again and again", day=day) for at, day in ((101, 3), (102, 4))]
        across = [item("t1", at, text="once before", day=day) for at, day in ((101, 3), (102, 99))]
        fold = only(sorted([*people(COUNTS), *again, *across], key=lambda i: i.day))
        kept = {i.item_id for p in fold.target for i in p.items if i.input in ("again and again", "once before")}
        assert kept == {"t0/pick/101", "t1/pick/102"}

    def test_sister_tasks_of_the_same_inputs_are_divided_alike(self) -> None:
        one, other = only(people(COUNTS)), only(people(COUNTS, task="title"))
        assert [[i.input for i in p.test] for p in one.target] == [[i.input for i in p.test] for p in other.target]


class TestPlantedLeaks:
    """Each changes a sound fold as a mistake would; ``check`` must say so."""

    def sound(self) -> tuple[Fold, dict[str, np.ndarray]]:
        items = people(COUNTS)
        return only(items), dict(vectors(items))

    def refused(self, fold: Fold, own: dict[str, np.ndarray], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            check(fold, own)

    def test_a_sound_fold_passes(self) -> None:
        fold, own = self.sound()
        check(fold, own)

    def test_a_future_item_in_the_training_part(self) -> None:
        fold, own = self.sound()
        first, *rest = fold.target
        items = list(first.items)
        items[0], items[-1] = replace(items[0], day=items[-1].day + timedelta(days=1)), items[-1]
        leak = replace(fold, target=(replace(first, items=tuple(items)), *rest))
        self.refused(leak, own, "order of time")

    def test_a_cut_within_a_day(self) -> None:
        fold, own = self.sound()
        first, *rest = fold.target
        items = list(first.items)
        items[first.cut] = replace(items[first.cut], day=items[first.cut - 1].day)
        self.refused(replace(fold, target=(replace(first, items=tuple(items)), *rest)), own, "not later")

    def test_near_duplicates_across_the_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(splits, "same_groups", lambda texts, rows, more: list(range(len(texts))))
        items = people(COUNTS)
        own = dict(vectors(items))
        test = next(i for i in items if i.item_id == "t0/pick/24")
        train = next(i for i in items if i.item_id == "t0/pick/1")
        own[train.item_id] = own[test.item_id]
        [fold] = make_folds(items, np.stack([own[i.item_id] for i in items]), BOUNDS, final=True)
        self.refused(fold, own, "near-duplicate")

    def test_a_co_authors_paper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(splits, "same_groups", lambda texts, rows, more: list(range(len(texts))))
        items = people(COUNTS)
        text = next(i for i in items if i.item_id == "t0/pick/24").input
        items = sorted([*items, item("t1", 1, text=text, task="again")], key=lambda i: i.day)
        self.refused(only(items), dict(vectors(items)), "test part")

    def test_the_same_article_in_the_sister_task(self) -> None:
        fold, own = self.sound()
        sister = only(people(COUNTS, task="title"))
        shifted = [replace(p, cut=p.cut - 3) for p in sister.target]
        self.refused(replace(fold, held=frozenset(normal(i.input) for p in shifted for i in p.test)), own, "sister")

    def test_another_users_item(self) -> None:
        fold, own = self.sound()
        first, second, *rest = fold.target
        mixed = replace(first, items=(replace(second.items[0], day=first.items[0].day), *first.items[1:]))
        self.refused(replace(fold, target=(mixed, *rest)), own, "another user's item")

    def test_what_is_asked_for_nearly_as_a_text_without_an_output(self) -> None:
        said = " ".join(f"said{k}" for k in range(12))
        items = people(COUNTS)
        late = next(i for i in items if i.item_id == "t0/pick/24")
        changed = {late.item_id: replace(late, output=said, choices=())}
        written = replace(item("t0", 3, text=f"{said} https://example.org/1", task="again"), output="", choices=())
        items = [changed.get(i.item_id, i) for i in sorted([*items, written], key=lambda i: i.day)]
        fold, own = only(items), dict(vectors(items))
        assert written.item_id not in {i.item_id for p in fold.target for i in p.train}
        check(fold, own)
        first, *rest = fold.target
        leak = replace(first, items=(written, *first.items[4:]), groups=(0, *first.groups[4:]), cut=first.cut - 3)
        self.refused(replace(fold, target=(leak, *rest)), own, "learnt as a text without an output")

    def test_one_output_may_be_near_several_texts(self) -> None:
        said = [f"said{k}" for k in range(16)]
        items = people(COUNTS)
        late = next(i for i in items if i.item_id == "t0/pick/24")
        asked = replace(late, output=" ".join(said), choices=())
        texts = (" ".join([*said[:14], "x", "y"]), " ".join(["u", "v", *said[2:]]))
        bare = [
            replace(item("t0", at, text=text, task="again"), output="", choices=())
            for at, text in zip((3, 5), texts, strict=True)
        ]
        items = sorted([*(asked if i is late else i for i in items), *bare], key=lambda i: i.day)
        fold = only(items)
        assert not {i.item_id for i in bare} & {i.item_id for p in fold.target for i in p.train}
        check(fold, vectors(items))

    def test_calibration_on_adapted_users(self) -> None:
        fold, own = self.sound()
        adapted = next(i for i in fold.adapt)
        person = Person(adapted.user_id, (adapted,), (0,), 1)
        self.refused(replace(fold, calibrate=(*fold.calibrate, person)), own, "base would be adapted")


def test_users_who_share_a_test_item_are_one_cluster() -> None:
    def person(user: str, groups: tuple[int, ...], cut: int) -> Person:
        return Person(user, tuple(item(user, k) for k in range(len(groups))), groups, cut)

    made = clusters([person("a", (1, 2), 1), person("b", (2, 3), 1), person("c", (9, 2), 1), person("d", (2, 8), 1)])
    assert made[0] == made[2] and len({made[0], made[1], made[3]}) == 3


class TestSisterTasks:
    """An article lies on the same side in every task that has it."""

    def tasks(self) -> tuple[list[Item], list[Item]]:
        """The same articles; of t0 a task lacks three late ones, of t1 all but a few."""
        one, other = people(COUNTS), people(COUNTS, task="title")
        other = [i for i in other if not (i.user_id == "t0" and i.day.day in (21, 22, 23))]
        return one, [i for i in other if i.user_id != "t1" or i.day.day < 6]

    def both(self) -> tuple[Fold, Fold]:
        one, other = self.tasks()
        folds = []
        for own, sisters in ((one, other), (other, one)):
            [made] = make_folds(own, stacked(own), BOUNDS, final=True, sisters=sisters)
            check(made, vectors(own))
            folds.append(made)
        return folds[0], folds[1]

    def test_role_and_cut_are_those_of_all_tasks(self) -> None:
        sides: list[dict[str, str]] = []
        for fold in self.both():
            place = {normal(i.input): "adapt" for i in fold.adapt}
            place |= {normal(i.input): "calibrate" for p in fold.calibrate for i in p.items}
            place |= {normal(i.input): "train" for p in fold.target for i in p.train}
            place |= {normal(i.input): "test" for p in fold.target for i in p.test}
            sides.append(place)
        shared = sides[0].keys() & sides[1].keys()
        assert len(shared) > 100
        assert all(sides[0][text] == sides[1][text] for text in shared)

    def test_without_the_sister_the_sides_differ(self) -> None:
        one, other = self.tasks()
        first, second = only(one), only(other)
        tests = {normal(i.input) for p in second.target for i in p.test}
        assert tests & {normal(i.input) for p in first.target for i in p.train}
        assert {p.user_id for p in first.target} > {p.user_id for p in second.target}

    def test_who_is_a_target_elsewhere_adapts_nothing_here(self) -> None:
        _, second = self.both()
        assert "t1" not in {i.user_id for i in second.adapt} | {p.user_id for p in second.target}

    def test_an_article_that_a_sister_task_asks_about_is_not_learnt_by_others(self) -> None:
        one, other = self.tasks()
        asked = next(i for i in one if i.item_id == "t1/pick/24")
        again = replace(item("s0", 90, text=asked.input, task="title"), user_id="s0")
        [fold] = make_folds([*other, again], stacked([*other, again]), BOUNDS, final=True, sisters=one)
        assert normal(asked.input) in fold.held
        assert asked.input not in {i.input for i in fold.adapt}
        check(fold, vectors([*other, again]))


class TestPopulation:
    def test_its_users_are_never_targets_and_all_others_are_or_nothing(self) -> None:
        named = frozenset({"t3", *(f"c{n}" for n in range(6))})
        bounds = replace(BOUNDS, population=named)
        items = people(COUNTS)
        [fold] = make_folds(items, stacked(items), bounds, final=True)
        assert {p.user_id for p in fold.target} == {"t0", "t1", "t2"}
        assert {i.user_id for i in fold.adapt} | {p.user_id for p in fold.calibrate} == named

    def test_alone_it_has_no_target(self) -> None:
        items = people({"a": 30})
        with pytest.raises(ConfigError, match="some user who is not in --population"):
            make_folds(items, stacked(items), replace(BOUNDS, population=frozenset({"a"})), final=True)

    def test_before_the_test_only(self) -> None:
        items = people(COUNTS | {"s9": 40})
        bounds = replace(BOUNDS, before_test=True, target=25)
        bounds = replace(bounds, population=frozenset({u for u in {i.user_id for i in items} if u[0] != "t"}))
        [fold] = make_folds(items, stacked(items), bounds, final=True)
        assert fold.before == min(p.test[0].day for p in fold.target)
        assert fold.adapt and all(i.day < fold.before for i in fold.adapt)
        late = replace(fold, adapt=(*fold.adapt, replace(fold.adapt[0], day=fold.before)))
        with pytest.raises(ConfigError, match="not before the first test"):
            check(late, vectors(items))

    def test_a_population_that_is_all_later_is_an_error(self) -> None:
        items = [*people({"t0": 25}), *(replace(i, day=i.day + timedelta(days=99)) for i in people({"s0": 5}))]
        bounds = replace(BOUNDS, before_test=True)
        with pytest.raises(
            ConfigError, match="--population-before-test: no other user's item is from before 2024-01-21"
        ):
            make_folds(items, stacked(items), bounds, final=True)

    def test_days_that_are_no_dates_precede_nothing(self) -> None:
        items = [replace(i, dated=False) for i in people(COUNTS)]
        bounds = replace(BOUNDS, before_test=True)
        with pytest.raises(ConfigError, match="--population-before-test: expected days in the histories"):
            make_folds(items, stacked(items), bounds, final=True)


class TestQuestionsOnOneThing:
    """A paper may be asked about with other candidates: only the same question again is a repeat."""

    @pytest.mark.parametrize("inside", [True, False])
    def test_other_candidates_are_another_question(self, inside: bool) -> None:
        made = []
        for user in range(4):
            for at in range(30):
                paper = " ".join(f"u{user}paper{at // 5}x{k}" for k in range(40))
                pair = f"work {user} {at}", f"other {user} {at}"
                shown = f"{paper} [1]: {pair[0]} [2]: {pair[1]}" if inside else paper
                one = replace(item(f"t{user}", at, text=shown), choices=("[1]", "[2]") if inside else pair)
                made.append(replace(one, output=one.choices[at % 2]))
        items = sorted([*made, *people({f"c{n}": 10 for n in range(12)})], key=lambda i: i.day)
        fold = only(items)
        # four papers are learnt, each with five pairs; of the fifth's the last is held back, so that the others go
        assert [(p.cut, len(p.items)) for p in fold.target] == [(20, 26)] * 4
        check(fold, vectors(items))

    def test_the_same_answer_beside_other_choices_is_a_repeat(self) -> None:
        items = [
            replace(item("t0", at, text=f"a paper number {at // 2}"), choices=("x", f"other {at}"), output="x")
            for at in range(40)
        ]
        assert len(only(items).target[0].items) == 20

    def test_users_of_a_population_who_have_sister_items_alone_are_nobody_here(self) -> None:
        items = people({f"t{n}": 25 for n in range(3)} | {f"p{n}": 12 for n in range(6)})
        sisters = people({"p9": 12}, task="write")
        bounds = replace(BOUNDS, population=frozenset(f"p{n}" for n in range(10)))
        [fold] = make_folds(items, stacked(items), bounds, final=True, sisters=sisters)
        assert {i.user_id for i in fold.adapt} <= {f"p{n}" for n in range(6)}

    def test_the_same_question_again_is_a_repeat(self) -> None:
        items = [
            replace(item("t0", at, text=f"a paper number {at // 2}"), choices=("x", "y")[:: 1 - 2 * (at % 2)])
            for at in range(40)
        ]
        fold = only([replace(i, output="x") for i in items])
        assert len(fold.target[0].items) == 20


class TestFewUsers:
    def test_one_target_is_one_even_alone(self) -> None:
        fold = only(people({"t0": 25}))
        assert [p.user_id for p in fold.target] == ["t0"] and fold.adapt == () and fold.calibrate == ()

    def test_two_calibrate_each_other(self) -> None:
        made = folds(people({"t0": 25, "t1": 25}))
        [first] = [make_folds(people({"t0": 25, "t1": 25}), stacked(people({"t0": 25, "t1": 25})),
                              replace(BOUNDS, folds_below=12), final=True)]  # fmt: skip
        assert len(made) == 2 and [[p.user_id for p in f.calibrate] for f in first] == [["t1"], ["t0"]]

    @pytest.mark.parametrize(("count", "parts"), [(7, [3, 2, 2]), (9, [3, 2, 2, 2]), (11, [3, 2, 2, 2, 2])])
    def test_more_than_six_are_left_out_in_parts_of_two_at_least(self, count: int, parts: list[int]) -> None:
        items = people({f"t{n:02}": 25 for n in range(count)} | {"c0": 10})
        made = make_folds(items, stacked(items), replace(BOUNDS, folds_below=12), final=True)
        assert [len(fold.target) for fold in made] == parts
        assert all("c0" in {i.user_id for i in fold.adapt} for fold in made)

    @pytest.mark.parametrize(
        ("others", "count"),
        [
            ({"s0": 3, "c1": 25}, 5),  # three items to adapt a base on
            ({f"s{n:02}": 19 for n in range(30)}, 5),  # nobody calibrates
            ({f"c{n:02}": 30 for n in range(30)}, 1),
        ],
    )
    def test_a_few_small_users_are_not_taken_for_a_population(self, others: dict[str, int], count: int) -> None:
        items = people({f"t{n:02}": 60 for n in range(30)} | others)
        made = make_folds(items, stacked(items), Bounds(), final=True)
        assert len(made) == count
        assert all(len(fold.adapt) >= 200 and len(fold.calibrate) >= 3 for fold in made)

    @pytest.mark.parametrize("strict", [True, False])
    def test_a_population_of_short_histories_calibrates_nevertheless(self, strict: bool) -> None:
        items = people({f"t{n}": 25 for n in range(9)} | {f"p{n:02}": 12 for n in range(20)})
        bounds = replace(BOUNDS, calibrate=20, population=frozenset(f"p{n:02}" for n in range(20)), strict=strict)
        [fold] = make_folds(items, stacked(items), bounds, final=True)
        assert len(fold.target) == 9 and (len(fold.calibrate) > 3) != strict

    def test_many_targets_and_nobody_else_are_crossed_in_five(self) -> None:
        made = folds(people({f"t{n:02}": 20 for n in range(12)}))
        assert [fold.name for fold in made] == [f"fold-{k}" for k in range(5)]
        assert sorted(p.user_id for fold in made for p in fold.target) == [f"t{n:02}" for n in range(12)]
        for fold in made:
            roles = [{p.user_id for p in fold.target}, {p.user_id for p in fold.calibrate}]
            roles.append({i.user_id for i in fold.adapt})
            assert sum(map(len, roles)) == 12 == len(set.union(*roles))

    def test_names_of_folders_are_plain(self) -> None:
        made = make_folds(
            people({"a/../b": 25, "c": 25}), stacked(people({"a/../b": 25, "c": 25})), Bounds(20, 8), final=True
        )
        assert all(fold.name.replace("-", "").isalnum() for fold in made)

    def test_who_did_all_in_a_day_is_no_target(self) -> None:
        day = [replace(i, day=START) for i in people({"t0": 25})]
        assert {p.user_id for p in only([*day, *people({"t1": 25, "s0": 5})]).target} == {"t1"}
        with pytest.raises(ConfigError, match="no target has items on both sides"):
            folds(day)


def test_a_first_look_takes_some_users_and_leaves_nobody_elses_role_changed() -> None:
    counts = {f"t{n:02}": 25 for n in range(20)} | {f"c{n:02}": 10 for n in range(30)} | {f"s{n}": 3 for n in range(9)}
    items, bounds = people(counts), replace(BOUNDS, folds_below=12)
    some = some_users(items, bounds, users=4, adapt_items=60)
    assert [i for i in items if i in some] == some
    [whole], [part] = (make_folds(part, stacked(part), bounds, final=True) for part in (items, some))
    assert [p.user_id for p in part.target] == [p.user_id for p in whole.target][:12]
    assert [p.user_id for p in part.calibrate] == [p.user_id for p in whole.calibrate][:4]
    assert 60 <= len(part.adapt) < 70 and set(part.adapt) < set(whole.adapt)


def test_items_without_an_output_are_trained_on_and_never_asked_about() -> None:
    items = [replace(i, output="" if i.day.day % 2 else i.output) for i in people(COUNTS)]
    fold = only(items)
    assert all(not i.bare for p in fold.target for i in p.test)
    assert any(i.bare for p in fold.target for i in p.train)


def test_a_label_that_is_no_choice_is_asked_about_and_never_learnt() -> None:
    items = [replace(i, output="new") if i.day.day in (3, 24) else i for i in people(COUNTS)]
    fold = only(items)
    assert any(i.output == "new" for p in fold.target for i in p.test)
    used = [*fold.adapt, *(i for p in fold.calibrate for i in p.items), *(i for p in fold.target for i in p.train)]
    assert all(i.output != "new" for i in used)


@pytest.mark.parametrize("final", [False, True])
def test_labels_are_learnt_outside_of_test_parts_only(final: bool) -> None:
    items = people(COUNTS)
    learnable = {i.item_id for i in not_tested(items, (), BOUNDS, final=final)}
    fold = only(items, final=final)
    assert not learnable & {i.item_id for p in fold.target for i in p.test}
    assert learnable == {i.item_id for i in fold.adapt} | {
        i.item_id for p in (*fold.target, *fold.calibrate) for i in p.train
    }


def test_the_layouts_own_queries_are_the_test_part() -> None:
    items = [replace(i, query=int(i.item_id.rpartition("/")[2]) >= 22) for i in people(COUNTS)]
    assert {len(p.test) for p in only(items).target} == {3}
    assert {(len(p.train), len(p.test)) for p in only(items, final=False).target} == {(17, 5)}


def test_word_sequences_across_the_cut_are_seen_without_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "same_groups", lambda texts, rows, more: list(range(len(texts))))
    items = people(COUNTS)
    text = next(i for i in items if i.item_id == "t0/pick/24").input
    items = sorted([*items, item("t1", 1, text=text + " and more", task="again")], key=lambda i: i.day)
    with pytest.raises(ConfigError, match="near-duplicate"):
        check(only(items), vectors(items))


class TestSharedThings:
    """Everybody acts on the same fifty things, each in an order of his own."""

    def made(self) -> tuple[list[Item], Fold]:
        chance = np.random.default_rng(0)
        items = [
            item(f"t{user}", at, text=" ".join(f"thing{thing}x{k}" for k in range(12)))
            for user in range(12)
            for at, thing in enumerate(chance.permutation(50)[:40])
        ]
        items += [item(f"s{user}", at) for user in range(4) for at in range(10)]
        items = sorted(items, key=lambda i: i.day)
        return items, only(items)

    def test_what_others_are_asked_about_may_be_learnt_and_what_oneself_is_not(self) -> None:
        items, fold = self.made()
        assert fold.shared and fold.lost > 0.5
        assert [(p.cut, len(p.items)) for p in fold.target] == [(32, 40)] * 12
        asked = {group for p in fold.target for group in p.groups[p.cut :]}
        assert any(asked & set(p.groups[: p.cut]) for p in fold.target)
        assert all(not set(p.groups[: p.cut]) & set(p.groups[p.cut :]) for p in fold.target)
        assert not {normal(i.input) for i in fold.adapt} & {normal(i.input) for p in fold.target for i in p.test}
        check(fold, vectors(items))

    def test_ones_own_repeat_is_still_seen(self) -> None:
        items, fold = self.made()
        own = dict(vectors(items))
        first, *rest = fold.target
        repeated = replace(first.items[0], input=first.items[-1].input)
        own[repeated.item_id] = own[first.items[-1].item_id]
        leak = replace(first, items=(repeated, *first.items[1:]))
        with pytest.raises(ConfigError, match="his training part"):
            check(replace(fold, target=(leak, *rest)), own)

    def test_so_are_things_that_would_leave_nothing_to_adapt_a_base_on(self) -> None:
        chance = np.random.default_rng(0)
        drawn = {user: chance.permutation(150)[:60] for user in range(30)}
        items = [
            item(f"t{user}", at, text=" ".join(f"thing{thing}x{k}" for k in range(12)))
            for user, things in drawn.items()
            for at, thing in enumerate(things)
        ]
        items = sorted(items, key=lambda i: i.day)
        made = make_folds(items, stacked(items), Bounds(), final=True)
        assert all(fold.shared for fold in made) and min(len(fold.adapt) for fold in made) > 250
        for fold in made:
            assert len(fold.calibrate) == 6 and min(len(p.items) for p in fold.calibrate) > 8
            chosen = {normal(i.input) for p in fold.calibrate for i in p.items}
            asked = {normal(i.input) for p in fold.target for i in p.test}
            assert not (asked | chosen) & {normal(i.input) for i in fold.adapt}
            check(fold, vectors(items))

    def test_where_all_do_the_same_in_the_same_order_the_base_has_half_of_it(self) -> None:
        items = people({f"t{n:02}": 40 for n in range(14)})
        items = [replace(i, input=f"thing {i.day} " * 6) for i in items]
        made = make_folds(items, stacked(items), Bounds(target=40), final=True)
        for fold in made:
            adapting = {normal(i.input) for i in fold.adapt}
            chosen = {normal(i.input) for p in fold.calibrate for i in p.items}
            assert fold.shared and (len(adapting), len(chosen)) == (16, 16)
            check(fold, vectors(items))

    def test_it_is_every_second_of_what_calibrate_users_have_in_common_with_others(self) -> None:
        items = people({"t0": 25, "t1": 25})
        for at in range(14):
            items.append(item("c11", at))  # one who adapts the base does something of his own before each of them
            thing = " ".join(f"thing{at}x{k}" for k in range(12))
            items += [item(f"c{n}", at, text=thing) for n in range(10)]
        items = sorted(items, key=lambda i: i.day)
        [fold] = make_folds(items, stacked(items), BOUNDS, final=True)
        chosen = {normal(i.input) for p in fold.calibrate for i in p.items}
        common = {normal(i.input) for i in fold.adapt if i.user_id != "c11"}
        assert fold.shared and (len(chosen), len(common)) == (7, 7) and not chosen & common
        check(fold, vectors(items))

    def test_controls_leave_out_what_is_asked_about(self) -> None:
        _, fold = self.made()
        first = fold.target[0]
        asked = {i.input for i in first.test}
        drawn = controls.volume_matched(first, fold.target, 0)
        assert len(drawn) == first.cut and not asked & {i.input for i in drawn}
        every = {i.input for p in fold.target for i in p.test}
        assert not every & {i.input for p in fold.target for i in controls.not_asked(p, fold.target)}


@pytest.mark.parametrize(
    ("counts", "bound"),
    [
        ([60] * 12, 50),  # enough reach it
        ([50, *[49] * 20], 49),  # one alone says little
        ([700, *[15] * 30], 15),
        ([30, 25, 21], 21),
        ([300] * 6, 50),
        ([9, 8, 7, 6], 8),
        ([3, 2], 5),
    ],
)
def test_the_bound_is_lowered_until_there_are_targets_enough(counts: list[int], bound: int) -> None:
    made = by_user(people({f"u{n:02}": count for n, count in enumerate(counts)}))
    assert reachable(made, Bounds(strict=False)).target == bound
    assert reachable(made, Bounds(strict=True)).target == 50


def test_where_few_items_have_an_answer_a_fifth_of_those_is_held_back() -> None:
    items = [replace(item("u", at), output="" if at < 30 else "a") for at in range(40)]
    assert (cut_index(items), cut_index(items, answered=True)) == (32, 38)
    late = [replace(i, output="" if at < 34 else "a") for at, i in enumerate(items)]
    made = [*late, *people({f"s{n}": 6 for n in range(4)})]
    for final, asked in ((True, 6), (False, 1)):
        [fold] = make_folds(made, stacked(made), replace(BOUNDS, folds_below=1), final=final)
        assert [len(p.test) for p in fold.target] == [asked]


def test_what_is_asked_for_is_not_learnt_as_a_text_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    items = people(COUNTS)
    asked = next(i for i in items if i.item_id == "t0/pick/24")
    told = replace(asked, output="my own words", choices=())
    text = replace(item("t0", 30, text="My own  words", day=3), output="", choices=())
    items = sorted([*(told if i is asked else i for i in items), text], key=lambda i: i.day)
    fold = only(items)
    assert "my own words" in {i.output for p in fold.target for i in p.test}
    assert not any(i.bare for p in fold.target for i in p.train)
    monkeypatch.setattr(splits, "_grouped", lambda items, rows: {i.item_id: at for at, i in enumerate(items)})
    with pytest.raises(ConfigError, match="as a text without an output"):
        check(only(items), dict(vectors(items)))
