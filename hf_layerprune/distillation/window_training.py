"""Trains one window of layers on the teacher's hidden states."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from ..data.batches import split_rows
from ..errors import LayerPruneError
from ..files import whole_file
from ..forward.hooks import captured, hidden, replayed, undisturbed
from ..surgery.decoder import find_decoder
from .losses import hidden_error
from .window_states import TeacherStates, stop_after
from .windows import Window


logger = logging.getLogger(__name__)

WARMUP = 0.05  # share of the steps with learning rate warm-up
MAX_GRAD_NORM = 1.0


def window_parameters(model: Any, window: Window) -> list[nn.Parameter]:
    """Returns the trained parameters of a window."""
    layers = find_decoder(model).layers[window.first : window.last + 1]
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    if not parameters:
        raise LayerPruneError(
            f"Nothing in layers {window.first} to {window.last} can be trained: all of it is frozen, or "
            "has no adapter. Unfreeze the layers, or put adapters on them."
        )
    return parameters


@contextmanager
def only_trained(model: Any, window: Window, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Trains only these parameters within this context, with dropout off.

    All 16-bit weights of the window become float32, also the frozen weights below adapters, so that both have
    the same dtype.
    """
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = find_decoder(model).layers[window.first : window.last + 1]
    halves = [p for layer in layers for p in layer.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    dtypes = [parameter.dtype for parameter in halves]
    try:
        model.requires_grad_(False)
        for parameter in halves:
            parameter.data = parameter.data.float()
        for parameter in parameters:
            parameter.requires_grad_(True)
        with undisturbed(model), torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter, dtype in zip(halves, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
        for parameter in required:
            parameter.requires_grad_(True)


class WindowTraining:
    """Trains one window of a model."""

    def __init__(
        self,
        model: Any,
        window: Window,
        parameters: list[nn.Parameter],
        states: TeacherStates,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.window, self.parameters, self.states = model, window, parameters, states
        self._autocast = autocast
        self._previous_output: Any = None  # an output of the layer before the window, as a template
        batches = [batch for batch in states.batches if len(batch["input_ids"])]  # a process may have no rows
        if window.first and batches:
            example = split_rows(batches[0], 1)[0]
            example = {name: value.to(model.device) for name, value in example.items()}
            previous = window.first - 1
            with undisturbed(model), captured(model, [previous]) as outputs, stop_after(model, previous):
                model.base_model(**example, use_cache=False)
            self._previous_output = outputs[previous][1]

    def loss(self, number: int) -> torch.Tensor:
        """Returns the summed error on this process's rows of a batch, divided by all processes' tokens."""
        states, window, device = self.states, self.window, self.model.device
        if not len(states.inputs[number]):
            return torch.zeros((), device=device, requires_grad=True)
        inputs = states.inputs[number].to(device, non_blocking=True).to(self.parameters[0].dtype)
        targets = states.targets[number].to(device, non_blocking=True)
        context: Any = nullcontext()
        if self._autocast is not None:
            context = torch.autocast(device.type, self._autocast)
        with context, captured(self.model, [window.last]) as outputs, stop_after(self.model, window.last):
            previous = self._previous_output
            previous = (inputs, *previous[1:]) if isinstance(previous, tuple) else inputs
            with replayed(self.model, [previous] * window.first):
                batch = {name: value.to(device) for name, value in states.batches[number].items()}
                self.model.base_model(**batch, use_cache=False)
        mask = states.masks[number]
        error = hidden_error(hidden(outputs[window.last][1])[mask], targets[mask], "normalized_mse")
        return error / max(1, states.counts[number])

    def error(self) -> float:
        """Returns the mean error over all batches."""
        with torch.no_grad():
            counts = torch.tensor(self.states.counts, dtype=torch.float64)
            losses = torch.stack([self.loss(number) for number in range(len(counts))]).float()
        return float((reduce(losses, "sum").double().cpu() * counts).sum() / counts.sum())

    def fit(
        self,
        epochs: int,
        learning_rate: float,
        seed: int,
        checkpoint: Path | None,
        run_key: list[Any],
        bar: Any,
    ) -> None:
        """Trains the window and writes `checkpoint` after each epoch.

        Training continues from `checkpoint` if it exists and has the same `run_key`.
        """
        count = len(self.states.batches)
        fused = all(parameter.is_cuda for parameter in self.parameters)
        optimizer = torch.optim.AdamW(self.parameters, learning_rate, weight_decay=0.0, fused=fused)
        steps = epochs * count
        schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
        done, run_key = 0, [*run_key, epochs, learning_rate, seed]
        saved: Any = {}
        if checkpoint is not None and checkpoint.exists():
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved and saved["run_key"] != run_key:
            logger.warning("%s is of other models, text or settings. Reconstruction starts anew.", checkpoint)
        elif saved:
            done = saved["epochs"]
            for parameter, value in zip(self.parameters, saved["weights"], strict=True):
                parameter.data.copy_(value)
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            bar.update(done * count)
        for epoch in range(done, epochs):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
            for number in order.tolist():
                self.loss(number).backward()
                for parameter in self.parameters:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = reduce(gradient, "sum")
                norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
                if not norm.isfinite():
                    raise LayerPruneError(
                        f"The gradient of reconstruction is {float(norm)} in epoch {epoch + 1} of layers "
                        f"{self.window.first} to {self.window.last}. Look at the data, or lower the "
                        "learning_rate."
                    )
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
            if checkpoint is not None:
                self._save(checkpoint, epoch + 1, run_key, optimizer, schedule)

    def _save(self, checkpoint: Path, epochs: int, run_key: list[Any], optimizer: Any, schedule: Any) -> None:
        if not PartialState().is_main_process:  # all processes hold the same values
            return
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        content = {"run_key": run_key, "epochs": epochs, "weights": [p.data for p in self.parameters]}
        content |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        with whole_file(checkpoint) as file:
            torch.save(content, file)
