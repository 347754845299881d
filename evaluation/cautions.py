"""What a result must not be taken for, said in front of its tables."""

from collections.abc import Mapping
from typing import Any

from evaluation.roles import ENOUGH_ITEMS, ENOUGH_JUDGES

SEEDS = 3
"""Of base and adapters, before anything counts as shown (protocol section 4)."""
_MANY_LEFT_OUT = 0.01
"""Of a task's items: past it those that do not fit it may be others than the rest."""


def cautions(result: Mapping[str, Any]) -> list[str]:
    """Render the warnings that a result's own fields call for.

    Args:
        result: The fields of ``TASK.json``.

    Returns:
        Lines of Markdown, a blank one after each.
    """
    data, adapting = result.get("data") or {}, result.get("items_that_adapt_the_base") or {}
    left, every = data.get("items_left_out", 0), data.get("items", 0) + data.get("items_left_out", 0)
    few = [f"{fold} on {count} items" for fold, count in adapting.items() if 0 < count < ENOUGH_ITEMS]
    judged = [
        f"{fold} by {count}" for fold, count in (result.get("calibrate_users") or {}).items() if count < ENOUGH_JUDGES
    ]
    bare = [fold for fold, count in adapting.items() if not count]
    seeds = len(set(result["seeds"]))
    untested, lacking = result.get("not_tested") or (), result.get("left_out") or ()
    said = {
        "A shortened run: not evidence.": not result["evidence"],
        f"{seeds} of the {SEEDS} seeds that a result takes: an indication.": seeds < SEEDS,
        "So few users are a case study: intervals of each, and no p of a population.": result["case_study"],
        "Users act on the same things: who is asked about one has not learnt it, but others may have.": result[
            "shared_items"
        ],
        f"There was nothing to adapt the base on in: {', '.join(bare)}; it is there as it came.": bare,
        f"The base was adapted on little: {', '.join(few)}.": few,
        f"Few users chose for all: {', '.join(judged)}; what nobody chose is the first of its kind.": judged,
        f"{left} of {every} items do not fit the task and are left out.": left > _MANY_LEFT_OUT * every,
        f"Not tested, for want of another target on the same base or of long histories: "
        f"{'; '.join(untested)}.": untested,
        f"Arms that not all users had, and none shows: {', '.join(lacking)}.": lacking,
    }
    return [line for text, holds in said.items() if holds for line in (f"**{text}**", "")]
