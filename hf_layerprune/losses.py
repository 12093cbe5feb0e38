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

from .errors import LayerPruneError
from .lineage import Lineage


# The key of "the last hidden state": what the output head reads, after the final norm.
LAST = -1

DIVERGENCES = ("kl", "reverse_kl", "jsd")
HIDDEN_ERRORS = ("mse", "normalized_mse", "cosine")

# Logits below this are no predictions, but masks of tokens that can never be said: -inf, or the smallest
# finite float. They are taken to lie so far below the others that their probability is 0: 0 times this is 0.
MASKED = -1e30
LOWEST = -1e4


@dataclass
class Likeliest:
    """The likeliest tokens at some positions and their log-probabilities, and that of all others as one.

    Args:
        ids (`torch.Tensor`): `(..., k)`, the likeliest first.
        log_probs (`torch.Tensor`): `(..., k + 1)`, float32; the last is of all other tokens together.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    def __getitem__(self, index: Any) -> "Likeliest":
        return Likeliest(self.ids[index], self.log_probs[index])


def likeliest(logits: torch.Tensor, k: int, temperature: float = 1.0) -> Likeliest:
    """The `k` likeliest tokens by logits `(..., vocabulary)`, of which there are more than `k`."""
    ids = logits.topk(k, dim=-1).indices
    return Likeliest(ids, _lumped(scaled_logits(logits, temperature), ids))


def scaled_logits(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Returns `logits` `(..., vocabulary)` divided by a temperature, in float32, all finite: those of masked
    tokens lie [`LOWEST`] from the largest or further, which leaves the softmax as it is."""
    scaled = logits.float() / temperature
    if scaled.device.type == "cpu" and not (scaled.numel() and scaled.detach().amin() < MASKED):
        return scaled  # most models mask nothing, and there each further pass over the logits is felt
    most = scaled.detach().amax(-1, keepdim=True)
    return torch.where(scaled < MASKED, most - most.abs() + LOWEST, scaled)


def _lumped(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log-probabilities `(..., k + 1)` of `ids` `(..., k)` and of all other tokens together."""
    others = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    whole = logits.logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), others], -1) - whole


def logit_spread(logits: torch.Tensor) -> float:
    """Returns the standard deviation of logits, without masked tokens (see [`MASKED`]) and what is no
    number; 0 if there are no others."""
    logits = logits.float()
    real = logits[logits.isfinite() & (logits > MASKED)]
    return float(real.std()) if len(real) > 1 else 0.0


def token_mask(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which positions predict a token that counts, shifted as the logits are.

    Position t counts if its target, token t + 1, has a label (not -100), and neither of the two is
    padding.

    Args:
        input_ids (`torch.Tensor`): `(batch, length)`.
        labels (`torch.Tensor`, *optional*): `(batch, length)`; left out, every token has a label.
        attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 0 for padding.

    Returns:
        `torch.Tensor`: bool, `(batch, length - 1)`.

    Raises:
        LayerPruneError: the attention mask has another shape.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise LayerPruneError(
            f"The attention_mask has the shape {tuple(attention_mask.shape)}, but input_ids "
            f"{tuple(input_ids.shape)}. Give a mask of one number for each token, 0 for padding. For rows of "
            "several texts give position_ids and no mask."
        )
    mask = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    if labels is not None:
        mask = mask & (labels[:, 1:] != -100)
    if attention_mask is not None:
        real = attention_mask.bool()
        mask = mask & real[:, 1:] & real[:, :-1]
    return mask


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over positions.

    Args:
        logits (`torch.Tensor`): `(positions, vocabulary)`.
        targets (`torch.Tensor`): `(positions,)`, the tokens that follow.
    """
    return F.cross_entropy(logits.float(), targets.long(), reduction="sum")


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | Likeliest,
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
        teacher_logits (`torch.Tensor` or [`Likeliest`]): `(positions, vocabulary)`, or the likeliest tokens
            at this temperature: then both are distributions over these and all others as one, and the
            divergence is at most the whole one.
        kind (`str`, *optional*, defaults to `"kl"`): `"kl"`, forward, KL(teacher || student);
            `"reverse_kl"`, KL(student || teacher); or `"jsd"`, the generalised Jensen-Shannon divergence
            `beta KL(teacher || m) + (1 - beta) KL(student || m)` with `m = beta teacher + (1 - beta) student`
            (Agarwal et al., 2306.13649, section 2).
        temperature (`float`, *optional*, defaults to 1.0): divides both logits.
        beta (`float`, *optional*, defaults to 0.5): of `"jsd"`, above 0 and below 1.
    """
    scaled = scaled_logits(student_logits, temperature)
    if isinstance(teacher_logits, Likeliest):
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
