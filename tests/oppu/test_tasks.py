"""The packaged tasks, and what is said of faulty task files."""

from pathlib import Path

import pytest

from oppu.errors import ConfigError, InvalidRecord, Reason
from oppu.tasks import Task, load_tasks

LAMP = {
    "citation": ("choice", 2),
    "movie_tagging": ("choice", 15),
    "news_categorize": ("choice", 29),
    "product_rating": ("rating", 5),
    "news_headline": ("text", 0),
    "scholarly_title": ("text", 0),
    "tweet_paraphrase": ("text", 0),
}
GOOD = 'name = "mine"\nkind = "choice"\nprompt = "q: {input}"\nanswer = "a:"\nlabels = ["x", "y"]\n'


def test_the_seven_packaged_tasks() -> None:
    tasks = load_tasks()
    assert {name: (task.kind, len(task.labels)) for name, task in tasks.items()} == LAMP
    assert all(task.description and "{input}" in task.prompt for task in tasks.values())
    news = tasks["news_categorize"]
    assert (news.prompt, news.answer) == ("article: {input}", "category:")
    assert list(news.labels) == sorted(news.labels)
    assert tasks["citation"].labels == ("[1]", "[2]")


def test_a_folder_adds_and_replaces(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    (tmp_path / "citation.toml").write_text(GOOD.replace("mine", "citation"))
    tasks = load_tasks(tmp_path)
    assert len(tasks) == 8
    assert tasks["citation"].labels == tasks["mine"].labels == ("x", "y")


def test_every_fault_of_every_file_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "a"\nkind = "song"\nprompt = "no slot"\nwhat = 1\n')
    (tmp_path / "b.toml").write_text("name = ")
    (tmp_path / "c.toml").write_text(GOOD.replace("choice", "rating") + "max_new_tokens = 0\nbare_history = 1\n")
    (tmp_path / "d.toml").write_text(GOOD.replace('["x", "y"]', '["x"]'))
    with pytest.raises(ConfigError) as caught:
        load_tasks(tmp_path)
    told = "\n".join(caught.value.problems)
    for part in (
        "a.toml: unknown field what",
        "a.toml: answer",
        "a.toml: kind",
        "a.toml: prompt",
        "b.toml",
        "c.toml: labels: a rating task",
        "c.toml: max_new_tokens",
        "c.toml: bare_history",
        "d.toml: labels: expected at least two",
    ):
        assert part in told
    with pytest.raises(ConfigError, match="no such folder"):
        load_tasks(tmp_path / "none")


def test_allowed_outputs(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD.replace('labels = ["x", "y"]', ""))
    tasks = load_tasks(tmp_path)
    assert tasks["news_headline"].allowed(("x",)) == ()
    assert tasks["citation"].allowed(None) == ("[1]", "[2]")
    assert tasks["mine"].allowed(("p", "q")) == ("p", "q")
    tasks["mine"].check_output("p", ("p", "q"))
    for call, reason in (
        (lambda: tasks["mine"].allowed(None), Reason.INVALID_RECORD),
        (lambda: tasks["mine"].check_output("z", ("p", "q")), Reason.UNKNOWN_LABEL),
        (lambda: tasks.require("nothing"), Reason.UNKNOWN_TASK),
    ):
        with pytest.raises(InvalidRecord) as caught:
            call()
        assert caught.value.reason == reason
        assert "p, q" not in caught.value.message  # a record's own choices are its user's text


@pytest.mark.parametrize("output", ["", " \t"])
def test_a_blank_output_is_for_tasks_with_bare_histories(output: str) -> None:
    Task("tweet", "text", "{input}", "is", bare_history=True).check_output(output, None)
    for task in (Task("write", "text", "{input}", "is"), Task("label", "choice", "{input}", "is", labels=("a", "b"))):
        with pytest.raises(InvalidRecord, match="output: expected text that is not blank") as caught:
            task.check_output(output, None)
        assert caught.value.reason is Reason.INVALID_RECORD
