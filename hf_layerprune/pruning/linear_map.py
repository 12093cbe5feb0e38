"""Replaces a block of layers by a linear map (ReplaceMe, 2505.02819)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..data.batches import iterate_batches
from ..data.processes import process_count, process_index, run_together, sum_over_processes
from ..data.targets import Batch, token_mask
from ..errors import LayerPruneError
from ..forward.hooks import captured, hidden, undisturbed
from ..forward.token_losses import float64_device
from ..surgery.layer_stack import LayerStack
from .layer_parts import FEED_FORWARD, OUTPUTS, part_of


RIDGES = [10.0**power for power in range(-6, 4)]


def replace_by_linear_map(
    model: PreTrainedModel, first: int, count: int, batches: Iterable[Batch], ridge: float | None = None
) -> nn.Parameter:
    """Replaces a block of layers by a linear map, in place and without training.

    The map is fitted by least squares (ReplaceMe, 2505.02819, section 3). It predicts the output of the block
    from the output of the feed-forward part before the block. The map is multiplied into the last weight of
    this feed-forward part.

    Args:
        model (`PreTrainedModel`): a causal language model.
        first, count (`int`): the first layer of the block, at least 1, and the number of layers in the block.
        batches (iterable of dict): calibration text, read batch by batch. Only sums are kept in memory. Each
            process reads a part, and all processes must get the same batches.
        ridge (`float`, *optional*): strength of the regularisation towards the identity, as a share of the
            mean square of the inputs. Default: the value in `RIDGES` with the least error if the map is
            fitted on one half of the text and tested on the other half. On little text, a map without ridge
            is worse than no map.

    Returns:
        `nn.Parameter`: the weight that holds the map.

    Raises:
        LayerPruneError: the block does not exist, or the model does not simply add the output of the
            feed-forward part to the hidden state.
    """
    stack, block = LayerStack(model), range(first, first + count)
    stack.check_layers(block)
    if first < 1:
        raise LayerPruneError(
            "The block begins with layer 0, but a linear map is multiplied into the layer before the block. "
            "Let it begin with layer 1 or later."
        )
    stack.without(block)  # raises an error before a weight is changed
    part = part_of(stack.layers[first - 1], FEED_FORWARD, model)
    output = _output_projection(part, model)
    width: int = output.weight.shape[0 if isinstance(output, nn.Linear) else 1]
    device = float64_device(model.device)
    grams, crosses = torch.zeros((2, 2, width, width), dtype=torch.float64, device=device)  # for each half
    part_outputs: list[torch.Tensor] = []
    handle = part.register_forward_hook(lambda module, args, found: part_outputs.append(hidden(found)))
    last: list[tuple[Batch, torch.Tensor, torch.Tensor]] = []  # this process's batch, inputs and rest

    def add_products() -> int:
        """Adds the products of this process's batches. Returns the number of batches of all processes."""
        number = -1
        for number, batch in enumerate(iterate_batches(batches)):
            if number % process_count() != process_index():
                continue
            inputs, rest, targets = _around(model, batch, first, count, part_outputs)
            halves = inputs.tensor_split(2), (targets - rest - inputs).tensor_split(2)
            for half, (some_inputs, missing) in enumerate(zip(*halves, strict=True)):
                grams[half] += some_inputs.T @ some_inputs
                crosses[half] += some_inputs.T @ missing
            last[:] = [(batch, inputs, rest)]
        return number + 1

    def is_added(solution: torch.Tensor) -> bool:
        """Returns whether the layer with the map has the predicted output on the last batch."""
        for batch, inputs, rest in last:
            expected = rest + inputs @ solution
            inputs, rest, _ = _around(model, batch, first, count, part_outputs)
            tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
            if not float((inputs + rest - expected).norm()) <= tolerance * float(expected.norm()):
                return False
        return True

    try:
        with undisturbed(model):
            if not max(run_together(add_products)):
                raise LayerPruneError("There are no calibration batches to fit a linear map on.")
            sum_over_processes((grams, crosses))
            size = best_ridge(grams, crosses) if ridge is None else ridge
            solution = least_squares(grams.sum(0), crosses.sum(0), size)
            solution.diagonal().add_(1)
            before = {name: value.clone() for name, value in output.state_dict().items()}
            _multiply(output, solution)
            fits = all(run_together(lambda: is_added(solution)))
    finally:
        handle.remove()
    if not fits:
        output.load_state_dict(before)
        raise _not_added(model)
    stack.remove(block)
    weight: Any = output.weight
    return weight


def _output_projection(part: Any, model: PreTrainedModel) -> Any:
    """Returns the linear layer that ends a feed-forward part.

    Raises:
        LayerPruneError: the feed-forward part ends with another kind of module.
    """
    output = part_of(part, OUTPUTS, model)
    if not isinstance(output, (nn.Linear, Conv1D)):
        raise LayerPruneError(
            f"The feed-forward part ends with a {type(output).__name__}, into which a linear map cannot be "
            "multiplied. Use another replacement."
        )
    return output


def check_linear_map(model: PreTrainedModel) -> None:
    """Checks before any long work that a linear map can replace a block of layers.

    Runs the model on a few tokens and checks one layer of each kind.

    Raises:
        LayerPruneError: the map cannot be multiplied into any kind of layer.
    """
    errors = _errors_of_kinds(model)
    if None not in errors:
        raise errors[0]  # type: ignore[misc]


def fits_linear_map(model: PreTrainedModel) -> bool:
    """Returns whether a linear map can replace any block of layers, see [`check_linear_map`]."""
    return set(_errors_of_kinds(model)) == {None}


def _errors_of_kinds(model: PreTrainedModel) -> list[LayerPruneError | None]:
    """Returns for each kind of layer why a map cannot be multiplied into it, or None if it can."""
    layers = LayerStack(model).layers
    kinds = {tuple(name for name, _ in layer.named_modules()): place for place, layer in enumerate(layers)}
    errors: list[LayerPruneError | None] = []
    for place in kinds.values():
        try:
            _check_feed_forward_is_added(model, layers[place], place)
            errors.append(None)
        except LayerPruneError as error:
            errors.append(error)
    return errors


def _check_feed_forward_is_added(model: PreTrainedModel, module: nn.Module, layer: int) -> None:
    """Checks that a layer adds the output of its feed-forward part to the hidden state.

    Doubles the output of the feed-forward part. The output of the layer must grow by the same amount.

    Raises:
        LayerPruneError: the output of the layer grows by another amount.
    """
    part = part_of(module, FEED_FORWARD, model)
    _output_projection(part, model)
    ids = torch.arange(8, device=model.device)[None]
    outputs: list[torch.Tensor] = []

    def double(module: Any, args: Any, output: Any) -> Any:
        outputs.append(hidden(output).clone())
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    states: list[torch.Tensor] = []
    with undisturbed(model):
        for hooks in ([], [double]):
            handles = [part.register_forward_hook(hook) for hook in hooks]
            try:
                with captured(model, [layer]) as found:
                    model.base_model(input_ids=ids, use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            states.append(hidden(found[layer][1]).clone())
    # Skip the first position: its hidden state may be so large that the difference is rounded away.
    given, change = outputs[0].view_as(states[0])[:, 1:].float(), (states[1] - states[0])[:, 1:].float()
    tolerance = 0.1 if model.dtype == torch.float32 else 0.5
    if not float((change - given).norm()) <= tolerance * float(given.norm()):
        raise _not_added(model)


def _not_added(model: PreTrainedModel) -> LayerPruneError:
    return LayerPruneError(
        f"In this {model.config.model_type} model the output of the feed-forward part is not simply added to "
        "the hidden state, so a linear map cannot be multiplied into it. Use replacement='none', and "
        "reconstruction_layers=3 to train the layers next to the cut instead."
    )


def best_ridge(grams: torch.Tensor, crosses: torch.Tensor) -> float:
    """Returns the value in `RIDGES` with the least error on one half of a text if fitted on the other half.

    Args:
        grams, crosses (`torch.Tensor`): `(2, width, width)`, for each half the products of inputs with inputs
            and of inputs with targets.
    """

    def error(ridge: float) -> float:
        fits = [least_squares(grams[half], crosses[half], ridge) for half in (0, 1)]
        others = zip(fits, grams.flip(0), crosses.flip(0), strict=True)
        return sum(float((fit * (gram @ fit - 2 * cross)).sum()) for fit, gram, cross in others)

    return min(RIDGES, key=error)


def least_squares(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """Returns the matrix `(width, width)` that maps inputs to targets, from their sums of products."""
    size = ridge * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
    return torch.linalg.solve(gram + size * torch.eye(len(gram)).to(gram), cross)


def _around(
    model: PreTrainedModel, batch: Batch, first: int, count: int, part_outputs: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns three parts of the hidden states of the tokens that count, each `(tokens, hidden)` in float64.

    The parts are the output of the feed-forward part before a block, the rest of the output of that layer,
    and the output of the block. A hook must append the output of the feed-forward part to `part_outputs`.
    """
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    device = float64_device(model.device)
    real = token_mask(inputs["input_ids"], None, inputs.get("attention_mask"))
    part_outputs.clear()
    with captured(model, [first - 1, first + count - 1]) as states:
        model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
    parts = [part_outputs[0], hidden(states[first - 1][1]), hidden(states[first + count - 1][1])]
    part, before, after = (each[:, :-1][real].to(device).double() for each in parts)
    return part, before - part, after


def _multiply(output: Any, matrix: torch.Tensor) -> None:
    """Multiplies the output of a linear layer by a matrix `(hidden, hidden)`, in place."""
    weight = output.weight.to(matrix.device).double()
    weight = matrix.T @ weight if isinstance(output, nn.Linear) else weight @ matrix
    output.weight.copy_(weight.to(output.weight.dtype))
    if output.bias is not None:
        output.bias.copy_((output.bias.to(matrix.device).double() @ matrix).to(output.bias.dtype))
