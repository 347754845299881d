"""Compute the answers of one step: users, evidence, adapters, model, fusion.

Reads and computes only; nothing is written or sent here. Invariants: one state of each user for a whole step,
read in one query; a row's answer depends on its own request, history and adapter, whatever its batch-mates.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from inference.adapters import AdapterShelf, Placed
from inference.admission import Ask
from inference.answers import EMPTY_GENERATION, Answer, AnswerWriter
from inference.attempt import Attempt
from inference.blending import DEFAULT as DEFAULT_TEXT
from inference.blending import TextFusion
from inference.evidence import HistoryRetriever, Personal, expect, gather
from inference.weighing import Weighed, weigh
from oppu.clock import Clock
from oppu.errors import ModelLost, OppuError, Reason
from oppu.fusion import DEFAULT, Fusion, pick
from oppu.lm.blend import Blend
from oppu.lm.faults import device_fault, out_of_memory
from oppu.lm.port import LanguageModel, Row, Scored
from oppu.metrics import Metrics
from oppu.settings import Settings
from oppu.store.port import HistoryStore
from oppu.values import Record, UserId, UserState

logger = logging.getLogger(__name__)

STEP_BUDGET_SECONDS = 2.0
"""After this much computing a step sends what it has and leaves the rest to the next one: answers do not wait for
a thousand others, and the loop keeps polling."""

PIECE_TOKENS = 2048
"""So many tokens may be written in one piece, a lone text's aside, since time is not looked at before the model is
done: 64 texts of the usual limit. At worst, where no two texts are of a length, it is as many steps of the model."""


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
            ModelLost: The model computes nothing any more.
        """
        if not asks:
            self.forget()
            return []
        watch = _Stopwatch(self._clock, self._metrics)
        with watch.stage("history"):
            states = self._parts.store.users(_users(asks), self._parts.model.base)
        wanted = dict.fromkeys(ask.user_id for ask in asks if ask.request.options.adapter)
        self._parts.shelf.expect(states[user] for user in wanted if user in states)
        left: Sequence[Ask] = ()
        self._expect(asks, states)
        try:
            answers = self._answer_pieces(asks, states, watch, now)
            left = asks[len(answers) :]
            return answers
        finally:
            self._expect(left, states)

    def forget(self) -> None:
        """Drop what was begun for asks that may not come again."""
        self._expect((), {})

    def _expect(self, asks: Sequence[Ask], states: Mapping[UserId, UserState]) -> None:
        expect(asks, states, self._parts.retriever, self._settings)

    def _answer_pieces(
        self, asks: Sequence[Ask], states: Mapping[UserId, UserState], watch: "_Stopwatch", now: datetime
    ) -> list[Answer]:
        """Work piece by piece: for what the step's time does not reach nothing has been searched in vain."""
        answers: list[Answer] = []
        tokens = [0 if ask.choices else self._longest(ask) for ask in asks]
        for piece in _pieces(asks, tokens, self._settings.inference.batch):
            for chunk in _chunks(piece, states, self._settings.inference.resident_adapters):
                answers.extend(self._answer_chunk(chunk, states, watch.fork(), now))
                if watch.elapsed() >= STEP_BUDGET_SECONDS:
                    return answers
        return answers

    def _answer_chunk(
        self, chunk: Sequence[Ask], states: Mapping[UserId, UserState], watch: "_Stopwatch", now: datetime
    ) -> list[Answer]:
        """Judge deadlines once more: the chunks before this one took their time."""
        at = self._clock.now()
        attempts, results = self._attempted([ask for ask in chunk if not ask.late(at)], states, watch)
        weighed = weigh(attempts, results, self._fusion)
        done = iter(
            self._finish(attempt, result, said, watch.timings(attempt.ask, now))
            for attempt, result, said in zip(attempts, results, weighed, strict=True)
        )
        return [late_answer(self._writer, a, watch.timings(a, now)) if a.late(at) else next(done) for a in chunk]

    def _attempted(
        self, asks: Sequence[Ask], states: Mapping[UserId, UserState], watch: "_Stopwatch"
    ) -> tuple[list[Attempt], list[Scored | None]]:
        """Ask the model, and gather evidence: before it where a row holds any, else after it.

        Queries are embedded while the model runs, so what it does not need beforehand is there by then. Where the
        store goes away meanwhile, it has run in vain.
        """
        reading = [i for i, ask in enumerate(asks) if self._reads_evidence(ask)]
        personal = self._gathered(asks, reading, states, watch)
        with watch.stage("adapters"):
            placed = self._placed(asks, states)
        rows = [self._row(ask, placed[i], personal.get(i)) for i, ask in enumerate(asks)]
        with watch.stage("model"):
            results = self._run(rows, [ask.user_id for ask in asks])
        personal |= self._gathered(asks, [i for i in range(len(asks)) if i not in personal], states, watch)
        attempts = [Attempt(ask, personal[i], placed[i], rows[i]) for i, ask in enumerate(asks)]
        return attempts, results

    def _gathered(
        self, asks: Sequence[Ask], places: Sequence[int], states: Mapping[UserId, UserState], watch: "_Stopwatch"
    ) -> dict[int, Personal]:
        """Return what is known of the users behind the asks at these places, by place."""
        if not places:
            return {}
        with watch.stage("retrieve"):
            found = gather([asks[i] for i in places], states, self._parts.retriever, self._settings)
        return dict(zip(places, found, strict=True))

    def _placed(self, asks: Sequence[Ask], states: Mapping[UserId, UserState]) -> list[Placed]:
        """Bring the asks' adapters into the bank."""
        wanted = [_wanted(ask, states) for ask in asks]
        users = {state.user_id: state for state in wanted if state is not None}
        shelf = self._parts.shelf.place(users.values()) if users else {}
        return [Placed(None) if state is None else shelf[state.user_id] for state in wanted]

    def _reads_evidence(self, ask: Ask) -> bool:
        """Say whether an ask's row holds evidence: in its prompt, or in the caches of a text."""
        return not ask.choices or self._settings.model.prompts_hold_evidence(ask.choices)

    def _row(self, ask: Ask, placed: Placed, personal: Personal | None) -> Row:
        """Make the model's row; ``personal`` is what its evidence is taken from, ``None`` where it holds none."""
        # evidence is weighed in scores and caches; a base that was not adapted on such prompts is misled by them
        shown = personal if self._settings.model.prompts_hold_evidence(ask.choices) else None
        return Row(
            task=ask.task.name,
            input=ask.request.input,
            evidence=() if shown is None else tuple((hit.event.input, hit.event.output) for hit in shown.hits),
            profile="" if shown is None or shown.profiled is None else shown.profiled.line,
            choices=ask.choices,
            adapter=placed.ref,
            max_new_tokens=self._longest(ask),
            blend=None if ask.choices or personal is None else self._blend(ask, placed, personal),
            late=lambda: ask.late(self._clock.now()),
        )

    def _longest(self, ask: Ask) -> int:
        """Return how many tokens an ask's text may have."""
        asked = ask.request.options.max_new_tokens
        return min(ask.task.max_new_tokens if asked is None else asked, self._settings.limits.max_new_tokens)

    def _blend(self, ask: Ask, placed: Placed, personal: Personal) -> Blend:
        texts, adapter = personal.caches(ask.request.input), placed.ref is not None
        return self._text_fusion.blend(texts, personal.sequence, adapter=adapter, earned=personal.earned)

    def _run(self, rows: Sequence[Row], users: Sequence[UserId]) -> list[Scored | None]:
        """Run the model; rows on which it fails are ``None``, unless it seems to fail on everything.

        A lone user's failure is always taken as a row's: so a batch that ends the process again and again is answered
        in the end, once its records are taken one at a time.
        """
        results, count = self._results(rows), len(set(users))
        if count > 1 and all(result is None for result in results) and not self._works(rows[0].task):
            raise ModelLost(f"the model failed on all rows of {count} users, and on a plain one")
        return results

    def _works(self, task: str) -> bool:
        """Ask something that no user's row can have spoilt."""
        return self._results([Row(task, "words", choices=("yes", "no"))]) != [None]

    def _results(self, rows: Sequence[Row]) -> list[Scored | None]:
        """Run the model; where a chunk fails, row by row, so that one bad row costs only its own answer."""
        if not rows:
            return []
        try:
            return list(self._parts.model.answer(rows))
        except OppuError:
            raise
        except Exception as error:  # whatever a model may raise; what the process cannot outlive goes on
            if out_of_memory(error):
                raise
            logger.exception("model failed on %d rows", len(rows))
            if (lost := device_fault(error)) is not None:
                raise lost from error
        if len(rows) == 1:
            return [None]
        return [result for row in rows for result in self._results([row])]

    def _finish(
        self, attempt: Attempt, result: Scored | None, weighed: Weighed | None, timings: Mapping[str, float]
    ) -> Answer:
        ask, base = attempt.ask, self._parts.model.base
        if result is None:
            return self._writer.error(ask, Reason.INTERNAL_ERROR, "the model failed on this request", timings)
        if weighed is None:
            if result.late:
                return late_answer(self._writer, ask, timings)
            text = (result.text or "").strip().encode("utf-8", "replace").decode()
            if not text:
                return self._writer.error(ask, EMPTY_GENERATION, "the model wrote no text", timings)
            provenance = attempt.provenance(base, result, attempt.writers(result))
            return self._writer.ok(ask, text, None, provenance, timings)
        if np.isnan(weighed.probabilities).any():
            return self._writer.error(ask, Reason.INTERNAL_ERROR, "the model's scores are not numbers", timings)
        output = pick(ask.task.kind, ask.choices, weighed.probabilities)
        scores = dict(zip(ask.choices, weighed.probabilities.tolist(), strict=True))
        return self._writer.ok(ask, output, scores, attempt.provenance(base, result, weighed.heard), timings)


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


def _wanted(ask: Ask, states: Mapping[UserId, UserState]) -> UserState | None:
    """Return the user's state where an adapter is asked for and there is one."""
    state = states.get(ask.user_id)
    return state if ask.request.options.adapter and state is not None and state.head else None


def _pieces(asks: Sequence[Ask], tokens: Sequence[int], rows: int) -> Iterator[list[Ask]]:
    """Cut in order, into at most ``rows`` asks that write at most ``PIECE_TOKENS``, or among which one text writes."""
    piece: list[Ask] = []
    written = 0
    for ask, own in zip(asks, tokens, strict=True):
        if len(piece) == rows or (written and own and written + own > PIECE_TOKENS):
            yield piece
            piece, written = [], 0
        piece.append(ask)
        written += own
    if piece:
        yield piece


def _chunks(asks: Sequence[Ask], states: Mapping[UserId, UserState], adapters: int) -> Iterator[list[Ask]]:
    """Cut in order, into chunks with at most ``adapters`` different adapters."""
    chunk: list[Ask] = []
    users: set[UserId] = set()
    for ask in asks:
        user = {ask.user_id} if _wanted(ask, states) is not None else set()
        if chunk and len(users | user) > adapters:
            yield chunk
            chunk, users = [], set()
        chunk.append(ask)
        users |= user
    if chunk:
        yield chunk


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
        self.milliseconds[name] = round(self.milliseconds.get(name, 0.0) + seconds * 1000, 3)

    def timings(self, ask: Ask, began: datetime) -> dict[str, float]:
        """Return milliseconds by stage; ``queue`` is from the record's time to the step, never below zero."""
        queued = waited_seconds(ask.record, began) * 1000
        return {"queue": round(queued, 3), **self.milliseconds}
