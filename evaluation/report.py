"""From outcomes to numbers: arms, contrasts, and the rows that got better and worse; as JSON and as Markdown."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import text_report
from evaluation.analysis_tables import analysis_rows
from evaluation.arms import Array, answer, log_loss, macro_f1, right, squared_error
from evaluation.cautions import cautions
from evaluation.experiment import Outcome, Plan
from evaluation.figures import draw
from evaluation.methods import PREFIX
from evaluation.presets import whole
from evaluation.sections import between, sections, worst_rows
from evaluation.splits import Person, clusters
from evaluation.statistics import (
    CASE_STUDY_BELOW,
    TOP_USERS,
    Contrast,
    block_interval,
    contrast,
    holm,
    max_t,
    mean_interval,
    units,
)
from evaluation.variants import CHOSEN_OPPU, CHOSEN_PROMPT
from oppu.tasks import Kind

BANDS = (16, 50, 100, 200)
"""History lengths that part the prequential events in the search for where the adapter adds."""
_SHOWN = 5
P1 = "P1 oppu - best prompt-only (both chosen by calibrate users)"
P2_VOLUME, P2_PERMUTED = "P2 oppu - volume", "P2 oppu - permuted"
P3 = "P3 fused - evidence, after the 16th event"
PRIMARY = (P1, P2_VOLUME, P2_PERMUTED, P3)
"""What is tested, Holm's adjustment over them; all else is exploratory (protocol section 4)."""
FUSED_LESS = "fused - "
METRICS: Mapping[Kind, str] = {
    "choice": "accuracy",
    "rating": "minus mean absolute error",
    "text": "minus loss a token",
}


def summarise(plan: Plan, outcomes: Sequence[Outcome], kind: Kind, base: str, command: str) -> dict[str, Any]:
    """Compute everything that is reported.

    Args:
        plan: What was run.
        outcomes: One a seed; merits are averaged over seeds before they are tested. The first one has all arms.
        kind: Of the task.
        base: The base that was begun with.
        command: What reproduces this.

    Returns:
        The fields of ``TASK.json``.
    """
    people = outcomes[0].people
    of, clustered_by = units(clusters(people))
    merits = [{name: _merits(o, name, kind) for name in o.arms.held} for o in outcomes]
    arms = {name: _measured([o for o in outcomes if name in o.arms.held], name, of, kind) for name in merits[0]}
    differences = _differences(merits) | _prequential(outcomes, kind)
    tests = {name: _tested(parts, of) for name, parts in differences.items()}
    lost = max_t({name: parts for arm in arms if (parts := differences.get(name := f"{FUSED_LESS}{arm}"))}, of)
    ran = {name: sum({a, b} <= set(m) for m in merits) for name, (a, b) in _pairs(merits[0]).items()}
    runs = [o.arms.texts for o in outcomes]
    if kind == "text":
        for name, own in text_report.written(outcomes[0].tables, runs).items():
            arms[name] = (arms.get(name) or text_report.measured(outcomes[0].tables, runs, name, of)) | own
        tests |= text_report.lead_contrasts(outcomes[0].tables, runs, of)
    few = len(people) < CASE_STUDY_BELOW
    primary = [name for name in tests if name in PRIMARY]
    wanted = [name for name in PRIMARY if name != P1 or len(plan.recipe.variants) > 1]
    adjusted = {} if few else dict(zip(primary, holm([tests[name].p for name in primary]), strict=True))
    return {
        "task": plan.task,
        "final": plan.final,
        "evidence": plan.users is None and whole(plan.recipe),
        "users": len(people),
        "queries": sum(len(p.test) for p in people),
        "metric": METRICS[kind],
        "arms": arms,
        "case_study": few,
        "clustered_by": clustered_by,
        "rouge_beats_lead": text_report.claims(tests),
        "tests": {
            name: asdict(c)
            | {"without_single_label": _of_many_labels(differences.get(name, []), people)}
            | {"holm_p": adjusted.get(name), "max_t_p": lost.get(name), "seeds": ran.get(name, len(outcomes))}
            | (_case(differences.get(name, []), people) if few else {})
            for name, c in tests.items()
        },
        "trust_in_adapter": _trust(outcomes),
        "analyses": analysis_rows(outcomes, kind),
        "methods": {n: {**arms[PREFIX + n], **cost} for n, cost in outcomes[0].methods.items()},
        "chosen": [asdict(choice) for o in outcomes for choice in o.chosen],
        "adaption": {f"seed {o.seed}, {name}": list(losses) for o in outcomes for name, losses in o.curves.items()},
        "repeats_left_out": dict(outcomes[0].repeats),
        "items_that_adapt_the_base": dict(outcomes[0].adapting),
        "items_in_unread_scripts": outcomes[0].unread,
        "shared_items": outcomes[0].shared,
        "calibrate_users": dict(outcomes[0].judging),
        "not_tested": [name for name in wanted if name not in tests],
        "left_out": sorted({name for o in outcomes for name in o.left_out}),
        "recent_history_cut_share": outcomes[0].cut_share,
        "command": command,
        "seeds": list(plan.seeds),
        "base": base,
        "recipe": asdict(plan.recipe) | {"digest": plan.recipe.digest()},
    }


def _measured(outcomes: Sequence[Outcome], name: str, of: Sequence[int], kind: Kind) -> dict[str, Any]:
    """Return an arm's metrics over the seeds that ran it; ``of`` are what users are resampled by."""
    values = _mean([_merits(o, name, kind) for o in outcomes])
    found: dict[str, Any] = {
        "query_mean": float(np.concatenate(values).mean()),
        "user_mean": float(np.mean([v.mean() for v in values])),
        "ci": mean_interval(values, of),
        "seeds": [float(np.concatenate(_merits(o, name, kind)).mean()) for o in outcomes],
    }
    if kind != "text":
        found["log_loss"] = float(np.mean([np.concatenate(_losses(o, name)).mean() for o in outcomes]))
        found["macro_f1"] = float(np.mean([_f1(o, name) for o in outcomes]))
    if kind == "rating":
        found |= {"mae": -found["query_mean"], "rmse": _rmse(outcomes, name)}
    return found


def write(result: Mapping[str, Any], outcomes: Sequence[Outcome], kind: Kind, folder: Path) -> tuple[Path, Path]:
    """Write ``TASK.json`` and ``TASK.md`` and return their paths.

    Where the result of a whole run is there, what says less stands beside it: a shortened run's as ``TASK-quick``, a
    development part's as ``TASK-dev``, one of fewer seeds as ``TASK-seed-0-1``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = _name(result, folder)
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    result = {**result, "figures": draw(result, folder, name)}
    data.write_text(json.dumps(for_json(result), indent=1) + "\n", encoding="utf-8")
    page.write_text(markdown(result) + _examples(outcomes[0], kind), encoding="utf-8")
    return data, page


def _name(result: Mapping[str, Any], folder: Path) -> str:
    task = str(result["task"])
    try:
        there = json.loads((folder / f"{task}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return task
    seeds = result["seeds"]
    known = (there.get("evidence"), there.get("final"), len(there.get("seeds") or ()))
    if not known[0] or known <= (result["evidence"], result["final"], len(seeds)):
        return task
    lesser = "quick" if not result["evidence"] else "dev" if known[1] and not result["final"] else ""
    return f"{task}-{lesser or '-'.join(map(str, ('seed', *seeds)))}"


def markdown(result: Mapping[str, Any]) -> str:
    """Render the tables."""
    lines = [f"# {result['task']}", "", *cautions(result)]
    part = "held-back last fifth" if result["final"] else "development part (the last fifth stays closed)"
    lines += [
        f"{result['users']} users, {result['queries']} queries, {part}; metric: {result['metric']}; "
        f"seeds {result['seeds']}; base {result['base']}. Made by `{result['command']}`.",
        "",
        f"Intervals resample {result['clustered_by']}; p flips users.",
        "",
    ]
    lines += _arm_rows(result["arms"])
    claimed = text_report.table(result["arms"], result["rouge_beats_lead"])
    parts = [*lines, claimed, *_test_rows(result["tests"]), *worst_rows(result["tests"]), *_user_rows(result["tests"])]
    return "\n".join(parts) + "\n" + sections(result)


def _arm_rows(arms: Mapping[str, Any]) -> list[str]:
    lines = [
        "| arm | over queries | 95 % | seeds | over users | log loss | macro-F1 | RMSE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    judged = {name: arm for name, arm in arms.items() if "metric" not in arm}  # others stand by what they wrote
    for name, arm in sorted(judged.items(), key=lambda pair: -pair[1]["query_mean"]):
        rest = " | ".join(f"{arm[field]:.3f}" if field in arm else "" for field in ("log_loss", "macro_f1", "rmse"))
        lines.append(
            f"| {name} | {arm['query_mean']:.3f} | {between(arm['ci'])} | {_spread(arm['seeds'])} "
            f"| {arm['user_mean']:.3f} | {rest} |"
        )
    return lines


def _test_rows(tests: Mapping[str, Any]) -> list[str]:
    adjusted = sum(t["holm_p"] is not None for t in tests.values())
    lines = [
        f"| contrast | over queries | 95 % | p (Holm, of this task's {adjusted}) | over users | 95 % | p "
        f"| wins/ties/losses | detectable | without the top {TOP_USERS} | without users of one label |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    seeds = max((t["seeds"] for t in tests.values()), default=0)
    for name, t in tests.items():
        few = f" ({t['seeds']} of {seeds} seeds)" if t["seeds"] < seeds else ""
        star = _p(t["p"]) + (f" ({_p(t['holm_p'])})" if t["holm_p"] is not None else "")
        lines.append(
            f"| {name}{few} | {t['difference']:+.4f} | {between(t['ci'], '+.4f')} | {star} "
            f"| {t['user_difference']:+.4f} | {between(t['user_ci'], '+.4f')} | {_p(t['user_p'])} "
            f"| {t['wins']}/{t['ties']}/{t['losses']} | {_number(t['detectable'], '.4f')} "
            f"| {_number(t['without_top'], '+.4f')} | {_number(t['without_single_label'], '+.4f')} |"
        )
    return lines


def for_json(value: Any) -> Any:
    """Return a value for JSON, which has no word for what is not a number (one user's detectable effect)."""
    if isinstance(value, Mapping):
        return {key: for_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _spread(seeds: Sequence[float]) -> str:
    return f"{min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else ""


def _user_rows(tests: Mapping[str, Any]) -> list[str]:
    """Show a case study's primary contrasts user by user."""
    shown = {
        n: t["by_user"] for n, t in tests.items() if t.get("by_user") and n.startswith(("P1", "P2", "P3", "fused"))
    }
    if not shown:
        return []
    lines = ["", "| contrast | each user's difference, 95 % by moving blocks |", "|---|---|"]
    for name, users in shown.items():
        cells = "; ".join(f"{u['difference']:+.3f} ({between(u['ci'], '+.3f') or 'few'})" for u in users)
        lines.append(f"| {name} | {cells} |")
    return lines


def _p(value: float | None) -> str:
    return _number(value, ".4f")


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:{form}}"


def _differences(seeds: Sequence[Mapping[str, Sequence[Array]]]) -> dict[str, list[Array]]:
    """Return each contrast's per-query differences by user, over the seeds that ran both arms; ``seeds`` are each
    one's merits by arm and user."""
    pairs = _pairs(seeds[0])
    return {name: _mean([_less(m[a], m[b]) for m in seeds if a in m and b in m]) for name, (a, b) in pairs.items()}


def _pairs(merits: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return each contrast's two arms, of those that ran."""
    pairs: dict[str, tuple[str, str]] = {}
    if "oppu" in merits:
        if CHOSEN_PROMPT in merits:
            pairs[P1] = (CHOSEN_OPPU, CHOSEN_PROMPT)
        pairs |= {n: ("oppu", c) for n, c in ((P2_VOLUME, "volume"), (P2_PERMUTED, "permuted")) if c in merits}
        pairs["increments up to the cut - oppu"] = ("frozen", "oppu")
        others = ("none", "stranger-nearest", "union", "prior", "evidence")
        pairs |= {f"oppu - {c}": ("oppu", c) for c in others if c in merits}
        pairs |= {
            f"oppu+prior - {c}+prior": ("oppu+prior", f"{c}+prior")
            for c in ("volume", "permuted", "stranger-0")
            if f"{c}+prior" in merits
        }
    if "fused" in merits:
        pairs |= {f"{FUSED_LESS}{c}": ("fused", c) for c in merits if c != "fused"}
    return pairs


def _prequential(outcomes: Sequence[Outcome], kind: Kind) -> dict[str, list[Array]]:
    """P3: fused less evidence over all events after each user's sixteenth; and by length of history."""
    people, found = outcomes[0].people, {}
    bounds = [*BANDS, 10**9]
    spans = {P3: (16, 10**9)}
    for low, high in zip(bounds, bounds[1:], strict=False):
        end = f"{high}" if high < bounds[-1] else "the end"
        spans[f"fused - evidence, events {low} to {end}"] = (low, high)
    for measure in ("",) if kind == "text" else ("", ", nats saved"):
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
            if sum(len(part) > 0 for part in parts) > 1:
                found[name + measure] = parts
    return found


def _tested(parts: Sequence[Array], of: Sequence[int]) -> Contrast:
    some = [k for k, part in enumerate(parts) if len(part)]
    return contrast([parts[k] for k in some], [of[k] for k in some])


def _case(parts: Sequence[Array], people: Sequence[Person]) -> dict[str, Any]:
    """Return what is said of few users instead of a population's p: each one's own interval."""
    users = [
        {"user": person.user_id, "difference": float(part.mean()), "ci": block_interval(part)}
        for person, part in zip(people, parts, strict=False)
        if len(part)
    ]
    return {"p": None, "user_p": None, "by_user": users}


def _of_many_labels(parts: Sequence[Array], people: Sequence[Person]) -> float | None:
    """Return the mean over queries of the users who gave more than one output."""
    pairs = zip(parts, people, strict=False)
    some = [part for part, p in pairs if len(part) and len({item.output for item in p.items}) > 1]
    return float(np.concatenate(some).mean()) if some else None


def _rmse(outcomes: Sequence[Outcome], name: str) -> float:
    errors = [squared_error(p.test, s) for o in outcomes for p, s in zip(o.people, o.arms.held[name], strict=True)]
    return float(np.sqrt(np.concatenate(errors).mean()))


def _mean(seeds: Sequence[Sequence[Array]]) -> list[Array]:
    """Return the mean over seeds, by user."""
    return [np.mean(same, axis=0) for same in zip(*seeds, strict=True)]


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
    if "fused" not in arms:
        return ""
    merits = {name: _merits(outcome, name, kind) for name in ("evidence", "fused")}
    if kind == "text":
        better, worse = text_report.examples(outcome.people, merits, outcome.arms.texts, _SHOWN)
        head = "| input | the user's | evidence | fused | nats a token |\n|---|---|---|---|---|\n"
        parts = [("Foreseen better with the adapter", better), ("Foreseen worse with it", worse)]
        return "".join(f"\n{title}\n\n{head}" + "\n".join(rows) + "\n" for title, rows in parts)
    mended: list[str] = []
    spoilt: list[str] = []
    for at, person in enumerate(outcome.people):
        before, after = merits["evidence"][at], merits["fused"][at]
        for k, item in enumerate(person.test):
            if before[k] != after[k]:
                answers = [answer(item, arms[name][at][k], kind) for name in ("evidence", "fused")]
                text = " ".join(item.input.split())[:110].replace("|", "/")
                row = f"| {text} | {item.output} | {answers[0]} | {answers[1]} |"
                (mended if after[k] > before[k] else spoilt).append(row)
    head = "| input | the user's | evidence | fused |\n|---|---|---|---|\n"
    parts = [("Mended by the adapter", mended), ("Spoilt by the adapter", spoilt)]
    return "".join(f"\n{title}: {len(rows)}\n\n{head}" + "\n".join(rows[:_SHOWN]) + "\n" for title, rows in parts)
