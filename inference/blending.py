"""How a text is written: base, adapter and caches, each at the weight it has earned. Pure.

What ``oppu.fusion`` is for choices: two sets of weights, one of the evidence without an adapter, one with it,
fitted on users the base has not seen (``oppu calibrate``). A weight is that of an expert of a mixture of next-token
distributions (``oppu.lm.blend``); its log goes up or down with the length of the user's history, and with how many
tokens a cache matches. An adapter that foresaw its own user's texts worse than the base gives its weight to the base.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oppu.errors import ConfigError
from oppu.fusion import are_finite, length, read_fitted
from oppu.lm.blend import EXPERTS, Blend, Texts, shares
from retriever.port import Hit, nearness

FILE = "text_fusion.json"
"""Beside a base's weights: what was fitted for it."""

MARGIN = 1.0
"""Log odds that an adapter may lose before it loses weight: a text's gain is a sum over its tokens, and less than that
is noise. Chosen of 0, 0.5, 1, 2 and 4 on development data: from here on weighing costs nothing where adapters help."""

Coefficients = Mapping[str, tuple[float, float, float]]
"""By expert, of its log weight: level, slope over ``length``, and what each further matched token adds."""

_CACHED_OUTPUTS = 128
"""Heaviest outputs of the profile's prior that are looked at: with a half-life of 50 events, five sixths of it."""


@dataclass(frozen=True, slots=True)
class TextFusion:
    """Both sets of coefficients: ``alone`` without an adapter, ``beside`` with one."""

    alone: Coefficients
    beside: Coefficients

    def weights(self, events: int, *, adapter: bool, earned: float = 0.0) -> dict[str, tuple[float, float]]:
        """Return each expert's log weight and what a matched token adds to it, after so many events.

        Args:
            events: The user's events before.
            adapter: Whether an adapter has a say.
            earned: By the adapter, as of ``oppu.fusion.earn``: log odds that move weight from it to the base. What
                is above ``-MARGIN`` moves nothing: the fit knows what an adapter that helps is worth.

        Returns:
            By expert.
        """
        at = float(length(events))
        chosen = self.beside if adapter else self.alone
        found = {name: (level + slope * at, match) for name, (level, slope, match) in chosen.items()}
        lost = min(earned + MARGIN, 0.0)
        if "adapter" in found and lost:
            (base, of_base), (own, of_own) = found["base"], found["adapter"]
            both, odds = np.logaddexp(base, own), own - base + lost
            found["adapter"] = float(both - np.logaddexp(0, -odds)), of_own
            found["base"] = float(both - np.logaddexp(0, odds)), of_base
        return found

    def blend(self, texts: Mapping[str, Texts], events: int, *, adapter: bool, earned: float = 0.0) -> Blend:
        """Say how a text is written.

        Args:
            texts: Of the caches there are.
            events: The user's events before.
            adapter: Whether an adapter has a say.
            earned: By the adapter.

        Returns:
            The blend.
        """
        return Blend(self.weights(events, adapter=adapter, earned=earned), texts)

    def adapter_share(self, events: int, earned: float = 0.0) -> float:
        """Return the adapter's weight after so many events where every expert speaks and one token matches."""
        weights = self.weights(events, adapter=True, earned=earned)
        return shares(weights, dict.fromkeys(self.beside, 1)).get("adapter", 0.0)

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        content = {
            name: {expert: list(found) for expert, found in part.items()}
            for name, part in (("alone", self.alone), ("beside", self.beside))
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


DEFAULT = TextFusion(
    alone={
        "base": (2.9, 0.1, 0.0),
        "knn": (-0.7, -0.2, 0.0),
        "knn_next": (-0.2, -0.1, 0.2),
        "prior": (-0.8, -0.3, 0.0),
        "prior_next": (0.2, 0.1, 0.9),
        "input": (0.0, 0.0, 0.0),
        "input_next": (0.7, 0.3, 0.5),
    },
    beside={
        "base": (1.4, 0.2, 0.0),
        "adapter": (1.2, 1.6, 0.0),
        "knn": (-0.6, -0.3, 0.0),
        "knn_next": (-0.3, -0.2, 0.1),
        "prior": (-0.9, -0.6, 0.0),
        "prior_next": (0.0, 0.0, 0.8),
        "input": (-0.2, -0.2, 0.0),
        "input_next": (0.4, 0.3, 0.4),
    },
)
"""Where nothing was fitted: rounded from a fit on the offline base and 16 users of 21 to 38 headlines."""


def load_text_fusion(path: Path) -> TextFusion:
    """Read what was fitted for a base.

    Args:
        path: The JSON file.

    Returns:
        Its content.

    Raises:
        ConfigError: Naming the file and the field.
    """
    content = read_fitted(path, "model.text_fusion", "alone and beside")
    without = [name for name in EXPERTS if name != "adapter"]
    return TextFusion(_part(path, content, "alone", without), _part(path, content, "beside", EXPERTS))


def caches(text: str, neighbours: Sequence[Hit], prior: Mapping[str, float]) -> dict[str, Texts]:
    """Gather what a user's text may be written from.

    Args:
        text: The input.
        neighbours: The nearest items, with their similarities.
        prior: The user's outputs with their recency weights.

    Returns:
        Weighted texts by cache; a cache without texts is left out.
    """
    near = [(hit.event.output, weight) for hit, weight in zip(neighbours, nearness(neighbours), strict=True)]
    recent = sorted(prior.items(), key=lambda pair: (-pair[1], pair[0]))[:_CACHED_OUTPUTS]
    found = {"knn": _known(near), "prior": _known(recent), "input": _known([(text, 1.0)])}
    return {name: texts for name, texts in found.items() if texts}


def _known(texts: Sequence[tuple[str, float]]) -> Texts:
    return tuple((text, weight) for text, weight in texts if text.strip() and weight > 0)


def _part(path: Path, content: Mapping[str, object], name: str, allowed: Sequence[str]) -> Coefficients:
    found = content.get(name)
    if not isinstance(found, dict) or "base" not in found or not set(found) <= set(allowed):
        raise ConfigError(f"model.text_fusion: {path}: {name}: expected coefficients of {', '.join(allowed)}")
    for expert, own in found.items():
        if not are_finite(own, 3):
            raise ConfigError(f"model.text_fusion: {path}: {name}.{expert}: expected three finite numbers")
    return {expert: (float(own[0]), float(own[1]), float(own[2])) for expert, own in found.items()}
