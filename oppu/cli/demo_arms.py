"""The demo's arms: the same questions with each part switched on and off, and the wrong-user control.

The control is computed here, beside the service: no request may name another user's adapter. It runs the inference
stage's own code on the same store, with one thing changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from oppu.cli import compose
from oppu.client import Client
from oppu.lm.port import AdapterRef, AdapterSource, Tensors
from oppu.metrics import fresh
from oppu.settings import Settings
from oppu.store.port import HistoryStore
from oppu.values import BaseId, Partition, Record, UserId
from oppu.wire import BehaviorEvent, Prediction, PredictionRequest, RequestOptions

if TYPE_CHECKING:
    from inference.admission import Ask

ARMS: Mapping[str, RequestOptions] = {
    "none": RequestOptions(retrieve=0, profile=False, adapter=False),
    "retrieval": RequestOptions(profile=False, adapter=False),
    "retrieval_profile": RequestOptions(adapter=False),
    "adapter": RequestOptions(retrieve=0, profile=False),
    "all": RequestOptions(),
}
"""Arm to what is switched on; ``retrieve`` unset means the service's own k."""
STRANGERS = 3
"""Other users whose adapters stand in for the user's own, each in turn."""
ANSWER_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One event that was asked about, and each arm's answer (``None``: no answer came, or an error)."""

    event: BehaviorEvent = field(repr=False)
    outputs: Mapping[str, str | None] = field(repr=False)

    def right(self, arm: str) -> bool:
        """Say whether the arm foresaw what the user did."""
        return self.outputs[arm] == self.event.output


def ask_arms(
    client: Client, events: Sequence[BehaviorEvent], arms: Mapping[str, RequestOptions], *, prefix: str
) -> list[Asked]:
    """Ask about every event in every arm and wait for all answers.

    Args:
        client: The application's side.
        events: What the users did; only the inputs are sent.
        arms: Options by arm.
        prefix: Put before the request ids ``{prefix}-{arm}-{event_id}``.

    Returns:
        One result an event, in order.
    """
    deadline = datetime.now(UTC) + timedelta(seconds=ANSWER_SECONDS)  # a whole wave waits in line at once
    requests = [
        PredictionRequest(
            request_id=f"{prefix}-{arm}-{event.event_id}",
            user_id=event.user_id,
            task=event.task,
            input=event.input,
            options=options,
            deadline=deadline,
        )
        for event in events
        for arm, options in arms.items()
    ]
    answers = client.ask(requests, timeout_seconds=ANSWER_SECONDS)

    def output(event: BehaviorEvent, arm: str) -> str | None:
        answer = answers.get(f"{prefix}-{arm}-{event.event_id}")
        return answer.output if answer is not None else None

    return [Asked(event, {arm: output(event, arm) for arm in arms}) for event in events]


class _Strangers(AdapterSource):
    """Reads, for every user's head, another user's head instead."""

    def __init__(self, source: AdapterSource, heads: Mapping[UserId, AdapterRef], shift: int) -> None:
        users = sorted(heads)
        self._source = source
        self._stranger = {user: heads[users[(at + shift) % len(users)]] for at, user in enumerate(users)}

    def load(self, ref: AdapterRef) -> Tensors:
        return self._source.load(self._stranger[ref.user_id])


def wrong_user_outputs(settings: Settings, store: HistoryStore, events: Sequence[BehaviorEvent]) -> list[list[str]]:
    """Answer every event with all three parts, the adapter being another user's.

    Args:
        settings: The running service's.
        store: Its store, as the final requests saw it.
        events: What was asked about.

    Returns:
        For each event, one output a stranger.
    """
    from inference.adapters import AdapterShelf
    from inference.answers import AnswerWriter
    from inference.engine import Engine, Parts
    from oppu.clock import SystemClock

    metrics, clock, writer = fresh(), SystemClock(), AnswerWriter(settings)
    retriever = compose.retriever(settings, store, compose.embedder(settings), metrics)
    users = len({event.user_id for event in events})
    asks = [_ask(settings, event) for event in events]
    answers: list[list[str]] = [[] for _ in events]
    for shift in range(1, STRANGERS + 1):
        model = compose.model(settings, slots=users)  # a fresh bank: a version keeps its name and has other weights
        registry, heads = compose.registry(settings, model.base), _heads(store, model.base, events)
        shelf = AdapterShelf(_Strangers(registry, heads, shift), model, store, metrics, clock)
        parts = Parts(store, retriever, model, shelf)
        engine = Engine(parts, writer, settings, metrics, clock, fusion=compose.fusion(settings))
        done = 0
        while done < len(asks):
            for answer in engine.answer(asks[done:], clock.now()):
                answers[done].append(Prediction.model_validate_json(answer.out.value or b"").output or "")
                done += 1
    return answers


def _heads(store: HistoryStore, base: BaseId, events: Sequence[BehaviorEvent]) -> dict[UserId, AdapterRef]:
    states = store.users(sorted({UserId(event.user_id) for event in events}), base)
    return {user: AdapterRef(user, s.head.epoch, s.head.version) for user, s in states.items() if s.head is not None}


def _ask(settings: Settings, event: BehaviorEvent) -> "Ask":
    from inference.admission import Ask

    task = compose.tasks(settings).require(event.task)
    request = PredictionRequest(
        request_id=f"wrong-{event.event_id}", user_id=event.user_id, task=event.task, input=event.input
    )
    origin = Record(Partition("", 0), 0, 0, event.user_id.encode(), None)
    return Ask(origin, request, task, task.allowed(event.choices), None)
