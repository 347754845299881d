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
MOST_USERS = 1000


@dataclass(frozen=True, slots=True)
class Asked:
    """One event that was asked about, each arm's answer (``None``: no answer came, or an error), and the answer with
    each stranger's adapter."""

    event: BehaviorEvent = field(repr=False)
    outputs: Mapping[str, str | None] = field(repr=False)
    wrong: Sequence[str] = field(default=(), repr=False)

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


class WrongUser:
    """Answers as the service would if users had each other's adapters."""

    def __init__(self, settings: Settings, store: HistoryStore) -> None:
        """Load the base.

        Args:
            settings: The running service's.
            store: Its store.
        """
        from oppu.lm.base import load_base

        self._settings, self._store, self._metrics = settings, store, fresh()
        self._base = load_base(settings.model)
        self._retriever = compose.retriever(settings, store, compose.query_encoder(settings), self._metrics)

    def outputs(self, events: Sequence[BehaviorEvent]) -> list[list[str]]:
        """Answer every event with all three parts, the adapter being another user's, from the store as it is now.

        Args:
            events: What was asked about.

        Returns:
            For each event, one output a stranger.
        """
        asks = [_ask(self._settings, event) for event in events]
        answers: list[list[str]] = [[] for _ in events]
        for shift in range(1, STRANGERS + 1):
            for own, output in zip(answers, self._with_adapters_moved(asks, shift), strict=True):
                own.append(output)
        return answers

    def _with_adapters_moved(self, asks: "Sequence[Ask]", shift: int) -> list[str]:
        from inference.adapters import AdapterShelf
        from inference.answers import AnswerWriter
        from inference.engine import Engine, Parts
        from oppu.clock import SystemClock
        from oppu.lm.model import TorchModel

        settings, clock = self._settings, SystemClock()
        slots = len({ask.user_id for ask in asks})
        # a fresh bank: a version keeps its name and has other weights
        model = TorchModel(self._base, compose.tasks(settings), settings=settings.model, slots=slots)
        heads = _heads(self._store, model.base)
        source = _Strangers(compose.registry(settings, model.base, model.adapter_config()), heads, shift)
        shelf = AdapterShelf(source, model, self._store, self._metrics, clock)
        parts, writer = Parts(self._store, self._retriever, model, shelf), AnswerWriter(settings)
        engine = Engine(parts, writer, settings, self._metrics, clock, fusion=compose.fusion(settings))
        outputs: list[str] = []
        while len(outputs) < len(asks):
            for answer in engine.answer(asks[len(outputs) :], clock.now()):
                outputs.append(Prediction.model_validate_json(answer.out.value or b"").output or "")
        model.close()
        return outputs


def _heads(store: HistoryStore, base: BaseId) -> dict[UserId, AdapterRef]:
    statuses = store.adapters(base, limit=MOST_USERS)
    states = store.users([status.user_id for status in statuses], base)
    return {user: AdapterRef(user, s.epoch, s.head.version) for user, s in states.items() if s.head is not None}


def _ask(settings: Settings, event: BehaviorEvent) -> "Ask":
    from inference.admission import Ask

    task = compose.tasks(settings).require(event.task)
    request = PredictionRequest(
        request_id=f"wrong-{event.event_id}", user_id=event.user_id, task=event.task, input=event.input
    )
    origin = Record(Partition("", 0), 0, 0, event.user_id.encode(), None)
    return Ask(origin, request, task, task.allowed(event.choices), None)
