"""Handles the other callbacks of the Trainer, which print logs, report logs or hold parameters."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers.trainer
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # differs in a notebook
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..errors import LayerPruneError
from ..surgery.peft import adapter_configs


logger = logging.getLogger(__name__)

LEAST_WIDTH = 6  # minimum number of characters in a cell


def printing_callbacks(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """Returns the callbacks that print the logs of a Trainer."""
    kinds = (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)
    return [callback for callback in callbacks if isinstance(callback, kinds)]


@contextmanager
def silent_trainers() -> Iterator[None]:
    """Creates Trainers without a callback that prints logs, within this context."""
    # A Trainer always adds one of these two classes, and no argument prevents it. transformers itself
    # replaces the first class in notebooks. See test_quiet_prints_results_alone.
    module: Any = transformers.trainer
    kinds = {name: getattr(module, name) for name in ("DEFAULT_PROGRESS_CALLBACK", "PrinterCallback")}
    for name in kinds:
        setattr(module, name, TrainerCallback)
    try:
        yield
    finally:
        for name, kind in kinds.items():
            setattr(module, name, kind)


def move_before_printing(callback: TrainerCallback, callbacks: list[TrainerCallback]) -> None:
    """Moves `callback`, in place, before the printing callbacks, so that they print its additions to a log.

    Raises:
        LayerPruneError: `callback` is not in `callbacks`.
    """
    if callback not in callbacks:
        raise LayerPruneError(
            f"set_trainer got a Trainer without this {type(callback).__name__}. Pass it in callbacks=, or to "
            "add_callback, and then call set_trainer."
        )
    printing = printing_callbacks(callbacks)
    if printing and callbacks.index(callback) > callbacks.index(printing[0]):
        callbacks.remove(callback)
        callbacks.insert(callbacks.index(printing[0]), callback)


def callbacks_holding_parameters(callbacks: Sequence[TrainerCallback], model: nn.Module) -> list[str]:
    """Returns the names of callbacks that hold parameters, a part or a copy of `model`.

    An example is a callback that computes a moving average of the weights.
    """
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}

    def holds(value: Any, depth: int = 3) -> bool:
        if isinstance(value, nn.Module):
            return value is not model and any(tuple(p.shape) in shapes for p in value.parameters())
        if torch.is_tensor(value):
            return value.dim() > 0 and tuple(value.shape) in shapes
        return depth > 0 and any(holds(part, depth - 1) for part in _parts(value))

    return [type(callback).__name__ for callback in callbacks if holds(list(vars(callback).values()))]


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value


def trainer_warnings(trainer: Trainer, callback: TrainerCallback, model: PreTrainedModel) -> Iterator[str]:
    """Yields a warning for each part of the Trainer that would not survive a removal."""
    others = [other for other in trainer.callback_handler.callbacks if other is not callback]
    holding = callbacks_holding_parameters(others, model)
    if holding:
        yield (
            f"{', '.join(holding)} keeps parameters of the model or copies of them, and does not know when "
            "layers are removed. Check that it works with a model that loses layers, or start it after the "
            "last removal."
        )
    # trl uses the model without its adapters as the reference model, for example in DPO and GRPO.
    shares = adapter_configs(model) and getattr(trainer, "ref_model", trainer) is None
    args: Any = trainer.args
    is_read = getattr(args, "beta", 0) and not getattr(args, "precompute_ref_log_probs", False)
    if shares and is_read:
        yield (
            f"The reference of {type(trainer).__name__} is this model without its adapters, so it loses the "
            "same layers. To compare with the original model, train without adapters, or set "
            "precompute_ref_log_probs=True where the trainer has it."
        )


class TrainerOutput:
    """Prints removals as a table and reports them, in the same places as the logs of the Trainer.

    Args:
        trainer (`Trainer`, *optional*): the Trainer. Without it, removals are printed but not reported.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self._is_known, self._has_headings = trainer is not None, False
        self._callbacks = [] if trainer is None else list(trainer.callback_handler.callbacks)

    def print_row(self, state: TrainerState, cells: Mapping[str, str]) -> None:
        """Prints a row of the table of removals. The headings are printed before the first row.

        If the Trainer does not print its logs, the row is logged instead.

        Args:
            state (`TrainerState`): the state of the Trainer.
            cells (mapping of `str`): the cells by heading. All rows have the same headings.
        """
        widths = [max(len(heading), LEAST_WIDTH) for heading in cells]
        rows = [cells.values()] if self._has_headings else [cells, cells.values()]
        self._has_headings = True
        for row in rows:
            line = " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            if self._is_known and not printing_callbacks(self._callbacks):
                logger.info("| %s |", line)
            elif state.is_world_process_zero:
                tqdm.write(f"| {line} |")

    def report(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        logs: Mapping[str, float],
    ) -> None:
        """Reports numbers to the same services as the Trainer, for example to TensorBoard."""
        kinds = tuple(get_reporting_integration_callbacks(args.report_to))
        for callback in self._callbacks:
            if isinstance(callback, kinds):
                callback.on_log(args, state, control, model=model, logs=logs)
