"""Caches the outputs of layers for each calibration batch between rounds of scoring."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import psutil
import torch

from ..forward.memory import free_gpu_memory, least_free_gpu_memory


CPU_MB = 1024  # limit without a GPU
GPU_SHARE = 4  # a quarter of the free memory of a GPU


def default_cache_mb(device: torch.device) -> int:
    """Returns the default limit for the states of one batch during scoring, in MiB.

    It is a quarter of the free memory of the GPU with the least free memory, rounded down to a power of two,
    or 1024 on other devices.
    """
    free = least_free_gpu_memory(device)
    if free is None:
        return CPU_MB
    # A power of two: a resumed run, with a little more or less free memory, reads the same batches.
    return 2 ** max(0, (free // GPU_SHARE // 2**20).bit_length() - 1)


class PrefixCache:
    """Caches the outputs of layers for each calibration batch, for the next round of scoring.

    Layers before the first removed layer return the same outputs in the next round. This holds if the model
    was not trained in between and the batches are the same.

    Args:
        limit_mb (`int`, *optional*): size of the cache in MiB. Batches that do not fit are not cached.
            Default: on a GPU a quarter of its free memory, then half of the available CPU memory, pinned; on
            other devices 1024 MiB.
    """

    def __init__(self, limit_mb: int | None = None) -> None:
        self._left: int | None = None if limit_mb is None else limit_mb * 2**20
        self._left_on_host = 0
        self._found: dict[int, tuple[list[int], torch.device, list[Any]]] = {}
        # Tokens per pass and MiB of states in the first round. Later rounds must read the same batches.
        self.layout: tuple[int | None, int] | None = None

    def clear(self) -> None:
        """Forgets all outputs and the layout: there was no memory for them."""
        self._found.clear()
        self._left, self._left_on_host, self.layout = 0, 0, None

    def known(self, batch: int, kept: Sequence[int]) -> list[Any]:
        """Returns the cached outputs of the first layers of `kept` (original indices) for this batch."""
        layers, device, outputs = self._found.get(batch, ([], None, []))
        same = list(takewhile(lambda pair: pair[0] == pair[1], zip(layers, kept, strict=False)))
        # The copy does not block the CPU. The GPU completes it before it uses the outputs.
        return [_mapped(one, lambda part: part.to(device, non_blocking=True)) for one in outputs[: len(same)]]

    def keep(self, batch: int, kept: Sequence[int], outputs: list[Any]) -> None:
        """Caches the outputs of the first layers of `kept` (original indices) if there is room."""
        tensors = [part for output in outputs for part in _tensors(output)]
        if not tensors:
            return
        device = tensors[0].device
        if self._left is None:
            self._make_room(device)
        assert self._left is not None
        _, _, earlier = self._found.pop(batch, ([], device, []))
        for part in (part for output in earlier for part in _tensors(output)):
            if part.device == device:
                self._left += part.nbytes
            else:
                self._left_on_host += part.nbytes
        size = sum(part.nbytes for part in tensors)
        if size <= self._left:
            self._left -= size
            self._found[batch] = list(kept), device, outputs
        elif size <= self._left_on_host:
            self._left_on_host -= size
            self._found[batch] = list(kept), device, [_mapped(output, _pinned) for output in outputs]

    def _make_room(self, device: torch.device) -> None:
        free = free_gpu_memory(device)
        self._left = CPU_MB * 2**20 if free is None else free // GPU_SHARE
        if free is not None:
            self._left_on_host = psutil.virtual_memory().available // 2 // max(1, torch.cuda.device_count())


def _pinned(part: torch.Tensor) -> torch.Tensor:
    """Returns a copy in pinned CPU memory. The copy may still be in progress."""
    return torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)


def _tensors(output: Any) -> list[torch.Tensor]:
    parts = output if isinstance(output, (tuple, list)) else [output]
    return [part for part in parts if torch.is_tensor(part)]


def _mapped(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns the output of a layer with its tensors changed."""
    if isinstance(output, (tuple, list)):
        return tuple(change(part) if torch.is_tensor(part) else part for part in output)
    return change(output) if torch.is_tensor(output) else output
