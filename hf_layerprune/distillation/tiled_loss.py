"""Computes losses of logits tile by tile, so that memory never holds all logits or their gradients."""

from collections.abc import Callable
from typing import Any

import torch

from ..forward.lm_head import ROWS, ChunkedLMHead
from ..forward.memory import free_gpu_memory
from .teacher_cache import CachedTeacherLogits


LOGITS_PER_CHUNK_CPU = 2**23  # logits per tile on a CPU
LOGITS_PER_CHUNK_GPU = 2**26  # logits per tile on a GPU, where each kernel launch has a cost
LOGITS_PER_CHUNK_LARGE_GPU = 2**27  # logits per large tile: a tenth faster, with 1.5 GiB more memory
FREE_FOR_LARGE = 16 * 2**30  # free bytes of a GPU at which tiles become large

# A function of the student's logits `(positions, vocabulary)` in float32, the teacher's logits, and the
# targets `(positions,)`. It returns the sum of each loss.
Losses = Callable[[torch.Tensor, Any, torch.Tensor], dict[str, torch.Tensor]]


def tiled_loss(
    student: ChunkedLMHead,
    student_states: torch.Tensor,
    teacher: ChunkedLMHead | CachedTeacherLogits,
    teacher_states: Any,
    targets: torch.Tensor,
    losses: Losses,
    weights: dict[str, float],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the weighted sum of the losses of logits, and the sum of each loss without gradient.

    The gradient is computed together with the loss, in float32 down to the logits (as in Liger's fused
    losses, 2410.10989, section 3.2).

    Args:
        student, teacher ([`ChunkedLMHead`]): the LM heads, which compute logits from hidden states. `teacher`
            may be [`CachedTeacherLogits`].
        student_states, teacher_states (`torch.Tensor`): `(positions, hidden)`, the last hidden states.
            `teacher_states` may be the cached [`TopKLogProbs`] or [`SampledTokens`] of the teacher.
        targets (`torch.Tensor`): `(positions,)`, the next tokens.
        losses (`Callable`): the function that computes the losses, see `Losses`.
        weights (`dict[str, float]`): the weight of each loss.
    """
    parameters = student.head_parameters()
    sums: dict[str, torch.Tensor] = {}

    def tile_loss(tile: slice, with_gradient: bool) -> tuple[torch.Tensor, list[Any]]:
        """Returns the weighted sum over one tile.

        With `with_gradient` it also returns the gradients of the states and of each parameter.
        """
        teacher_logits = teacher.head(teacher_states[tile])
        with torch.set_grad_enabled(with_gradient):
            states = student_states[tile].detach().requires_grad_(with_gradient)
            logits = student.head(states)
        total = torch.zeros((), device=states.device)
        logits_gradient = torch.empty_like(logits, requires_grad=False) if with_gradient else None
        step = ROWS if states.device.type == "cpu" else len(logits)
        for start in range(0, max(1, len(logits)), max(1, step)):
            rows = slice(start, start + step)
            with torch.set_grad_enabled(with_gradient):
                row_logits = logits[rows].detach().float().requires_grad_(with_gradient)
                values = losses(row_logits, teacher_logits[rows], targets[tile][rows])
                weighted = torch.stack([weights[name] * value for name, value in values.items()]).sum()
            if logits_gradient is not None:
                (logits_gradient[rows],) = torch.autograd.grad(weighted, row_logits)
            total += weighted.detach()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        if logits_gradient is None:
            return total, []
        del teacher_logits  # free memory: the backward pass below needs the most
        used = [student.stand_in(parameter) for parameter in parameters]
        inputs = [states, *used]
        return total, list(torch.autograd.grad(logits, inputs, logits_gradient, allow_unused=True))

    def whole_loss(with_gradient: bool) -> tuple[torch.Tensor, list[Any]]:
        """Returns the weighted sum over all tiles, with `with_gradient` also the gradients."""
        step = max(1, logits_per_chunk(student_states.device) // student.vocabulary)
        total = torch.zeros((), device=student_states.device)
        gradients: list[Any] = []
        if with_gradient:
            gradients = [torch.empty_like(student_states), *[None] * len(parameters)]
        with student.cast_once(), teacher.cast_once():
            for start in range(0, max(1, len(student_states)), step):  # runs once even without positions
                tile = slice(start, start + step)
                tile_total, tile_gradients = tile_loss(tile, with_gradient)
                total += tile_total
                if with_gradient:
                    gradients[0][tile] = tile_gradients[0]
                    pairs = zip(gradients[1:], tile_gradients[1:], strict=True)
                    gradients[1:] = [_added(gradient, more) for gradient, more in pairs]
        return total, gradients

    loss = _LossWithGradient.apply(whole_loss, torch.is_grad_enabled(), student_states, *parameters)
    return loss, sums


def logits_per_chunk(device: torch.device) -> int:
    """Returns the number of logits per tile on a device. It is larger if much memory is free."""
    if device.type == "cpu":
        return LOGITS_PER_CHUNK_CPU
    free = free_gpu_memory(device)
    is_large = free is not None and free >= FREE_FOR_LARGE
    return LOGITS_PER_CHUNK_LARGE_GPU if is_large else LOGITS_PER_CHUNK_GPU


class _LossWithGradient(torch.autograd.Function):
    """A loss whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[bool], Any], enabled: bool, *inputs: torch.Tensor
    ) -> torch.Tensor:
        total, gradients = compute(enabled and any(ctx.needs_input_grad))
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *loss_gradient: torch.Tensor) -> Any:
        # In place, as the gradient of an LM head is large. Autograd does not allow a second backward pass.
        gradients = [None if saved is None else saved.mul_(loss_gradient[0]) for saved in ctx.saved_tensors]
        return None, None, *gradients


def _added(total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the sum of the gradients of two tiles in float32. None counts as zero."""
    if total is None or more is None:
        return total if more is None else more.float()
    return total.add_(more)
