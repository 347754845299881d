"""The command line in this process, with its exit code, and a store with an adapter in it."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oppu.cli import main
from oppu.effects import perform
from oppu.registry import AdapterRegistry
from oppu.settings import KafkaSettings
from tests.updater.world import KEY, World, published

MOOD = 'name = "mood"\nkind = "choice"\nprompt = "{input}"\nanswer = "mood:"\nlabels = ["glad", "sad"]\n'


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The output of ``--json``."""
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command through ``main``, far from the settings and files of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("OPPU_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # main sets it otherwise, for all later tests
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["oppu", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, shown.out, shown.err)

    return invoke


@pytest.fixture
def world(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> World:
    """A store where ada has two versions and 23 events, and bob three events, named by the environment's settings."""
    made = World(tmp_path)
    made.registry = AdapterRegistry(
        str(tmp_path / "adapters"),
        base=made.model.base,
        user_hash=made.hash,
        adapter_config=made.model.adapter_config(),
        clock=made.clock,
    )
    made.updater = made.new_updater()
    made.updater.registry = made.registry
    perform(made.updater.open())
    published(made)
    published(made)
    made.act("ada", ["sad"] * 3)
    assert [v.version for v in made.store.versions(made.model.base, made.ref("ada", 0).user_id)] == [1, 2]
    made.act("bob", ["glad"] * 3)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mood.toml").write_text(MOOD, encoding="utf-8")
    for name, value in {
        "STORE__URL": f"sqlite:///{tmp_path / 'history.db'}",
        "REGISTRY__URL": str(tmp_path / "adapters"),
        "SERVICE__DEPLOYMENT_KEY": KEY,
        "SERVICE__TASKS_DIR": str(tasks),
    }.items():
        monkeypatch.setenv(f"OPPU_{name}", value)
    return made


@pytest.fixture
def on_kafka(fresh_kafka_settings: KafkaSettings, run: Run, monkeypatch: pytest.MonkeyPatch) -> KafkaSettings:
    """Point the environment's settings at the real broker, under a prefix of the test's own."""
    for name in ("bootstrap_servers", "topic_prefix", "group_prefix", "partitions", "replication"):
        monkeypatch.setenv(f"OPPU_KAFKA__{name.upper()}", str(getattr(fresh_kafka_settings, name)))
    monkeypatch.setenv("OPPU_KAFKA__MIN_INSYNC_REPLICAS", "1")
    monkeypatch.setenv("OPPU_KAFKA__REQUEST_TIMEOUT_SECONDS", "5")
    return fresh_kafka_settings
