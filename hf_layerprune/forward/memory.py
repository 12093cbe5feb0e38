"""Measures the free memory of GPUs, and chooses the number of tokens in a forward pass."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.processes import gather
from ..errors import LayerPruneError
from ..surgery.decoder import is_sharded, text_config
from ..surgery.lineage import plain_int
from ..surgery.peft import base_of


MOST_TOKENS = 2**15  # in a forward pass; more tokens are not faster


def free_gpu_memory(device: torch.device) -> int | None:
    """Returns the free memory of a GPU in bytes, None for other devices. Memory that torch has reserved but
    does not use counts as free."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def least_free_gpu_memory(device: torch.device) -> int | None:
    """Returns the smallest free memory in bytes over the GPUs of all processes, None for other devices. All
    processes get the same value, so that they choose the same settings."""
    free = gather(free_gpu_memory(device))
    return None if None in free else min(free)


def tokens_per_pass(model: PreTrainedModel, batch_tokens: int | None = None) -> int | None:
    """Returns the number of tokens in a forward pass without gradients.

    Args:
        model (`PreTrainedModel`): the model.
        batch_tokens (`int`, *optional*): the number that the user asks for. Default: on a GPU a power of two
            for which the pass and the states after all layers fit into half of the free memory, at most
            [`MOST_TOKENS`]. On other devices None, with which batches are not changed.

    Raises:
        LayerPruneError: `batch_tokens` is not an integer of at least 1.
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
    # A power of two, so that a resumed run with slightly more or less free memory reads the same batches.
    return min(MOST_TOKENS, 2 ** max(0, fitting.bit_length() - 1))


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Returns an estimate of the bytes that a token takes in a forward pass."""
    config: Any = text_config(model.config)
    width: int = config.hidden_size
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * width
    layers: int = config.num_hidden_layers
    return model.dtype.itemsize * (width * (layers + 16) + 4 * inner)
