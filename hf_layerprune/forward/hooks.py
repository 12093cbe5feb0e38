"""Runs a model without changing it, captures the states of its layers, and replays them."""

import inspect
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import LayerPruneError
from ..surgery.decoder import predicts_next_token
from ..surgery.layer_stack import LayerStack
from ..surgery.peft import base_of


# The key of the last hidden state: the input of the LM head, after the final norm.
LAST = -1


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Puts `model` in eval mode without gradients within this context. Afterwards, also after an error, it
    restores the modes of the modules and the random states of torch, numpy and Python."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])


def recomputes_activations(model: nn.Module) -> bool:
    """Returns whether activation checkpointing is on in `model`."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def activations_kept(model: nn.Module) -> Iterator[None]:
    """Switches off activation checkpointing in `model` within this context."""
    modules: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


@contextmanager
def captured(model: Any, layers: Iterable[int]) -> Iterator[dict[int, tuple[Any, Any]]]:
    """Captures the first input and the output of each layer in a dict, in each forward pass of `model`.

    The first input is the hidden state `(batch, length, hidden)`. The output is the whole output of the layer
    (see [`hidden`]). For [`~hf_layerprune.forward.hooks.LAST`] both are the last hidden state.

    Args:
        model (`PreTrainedModel`, `PeftModel` or [`LayerStack`]): the model.
        layers (iterable of `int`): present indices, or [`~hf_layerprune.forward.hooks.LAST`].
    """
    states: dict[int, tuple[Any, Any]] = {}
    stack = LayerStack.of(model)
    modules = stack.layers

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            states[layer] = (args[0] if args else kwargs["hidden_states"]), output

        return hook

    def keep_last(module: nn.Module, args: tuple, output: Any) -> None:
        states[LAST] = (output.last_hidden_state,) * 2

    with ExitStack() as hooks:
        for layer in layers:
            if layer == LAST:
                handle = stack.base.base_model.register_forward_hook(keep_last)
            else:
                handle = modules[layer].register_forward_hook(keep(layer), with_kwargs=True)
            hooks.callback(handle.remove)
        yield states


@contextmanager
def replayed(model: Any, outputs: Sequence[Any]) -> Iterator[None]:
    """Makes the first layers return these outputs within this context, without computing them.

    Args:
        model (`PreTrainedModel`, `PeftModel` or [`LayerStack`]): the model.
        outputs (sequence): the outputs of the first layers, in order.
    """
    with ExitStack() as patches:
        for module, output in zip(LayerStack.of(model).layers, outputs, strict=False):
            patches.enter_context(running(module, partial(_give, output)))
        yield


def can_replay(model: Any, input_ids: torch.Tensor, deepest: int) -> bool:
    """Returns whether the output stays the same bit for bit when the first layers are replayed.

    Args:
        model (`PreTrainedModel`, `PeftModel` or [`LayerStack`]): the model.
        input_ids (`torch.Tensor`): `(batch, length)`, the tokens for this test.
        deepest (`int`): the largest number of first layers to replay in this test.
    """
    stack = LayerStack.of(model)
    with captured(stack, range(deepest)) as states:
        expected = compared_output(stack.model, input_ids)
    check_all_ran(states, range(deepest))
    outputs = [states[layer][1] for layer in range(deepest)]
    same: list[torch.Tensor] = []
    for count in range(1, deepest + 1):
        with replayed(stack, outputs[:count]):
            try:
                output = compared_output(stack.model, input_ids)
            except Exception:  # a later layer needs more than the outputs of the earlier layers
                return False
        if output.shape != expected.shape:
            return False
        same.append(((output == expected) | (output.isnan() & expected.isnan())).all())
    return not same or bool(torch.stack(same).all())  # read once, as the CPU waits for a GPU each time


def hidden(output: Any) -> torch.Tensor:
    """Returns the hidden state in the output of a decoder layer: the output, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def check_all_ran(states: Collection[int], layers: Iterable[int]) -> None:
    """Checks that each of `layers` is in the dict of [`captured`].

    Raises:
        LayerPruneError: a layer did not run.
    """
    idle = [layer for layer in layers if layer not in states]
    if idle:
        raise LayerPruneError(
            f"Layers {idle} did not run on the calibration data. They may read images only. This model "
            "cannot be scored with text."
        )


def _give(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the forward of `module` by `forward` within this context."""
    attributes = vars(module)
    had = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        if had is not None:
            attributes["forward"] = had


def compared_output(model: Any, input_ids: torch.Tensor, forward: Any = None) -> torch.Tensor:
    """Returns the output of a model for tokens, to compare it with the output of another model.

    The output is the logits. Without a language-model head it is all floating-point tensors that the model
    returns, flattened row by row.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model, in eval mode.
        input_ids (`torch.Tensor`): `(batch, length)`.
        forward (`Callable`, *optional*): the function to call instead of the model.
    """
    inner, forward = base_of(model), forward or model
    if predicts_next_token(inner):
        return forward(input_ids=input_ids, use_cache=False).logits
    # Row by row, as classifiers without a padding token cannot find the ends of several rows.
    rows = [forward(input_ids=row, **cache_off(inner)) for row in input_ids.split(1)]
    return torch.stack([torch.cat([part.flatten() for part in _floating_tensors(row)]) for row in rows])


def _floating_tensors(output: ModelOutput) -> list[torch.Tensor]:
    return [value for value in output.to_tuple() if torch.is_tensor(value) and value.is_floating_point()]


def cache_off(module: nn.Module) -> dict[str, Any]:
    """Returns the argument that switches off the key/value cache, an empty dict if the model has none."""
    reads = inspect.signature(type(module).forward).parameters
    return {"use_cache": False} if "use_cache" in reads or predicts_next_token(module) else {}
