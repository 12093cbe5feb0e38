"""The next-token loss of single tokens and of parts of a text."""

import torch
import torch.nn.functional as F


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


def sum_by_unit(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns the sum over each unit of the values at the positions in `mask` `(batch, places)`."""
    units = -(-mask.shape[1] // UNIT)
    row, place = mask.nonzero(as_tuple=True)
    sums = torch.zeros(len(mask) * units, dtype=sum_dtype(mask.device), device=mask.device)
    return sums.index_add_(0, row * units + place // UNIT, values.to(sums.dtype))


def joined(parts: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Returns the values of all parts as one tensor, empty if there are no parts."""
    return torch.cat(parts) if parts else torch.zeros(0, dtype=sum_dtype(mask.device), device=mask.device)


def logit_spread(logits: torch.Tensor) -> float:
    """Returns the standard deviation of logits, without masked tokens (see [`MASKED`]) and what is no
    number; 0 if there are no others."""
    logits = logits.float()
    real = logits[logits.isfinite() & (logits > MASKED)]
    return float(real.std()) if len(real) > 1 else 0.0


def scaled_logits(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Returns `logits` `(..., vocabulary)` divided by a temperature, in float32, all finite: those of masked
    tokens lie [`LOWEST`] from the largest or further, which leaves the softmax as it is."""
    scaled = logits.float() / temperature
    if scaled.device.type == "cpu" and not (scaled.numel() and scaled.detach().amin() < MASKED):
        return scaled  # most models mask no token, and each further pass over the logits costs time
    most = scaled.detach().amax(-1, keepdim=True)
    return torch.where(scaled < MASKED, most - most.abs() + LOWEST, scaled)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy in nats, summed over positions.

    Args:
        logits (`torch.Tensor`): `(positions, vocabulary)`.
        targets (`torch.Tensor`): `(positions,)`, the tokens that follow.
    """
    return F.cross_entropy(logits.float(), targets.long(), reduction="sum")
