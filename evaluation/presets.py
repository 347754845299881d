"""Named recipes with the settings that belong to them.

``oppu`` are the hyper-parameters of OPPU's released code (arXiv 2402.04401), for Llama-2-7B. Where the code and this
project differ is said in docs/reproduce.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from evaluation.training import Recipe
from oppu.settings import Settings


@dataclass(frozen=True, slots=True)
class Preset:
    """A recipe; ``model`` and ``retriever`` are settings that it puts in place of the configured ones."""

    recipe: Recipe
    model: Mapping[str, object]
    retriever: Mapping[str, object]

    def settings(self, configured: Settings) -> Settings:
        """Return the configured settings with this preset's in place of theirs."""
        changed = {
            "model": configured.model.model_copy(update=dict(self.model)),
            "retriever": configured.retriever.model_copy(update=dict(self.retriever)),
        }
        return configured.model_copy(update=changed)


def whole(recipe: Recipe) -> bool:
    """Say whether a recipe is the project's own or a preset's, however much adapts its bases and whichever it makes."""
    for known in (Recipe(), *(preset.recipe for preset in PRESETS.values())):
        scale = {name: getattr(known, name) for name in ("base_epochs", "base_search", "adapt_items", "variants")}
        if replace(recipe, **scale) == known:
            return True
    return False


PRESETS: Mapping[str, Preset] = {
    "oppu": Preset(
        recipe=Recipe(
            base_method="lora",
            base_epochs=3,
            base_search=False,
            base_learning_rate=1e-4,
            base_batch=16,
            passes=2,
            learning_rate=1e-4,
            rates=(1.0,),
            batch=16,
            weight_decay=1e-2,
            schedule="linear",
            clip_norm=0.3,
            dropout=0.05,
            chunk_learning_rate=1e-4,
        ),
        model={"lora_rank": 8, "lora_alpha": 8.0, "lora_targets": None, "lora_upper": 1.0, "max_tokens": 2048},
        retriever={"mode": "bm25", "k": 4},
    )
}
