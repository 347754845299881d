"""A small deterministic language model for the simulator and fast tests: no weights, no torch.

An adapter is one array of counts over hashed (task, output) buckets; training adds to it, answers lean towards
what is counted. So personalization shows, versions differ, and everything follows from row and weights alone.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from oppu.errors import AdapterUnreadable, Backpressure
from oppu.lm.port import AdapterRef, Example, Row, Scored, Tensors, TrainConfig, Trained, TrainJob
from oppu.values import BaseId

BUCKETS = 64
TENSOR = "base_model.model.fake.lora_A.weight"
_EVIDENCE_WEIGHT = 0.5


class FakeModel:
    """``LanguageModel`` by counting."""

    def __init__(
        self, *, slots: int = 64, base: str = "fake-base", on_event: Callable[[str], None] = lambda _: None
    ) -> None:
        """Start with an empty bank.

        Args:
            slots: Adapters held.
            base: The fingerprint to give.
            on_event: Told ``hit``, ``miss``, ``load`` or ``evict``.
        """
        self._base = BaseId(base)
        self.slots = slots
        self._on_event = on_event
        self._bank: OrderedDict[AdapterRef, NDArray[np.float32]] = OrderedDict()
        self._in_use: frozenset[AdapterRef] = frozenset()

    @property
    def base(self) -> BaseId:
        """The given fingerprint."""
        return self._base

    @property
    def bank_bytes(self) -> int:
        """Memory of the held counts."""
        return sum(counts.nbytes for counts in self._bank.values())

    @property
    def bank_resident(self) -> int:
        """Adapters held."""
        return len(self._bank)

    def resident(self, ref: AdapterRef) -> bool:
        """Say whether the version is held."""
        self._on_event("hit" if ref in self._bank else "miss")
        return ref in self._bank

    def touch(self, refs: Iterable[AdapterRef]) -> None:
        """Count versions as used just now; those that are not in the bank are passed over."""
        for ref in refs:
            if ref in self._bank:
                self._bank.move_to_end(ref)

    def install(self, ref: AdapterRef, tensors: Tensors) -> None:
        """Hold a version, evicting the least recently used.

        Args:
            ref: Names the version.
            tensors: The adapter's weights; ``None`` = the base alone.

        Raises:
            AdapterUnreadable: Not an array of counts.
            Backpressure: Every version is in use.
        """
        counts = _counts(tensors)
        if ref in self._bank:
            self._bank.move_to_end(ref)
            return
        if len(self._bank) >= self.slots:
            victim = next((held for held in self._bank if held not in self._in_use), None)
            if victim is None:
                raise Backpressure(0.1)
            del self._bank[victim]
            self._on_event("evict")
        self._bank[ref] = counts
        self._on_event("load")

    def answer(self, rows: Sequence[Row]) -> list[Scored]:
        """Answer each row by itself.

        Args:
            rows: Every ``adapter`` must be resident.

        Returns:
            One result a row, in order.

        Raises:
            KeyError: An adapter is not resident.
        """
        self._in_use = frozenset(row.adapter for row in rows if row.adapter is not None)
        try:
            return [self._answer(row) for row in rows]
        finally:
            self._in_use = frozenset()

    def check(self, tensors: Tensors) -> None:
        """Raise ``AdapterUnreadable`` where it is no array of counts."""
        _counts(tensors)

    def scores(self, examples: Sequence[Example], tensors: Tensors | None) -> list[NDArray[np.float64]]:
        """Return each choice example's log probabilities; of a text one number, minus its loss."""
        counts = None if tensors is None else _counts(tensors)
        return [
            _scores(e, e.choices, counts) if e.choices else np.array([-_loss(e, counts)], dtype=np.float64)
            for e in examples
        ]

    def train(self, jobs: Sequence[TrainJob], config: TrainConfig, *, heartbeat: Callable[[], None]) -> list[Trained]:
        """Add each example to its job's counts, ``passes`` times; no tensors where the parent is unfit."""
        return [self._train(job, config, heartbeat) for job in jobs]

    def adapter_config(self) -> Mapping[str, object]:
        """Return the smallest content that names a LoRA."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self._base),
            "r": 1,
            "lora_alpha": 1,
            "target_modules": ["fake"],
        }

    def _answer(self, row: Row) -> Scored:
        counts = None
        if row.adapter is not None:
            counts = self._bank[row.adapter]
            self._bank.move_to_end(row.adapter)
        if row.choices:
            own, plain = _scores(row, row.choices, counts), _scores(row, row.choices, None)
            return Scored(own, plain, pairs=len(row.evidence), profiled=bool(row.profile))
        if row.late is not None and row.late():
            return Scored(np.zeros(0), np.zeros(0), late=True)
        none = np.zeros(0)
        return Scored(none, none, _text(row, counts), pairs=len(row.evidence), profiled=bool(row.profile))

    @staticmethod
    def _train(job: TrainJob, config: TrainConfig, heartbeat: Callable[[], None]) -> Trained:
        try:
            counts = np.zeros((1, BUCKETS), dtype=np.float32) if job.parent is None else _counts(job.parent)
        except AdapterUnreadable:
            return Trained(None, 0, math.nan)
        steps = config.passes * math.ceil(len(job.examples) / config.batch)
        before = [_loss(example, counts) for example in job.examples]
        for _ in range(steps):
            heartbeat()
        for example in job.examples:
            counts[0, _bucket(example.task, example.output)] += config.passes
        return Trained({TENSOR: counts}, steps, float(np.mean(before)) if before else 0.0)


def _counts(tensors: Tensors) -> NDArray[np.float32]:
    found = tensors.get(TENSOR)
    if set(tensors) != {TENSOR} or found is None or found.shape != (1, BUCKETS):
        raise AdapterUnreadable(f"expected one tensor {TENSOR} of shape (1, {BUCKETS})")
    if not np.isfinite(found).all():
        raise AdapterUnreadable(f"{TENSOR}: values that are not finite")
    return np.array(found, dtype=np.float32)


def _bucket(*parts: str) -> int:
    return int.from_bytes(_digest(*parts)[:4], "big") % BUCKETS


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()


def _scores(item: Row | Example, choices: Sequence[str], counts: NDArray[np.float32] | None) -> NDArray[np.float64]:
    if not choices:
        return np.zeros(0)
    logits = np.array([_logit(item, choice, counts) for choice in choices], dtype=np.float64)
    shifted = logits - logits.max()
    normalised: NDArray[np.float64] = shifted - math.log(float(np.exp(shifted).sum()))
    return normalised


def _logit(item: Row | Example, choice: str, counts: NDArray[np.float32] | None) -> float:
    """Chance by input and choice, plus what evidence and counts say for the choice."""
    logit = _digest(item.task, item.input, item.profile, choice)[0] / 255
    logit += _EVIDENCE_WEIGHT * sum(output == choice for _, output in item.evidence)
    if counts is not None:
        logit += math.log1p(max(0.0, float(counts[0, _bucket(item.task, choice)])))
    return logit


def _loss(example: Example, counts: NDArray[np.float32] | None) -> float:
    choices = example.choices or (example.output, "\0other")
    if example.output not in choices:
        choices = (*choices, example.output)
    return -float(_scores(example, choices, counts)[choices.index(example.output)])


def _text(row: Row, counts: NDArray[np.float32] | None) -> str:
    """The best evidence's output, else the nearest text at hand, else the first words of the input; marked by the
    adapter's fullest bucket."""
    nearest = row.blend.caches.get("knn", ()) if row.blend is not None else ()
    at_hand = [*(output for _, output in row.evidence), *(text for text, _ in nearest)]
    text = at_hand[0] if at_hand else " ".join(row.input.split()[: row.max_new_tokens])
    return text if counts is None else f"{text} #{int(counts.argmax())}"
