"""Losses over tokens: each a float32 SUM over the tokens that count, for the caller to divide.

Sums, because the right divisor is the number of tokens in the whole accumulated and distributed batch,
which no single micro-batch knows.
"""

import math

import torch
import torch.nn.functional as F

from .lineage import Lineage


# The key of "the last hidden state": what the output head reads, after the final norm.
LAST = -1

DIVERGENCES = ("kl", "reverse_kl", "jsd")
HIDDEN_ERRORS = ("mse", "normalized_mse", "cosine")


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
    """
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
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    kind: str = "kl",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> torch.Tensor:
    """Distance of two distributions in nats, summed over positions.

    Times the squared temperature, so that the gradient keeps its scale (Hinton et al., 1503.02531,
    section 2).

    Args:
        student_logits, teacher_logits (`torch.Tensor`): `(positions, vocabulary)`.
        kind (`str`, *optional*, defaults to `"kl"`): `"kl"`, forward, KL(teacher || student);
            `"reverse_kl"`, KL(student || teacher); or `"jsd"`, the generalised Jensen-Shannon divergence
            `beta KL(teacher || m) + (1 - beta) KL(student || m)` with `m = beta teacher + (1 - beta) student`
            (Agarwal et al., 2306.13649, section 2).
        temperature (`float`, *optional*, defaults to 1.0): divides both logits.
        beta (`float`, *optional*, defaults to 0.5): of `"jsd"`, above 0 and below 1.
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.float() / temperature).log_softmax(-1)
    if kind == "kl":
        total = _kl(teacher, student)
    elif kind == "reverse_kl":
        total = _kl(student, teacher)
    else:
        mixed = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
        total = beta * _kl(teacher, mixed) + (1 - beta) * _kl(student, mixed)
    return total * temperature**2


def _kl(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) of log-probabilities, summed."""
    return F.kl_div(found, expected, reduction="sum", log_target=True)


def hidden_error(student: torch.Tensor, teacher: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """Difference of hidden states, summed over positions.

    Args:
        student, teacher (`torch.Tensor`): `(positions, hidden)`.
        kind (`str`, *optional*, defaults to `"mse"`): `"mse"`, the squared error, mean over features;
            `"normalized_mse"`, the same relative to the teacher's mean square, so that models and layers
            compare; `"cosine"`, one minus the cosine.
    """
    student, teacher = student.float(), teacher.float()
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
