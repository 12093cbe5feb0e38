"""Computes the logits of a few tokens, and compares the logits of two models up to rounding."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..forward.hooks import compared_output
from ..surgery.decoder import text_config
from ..surgery.peft import base_of


def sample_logits(model: Any, forward: Any = None) -> torch.Tensor:
    """Returns the output of a model for a few tokens, in float32 on the CPU.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model, in eval mode.
        forward (`Callable`, *optional*): the function to call instead of the model.
    """
    base = base_of(model)
    text = text_config(base.config)
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)
    tokens = torch.arange(2 * length).view(2, length) % text.vocab_size
    with torch.autocast(base.device.type, torch.bfloat16, enabled=_needs_autocast(base)):
        return compared_output(model, tokens.to(base.device), forward).float().cpu()


def difference_beyond_rounding(
    live: torch.Tensor, other: torch.Tensor, model: Any, merged: bool = False
) -> float | None:
    """Returns the distance between two outputs of [`sample_logits`], None if rounding explains it.

    Args:
        live, other (`torch.Tensor`): the outputs.
        model (`PreTrainedModel` or `PeftModel`): the model of `live`. Its dtype sets the limit for rounding.
        merged (`bool`, *optional*, defaults to `False`): whether adapters were merged between the outputs.

    Returns:
        `float` or `None`: the distance in standard deviations of the logits.
    """
    base = base_of(model)
    distance, limit = logits_distance(live, other), 1e-3 if base.dtype == torch.float32 else 0.05
    if merged and _is_exact(base):
        limit = 1e-2  # merging adapters rounds several times
    elif merged:
        distance, limit = logits_distance(live, other, torch.median), 0.1
    return None if distance <= limit else distance


def logits_distance(live: torch.Tensor, other: torch.Tensor, summary: Any = torch.max) -> float:
    """Returns the distance of logits in standard deviations. NaN equals NaN, and infinity equals infinity."""
    equal = (live == other) | (live.isnan() & other.isnan())
    apart = torch.where(equal, 0.0, (live - other).abs())
    finite = live[live.isfinite()]
    scale = float(finite.std()) if len(finite) > 1 else 0.0
    return float(summary(apart)) / (scale or 1.0)


def runs_flash_attention(base: PreTrainedModel) -> bool:
    """Returns whether a model uses FlashAttention."""
    # transformers has no public name for the attention that a model uses.
    return "flash" in str(text_config(base.config)._attn_implementation)


def _needs_autocast(base: PreTrainedModel) -> bool:
    """Returns whether a model runs only under autocast: FlashAttention needs 16-bit inputs."""
    return base.dtype == torch.float32 and runs_flash_attention(base)


def _is_exact(base: PreTrainedModel) -> bool:
    """Returns whether merging adapters changes only the last digits of the logits.

    In bfloat16, merging changes some logits by one standard deviation, as rounding of activations does. The
    median changes by less than 0.05.
    """
    highest = torch.get_float32_matmul_precision() == "highest"
    is_float32 = base.dtype == torch.float32 and not _needs_autocast(base)
    return is_float32 and highest and getattr(base, "hf_quantizer", None) is None
