"""The other callbacks of the Trainer: those that print, those that report, those that hold parameters."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
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


def printing_callbacks(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """Returns the callbacks that print the logs of a Trainer."""
    kinds = (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)
    return [callback for callback in callbacks if isinstance(callback, kinds)]


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
    """Prints and reports removals where the Trainer prints and reports its logs.

    Args:
        trainer (`Trainer`, *optional*): if it is unknown, removals are printed, and not reported.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self._is_known = trainer is not None
        self._callbacks = [] if trainer is None else list(trainer.callback_handler.callbacks)

    def print_line(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        line: dict[str, Any],
    ) -> None:
        """Prints a line where the Trainer prints its logs, or logs it where the Trainer prints none."""
        printing = printing_callbacks(self._callbacks)
        for callback in printing:
            if isinstance(callback, (ProgressCallback, PrinterCallback)):
                callback.on_log(args, state, control, logs=dict(line))
            elif state.is_local_process_zero:  # the callback of notebooks has a table of losses only
                tqdm.write(str(line))
        if not printing and not self._is_known and state.is_local_process_zero:
            tqdm.write(str(line))
        elif not printing:
            logger.info("%s", line)

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
