"""Train several users' adapters at once, each as if it were alone.

The loss is a sum over users of the mean over that user's rows, so a slot's gradient is that user's own. Clipping,
step counts, warm-up, weight decay and moments are per slot; a slot without rows in a step stays bit-identical,
and one whose gradient is not finite is dropped for good without touching the others. Order is the caller's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from oppu.lm.bank import SlotBank
from oppu.lm.encoding import Target
from oppu.lm.forward import Runner, buckets, target_losses
from oppu.lm.port import TrainConfig

CLIP_NORM = 1.0
_WARM_UP_SHARE = 0.1
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_CLIP_EPSILON = 1e-6
"""As in ``torch.nn.utils.clip_grad_norm_``, so that equality with it is exact."""


@dataclass(frozen=True, slots=True)
class SlotResult:
    """How a slot's training went: whether its weights are finite, its steps, its mean loss over all rows."""

    finite: bool
    steps: int
    mean_loss: float


class SlotAdamW:
    """AdamW (decoupled decay, arXiv 1711.05101) and norm clipping over stacks ``[slots, …]``, each slot alone."""

    def __init__(self, stacks: Sequence[torch.Tensor], *, learning_rate: float, weight_decay: float) -> None:
        """Start with zero moments.

        Args:
            stacks: Leaves whose first dimension is the slot.
            learning_rate: After the warm-up.
            weight_decay: Times the learning rate, a step.
        """
        self._stacks = list(stacks)
        self._first = [torch.zeros_like(stack, requires_grad=False) for stack in stacks]
        self._second = [torch.zeros_like(stack, requires_grad=False) for stack in stacks]
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        slots, device = stacks[0].shape[0], stacks[0].device
        self._count = torch.zeros(slots, dtype=torch.float64, device=device)
        self.finite = torch.ones(slots, dtype=torch.bool, device=device)

    @torch.no_grad()
    def step(self, slots: Sequence[int], warm_up: Sequence[int], total: Sequence[int] | None = None) -> None:
        """Update some slots from the stacks' gradients, which are cleared.

        Args:
            slots: The slots that had rows in this step.
            warm_up: Steps over which each slot's learning rate rises to its full value.
            total: Each slot's steps in all, towards whose end the rate falls to zero; ``None``: it stays.
        """
        rows = torch.tensor(slots, device=self._count.device)
        rises = torch.tensor(warm_up, dtype=torch.float64, device=rows.device)
        ends = rises.new_full(rises.shape, torch.inf) if total is None else torch.tensor(total).to(rises)
        grads = [_taken(stack.grad, stack, rows) for stack in self._stacks]
        norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
        self.finite[rows] &= norms.isfinite()
        keep = self.finite[rows]
        rows, rises, ends, norms = rows[keep], rises[keep], ends[keep], norms[keep]
        self._count[rows] += 1
        count = self._count[rows]
        falls = torch.where(ends.isinf(), 1.0, (ends - count + 1) / (ends - rises).clamp(min=1.0))
        rate = self._learning_rate * (count / rises).clamp(max=1.0).minimum(falls)
        clip = (CLIP_NORM / (norms + _CLIP_EPSILON)).clamp(max=1.0)
        for at, grad in enumerate(grads):
            self._update(at, rows, grad[keep] * _beside(clip, grad), count, rate)
        for stack in self._stacks:
            stack.grad = None

    def _update(self, at: int, rows: torch.Tensor, grad: torch.Tensor, count: torch.Tensor, rate: torch.Tensor) -> None:
        first = self._first[at][rows].lerp(grad, 1 - _BETA1)
        second = self._second[at][rows] * _BETA2 + (1 - _BETA2) * grad * grad
        self._first[at][rows], self._second[at][rows] = first, second
        weights = self._stacks[at][rows] * _beside(1 - rate * self._weight_decay, grad)
        root, size = _beside((1 - _BETA2**count).sqrt(), grad), _beside(rate / (1 - _BETA1**count), grad)
        self._stacks[at].index_copy_(0, rows, weights - size * first / (second.sqrt() / root + _EPSILON))


@dataclass(frozen=True, slots=True)
class _Course:
    """One user's steps: its targets cut into train batches, over and over."""

    slot: int
    batches: tuple[tuple[Target, ...], ...]
    steps: int

    @property
    def warm_up(self) -> int:
        return max(1, math.ceil(_WARM_UP_SHARE * self.steps))

    def batch(self, step: int) -> tuple[Target, ...]:
        return self.batches[step % len(self.batches)]


def train_slots(
    runner: Runner,
    bank: SlotBank,
    targets: Sequence[Sequence[Target]],
    config: TrainConfig,
    heartbeat: Callable[[], None],
) -> list[SlotResult]:
    """Train the bank's slots 1, 2, … on one user's targets each.

    Args:
        runner: The base that the bank is attached to.
        bank: Trainable, its slots holding the weights to start from.
        targets: For each slot in order, the user's examples in their order (cut into batches of
            ``config.batch``, ``config.passes`` times over).
        config: Common to all.
        heartbeat: Called before every forward.

    Returns:
        One result a slot.
    """
    courses = [_course(slot, rows, config) for slot, rows in enumerate(targets, start=1)]
    optimizer = SlotAdamW(bank.weights, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    sums = [0.0] * len(courses)
    for step in range(max((course.steps for course in courses), default=0)):
        active = [c for c in courses if step < c.steps and bool(optimizer.finite[c.slot])]
        if not active:
            break
        for course, loss in zip(active, _backward(runner, bank, active, step, heartbeat), strict=True):
            sums[course.slot - 1] += loss
        totals = [course.steps for course in active] if config.schedule == "linear" else None
        optimizer.step([course.slot for course in active], [course.warm_up for course in active], totals)
    return [_result(course, bank, optimizer, total) for course, total in zip(courses, sums, strict=True)]


def _course(slot: int, rows: Sequence[Target], config: TrainConfig) -> _Course:
    batches = tuple(tuple(rows[at : at + config.batch]) for at in range(0, len(rows), config.batch))
    return _Course(slot, batches, config.passes * len(batches))


def _backward(
    runner: Runner, bank: SlotBank, active: Sequence[_Course], step: int, heartbeat: Callable[[], None]
) -> list[float]:
    """Put this step's gradients on the stacks; return each course's summed loss."""
    rows = [(at, target) for at, course in enumerate(active) for target in course.batch(step)]
    sums = [0.0] * len(active)
    for at, target in rows:
        if not target.positions:
            sums[at] += target.offset
    live = [(at, target) for at, target in rows if target.positions]
    heartbeat()
    for group in buckets([len(target.ids) for _, target in live], runner.tokens):
        heartbeat()
        members = sorted((live[index] for index in group), key=lambda member: member[0])  # a slot's rows side by side
        slots = [active[at].slot for at, _ in members]
        with bank.use(slots):
            losses = target_losses(runner, [target for _, target in members], slots)
        shares = [1 / len(active[at].batch(step)) for at, _ in members]
        weights = torch.tensor(shares, dtype=losses.dtype, device=losses.device)
        torch.autograd.backward((losses * weights).sum())
        for (at, _), loss in zip(members, losses.tolist(), strict=True):
            sums[at] += loss
    return sums


def _result(course: _Course, bank: SlotBank, optimizer: SlotAdamW, total: float) -> SlotResult:
    weights_finite = all(bool(weights[course.slot].isfinite().all()) for weights in bank.weights)
    finite = bool(optimizer.finite[course.slot]) and weights_finite
    rows = sum(len(course.batch(step)) for step in range(course.steps))
    mean = total / rows if rows else 0.0
    return SlotResult(finite=finite, steps=course.steps, mean_loss=mean if finite else math.nan)


def _taken(grad: torch.Tensor | None, stack: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if grad is None:
        return torch.zeros_like(stack[rows])
    return grad.index_select(0, rows)


def _beside(numbers: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    """Shape one number a slot ``[k]`` so that it multiplies a stack ``[k, …]`` of the same type."""
    return numbers.to(stack.dtype).view(-1, *(1,) * (stack.dim() - 1))
