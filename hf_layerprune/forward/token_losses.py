"""Computes the next-token loss of tokens and of units of text."""

import torch
import torch.nn.functional as F

from ..data.targets import Positions


UNIT = 64  # tokens of a sequence whose sum is one observation, for standard errors and racing
LOWEST = -1e4
WITHOUT_FLOAT64 = ("mps",)
DIVERGENCES = ("kl", "reverse_kl", "jsd")
HIDDEN_ERRORS = ("mse", "normalized_mse", "cosine")
# Logits below this mask tokens that can never be predicted: -inf, or the smallest finite float. They get a
# finite value with probability 0, so that 0 times the value is 0.
MASKED = -1e30


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of sums on a device: float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def float64_device(device: torch.device) -> torch.device:
    """Returns the device to compute in float64 for a model on `device`: the CPU for an Apple GPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def sum_by_unit(positions: Positions, values: torch.Tensor) -> torch.Tensor:
    """Returns the sums of the values at these positions over each unit, `(units,)`."""
    rows, length = positions.shape
    units = -(-length // UNIT)
    device = positions.rows.device
    sums = torch.zeros(rows * units, dtype=sum_dtype(device), device=device)
    unit = positions.rows * units + positions.places // UNIT
    return sums.index_add_(0, unit, values.to(sums.dtype))


def joined(parts: list[torch.Tensor], positions: Positions) -> torch.Tensor:
    """Returns the values of all parts as one tensor, empty if there are no parts."""
    device = positions.rows.device
    return torch.cat(parts) if parts else torch.zeros(0, dtype=sum_dtype(device), device=device)


def logit_spread(logits: torch.Tensor) -> float:
    """Returns the standard deviation of logits, without masked tokens (see [`MASKED`]) and values that are
    not finite. It is 0 for fewer than two remaining logits."""
    logits = logits.float()
    real = logits[logits.isfinite() & (logits > MASKED)]
    return float(real.std()) if len(real) > 1 else 0.0


def scaled_logits(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Returns `logits` `(..., vocabulary)` divided by a temperature, in float32, all finite. Logits of masked
    tokens lie at least [`LOWEST`] below the largest logit, which does not change the softmax."""
    scaled = logits.float() / temperature
    if scaled.device.type == "cpu" and not (scaled.numel() and scaled.detach().amin() < MASKED):
        return scaled  # most models mask no token, and another pass over the logits takes time
    most = scaled.detach().amax(-1, keepdim=True)
    return torch.where(scaled < MASKED, most - most.abs() + LOWEST, scaled)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy in nats, summed over positions.

    Args:
        logits (`torch.Tensor`): `(positions, vocabulary)`.
        targets (`torch.Tensor`): `(positions,)`, the tokens that follow.
    """
    return F.cross_entropy(logits.float(), targets.long(), reduction="sum")
