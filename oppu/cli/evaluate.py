"""``oppu evaluate``: the paper's experiment on a file of events, by the project's protocol."""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oppu.cli import Session, compose, emit, json_option
from oppu.errors import ConfigError

if TYPE_CHECKING:
    from evaluation.training import Recipe

QUICK_USERS = 8
_FILES = ("outputs", "population", "population_outputs", "sisters", "profiles", "labels")


@click.command()
@click.argument("task")
@click.option("--events", type=click.Path(path_type=Path), required=True, help="Events, or a LaMP or OPPU JSON file.")
@click.option("--outputs", type=click.Path(path_type=Path), help="LaMP's file of gold outputs.")
@click.option("--population", type=click.Path(path_type=Path), help="Users who adapt the base; targets are --events'.")
@click.option("--population-outputs", type=click.Path(path_type=Path), help="LaMP's gold outputs of --population.")
@click.option("--population-before-test", is_flag=True, help="Adapt the base on items before the first test's day.")
@click.option("--sister", "sisters", type=click.Path(path_type=Path), multiple=True, help="Same articles, other task.")
@click.option("--profiles", type=click.Path(path_type=Path), help="Written profiles, a JSON list of {id, output}.")
@click.option("--labels", type=click.Path(path_type=Path), help="The task's labels, one a line.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Work folder; a killed run goes on here.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="May be repeated.")
@click.option("--min-target", type=click.IntRange(5), help="Items of a target user; 50, or what some users have.")
@click.option("--min-calibrate", type=click.IntRange(3), default=20, show_default=True)
@click.option("--preset", type=click.Choice(["oppu"]), help="OPPU's released hyper-parameters: docs/reproduce.md.")
@click.option("--base-epochs", type=click.IntRange(1), help="Adapt every base for so many, instead of searching.")
@click.option("--adapt-items", type=click.IntRange(1), help="Adapt the bases on so many drawn items of all there are.")
@click.option("--plain-only", is_flag=True, help="Leave out the bases and arms with anything of the past in prompts.")
@click.option("--quick", is_flag=True, help=f"{QUICK_USERS} targets, short training: not evidence.")
@click.option("--all-arms", is_flag=True, help="Also OPPU with k=2 and 4, profile with k=1, and without adaption.")
@click.option("--methods", is_flag=True, help="Also LoRA, IA3 and prompt tuning, one user after the other.")
@click.option("--analyses", is_flag=True, help="Also the paper's analyses, and OPPU without adaption.")
@click.option("--final", is_flag=True, help="Open the held-back last fifth; it is written down that this was done.")
@json_option
@click.pass_obj
def evaluate(
    session: Session, /, task: str, events: Path, out: Path, *, final: bool, as_json: bool, **options: Any
) -> None:
    """Compare all arms and controls of TASK on users' own events, and write tables and tests to OUT."""
    from evaluation.budget import Progress
    from evaluation.corpus import bare_histories
    from evaluation.experiment import Plan, run
    from evaluation.inputs import alone
    from evaluation.material import Files, gather
    from evaluation.presets import PRESETS
    from evaluation.quick import ADAPT_ITEMS
    from evaluation.report import for_json, markdown, summarise, write
    from evaluation.roles import Bounds, some_users

    began, tasks = time.monotonic(), compose.tasks(session.settings)
    if task not in tasks:
        raise ConfigError(f"TASK: expected one of {', '.join(sorted(tasks))}")

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.0f} s] {text}", err=True)

    before_test, quick, preset = options["population_before_test"], options["quick"], options["preset"]
    settings = session.settings if preset is None else PRESETS[preset].settings(session.settings)
    given = options["min_target"]
    bounds = Bounds(given or Bounds().target, options["min_calibrate"], before_test=before_test, strict=bool(given))
    files, bare = Files(events, **{name: options[name] for name in _FILES}), bare_histories(tasks)
    material = gather(files, tasks[task], bounds, final=final, bare=bare)
    say(", ".join(f"{name} {value}" for name, value in material.notes.items()))
    recipe, items = _recipe(options), material.items
    if quick:
        items = tuple(some_users(items, material.bounds, users=QUICK_USERS, adapt_items=ADAPT_ITEMS))
    variant = f"{'-before-test' if before_test else ''}{'-quick' if quick else ''}"
    plan = Plan(
        task=task,
        folder=out / f"{task}-{'final' if final else 'dev'}-{recipe.digest()}{variant}",
        seeds=tuple(dict.fromkeys(options["seeds"])),
        recipe=recipe,
        bounds=material.bounds,
        final=final,
        users=QUICK_USERS if quick else None,
        say=say,
        all_arms=options["all_arms"],
        methods=options["methods"],
        analyses=options["analyses"],
        sisters=material.others,
        profiles=material.profiles,
        progress=Progress(say),
    )
    with alone(plan.folder):
        embedder = compose.embedder(settings)
        queries = compose.queries_apart(settings, embedder)
        outcomes = run(plan, items, settings, tasks, embedder, queries=queries)
    result = summarise(plan, outcomes, tasks[task].kind, settings.model.base, _command(events))
    unknown = sum(item.choices != () and not item.answered for p in outcomes[0].people for item in p.test)
    result["data"] = {**material.notes, "queries_of_unknown_label": unknown, "preset": preset}
    if queries is not None:
        result["data"]["query_encoder"] = queries.own_fingerprint
    data, page = write(result, outcomes, tasks[task].kind, out)
    emit(for_json({**result, "json": str(data), "markdown": str(page)}), as_json=as_json, text=markdown(result))
    say(f"written: {data}, {page}")


def _recipe(options: Mapping[str, Any]) -> "Recipe":
    """Return the preset's recipe or the built-in one, changed as the options say."""
    from evaluation.presets import PRESETS
    from evaluation.training import Recipe

    recipe = Recipe() if options["preset"] is None else PRESETS[options["preset"]].recipe
    if options["quick"]:
        recipe = replace(recipe, base_epochs=1, passes=1, chunk_passes=1, strangers=1)
    if options["base_epochs"] is not None:
        recipe = replace(recipe, base_epochs=options["base_epochs"], base_search=False)
    variants = ("plain",) if options["plain_only"] else recipe.variants
    return replace(recipe, adapt_items=options["adapt_items"], variants=variants)


def _command(events: Path) -> str:
    """Return the command as given, folders of the events and of whole paths left out: they are this machine's."""
    given = sys.argv[sys.argv.index("evaluate") + 1 :] if "evaluate" in sys.argv else []
    named = [Path(a).name if a == str(events) or Path(a).is_absolute() else a for a in given]
    return " ".join(["oppu evaluate", *(f"'{a}'" if " " in a else a for a in named)])
