"""``oppu bench``: speed and memory, as ratios against baselines that ran in the same minutes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oppu.cli import Session, compose, wait_passively
from oppu.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.timing import Cell
    from oppu.lm.base import LoadedBase

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
]
one_type = click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)


def with_base(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name a base and where it runs."""
    for option in reversed(base_options):
        command = option(command)
    return command


def _told(rows: "Iterable[dict[str, Cell]]") -> "Iterator[dict[str, Cell]]":
    """Pass rows on, and print each to stderr as it comes: the table is shown at the end, half an hour later."""
    for row in rows:
        click.echo(", ".join(f"{name} {value}" for name, value in row.items() if value is not None), err=True)
        yield row


@click.group()
def bench() -> None:
    """Measure; every figure is a ratio within one run.

    A process that runs alone waits as torch has it, unless OMP_WAIT_POLICY says otherwise: so would PEFT's user.
    """


@bench.command("bank-serve")
@with_base
@one_type
@click.option("--users", type=click.IntRange(min=1), help="Most distinct users; 1024, or on a GPU 4096.")
@lengths
@quick
@json_file
def bank_serve(
    *, base: str, device: str, dtype: str, users: int | None, tokens: tuple[int, ...], quick: bool, out: Path | None
) -> None:
    """A batch of many users' rows: the bank against the base alone and PEFT's two ways."""
    from benchmarks import bank_serve as work
    from benchmarks.batch_mates import QUESTIONS, changed_by_batch_mates
    from benchmarks.subjects import base_named
    from benchmarks.timing import machine, show, write
    from benchmarks.train_at_once import on_gpu
    from oppu.tasks import load_tasks

    loaded = base_named(base, device=device, dtype=dtype)
    most = users or (work.GPU_USERS if on_gpu(device) else work.USERS[-1])
    counts = [count for count in (*work.USERS, work.GPU_USERS) if count <= most]
    scope = (
        work.Scope(tokens=(1, 8), ranks=(8,), users=counts[:3], wide_tokens=(1,), repeats=3)
        if quick
        else work.Scope(users=counts)
    )
    if tokens:
        scope = replace(scope, tokens=tokens, wide_tokens=[one for one in scope.wide_tokens if one in tokens])
    result: dict[str, object] = {"machine": machine(), "base": base, "dtype": dtype}
    rows = list(_told(work.against_others(loaded, scope)))
    show("64 rows of 64 users; ratios of throughput, the bank's over the other's", rows)
    prompts = work.on_prompts(loaded, load_tasks(None), scope)
    show("64 prompts of 64 users as they come", [prompts])
    wide = list(_told(work.sweep_users(loaded, scope, on_gpu(device))))
    show("as many rows, more and more users", wide)
    moved = {rank: work.bytes_moved(loaded, work.ROWS, rank) for rank in scope.ranks}
    click.echo(f"adapter bytes of one batch of {work.ROWS} users, by rank: {moved}")
    users, questions = (16, 2) if quick else (work.ROWS, QUESTIONS)
    mates = changed_by_batch_mates(loaded, load_tasks(None), users=users, questions=questions)
    show("answers alone and among batch-mates", [mates.cells()])
    write(
        out,
        {
            **result,
            "rows": rows + wide,
            "prompts": prompts,
            "adapter_bytes_by_rank": moved,
            "batch_mates": mates.cells(),
        },
    )


@bench.command("bank-train")
@with_base
@quick
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds; 7, or with --quick 3.")
@click.option("--results", type=click.Path(path_type=Path), help="JSON of oppu evaluate --analyses, for accuracy.")
@json_file
@click.pass_obj
def bank_train(
    session: Session,
    /,
    *,
    base: str,
    device: str,
    quick: bool,
    repeats: int | None,
    results: Path | None,
    out: Path | None,
) -> None:
    """Updates of many users: the bank against PEFT, one rung of a ladder at a time."""
    from benchmarks import bank_train as work
    from benchmarks.subjects import base_named
    from benchmarks.timing import REPEATS, machine, show, write
    from benchmarks.train_at_once import on_gpu

    def named(dtype: str) -> "LoadedBase":
        return base_named(base, device=device, dtype=dtype)

    found = work.accuracies(results)
    cases = {"one user": (1, 32), "many users": (4, 16)} if quick else work.CASES
    mixed = (20, 32, 2) if quick else work.MIXED
    repeats = repeats or (3 if quick else REPEATS)
    tasks = compose.tasks(session.settings)
    on = work.updates_at_once(tasks, named, on_gpu(device), repeats=repeats)
    done = {**work.ladder(tasks, named, repeats=repeats, cases=cases, mixed=mixed), **on}
    show("the same steps on the same rows", done["rows"])
    for name in [name for name in done if name != "rows"]:
        click.echo(f"{name:36} {done[name]}")
    for name, value in found.items():
        click.echo(f"{name:36} {'not measured' if value is None else value}")
    write(out, {"machine": machine(), "base": base, "repeats": repeats, **done, **found})


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
    rows = list(_told(work.measure(loaded, scope, say)))
    show(f"batches of {work.ROWS}, {scope.slots} slots, {scope.adapters} adapters on disk", rows)
    counts = [count for count in (1_000, 10_000, 100_000) if count < registered] + ([registered] if registered else [])
    grown = list(work.growth(loaded, counts, say))
    show("registered adapters", grown)
    write(out, {"machine": machine(), "slots": scope.slots, "rows": rows, "registered": grown})


@bench.command("end-to-end")
@click.option("--requests", default=4096, show_default=True, type=click.IntRange(min=64), help="Of a round.")
@click.option("--users", default=200, show_default=True, type=click.IntRange(min=1))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="That infer.")
@quick
@json_file
def end_to_end(*, requests: int, users: int, workers: int, quick: bool, out: Path | None) -> None:
    """Inference workers between two Kafka topics, against their model alone on the same rows."""
    wait_passively()  # the model alone waits as the workers do
    from benchmarks import end_to_end as work
    from benchmarks.timing import machine, show, write
    from oppu.settings import Settings

    most = Settings.load().inference.resident_adapters
    if users > most:
        raise ConfigError(f"--users: expected at most {most}, the places of the bank")
    done = (
        work.measure(128, 10, workers=workers, repeats=1) if quick else work.measure(requests, users, workers=workers)
    )
    show("where the time goes", done.stages)
    rate = done.requests / done.kafka.median
    click.echo(f"requests a second: {rate:.1f} (spread {done.kafka.spread:.2f})")
    result: dict[str, object] = {"requests": done.requests, "workers": workers, "requests_per_second": rate}
    for way, meaning in work.WAYS.items():
        timing, ratios = done.alone[way], done.ratios(way)
        of_model = done.requests / timing.median
        click.echo(f"{meaning}: {of_model:.1f} ({timing.spread:.2f}); ratio {done.ratio(way):.3f}, by round {ratios}")
        result |= {f"ratio_to_{way}": done.ratio(way), f"ratios_to_{way}": ratios}
        result[f"requests_per_second_{way}"] = of_model
    write(out, {"machine": machine(), **result, "stages": done.stages})
