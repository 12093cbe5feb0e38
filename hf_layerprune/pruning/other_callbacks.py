"""The other callbacks of the Trainer: those that print, those that report, those that hold parameters."""

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
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # another one in a notebook
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..errors import LayerPruneError
from ..surgery.peft import adapter_configs


logger = logging.getLogger(__name__)

LEAST_WIDTH = 6  # characters of a cell


def printing_callbacks(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """Returns the callbacks that print the logs of a Trainer."""
    kinds = (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)
    return [callback for callback in callbacks if isinstance(callback, kinds)]


@contextmanager
def silent_trainers() -> Iterator[None]:
    """Within this context a Trainer is made without a callback that prints its logs."""
    # A Trainer takes one of these two classes, and no argument leaves it out. transformers itself replaces
    # the first one in notebooks. See test_quiet_prints_results_alone.
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
    """Moves `callback`, in place, before those that print, so that they print what it adds to a log.

    Raises:
        LayerPruneError: it is not among the callbacks.
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
    """Returns the names of callbacks that hold parameters of `model`, a part of it or a copy, as for a moving
    average."""
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
    # trl takes the model without its adapters for the reference, as for DPO and GRPO.
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
    """Prints removals as a table, and reports them, where the Trainer prints and reports its logs.

    Args:
        trainer (`Trainer`, *optional*): if it is unknown, removals are printed, and not reported.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self._is_known, self._has_headings = trainer is not None, False
        self._callbacks = [] if trainer is None else list(trainer.callback_handler.callbacks)

    def print_row(self, state: TrainerState, cells: Mapping[str, str]) -> None:
        """Prints a row of the table of removals where the Trainer prints its logs, or logs it where the
        Trainer prints none. The headings stand before the first row.

        Args:
            state (`TrainerState`): of the Trainer.
            cells (mapping of `str`): the cells by heading, the same headings for all rows.
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
        """Reports numbers where the Trainer reports its own, as in TensorBoard."""
        kinds = tuple(get_reporting_integration_callbacks(args.report_to))
        for callback in self._callbacks:
            if isinstance(callback, kinds):
                callback.on_log(args, state, control, model=model, logs=logs)
