"""How much a GPU has room for: tokens in a forward pass, states that are kept."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.processes import gather
from ..errors import LayerPruneError
from ..surgery.decoder import is_sharded, text_config
from ..surgery.lineage import plain_int
from ..surgery.peft import base_of


MOST_TOKENS = 2**15  # of one forward pass; more are no faster


def free_gpu_memory(device: torch.device) -> int | None:
    """Returns how many bytes of a GPU are free, None for other devices. What torch holds and does not use
    counts as free."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def least_free_gpu_memory(device: torch.device) -> int | None:
    """Returns the least that is free on the GPUs of all processes, so that all choose the same."""
    free = gather(free_gpu_memory(device))
    return None if None in free else min(free)


def tokens_per_pass(model: PreTrainedModel, batch_tokens: int | None = None) -> int | None:
    """Returns how many tokens one forward pass without gradients takes.

    Args:
        model (`PreTrainedModel`): the model.
        batch_tokens (`int`, *optional*): what the user asks for. Default: on a GPU a power of two that fits
            into half of its free memory, with the states after all layers, at most [`MOST_TOKENS`]; on
            other devices None, which leaves batches as they are.

    Raises:
        LayerPruneError: `batch_tokens` is no whole number of at least 1.
    """
    if batch_tokens is not None:
        tokens = plain_int(batch_tokens)
        if type(tokens) is not int or tokens < 1:
            raise LayerPruneError(
                f"batch_tokens is {batch_tokens!r}: it must be a whole number of at least 1. Leave it out to "
                "let the free memory decide."
            )
        return tokens
    # Without chunks of positions the logits take more memory than all states.
    parameters = inspect.signature(type(base_of(model)).forward).parameters
    is_chunked = "logits_to_keep" in parameters and not is_sharded(model)
    free = least_free_gpu_memory(model.device) if is_chunked else None
    if free is None:
        return None
    fitting = free // 2 // _bytes_per_token(model)
    # A power of two: a resumed run, with a little more or less free memory, reads the same batches.
    return min(MOST_TOKENS, 2 ** max(0, fitting.bit_length() - 1))


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Returns about how many bytes a token takes in a forward pass."""
    config: Any = text_config(model.config)
    width: int = config.hidden_size
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * width
    layers: int = config.num_hidden_layers
    return model.dtype.itemsize * (width * (layers + 16) + 4 * inner)
