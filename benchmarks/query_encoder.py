"""Query encoders of few blocks and neurons: what evidence they find against the embedder's, and how fast they are.

``python -m benchmarks.query_encoder EVENTS [--task NAME] [--layers K …] [--neurons SHARE …] [--json FILE]``. Users fall
into two halves. An encoder is distilled from the inputs of one, and judged on the other's events: on the first three
fifths of each user's, each foreseen from that user's earlier days by neighbours and prior. How these are weighed is
fitted with the embedder's own vectors on the half that the encoder was distilled from. No user's last fifth is read, in
which tests lie.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import REPEATS, Cell, interleaved, machine, rounded, show, write
from evaluation.corpus import Item, by_user, load
from evaluation.history import Past, embedded, pasts
from evaluation.stacking import Seen, fit
from oppu.embedder import Embedder, QueryEncoder, SentenceEmbedder
from oppu.errors import ConfigError
from oppu.fusion import Stack
from oppu.lm.distillation import DistillConfig, distill
from oppu.settings import ModelSettings, RetrieverSettings
from oppu.tasks import load_tasks
from oppu.values import Vector

JUDGED_SHARE, LEARNT_SHARE = 0.6, 0.8
"""Of each user's events, the oldest."""
LEAST_EVENTS = 20
CALL = 256
NAMES = ("knn", "prior")
Array = NDArray[np.float64]
Pasts = Mapping[str, Sequence[Past]]


@click.command()
@click.argument("events", type=click.Path(path_type=Path))
@click.option("--task", default="news_categorize", show_default=True, help="One with choices.")
@click.option("--layers", type=click.IntRange(min=1), multiple=True, default=(1, 2), show_default=True)
@click.option(
    "--neurons",
    type=click.FloatRange(0, 1, min_open=True),
    multiple=True,
    default=(0.25, 1.0),
    show_default=True,
    help="Share of feed-forward neurons that is kept.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=DistillConfig().epochs, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=REPEATS, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result there.")
def main(
    *,
    events: Path,
    task: str,
    layers: tuple[int, ...],
    neurons: tuple[float, ...],
    epochs: int,
    repeats: int,
    out: Path | None,
) -> None:
    """Measure query encoders on this machine."""
    every = by_user(load(events, task, load_tasks()))
    items = _early(every, JUDGED_SHARE)
    before = _early(every, LEARNT_SHARE)
    embedder = _embedder(SentenceEmbedder, ModelSettings().embedder)
    vectors = embedded([i for own in items.values() for i in own], embedder)
    users = sorted(items)
    known = {user: pasts(own, vectors, embedder, RetrieverSettings()) for user, own in items.items()}
    halves = [
        (learnt, judged, fit([s for user in learnt for s in _seen(items[user], known[user])], NAMES))
        for learnt, judged in ((users[::2], users[1::2]), (users[1::2], users[::2]))
    ]
    rows = []
    with TemporaryDirectory(prefix="oppu-query-encoder-") as folder:
        for count, share in product(layers, neurons):
            recipe = DistillConfig(layers=count, neurons=share, epochs=epochs)
            parts, encoders = [], []
            for number, (learnt, judged, stack) in enumerate(halves):
                place = Path(folder) / f"{count}-{share}-{number}"
                texts = [i.input for user in learnt for i in before[user]]
                done = distill(ModelSettings(), texts, place, recipe)
                encoders.append(_embedder(QueryEncoder, str(place), embedder.fingerprint))
                own = {user: items[user] for user in judged}
                queries = embedded([i for user in judged for i in own[user]], encoders[-1])
                parts.append(_Part(own, known, dict(_found(own, vectors, embedder, queries)), stack, queries))
                click.echo(f"{count} layers, {share:g}, half {number}: {done.texts} texts", err=True)
            row = {"layers": count, "neurons": share, "cosine": _cosine(parts, vectors), **_judged(parts)}
            rows.append({**row, **_speed(embedder, encoders[0], _texts(items), repeats)})
    show("queries by a smaller encoder, evidence against the embedder's", rows)
    write(out, {"machine": machine(), "task": task, "epochs": epochs, "rows": rows})


@dataclass(frozen=True, slots=True)
class _Part:
    """Some users' items, their pasts as the embedder and as the encoder finds them, how evidence is weighed, and the
    encoder's vectors by item."""

    items: Mapping[str, Sequence[Item]]
    known: Pasts
    found: Pasts
    stack: Stack
    queries: Mapping[str, Vector]

    def merits(self, pasts_of: Pasts) -> dict[str, tuple[Array, Array]]:
        """Return by user whether each event is foreseen, and its log loss in nats, ``[n]`` each."""
        merits = {}
        for user, own in self.items.items():
            seen = _seen(own, pasts_of[user])
            said = [self.stack.scores(s.sources, s.events) for s in seen]
            right = np.array([float(int(p.argmax()) == s.right) for p, s in zip(said, seen, strict=True)])
            merits[user] = right, np.array([-p[s.right] for p, s in zip(said, seen, strict=True)])
        return merits


def _early(items: Mapping[str, Sequence[Item]], share: float) -> dict[str, Sequence[Item]]:
    """Return each user's first events."""
    found = {user: own[: int(share * len(own))] for user, own in items.items() if len(own) >= LEAST_EVENTS}
    if len(found) < 2 or any(not i.choices for own in found.values() for i in own):
        raise ConfigError(f"EVENTS: expected a task with choices and two users with {LEAST_EVENTS} events")
    return found


def _embedder(kind: type[SentenceEmbedder], *names: str) -> SentenceEmbedder:
    return kind(*names, dtype=ModelSettings().dtype)


def _found(
    items: Mapping[str, Sequence[Item]],
    vectors: Mapping[str, Vector],
    embedder: Embedder,
    queries: Mapping[str, Vector],
) -> Iterator[tuple[str, Sequence[Past]]]:
    for user, own in items.items():
        yield user, pasts(own, vectors, embedder, RetrieverSettings(), queries=queries)


def _cosine(parts: Sequence[_Part], vectors: Mapping[str, Vector]) -> float:
    """Return the mean cosine of texts of authors that the encoder was not distilled from to the embedder's vectors."""
    alike = [float(own @ vectors[name]) for part in parts for name, own in part.queries.items()]
    return rounded(sum(alike) / len(alike))


def _seen(items: Sequence[Item], found: Sequence[Past]) -> list[Seen]:
    """Return those events that anything is known of."""
    seen = []
    for item, past in zip(items, found, strict=True):
        if past.prior is not None and item.output in item.choices:
            knn = None if past.knn is None else np.log(past.knn)
            right = item.choices.index(item.output)
            seen.append(Seen({"knn": knn, "prior": np.log(past.prior)}, right, past.count))
    return seen


def _judged(parts: Sequence[_Part]) -> dict[str, Cell]:
    """Compare over all users; a user's events are not independent: standard errors are of a ratio of sums by user."""
    before = {user: merit for part in parts for user, merit in part.merits(part.known).items()}
    after = {user: merit for part in parts for user, merit in part.merits(part.found).items()}
    count = sum(len(right) for right, _ in before.values())
    row: dict[str, Cell] = {"users": len(before), "events": count}
    for at, name in enumerate(("accuracy", "log_loss")):
        sums = np.array([(after[user][at] - before[user][at]).sum() for user in before])
        apart = sums - sums.sum() / count * np.array([len(right) for right, _ in before.values()])
        row[f"{name}_embedder"] = rounded(sum(merit[at].sum() for merit in before.values()) / count)
        row[f"{name}_difference"] = round(float(sums.sum()) / count, 4)
        row[f"{name}_standard_error"] = round(float(np.sqrt((apart**2).sum())) / count, 4)
    return row


def _texts(items: Mapping[str, Sequence[Item]]) -> list[str]:
    """Return the texts of one call."""
    return [i.input for own in items.values() for i in own][:CALL]


def _speed(embedder: Embedder, encoder: Embedder, texts: Sequence[str], repeats: int) -> dict[str, Cell]:
    cases = {"embedder": partial(embedder.embed, texts), "encoder": partial(encoder.embed, texts)}
    found = interleaved(cases, repeats=repeats)
    return {
        "texts_per_second": rounded(len(texts) / found["encoder"].median),
        "ratio_to_embedder": rounded(found["embedder"].median / found["encoder"].median),
        "spread": rounded(found["encoder"].spread),
        "embedder_spread": rounded(found["embedder"].spread),
    }


if __name__ == "__main__":
    main()
