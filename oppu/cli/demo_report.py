"""What the demo prints and leaves: the table of arms, predictions side by side, the picture, ``report.json``."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from oppu.cli.demo_arms import ARMS, Asked
from oppu.store.records import Lift, Quality

TITLES: Mapping[str, str] = {
    "none": "no personalization",
    "retrieval": "retrieval only",
    "retrieval_profile": "retrieval + profile",
    "adapter": "adapter only",
    "all": "retrieval + profile + adapter",
    "wrong_user": "all, with another user's adapter",
}
SHOWN = 4
"""Predictions shown of those that personalization mended, and of those that it spoilt."""


@dataclass
class Report:
    """All that a run measured."""

    seconds: float
    waves: Sequence[Sequence[Asked]]
    expected: int
    answered: int
    duplicated: int
    events_lost: int
    adapters: int
    quality: Sequence[Quality]
    lift: Lift
    picture: Path | None
    urls: dict[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> list[Asked]:
        """All waves, one after the other."""
        return [asked for wave in self.waves for asked in wave]

    @property
    def lost(self) -> int:
        """Requests without an answer, and events that are not in the store."""
        return self.expected - self.answered + self.events_lost

    def accuracies(self) -> dict[str, float]:
        """Return each arm's accuracy over all that was asked."""
        shares = {arm: _share([asked.right(arm) for asked in self.asked]) for arm in ARMS}
        rights = [output == asked.event.output for asked in self.asked for output in asked.wrong]
        return {**shares, "wrong_user": _share(rights)}

    def user_means(self) -> dict[str, float]:
        """Return each arm's accuracy as the mean over users."""
        by_user: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for asked in self.asked:
            rights = by_user[asked.event.user_id]
            for arm in ARMS:
                rights[arm].append(asked.right(arm))
            rights["wrong_user"] += [output == asked.event.output for output in asked.wrong]
        return {arm: _share_of([_share(rights[arm]) for rights in by_user.values()]) for arm in (*ARMS, "wrong_user")}

    def fields(self) -> dict[str, object]:
        """Return what ``report.json`` holds."""
        return {
            "requests": len(self.asked),
            "users": len({asked.event.user_id for asked in self.asked}),
            "seconds": round(self.seconds, 1),
            "arms": {arm: round(value, 4) for arm, value in self.accuracies().items()},
            "arms_user_mean": {arm: round(value, 4) for arm, value in self.user_means().items()},
            "lost": self.lost,
            "duplicated": self.duplicated,
            "adapters": self.adapters,
            "lift_nats_per_event": round((self.lift.loss_none - self.lift.loss_live) / max(1, self.lift.events), 4),
            "lift_events": self.lift.events,
        }


def print_report(report: Report, folder: Path) -> None:
    """Print the table, the examples and where everything is."""
    console = Console(width=110)
    fields = report.fields()
    table = Table(
        title=f"{fields['requests']} articles of {fields['users']} authors, asked before they came: which category?"
    )
    table.add_column("arm")
    table.add_column("accuracy", justify="right")
    table.add_column("mean over authors", justify="right")
    means = report.user_means()
    for arm, value in report.accuracies().items():
        table.add_row(TITLES[arm], f"{value:.3f}", f"{means[arm]:.3f}")
    console.print(table)
    for title, chosen in (("mended by personalization", _changed(report.asked, better=True)),
                          ("spoilt by personalization", _changed(report.asked, better=False))):  # fmt: skip
        console.print(_examples(f"{title}: {len(chosen)} of {len(report.asked)}", chosen[:SHOWN]))
    _print_live(console, report)
    console.print(f"lost {report.lost}, duplicated {report.duplicated}, {report.seconds:.0f} s")
    for worker, url in report.urls.items():
        console.print(
            f"metrics of {worker}: {url} (while it ran; oppu up --dir {folder} brings it back)", soft_wrap=True
        )
    console.print(f"data, logs, settings and report.json: {folder}/", soft_wrap=True)
    if report.picture is not None:
        console.print(f"live accuracy by arm: {folder / report.picture.name}", soft_wrap=True)


def draw_picture(waves: Sequence[Sequence[Asked]], path: Path) -> Path | None:
    """Draw accuracy over the stream by arm.

    Args:
        waves: Each wave's answers, in stream order.
        path: PNG to write.

    Returns:
        The path; ``None`` where matplotlib (extra ``dev``) is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    labels = [f"{wave[-1].event.occurred_at:%Y-%m}" for wave in waves]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for arm in ARMS:
        shares = [_share([asked.right(arm) for asked in group]) for group in waves]
        axes.plot(range(len(waves)), shares, marker="o", label=TITLES[arm], linewidth=2.5 if arm == "all" else 1.2)
    axes.set_xticks(range(len(waves)), labels)
    axes.set_xlabel("stream time (end of wave)")
    axes.set_ylabel("accuracy, asked before the event was sent")
    axes.set_title(f"{sum(map(len, waves))} requests, predict, then learn")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _print_live(console: Console, report: Report) -> None:
    lift = report.lift
    if lift.events:
        gain = (lift.loss_none - lift.loss_live) / lift.events
        console.print(
            f"paired lift, before training on them: {lift.events} events, the live adapter saves {gain:+.3f} nats "
            f"an event against none ({lift.correct_live} against {lift.correct_none} right)"
        )
    for quality in report.quality:
        if quality.matched:
            share = quality.correct / quality.matched
            console.print(
                f"live quality from the store, {quality.arm}: {share:.3f} of {quality.matched} matched answers"
            )


def _changed(asked: Sequence[Asked], *, better: bool) -> list[Asked]:
    return [a for a in asked if a.right("all") == better and a.right("none") != better]


def _examples(title: str, chosen: Sequence[Asked]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("article", "author's category", "without", "with all"):
        table.add_column(name, max_width=60 if name == "article" else 18)
    for asked in chosen:
        text = asked.event.input
        table.add_row(
            text if len(text) <= 115 else text[:114] + "…",
            asked.event.output,
            asked.outputs["none"] or "(error)",
            asked.outputs["all"] or "(error)",
        )
    return table


def _share(rights: Sequence[bool]) -> float:
    return sum(rights) / len(rights) if rights else 0.0


def _share_of(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
