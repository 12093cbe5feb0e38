"""Decoder layers under torch.compile, one by one, so that layers can be removed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..forward.hooks import running
from ..surgery.decoder import find_decoder
from ..surgery.peft import base_of


class CompiledLayers:
    """Compiles the decoder layers of models.

    Args:
        enabled (`bool`): whether layers are compiled at all.
        settings: arguments of `torch.compile`.
    """

    def __init__(self, enabled: bool, **settings: Any) -> None:
        self._enabled, self._settings = enabled, settings
        self._forwards: dict[nn.Module, Any] = {}

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """Within this context the decoder layers of `model` run compiled. Outside of it, as in scoring and
        saving, the model is plain."""
        if not self._enabled:
            yield
            return
        layers: Any = find_decoder(base_of(model)).layers
        with ExitStack() as patches:
            for layer in layers:
                if layer not in self._forwards:
                    self._forwards[layer] = torch.compile(layer.forward, **self._settings)
                patches.enter_context(running(layer, self._forwards[layer]))
            # Private: torch.compiler.config has this limit in new releases of torch only. It is 8 by default,
            # and each kind of attention is compiled twice, as a trained and as a frozen layer.
            patches.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            yield

    def forget(self) -> None:
        """Frees all compiled layers. They are compiled again when they run next."""
        if self._forwards:
            self._forwards.clear()
            torch.compiler.reset()
