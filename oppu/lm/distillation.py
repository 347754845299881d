"""Knowledge distillation: a query encoder with fewer blocks and neurons, whose vectors lie where its embedder's do.

A history's texts are embedded once, a query each time that somebody asks, so it pays to have a smaller model for
queries alone. It begins as some of the embedder's own blocks with some of their neurons, and learns the embedder's
vectors of unlabelled texts (asymmetric dual encoders, as in KALE, Campos et al., arXiv 2304.01016; the loss is one
minus the cosine). Stored vectors stay as they are.
"""

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from oppu.embedder import FOR_DOCUMENTS, SentenceEmbedder, loaded, quiet_and_local
from oppu.errors import ConfigError
from oppu.lm.full_training import Descent, autocast, epoch, folder_problems, write
from oppu.lm.pruning import narrow
from oppu.settings import ModelSettings

LEAST_TEXTS = 100
"""Distinct ones: fewer teach nothing but themselves."""
_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.05, 1_000
_NEAREST, _MOST_DOCUMENTS = 10, 10_000
_EMBEDDED_AT_ONCE = 2_048
_TRIED = 32
_LIKENESS = 0.999
"""Least cosine of a text's vectors as they are learnt and as the library has them, before it is written and after."""
_UNKNOWN = "model.embedder: its blocks cannot be told, or it reads more than tokens: no query encoder can be made of it"
_DIVERGED = "distill: the loss is no longer finite: lower the learning rate"

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """The recipe.

    Attributes:
        layers: So many of the embedder's blocks are kept, evenly spaced from the first on.
        neurons: Share of these blocks' feed-forward neurons that is kept, those with the largest weights.
        epochs: Passes over the texts.
        learning_rate: Of AdamW, at its highest.
        batch: Texts of a step.
        seed: Of what is held out, and of the order.
    """

    layers: int = 1
    neurons: float = 0.25
    epochs: int = 8
    learning_rate: float = 2e-3
    batch: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What was made.

    Attributes:
        folder: Where it lies.
        neurons: Of a block's feed-forward layers; ``None`` where these cannot be told and stayed as they were.
        texts: That it learnt.
        steps: Of the optimizer.
        seconds: In all.
        likeness: Mean cosine to the embedder's vector, of texts that were held out.
        neighbours: Of their ten nearest of the other texts, the share that it finds as well.
    """

    folder: Path
    neurons: int | None
    texts: int
    steps: int
    seconds: float
    likeness: float
    neighbours: float


def distill(
    settings: ModelSettings,
    texts: Sequence[str],
    out_dir: Path,
    config: DistillConfig,
    progress: Callable[[int, int, float], None] = lambda _done, _all, _loss: None,
) -> DistillReport:
    """Train a query encoder for the embedder and write it, as sentence-transformers does.

    Args:
        settings: Whose ``embedder``; device, type and threads.
        texts: As users' queries will be; repeated ones count once.
        out_dir: Must be absent, empty, or an earlier result, which is replaced.
        config: The recipe.
        progress: Told (steps done, steps in all, the batch's loss) after each step.

    Returns:
        What was made.

    Raises:
        ConfigError: Too few texts, a folder that is not ours or cannot be written, an embedder that has no more blocks
            than are asked for or that cannot be cut, or a loss that is no longer finite.
    """
    started = time.perf_counter()
    distinct = list(dict.fromkeys(text for text in texts if text.strip()))
    problems = folder_problems(out_dir, FOR_DOCUMENTS)
    if len(distinct) < LEAST_TEXTS:
        problems.append(f"EVENTS: expected at least {LEAST_TEXTS} distinct texts, found {len(distinct)}")
    if problems:
        raise ConfigError(*problems)
    random.Random(config.seed).shuffle(distinct)  # noqa: S311 - which texts are held out, not a secret
    student, neurons = _student(settings, config)
    aims, documents = _taught(settings, distinct)
    held = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT_SHARE * len(distinct))))
    steps = _train(student, distinct[held:], torch.from_numpy(aims[held:]), config, progress)
    own = _embedded(student, distinct[:held])
    if not np.isfinite(own).all():
        raise ConfigError(_DIVERGED)
    recipe = {**asdict(config), "neurons": neurons, FOR_DOCUMENTS: documents, "texts": len(distinct) - held}

    def save(folder: str) -> None:
        with quiet_and_local():
            student.save(folder, create_model_card=False)
        _check_written(folder, settings.device, distinct[:held], own)

    write(out_dir, save, recipe)
    return DistillReport(
        folder=out_dir,
        neurons=neurons,
        texts=len(distinct) - held,
        steps=steps,
        seconds=time.perf_counter() - started,
        likeness=float((own * aims[:held]).sum(axis=1).mean()),
        neighbours=_shared_neighbours(own, aims[:held], aims[held : held + _MOST_DOCUMENTS]),
    )


def _taught(settings: ModelSettings, texts: Sequence[str]) -> tuple[Vectors, str]:
    """Return the embedder's vectors, and its fingerprint; it is not needed after that."""
    teacher = SentenceEmbedder(
        settings.embedder, device=settings.device, dtype=settings.dtype, threads=settings.threads
    )
    parts = range(0, len(texts), _EMBEDDED_AT_ONCE)
    found = np.concatenate([teacher.embed(texts[first : first + _EMBEDDED_AT_ONCE]) for first in parts])
    return found, teacher.fingerprint


def _student(settings: ModelSettings, recipe: DistillConfig) -> tuple[Any, int | None]:
    """Return a copy of the embedder in float32 with some of its blocks, and how many neurons a feed-forward has."""
    layers = recipe.layers
    model, _ = loaded(settings.embedder, settings.device)
    model = model.float().eval()  # no dropout: the aim is a function to follow, on as many texts as can be had
    encoder = getattr(model[0], "model", None)
    config = getattr(encoder, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    modules = encoder.modules() if isinstance(encoder, torch.nn.Module) else ()
    lists = [m for m in modules if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if encoder is None or len(lists) != 1:
        raise ConfigError(_UNKNOWN)
    if not 0 < layers < len(lists[0]):
        raise ConfigError(f"--layers: expected fewer than the {len(lists[0])} blocks of model.embedder")
    kept = [len(lists[0]) * number // layers for number in range(layers)]
    blocks = [copy.deepcopy(lists[0][at]) for at in kept]
    del lists[0][layers:]
    for number, block in enumerate(blocks):
        lists[0][number] = block
    encoder.config.num_hidden_layers = layers
    kinds = getattr(encoder.config, "layer_types", None)
    if kinds is not None:
        encoder.config.layer_types = [kinds[at] for at in kept]
    return model, narrow(lists[0], encoder.config, recipe.neurons)


def _train(
    student: Any,
    texts: Sequence[str],
    aims: torch.Tensor,
    config: DistillConfig,
    progress: Callable[[int, int, float], None],
) -> int:
    """Take all steps; return their number."""
    tokens = _tokens(student, texts)
    with torch.no_grad():
        if not _alike(_vectors(student, tokens[:_TRIED]).cpu().numpy(), _embedded(student, texts[:_TRIED])):
            raise ConfigError(_UNKNOWN)  # the library gives it more than tokens
    student.requires_grad_(True)
    student[0].model.get_input_embeddings().requires_grad_(False)  # most of its weights, of which a text sees few
    chance = random.Random(config.seed)  # noqa: S311 - order of texts, not a secret
    lengths = [len(text) for text in tokens]
    batches = [batch for _ in range(config.epochs) for batch in epoch(lengths, config.batch, chance)]
    learnt = [parameter for parameter in student.parameters() if parameter.requires_grad]
    descent = Descent(learnt, config.learning_rate, len(batches))
    for done, batch in enumerate(batches, start=1):
        with autocast(student.device, torch.float32):
            found = _vectors(student, [tokens[at] for at in batch])
        loss = (1 - (found * aims[batch].to(found)).sum(dim=1)).mean()
        torch.autograd.backward(loss)
        if not descent.step():
            raise ConfigError(_DIVERGED)
        progress(done, len(batches), float(loss.detach()))
    student.requires_grad_(False)
    return len(batches)


def _tokens(student: Any, texts: Sequence[str]) -> list[list[int]]:
    prompt = student.prompts.get(student.default_prompt_name) or ""  # the library puts it before each text, too
    found: list[list[int]] = student.tokenizer([prompt + text for text in texts], truncation=True)["input_ids"]
    return found


def _vectors(student: Any, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return unit vectors ``[len(tokens), dim] float32``."""
    batch = student.tokenizer.pad({"input_ids": [list(text) for text in tokens]}, return_tensors="pt")
    features = student({name: value.to(student.device) for name, value in batch.items()})
    return functional.normalize(features["sentence_embedding"][:, : student.truncate_dim].float(), dim=1)


def _embedded(student: Any, texts: Sequence[str]) -> Vectors:
    found = student.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(found, dtype=np.float32)


def _check_written(folder: str, device: str, texts: Sequence[str], own: Vectors) -> None:
    """Read it back: a configuration may say of blocks what we do not know of."""
    again, _ = loaded(folder, device)
    if not _alike(_embedded(again, texts), own):
        raise ConfigError(_UNKNOWN)


def _alike(some: Vectors, others: Vectors) -> bool:
    return some.shape == others.shape and bool((some * others).sum(axis=1).min() >= _LIKENESS)


def _shared_neighbours(own: Vectors, aims: Vectors, documents: Vectors) -> float:
    """Return the share of the nearest documents to ``aims`` that are among the nearest to ``own``, too."""
    count = min(_NEAREST, len(documents))
    mine, theirs = (np.argsort(-(some @ documents.T), axis=1)[:, :count] for some in (own, aims))
    return float(np.mean([len(set(a) & set(b)) / count for a, b in zip(mine, theirs, strict=True)]))
