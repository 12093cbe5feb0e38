"""Samples tokens from a teacher's distribution for an unbiased estimate of the KL divergence over all tokens.

This is Random Sampling Knowledge Distillation (2503.16870). The top-k tokens alone give a biased gradient:
the student learns nothing about the order of the other tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..forward.token_losses import scaled_logits, sum_dtype


@dataclass
class SampledTokens:
    """Tokens sampled from the teacher's distribution at each position, each with the weight `1 / n`.

    Each token is sampled with its own probability, so that all importance weights are equal. A token may
    occur several times.

    Args:
        ids (`torch.Tensor`): `(..., n)`, the sampled tokens.
        entropy (`torch.Tensor`): `(...)`, float32, the entropy of the teacher's whole distribution in nats.
    """

    ids: torch.Tensor
    entropy: torch.Tensor

    def __getitem__(self, index: Any) -> "SampledTokens":
        return SampledTokens(self.ids[index], self.entropy[index])


def sample_tokens(
    logits: torch.Tensor, count: int, offsets: torch.Tensor, temperature: float = 1.0
) -> SampledTokens:
    """Samples `count` tokens at each position, on average in proportion to their probability.

    The sampling is systematic: `count` points at equal distances cut the cumulative distribution, and one
    random number shifts all points. Independent draws have the same mean and a larger variance.

    Args:
        logits (`torch.Tensor`): `(..., vocabulary)`, the teacher's logits.
        count (`int`): number of tokens per position.
        offsets (`torch.Tensor`): `(...)`, a uniform random number from 0 to 1 for each position.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits.
    """
    log_probs = scaled_logits(logits, temperature).log_softmax(-1)
    probabilities = log_probs.exp()
    entropy = -(probabilities * log_probs).sum(-1)
    # A float32 sum would lose the small probabilities of a large vocabulary.
    cumulative = probabilities.to(sum_dtype(logits.device)).cumsum(-1)
    points = torch.arange(count, device=logits.device, dtype=cumulative.dtype) + offsets[..., None]
    points = points / count * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, points.contiguous(), right=True)
    return SampledTokens(ids.clamp_(max=logits.shape[-1] - 1), entropy)


def sampled_kl(
    student_logits: torch.Tensor, teacher: SampledTokens, temperature: float = 1.0
) -> torch.Tensor:
    """Returns an estimate of KL(teacher || student) over all tokens, summed over positions.

    The estimate and its gradient are unbiased.

    Args:
        student_logits (`torch.Tensor`): `(positions, vocabulary)`.
        teacher ([`SampledTokens`]): the teacher's sampled tokens at this temperature.
        temperature (`float`, *optional*, defaults to 1.0): divides the student's logits.
    """
    scaled = scaled_logits(student_logits, temperature)
    log_probs = scaled.gather(-1, teacher.ids).mean(-1) - scaled.logsumexp(-1)
    return -(log_probs + teacher.entropy).sum()
