"""One ask on its way through the model: what is known of its user, what serves it, and what its answer was made of.

Pure. Invariant: an answer's provenance names what took part in it, and nothing that was merely at hand.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from inference.adapters import Fallback, Placed
from inference.admission import Ask
from inference.evidence import Personal
from oppu.lm.port import Row, Scored
from oppu.values import BaseId
from oppu.wire import Degraded, Provenance

Part = Literal["retrieval", "profile", "adapter"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """An ask with what is known of its user, the adapter that serves it and the row that the model was asked about."""

    ask: Ask
    personal: Personal
    placed: Placed
    row: Row

    def hears_adapter(self, result: Scored) -> bool:
        """Say whether an adapter has a say; one whose scores are no numbers says nothing."""
        return self.placed.ref is not None and not result.unsound

    def writers(self, result: Scored) -> frozenset[str]:
        """Name the caches that a text was written from, and the adapter where it took part."""
        blend = self.row.blend
        if blend is None:
            return frozenset()
        found = {name for name in blend.caches if name in blend.weights or f"{name}_next" in blend.weights}
        if self.hears_adapter(result) and "adapter" in blend.weights:
            found.add("adapter")
        return frozenset(found)

    def provenance(self, base: BaseId, result: Scored, heard: Collection[str]) -> Provenance:
        """Say what an answer was made of.

        Args:
            base: The model's.
            result: What it returned.
            heard: Who had a say beside the base, of ``knn``, ``prior`` and ``adapter``.

        Returns:
            Events of the prompt first, then the neighbours that were heard.
        """
        voices = self.personal.voices(self.ask.choices) if "knn" in heard else ()
        hits = (*self.personal.hits[: result.pairs], *voices)
        retrieved = tuple(dict.fromkeys(hit.event.event_id for hit in hits))
        profile = self.personal.profiled if result.profiled or "prior" in heard else None
        adapter = self.placed.ref if "adapter" in heard else None
        used: dict[Part, bool] = {
            "retrieval": bool(retrieved),
            "profile": profile is not None,
            "adapter": adapter is not None,
        }
        return Provenance(
            base=base,
            epoch=self.personal.epoch,
            adapter_version=adapter.version if adapter is not None else None,
            profile_version=profile.version if profile is not None else None,
            retrieved=retrieved,
            history_sequence=self.personal.sequence,
            used=tuple(part for part, present in used.items() if present),
            degraded=tuple(self._degraded(result)),
        )

    def _degraded(self, result: Scored) -> list[Degraded]:
        fallbacks = [self.placed.fallback, Fallback.UNSOUND if result.unsound else None]
        lacks = [Degraded(part="adapter", reason=str(reason)) for reason in fallbacks if reason is not None]
        return [*self.personal.degraded(behind=self.ask.behind), *lacks]
