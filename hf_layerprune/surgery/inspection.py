"""Describes the layers of a model, and which of them can be removed."""

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
        layer (`int`): its index in the present model.
        original (`int`): its index in the original model.
        kind (`str`): its kind in the config, such as `"sliding_attention, sparse"`, else its class.
        parameters (`int`): its number of parameters.
        refused (`str` or `None`): why it cannot be removed; None if it can.
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
        model_type (`str`): the model type in its config.
        parameters (`int`): of the whole model.
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

    `refused` is for the removal of this layer alone. To remove several at once, call `remove_layers`.

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
