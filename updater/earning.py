"""What a user's adapter earns: each pending event, asked of the service as it would have answered before learning it.

Of a choice that is the evidence against the adapter, of a text the base against the adapter on its tokens: there the
caches stand beside both alike. Reads and computes only. The evidence beside an event is older than the event.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from oppu.fusion import Fusion, earn, recency_prior, sources_of
from oppu.lm.port import is_bare
from retriever.port import Query, knn_distribution
from updater.job import Job
from updater.material import EvidenceSource, check_earlier
from updater.scoring import Assessment


@dataclass(frozen=True, slots=True)
class Judge:
    """Compares evidence alone with the adapter beside it, by the fusion that serves them."""

    evidence: EvidenceSource
    fusion: Fusion
    neighbours: int

    def earned(self, job: Job) -> float:
        """Return what the live adapter has earned once the pending events count too.

        Args:
            job: A scored job.

        Returns:
            Log odds; as before where there is no adapter. Texts without an output change nothing.

        Raises:
            TransientError: The store is away.
            FatalError: Something of another user, or not older than its event, came back.
        """
        head, live = job.claim.head, job.scored().live
        if head is None:
            return 0.0
        earned = head.earned
        for _, gain in sorted([*self._of_choices(job, live), *_of_texts(job, live)] if live is not None else []):
            earned = earn(earned, gain)
        return earned

    def _of_choices(self, job: Job, live: Assessment) -> Iterator[tuple[int, float]]:
        """Give the place of each pending choice event and what the adapter gained there, nats."""
        asked = [at for at, example in enumerate(job.work().pending) if example.choices]
        if not asked:
            return
        events = [job.work().split.pending[at] for at in asked]
        queries = [Query(job.state, e.task, e.input, 0, self.neighbours, before_seq=e.seq) for e in events]
        found = self.evidence.retrieve(queries)
        profiles = self.evidence.profiles([(job.state, e.task, e.seq) for e in events])
        for at, event, retrieved, profile in zip(asked, events, found, profiles, strict=True):
            check_earlier(event, retrieved, profile)
            example = job.work().pending[at]
            vote = knn_distribution(retrieved.neighbours, example.choices)
            prior = recency_prior(profile.prior, example.choices)
            sources = sources_of(job.scored().none.scores[at], live.scores[at], vote, prior)
            yield at, self.fusion.gain(sources, event.seq - 1, example.choices.index(example.output))


def _of_texts(job: Job, live: Assessment) -> Iterator[tuple[int, float]]:
    """Give the place of each pending text and what the adapter gained on its tokens, nats."""
    for at, example in enumerate(job.work().pending):
        if not example.choices and not is_bare(example):
            yield at, float(live.scores[at].sum() - job.scored().none.scores[at].sum())
