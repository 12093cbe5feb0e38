"""Losses over tokens: each a float32 SUM over the tokens that count, for the caller to divide.

Sums, because the right divisor is the number of tokens in the whole accumulated and distributed batch,
which no single micro-batch knows.
"""

import torch
import torch.nn.functional as F

from .lineage import Lineage


# The key of "the last hidden state": what the output head reads, after the final norm.
LAST = -1


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


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy in nats, summed over the positions in `mask`.

    Args:
        logits (`torch.Tensor`): `(batch, length, vocabulary)`.
        tokens (`torch.Tensor`): `(batch, length)`, the labels or the input itself.
        mask (`torch.Tensor`): `(batch, length - 1)`, from [`token_mask`].
    """
    return F.cross_entropy(logits[:, :-1][mask].float(), tokens[:, 1:][mask], reduction="sum")


def kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mask: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Forward divergence KL(teacher || student) in nats, summed over the positions in `mask`.

    Times the squared temperature, so that the gradient keeps its scale (Hinton et al., 1503.02531,
    section 2).

    Args:
        student_logits (`torch.Tensor`): `(batch, length, vocabulary)`.
        teacher_logits (`torch.Tensor`): `(batch, length, vocabulary)`.
        mask (`torch.Tensor`): `(batch, length - 1)`, from [`token_mask`].
        temperature (`float`, *optional*, defaults to 1.0): divides both logits.
    """
    student = student_logits[:, :-1][mask].float().div_(temperature).log_softmax(-1)
    teacher = teacher_logits[:, :-1][mask].float().div_(temperature).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared difference of hidden states, mean over features, summed over the positions in `mask`.

    Args:
        student (`torch.Tensor`): `(batch, length, hidden)`.
        teacher (`torch.Tensor`): `(batch, length, hidden)`.
        mask (`torch.Tensor`): `(batch, length - 1)`, from [`token_mask`].
    """
    difference = student[:, :-1][mask].float() - teacher[:, :-1][mask].float()
    return difference.square().mean(-1).sum()


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
