"""Effects: what a step does to the world, one at a time, in an order the step decides.

A step is a generator. It yields an :class:`Effect`; whoever drives it performs the effect and sends the
result back in. The worker loop performs each; the simulator may crash before or after any of them, make one fail, or
let it happen and lose the acknowledgement. A step therefore never writes, produces or commits by itself.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Effect:
    """One write, produce, commit or seek.

    Attributes:
        name: ``port.verb``, for example ``store.write_events``; goes into traces and logs.
        run: Performs it and returns its result.
        detail: A short, deterministic summary for the trace; never a payload.
    """

    name: str
    run: Callable[[], Any] = field(repr=False)
    detail: str = ""


Steps = Generator[Effect, Any, T]


def perform(steps: Steps[T]) -> T:
    """Drive a step to its end, performing every effect.

    Args:
        steps: The running step.

    Returns:
        What the step returns. An effect's error is thrown into the step, and leaves here if the step lets it.
    """
    try:
        effect = next(steps)
        while True:
            try:
                result = effect.run()
            except Exception as error:  # handed to the step, which decides; re-raised unless it handles it
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
