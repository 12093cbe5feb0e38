"""What stands in for a block of layers that goes: the first of them, a feed-forward part, or a linear map."""

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
from ..forward.token_losses import float64_device, logit_spread
from ..surgery.decoder import find_decoder
from ..surgery.removal import check_layers, remove_layers, without_layers


KINDS = ("none", "layer", "ffn", "swiglu", "linear")
FEED_FORWARD = ("mlp", "feed_forward", "ffn")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
OUTPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc_out", "fc2", "wo", "w2")
RIDGES = [10.0**power for power in range(-6, 4)]
GATES = ("gate_proj", "gate_up_proj", "w1")


def replace_block(
    model: PreTrainedModel, first: int, count: int, kind: str = "layer", layers: int = 1
) -> list[nn.Parameter]:
    """Let few layers stand for a block of them, in place (LLM-Streamline, 2403.19135, section 3.2).

    What stands in is a decoder layer like the others, so that the model stays a plain one. It takes the
    place of the block's last layers, whose output it is to give: by the model's lineage these are left, with
    new weights, and can be compared with what they were.

    Args:
        model (`PreTrainedModel`): a causal language model.
        first (`int`): the block's first layer, as a present index.
        count (`int`): how many layers the block is.
        kind (`str`, *optional*, defaults to `"layer"`): `"layer"`, with the weights of the block's first
            layers; `"ffn"` or `"swiglu"`, by which kind the model's own are, a new feed-forward part, whose
            layer's attention gives nothing, and which begins as if nothing stood there; `"none"`, nothing.
        layers (`int`, *optional*, defaults to 1): how many stand in.

    Returns:
        `list[nn.Parameter]`: what is to be trained.

    Raises:
        LayerPruneError: no such block, or this model's layers cannot be made such a part.
    """
    block = list(range(first, first + count))
    check_layers(model, block)
    if kind not in KINDS or kind == "linear":
        raise LayerPruneError(f"{kind!r} cannot stand in: choose from {', '.join(KINDS[:-1])}.")
    if kind == "none":
        remove_layers(model, block)
        return []
    if not 1 <= layers < count:
        raise LayerPruneError(
            f"{layers} layers cannot stand in for {count}: it must be at least 1 and fewer."
        )
    with without_layers(model, block[:-layers]):  # refused before a weight is changed
        pass
    stack = find_decoder(model).layers
    standing = [stack[layer] for layer in block[-layers:]]
    if kind == "layer":
        weights = [
            {name: value.clone() for name, value in stack[layer].state_dict().items()}
            for layer in block[:layers]
        ]
        for module, state in zip(standing, weights, strict=True):
            shapes = [
                {name: one.shape for name, one in each.items()} for each in (module.state_dict(), state)
            ]
            if shapes[0] != shapes[1]:
                raise LayerPruneError(
                    f"Layers {block[0]} to {block[-1]} of this {model.config.model_type} model are of "
                    "different kinds, so the first cannot stand for the last. Choose another replacement."
                )
        for module, state in zip(standing, weights, strict=True):
            module.load_state_dict(state)
        trained = [parameter for module in standing for parameter in module.parameters()]
    else:
        trained = [p for layer in block[-layers:] for p in _feed_forward_only(model, layer, kind)]
    remove_layers(model, block[:-layers])
    return trained


def replace_by_linear_map(
    model: PreTrainedModel, first: int, count: int, batches: Iterable[Batch], ridge: float | None = None
) -> nn.Parameter:
    """Let a linear map stand for a block of layers, in place, found without training (ReplaceMe, 2505.02819,
    section 3): the least-squares fit of what the block gave, made of what the feed-forward part before it
    gives, and multiplied into the weight that this ends with.

    Args:
        model (`PreTrainedModel`): a causal language model.
        first, count (`int`): the block, which another layer must come before.
        batches (iterable of dict): calibration text, read batch by batch; only sums are kept. Of several
            processes each reads a part, and all must be given the same.
        ridge (`float`, *optional*): how strongly the map is drawn to the identity, which leaves the block
            out, as a share of the inputs' mean square. Left out, that of `RIDGES` with which the map of
            either half of the text fits the other best: of little text a free fit is worse than none.

    Returns:
        `nn.Parameter`: the weight with the map in it.

    Raises:
        LayerPruneError: no such block, or in this model what the part before it gives is not simply added.
    """
    check_layers(model, range(first, first + count))
    if first < 1:
        raise LayerPruneError("A linear map is multiplied into the layer before the block: start it later.")
    with without_layers(model, range(first, first + count)):  # refused before a weight is changed
        pass
    before = find_decoder(model).layers[first - 1]
    part = _part(model, before, FEED_FORWARD)
    output: Any = _part(model, part, OUTPUTS)
    if not isinstance(output, (nn.Linear, Conv1D)):
        raise LayerPruneError(f"A linear map cannot be multiplied into a {type(output).__name__}.")
    width: int = output.weight.shape[0 if isinstance(output, nn.Linear) else 1]
    # Of each half of the text.
    device = float64_device(model.device)
    grams, crosses = torch.zeros((2, 2, width, width), dtype=torch.float64, device=device)
    said: list[torch.Tensor] = []
    handle = part.register_forward_hook(lambda module, args, found: said.append(hidden(found)))
    last: list[tuple[Batch, torch.Tensor, torch.Tensor]] = []  # batch of this process, and what gave what

    def add_products() -> int:
        """Adds the products of the states of this process's batches. Returns the number of all batches."""
        number = -1
        for number, batch in enumerate(iterate_batches(batches)):
            if number % process_count() != process_index():
                continue
            gave, rest, wanted = _around(model, batch, first, count, said)
            parts = gave.tensor_split(2), (wanted - rest - gave).tensor_split(2)
            for half, (few, missing) in enumerate(zip(*parts, strict=True)):
                grams[half] += few.T @ few
                crosses[half] += few.T @ missing
            last[:] = [(batch, gave, rest)]
        return number + 1

    def is_added(solution: torch.Tensor) -> bool:
        """Returns whether the layer, with the map in it, gives what the map makes of what it gave before."""
        for batch, gave, rest in last:
            expected = rest + gave @ solution
            gave, rest, _ = _around(model, batch, first, count, said)
            tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
            if not float((gave + rest - expected).norm()) <= tolerance * float(expected.norm()):
                return False
        return True

    try:
        with undisturbed(model):
            if not max(run_together(add_products)):
                raise LayerPruneError("No calibration batches to fit a linear map on.")
            sum_over_processes((grams, crosses))
            size = best_ridge(grams, crosses) if ridge is None else ridge
            solution = least_squares(grams.sum(0), crosses.sum(0), size)
            solution.diagonal().add_(1)
            kept = {name: value.clone() for name, value in output.state_dict().items()}
            _multiply(output, solution)
            fits = all(run_together(lambda: is_added(solution)))
    finally:
        handle.remove()
    if not fits:
        output.load_state_dict(kept)
        raise _not_added(model)
    remove_layers(model, range(first, first + count))
    weight: Any = output.weight
    return weight


def check_linear_map(model: PreTrainedModel) -> None:
    """Checks, before any long work, that a linear map can stand for a block of layers: in one layer of each
    kind, on a few tokens.

    Raises:
        LayerPruneError: there is no kind of layer into which it can be multiplied.
    """
    layers: Any = find_decoder(model).layers
    kinds = {tuple(name for name, _ in layer.named_modules()): place for place, layer in enumerate(layers)}
    errors: list[LayerPruneError] = []
    for place in kinds.values():
        try:
            _check_feed_forward_is_added(model, place)
        except LayerPruneError as error:
            errors.append(error)
    if len(errors) == len(kinds):
        raise errors[0]


def _check_feed_forward_is_added(model: PreTrainedModel, layer: int) -> None:
    """Checks that a layer's output grows by the output of its feed-forward part if that is doubled.

    Raises:
        LayerPruneError: it does not.
    """
    part = _part(model, find_decoder(model).layers[layer], FEED_FORWARD)
    output = _part(model, part, OUTPUTS)
    if not isinstance(output, (nn.Linear, Conv1D)):
        raise LayerPruneError(f"A linear map cannot be multiplied into a {type(output).__name__}.")
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
    # The first position is left out: its state may be so large that the difference is rounded away.
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
    """Of `RIDGES`, the one with which the fit of either half of a text leaves the least error in the other.

    Args:
        grams, crosses (`torch.Tensor`): `(2, width, width)`, of each half inputs by inputs, and by targets.
    """

    def error(ridge: float) -> float:
        fits = [least_squares(grams[half], crosses[half], ridge) for half in (0, 1)]
        others = zip(fits, grams.flip(0), crosses.flip(0), strict=True)
        return sum(float((fit * (gram @ fit - 2 * cross)).sum()) for fit, gram, cross in others)

    return min(RIDGES, key=error)


def least_squares(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """The matrix `(width, width)` that makes targets of inputs, from their sums of products."""
    size = ridge * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
    return torch.linalg.solve(gram + size * torch.eye(len(gram)).to(gram), cross)


def _around(
    model: PreTrainedModel, batch: Batch, first: int, count: int, said: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the tokens that count, `(tokens, hidden)` in float64: what the feed-forward part before a block
    gives, the rest of that layer's output, and the block's output."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    device = float64_device(model.device)
    real = token_mask(inputs["input_ids"], None, inputs.get("attention_mask"))
    said.clear()
    with captured(model, [first - 1, first + count - 1]) as states:
        model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
    parts = [said[0], hidden(states[first - 1][1]), hidden(states[first + count - 1][1])]
    gave, out, wanted = (part[:, :-1][real].to(device).double() for part in parts)
    return gave, out - gave, wanted


def _multiply(output: Any, by: torch.Tensor) -> None:
    """Let `output` give what it gave times a matrix `(hidden, hidden)`, in place."""
    weight = output.weight.to(by.device).double()
    weight = by.T @ weight if isinstance(output, nn.Linear) else weight @ by
    output.weight.copy_(weight.to(output.weight.dtype))
    if output.bias is not None:
        output.bias.copy_((output.bias.to(by.device).double() @ by).to(output.bias.dtype))


def _feed_forward_only(model: PreTrainedModel, layer: int, kind: str) -> list[nn.Parameter]:
    """Make a layer a new feed-forward part that begins by adding nothing; return its parameters."""
    module = find_decoder(model).layers[layer]
    part = _part(model, module, FEED_FORWARD)
    gated = any(hasattr(part, name) for name in GATES)
    if gated != (kind == "swiglu"):
        raise LayerPruneError(
            f"The feed-forward parts of this {model.config.model_type} model are "
            f"{'' if gated else 'not '}gated, and so must be what is stored as one: choose "
            f"{'swiglu' if gated else 'ffn'}."
        )
    with without_layers(model, layer):  # refused before a weight is changed
        pass
    attention = _part(model, module, ATTENTION)
    output = _part(model, part, OUTPUTS)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    scale = getattr(model.config.get_text_config(decoder=True), "initializer_range", 0.02)
    with torch.no_grad():
        for one in part.modules():
            if isinstance(one, (nn.Linear, Conv1D)):
                one.weight.normal_(0.0, scale)
                if one.bias is not None:
                    one.bias.zero_()
        for silent in (_part(model, attention, OUTPUTS), output):
            for parameter in silent.parameters():
                parameter.zero_()
    if not _adds_nothing(model, layer):
        module.load_state_dict(kept)
        raise LayerPruneError(
            f"A layer of this {model.config.model_type} model still changes what passes it when its "
            "attention and its feed-forward part give nothing, so that none of its kind can stand for a "
            "feed-forward part alone: choose replacement='layer'."
        )
    frozen = {id(parameter) for parameter in attention.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in frozen]


def _adds_nothing(model: PreTrainedModel, layer: int) -> bool:
    ids = torch.arange(8, device=model.device)[None]
    with undisturbed(model):
        found = model(input_ids=ids, use_cache=False).logits
        with without_layers(model, layer):
            expected = model(input_ids=ids, use_cache=False).logits
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * logit_spread(expected))


def _part(model: PreTrainedModel, module: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise LayerPruneError(
        f"In the {type(module).__name__} of this {model.config.model_type} model there is none of "
        f"{', '.join(names)}: choose replacement='layer'."
    )
