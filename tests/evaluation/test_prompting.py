"""What stands in the prompts of each variant, and how much recent history fits."""

from dataclasses import replace

import pytest

from evaluation.history import Past, pasts
from evaluation.prompting import VARIANTS, Asked, Recent, Variant, answer_tokens, drawn, example, recent_history
from oppu.lm.base import prompts_of
from oppu.lm.prompts import Prompts
from oppu.settings import RetrieverSettings
from oppu.tasks import Task
from tests.evaluation.world import EMBEDDER, LABELS, item
from tests.oppu.lm.conftest import byte_tokenizer

PAIRS = tuple((f"in{n}", LABELS[n % 3]) for n in range(4))
PAST = Past(4, None, None, PAIRS, "likes a")
PICK = Task("pick", "choice", "{input}", "is:", LABELS)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return prompts_of(byte_tokenizer())


def test_a_prompt_holds_what_is_asked_for() -> None:
    assert example(item("u", 0), PAST, Asked(2)).evidence == PAIRS[:2]
    assert example(item("u", 0), PAST, Asked(1, profile=True)).profile == "likes a"
    plain = example(item("u", 0), PAST)
    assert (plain.evidence, plain.profile) == ((), "")


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_each_example_of_a_variant_has_one_of_its_kinds_drawn_by_item(variant: Variant) -> None:
    items = [item("u", n) for n in range(60)]
    made = drawn(items, [PAST] * 60, variant, 0)
    kinds = {(len(e.evidence), bool(e.profile)) for e in made}
    assert kinds == {(asked.k, asked.profile) for asked in VARIANTS[variant]}
    alone = drawn(items[7:8], [PAST], variant, 0)
    assert alone == made[7:8]  # neither order nor company matters
    if len(kinds) > 1:
        assert drawn(items, [PAST] * 60, variant, 1) != made


def recent(prompts: Prompts, limit: int, days: list[int] | None = None) -> Recent:
    items = [item("u", n, text=f"text {n}", day=None if days is None else days[n]) for n in range(12)]
    vectors = dict(zip((i.item_id for i in items), EMBEDDER.embed([i.input for i in items]), strict=True))
    found = pasts(items, vectors, EMBEDDER, RetrieverSettings())
    return recent_history(items, found, 9, prompts, PICK, limit)


def test_all_history_fits_a_long_prompt_newest_first(prompts: Prompts) -> None:
    found = recent(prompts, 10_000)
    assert (found.offered, found.kept) == (9 + 10 + 11, 9 + 10 + 11)
    assert [text for text, _ in found.examples[0].evidence] == [f"text {n}" for n in range(8, -1, -1)]


def test_items_of_the_querys_day_are_not_its_history(prompts: Prompts) -> None:
    found = recent(prompts, 10_000, days=[*range(9), 9, 9, 9])
    assert [len(e.evidence) for e in found.examples] == [9, 9, 9]


def test_an_answer_takes_as_much_room_as_the_longest_label(prompts: Prompts) -> None:
    assert answer_tokens([item("u", 0)], prompts, PICK) == 2  # a space and a letter
    write = Task("write", "text", "{input}", "is:", max_new_tokens=9)
    assert answer_tokens([replace(item("u", 0), choices=())], prompts, write) == 9


@pytest.mark.parametrize("limit", [64, 100, 120, 150])
def test_what_is_offered_fits_whole(prompts: Prompts, limit: int) -> None:
    found = recent(prompts, limit)
    assert found.kept < found.offered
    for one in found.examples:
        free, bound = (prompts.build([one], [PICK], [room])[0] for room in (10_000, limit))
        assert free == bound and one.evidence
