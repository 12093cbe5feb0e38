"""Losses of logits, tile by tile: neither logits nor their gradients are held for all tokens at once."""

from collections.abc import Callable
from typing import Any

import torch

from ..forward.lm_head import ROWS, Reader
from .teacher_cache import TeacherOutputs


TILE = 2**23  # logits that a CPU makes at once
GPU_TILE = 2**26  # and a GPU, whose launches have their price

# Of the student's logits `(positions, vocabulary)` in float32, what the teacher says, and the targets
# `(positions,)`: the sum of each loss.
Losses = Callable[[torch.Tensor, Any, torch.Tensor], dict[str, torch.Tensor]]


def tiled_loss(
    student: Reader,
    states: torch.Tensor,
    teacher: Reader | TeacherOutputs,
    taught: Any,
    targets: torch.Tensor,
    losses: Losses,
    weights: dict[str, float],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of losses of the student's logits, and the sum of each, without gradient.

    The gradient is computed together with the loss (as in Liger's fused losses, 2410.10989, section 3.2), in
    float32 down to the logits.

    Args:
        student, teacher ([`Reader`]): make logits of states.
        states, taught (`torch.Tensor`): `(positions, hidden)`, the student's and the teacher's; or, of
            [`TeacherOutputs`], what they hold.
        targets (`torch.Tensor`): `(positions,)`.
        losses (`Callable`): the losses.
        weights (`dict[str, float]`): what each of them counts.
    """
    parameters = student.head_parameters()
    sums: dict[str, torch.Tensor] = {}

    def read(part: slice, wanted: bool) -> tuple[torch.Tensor, list[Any]]:
        """Of one tile the weighted sum, and if wanted its gradients for the states and each parameter."""
        expected = teacher.head(taught[part])
        with torch.set_grad_enabled(wanted):
            leaf = states[part].detach().requires_grad_(wanted)
            logits = student.head(leaf)
        total = torch.zeros((), device=states.device)
        slope = torch.empty_like(logits, requires_grad=False) if wanted else None
        few = ROWS if states.device.type == "cpu" else len(logits)
        for row in range(0, max(1, len(logits)), max(1, few)):
            rows = slice(row, row + few)
            with torch.set_grad_enabled(wanted):
                own = logits[rows].detach().float().requires_grad_(wanted)
                found = losses(own, expected[rows], targets[part][rows])
                weighted = torch.stack([weights[name] * value for name, value in found.items()]).sum()
            if slope is not None:
                (slope[rows],) = torch.autograd.grad(weighted, own)
            total += weighted.detach()
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        if slope is None:
            return total, []
        del expected  # the most is held while gradients are made
        used = [student.stand_in(parameter) for parameter in parameters]
        return total, list(torch.autograd.grad(logits, [leaf, *used], slope, allow_unused=True))

    def compute(wanted: bool) -> tuple[torch.Tensor, list[Any]]:
        tile = TILE if states.device.type == "cpu" else GPU_TILE
        step = max(1, tile // student.vocabulary)
        total = torch.zeros((), device=states.device)
        slopes: list[Any] = [torch.empty_like(states), *[None] * len(parameters)] if wanted else []
        with student.cast_once(), teacher.cast_once():
            for start in range(0, max(1, len(states)), step):  # once also if there is no position
                part = slice(start, start + step)
                more, found = read(part, wanted)
                total += more
                if wanted:
                    slopes[0][part] = found[0]
                    slopes[1:] = [_added(a, b) for a, b in zip(slopes[1:], found[1:], strict=True)]
        return total, slopes

    return _Ahead.apply(compute, torch.is_grad_enabled(), states, *parameters), sums


class _Ahead(torch.autograd.Function):
    """A number whose gradients are computed together with it."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[bool], Any], enabled: bool, *inputs: torch.Tensor
    ) -> torch.Tensor:
        total, slopes = compute(enabled and any(ctx.needs_input_grad))
        ctx.save_for_backward(*slopes)
        return total

    @staticmethod
    def backward(ctx: Any, *slope: torch.Tensor) -> Any:
        # In place, as a head's gradient is large: a second backward is refused, as after any other.
        return None, None, *(None if one is None else one.mul_(slope[0]) for one in ctx.saved_tensors)


def _added(total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """Gradients of tiles, added up in float32."""
    if total is None or more is None:
        return total if more is None else more.float()
    return total.add_(more)
