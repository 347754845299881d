"""The simulator finds what it is there for: each of these bugs, planted, breaks a run within two hundred seeds."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from inference.adapters import AdapterShelf, Placed
from inference.admission import Ask, HistoryGate, Verdict
from inference.answers import Answer, AnswerWriter
from inference.worker import InferenceWorker
from ingest.relay import Relay
from ingest.step import IngestWorker
from oppu.effects import Effect, Steps
from oppu.store import claims, ingest_writes
from oppu.store.database import upsert
from oppu.store.records import Claim, IngestBatch, IngestResult, NewAnswer, OffsetAdvance, OutboxRow
from oppu.store.schema import offsets
from oppu.values import UserId, UserState
from retriever.port import Profile, Query, Retrieved
from retriever.service import ProfileRequest, Retriever
from tests.simulation.run import simulate
from tests.simulation.spies import Violation
from updater.sweeping import Sweeper

SEEDS = 200
Plant = Callable[[pytest.MonkeyPatch], None]


def write_after_commit(patch: pytest.MonkeyPatch) -> None:
    """The offsets move first, the events follow in a transaction of their own."""
    _split(patch, lambda batch: (replace(batch, events=(), answers=(), refused=()), replace(batch, offsets=())))


def dead_letter_outside_the_transaction(patch: pytest.MonkeyPatch) -> None:
    """What is refused goes to the outbox after the events and the offsets."""

    def halves(batch: IngestBatch) -> tuple[IngestBatch, IngestBatch]:
        return replace(batch, refused=()), replace(batch, offsets=(), events=(), answers=())

    _split(patch, halves)


def no_offset_condition(patch: pytest.MonkeyPatch) -> None:
    """The next offset is overwritten, whatever it was."""

    def unconditional(connection: Connection, cluster_id: str, advances: Sequence[OffsetAdvance]) -> None:
        for advance in advances:
            row = {
                "cluster_id": cluster_id,
                "topic": advance.partition.topic,
                "partition": advance.partition.index,
                "next_offset": advance.next_offset,
                "topic_id": advance.topic_id,
            }
            insert = upsert(connection, offsets).values(row)
            connection.execute(insert.on_conflict_do_update(index_elements=offsets.primary_key.columns, set_=row))

    patch.setattr(ingest_writes, "advance_offsets", unconditional)


def publishing_without_token(patch: pytest.MonkeyPatch) -> None:
    """Whoever held a claim once may publish."""

    def anybody(connection: Connection, held: Claim) -> Any:
        return claims.adapter_row(connection, held.base, held.user_id)

    patch.setattr(claims, "_current", anybody)


def giving_back_forgives(patch: pytest.MonkeyPatch) -> None:
    """A claim that is given back leaves a user without attempts, as one that was concluded does."""

    def forgiving(connection: Connection, held: Claim) -> bool:
        current = claims._current(connection, held) is not None
        if current:
            claims.change_adapter(connection, held.base, held.user_id, claims.NO_CLAIM)
        return current

    patch.setattr(claims, "give_back", forgiving)


def cache_key_without_version(patch: pytest.MonkeyPatch) -> None:
    """What was placed for a user once is placed again."""
    place = AdapterShelf.place
    kept: dict[UserId, Placed] = {}

    def by_user(self: AdapterShelf, states: Any) -> dict[UserId, Placed]:
        users = list(states)
        kept.update(place(self, [state for state in users if self._known(state) is None]))  # type: ignore[attr-defined]
        return {state.user_id: kept[state.user_id] for state in users}

    def known(self: AdapterShelf, state: UserState) -> Placed | None:
        placed = kept.get(state.user_id)
        resident = placed is not None and placed.ref is not None and self._model.resident(placed.ref)
        return placed if resident else None

    patch.setattr(AdapterShelf, "_known", known, raising=False)
    patch.setattr(AdapterShelf, "place", by_user)


def cursor_without_epoch(patch: pytest.MonkeyPatch) -> None:
    """A user's view goes on where it stood, erased in between or not."""
    retrieve, profiles = Retriever.retrieve, Retriever.profiles

    def found(self: Retriever, queries: Sequence[Query], *rest: Any) -> list[Retrieved]:
        return retrieve(self, [replace(query, user=replace(query.user, epoch=0)) for query in queries], *rest)

    def summed(self: Retriever, requests: Sequence[ProfileRequest]) -> list[Profile]:
        return profiles(self, [(replace(state, epoch=0), task, before) for state, task, before in requests])

    patch.setattr(Retriever, "retrieve", found)
    patch.setattr(Retriever, "profiles", summed)


def no_seek_after_an_abort(patch: pytest.MonkeyPatch) -> None:
    """The transaction is left, the consumer stays where it is."""

    def stay(self: InferenceWorker, error: Exception) -> Iterator[Effect]:
        yield from ()

    patch.setattr(InferenceWorker, "_seek_back", stay)


def an_answer_under_another_users_id(patch: pytest.MonkeyPatch) -> None:
    """The addressee is who was answered before."""
    ok = AnswerWriter.ok
    last: dict[AnswerWriter, str] = {}

    def mixed(self: AnswerWriter, ask: Ask, *rest: Any) -> Answer:
        before, last[self] = last.get(self, ask.request.user_id), ask.request.user_id
        return ok(self, replace(ask, request=ask.request.model_copy(update={"user_id": before})), *rest)

    patch.setattr(AnswerWriter, "ok", mixed)


def no_waiting_for_the_history(patch: pytest.MonkeyPatch) -> None:
    """``after`` is taken for granted."""
    patch.setattr(HistoryGate, "judge", lambda self, *args, **named: Verdict.READY)


def outbox_cleared_before_it_is_sent(patch: pytest.MonkeyPatch) -> None:
    """Rows leave the outbox, then their records leave for Kafka."""
    send = Relay._send

    def hasty(self: Relay, rows: Sequence[OutboxRow]) -> Steps[list[OutboxRow]]:
        yield Effect("store.delete_outbox", partial(self._store.delete_outbox, [row.id for row in rows]))
        sent = yield from send(self, rows)
        return sent

    patch.setattr(Relay, "_send", hasty)


def no_sweep(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks for files that an erasure has left."""
    patch.setattr(Sweeper, "step", lambda _: iter(()))


def answers_go_by_their_time(patch: pytest.MonkeyPatch) -> None:
    """An answer is of before an erasure where its record is, whatever it was made of and whenever it was asked."""
    judge = ingest_writes._answer_is_erased

    def timed(erased: Any, cluster_id: str, answer: NewAnswer) -> bool:
        return judge(erased, cluster_id, replace(answer, epoch=None, request=None))

    patch.setattr(ingest_writes, "_answer_is_erased", timed)


BUGS: tuple[Plant, ...] = (
    write_after_commit,
    no_offset_condition,
    dead_letter_outside_the_transaction,
    publishing_without_token,
    no_sweep,
    answers_go_by_their_time,
    giving_back_forgives,
    cache_key_without_version,
    cursor_without_epoch,
    no_seek_after_an_abort,
    an_answer_under_another_users_id,
    no_waiting_for_the_history,
    outbox_cleared_before_it_is_sent,
)


@pytest.mark.slow
@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    plant(monkeypatch)
    for seed in range(SEEDS):
        try:
            simulate(tmp_path, seed)
        except Violation:
            return
    pytest.fail(f"not found within {SEEDS} seeds")


def _split(patch: pytest.MonkeyPatch, halves: Callable[[IngestBatch], tuple[IngestBatch, IngestBatch]]) -> None:
    """Let ingest write a batch in two transactions."""
    write = IngestWorker._write

    def twice(self: IngestWorker, *rest: Any) -> Steps[None]:
        steps = write(self, *rest)
        for effect in steps:  # one, or none
            first, second = halves(effect.run.args[0])  # type: ignore[attr-defined]
            one: IngestResult = yield Effect(effect.name, partial(self._store.write_events, first))
            two: IngestResult = yield Effect(effect.name, partial(self._store.write_events, second))
            try:
                steps.send(max(one, two, key=lambda result: result.written))
            except StopIteration:
                return

    patch.setattr(IngestWorker, "_write", twice)
