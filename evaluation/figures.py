"""A result's figures, as PNG beside its page. Drawn from ``TASK.json``'s fields alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.analyses import WITHIN
from evaluation.analysis_tables import FOLLOW, LENGTH

ARMS_FIGURE, LENGTH_FIGURE, WITHIN_FIGURE, ADAPTION_FIGURE = (
    "Arms over queries, 95 %",
    "By length of history, each event asked before it is learnt",
    "Adapters of the newest events, same users and queries",
    "Task adaption: calibrate users' loss",
)
_DOTS = 120
"""Resolution, dots an inch."""
_APART = 0.04
"""Between the intervals of two arms, in rows."""


def draw(result: Mapping[str, Any], folder: Path, page: str) -> dict[str, str]:
    """Draw what a result has rows for.

    Args:
        result: The fields of ``TASK.json``.
        folder: Where the page lies; pictures go to its ``figures``.
        page: Its name, which theirs begin with.

    Returns:
        Each picture's path from the page by title; none where matplotlib (extra ``dev``) is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return {}
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    (folder / "figures").mkdir(parents=True, exist_ok=True)
    found = {}
    for title, name, paint in _pictures(result):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        paint(axes)
        axes.set_title(f"{title}\n{result['task']}" + ("" if result["evidence"] else " (shortened: not evidence)"))
        axes.grid(alpha=0.3)
        found[title] = f"figures/{page}-{name}.png"
        figure.savefig(folder / found[title], dpi=_DOTS, metadata={"Software": None})
        plt.close(figure)
    return found


def _pictures(result: Mapping[str, Any]) -> list[tuple[str, str, Callable[[Any], None]]]:
    rows, metric = result["analyses"], result["metric"]
    found: list[tuple[str, str, Callable[[Any], None]]] = [
        (ARMS_FIGURE, "arms", lambda axes: _arms(axes, result["arms"], metric)),
        (LENGTH_FIGURE, "length", lambda axes: _lines(axes, rows[LENGTH], metric, "user's events before")),
    ]
    if result["adaption"]:
        found.append((ADAPTION_FIGURE, "adaption", lambda axes: _curves(axes, result["adaption"])))
    if rows.get(WITHIN):
        found.append((WITHIN_FIGURE, "within", lambda axes: _lines(axes, rows[WITHIN], metric, "training events")))
    return found


def _arms(axes: Any, arms: Mapping[str, Any], metric: str) -> None:
    """Draw every arm's mean with its interval, the best on top."""
    judged = [name for name in arms if "metric" not in arms[name]]  # others wrote texts, without a loss
    order = sorted(judged, key=lambda name: float(arms[name]["query_mean"]))
    axes.figure.set_size_inches(8, 1 + 0.22 * len(order))
    for at, name in enumerate(order):
        low, high = arms[name]["ci"] or (arms[name]["query_mean"],) * 2
        strong = name in {"evidence", "fused", "oppu"}
        axes.plot([low, high], [at, at], color="tab:blue" if strong else "tab:gray", linewidth=2)
        axes.plot(arms[name]["query_mean"], at, marker="o", color="tab:blue" if strong else "tab:gray")
    axes.set_yticks(range(len(order)), order, fontsize="small")
    axes.set_xlabel(metric)


def _lines(axes: Any, rows: Sequence[Mapping[str, Any]], metric: str, label: str) -> None:
    """Draw arms over rows, with intervals; the base and what is compared with it."""
    arms = [a for a in ("none", FOLLOW, "oppu", "evidence", "fused") if any(a in row for row in rows)]
    for number, arm in enumerate(arms):
        points = [(at, row[arm]) for at, row in enumerate(rows) if arm in row]
        x = [at + _APART * (number - (len(arms) - 1) / 2) for at, _ in points]
        means = [p["mean"] for _, p in points]
        bounds = [p["ci"] or (p["mean"],) * 2 for _, p in points]
        below = [max(0.0, mean - low) for mean, (low, _) in zip(means, bounds, strict=True)]
        above = [max(0.0, high - mean) for mean, (_, high) in zip(means, bounds, strict=True)]
        axes.errorbar(x, means, yerr=[below, above], marker="o", capsize=3, label=arm)
    axes.set_xticks(range(len(rows)), [f"{row['row']}\n({row['users']} users)" for row in rows], fontsize="small")
    axes.set_xlabel(label)
    axes.set_ylabel(metric)
    axes.legend(fontsize="small")


def _curves(axes: Any, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw each base's loss over epochs; folds and seeds of a variant in one colour."""
    colours: dict[str, str] = {}
    for name, losses in curves.items():
        variant = name.rpartition("/")[2]
        first = variant not in colours
        colour = colours.setdefault(variant, f"C{len(colours)}")
        epochs = range(1, len(losses) + 1)
        axes.plot(epochs, losses, marker="o", color=colour, label=variant if first else None)
    axes.set_xticks(range(1, max(map(len, curves.values())) + 1))
    axes.set_xlabel("epochs")
    axes.set_ylabel("nats")
    axes.legend(fontsize="small")
