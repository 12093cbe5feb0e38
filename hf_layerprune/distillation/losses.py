"""Losses over tokens. Each loss is a float32 sum over the tokens that count, and the caller divides it.

The divisor is the number of tokens in the whole accumulated and distributed batch. A single micro-batch does
not know this number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import is_liger_kernel_available

from ..forward.hooks import LAST
from ..forward.token_losses import LOWEST, scaled_logits
from ..surgery.lineage import Lineage
from .compiled_layers import recompilation
from .sampled_tokens import SampledTokens, sampled_kl


DOMINANCE = 10.0  # the hidden-state error dominates if it is above this multiple of the other terms


@dataclass
class TopKLogProbs:
    """The top-k tokens of each position with their log-probabilities. All other tokens count as one token.

    Args:
        ids (`torch.Tensor`): `(..., k)`, the most probable token first.
        log_probs (`torch.Tensor`): `(..., k + 1)`, float32. The last value is the log-probability of all
            other tokens together.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    def __getitem__(self, index: Any) -> "TopKLogProbs":
        return TopKLogProbs(self.ids[index], self.log_probs[index])


def top_k_log_probs(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopKLogProbs:
    """Returns the `k` most probable tokens of logits `(..., vocabulary)`. `k` must be below `vocabulary`."""
    ids = logits.topk(k, dim=-1).indices
    return TopKLogProbs(ids, _log_probs_with_rest(scaled_logits(logits, temperature), ids))


def _log_probs_with_rest(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities `(..., k + 1)` of `ids` `(..., k)` and of all other tokens together."""
    rest = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    normalizer = logits.logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), rest], -1) - normalizer


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | TopKLogProbs | SampledTokens,
    kind: str = "kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    compilation: tuple[str, str | None] | None = None,
) -> torch.Tensor:
    """Returns the divergence of two distributions in nats, summed over positions.

    The divergence and its gradients are finite even if a logit is -inf: a masked token is placed [`LOWEST`]
    nats below the most probable token. The divergence is multiplied by the squared temperature, so that the
    gradient keeps its scale (Hinton et al., 1503.02531, section 2).

    Args:
        student_logits (`torch.Tensor`): `(positions, vocabulary)`.
        teacher_logits (`torch.Tensor`, [`TopKLogProbs`] or [`SampledTokens`]): one of
            - the logits `(positions, vocabulary)`.
            - the top-k tokens at this temperature. Both distributions are then over these tokens and one
              token for all others. The divergence is at most the divergence over all tokens.
            - sampled tokens, only for `"kl"`.
        kind (`str`, *optional*, defaults to `"kl"`): `"kl"`, forward, KL(teacher || student);
            `"reverse_kl"`, KL(student || teacher); or `"jsd"`, the generalised Jensen-Shannon divergence
            `beta KL(teacher || m) + (1 - beta) KL(student || m)` with `m = beta teacher + (1 - beta) student`
            (Agarwal et al., 2306.13649, section 2).
        temperature (`float`, *optional*, defaults to 1.0): divides both logits.
        beta (`float`, *optional*, defaults to 0.5): the weight in `"jsd"`, above 0 and below 1.
        compilation (`tuple[str, str]`, *optional*): backend and mode of `torch.compile` for `"kl"` over all
            tokens. Compiled, it makes few passes over the logits. Default: no compilation.
    """
    if isinstance(teacher_logits, SampledTokens):
        return sampled_kl(student_logits, teacher_logits, temperature) * temperature**2
    uses_liger = student_logits.is_cuda and is_liger_kernel_available()
    if kind == "kl" and torch.is_tensor(teacher_logits) and (compilation or not uses_liger):
        return _ForwardKL.apply(student_logits, teacher_logits, temperature, compilation)
    scaled = scaled_logits(student_logits, temperature)
    if isinstance(teacher_logits, TopKLogProbs):
        student, teacher = (
            _log_probs_with_rest(scaled, teacher_logits.ids),
            teacher_logits.log_probs.clamp(min=LOWEST),
        )
    else:
        student, teacher = scaled.log_softmax(-1), scaled_logits(teacher_logits, temperature).log_softmax(-1)
    if uses_liger:
        return liger_divergence(student, teacher, kind, beta) * temperature**2
    if kind == "kl":
        total = _kl(teacher, student)
    elif kind == "reverse_kl":
        total = _kl(student, teacher)
    else:
        mixed = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
        total = beta * _kl(teacher, mixed) + (1 - beta) * _kl(student, mixed)
    return total * temperature**2


class _ForwardKL(torch.autograd.Function):
    """Computes the forward KL divergence over all tokens with its gradient in closed form.

    The gradient is `softmax(student) - teacher`. Autograd would make about three times as many passes over
    the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float,
        compilation: tuple[str, str | None] | None,
    ) -> torch.Tensor:
        compute = _kl_and_gradient if compilation is None else _compiled_kl(*compilation)
        total, gradient = compute(
            student_logits.detach(), teacher_logits.detach(), temperature, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(gradient)
        ctx.dtype = student_logits.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *loss_gradient: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        # In place, because autograd does not allow a second backward pass.
        return gradient.mul_(loss_gradient[0]).to(ctx.dtype), None, None, None


def _kl_and_gradient(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the forward KL divergence, and with `with_gradient` its gradient, see [`divergence`]."""
    student = _log_probs(student_logits, temperature)
    teacher = _log_probs(teacher_logits, temperature)
    probabilities = teacher.exp()
    total = teacher.sub_(student).mul_(probabilities).sum() * temperature**2
    if not with_gradient:
        return total, None
    gradient = student.exp_().sub_(probabilities)
    return total, gradient if temperature == 1.0 else gradient.mul_(temperature)


@cache
def _compiled_kl(backend: str, mode: str | None) -> Callable[..., Any]:
    compiled = torch.compile(_kl_and_gradient, backend=backend, mode=mode)

    def compute(*inputs: Any) -> Any:
        with recompilation():
            return compiled(*inputs)

    return compute


def _log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns finite log-probabilities in float32, see [`divergence`]."""
    scaled = logits if temperature == 1.0 else logits.float() / temperature
    return scaled.log_softmax(-1, dtype=torch.float32).clamp_(min=LOWEST)


def liger_divergence(
    student: torch.Tensor, teacher: torch.Tensor, kind: str = "kl", beta: float = 0.5
) -> torch.Tensor:
    """Returns the [`divergence`] of log-probabilities `(positions, tokens)`.

    A Liger kernel computes it (2410.10989).
    """
    from liger_kernel.transformers import LigerJSD

    if not len(student):
        return student.sum()
    # In Liger, beta 0 and 1 select the forward and the reverse KL.
    jsd = LigerJSD({"kl": 0.0, "reverse_kl": 1.0, "jsd": beta}[kind])
    return jsd(student, teacher) * len(student)


def _kl(target: torch.Tensor, approximation: torch.Tensor) -> torch.Tensor:
    """Returns the summed KL(target || approximation) of log-probabilities."""
    return F.kl_div(approximation, target, reduction="sum", log_target=True)


def hidden_error(student: torch.Tensor, teacher: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """Returns the error of hidden states, summed over positions.

    Args:
        student, teacher (`torch.Tensor`): `(positions, hidden)`, or `(positions, streams, hidden)`.
        kind (`str`, *optional*, defaults to `"mse"`): `"mse"`, the mean squared error over features;
            `"normalized_mse"`, the same relative to the teacher's mean square, which makes models and layers
            comparable; or `"cosine"`, one minus the cosine similarity.
    """
    student, teacher = student.float().flatten(1), teacher.float().flatten(1)
    if kind == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).sum()
    error = (student - teacher).square().mean(-1)
    if kind == "normalized_mse":
        error = error / teacher.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return error.sum()


def hidden_pairs(
    student: Lineage, teacher: Lineage, layers: list[int] | None = None
) -> list[tuple[int, int]]:
    """Returns the pairs of student and teacher layers to compare, as present indices.

    Iterative Layer-wise Distillation (2511.05085) compares each student layer with its original layer, at
    each cut and at the end. The end is [`LAST`], the input of the LM head.

    Args:
        student (`Lineage`): the lineage of the trained model.
        teacher (`Lineage`): the lineage of the teacher, which has all layers of the student.
        layers (`list[int]`, *optional*): original indices of the layers to compare. Removed layers are
            skipped. Default: the layer after each cut and the last layer.
    """
    if layers is None:
        wanted = [student.kept[i] for i in student.after_cuts] + [student.original - 1]
    else:
        wanted = layers
    pairs = [
        (student.kept.index(layer), teacher.kept.index(layer))
        for layer in wanted
        if layer in student.kept and layer != student.original - 1
    ]
    return pairs + [(LAST, LAST)] * (student.original - 1 in wanted)


def hidden_loss_dominates(hidden: float, others: float) -> str | None:
    """Returns a warning if the hidden-state error is much larger than the other loss terms, else None.

    Args:
        hidden, others (`float`): the weighted hidden-state error, and the sum of the other weighted terms.
    """
    if not hidden > DOMINANCE * others:
        return None
    return (
        f"The error of hidden states makes up {hidden:.3g} of the loss, the other terms {others:.3g}: they "
        "have hardly any effect. Lower hidden_weight, or set balance_hidden=True or "
        "hidden_loss='normalized_mse'."
    )
