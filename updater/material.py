"""Gather what one user's update works on: events from the store, the parent's weights, evidence beside each event.

Reads only. An event's evidence is older than the event, in training as it was in serving.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from oppu.errors import AdapterUnreadable, FatalError, TransientError
from oppu.lm.port import AdapterSource, Tensors
from oppu.metrics import Metrics
from oppu.settings import ModelSettings, UpdaterSettings
from oppu.store.port import HistoryStore
from oppu.tasks import Tasks
from oppu.values import Event, UserState
from retriever.port import Profile, Query, Retrieved
from updater.examples import NOTHING, Beside, example, split, usable, window
from updater.job import Job, Material, Stranded

logger = logging.getLogger(__name__)


class EvidenceSource(Protocol):
    """Looks up users' earlier events, and profiles of them; the retriever."""

    def retrieve(self, queries: Sequence[Query], /) -> Sequence[Retrieved]:
        """Return what each query found, in order."""
        ...

    def profiles(self, requests: Sequence[tuple[UserState, str, int | None]], /) -> Sequence[Profile]:
        """Return the profile of each (user, task, before_seq), in order."""
        ...


@dataclass(frozen=True, slots=True)
class Prompts:
    """Says what stands beside events in their prompts, as serving does: an adapter learns, and is judged, under the
    prompts it serves. ``settings`` say in which tasks that is anything: ``k`` retrieved items, and a profile."""

    evidence: EvidenceSource
    settings: ModelSettings
    k: int

    def beside(self, state: UserState, events: Sequence[Event], tasks: Tasks) -> dict[int, Beside]:
        """Look up what stood beside each event; plain prompts are left out.

        Args:
            state: The user as of the claim.
            events: Usable events of that user.
            tasks: The known tasks.

        Returns:
            What stands in the prompts, keyed by seq.

        Raises:
            TransientError: The store is away.
            FatalError: Something of another user, or not older than its event, came back.
        """
        asked = [e for e in events if self.settings.prompts_hold_evidence(tasks[e.task].allowed(e.choices))]
        if not asked:
            return {}
        found = self.evidence.retrieve([Query(state, e.task, e.input, self.k, before_seq=e.seq) for e in asked])
        profiles = self.evidence.profiles([(state, e.task, e.seq) for e in asked])
        return {
            event.seq: _beside(event, one, profile) for event, one, profile in zip(asked, found, profiles, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Gatherer:
    """Reads the material of updates.

    ``check`` raises ``AdapterUnreadable`` where a parent does not fit the model that trains. ``prompts`` ``None``
    means plain prompts.
    """

    store: HistoryStore
    registry: AdapterSource
    tasks: Tasks
    settings: UpdaterSettings
    metrics: Metrics
    check: Callable[[Tensors], None]
    prompts: Prompts | None = None

    def gather(self, job: Job) -> Material:
        """Read one user's material.

        Args:
            job: A claimed user.

        Returns:
            Events as of the claim, phrased as examples, and the parent's weights.

        Raises:
            TransientError: The store is away.
            Stranded: The parent's files, or the registry, cannot be reached.
        """
        claim = job.claim
        found = self.store.events({job.user_id: 0}, embedder="", limit=window(self.settings))
        # the claim's view of the user: what came since belongs to the next update
        events = [e for e in found.get(job.user_id, []) if e.seq <= claim.last_seq]
        parts = split(usable(events, self.tasks), job.cursors, self.settings, seed=job.seed)
        parent, fault = self._parent(job)
        known = {e.seq: e for e in (*parts.pending, *parts.train)}
        beside = self.prompts.beside(job.state, list(known.values()), self.tasks) if self.prompts is not None else {}
        return Material(
            split=parts,
            pending=tuple(example(e, self.tasks, beside.get(e.seq, NOTHING)) for e in parts.pending),
            train=tuple(example(e, self.tasks, beside.get(e.seq, NOTHING)) for e in parts.train),
            parent=parent,
            parent_fault=fault,
            considered_through=max(claim.considered_through, claim.last_seq),
        )

    def _parent(self, job: Job) -> tuple[Tensors | None, str]:
        ref = job.parent_ref
        if ref is None:
            return None, ""
        try:
            tensors = self.registry.load(ref)
            self.check(tensors)
            return tensors, ""
        except AdapterUnreadable as error:
            self.metrics.adapter_faults.inc()
            logger.warning("user %s: training afresh, since the parent cannot be used: %s", job.user, error)
            return None, f"parent unreadable: {error}"
        except TransientError as error:
            raise Stranded(str(error)) from error


def check_earlier(event: Event, found: Retrieved, profile: Profile) -> None:
    """Check that all evidence beside an event is the same user's and older: it must not hold the answer.

    Args:
        event: What is asked about.
        found: What was retrieved for it.
        profile: The user's before it.

    Raises:
        FatalError: Something is another user's, or not older.
    """
    hits = (*found.hits, *found.neighbours)
    if {profile.user_id, *(hit.event.user_id for hit in hits)} != {event.user_id}:
        raise FatalError("retriever: something of another user came back")
    if any(hit.event.seq >= event.seq for hit in hits):
        raise FatalError("retriever: an event came back that is not older than the one asked about")


def _beside(event: Event, found: Retrieved, profile: Profile) -> Beside:
    check_earlier(event, found, profile)
    return Beside(tuple((hit.event.input, hit.event.output) for hit in found.hits), profile.line)
