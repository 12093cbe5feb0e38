"""Makes attention masks once for many forward passes over one batch."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils


@contextmanager
def masks_made_once(model: PreTrainedModel) -> Iterator[None]:
    """Makes `model` create each attention mask once within this context. All passes must read one batch.

    transformers reads each mask, or the positions, to check for padding and packing. The CPU waits for the
    GPU each time.
    """
    module: Any = sys.modules[type(model.base_model).__module__]
    makers: dict[str, Any] = {
        name: maker
        for name, maker in vars(module).items()
        if name.startswith("create_") and maker is getattr(masking_utils, name, None)
    }
    masks: dict[Any, Any] = {}
    for name, maker in makers.items():
        setattr(module, name, _made_once(maker, masks))
    try:
        yield
    finally:
        for name, maker in makers.items():
            setattr(module, name, maker)


def _made_once(maker: Callable[..., Any], masks: dict[Any, Any]) -> Callable[..., Any]:
    """Returns a function that makes a mask, or reuses the mask made with equal arguments."""

    @wraps(maker)
    def make(*args: Any, **kwargs: Any) -> Any:
        arguments = [*enumerate(args), *sorted(kwargs.items())]
        if not all(_is_described(value) for _, value in arguments):
            return maker(*args, **kwargs)
        key = maker, *((name, _describe(value)) for name, value in arguments)
        if key not in masks:
            masks[key] = maker(*args, **kwargs)
        return masks[key]

    return make


def _is_described(value: Any) -> bool:
    """Returns whether [`_describe`] identifies an argument in passes over one batch. It cannot identify
    caches or functions."""
    return value is None or isinstance(value, (bool, int, torch.Tensor, PreTrainedConfig))


def _describe(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.shape, value.dtype, value.device
    return id(value) if isinstance(value, PreTrainedConfig) else value
