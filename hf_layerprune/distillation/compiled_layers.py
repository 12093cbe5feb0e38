"""Compiles decoder layers one by one, so that compiled models can lose layers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..forward.hooks import running
from ..surgery.decoder import find_decoder
from ..surgery.peft import base_of


def recompilation() -> AbstractContextManager[None]:
    """Allows enough compilations of one function for all kinds of layers and shapes within this context."""
    # Private: torch.compiler.config has this limit only in new releases of torch. The default is 8.
    # Each kind of attention is compiled twice, for trained and for frozen layers.
    context: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=64)
    return context


class CompiledLayers:
    """Compiles the decoder layers of models.

    Args:
        enabled (`bool`): whether to compile the layers.
        settings: keyword arguments for `torch.compile`.
    """

    def __init__(self, enabled: bool, **settings: Any) -> None:
        self._enabled, self._settings = enabled, settings
        self._forwards: dict[nn.Module, Any] = {}

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """Runs the decoder layers of `model` compiled within this context.

        Outside the context, for example in scoring and saving, the model is not compiled.
        """
        if not self._enabled:
            yield
            return
        layers: Any = find_decoder(base_of(model)).layers
        with ExitStack() as patches:
            for layer in layers:
                if layer not in self._forwards:
                    self._forwards[layer] = torch.compile(layer.forward, **self._settings)
                patches.enter_context(running(layer, self._forwards[layer]))
            patches.enter_context(recompilation())
            yield

    def forget(self) -> None:
        """Frees all compiled layers. They are compiled again in their next run."""
        if self._forwards:
            self._forwards.clear()
            torch.compiler.reset()
