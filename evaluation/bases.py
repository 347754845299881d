"""The shared bases of a fold: OPPU's task adaption in its three variants, and none; each kept with its curve."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from evaluation.corpus import Item, by_user
from evaluation.history import Past
from evaluation.inputs import write_whole
from evaluation.prompting import Variant, drawn
from evaluation.splits import Fold
from evaluation.training import Bench, Recipe, Say, score
from oppu.fusion import log_softmax
from oppu.lm.adaption import AdaptConfig, adapt
from oppu.lm.base import OFFLINE, load_base
from oppu.lm.full_training import RECIPE
from oppu.lm.model import TorchModel
from oppu.lm.port import Example
from oppu.settings import Settings
from oppu.tasks import Tasks

BaseName = Literal[Variant, "unadapted"]
CURVE = "base.json"
TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


@dataclass(frozen=True, slots=True)
class Study:
    """One fold and seed: whose items, what came before each, and where results are kept.

    ``pasts`` has every user's, adapt users included, one past an item; ``done`` is told each phase that is over.
    ``searched`` is the folder of the seed that has chosen the bases' numbers of epochs, and ``arms`` the prompt-only
    and the OPPU arm that its calibrate users have chosen for P1; ``None``: this one chooses.
    """

    fold: Fold
    pasts: Mapping[str, Sequence[Past]] = field(repr=False)
    settings: Settings
    tasks: Tasks
    folder: Path
    recipe: Recipe
    seed: int
    say: Say
    done: Callable[[str], None] = lambda _: None
    searched: Path | None = None
    arms: tuple[str, str] | None = None

    @property
    def searches(self) -> bool:
        """Whether this seed searches for the numbers of epochs: the first one of a run, where they are searched for."""
        return self.recipe.base_search and self.searched is None


@contextmanager
def opened(study: Study, base: BaseName) -> Iterator[Bench]:
    """Make a base where it is not there yet, and hold it as a bench.

    Args:
        study: The fold and seed.
        base: Which base.

    Yields:
        The bench; its model is closed afterwards.
    """
    folder = unadapted(study) if base == "unadapted" else str(adapted(study, base))
    study.done(f"base-{base}")
    own = study.settings.model.model_copy(update={"base": folder})
    model = TorchModel(load_base(own), study.tasks, settings=own, slots=1)
    try:
        yield Bench(study.fold, model, study.folder, study.recipe, study.seed, study.say)
    finally:
        model.close()


def adapted(study: Study, variant: Variant) -> Path:
    """Adapt the base on a fold's adapt users until the calibrate users' loss stops improving.

    Each number of epochs is a run of its own, whose rate decays to zero; the curve is kept in ``base.json``. The
    loss is taken at its best temperature, since fusion scales a base's scores anyhow, and in the variant's prompts.
    Without ``base_search`` of the recipe, or with nobody to judge, the last number of epochs is the only one; a run's
    further seeds take the number that its first one found.

    Args:
        study: Whose adapt items are learnt; the loss of its calibrate items decides.
        variant: What stands in the prompts.

    Returns:
        The folder of the best base; the configured one where there is nobody to adapt it on.
    """
    if not study.fold.adapt:
        study.say(f"base {variant}: nobody's items to adapt it on, it is used as it is")
        return Path(study.settings.model.base)
    judged = _judged(study, variant)
    folder, (first, last) = study.folder / f"base-{variant}", _tried(study, variant, judged)
    if (folder / CURVE).exists():
        return folder / str(first + _least(_kept(folder)))
    folder.mkdir(exist_ok=True)
    losses: list[float] = []
    for epochs in range(first, last + 1):
        out = folder / str(epochs)
        if not (out / RECIPE).exists():
            adapt_once(study, _learnt(study, variant), out, epochs, f"base {variant}")
        if not judged:
            study.say(f"base {variant}: {epochs} epochs, no calibrate user has what to judge them by")
            break
        own = study.settings.model.model_copy(update={"base": str(out)})
        model = TorchModel(load_base(own), study.tasks, settings=own, slots=1)
        losses.append(_tempered_loss(model, judged))
        model.close()
        study.say(f"base {variant}: {epochs} epochs, calibrate users' loss {losses[-1]:.4f}")
        if losses[-1] > min(losses):
            break
    write_whole(folder / CURVE, json.dumps({"calibrate_loss_by_epochs": losses}) + "\n")
    return folder / str(first + _least(losses))


def _tried(study: Study, variant: Variant, judged: Sequence[Example]) -> tuple[int, int]:
    """Return the least and the largest number of epochs to try."""
    if study.searches and judged:
        return 1, study.recipe.base_epochs
    losses = _kept(study.searched / f"base-{variant}") if study.searched is not None else []
    if not losses or not study.recipe.base_search:
        return study.recipe.base_epochs, study.recipe.base_epochs
    best = 1 + _least(losses)
    return best, best


def _least(losses: Sequence[float]) -> int:
    """Return where the least loss stands, of none at the beginning."""
    return losses.index(min(losses)) if losses else 0


def curve(study: Study, variant: Variant) -> list[float]:
    """Return the calibrate users' loss after 1, 2, … epochs; empty where no number was searched for or judged."""
    if not study.fold.adapt or not study.searches:
        return []
    return _kept(study.folder / f"base-{variant}")


def _kept(folder: Path) -> list[float]:
    text = (folder / CURVE).read_text(encoding="utf-8")
    return [float(loss) for loss in json.loads(text)["calibrate_loss_by_epochs"]]


def _judged(study: Study, variant: Variant) -> list[Example]:
    """Return the calibrate users' items that have an answer to be judged by."""
    found = []
    for person in study.fold.calibrate:
        made = drawn(person.items, study.pasts[person.user_id], variant, study.seed)
        found += [one for item, one in zip(person.items, made, strict=True) if item.answered]
    return found


def unadapted(study: Study) -> str:
    """Return the base before task adaption.

    The offline base learns to read left to right first, from the inputs alone, in as many epochs as the plain base
    had; any other base is taken as it is, as is the offline one where there is nobody to learn from.
    """
    if study.settings.model.base != OFFLINE or not study.fold.adapt:
        return study.settings.model.base
    out = study.folder / "base-unadapted"
    if not (out / RECIPE).exists():
        epochs = int(adapted(study, "plain").name)
        adapt_once(study, _learnt(study, "plain"), out, epochs, "base without adaption", answers=False)
    return str(out)


def adapt_once(
    study: Study, examples: Sequence[Example], out: Path, epochs: int, name: str, *, answers: bool = True
) -> None:
    """Adapt the study's base by the recipe's method for a number of epochs, and write the result.

    Args:
        study: Base, rates and seed.
        examples: What is learnt.
        out: Folder to write.
        epochs: Passes over the examples.
        name: For progress.
        answers: Whether the outputs are learnt, or the inputs' text only.
    """
    recipe = study.recipe
    rate, batch = recipe.base_learning_rate, recipe.base_batch
    config = AdaptConfig(recipe.base_method, epochs, rate, batch, seed=study.seed, answers=answers)

    def progress(done: int, steps: int, loss: float) -> None:
        if done % max(1, steps // 5) == 0:
            study.say(f"{name}: step {done} of {steps}" + (f", loss {loss:.3f}" if answers else ""))

    base = load_base(study.settings.model, adapting=True)
    adapt(base, study.tasks, examples, out, config=config, settings=study.settings.model, progress=progress)


def _learnt(study: Study, variant: Variant) -> list[Example]:
    """Return the adapt users' items in the variant's prompts, in the fold's order; as many as the recipe takes."""
    phrased: dict[str, Example] = {}
    for user, own in by_user(study.fold.adapt).items():
        made = drawn(own, study.pasts[user], variant, study.seed)
        phrased |= {item.item_id: one for item, one in zip(own, made, strict=True)}
    return [phrased[item.item_id] for item in learnt_items(study.fold.adapt, study.recipe, study.seed)]


def learnt_items(items: Sequence[Item], recipe: Recipe, seed: int) -> list[Item]:
    """Return as many items as the recipe takes, drawn without regard to anything, in the given order."""
    if recipe.adapt_items is None or len(items) <= recipe.adapt_items:
        return list(items)
    drawn_first = sorted(items, key=lambda i: hashlib.sha256(f"{seed}:adapt:{i.item_id}".encode()).digest())
    kept = {item.item_id for item in drawn_first[: recipe.adapt_items]}
    return [item for item in items if item.item_id in kept]


def _tempered_loss(model: TorchModel, judged: Sequence[Example]) -> float:
    """Return the mean loss; of a choice task, at the best of the temperatures."""
    scores = score(model, judged, None)
    if not judged[0].choices:
        return float(-np.nanmean(scores, axis=1).mean())
    right = [e.choices.index(e.output) for e in judged]
    return min(
        -float(np.mean([log_softmax(row / t)[at] for row, at in zip(scores, right, strict=True)])) for t in TEMPERATURES
    )
