"""Gather what a user's own history says about each ask: similar items and a profile, as far as asked for.

Invariant: nothing of another user gets past this module; every hit's and profile's owner is compared with the
user who asks, and a difference stops the worker.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from inference.admission import Ask
from inference.blending import caches
from oppu.errors import FatalError
from oppu.lm.blend import Texts
from oppu.settings import Settings
from oppu.values import FIRST_EPOCH, UserId, UserState
from oppu.wire import Degraded
from retriever.port import Degradation, Hit, Profile, Query, Retrieved

_Known = tuple[int, Ask, UserState]
"""An ask's place among those of a call, the ask, and its user, who has a history."""


class HistoryRetriever(Protocol):
    """What inference asks of the retriever (``retriever.service.Retriever``)."""

    def expect(self, queries: Sequence[Query]) -> None:
        """Begin to embed what will be asked, most urgent first, and forget what was expected beside it."""
        ...

    def retrieve(self, queries: Sequence[Query]) -> list[Retrieved]:
        """Answer queries of many users, in order."""
        ...

    def profiles(self, requests: Sequence[tuple[UserState, str, int | None]]) -> list[Profile]:
        """Return the profile of each (user, task, before_seq), in order."""
        ...


@dataclass(frozen=True, slots=True)
class Personal:
    """What is known of the user behind one ask; all ``None`` for an unknown user."""

    state: UserState | None
    retrieved: Retrieved | None = None
    profile: Profile | None = None

    @property
    def epoch(self) -> int:
        """The user's epoch; a user who is not known was never erased."""
        return self.state.epoch if self.state is not None else FIRST_EPOCH

    @property
    def sequence(self) -> int:
        """Last event in view."""
        return self.state.last_seq if self.state is not None else 0

    @property
    def earned(self) -> float:
        """What the user's adapter has earned, log odds."""
        return self.state.head.earned if self.state is not None and self.state.head is not None else 0.0

    @property
    def asked(self) -> bool:
        """Whether anything of the history was asked to stand beside the model."""
        return self.retrieved is not None or self.profile is not None

    @property
    def profiled(self) -> Profile | None:
        """The profile where it says anything."""
        return self.profile if self.profile is not None and (self.profile.prior or self.profile.line) else None

    @property
    def hits(self) -> tuple[Hit, ...]:
        """Items for the prompt, best first."""
        return self.retrieved.hits if self.retrieved is not None else ()

    @property
    def neighbours(self) -> tuple[Hit, ...]:
        """Items for the kNN vote, or for a text's cache: those with a similarity."""
        found = self.retrieved.neighbours if self.retrieved is not None else ()
        return tuple(hit for hit in found if math.isfinite(hit.similarity))

    def voices(self, choices: tuple[str, ...]) -> tuple[Hit, ...]:
        """Return the neighbours whose outputs say something: one of the choices, or (without any) a text."""
        if choices:
            known = frozenset(choices)
            return tuple(hit for hit in self.neighbours if hit.event.output in known)
        return tuple(hit for hit in self.neighbours if hit.event.output.strip())

    def caches(self, text: str) -> dict[str, Texts]:
        """Return what a text may be written from, beside its input ``text``."""
        return caches(text, self.neighbours, self.profile.prior if self.profile is not None else {})

    def degraded(self, *, behind: bool) -> list[Degraded]:
        """Say what of the history was asked for and is not, or not wholly, in this."""
        faults = [Degraded(part="history", reason=str(Degradation.HISTORY_BEHIND))] if behind else []
        if self.retrieved is not None:
            if self.retrieved.degraded is not None:
                faults.append(Degraded(part="retrieval", reason=str(self.retrieved.degraded)))
            elif self.retrieved.through_seq < self.sequence:
                faults.append(Degraded(part="retrieval", reason=str(Degradation.HISTORY_BEHIND)))
        if self.profile is not None and self.profile.through_seq < self.sequence:
            faults.append(Degraded(part="profile", reason=str(Degradation.HISTORY_BEHIND)))
        return faults


def gather(
    asks: Sequence[Ask],
    states: Mapping[UserId, UserState],
    retriever: HistoryRetriever,
    settings: Settings,
) -> list[Personal]:
    """Retrieve for all asks in one call, and read their profiles in another.

    Args:
        asks: The requests.
        states: Known users, as read at the beginning of the step.
        retriever: Views of the history.
        settings: Defaults of k and neighbours, and whose prompts hold items.

    Returns:
        One value an ask, in order.

    Raises:
        FatalError: Something of another user came back.
    """
    known = _with_history(asks, states)
    queries = _queries(known, settings)
    profiled = {i: (state, ask.task.name, None) for i, ask, state in known if ask.request.options.profile}
    found = dict(zip(queries, _retrieve(retriever, list(queries.values())), strict=True))
    profiles = dict(zip(profiled, _profiles(retriever, list(profiled.values())), strict=True))
    return [Personal(states.get(ask.user_id), found.get(i), profiles.get(i)) for i, ask in enumerate(asks)]


def expect(
    asks: Sequence[Ask], states: Mapping[UserId, UserState], retriever: HistoryRetriever, settings: Settings
) -> None:
    """Say all that ``gather`` will be asked, so that queries are embedded while the model runs.

    Args:
        asks: The requests, in the order in which they will be gathered for.
        states: Known users.
        retriever: Views of the history.
        settings: Defaults of k and neighbours, and whose prompts hold items.
    """
    retriever.expect(list(_queries(_with_history(asks, states), settings).values()))


def _with_history(asks: Sequence[Ask], states: Mapping[UserId, UserState]) -> list[_Known]:
    found = ((i, ask, states.get(ask.user_id)) for i, ask in enumerate(asks))
    return [(i, ask, state) for i, ask, state in found if state is not None and state.last_seq > 0]


def _queries(known: Sequence[_Known], settings: Settings) -> dict[int, Query]:
    """Return the queries of those asks that want items, by their places."""
    return {i: _query(ask, state, settings) for i, ask, state in known if _wanted(ask, settings) > 0}


def _wanted(ask: Ask, settings: Settings) -> int:
    """Return how many items an ask wants; with none it has no neighbours either."""
    asked = ask.request.options.retrieve
    return settings.retriever.k if asked is None else asked


def _query(ask: Ask, state: UserState, settings: Settings) -> Query:
    """Ask for the neighbours; ranking items for a prompt costs as much again, so only where it holds any."""
    k = _wanted(ask, settings) if settings.model.prompts_hold_evidence(ask.choices) else 0
    return Query(state, ask.task.name, ask.request.input, k, settings.retriever.neighbours)


def _retrieve(retriever: HistoryRetriever, queries: list[Query]) -> list[Retrieved]:
    found = retriever.retrieve(queries) if queries else []
    for query, result in zip(queries, found, strict=True):
        if any(hit.event.user_id != query.user.user_id for hit in (*result.hits, *result.neighbours)):
            raise FatalError("retriever: a hit belongs to another user than the one who asks")
    return found


def _profiles(retriever: HistoryRetriever, asked: list[tuple[UserState, str, int | None]]) -> list[Profile]:
    found = retriever.profiles(asked) if asked else []
    for (state, _, _), profile in zip(asked, found, strict=True):
        if profile.user_id != state.user_id:
            raise FatalError("retriever: a profile belongs to another user than the one who asks")
    return found
