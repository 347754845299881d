"""The command line: the composition root, and the one place that may import the stages.

Commands are loaded when they are named, so that help and the light commands start without torch. Exit codes: 0 done,
1 it failed while running, 2 the command line or the configuration is wrong and nothing was started.
"""

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from oppu.errors import ConfigError, OppuError
from oppu.settings import Settings

_COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "up": ("oppu.cli.up", "up", "Run everything on this machine, on an embedded real Kafka."),
    "demo": ("oppu.cli.demo", "demo", "Real events through the whole loop, and what personalization gained."),
    "ingest": ("oppu.cli.workers", "ingest", "Run an ingest worker."),
    "update": ("oppu.cli.workers", "update", "Run an updater."),
    "infer": ("oppu.cli.workers", "infer", "Run an inference worker."),
    "produce": ("oppu.cli.clients", "produce", "Send behaviour events from a file of JSON lines."),
    "ask": ("oppu.cli.clients", "ask", "Ask for one prediction and print the answer."),
    "watch": ("oppu.cli.clients", "watch", "Print predictions as they are made."),
    "history": ("oppu.cli.inspection", "history", "Print a user's events."),
    "user": ("oppu.cli.inspection", "user", "Print what is known of a user, or list users."),
    "profile": ("oppu.cli.inspection", "profile", "Print a user's profile in a task."),
    "adapters": ("oppu.cli.adapters", "adapters", "List, show, roll back, release, export adapters."),
    "dead-letters": ("oppu.cli.dead_letters", "dead_letters", "List, show and replay refused records."),
    "erase": ("oppu.cli.operation", "erase", "Delete everything about a user."),
    "topics": ("oppu.cli.operation", "topics", "Create, list and adopt topics."),
    "store": ("oppu.cli.operation", "store", "Migrate the history store."),
    "adapt": ("oppu.cli.adapt", "adapt", "Adapt the base model to the tasks on other users' events."),
    "distill": ("oppu.cli.distill", "distill", "Make a smaller embedder for queries alone."),
    "calibrate": ("oppu.cli.calibrate", "calibrate", "Fit how base, evidence and adapter are weighed."),
    "evaluate": ("oppu.cli.evaluate", "evaluate", "The paper's experiment on a file of events, by the protocol."),
    "bench": ("oppu.cli.bench", "bench", "Speed and memory, as ratios against baselines of the same run."),
    "contracts": (
        "oppu.cli.contracts",
        "contracts",
        "Write the JSON Schemas, the AsyncAPI page and the settings table.",
    ),
    "doctor": ("oppu.cli.operation", "doctor", "Check settings, broker, topics, store, registry, embedder and model."),
    "completion": ("oppu.cli.operation", "completion", "Print the shell completion script."),
}


class _LazyGroup(click.Group):
    """Knows each command's one-line help without importing its module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


class Session:
    """What every command gets: settings built on first use, and how to print."""

    def __init__(self, config: Path | None) -> None:
        self._config = config
        self._settings: Settings | None = None

    @property
    def config(self) -> Path | None:
        """The settings file of ``--config``."""
        return self._config

    @property
    def settings(self) -> Settings:
        """The settings, read once.

        Raises:
            ConfigError: Listing every fault.
        """
        if self._settings is None:
            self._settings = Settings.load(self._config)
        return self._settings


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json`` to a command whose output a program may read."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")(command)


def emit(value: Mapping[str, Any], *, as_json: bool, text: str) -> None:
    """Print one result as a JSON line, its times as in the contracts (RFC 3339), or as text."""
    click.echo(json.dumps(value, ensure_ascii=False, default=_as_json) if as_json else text)


def _as_json(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(path_type=Path), envvar="OPPU_CONFIG", help="Settings file (TOML).")
@click.version_option(package_name="oppu")
@click.pass_context
def cli(ctx: click.Context, config: Path | None) -> None:
    """One PEFT per user, live: events in over Kafka, adapters trained as users change, predictions out."""
    if ctx.invoked_subcommand != "bench":
        wait_passively()
    ctx.obj = Session(config)


def wait_passively() -> None:
    """Let threads of OpenMP sleep while they wait: spinning, they would take the cores from the other workers of this
    machine. It counts for what is started, and here until torch is imported; what is set already stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        ended = cli(standalone_mode=False)  # click returns the code of a command that exits; others return None
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"oppu: {problem}", err=True)
        sys.exit(2)
    except OppuError as error:
        logging.getLogger(__name__).debug("stopped", exc_info=True)
        click.echo(f"oppu: {error}", err=True)
        sys.exit(1)
    sys.exit(ended or 0)
