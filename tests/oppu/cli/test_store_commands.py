"""Commands on a store that has users and adapters: what they print, what they refuse, what they change."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oppu.cli import clients
from oppu.lm.fake import TENSOR
from oppu.wire import BehaviorEvent
from tests.oppu.cli.conftest import Run
from tests.updater.world import World


def test_history(run: Run, world: World) -> None:
    lines = run("history", "ada", "--limit", "99", "--json").lines
    assert [line["seq"] for line in lines] == list(range(1, 24))
    assert {line["output"] for line in lines} == {"glad", "sad"}
    assert [line["seq"] for line in run("history", "ada", "--limit", "2", "--json").lines] == [22, 23]
    assert run("history", "ada", "--task", "title").out == ""
    text = run("history", "bob").out.splitlines()
    assert len(text) == 3 and text[0].endswith("mood  input 24  →  glad")


class Sent(list[BehaviorEvent]):
    """Stands where the application's client would, and keeps what is sent."""

    def send_events(self, events: list[BehaviorEvent]) -> None:
        """Keep them."""
        self.extend(events)


def test_what_history_prints_can_be_produced(run: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent()

    @contextmanager
    def client(_session: object, *, listen: bool) -> Iterator[Sent]:
        assert not listen
        yield sent

    monkeypatch.setattr(clients, "client", client)
    printed = run("history", "ada", "--limit", "99", "--json")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(printed.out.encode())))
    done = run("produce", "-")
    assert (done.code, done.err) == (0, "")
    ada = world.ref("ada", 0).user_id
    stored = world.store.events({ada: 0}, embedder="", limit=99)[ada]
    assert [(e.event_id, e.user_id, e.occurred_at, e.input, e.output) for e in sent] == [
        (e.event_id, e.user_id, e.occurred_at, e.input, e.output) for e in stored
    ]


def test_times_are_printed_as_the_contracts_have_them(run: Run, world: World) -> None:
    found = {line["occurred_at"][10] + line["occurred_at"][-6:] for line in run("history", "bob", "--json").lines}
    assert found == {"T+00:00"}


def test_user(run: Run, world: World) -> None:
    assert [line["user_id"] for line in run("user", "--json").lines] == ["ada", "bob"]
    assert [line["user_id"] for line in run("user", "--after", "ada", "--json").lines] == ["bob"]
    state, adapter = run("user", "ada", "--json").lines
    assert (state["events"], state["epoch"]) == (23, 1)
    assert state["hash"] == world.hash(world.ref("ada", 0).user_id)
    assert (adapter["base"], adapter["version"], adapter["state"]) == ("fake-base", 2, "free")
    assert "events: 23" in run("user", "ada").out


def test_profile(run: Run, world: World) -> None:
    [found] = run("profile", "ada", "--task", "mood", "--json").lines
    assert set(found["prior"]) == {"glad", "sad"}
    assert found["prior"]["glad"] > found["prior"]["sad"] > 0
    assert found["version"] in run("profile", "ada", "--task", "mood").out


def test_profile_in_an_unknown_task(run: Run, world: World) -> None:
    done = run("profile", "ada", "--task", "fishing")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("oppu: --task: expected one of ") and done.err.endswith(", got fishing\n")


@pytest.mark.parametrize(
    "command",
    [
        ["history", "eve"],
        ["user", "eve"],
        ["profile", "eve", "--task", "mood"],
        ["adapters", "show", "eve"],
        ["adapters", "rollback", "eve"],
        ["adapters", "release", "eve"],
        ["adapters", "export", "eve", "out"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_unknown_user(run: Run, world: World, command: list[str]) -> None:
    done = run(*command)
    assert (done.code, done.err) == (2, "oppu: USER_ID: no such user: eve\n")


def test_adapters_are_listed_and_shown(run: Run, world: World) -> None:
    [ada] = run("adapters", "list", "--json").lines
    assert {name: ada[name] for name in ("user_id", "version", "parent", "events")} == {
        "user_id": "ada", "version": 2, "parent": 1, "events": 23,
    }  # fmt: skip
    status, *rest = run("adapters", "show", "ada", "--json").lines
    assert status == ada
    assert [(line["version"], line["parent"]) for line in rest if "parent" in line] == [(1, None), (2, 1)]
    assert [line["outcome"] for line in rest if "outcome" in line] == ["published", "published"]
    assert "version 2 from 1" in run("adapters", "show", "ada").out


def test_roll_back_and_release(run: Run, world: World) -> None:
    assert run("adapters", "rollback", "ada", "--reason", "worse", "--json").lines == [{"version": 1}]
    head = world.head("ada")
    assert head is not None and head.version == 1
    [shown] = run("adapters", "list", "--json").lines
    assert (shown["version"], shown["state"]) == (1, "held")
    assert world.log("ada")[0] == ("rolled_back", "worse")
    assert run("adapters", "release", "ada").code == 0
    assert run("adapters", "list", "--json").lines[0]["state"] == "free"
    assert run("adapters", "rollback", "ada", "--none").code == 0
    assert world.head("ada") is None
    assert "has no adapter" in run("adapters", "rollback", "ada").err


def test_a_rollback_to_no_adapter_can_be_undone(run: Run, world: World) -> None:
    assert run("adapters", "rollback", "ada").out == "serving version 1, after version 2\n"
    assert run("adapters", "rollback", "ada").out == "serving no adapter, after version 1\n"
    refused = run("adapters", "rollback", "ada")
    assert (refused.code, "ada has no adapter" in refused.err, "--to" in refused.err) == (2, True, True)
    assert run("adapters", "rollback", "ada", "--to", "1").out == "serving version 1, after no adapter\n"
    head = world.head("ada")
    assert head is not None and (head.version, head.parent) == (1, None)
    assert run("adapters", "rollback", "ada", "--none", "--json").lines == [{"version": None}]
    assert run("adapters", "rollback", "ada", "--none").out == "serving no adapter, after no adapter\n"
    assert run("adapters", "rollback", "bob", "--to", "1").code == 2, "bob never had one"


@pytest.mark.parametrize("answer", ["n", "", None], ids=["no", "by default", "nobody there"])
def test_erase_asks_first(run: Run, world: World, monkeypatch: pytest.MonkeyPatch, answer: str | None) -> None:
    def prompt(_text: str) -> str:
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("click.termui.visible_prompt_func", prompt)
    done = run("erase", "ada")
    assert (done.code, done.err) == (1, "oppu: not erased (use --yes)\n")
    assert world.head("ada") is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--to", "9"], "9"),
        (["--to", "1", "--none"], "--to and --none"),
        (["--base", "another"], "--base: expected one of fake-base, got another"),
        (["--to", "0"], "--to"),
    ],
)
def test_roll_back_refuses(run: Run, world: World, options: list[str], named: str) -> None:
    done = run("adapters", "rollback", "ada", *options)
    assert done.code == 2 and named in done.err
    head = world.head("ada")
    assert head is not None and head.version == 2


def test_roll_back_to_a_version_whose_files_are_gone(run: Run, world: World, tmp_path: Path) -> None:
    [weights] = [p for p in (tmp_path / "adapters").rglob("*.safetensors") if p.parent.name.lstrip("0") in ("1", "v1")]
    weights.unlink()
    done = run("adapters", "rollback", "ada")
    assert done.code == 2, done.err
    head = world.head("ada")
    assert head is not None and head.version == 2


def test_export(run: Run, world: World, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    assert run("adapters", "export", "ada", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == world.model.adapter_config()
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == {TENSOR}
    assert run("adapters", "export", "ada", tmp_path / "old", "--version", "1").code == 0
    done = run("adapters", "export", "ada", tmp_path / "new", "--version", "7")
    assert (done.code, done.err.startswith("oppu: --version: version 7 cannot be read")) == (2, True)
    assert not (tmp_path / "new").exists()
    assert run("adapters", "export", "ada", tmp_path / "out").code == 2  # it has files
    assert run("adapters", "export", "bob", tmp_path / "bob").code == 2


def test_bases_must_be_named_where_there_are_several(run: Run, world: World) -> None:
    from oppu.values import BaseId

    world.store.register_base(BaseId("second"))
    done = run("adapters", "list")
    assert done.code == 2 and "the store knows 2 bases: fake-base, second" in done.err
    assert len(run("adapters", "list", "--base", "fake-base", "--json").lines) == 1
    assert run("adapters", "list", "--base", "second").out == ""


def test_store_info(run: Run, world: World) -> None:
    [counts] = run("store", "info", "--json").lines
    assert {name: counts[name] for name in ("users", "events", "adapters")} == {"users": 2, "events": 26, "adapters": 1}
    assert "events: 26" in run("store", "info").out
