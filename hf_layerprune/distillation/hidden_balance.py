"""Scales the hidden-state error relative to the other loss terms (`balance_hidden`)."""

from collections.abc import Callable
from typing import Any

import torch

from .objective import DistillationLoss


KEY = "hidden_balance"  # key in the trainer's state, which checkpoints contain


class HiddenBalance:
    """Scales the hidden-state error to the size of the other loss terms.

    The scale is the sum of the other terms divided by the sum of the error. Both sums are over all earlier
    steps with the same layers. The scale is 0 in the first step.

    Args:
        reduce (`Callable`): sums a tensor over all processes.
    """

    def __init__(self, reduce: Callable[[torch.Tensor], Any]) -> None:
        self._reduce = reduce
        self._step, self._scale = -1, 0.0

    def scale(self, memory: Any, layers: list[int], step: int) -> float:
        """Returns the scale of a step.

        Args:
            memory (`dict`): holds the sums between steps, as plain values for JSON.
            layers (`list[int]`): the student's layers, as original indices. The sums start again when the
                layers change.
            step (`int`): the optimizer step. All its micro-batches have the same scale.
        """
        if memory.get(KEY, {}).get("kept") != layers:
            memory[KEY] = {"kept": layers, "total": 0.0, "error": 0.0}
        sums = memory[KEY]
        if self._step != step:
            self._step, self._scale = step, sums["total"] / sums["error"] if sums["error"] else 0.0
        return self._scale

    def add(self, memory: Any, loss: DistillationLoss) -> None:
        """Adds the loss of a batch to the sums."""
        total, error = self._reduce(torch.stack([loss.logit_loss, loss.hidden_error]))
        memory[KEY]["total"] += total.item()
        memory[KEY]["error"] += error.item()
