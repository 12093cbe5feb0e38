"""What a model is made of, and which of its layers can be removed."""

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
        kind (`str`): its kind by the config, as `"sliding_attention, sparse"`, else its class.
        parameters (`int`): how many there are in it.
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
        model_type (`str`): the type by its config.
        parameters (`int`): of the whole model.
        original_layers (`int`): how many layers the original model had.
        layers (`list[LayerFacts]`): those the model has now, in order.
    """

    model_type: str
    parameters: int
    original_layers: int
    layers: list[LayerFacts]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)


def inspect_layers(model: PreTrainedModel) -> Inspection:
    """Returns what each decoder layer of `model` is. The model is not changed and may be on the meta device.

    Whether a layer can be removed is decided for each layer alone. For several at once, call `remove_layers`.

    Raises:
        LayerPruneError: the model has no decoder layers that can be told.
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
