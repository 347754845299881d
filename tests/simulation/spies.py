"""The real store, model and retriever of the simulator, which look at what passes through them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import select

from oppu.lm.fake import FakeModel
from oppu.lm.port import AdapterRef, Row, Scored, Tensors
from oppu.registry import AdapterRegistry
from oppu.store.records import Candidate, Claim, IngestBatch, IngestResult, StoredOffset
from oppu.store.schema import adapters
from oppu.store.sql import SqlStore
from oppu.values import BaseId, Event, Partition, UserId, UserState
from retriever.port import Query, Retrieved
from retriever.service import Retriever


class Violation(BaseException):
    """Something that must hold did not. No worker catches it."""


class SpyStore(SqlStore):
    """The real store, which looks at every publication, every offset and what inference was told of its users."""

    def __init__(self, inner: SqlStore) -> None:
        self.__dict__ = inner.__dict__
        self.told: dict[UserId, UserState] = {}
        self.fault: Callable[[str], None] = lambda _: None

    def offsets(self, cluster_id: str, topics: Sequence[str]) -> dict[Partition, StoredOffset]:
        self.fault("store.offsets")
        return super().offsets(cluster_id, topics)

    def events(self, cursors: Mapping[UserId, int], **rest: Any) -> dict[UserId, list[Event]]:
        self.fault("store.events")
        return super().events(cursors, **rest)

    def users(self, user_ids: Sequence[UserId], base: BaseId) -> dict[UserId, UserState]:
        self.fault("store.users")
        found = super().users(user_ids, base)
        self.told.update(found)
        return found

    def write_events(self, batch: IngestBatch) -> IngestResult:
        topics = sorted({advance.partition.topic for advance in batch.offsets})
        before = super().offsets(batch.cluster_id, topics)
        result = super().write_events(batch)
        after = super().offsets(batch.cluster_id, topics)
        for partition, stored in before.items():
            if after[partition].next_offset < stored.next_offset:
                raise Violation(f"the next offset of {partition} went back from {stored} to {after[partition]}")
        return result

    def publish(self, claim: Claim, candidate: Candidate, **rest: Any) -> bool:
        current = self.current_token(claim.base, claim.user_id)
        already = {version.version for version in self.versions(claim.base, claim.user_id)}
        done = super().publish(claim, candidate, **rest)
        if done and candidate.version not in already and current != claim.token:
            raise Violation(f"published under token {claim.token} while {current} was current")
        return done

    def give_back(self, claim: Claim) -> bool:
        before = self._adapter_row(claim.base, claim.user_id)
        done = super().give_back(claim)
        after = self._adapter_row(claim.base, claim.user_id)
        if before is not None and done:
            before |= {"holder": None, "expires_at": None, "attempts": before["attempts"] - 1}
        elif before is not None and before["epoch"] == claim.epoch and before["token"] > claim.token:
            before["attempts"] = max(before["attempts"] - 1, 0)  # taken over, but not because this process died
        if after != before:
            raise Violation(f"given back, but not as if it had never been claimed: {after}, expected {before}")
        return done

    def current_token(self, base: BaseId, user_id: UserId) -> int:
        """Return the token of a user's adapter row, straight from the database."""
        row = self._adapter_row(base, user_id)
        return -1 if row is None else int(row["token"])

    def _adapter_row(self, base: BaseId, user_id: UserId) -> dict[str, Any] | None:
        where = (adapters.c.user_id == user_id) & (adapters.c.base == base)
        with self.database.engine.connect() as connection:
            row = connection.execute(select(adapters).where(where)).mappings().first()
        return None if row is None else dict(row)


class SpyModel(FakeModel):
    """The counting model, which checks that each row is answered by its user's head and by nobody else's."""

    def __init__(self, store: SpyStore, registry: Callable[[], AdapterRegistry]) -> None:
        super().__init__()
        self._store, self._registry = store, registry

    def install(self, ref: AdapterRef, tensors: Tensors) -> None:
        kept = self._registry().load(ref)
        if any((tensors[name] != kept[name]).any() for name in kept):
            raise Violation(f"other weights than the registry's under {ref}")
        super().install(ref, tensors)

    def answer(self, rows: Sequence[Row]) -> list[Scored]:
        for row in rows:
            if row.adapter is None:
                continue
            state = self._store.told[row.adapter.user_id]
            if state.head is None or (row.adapter.epoch, row.adapter.version) != (state.epoch, state.head.version):
                raise Violation(f"answered with {row.adapter}, the head is {state.head} in epoch {state.epoch}")
            if not row.choices[0].startswith(str(row.adapter.user_id)):
                raise Violation("a row with another user's adapter")
        return super().answer(rows)


class SpyRetriever(Retriever):
    """The real retriever, whose finds must be of the asking user and of the present epoch."""

    erased: Mapping[str, tuple[int, frozenset[str]]] = {}

    def retrieve(self, queries: Sequence[Query], *rest: Any, **named: Any) -> list[Retrieved]:
        found = super().retrieve(queries, *rest, **named)
        for query, result in zip(queries, found, strict=True):
            epoch, gone = self.erased.get(str(query.user.user_id), (0, frozenset()))
            for hit in (*result.hits, *result.neighbours):
                if not str(hit.event.event_id).startswith(f"{query.user.user_id}-"):
                    raise Violation("another user's item was retrieved")
                if query.user.epoch >= epoch and str(hit.event.event_id) in gone:
                    raise Violation("an erased item was retrieved")
        return found
