"""``oppu bench``: speed and memory, as ratios against baselines that ran in the same minutes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from oppu.cli import Session, compose
from oppu.errors import ConfigError

json_file = click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result there.")
quick = click.option("--quick", is_flag=True, help="Fewer sizes and repeats: to see that it runs, not to quote.")
lengths = click.option(
    "--tokens",
    multiple=True,
    type=click.IntRange(min=1),
    help="Tokens of a row, several times for several; otherwise as the benchmark has them.",
)
base_options: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
    click.option("--base", default="offline", show_default=True, help="As model.base, or llama-1b (random weights)."),
    click.option("--device", default="cpu", show_default=True),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True),
]


def with_base(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name a base."""
    for option in reversed(base_options):
        command = option(command)
    return command


@click.group()
def bench() -> None:
    """Measure; every figure is a ratio within one run."""


@bench.command("bank-serve")
@with_base
@click.option("--users", default=1024, show_default=True, type=click.IntRange(min=1), help="Most distinct users.")
@lengths
@quick
@json_file
def bank_serve(
    *, base: str, device: str, dtype: str, users: int, tokens: tuple[int, ...], quick: bool, out: Path | None
) -> None:
    """A batch of many users' rows: the bank against the base alone and PEFT's two ways."""
    from benchmarks import bank_serve as work
    from benchmarks.subjects import base_named
    from benchmarks.timing import machine, show, write

    loaded = base_named(base, device=device, dtype=dtype)
    counts = [count for count in (*work.USERS, 4096) if count <= users]
    scope = (
        work.Scope(tokens=(1, 8), ranks=(8,), users=counts[:3], wide_tokens=(1,), repeats=3)
        if quick
        else work.Scope(users=counts)
    )
    if tokens:
        scope = replace(scope, tokens=tokens, wide_tokens=[one for one in scope.wide_tokens if one in tokens])
    result: dict[str, object] = {"machine": machine(), "base": base, "dtype": dtype}
    rows = list(work.against_others(loaded, scope))
    show("64 rows of 64 users; ratios of throughput, the bank's over the other's", rows)
    wide = list(work.sweep_users(loaded, scope))
    show("as many rows, more and more users", wide)
    moved = {rank: work.bytes_moved(loaded, work.ROWS, rank) for rank in scope.ranks}
    click.echo(f"adapter bytes of one batch of {work.ROWS} users, by rank: {moved}")
    write(out, {**result, "rows": rows + wide, "adapter_bytes_by_rank": moved})


@bench.command("bank-train")
@quick
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds; 7, or with --quick 3.")
@click.option("--results", type=click.Path(path_type=Path), help="oppu evaluate's news_categorize.json, for accuracy.")
@json_file
@click.pass_obj
def bank_train(
    session: Session, /, *, quick: bool, repeats: int | None, results: Path | None, out: Path | None
) -> None:
    """Updates of many users: the bank against PEFT, one rung of a ladder at a time."""
    from benchmarks import bank_train as work
    from benchmarks.timing import REPEATS, machine, show, write

    found = work.accuracies(results)
    cases = {"one user": (1, 32), "many users": (4, 16)} if quick else work.CASES
    mixed = (20, 32, 2) if quick else work.MIXED
    repeats = repeats or (3 if quick else REPEATS)
    done = work.ladder(compose.tasks(session.settings), repeats=repeats, cases=cases, mixed=mixed)
    show("the same steps on the same rows", done["rows"])
    for name in [name for name in done if name != "rows"]:
        click.echo(f"{name:36} {done[name]}")
    for name, value in found.items():
        click.echo(f"{name:36} {'not measured' if value is None else value}")
    write(out, {"machine": machine(), "repeats": repeats, **done, **found})


@bench.command("residency")
@click.option("--device", default="cpu", show_default=True)
@click.option("--slots", default=256, show_default=True, type=click.IntRange(min=64))
@click.option("--adapters", default=25_600, show_default=True, type=click.IntRange(min=64), help="On disk.")
@click.option("--registered", default=0, show_default=True, help="Also register so many small ones; 0 = none.")
@lengths
@quick
@json_file
def residency(
    *, device: str, slots: int, adapters: int, registered: int, tokens: tuple[int, ...], quick: bool, out: Path | None
) -> None:
    """More adapters on disk than slots: throughput against all of them resident."""
    from benchmarks import residency as work
    from benchmarks.subjects import base_named
    from benchmarks.timing import machine, show, write

    if adapters < slots:
        raise ConfigError("--adapters: expected at least as many as --slots")

    def say(text: str) -> None:
        click.echo(text, err=True)

    loaded = base_named("offline", device=device, dtype="float32")
    scope = (
        work.Scope(64, 640, (1, 10), (1,), (work.Draw(1.0),), batches=9, repeats=3)
        if quick
        else work.Scope(slots, adapters)
    )
    if tokens:
        scope = replace(scope, tokens=tokens)
    rows = list(work.measure(loaded, scope, say))
    show(f"batches of {work.ROWS}, {scope.slots} slots, {scope.adapters} adapters on disk", rows)
    counts = [count for count in (1_000, 10_000, 100_000) if count < registered] + ([registered] if registered else [])
    grown = list(work.growth(loaded, counts, say))
    show("registered adapters", grown)
    write(out, {"machine": machine(), "slots": scope.slots, "rows": rows, "registered": grown})


@bench.command("end-to-end")
@click.option("--requests", default=2000, show_default=True, type=click.IntRange(min=64))
@click.option("--users", default=200, show_default=True, type=click.IntRange(min=1))
@quick
@json_file
def end_to_end(*, requests: int, users: int, quick: bool, out: Path | None) -> None:
    """The inference worker between two Kafka topics, against its model alone on the same rows."""
    from benchmarks import end_to_end as work
    from benchmarks.timing import machine, show, write

    done = work.measure(128 if quick else requests, 10 if quick else users)
    show("where the time goes", done.stages)
    click.echo(f"requests a second: {done.rate:.1f}; of the model alone: {done.model_rate:.1f}; ratio {done.ratio:.3f}")
    write(
        out,
        {
            "machine": machine(),
            "requests": done.requests,
            "ratio_to_model_only": done.ratio,
            "requests_per_second": done.rate,
            "stages": done.stages,
        },
    )
