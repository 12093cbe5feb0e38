"""Losses over tokens: each a float32 SUM over the tokens that count, for the caller to divide.

Sums, because the right divisor is the number of tokens in the whole accumulated and distributed batch,
which no single micro-batch knows.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import is_liger_kernel_available

from ..forward.hooks import LAST
from ..forward.token_losses import LOWEST, scaled_logits
from ..surgery.lineage import Lineage


DROWNED = 10.0  # times the other terms


@dataclass
class TopKLogProbs:
    """The likeliest tokens at some positions and their log-probabilities, and that of all others as one.

    Args:
        ids (`torch.Tensor`): `(..., k)`, the likeliest first.
        log_probs (`torch.Tensor`): `(..., k + 1)`, float32; the last is of all other tokens together.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    def __getitem__(self, index: Any) -> "TopKLogProbs":
        return TopKLogProbs(self.ids[index], self.log_probs[index])


def top_k_log_probs(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopKLogProbs:
    """The `k` likeliest tokens by logits `(..., vocabulary)`, of which there are more than `k`."""
    ids = logits.topk(k, dim=-1).indices
    return TopKLogProbs(ids, _lumped(scaled_logits(logits, temperature), ids))


def _lumped(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log-probabilities `(..., k + 1)` of `ids` `(..., k)` and of all other tokens together."""
    others = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    whole = logits.logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), others], -1) - whole


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | TopKLogProbs,
    kind: str = "kl",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> torch.Tensor:
    """Distance of two distributions in nats, summed over positions.

    It is finite, and so are its gradients, also where a logit is -inf: a token that one of the two can never
    say lies [`LOWEST`] nats from its likeliest one. Times the squared temperature, so that the gradient
    keeps its scale (Hinton et al., 1503.02531, section 2).

    Args:
        student_logits (`torch.Tensor`): `(positions, vocabulary)`.
        teacher_logits (`torch.Tensor` or [`TopKLogProbs`]): `(positions, vocabulary)`, or the top-k tokens at
            this temperature. Then both are distributions over these tokens and all others as one, and the
            divergence is at most that over all tokens.
        kind (`str`, *optional*, defaults to `"kl"`): `"kl"`, forward, KL(teacher || student);
            `"reverse_kl"`, KL(student || teacher); or `"jsd"`, the generalised Jensen-Shannon divergence
            `beta KL(teacher || m) + (1 - beta) KL(student || m)` with `m = beta teacher + (1 - beta) student`
            (Agarwal et al., 2306.13649, section 2).
        temperature (`float`, *optional*, defaults to 1.0): divides both logits.
        beta (`float`, *optional*, defaults to 0.5): of `"jsd"`, above 0 and below 1.
    """
    scaled = scaled_logits(student_logits, temperature)
    if isinstance(teacher_logits, TopKLogProbs):
        student, teacher = _lumped(scaled, teacher_logits.ids), teacher_logits.log_probs.clamp(min=LOWEST)
    else:
        student, teacher = scaled.log_softmax(-1), scaled_logits(teacher_logits, temperature).log_softmax(-1)
    if student.is_cuda and is_liger_kernel_available():
        return liger_divergence(student, teacher, kind, beta) * temperature**2
    if kind == "kl":
        total = _kl(teacher, student)
    elif kind == "reverse_kl":
        total = _kl(student, teacher)
    else:
        mixed = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
        total = beta * _kl(teacher, mixed) + (1 - beta) * _kl(student, mixed)
    return total * temperature**2


def liger_divergence(
    student: torch.Tensor, teacher: torch.Tensor, kind: str = "kl", beta: float = 0.5
) -> torch.Tensor:
    """[`divergence`] of log-probabilities `(positions, tokens)`, in one kernel of Liger (2410.10989)."""
    from liger_kernel.transformers import LigerJSD

    if not len(student):
        return student.sum()
    # There 0 and 1 are the two divergences, not the limits of what lies between.
    jsd = LigerJSD({"kl": 0.0, "reverse_kl": 1.0, "jsd": beta}[kind])
    return jsd(student, teacher) * len(student)


def _kl(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) of log-probabilities, summed."""
    return F.kl_div(found, expected, reduction="sum", log_target=True)


def hidden_error(student: torch.Tensor, teacher: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """Difference of hidden states, summed over positions.

    Args:
        student, teacher (`torch.Tensor`): `(positions, hidden)`, or `(positions, streams, hidden)`.
        kind (`str`, *optional*, defaults to `"mse"`): `"mse"`, the squared error, mean over features;
            `"normalized_mse"`, the same relative to the teacher's mean square, so that models and layers
            compare; `"cosine"`, one minus the cosine.
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
    """Which student layer's output is compared with which teacher layer's, as present indices.

    Iterative Layer-wise Distillation (2511.05085) compares a student layer with the layer it came from,
    at the cut and at the end. The end is [`LAST`], the state that the output head reads.

    Args:
        student (`Lineage`): of the model that is trained.
        teacher (`Lineage`): of the model that teaches; it has all layers that the student has.
        layers (`list[int]`, *optional*): original indices of the layers to compare, of which those
            that were removed are left out; left out, the layer after each cut and the last.
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
    """Whether the error of hidden states outweighs the other terms of the loss.

    Args:
        hidden, others (`float`): both as they are weighted.
    """
    if not hidden > DROWNED * others:
        return None
    return (
        f"The error of hidden states makes up {hidden:.3g} of the loss, the other terms {others:.3g}: these "
        "are hardly learnt from. Lower hidden_weight, or set balance_hidden=True or "
        "hidden_loss='normalized_mse'."
    )
