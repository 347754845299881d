"""What a row's batch-mates change in its answer: nothing but the order of sums, which may turn a near tie.

Users with trained adapters ask, each alone and then among one another's rows, in two orders.
"""

import copy
import random
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.bank_train import NEW, jobs_of, update_config
from benchmarks.timing import Cell
from oppu.errors import FatalError
from oppu.lm.base import LoadedBase
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Row, TrainJob
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from oppu.values import UserId

QUESTIONS = 16
"""Of each user: as many batches, each with a row of every user."""


@dataclass(frozen=True, slots=True)
class Changed:
    """Of so many ``answers`` among batch-mates the ``flipped_share`` whose likeliest choice is another one alone, and
    the ``largest_difference`` of a choice's log probability, nats."""

    answers: int
    flipped_share: float
    largest_difference: float

    def cells(self) -> dict[str, Cell]:
        """Return a table's row."""
        return asdict(self)


def changed_by_batch_mates(base: LoadedBase, tasks: Tasks, *, users: int, questions: int) -> Changed:
    """Ask alone and among others.

    Args:
        base: The base; it stays as it comes.
        tasks: The known tasks.
        users: Whose rows share a batch.
        questions: Of each user.

    Returns:
        What differed.

    Raises:
        FatalError: A user's training diverged, or scores are not finite.
    """
    model = TorchModel(replace(base, model=copy.deepcopy(base.model)), tasks, settings=ModelSettings(), slots=users)
    rows = _rows(model, tasks, users, questions)
    alone: list[NDArray[np.float64]] = [model.answer([row])[0].scores for row in rows]
    orders = [list(range(len(rows))), random.Random(0).sample(range(len(rows)), len(rows))]  # noqa: S311 - an order
    answers, flipped, largest = 0, 0, 0.0
    for order in orders:
        for first in range(0, len(order), users):
            some = order[first : first + users]
            for at, result in zip(some, model.answer([rows[at] for at in some]), strict=True):
                if not np.isfinite(result.scores).all():
                    raise FatalError("an answer's scores are not finite")
                largest = max(largest, float(np.abs(result.scores - alone[at]).max()))
                flipped += int(result.scores.argmax() != alone[at].argmax())
                answers += 1
    model.close()
    return Changed(answers, flipped / answers, largest)


def _rows(model: TorchModel, tasks: Tasks, users: int, questions: int) -> list[Row]:
    """Train every user's adapter on some events, and ask about later ones; neighbours are different users."""
    histories = jobs_of(users, NEW + questions, tasks)
    jobs = [TrainJob(UserId(f"u{at}"), None, history[:NEW], at) for at, history in enumerate(histories)]
    refs = [AdapterRef(job.user_id, 0, 1) for job in jobs]
    for ref, trained in zip(refs, model.train(jobs, update_config(), heartbeat=lambda: None), strict=True):
        if trained.tensors is None:
            raise FatalError(f"the adapter of {ref.user_id} did not stay finite")
        model.install(ref, trained.tensors)
    return [
        Row(one.task, one.input, choices=one.choices, adapter=ref)
        for number in range(questions)
        for ref, one in zip(refs, (history[NEW + number] for history in histories), strict=True)
    ]
