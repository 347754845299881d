"""The prompt's parts, their order, and what is cut when there is too much."""

from hypothesis import given, settings
from hypothesis import strategies as st

from oppu.lm.port import Row
from oppu.lm.prompts import Kept, Prompts, _texts
from oppu.tasks import Task

TASK = Task("t", "choice", "article: {input}", "category:", ("a", "b"))


def words(known: list[str]) -> Prompts:
    """Prompts over a tokenizer of words (no newline token): ids index ``known``."""

    def encode(texts: list[str]) -> list[list[int]]:
        rows = []
        for text in texts:
            row = []
            for word in text.replace(":", " : ").split():
                if word not in known:
                    known.append(word)
                row.append(known.index(word))
            rows.append(row)
        return rows

    return Prompts(encode, start=(0,), end=1)


def build(row: Row, limit: int = 1_000, task: Task = TASK) -> str:
    known = ["[S]", "[E]"]
    ids = words(known).build([row], [task], [limit])[0]
    assert len(ids) <= limit
    return " ".join(known[i] for i in ids)


def test_parts_in_order() -> None:
    row = Row("t", "the query", evidence=(("one", "a"), ("two", "b")), profile="likes a")
    assert build(row) == (
        "[S] likes a [E] article : one category : a [E] article : two category : b [E] article : the query category :"
    )


def test_whole_pairs_are_dropped_last_first() -> None:
    row = Row("t", "the query", evidence=(("one", "a"), ("two", "b")))
    whole = build(row)
    assert build(row, limit=len(whole.split()) - 1) == (
        "[S] article : one category : a [E] article : the query category :"
    )


def test_the_last_pair_is_cut_in_its_input() -> None:
    row = Row("t", "the query", evidence=((" ".join("x" * 20), "a"),))
    assert build(row, limit=7 + 16) == (
        f"[S] article : {' '.join('x' * 10)} category : a [E] article : the query category :"
    )
    assert build(row, limit=7 + 12) == "[S] article : the query category :"


def test_profile_goes_after_the_evidence_and_before_the_query() -> None:
    row = Row("t", "the query", evidence=(("one", "a"),), profile="p q r s")
    assert build(row, limit=10) == "[S] p q [E] article : the query category :"
    assert build(row, limit=8) == "[S] article : the query category :"


def kept(row: Row, limit: int) -> Kept:
    prompts = words(["[S]", "[E]"])
    return prompts.kept([row], [TASK], prompts.build([row], [TASK], [limit]))[0]


def test_what_was_cut_is_told_from_what_was_kept() -> None:
    row = Row("t", "the query", evidence=(("one", "a"), ("two", "b")), profile="likes a")
    assert [kept(row, limit) for limit in (24, 23, 17, 16, 9, 8, 7, 4)] == [
        Kept(2, True),
        Kept(1, True),
        Kept(1, True),
        Kept(0, True),
        Kept(0, True),
        Kept(0, False),
        Kept(0, False),
        Kept(0, False),
    ]
    long = Row("t", "the query", evidence=((" ".join("x" * 20), "a"), ("two", "b")))
    assert (kept(long, 7 + 16), kept(long, 7 + 12)) == (Kept(1), Kept(0))
    assert kept(Row("t", "q"), 100) == Kept()


@given(
    st.lists(st.tuples(st.text("xy ", max_size=30), st.sampled_from(["", "a", "b b"])), max_size=5),
    st.text("pq ", max_size=20),
    st.text("qr ", max_size=60),
    st.integers(1, 80),
)
@settings(max_examples=150, deadline=None)
def test_a_prompt_is_built_the_same_again_with_just_its_own_room(
    evidence: list[tuple[str, str]], profile: str, text: str, limit: int
) -> None:
    row, prompts = Row("t", text, evidence=tuple(evidence), profile=profile), words(["[S]", "[E]"])
    [built] = prompts.build([row], [TASK], [limit])
    assert prompts.build([row], [TASK], [len(built)]) == [built]
    of_all = prompts.kept([Row("t", "q"), row], [TASK, TASK], [(), built])
    assert of_all[0] == Kept()
    assert prompts._one(row, prompts._template(TASK), prompts.continuations(_texts(row)), limit) == (built, of_all[1])


def test_an_item_without_an_output_stands_as_it_is() -> None:
    row = Row("t", "q", evidence=(("one two", " "), ("three", "b")))
    assert build(row) == "[S] one two [E] article : three category : b [E] article : q category :"
    long = Row("t", "q", evidence=((" ".join(f"w{k}" for k in range(20)), ""),))
    assert build(long, limit=16) == "[S] w0 w1 w2 w3 w4 w5 w6 w7 w8 [E] article : q category :"


def test_query_is_cut_at_its_inputs_end_and_keeps_the_cue() -> None:
    row = Row("t", "q1 q2 q3 q4 q5", evidence=(("one", "a"),), profile="p")
    assert build(row, limit=8) == "[S] article : q1 q2 q3 category :"
    assert build(row, limit=3) == ": category :"


def test_braces_and_blank_texts_are_harmless() -> None:
    assert build(Row("t", "{input} {x}")) == "[S] article : {input} {x} category :"
    assert build(Row("t", "  \n")) == "[S] article : category :"
    tail = Task("t", "text", "say {input} again", "so:")
    assert build(Row("t", "hey"), task=tail) == "[S] say hey again so :"


def test_continuations_tokenize_each_text_once_and_without_the_anchor() -> None:
    known = ["[S]", "[E]"]
    found = words(known).continuations(["a b", "a b", "", ": a"])
    assert {text: [known[i] for i in ids] for text, ids in found.items()} == {
        "a b": ["a", "b"],
        "": [],
        ": a": [":", "a"],
    }


@given(
    st.lists(st.tuples(st.text("xy ", max_size=30), st.text("ab", max_size=3)), max_size=5),
    st.text("pq ", max_size=20),
    st.text("qr ", max_size=60),
    st.integers(32, 80),
)
@settings(max_examples=150, deadline=None)
def test_never_over_the_limit_and_the_query_is_whole_where_it_fits(
    evidence: list[tuple[str, str]], profile: str, text: str, limit: int
) -> None:
    built = build(Row("t", text, evidence=tuple(evidence), profile=profile), limit)
    query = " ".join(["article :", *text.split(), "category :"])
    if len(query.split()) + 1 <= limit:
        assert built.endswith(query)
    assert built.endswith("category :")
