"""Describes the layers of a model, and finds the layers that can be removed."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .config_fields import is_per_layer
from .decoder import layer_count
from .layer_stack import LayerStack


@dataclass(frozen=True)
class LayerFacts:
    """One decoder layer.

    Args:
        layer (`int`): index in the present model.
        original (`int`): index in the original model.
        kind (`str`): kind of the layer in the config, such as `"sliding_attention, sparse"`, else its class.
        parameters (`int`): number of parameters of the layer.
        refused (`str` or `None`): the reason why the layer cannot be removed. None if it can be removed.
    """

    layer: int
    original: int
    kind: str
    parameters: int
    refused: str | None


@dataclass(frozen=True)
class Inspection:
    """The result of [`inspect_layers`].

    Args:
        model_type (`str`): the model type in the config.
        parameters (`int`): number of parameters of the whole model.
        original_layers (`int`): number of layers of the original model.
        layers (`list[LayerFacts]`): the present layers, in order.
    """

    model_type: str
    parameters: int
    original_layers: int
    layers: list[LayerFacts]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)


def inspect_layers(model: PreTrainedModel) -> Inspection:
    """Describes each decoder layer of `model`. The model is not changed and may be on the meta device.

    `refused` applies to the removal of a single layer. To remove several layers, call `remove_layers`.

    Args:
        model (`PreTrainedModel`): the model.

    Returns:
        [`Inspection`]

    Raises:
        LayerPruneError: the decoder layers of the model cannot be found.
    """
    stack = LayerStack(model)
    lineage, kinds = stack.lineage, _kinds(stack.config)
    _, refused = stack.removable()
    layers = [
        LayerFacts(
            layer=i,
            original=lineage.kept[i],
            kind=kinds[i] or type(layer).__name__,
            parameters=sum(parameter.numel() for parameter in layer.parameters()),
            refused=refused.get(i),
        )
        for i, layer in enumerate(stack.layers)
    ]
    return Inspection(stack.config.model_type, model.num_parameters(), lineage.original, layers)


def _kinds(config: PreTrainedConfig) -> list[str]:
    count = layer_count(config)
    lists = [
        value
        for name, value in config.to_dict().items()
        if is_per_layer(name, value, count) and all(isinstance(entry, str) for entry in value)
    ]
    return [", ".join(dict.fromkeys(entries)) for entries in zip(*lists, strict=True)] or [""] * count
