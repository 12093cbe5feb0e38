"""Where a causal language model keeps its decoder layers, and what else speaks of them."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .errors import LayerPruneError


# Module attributes that hold a layer's own position (key/value cache slot, attention kind).
INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")


@dataclass(frozen=True)
class Decoder:
    """The decoder stack of a model.

    Args:
        config (`PreTrainedConfig`): the configuration that counts these layers, shared by all modules.
        parent (`nn.Module`): the module that holds the list of layers.
        attribute (`str`): the list's name in `parent`, for example `"layers"` or `"h"`.
    """

    config: Any
    parent: nn.Module
    attribute: str

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers that the model has now, in order."""
        return getattr(self.parent, self.attribute)


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the decoder layers of `model`: the outermost module list that is as long as its config says.

    Raises:
        LayerPruneError: the model is no `PreTrainedModel`, or has no such list, or more than one.
    """
    if not isinstance(model, PreTrainedModel):
        raise LayerPruneError(
            f"Expected a transformers PreTrainedModel, got {type(model).__name__}. Merge adapters "
            "first (`model = model.merge_and_unload()`); for a compiled or wrapped model give the "
            "model inside."
        )
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise LayerPruneError(f"The config of {config.model_type} has no num_hidden_layers.")
    stacks = [
        path
        for path, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    depth = min((path.count(".") for path in stacks), default=0)
    outermost = [path for path in stacks if path.count(".") == depth]
    if len(outermost) != 1:
        raise LayerPruneError(
            f"Cannot tell the decoder layers of {config.model_type} ({type(model).__name__}): "
            f"{len(outermost)} module lists of num_hidden_layers = {count} entries."
        )
    parent, _, attribute = outermost[0].rpartition(".")
    return Decoder(config, model.get_decoder().get_submodule(parent), attribute)


def per_layer_fields(config: Any, count: int) -> list[str]:
    """Names of the config fields that hold one entry for each of `count` layers, as `layer_types`."""
    return [
        name
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == count
    ]
