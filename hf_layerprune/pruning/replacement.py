"""Replaces a block of layers by fewer layers (LLM-Streamline, 2403.19135)."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import LayerPruneError
from ..forward.hooks import undisturbed
from ..forward.token_losses import logit_spread
from ..surgery.layer_stack import LayerStack
from .layer_parts import ATTENTION, FEED_FORWARD, GATES, OUTPUTS, part_of


KINDS = ("none", "layer", "ffn", "swiglu", "linear")


def replace_block(
    model: PreTrainedModel, first: int, count: int, kind: str = "layer", layers: int = 1
) -> list[nn.Parameter]:
    """Replaces a block of layers by fewer layers, in place (LLM-Streamline, 2403.19135, section 3.2).

    The replacement is a normal decoder layer, so that the model needs no custom code. It takes the place of
    the last layers of the block and will be trained to give their output. The model's lineage keeps these
    layers, with new weights, so that their hidden states can be compared with the original hidden states.

    Args:
        model (`PreTrainedModel`): a causal language model.
        first (`int`): the first layer of the block, as a present index.
        count (`int`): the number of layers in the block.
        kind (`str`, *optional*, defaults to `"layer"`): the kind of replacement, one of
            - `"layer"`: a layer with the weights of the first layer of the block.
            - `"ffn"`, or `"swiglu"` in models with gated feed-forward parts: a new feed-forward part in a
              layer whose attention adds nothing. Before training it does not change the hidden state.
            - `"none"`: no replacement.
        layers (`int`, *optional*, defaults to 1): the number of layers in the replacement.

    Returns:
        `list[nn.Parameter]`: the parameters to train.

    Raises:
        LayerPruneError: the block does not exist, or this model does not allow this kind of replacement.
    """
    stack, block = LayerStack(model), list(range(first, first + count))
    stack.check_layers(block)
    if kind not in KINDS or kind == "linear":
        raise LayerPruneError(f"kind is {kind!r}: choose from {', '.join(KINDS[:-1])}.")
    if kind == "none":
        stack.remove(block)
        return []
    if not 1 <= layers < count:
        raise LayerPruneError(
            f"{layers} layers cannot replace {count} layers: give at least 1, and fewer than {count}."
        )
    stack.without(block[:-layers])  # raises an error before a weight is changed
    if kind == "layer":
        trained = _take_first_weights(stack, block, layers)
    else:
        trained = [p for layer in block[-layers:] for p in _feed_forward_only(stack, layer, kind)]
    stack.remove(block[:-layers])
    return trained


def _take_first_weights(stack: LayerStack, block: list[int], layers: int) -> list[nn.Parameter]:
    """Copies the weights of the first layers of a block to its last layers. Returns their parameters.

    Raises:
        LayerPruneError: the layers are of different kinds. No weight is changed.
    """
    replacements = [stack.layers[layer] for layer in block[-layers:]]
    weights = [
        {name: value.clone() for name, value in stack.layers[layer].state_dict().items()}
        for layer in block[:layers]
    ]
    for module, state in zip(replacements, weights, strict=True):
        shapes = [{name: x.shape for name, x in each.items()} for each in (module.state_dict(), state)]
        if shapes[0] != shapes[1]:
            raise LayerPruneError(
                f"Layers {block[0]} to {block[-1]} of this {stack.base.config.model_type} model are of "
                "different kinds, so the first cannot replace the last. Choose another replacement."
            )
    for module, state in zip(replacements, weights, strict=True):
        module.load_state_dict(state)
    return [parameter for module in replacements for parameter in module.parameters()]


def _feed_forward_only(stack: LayerStack, layer: int, kind: str) -> list[nn.Parameter]:
    """Makes a layer a new feed-forward part that adds nothing before training. Returns its parameters.

    Raises:
        LayerPruneError: this model does not allow such a layer. No weight is changed.
    """
    model, module = stack.base, stack.layers[layer]
    model_type = model.config.model_type
    part = part_of(module, FEED_FORWARD, model)
    gated = any(hasattr(part, name) for name in GATES)
    if gated != (kind == "swiglu"):
        raise LayerPruneError(
            f"A replacement of kind {kind!r} does not fit: the feed-forward parts of this {model_type} model "
            f"are {'' if gated else 'not '}gated. Use {'swiglu' if gated else 'ffn'}."
        )
    stack.without(layer)  # raises an error before a weight is changed
    attention = part_of(module, ATTENTION, model)
    output = part_of(part, OUTPUTS, model)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    scale = getattr(model.config.get_text_config(decoder=True), "initializer_range", 0.02)
    with torch.no_grad():
        for linear in part.modules():
            if isinstance(linear, (nn.Linear, Conv1D)):
                linear.weight.normal_(0.0, scale)
                if linear.bias is not None:
                    linear.bias.zero_()
        for projection in (part_of(attention, OUTPUTS, model), output):
            for parameter in projection.parameters():
                parameter.zero_()
    if not _adds_nothing(stack, layer):
        module.load_state_dict(before)
        raise LayerPruneError(
            f"A layer of this {model_type} model changes the hidden state even when its attention and its "
            "feed-forward part add nothing, so it cannot become a feed-forward part alone. Use "
            "replacement='layer'."
        )
    frozen = {id(parameter) for parameter in attention.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in frozen]


def _adds_nothing(stack: LayerStack, layer: int) -> bool:
    """Returns whether the model's logits stay the same without a layer."""
    model: Any = stack.base
    ids = torch.arange(8, device=model.device)[None]
    with undisturbed(model):
        found = model(input_ids=ids, use_cache=False).logits
        with stack.without(layer):
            expected = model(input_ids=ids, use_cache=False).logits
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * logit_spread(expected))
