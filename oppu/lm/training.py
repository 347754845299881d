"""Train many users' adapters at once, each as if it were alone.

There may be more users than slots: who is done leaves, and the next one takes the slot in the next step. The loss is
a sum over users of the mean over that user's rows, so a slot's gradient is that user's own. Clipping, step counts,
warm-up, weight decay and moments are per slot; a slot without rows in a step stays bit-identical, and a user whose
gradient is not finite leaves without touching the others. Order within a user is the caller's.

A GPU is not waited for between steps: losses add up on it, and whether gradients were finite is read when somebody
ends, or after some steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from oppu.lm.bank import SlotBank
from oppu.lm.dropout import Dropout, row_seed
from oppu.lm.encoding import Target
from oppu.lm.forward import Runner, losses_of, target_log_probs, target_readings
from oppu.lm.port import TrainConfig
from oppu.lm.reading import planned, read_laid_out
from oppu.lm.transfer import sent
from oppu.lm.trunk import MEMORY_BYTES, Memory

_WARM_UP_SHARE = 0.1
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_CLIP_EPSILON = 1e-6
"""As in ``torch.nn.utils.clip_grad_norm_``, so that equality with it is exact."""
_ROW_TOKENS = 16
"""A step over more rows than forwards of this length hold is no cheaper a row, and the stacks' gradients grow."""
_LOOK_STEPS: Mapping[str, int] = {"cpu": 1, "cuda": 16}
"""Steps between two looks for users whose gradient is not finite: a GPU's queue runs dry at each."""


@dataclass(frozen=True, slots=True)
class SlotResult:
    """How a user's training went: whether its weights are finite, its steps, its mean loss over all rows."""

    finite: bool
    steps: int
    mean_loss: float


def _nothing(_user: int, _slot: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Calls:
    """What training calls: ``beat`` before every forward, ``begin`` (user, slot) to put a user's weights into a slot,
    ``end`` (user, slot) while the slot holds what the user's training ended with."""

    beat: Callable[[], None]
    begin: Callable[[int, int], None] = _nothing
    end: Callable[[int, int], None] = _nothing


class SlotAdamW:
    """AdamW (decoupled decay, arXiv 1711.05101) and norm clipping over stacks ``[slots, …]``, each slot alone."""

    def __init__(
        self, stacks: Sequence[torch.Tensor], *, learning_rate: float, weight_decay: float, clip_norm: float = 1.0
    ) -> None:
        """Start with zero moments.

        Args:
            stacks: Leaves whose first dimension is the slot.
            learning_rate: After the warm-up.
            weight_decay: Times the learning rate, a step.
            clip_norm: A slot's gradient is scaled down to this norm.
        """
        self._stacks = list(stacks)
        self._first = [torch.zeros_like(stack, requires_grad=False) for stack in stacks]
        self._second = [torch.zeros_like(stack, requires_grad=False) for stack in stacks]
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self._clip_norm = clip_norm
        slots, device = stacks[0].shape[0], stacks[0].device
        self._count = torch.zeros(slots, dtype=torch.float64, device=device)
        self.finite = torch.ones(slots, dtype=torch.bool, device=device)

    def clear(self, slot: int) -> None:
        """Forget a slot's past: somebody else's weights lie in it now."""
        for moment in (*self._first, *self._second):
            moment[slot] = 0
        self._count[slot] = 0
        self.finite[slot] = True

    @torch.no_grad()
    def step(self, slots: Sequence[int], warm_up: Sequence[int], total: Sequence[int] | None = None) -> None:
        """Update some slots from the stacks' gradients, which are cleared.

        A slot whose gradient is not finite is dropped: it stays as it is until ``clear``.

        Args:
            slots: The slots that had rows in this step.
            warm_up: Steps over which each slot's learning rate rises to its full value.
            total: Each slot's steps in all, towards whose end the rate falls to zero; ``None``: it stays.
        """
        rows = sent(slots, self._count.device)
        rises = sent(warm_up, rows.device, torch.float64)
        ends = rises.new_full(rises.shape, torch.inf) if total is None else sent(total, rows.device, torch.float64)
        grads = [_taken(stack.grad, stack, rows) for stack in self._stacks]
        norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
        keep = self.finite[rows] & norms.isfinite()
        self.finite[rows] = keep
        count = self._count[rows] + keep
        self._count[rows] = count
        falls = torch.where(ends.isinf(), 1.0, (ends - count + 1) / (ends - rises).clamp(min=1.0))
        rate = self._learning_rate * (count / rises).clamp(max=1.0).minimum(falls)
        clip = (self._clip_norm / (norms + _CLIP_EPSILON)).clamp(max=1.0)
        root, size, decay = (1 - _BETA2**count).sqrt(), rate / (1 - _BETA1**count), 1 - rate * self._weight_decay
        for at, grad in enumerate(grads):
            self._update(at, rows, grad.mul_(_beside(clip, grad)), keep, (root, size, decay))
        for stack in self._stacks:
            stack.grad = None

    def _update(
        self, at: int, rows: torch.Tensor, grad: torch.Tensor, keep: torch.Tensor, numbers: Sequence[torch.Tensor]
    ) -> None:
        root, size, decay = (_beside(number, grad) for number in numbers)
        stacks = self._stacks[at], self._first[at], self._second[at]
        old_weights, old_first, old_second = (stack.index_select(0, rows) for stack in stacks)
        first = old_first.lerp(grad, 1 - _BETA1)
        second = (old_second * _BETA2).addcmul_(grad, grad, value=1 - _BETA2)
        change = (first * size).div_(second.sqrt().div_(root).add_(_EPSILON))
        weights = (old_weights * decay).sub_(change)
        kept = keep.view(-1, *(1,) * (grad.dim() - 1))
        for stack, new, old in zip(stacks, (weights, first, second), (old_weights, old_first, old_second), strict=True):
            stack.index_copy_(0, rows, torch.where(kept, new, old))


@dataclass(frozen=True, slots=True)
class _Course:
    """One user's steps: its targets cut into train batches, over and over; ``seed`` is of what is dropped in them."""

    user: int
    batches: tuple[tuple[Target, ...], ...]
    steps: int
    seed: int

    @property
    def warm_up(self) -> int:
        return max(1, math.ceil(_WARM_UP_SHARE * self.steps))

    @property
    def rows(self) -> int:
        return sum(len(self.batch(step)) for step in range(self.steps))

    def batch(self, step: int) -> tuple[Target, ...]:
        return self.batches[step % len(self.batches)]


@dataclass(slots=True)
class _Seat:
    """A user in a slot: the steps it has taken, and the losses so far of its rows that nothing is computed for."""

    slot: int
    course: _Course
    taken: int = 0
    certain: float = 0.0

    @property
    def batch(self) -> tuple[Target, ...]:
        """The rows of its next step."""
        return self.course.batch(self.taken)

    @property
    def through(self) -> bool:
        """Whether it has taken all its steps."""
        return self.taken >= self.course.steps


def slots_for(runner: Runner, users: int, config: TrainConfig) -> int:
    """Return how many slots training some users takes: as many as have rows enough to fill a forward."""
    return max(1, min(users, runner.tokens // (_ROW_TOKENS * config.batch)))


def train_slots(
    runner: Runner,
    bank: SlotBank,
    targets: Sequence[Sequence[Target]],
    config: TrainConfig,
    calls: Calls,
    *,
    seeds: Sequence[int] = (),
) -> list[SlotResult]:
    """Train users in a bank's slots.

    Those with most steps begin first, so that few are left at the end; where all fit, user i has slot i + 1.

    Args:
        runner: The base that the bank is attached to.
        bank: Trainable, with at least one slot.
        targets: Each user's examples in their order (cut into batches of ``config.batch``, ``config.passes`` times
            over).
        config: Common to all.
        calls: What is called meanwhile.
        seeds: Each user's own, of what dropout leaves out; none: 0 for all.

    Returns:
        One result a user.
    """
    numbers = seeds or [0] * len(targets)
    courses = [_course(user, *own, config) for user, own in enumerate(zip(targets, numbers, strict=True))]
    waiting = sorted(courses, key=lambda course: -course.steps)
    first, waiting = sorted(waiting[: bank.slots], key=lambda course: course.user), waiting[bank.slots :]
    optimizer = SlotAdamW(
        bank.weights,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    losses = torch.zeros(bank.slots + 1, dtype=torch.float64, device=runner.base.device)
    again = any(course.steps > len(course.batches) for course in courses)
    memory = Memory(MEMORY_BYTES // runner.streams.count) if again else None
    step = _Step(runner, bank, optimizer, config, calls, losses, memory)
    results: dict[int, SlotResult] = {}
    seats = [step.seated(slot, course) for slot, course in enumerate(first, start=1)]
    look = _LOOK_STEPS.get(runner.base.device.type, 1)
    number = 0
    while seats:
        number += 1
        step.take([seat for seat in seats if not seat.through])
        if number % look and not any(seat.through for seat in seats):
            continue
        finite = optimizer.finite.tolist()
        over = [seat for seat in seats if seat.through or not finite[seat.slot]]
        seats = [seat for seat in seats if seat not in over]
        for seat in over:
            results[seat.course.user] = step.left(seat, finite=finite[seat.slot])
            if waiting:
                seats.append(step.seated(seat.slot, waiting.pop(0)))
    return [results[course.user] for course in courses]


def _course(user: int, rows: Sequence[Target], seed: int, config: TrainConfig) -> _Course:
    batches = tuple(tuple(rows[at : at + config.batch]) for at in range(0, len(rows), config.batch))
    return _Course(user, batches, config.passes * len(batches), seed)


@dataclass(frozen=True, slots=True)
class _Step:
    """Takes one optimizer step of every seated user in common forwards; ``losses`` sums them by slot, ``memory`` holds
    what no adapter reaches of examples that come again."""

    runner: Runner
    bank: SlotBank
    optimizer: SlotAdamW
    config: TrainConfig
    calls: Calls
    losses: torch.Tensor
    memory: Memory | None

    def seated(self, slot: int, course: _Course) -> _Seat:
        """Give a user a slot."""
        self.calls.begin(course.user, slot)
        self.optimizer.clear(slot)
        self.losses[slot] = 0.0
        return _Seat(slot, course)

    def left(self, seat: _Seat, *, finite: bool) -> SlotResult:
        """Take a user's result from its slot."""
        self.calls.end(seat.course.user, seat.slot)
        weights = torch.stack([weights[seat.slot].isfinite().all() for weights in self.bank.weights])
        finite, rows = finite and bool(weights.all()), seat.course.rows
        mean = (seat.certain + float(self.losses[seat.slot])) / rows if rows else 0.0
        return SlotResult(finite=finite, steps=seat.course.steps, mean_loss=mean if finite else math.nan)

    def take(self, active: Sequence[_Seat]) -> None:
        """Take every seat's next step."""
        if not active:
            return
        self._backward(active)
        totals = [seat.course.steps for seat in active] if self.config.schedule == "linear" else None
        self.optimizer.step([seat.slot for seat in active], [seat.course.warm_up for seat in active], totals)
        for seat in active:
            seat.taken += 1

    def _backward(self, active: Sequence[_Seat]) -> None:
        """Put the next step's gradients on the stacks and add its losses."""
        rows = [(seat, place, target) for seat in active for place, target in enumerate(seat.batch)]
        for seat, _, target in rows:
            if not target.positions:
                seat.certain += target.offset
        live = [row for row in rows if row[2].positions]
        readings = target_readings([target for *_, target in live], [seat.slot for seat, *_ in live])
        self.calls.beat()
        for group in planned(self.runner, readings, apart=True):
            self.calls.beat()
            members = [live[at] for at in group.members]
            slots, targets = [seat.slot for seat, *_ in members], [target for *_, target in members]
            logits = read_laid_out(
                self.runner,
                self.bank,
                [readings[at] for at in group.members],
                group.layout,
                dropout=self._dropout(members),
                memory=self.memory,
            )
            losses = losses_of(target_log_probs(logits, targets), targets)
            weights = sent([1 / len(seat.batch) for seat, *_ in members], losses.device, losses.dtype)
            torch.autograd.backward((losses * weights).sum())
            self.losses.index_add_(0, sent(slots, losses.device), losses.detach().double())

    def _dropout(self, members: Sequence[tuple[_Seat, int, Target]]) -> Dropout | None:
        """Seed each row by its user's training, step and place in it: whoever shares the batch."""
        if not self.config.dropout:
            return None
        return Dropout(
            self.config.dropout, tuple(row_seed(seat.course.seed, seat.taken, place) for seat, place, _ in members)
        )


def _taken(grad: torch.Tensor | None, stack: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if grad is None:
        return torch.zeros_like(stack[rows])
    return grad.index_select(0, rows)


def _beside(numbers: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    """Shape one number a slot ``[k]`` so that it multiplies a stack ``[k, …]`` of the same type."""
    return numbers.to(stack.dtype).view(-1, *(1,) * (stack.dim() - 1))
