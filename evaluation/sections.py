"""The parts of a task's page after its arms and contrasts: adaption, methods, analyses, figures."""

from collections.abc import Mapping, Sequence
from typing import Any


def sections(result: Mapping[str, Any]) -> str:
    """Render what a result holds beside arms and tests.

    Args:
        result: The fields of ``TASK.json``.

    Returns:
        Markdown, each section after a blank line.
    """
    parts = [_adaption(result), _methods(result.get("methods") or {})]
    parts += [_analysis(name, rows) for name, rows in (result.get("analyses") or {}).items()]
    parts += [f"\n![{title}]({path})\n" for title, path in (result.get("figures") or {}).items()]
    return "".join(parts)


def between(interval: Sequence[float] | None, form: str = ".3f") -> str:
    """Render an interval; nothing where there is none."""
    return " to ".join(f"{bound:{form}}" for bound in interval) if interval else ""


def _adaption(result: Mapping[str, Any]) -> str:
    lines = []
    if result.get("chosen"):
        rows = [
            [c["fold"], c["seed"], c["oppu"], c["prompt"], f"{c['rate']:g}", _chooser(c, result["chosen"][0]["seed"])]
            for c in result["chosen"]
        ]
        lines.append(_table("Arms of P1", ["fold", "seed", "OPPU", "prompt-only", "OPPU's rate", "chosen by"], rows))
    judged = [c for c in result.get("chosen") or [] if c["rates"]]
    if judged:
        rates = list(judged[0]["rates"])
        rows = [[c["fold"], *(f"{c['rates'][rate]:.4f}" for rate in rates)] for c in judged]
        lines.append(_table("Calibrate users' loss by OPPU's learning rate", ["fold", *rates], rows))
    if result.get("adaption"):
        curves = [[name, ", ".join(f"{x:.4f}" for x in losses)] for name, losses in result["adaption"].items()]
        lines.append(_table("Task adaption", ["base", "calibrate users' loss after 1, 2, … epochs"], curves))
    share = result.get("recent_history_cut_share")
    if share is not None:
        lines.append(
            f"\nOf the recent history, {share:.1%} of the items did not fit the prompt; no query was cut for it.\n"
        )
    return "".join(lines)


def worst_rows(tests: Mapping[str, Any]) -> list[str]:
    """Say of the arm that ``fused`` stands worst against whether that is a loss, judged as the worst of all."""
    judged = {name: t["max_t_p"] for name, t in tests.items() if t["max_t_p"] is not None}
    if not judged:
        return []
    name = min(judged, key=lambda one: (judged[one], tests[one]["difference"]))
    said = (
        f"{tests[name]['difference']:+.4f}, one-sided p {judged[name]:.3f} by max-T bootstrap over {len(judged)} arms"
    )
    return ["", f"The arm that fused stands worst against: {name.removeprefix('fused - ')} ({said})."]


def _chooser(choice: Mapping[str, Any], first_seed: int) -> str:
    if choice["merits"]:
        return "calibrate users"
    return "nobody: the first" if choice["seed"] == first_seed else f"as with seed {first_seed}"


def _methods(methods: Mapping[str, Any]) -> str:
    if not methods:
        return ""
    columns = ["method", "over queries", "over users", "parameters", "file, bytes", "seconds a thousand examples"]
    rows = [
        [name, f"{m['query_mean']:.3f}", f"{m['user_mean']:.3f}", m["parameters"], m["bytes"], f"{m['seconds']:.1f}"]
        for name, m in methods.items()
    ]
    return _table("PEFT methods", columns, rows)


def _analysis(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return _table(name.capitalize(), columns, [[_cell(row.get(c)) for c in columns] for row in rows])


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"\n## {title}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{value['mean']:.3f} ({between(value['ci'])})" if value["ci"] else f"{value['mean']:.3f}"
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)
