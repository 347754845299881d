"""The queries that run all the time read an index range; none scans a table."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, text

from oppu.settings import StoreSettings
from oppu.store.sql import SqlStore
from oppu.values import UserId
from tests.oppu.store.conftest import Opener
from tests.oppu.store.support import ADA, BASE, BOB, EMBEDDER, NOW, Writer, new_answer, new_event, some, take

_ALLOWED = ("SCAN asked", "CONSTANT ROW", "SCAN bases", "LEFT-MOST")  # values we passed, and the few bases


def sqlite_plans(store: SqlStore, work: Callable[[], Any]) -> list[str]:
    """Every line of the plans of the statements that ``work`` sends."""
    sent: list[tuple[str, Any]] = []

    def keep(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        sent.append((statement, parameters[0] if many else parameters))

    event.listen(store.database.engine, "before_cursor_execute", keep)
    work()
    event.remove(store.database.engine, "before_cursor_execute", keep)
    lines: list[str] = []
    with store.database.read() as connection:
        for statement, parameters in sent:
            if statement.startswith(("SELECT", "WITH", "UPDATE", "DELETE", "INSERT")):
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                lines += [row.detail for row in plan]
    assert lines
    return lines


@pytest.fixture
def filled(migrated_sqlite: StoreSettings, opener: Opener) -> Writer:
    """Some thousand rows, with the planner's statistics."""
    store = opener(migrated_sqlite)
    store.register_base(BASE)
    writer = Writer(store)
    writer.write([new_event(f"u{n % 50}", f"e{n}") for n in range(2000)])
    writer.write([*some("ada", 30), *some("bob", 3)])
    with store.database.write() as connection:
        connection.exec_driver_sql("ANALYZE")
    return writer


def test_due_reads_the_index_in_order(filled: Writer) -> None:
    lines = sqlite_plans(filled.store, lambda: filled.store.due(BASE, now=NOW, min_pending=16, limit=8))
    assert any("ix_adapters_due (base=? AND pending>?)" in line for line in lines), lines
    assert not any("SCAN" in line or "TEMP B-TREE" in line for line in lines), lines


def test_steps_scan_nothing(filled: Writer) -> None:
    store = filled.store

    def work() -> None:
        events = [new_event("ada", f"n{n}", in_reply_to=f"r{n}") for n in range(30)]
        filled.write([*events, new_event("bob", "x")], answers=[new_answer("ada", "r1"), new_answer("bob", "r2")])
        store.users([ADA, BOB, UserId("nobody")], BASE)
        store.events({ADA: 3, BOB: 0}, embedder=EMBEDDER, limit=10)
        store.renew(take(store, ADA), 60)
        store.adapters(BASE, limit=3)
        store.adapter_log(BASE, ADA, limit=3)
        store.delete_outbox([1, 2])
        store.purge_answers(before=NOW)
        store.erasures(after="", since=NOW, limit=9)

    lines = sqlite_plans(store, work)
    assert [line for line in lines if "SCAN" in line and not any(fine in line for fine in _ALLOWED)] == []


@pytest.mark.postgres
def test_due_reads_the_index_on_postgres(migrated_postgres: StoreSettings, opener: Opener) -> None:
    store = opener(migrated_postgres)
    store.register_base(BASE)
    writer = Writer(store)
    for start in range(0, 3000, 1000):
        writer.write([new_event(f"u{n}", "e") for n in range(start, start + 1000)])
    writer.write(some("ada", 30))
    sent: list[tuple[str, Any]] = []
    event.listen(store.database.engine, "before_cursor_execute", lambda *args: sent.append((args[2], args[3])))
    assert [user.user_id for user in store.due(BASE, now=NOW, min_pending=16, limit=8)] == ["ada"]
    statement, parameters = sent[-1]
    with store.database.write() as connection:
        connection.execute(text("ANALYZE"))
        plan = "\n".join(row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters))
    assert "ix_adapters_due" in plan and "Seq Scan" not in plan, plan
