"""What updater and inference ask of the model; the simulator's small fake keeps the same promises.

Letters: n rows, c choices of a row. Scores are natural-log probabilities, normalised over a row's choices.
Invariant: a row's answer depends on that row and its adapter only, never on its batch-mates.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from oppu.lm.blend import Blend
from oppu.values import BaseId, UserId

Tensors = Mapping[str, NDArray[np.float32]]
"""An adapter's weights in PEFT's naming (``base_model.model.….lora_A.weight``), each float32."""


@dataclass(frozen=True, slots=True, order=True)
class AdapterRef:
    """Names one immutable adapter version; the only key any cache of adapters may use."""

    user_id: UserId = field(repr=False)
    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt to answer.

    ``evidence`` are earlier (input, output) pairs, best first, that are put into the prompt as far as they fit;
    ``profile`` is a line about the user. ``choices`` empty means free text: written by the adapter alone, or under
    ``blend``; once ``late`` says so, which is asked before every token, it is given up. That may be asked on any
    thread, of several rows at once, and must not ask the model anything.
    """

    task: str
    input: str = field(repr=False)
    evidence: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    profile: str = field(default="", repr=False)
    choices: tuple[str, ...] = field(default=(), repr=False)
    adapter: AdapterRef | None = None
    max_new_tokens: int = 32
    blend: Blend | None = field(default=None, repr=False)
    late: Callable[[], bool] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Scored:
    """A row's result.

    Attributes:
        scores: ``[c] float64`` log probabilities with the adapter; empty for free text.
        base_scores: The same without it.
        text: Free text.
        late: It was given up.
        pairs: So many pairs of the evidence, the first ones, stood in the prompt.
        profiled: The profile's line stood in the prompt, or its beginning.
        unsound: What the adapter said is not finite: ``scores`` are the base's, a text was written without it.
    """

    scores: NDArray[np.float64]
    base_scores: NDArray[np.float64]
    text: str | None = field(default=None, repr=False)
    late: bool = False
    pairs: int = 0
    profiled: bool = False
    unsound: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One training pair. ``choices`` empty means free text: loss over the output's tokens.

    A blank ``output`` that is none of the choices means that there is no pair, only a text of the user's own: the loss
    is the next-token loss over ``input``, without a prompt around it.
    """

    task: str
    input: str = field(repr=False)
    output: str = field(repr=False)
    choices: tuple[str, ...] = field(default=(), repr=False)
    evidence: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    profile: str = field(default="", repr=False)


def is_bare(example: Example) -> bool:
    """Say whether an example is a text of the user's own, without an output."""
    return not example.output.strip() and example.output not in example.choices


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One user's update: start from ``parent`` weights (``None``: fresh), over ``examples`` in this order."""

    user_id: UserId = field(repr=False)
    parent: Tensors | None = field(repr=False)
    examples: tuple[Example, ...] = field(repr=False)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Optimisation of one update: AdamW, linear warm-up of 10 %, then a constant rate or a linear decay to zero.

    ``clip_norm`` bounds each user's gradient; ``dropout`` is the share of their inputs that adapters do not see.
    """

    learning_rate: float
    weight_decay: float
    passes: int
    batch: int
    schedule: Literal["constant", "linear"] = "constant"
    clip_norm: float = 1.0
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Trained:
    """The weights an update ended with; ``tensors`` is ``None`` where they are not finite."""

    tensors: Tensors | None = field(repr=False)
    steps: int
    mean_loss: float


class AdapterSource(Protocol):
    """Reads adapter versions."""

    def load(self, ref: AdapterRef) -> Tensors:
        """Return a version's checked weights.

        Args:
            ref: Names the version.

        Returns:
            The checked weights.

        Raises:
            AdapterUnreadable: Missing, truncated, tampered with, or made for another base.
            AdapterNotReady: Still being read ahead.
        """
        ...


class LanguageModel(Protocol):
    """One base model with a bank of user adapters."""

    @property
    def base(self) -> BaseId:
        """Fingerprint of base weights, tokenizer and prompt format."""
        ...

    @property
    def bank_bytes(self) -> int:
        """Memory of the bank."""
        ...

    def resident(self, ref: AdapterRef) -> bool:
        """Say whether the version is in the bank."""
        ...

    def touch(self, refs: Iterable[AdapterRef]) -> None:
        """Count versions as used just now; those that are not in the bank are passed over."""
        ...

    def install(self, ref: AdapterRef, tensors: Tensors) -> None:
        """Put a version into the bank, evicting the least recently used; never one that ``answer`` is using.

        Args:
            ref: Names the version.
            tensors: The adapter's weights; ``None`` = the base alone.

        Raises:
            AdapterUnreadable: Names, shapes or values do not fit this base.
        """
        ...

    def answer(self, rows: Sequence[Row]) -> list[Scored]:
        """Score choices or generate text for rows of mixed users in few forward passes.

        Args:
            rows: Every ``adapter`` must be resident.

        Returns:
            One result a row, in order.
        """
        ...

    def check(self, tensors: Tensors) -> None:
        """Raise ``AdapterUnreadable`` where an adapter does not fit this base and its settings."""
        ...

    def scores(self, examples: Sequence[Example], tensors: Tensors | None) -> list[NDArray[np.float64]]:
        """Return each example's log probabilities under one user's weights: of the choices ``[c]``, of a text's output
        tokens ``[t]``, teacher-forced; their mean is minus the loss."""
        ...

    def train(self, jobs: Sequence[TrainJob], config: TrainConfig, *, heartbeat: Callable[[], None]) -> list[Trained]:
        """Train several users' adapters; each result equals training that user alone.

        Args:
            jobs: One a user.
            config: Common to all.
            heartbeat: Called at least once an optimizer step, by one thread at a time but not always the caller's; it
                must not ask the model anything.

        Returns:
            One result a job, in order.
        """
        ...

    def adapter_config(self) -> Mapping[str, object]:
        """Return the JSON content of PEFT's ``adapter_config.json`` for this base."""
        ...
