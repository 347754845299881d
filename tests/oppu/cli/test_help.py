"""Every command explains itself, and none loads a model to do so."""

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from oppu.cli import _COMMANDS, cli
from tests.oppu.cli.conftest import Run


def paths(group: click.Group = cli, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and every group, by its words."""
    yield above
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from paths(command, (*above, name))
        else:
            yield (*above, name)


PATHS = list(paths())


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help(run: Run, path: tuple[str, ...]) -> None:
    done = run(*path, "--help")
    assert done.code == 0
    assert done.out.startswith("Usage: ")
    assert not done.err


def test_commands_are_listed_with_their_help(run: Run) -> None:
    shown = run("-h").out
    assert all(f"  {name} " in shown for name in _COMMANDS)


def test_one_line_of_help_says_what_the_command_is() -> None:
    for name in _COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None and command.name == name and command.help


def test_help_loads_no_model() -> None:
    code = f"""
import sys
from oppu.cli import cli
for path in {PATHS!r}:
    assert cli([*path, "--help"], standalone_mode=False) == 0, path
print(sorted({{"torch", "faiss", "transformers", "kafka", "sqlalchemy", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_unknown_command(run: Run) -> None:
    done = run("fly")
    assert done.code == 2
    assert "No such command 'fly'" in done.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    done = run("completion", shell)
    assert done.code == 0
    assert "_OPPU_COMPLETE" in done.out and "oppu" in done.out


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.code, done.out.split()[-1].count(".")) == (0, 2)


@pytest.mark.parametrize(("words", "waits"), [(("up",), "PASSIVE"), (("bench", "bank-serve"), None)])
def test_workers_wait_passively_and_benchmarks_of_one_process_as_torch_has_it(
    words: tuple[str, ...], waits: str | None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert run(*words, "--help").code == 0
    assert os.environ.get("OMP_WAIT_POLICY") == waits
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    run(*words, "--help")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
