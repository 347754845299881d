"""The language model of the service: one base, a bank of user adapters, scoring, generation and training.

A facade over the package that keeps the port's promises. One lock serialises its public calls, so that an install
never changes a slot while an answer reads it.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from oppu.lm.bank import SlotBank
from oppu.lm.base import LoadedBase
from oppu.lm.blend import Texts, foreseen
from oppu.lm.choices import NONE, Scores, score_choices
from oppu.lm.encoding import Caches, Encoder, Target
from oppu.lm.forward import Runner, buckets, losses_of, target_log_probs, target_readings
from oppu.lm.generation import Writing, Written, greedy
from oppu.lm.port import AdapterRef, Example, Row, Scored, Tensors, TrainConfig, Trained, TrainJob
from oppu.lm.prompts import Ids, Kept
from oppu.lm.reading import read
from oppu.lm.residence import AdapterBank
from oppu.lm.self_check import check_base
from oppu.lm.targets import adapter_config, find_targets
from oppu.lm.train_jobs import Learner, fits, train_jobs
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from oppu.values import BaseId

logger = logging.getLogger(__name__)


class TorchModel:
    """``LanguageModel`` on torch."""

    def __init__(
        self,
        base: LoadedBase,
        tasks: Tasks,
        *,
        settings: ModelSettings,
        slots: int,
        on_event: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Attach an adapter bank to a base.

        Args:
            base: The base; it belongs to this model from now on.
            tasks: The known tasks.
            settings: Prompt length and LoRA shape.
            slots: Adapters held in memory; an ``answer`` can name at most so many different ones.
            on_event: Told of the bank's ``hit``, ``miss``, ``load`` and ``evict``.

        Raises:
            ConfigError: The base has no layers that adapters could attach to, or computes otherwise beside others than
                alone.
        """
        self._base, self._settings = base, settings
        self._tasks, self._prompts = tasks, base.prompts()
        self._encoder = Encoder(self._prompts, tasks, max_tokens=settings.max_tokens, max_positions=base.max_positions)
        self._targets = find_targets(base.model, settings.lora_targets, settings.lora_upper)
        self._runner = Runner(base, self._targets)
        self._bank = self._new_bank(slots, trainable=False)
        self._adapters = AdapterBank(self._bank, on_event)
        self._scratch = self._new_bank(1, trainable=False)
        self._branches = check_base(self._runner, self._scratch, self._targets)
        self._lock = threading.RLock()

    @property
    def base(self) -> BaseId:
        """Fingerprint of base weights, tokenizer and prompt format."""
        return self._base.fingerprint

    @property
    def slots(self) -> int:
        """Adapters that fit into the bank."""
        return self._bank.slots

    @property
    def bank_bytes(self) -> int:
        """Memory of the bank, allocated once."""
        return self._bank.bytes

    @property
    def bank_resident(self) -> int:
        """Adapters in the bank."""
        return len(self._adapters)

    def close(self) -> None:
        """Take everything off the base, which can then serve another model."""
        for part in (self._bank, self._scratch, self._runner):
            part.close()

    def resident(self, ref: AdapterRef) -> bool:
        """Say whether the version is in the bank."""
        with self._lock:
            return ref in self._adapters

    def touch(self, refs: Iterable[AdapterRef]) -> None:
        """Count versions as used just now; those that are not in the bank are passed over."""
        with self._lock:
            self._adapters.touch(refs)

    def install(self, ref: AdapterRef, tensors: Tensors) -> None:
        """Put a version into the bank, evicting the least recently used one.

        Args:
            ref: Names the version.
            tensors: The adapter's weights; ``None`` = the base alone.

        Raises:
            AdapterUnreadable: Names, shapes or values do not fit this base.
        """
        with self._lock:
            self._adapters.install(ref, tensors)

    def answer(self, rows: Sequence[Row]) -> list[Scored]:
        """Score choices or generate text for rows of mixed users in few forward passes.

        Args:
            rows: Every ``adapter`` must be resident.

        Returns:
            One result a row, in order.

        Raises:
            KeyError: An adapter is not resident.
        """
        refs = [row.adapter for row in rows if row.adapter is not None]
        choice = [at for at, row in enumerate(rows) if row.choices]
        text = [at for at, row in enumerate(rows) if not row.choices]
        with self._lock, self._adapters.pinned(refs) as held, torch.no_grad():
            slots = [held[row.adapter] if row.adapter is not None else 0 for row in rows]
            found: dict[int, Scored] = {}
            for part, work in ((choice, self._answer_choices), (text, self._answer_texts)):
                results = work([rows[at] for at in part], [slots[at] for at in part])
                found.update(zip(part, results, strict=True))
        return [found[at] for at in range(len(rows))]

    def check(self, tensors: Tensors) -> None:
        """Raise ``AdapterUnreadable`` where an adapter does not fit this base and the LoRA settings."""
        self._bank.check(tensors)

    def losses(self, examples: Sequence[Example], tensors: Tensors | None) -> Scores:
        """Return each example's loss under one user's weights: −log p(output) over the choices, of a text the mean over
        the output's tokens.

        Args:
            examples: One user's examples.
            tensors: The adapter's weights; ``None`` = the base alone.

        Returns:
            ``[n] float64`` nats.

        Raises:
            AdapterUnreadable: The weights do not fit this base.
        """
        targets = self._encoder.targets(examples)
        found = np.array([target.offset for target in targets], dtype=np.float64)
        for members, said in self._over(targets, tensors):
            found[members] = losses_of(said, [targets[at] for at in members]).double().cpu().numpy()
        return found

    def token_scores(self, examples: Sequence[Example], tensors: Tensors | None) -> list[Scores]:
        """Return the log probability of each text example's output tokens, the end included, teacher-forced; none
        where nothing is aimed at.

        Args:
            examples: One user's text examples.
            tensors: The adapter's weights; ``None`` = the base alone.

        Returns:
            One ``[t] float64`` an example.

        Raises:
            AdapterUnreadable: The weights do not fit this base.
        """
        targets = self._encoder.targets(examples)
        found: list[Scores] = [NONE] * len(examples)
        for members, said in self._over(targets, tensors):
            ends = np.cumsum([len(targets[at].aims) for at in members])[:-1]
            for at, part in zip(members, np.split(said.double().cpu().numpy(), ends), strict=True):
                found[at] = part
        return found

    def _over(self, targets: Sequence[Target], tensors: Tensors | None) -> list[tuple[list[int], torch.Tensor]]:
        """Return the log probabilities of what targets aim at under one user's weights, of all that aim at anything,
        some targets' after the other's, and which ones' they are."""
        live = [at for at, target in enumerate(targets) if target.positions]
        found: list[tuple[list[int], torch.Tensor]] = []

        def read_part(part: Sequence[int]) -> None:
            own = target_readings([targets[at] for at in part], [slot] * len(part))
            for group, logits in read(self._runner, self._scratch, own):
                members = [part[number] for number in group]
                found.append((members, target_log_probs(logits, [targets[at] for at in members])))

        with self._one_user(tensors) as slot, torch.no_grad():
            parts = self._runner.streams.parts([len(targets[at].ids) for at in live])
            self._runner.streams.run(read_part, [[live[number] for number in part] for part in parts])
        return found

    def longest_output(self, task: str) -> int:
        """Return how many tokens of a text task's outputs are scored at most."""
        return self._encoder.longest_output(task)

    def cached(
        self, examples: Sequence[Example], texts: Sequence[Mapping[str, Texts]]
    ) -> list[tuple[Scores, NDArray[np.int64]]]:
        """Say how caches foresee each text example's output tokens; see :func:`oppu.lm.blend.foreseen`.

        Args:
            examples: Text examples.
            texts: Of each, the caches' weighted texts.

        Returns:
            Probabilities and matched tokens ``[t, e]`` of each.
        """
        wanted = [tuple(aim.index for aim in target.aims) for target in self._encoder.targets(examples)]
        caches = self._encoder.caches()
        return [foreseen(caches.of(own), ids) for own, ids in zip(texts, wanted, strict=True)]

    def scores(self, examples: Sequence[Example], tensors: Tensors | None) -> list[Scores]:
        """Return each example's log probabilities under one user's weights.

        Args:
            examples: One user's examples.
            tensors: The adapter's weights; ``None`` = the base alone.

        Returns:
            ``[c] float64`` of an example's choices; ``[t]`` of a text's output tokens.

        Raises:
            AdapterUnreadable: The weights do not fit this base.
        """
        found: list[Scores] = [NONE] * len(examples)
        at_choice = [at for at, example in enumerate(examples) if example.choices]
        at_text = [at for at, example in enumerate(examples) if not example.choices]
        texts = self.token_scores([examples[at] for at in at_text], tensors) if at_text else []
        for at, said in zip(at_text, texts, strict=True):
            found[at] = said
        tries = [self._encoder.tries.of(examples[at].choices) for at in at_choice]
        prompts = self._encoder.prompts([examples[at] for at in at_choice], [trie.depth for trie in tries])
        with self._one_user(tensors) as slot, torch.no_grad():
            work = [(prompt, trie, slot) for prompt, trie in zip(prompts, tries, strict=True)]
            for at, scores in zip(
                at_choice, score_choices(self._runner, self._scratch, work, branches=self._branches), strict=True
            ):
                found[at] = scores
        return found

    def train(self, jobs: Sequence[TrainJob], config: TrainConfig, *, heartbeat: Callable[[], None]) -> list[Trained]:
        """Train several users' adapters; each result equals training that user alone.

        Args:
            jobs: One a user; its examples in their order.
            config: Common to all.
            heartbeat: Called at least once an optimizer step, by one thread at a time but not always the caller's; it
                must not ask the model anything.

        Returns:
            One result a job, in order; without tensors where a parent does not fit this base or the weights
            do not stay finite.
        """
        fit = [at for at, job in enumerate(jobs) if fits(self._scratch, job)]
        learners = [Learner(jobs[at], self._encoder.targets(jobs[at].examples)) for at in fit]
        with self._lock:
            trained = train_jobs(self._runner, partial(self._new_bank, trainable=True), learners, config, heartbeat)
        found = dict(zip(fit, trained, strict=True))
        return [found.get(at, Trained(None, 0, math.nan)) for at in range(len(jobs))]

    def adapter_config(self) -> Mapping[str, object]:
        """Return the JSON content of PEFT's ``adapter_config.json`` for this base."""
        settings = self._settings
        return adapter_config(
            self._base.model,
            self._targets,
            settings.lora_targets,
            base=self._base.name,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
        )

    def _new_bank(self, slots: int, *, trainable: bool) -> SlotBank:
        settings = self._settings
        return SlotBank(
            self._targets,
            slots=slots,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            trainable=trainable,
        )

    @contextmanager
    def _one_user(self, tensors: Tensors | None) -> Iterator[int]:
        """Hold the lock with one user's weights in the scratch bank; yields the slot."""
        with self._lock:
            if tensors is not None:
                self._scratch.load(1, tensors)
            yield 0 if tensors is None else 1

    def _answer_choices(self, rows: Sequence[Row], slots: Sequence[int]) -> list[Scored]:
        """Score rows with their adapters and, in the same batches, without."""
        tries = [self._encoder.tries.of(row.choices) for row in rows]
        prompts = self._encoder.prompts(rows, [trie.depth for trie in tries])
        work = [(prompt, trie, 0) for prompt, trie in zip(prompts, tries, strict=True)]
        with_adapter = [at for at, slot in enumerate(slots) if slot]
        work += [(prompts[at], tries[at], slots[at]) for at in with_adapter]
        scores = score_choices(self._runner, self._bank, work, branches=self._branches)
        plain = scores[: len(rows)]
        own = dict(zip(with_adapter, scores[len(rows) :], strict=True))
        kept = self._kept(rows, prompts)
        return [_scored(own.get(at), plain[at], kept[at]) for at in range(len(rows))]

    def _kept(self, rows: Sequence[Row], prompts: Sequence[Ids]) -> list[Kept]:
        return self._prompts.kept(rows, [self._tasks.require(row.task) for row in rows], prompts)

    def _answer_texts(self, rows: Sequence[Row], slots: Sequence[int]) -> list[Scored]:
        prompts = self._encoder.prompts(rows, [row.max_new_tokens for row in rows])
        longest, stops, caches = self._base.max_positions, self._encoder.stops, self._encoder.caches()
        limits = [min(row.max_new_tokens, longest - len(ids)) for row, ids in zip(rows, prompts, strict=True)]
        texts = [Written(None)] * len(rows)
        lengths = [len(ids) + limit for ids, limit in zip(prompts, limits, strict=True)]

        def write_part(part: Sequence[int]) -> None:
            for bucket in buckets([lengths[at] for at in part], self._runner.tokens):
                own = [part[number] for number in bucket]
                made = {at: _writing(rows[at], prompts[at], slots[at], limits[at], caches) for at in own}
                writings = {at: writing for at, writing in made.items() if writing is not None}
                written = greedy(self._runner, self._bank, list(writings.values()), stops) if writings else []
                for at, text in zip(writings, written, strict=True):
                    texts[at] = text

        if rows:
            self._runner.streams.run(write_part, self._runner.streams.parts(lengths))
        kept = self._kept(rows, prompts)
        return [self._written(texts[at], kept[at]) for at in range(len(rows))]

    def _written(self, written: Written, kept: Kept) -> Scored:
        if written.ids is None:
            return Scored(NONE, NONE, late=True)
        text = str(self._base.tokenizer.decode(written.ids, skip_special_tokens=True)).strip()
        if written.unsound:
            logger.warning("an adapter's probabilities are not finite: a text was written without them")
        return Scored(NONE, NONE, text, pairs=kept.pairs, profiled=kept.profiled, unsound=written.unsound)


def _scored(own: Scores | None, base: Scores, kept: Kept) -> Scored:
    """Give the base's scores where there is no adapter, or its own are no numbers."""
    unsound = own is not None and not np.isfinite(own).all()
    if unsound:
        logger.warning("an adapter's scores are not finite: the base's are given")
    scores = base if own is None or unsound else own
    return Scored(scores, base, pairs=kept.pairs, profiled=kept.profiled, unsound=unsound)


def _writing(row: Row, prompt: Ids, slot: int, limit: int, caches: Caches) -> Writing | None:
    """Return what is to be written; nothing where the row is late already: making its caches takes time too."""
    if row.late is not None and row.late():
        return None
    own = caches.of(row.blend.caches) if row.blend is not None else ()
    return Writing(prompt, slot, limit, row.blend, own, row.late)
