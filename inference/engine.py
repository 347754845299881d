"""Compute the answers of one step: users, evidence, adapters, model, fusion.

Reads and computes only; nothing is written or sent here. Invariants: one state of each user for a whole step,
read in one query; a row's answer depends on its own request, history and adapter, whatever its batch-mates.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np

from inference.adapters import AdapterShelf, Placed
from inference.admission import Ask
from inference.answers import EMPTY_GENERATION, Answer, AnswerWriter
from inference.blending import DEFAULT as DEFAULT_TEXT
from inference.blending import TextFusion
from inference.evidence import HistoryRetriever, Personal, gather
from oppu.clock import Clock
from oppu.errors import OppuError, Reason
from oppu.fusion import DEFAULT, Fusion, Sources, log_softmax, pick, sources_of
from oppu.lm.blend import Blend
from oppu.lm.port import LanguageModel, Row, Scored
from oppu.metrics import Metrics
from oppu.settings import Settings
from oppu.store.port import HistoryStore
from oppu.values import Record, UserId, UserState
from oppu.wire import Degraded, Provenance

logger = logging.getLogger(__name__)

Part = Literal["retrieval", "profile", "adapter"]

STEP_BUDGET_SECONDS = 2.0
"""After this much computing a step sends what it has and leaves the rest to the next one: answers do not wait for
five hundred others, and the loop keeps polling."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An ask with what is known of its user."""

    ask: Ask
    personal: Personal

    @property
    def wants_adapter(self) -> UserState | None:
        """The user's state where an adapter is asked for and there is one."""
        state = self.personal.state
        return state if self.ask.request.options.adapter and state is not None and state.head else None


@dataclass(frozen=True, slots=True)
class Parts:
    """What the engine reads and computes with."""

    store: HistoryStore
    retriever: HistoryRetriever
    model: LanguageModel
    shelf: AdapterShelf


class Engine:
    """Answers asks in chunks."""

    def __init__(
        self,
        parts: Parts,
        writer: AnswerWriter,
        settings: Settings,
        metrics: Metrics,
        clock: Clock,
        *,
        fusion: Fusion = DEFAULT,
        text_fusion: TextFusion = DEFAULT_TEXT,
    ) -> None:
        self._parts, self._writer, self._settings = parts, writer, settings
        self._metrics, self._clock, self._fusion, self._text_fusion = metrics, clock, fusion, text_fusion

    def answer(self, asks: Sequence[Ask], now: datetime) -> list[Answer]:
        """Answer asks in order, as many as the step's time allows, at least one chunk.

        Args:
            asks: Admitted requests.
            now: When the step began.

        Returns:
            Answers of the first asks; all of them unless time ran out.

        Raises:
            TransientError: Store, retriever or registry is unavailable; nothing was answered.
            FatalError: Another user's data came up.
        """
        if not asks:
            return []
        watch = _Stopwatch(self._clock, self._metrics)
        with watch.stage("history"):
            states = self._parts.store.users(_users(asks), self._parts.model.base)
        wanted = dict.fromkeys(ask.user_id for ask in asks if ask.request.options.adapter)
        self._parts.shelf.expect(states[user] for user in wanted if user in states)
        answers: list[Answer] = []
        size = self._settings.inference.batch
        # evidence is gathered piece by piece: what the step's time does not reach has not been searched for in vain
        for first in range(0, len(asks), size):
            piece = watch.fork()
            with piece.stage("retrieve"):
                personal = gather(asks[first : first + size], states, self._parts.retriever, self._settings.retriever)
            prepared = [Prepared(*known) for known in zip(asks[first : first + size], personal, strict=True)]
            for chunk in _chunks(prepared, size, self._settings.inference.resident_adapters):
                answers.extend(self._answer_chunk(chunk, piece.fork(), now))
            if watch.elapsed() >= STEP_BUDGET_SECONDS:
                break
        return answers

    def _answer_chunk(self, chunk: Sequence[Prepared], watch: "_Stopwatch", now: datetime) -> list[Answer]:
        """Judge deadlines once more: the chunks before this one took their time."""
        at = self._clock.now()
        timely = [p for p in chunk if not p.ask.late(at)]
        with watch.stage("adapters"):
            states = {s.user_id: s for p in timely if (s := p.wants_adapter) is not None}
            shelf = self._parts.shelf.place(states.values()) if states else {}
        placed = [_placed(p, shelf) for p in timely]
        rows = [self._row(p, place) for p, place in zip(timely, placed, strict=True)]
        with watch.stage("model"):
            results = self._run(rows)
        done = iter(
            self._finish(p, place, result, watch.timings(p.ask, now))
            for p, place, result in zip(timely, placed, results, strict=True)
        )
        return [
            late_answer(self._writer, p.ask, watch.timings(p.ask, now)) if p.ask.late(at) else next(done) for p in chunk
        ]

    def _row(self, prepared: Prepared, placed: Placed) -> Row:
        ask, personal = prepared.ask, prepared.personal
        asked = ask.request.options.max_new_tokens
        tokens = ask.task.max_new_tokens if asked is None else asked
        # evidence is weighed in scores and caches; a base that was not adapted on such prompts is misled by them
        prompted = self._settings.model.prompt_evidence in (("all",) if ask.choices else ("text", "all"))
        return Row(
            task=ask.task.name,
            input=ask.request.input,
            evidence=tuple((hit.event.input, hit.event.output) for hit in personal.hits) if prompted else (),
            profile=personal.profiled.line if prompted and personal.profiled is not None else "",
            choices=ask.choices,
            adapter=placed.ref,
            max_new_tokens=min(tokens, self._settings.limits.max_new_tokens),
            blend=None if ask.choices else self._blend(prepared, placed),
            late=lambda: ask.late(self._clock.now()),
        )

    def _blend(self, prepared: Prepared, placed: Placed) -> Blend:
        texts = prepared.personal.caches(prepared.ask.request.input)
        personal, adapter = prepared.personal, placed.ref is not None
        return self._text_fusion.blend(texts, personal.sequence, adapter=adapter, earned=personal.earned)

    def _run(self, rows: Sequence[Row]) -> list[Scored | None]:
        """Run the model; where a chunk fails, row by row, so that one bad row costs only its own answer."""
        if not rows:
            return []
        try:
            return list(self._parts.model.answer(rows))
        except OppuError:
            raise
        except Exception as error:  # whatever a model may raise; exhausted memory goes on
            if _out_of_memory(error):
                raise
            logger.exception("model failed on %d rows", len(rows))
        if len(rows) == 1:
            return [None]
        return [result for row in rows for result in self._run([row])]

    def _finish(
        self, prepared: Prepared, placed: Placed, result: Scored | None, timings: Mapping[str, float]
    ) -> Answer:
        ask = prepared.ask
        if result is None:
            return self._writer.error(ask, Reason.INTERNAL_ERROR, "the model failed on this request", timings)
        provenance = self._provenance(prepared, placed)
        if not ask.choices:
            if result.late:
                return late_answer(self._writer, ask, timings)
            text = (result.text or "").strip().encode("utf-8", "replace").decode()
            if not text:
                return self._writer.error(ask, EMPTY_GENERATION, "the model wrote no text", timings)
            return self._writer.ok(ask, text, None, provenance, timings)
        personal = prepared.personal
        if personal.retrieved is None and personal.profile is None:  # nothing was asked to stand beside the model
            log_p = log_softmax(result.scores if placed.ref is not None else result.base_scores)
        else:
            log_p = self._fusion.scores(_sources(prepared, placed, result), personal.sequence, personal.earned)
        if np.isnan(log_p).any():
            return self._writer.error(ask, Reason.INTERNAL_ERROR, "the model's scores are not numbers", timings)
        probabilities = np.exp(log_p)
        output = pick(ask.task.kind, ask.choices, probabilities)
        scores = {choice: float(p) for choice, p in zip(ask.choices, probabilities, strict=True)}
        return self._writer.ok(ask, output, scores, provenance, timings)

    def _provenance(self, prepared: Prepared, placed: Placed) -> Provenance:
        personal = prepared.personal
        degraded = personal.degraded(behind=prepared.ask.behind)
        if placed.fallback is not None:
            degraded.append(Degraded(part="adapter", reason=str(placed.fallback)))
        used: dict[Part, bool] = {
            "retrieval": bool(personal.seen),
            "profile": personal.profiled is not None,
            "adapter": placed.ref is not None,
        }
        return Provenance(
            base=self._parts.model.base,
            adapter_version=placed.ref.version if placed.ref is not None else None,
            profile_version=personal.profiled.version if personal.profiled is not None else None,
            retrieved=personal.seen,
            history_sequence=personal.sequence,
            used=tuple(part for part, present in used.items() if present),
            degraded=tuple(degraded),
        )


def late_answer(writer: AnswerWriter, ask: Ask, timings: Mapping[str, float] | None = None) -> Answer:
    """Answer an ask whose deadline has passed."""
    return writer.error(ask, Reason.DEADLINE_EXCEEDED, "deadline: passed before it could be answered", timings)


def waited_seconds(record: Record, now: datetime) -> float:
    """Return how long ago a record was made; 0 where its time lies ahead, or it has none (Kafka's -1)."""
    if record.timestamp_ms < 0:
        return 0.0
    return max(now.timestamp() - record.timestamp_ms / 1000, 0.0)


def _users(asks: Sequence[Ask]) -> list[UserId]:
    return list(dict.fromkeys(ask.user_id for ask in asks))


def _placed(prepared: Prepared, shelf: Mapping[UserId, Placed]) -> Placed:
    state = prepared.wants_adapter
    return shelf[state.user_id] if state is not None else Placed(None)


def _sources(prepared: Prepared, placed: Placed, result: Scored) -> Sources:
    profile, choices = prepared.personal.profiled, prepared.ask.choices
    return sources_of(
        result.base_scores,
        result.scores if placed.ref is not None else None,
        prepared.personal.knn(choices),
        profile.prior if profile is not None else {},
        choices,
    )


def _chunks(prepared: Sequence[Prepared], rows: int, adapters: int) -> Iterator[list[Prepared]]:
    """Cut in order, into at most ``rows`` rows with at most ``adapters`` different adapters."""
    chunk: list[Prepared] = []
    users: set[UserId] = set()
    for one in prepared:
        user = {one.ask.user_id} if one.wants_adapter is not None else set()
        if chunk and (len(chunk) == rows or len(users | user) > adapters):
            yield chunk
            chunk, users = [], set()
        chunk.append(one)
        users |= user
    if chunk:
        yield chunk


def _out_of_memory(error: Exception) -> bool:
    """Recognise it by name too: torch has its own, and only its wrapper may import torch."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


@dataclass(slots=True)
class _Stopwatch:
    """Seconds by stage, into metrics and into the answers' timings."""

    clock: Clock
    metrics: Metrics
    milliseconds: dict[str, float] = field(default_factory=dict)
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock.monotonic()

    def fork(self) -> "_Stopwatch":
        """Return a watch that has this one's stages so far."""
        return _Stopwatch(self.clock, self.metrics, dict(self.milliseconds))

    def elapsed(self) -> float:
        """Return seconds since it was made."""
        return self.clock.monotonic() - self.began

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        began = self.clock.monotonic()
        yield
        seconds = self.clock.monotonic() - began
        self.metrics.inference_stage.labels(name).observe(seconds)
        self.milliseconds[name] = round(seconds * 1000, 3)

    def timings(self, ask: Ask, began: datetime) -> dict[str, float]:
        """Return milliseconds by stage; ``queue`` is from the record's time to the step, never below zero."""
        queued = waited_seconds(ask.record, began) * 1000
        return {"queue": round(queued, 3), **self.milliseconds}
