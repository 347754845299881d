"""One simulated run: a workload under a seed, then quiet, then everything that must hold."""

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from oppu.errors import TransientError
from oppu.parsing import parse_prediction
from oppu.values import OutRecord, Partition, UserId
from tests.simulation.spies import SpyRetriever, Violation
from tests.simulation.world import Odds, UpdaterProcess, World
from updater.sweeping import PAUSE_SECONDS

USERS = ("anna", "bö", "王", "dan")
ERASED = "dan"
ROUNDS, TURNS, QUIET_TURNS = 14, 14, 900


@dataclass
class Sent:
    """What the applications sent."""

    events: list[tuple[str, str, Partition, int]] = field(default_factory=list)
    rubbish: set[tuple[Partition, int]] = field(default_factory=set)
    requests: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    asked: dict[str, tuple[Partition, int]] = field(default_factory=dict)
    erased_at: dict[Partition, int] = field(default_factory=dict)
    number: int = 0


def simulate(folder: Path, seed: int, odds: Odds | None = None) -> str:
    """Run one seed and return its trace hash.

    Raises:
        Violation: Something that must hold did not.
    """
    SpyRetriever.erased = {}
    world, sent = World(folder, seed, odds or Odds()), Sent()
    try:
        for at in range(ROUNDS):
            _act(world, sent)
            if at == ROUNDS // 2 and world.chance.random() < 0.5:
                _erase(world, sent)
            for _ in range(TURNS):
                world.step()
        _settle(world, sent)
        _check(world, sent)
        return world.trace_hash()
    finally:
        world.close()


def _act(world: World, sent: Sent) -> None:
    """Let applications send events, resend some, send rubbish, and ask."""
    chance = world.chance
    for _ in range(chance.randint(1, 4)):
        user = chance.choice(USERS)
        record, event_id = _event(world, sent, user)
        copies = 2 if chance.random() < 0.2 else 1
        for partition, offset in world.produce([record] * copies):
            sent.events.append((user, event_id, partition, offset))
    if chance.random() < 0.4:
        rubbish = chance.choice((b"\xff", b"[]", b'{"user_id": "anna"}'))
        sent.rubbish |= set(world.produce([OutRecord(world.topics.events, b"anna", rubbish)]))
    for _ in range(chance.randint(0, 2)):
        _ask(world, sent)
    if chance.random() < 0.1:  # retention takes what was read, so that a late reader's offset is out of range
        for partition, offset in world.ingest_offsets().items():
            if partition.topic == world.topics.events:
                world.broker.delete_records(partition, offset)


def _event(world: World, sent: Sent, user: str) -> tuple[OutRecord, str]:
    sent.number += 1
    event_id = f"{user}-{sent.number}"
    event: dict[str, Any] = {
        "event_id": event_id,
        "user_id": user,
        "task": "pick",
        "occurred_at": (world.clock.now() - timedelta(days=1)).isoformat(),
        "input": f"{user} saw thing {sent.number % 5}",
        "output": f"{user}:{world.chance.choice('aab')}",
        "choices": [f"{user}:a", f"{user}:b"],
    }
    return OutRecord(world.topics.events, user.encode(), json.dumps(event).encode()), event_id


def _ask(world: World, sent: Sent) -> None:
    chance, user = world.chance, world.chance.choice((*USERS, "stranger"))
    sent.number += 1
    request: dict[str, Any] = {
        "request_id": f"r{sent.number}",
        "user_id": user,
        "task": "pick",
        "input": f"{user} saw thing {sent.number % 5}",
        "choices": [f"{user}:a", f"{user}:b"],
    }
    mine = [event for event in sent.events if event[0] == user]
    needed = None
    if mine and user != ERASED and chance.random() < 0.5:
        _, needed, partition, offset = mine[-1]
        request["after"] = {"partition": partition.index, "offset": offset}
    record = OutRecord(world.topics.requests, user.encode(), json.dumps(request).encode())
    (sent.asked[request["request_id"]],) = world.produce([record])
    sent.requests[request["request_id"]] = (user, needed)


def _erase(world: World, sent: Sent) -> None:
    """Erase a user, as a command does that dies before the files: everything sent so far is to be gone."""
    ends = {Partition(world.topics.events, n): 0 for n in range(world.settings.kafka.partitions)}
    for partition, offset in {*(event[2:] for event in sent.events), *sent.rubbish, *sent.asked.values()}:
        ends[partition] = max(ends.get(partition, 0), offset + 1)
    tombstone = OutRecord(world.topics.updates, ERASED.encode(), None)
    world.store.erase(UserId(ERASED), cluster_id="sim", end_offsets=ends, now=world.clock.now(), announce=tombstone)
    sent.erased_at = ends
    state = world.store.users([UserId(ERASED)], world.registry_base).get(UserId(ERASED))
    gone = frozenset(event_id for user, event_id, *_ in sent.events if user == ERASED)
    SpyRetriever.erased = {ERASED: (state.epoch if state else 1, gone)}


def _settle(world: World, sent: Sent) -> None:
    """End all faults and let everybody finish."""
    world.odds = None
    for _ in range(QUIET_TURNS):
        world.clock.advance(0.5)
        for process in world.processes:
            process.turn()
        if _quiet(world, sent):
            break
    for _ in range(30):
        world.clock.advance(0.5)
        for process in world.processes:
            process.turn()
    world.clock.advance(PAUSE_SECONDS)
    for process in world.processes:
        if isinstance(process, UpdaterProcess):
            process.turn()


def _quiet(world: World, sent: Sent) -> bool:
    answered = len(world.broker.records(world.topics.predictions))
    try:
        waiting = world.store.outbox(1)
    except TransientError:
        return False
    records = world.broker.records(world.topics.events)
    offsets = world.ingest_offsets()
    read = all(offsets.get(record.partition, 0) > record.offset for record in records)
    return answered >= len(sent.requests) and not waiting and read


def _check(world: World, sent: Sent) -> None:
    sequences = _check_events(world, sent)
    _check_dead_letters(world, sent)
    _check_answers(world, sent, sequences)
    _check_kept_answers(world, sent)
    _check_files(world)


def _check_events(world: World, sent: Sent) -> dict[str, int]:
    expected: set[tuple[str, str]] = {
        (user, event_id)
        for user, event_id, partition, offset in sent.events
        if user != ERASED or offset >= sent.erased_at.get(partition, 0)
    }
    stored: Counter[tuple[str, str]] = Counter()
    sequences: dict[str, int] = {}
    for user in USERS:
        events = world.store.events({UserId(user): 0}, embedder="hash-16", limit=1000).get(UserId(user), [])
        if [event.seq for event in events] != list(range(1, len(events) + 1)):
            raise Violation(f"{user}: the sequence has gaps: {[event.seq for event in events]}")
        for event in events:
            stored[(user, event.event_id)] += 1
            sequences[event.event_id] = event.seq
    if stored != Counter(expected):
        raise Violation(f"events: missing {expected - set(stored)}, too many {set(stored) - expected}")
    return sequences


def _check_dead_letters(world: World, sent: Sent) -> None:
    origins: set[tuple[Partition, int]] = set()
    for record in world.broker.records(world.topics.dead_letters):
        header = {name: value.decode() for name, value in record.headers if name.startswith("origin-")}
        origin = Partition(header["origin-topic"], int(header["origin-partition"]))
        origins.add((origin, int(header["origin-offset"])))
    if origins != sent.rubbish:
        raise Violation(f"dead letters: missing {sent.rubbish - origins}, unexpected {origins - sent.rubbish}")


def _check_answers(world: World, sent: Sent, sequences: dict[str, int]) -> None:
    answers = [parse_prediction(record) for record in world.broker.records(world.topics.predictions)]
    counts = Counter(answer.request_id for answer in answers)
    if counts != Counter(sent.requests.keys()):
        often = [request_id for request_id, n in counts.items() if n > 1]
        raise Violation(f"answers: missing {sent.requests.keys() - counts.keys()}, more than once {often}")
    for answer in answers:
        user, needed = sent.requests[answer.request_id]
        made = answer.provenance
        if answer.user_id != user or answer.status != "ok" or made is None:
            raise Violation(f"{answer.request_id}: {answer.status} for {answer.user_id}, asked by {user}")
        if not (answer.output or "").startswith(f"{user}:"):
            raise Violation(f"{answer.request_id}: answered with {answer.output}")
        if any(not item.startswith(f"{user}-") for item in made.retrieved):
            raise Violation(f"{answer.request_id}: another user's items")
        behind = any(d.reason == "history_behind" for d in made.degraded)
        if needed is not None and not behind and made.history_sequence < sequences[needed]:
            raise Violation(f"{answer.request_id}: lacks {needed} and does not say so")


def _check_kept_answers(world: World, sent: Sent) -> None:
    """Every answer is kept once, but those to what the erased user had asked before."""
    gone = {
        request_id
        for request_id, (user, _) in sent.requests.items()
        if user == ERASED and sent.asked[request_id][1] < sent.erased_at.get(sent.asked[request_id][0], 0)
    }
    kept = Counter(world.kept_answers())
    if kept != Counter(sent.requests.keys() - gone):
        raise Violation(f"kept answers: {kept}, of {sent.requests.keys()}, without {gone}")


def _check_files(world: World) -> None:
    for epoch in world.store.erasures(after="", since=None, limit=1).values():
        for past in range(1, epoch):
            if left := world.registry().versions(UserId(ERASED), past):
                raise Violation(f"versions {left} of before the erasure are still there")
