"""The outputs of layers for each calibration batch, kept from one round of scoring to the next."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import psutil
import torch

from ..forward.memory import free_gpu_memory, least_free_gpu_memory


CPU_MB = 1024  # where there is no GPU
GPU_SHARE = 4  # a quarter of the free memory of a GPU


def default_cache_mb(device: torch.device) -> int:
    """Returns how many MiB of states of one batch scoring may keep: a quarter of the free memory of the GPU
    that has the least, 1024 on other devices."""
    free = least_free_gpu_memory(device)
    if free is None:
        return CPU_MB
    # A power of two: a resumed run, with a little more or less free memory, reads the same batches.
    return 2 ** max(0, (free // GPU_SHARE // 2**20).bit_length() - 1)


class PrefixCache:
    """The outputs of layers for each calibration batch, kept for the next round of scoring.

    The layers before the first one that has gone since return the same again, as long as there was no
    training in between and the batches are the same.

    Args:
        limit_mb (`int`, *optional*): MiB that may be kept; of further batches nothing is. Default: a quarter
            of the free memory of a GPU and then as much pinned memory of the CPU as fits into half of what is
            available; 1024 MiB on other devices.
    """

    def __init__(self, limit_mb: int | None = None) -> None:
        self._left: int | None = None if limit_mb is None else limit_mb * 2**20
        self._left_on_host = 0
        self._found: dict[int, tuple[list[int], torch.device, list[Any]]] = {}
        # Of the first round, as later rounds must read the same batches: tokens of a pass, MiB of states.
        self.layout: tuple[int | None, int] | None = None

    def clear(self) -> None:
        """Forgets all outputs and the layout: there was no memory for them."""
        self._found.clear()
        self._left, self._left_on_host, self.layout = 0, 0, None

    def known(self, batch: int, kept: Sequence[int]) -> list[Any]:
        """Returns the known outputs of the first layers of `kept` (original indices) for this batch."""
        layers, device, outputs = self._found.get(batch, ([], None, []))
        same = list(takewhile(lambda pair: pair[0] == pair[1], zip(layers, kept, strict=False)))
        # Without waiting: the GPU copies before it computes with them.
        return [_mapped(one, lambda part: part.to(device, non_blocking=True)) for one in outputs[: len(same)]]

    def keep(self, batch: int, kept: Sequence[int], outputs: list[Any]) -> None:
        """Keeps the outputs of the first layers of `kept` (original indices), if there is room."""
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
    """Returns a copy in pinned memory of the CPU, which may still be on its way."""
    return torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)


def _tensors(output: Any) -> list[torch.Tensor]:
    parts = output if isinstance(output, (tuple, list)) else [output]
    return [part for part in parts if torch.is_tensor(part)]


def _mapped(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns what a layer returned, with its tensors changed."""
    if isinstance(output, (tuple, list)):
        return tuple(change(part) if torch.is_tensor(part) else part for part in output)
    return change(output) if torch.is_tensor(output) else output
