"""A first look: small, and on the sides where the whole fold has everything."""

from evaluation.quick import ADAPT_CHARACTERS, LEAST_ITEMS, MOST_ITEMS, shortened
from evaluation.splits import Fold, Person
from tests.evaluation.world import item


def person(user: str, count: int, cut: int, text: str = "word") -> Person:
    items = tuple(item(user, at, text=f"{text} {at}") for at in range(count))
    return Person(user, items, tuple(range(count)), cut)


def cut(*target: Person, calibrate: tuple[Person, ...] = (), adapt: str = "x") -> Fold:
    learnt = tuple(item("a", at, text=adapt) for at in range(3000))
    return shortened(Fold("all", learnt, calibrate, target), 2)


def test_short_histories_stay_whole_and_the_first_users_are_kept() -> None:
    people = [person(f"t{n}", 50, 40) for n in range(4)]
    made = cut(*people, calibrate=tuple(people[::-1]))
    assert made.target == tuple(people[:2]) and made.calibrate == tuple(people[:1:-1])


def test_items_around_the_cut_are_kept_on_their_sides() -> None:
    whole = person("t", 1000, 800)
    [made] = cut(whole).target
    assert made.train == whole.train[-80:] and made.test == whole.test[:20]
    assert [whole.items[group] for group in made.groups] == list(made.items)
    [few] = cut(person("t", 300, 30)).target
    assert (few.cut, len(few.items)) == (30, MOST_ITEMS)
    [long] = cut(person("t", 1000, 990, text="long " * 1000)).target
    assert (len(long.items), len(long.test)) == (LEAST_ITEMS, 10)


def test_what_adapts_the_base_is_bounded_by_items_and_by_characters() -> None:
    assert len(cut(adapt="x").adapt) == 1500
    assert len(cut(adapt="x" * 1000).adapt) == ADAPT_CHARACTERS // 1000
    assert len(cut(adapt="x" * 2 * ADAPT_CHARACTERS).adapt) == 1
