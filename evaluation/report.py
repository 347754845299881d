"""From outcomes to numbers: arms, contrasts, and the rows that got better and worse; as JSON and as Markdown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.arms import Array, log_loss, macro_f1, right
from evaluation.experiment import PROMPTS, Outcome, Plan
from evaluation.presets import PRESETS
from evaluation.splits import clusters
from evaluation.statistics import Contrast, contrast, holm, mean_interval
from evaluation.training import Recipe
from oppu.tasks import Kind

BANDS = (16, 50, 100, 200)
"""History lengths that part the prequential events in the search for where the adapter adds."""
_SHOWN = 5
METRICS: Mapping[Kind, str] = {
    "choice": "accuracy",
    "rating": "minus mean absolute error",
    "text": "minus loss a token",
}


def summarise(plan: Plan, outcomes: Sequence[Outcome], kind: Kind, base: str, command: str) -> dict[str, Any]:
    """Compute everything that is reported.

    Args:
        plan: What was run.
        outcomes: One a seed; merits are averaged over seeds before they are tested.
        kind: Of the task.
        base: The base that was begun with.
        command: What reproduces this.

    Returns:
        The fields of ``TASK.json``.
    """
    people = outcomes[0].people
    of = clusters(people)
    merits = {name: _over_seeds(outcomes, name, kind) for name in outcomes[0].arms.held}
    arms = {}
    for name, values in merits.items():
        arms[name] = {
            "query_mean": float(np.concatenate(values).mean()),
            "user_mean": float(np.mean([v.mean() for v in values])),
            "ci": mean_interval(values, of),
            "seeds": [float(np.concatenate(_merits(o, name, kind)).mean()) for o in outcomes],
        }
        if kind != "text":
            arms[name]["log_loss"] = float(np.mean([np.concatenate(_losses(o, name)).mean() for o in outcomes]))
            arms[name]["macro_f1"] = float(np.mean([_f1(o, name) for o in outcomes]))
    tests = _tests(merits, of, arms)
    if kind != "text":
        tests |= _prequential(outcomes, kind, of)
    primary = [name for name in tests if name.startswith(("P1", "P2", "P3"))]
    adjusted = dict(zip(primary, holm([tests[name].p for name in primary]), strict=True))
    return {
        "task": plan.task,
        "final": plan.final,
        "evidence": plan.users is None and plan.recipe in (Recipe(), *(p.recipe for p in PRESETS.values())),
        "users": len(people),
        "queries": sum(len(p.test) for p in people),
        "metric": METRICS[kind],
        "arms": arms,
        "tests": {name: asdict(c) | {"holm_p": adjusted.get(name)} for name, c in tests.items()},
        "trust_in_adapter": _trust(outcomes),
        "command": command,
        "seeds": list(plan.seeds),
        "base": base,
        "recipe": asdict(plan.recipe) | {"digest": plan.recipe.digest()},
    }


def write(result: Mapping[str, Any], outcomes: Sequence[Outcome], kind: Kind, folder: Path) -> tuple[Path, Path]:
    """Write ``TASK.json`` and ``TASK.md`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{result['task']}.json", folder / f"{result['task']}.md"
    data.write_text(json.dumps(_plain(result), indent=1) + "\n", encoding="utf-8")
    page.write_text(markdown(result) + _examples(outcomes[0], kind), encoding="utf-8")
    return data, page


def markdown(result: Mapping[str, Any]) -> str:
    """Render the tables."""
    lines = [f"# {result['task']}", ""]
    if not result["evidence"]:
        lines += ["**A shortened run: not evidence.**", ""]
    part = "held-back last fifth" if result["final"] else "development part (the last fifth stays closed)"
    lines += [
        f"{result['users']} users, {result['queries']} queries, {part}; metric: {result['metric']}; "
        f"seeds {result['seeds']}; base {result['base']}. Made by `{result['command']}`.",
        "",
        "| arm | over queries | 95 % | over users | log loss | macro-F1 |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in sorted(result["arms"].items(), key=lambda pair: -pair[1]["query_mean"]):
        low, high = arm["ci"]
        rest = f"{arm['log_loss']:.3f} | {arm['macro_f1']:.3f}" if "log_loss" in arm else "| "
        lines.append(
            f"| {name} | {arm['query_mean']:.3f} | {low:.3f} to {high:.3f} | {arm['user_mean']:.3f} | {rest} |"
        )
    lines += [
        "",
        "| contrast | over queries | 95 % | p (Holm) | over users | 95 % | p | wins/ties/losses | detectable |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, t in result["tests"].items():
        low, high = t["ci"]
        user_low, user_high = t["user_ci"]
        star = f"{t['p']:.4f}" + (f" ({t['holm_p']:.4f})" if t["holm_p"] is not None else "")
        lines.append(
            f"| {name} | {t['difference']:+.4f} | {low:+.4f} to {high:+.4f} | {star} | {t['user_difference']:+.4f} "
            f"| {user_low:+.4f} to {user_high:+.4f} | {t['user_p']:.4f} | {t['wins']}/{t['ties']}/{t['losses']} "
            f"| {t['detectable']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """Return a value for JSON, which has no word for what is not a number (one user's detectable effect)."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _tests(merits: Mapping[str, Sequence[Array]], of: Sequence[int], arms: Mapping[str, Any]) -> dict[str, Contrast]:
    pairs: dict[str, tuple[str, str]] = {}
    if "oppu" in merits:
        prompts = [name for name in PROMPTS if name in merits]
        best = max(prompts, key=lambda name: arms[name]["query_mean"])
        pairs[f"P1 oppu - {best} (best prompt-only)"] = ("oppu", best)
        pairs |= {f"P2 oppu - {c}": ("oppu", c) for c in ("volume", "permuted") if c in merits}
        pairs["increments up to the cut - oppu"] = ("frozen", "oppu")
        others = ("none", "stranger-nearest", "union", "prior", "evidence")
        pairs |= {f"oppu - {c}": ("oppu", c) for c in others if c in merits}
        pairs |= {
            f"oppu+prior - {c}+prior": ("oppu+prior", f"{c}+prior")
            for c in ("volume", "permuted", "stranger-0")
            if f"{c}+prior" in merits
        }
    if "fused" in merits:
        pairs |= {f"fused - {c}": ("fused", c) for c in merits if c != "fused"}
    return {name: contrast(_less(merits[a], merits[b]), of) for name, (a, b) in pairs.items()}


def _prequential(outcomes: Sequence[Outcome], kind: Kind, of: Sequence[int]) -> dict[str, Contrast]:
    """P3: fused less evidence over all events after each user's sixteenth; and by length of history."""
    people, tests = outcomes[0].people, {}
    bounds = [*BANDS, 10**9]
    spans = {"P3 fused - evidence, after the 16th event": (16, 10**9)}
    for low, high in zip(bounds, bounds[1:], strict=False):
        end = f"{high}" if high < bounds[-1] else "the end"
        spans[f"fused - evidence, events {low} to {end}"] = (low, high)
    for measure in ("", ", nats saved"):
        for name, (low, high) in spans.items():
            parts = []
            for at, person in enumerate(people):
                asked = [k for k, item in enumerate(person.items) if low <= k < high and not item.bare]
                items = [person.items[k] for k in asked]
                gains = []
                for o in outcomes:
                    fused, evidence = (o.arms.stream[arm][at][asked] for arm in ("fused", "evidence"))
                    if measure:
                        gains.append(log_loss(items, evidence) - log_loss(items, fused))
                    else:
                        gains.append(right(items, fused, kind) - right(items, evidence, kind))
                parts.append(np.mean(gains, axis=0))
            some = [k for k, part in enumerate(parts) if len(part)]
            if len(some) > 1:
                tests[name + measure] = contrast([parts[k] for k in some], [of[k] for k in some])
    return tests


def _over_seeds(outcomes: Sequence[Outcome], name: str, kind: Kind) -> list[Array]:
    return [np.mean(same, axis=0) for same in zip(*(_merits(o, name, kind) for o in outcomes), strict=True)]


def _merits(outcome: Outcome, name: str, kind: Kind) -> list[Array]:
    return [right(p.test, s, kind) for p, s in zip(outcome.people, outcome.arms.held[name], strict=True)]


def _losses(outcome: Outcome, name: str) -> list[Array]:
    return [log_loss(p.test, s) for p, s in zip(outcome.people, outcome.arms.held[name], strict=True)]


def _f1(outcome: Outcome, name: str) -> float:
    items = [item for p in outcome.people for item in p.test]
    return macro_f1(items, [row for scores in outcome.arms.held[name] for row in scores])


def _less(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _trust(outcomes: Sequence[Outcome]) -> dict[str, float] | None:
    final = [weight for o in outcomes for weight in o.arms.trust]
    if not final:
        return None
    low, middle, high = np.quantile(final, [0.1, 0.5, 0.9])
    return {"tenth": float(low), "median": float(middle), "ninetieth": float(high)}


def _examples(outcome: Outcome, kind: Kind) -> str:
    """Show queries that the adapter mended and spoilt, beside what the user really did."""
    arms = outcome.arms.held
    if kind == "text" or "fused" not in arms:
        return ""
    mended: list[str] = []
    spoilt: list[str] = []
    for at, person in enumerate(outcome.people):
        before, after = (right(person.test, arms[name][at], kind) for name in ("evidence", "fused"))
        for k, item in enumerate(person.test):
            if before[k] != after[k]:
                answers = [
                    item.choices[int(arms[name][at][k][: len(item.choices)].argmax())] for name in ("evidence", "fused")
                ]
                text = " ".join(item.input.split())[:110].replace("|", "/")
                row = f"| {text} | {item.output} | {answers[0]} | {answers[1]} |"
                (mended if after[k] > before[k] else spoilt).append(row)
    head = "| input | the user's | evidence | fused |\n|---|---|---|---|\n"
    parts = [("Mended by the adapter", mended), ("Spoilt by the adapter", spoilt)]
    return "".join(f"\n{title}: {len(rows)}\n\n{head}" + "\n".join(rows[:_SHOWN]) + "\n" for title, rows in parts)
