"""Where a causal language model keeps its decoder layers, and where its config counts them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import LayerPruneError


# Fields that count decoder layers, the most telling first: Bart's num_hidden_layers are its encoder's, and
# LongCat's are twice its num_layers.
COUNT_FIELDS = ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers", "num_blocks")

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

    config: PreTrainedConfig
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
            f"Expected a transformers PreTrainedModel, got {type(model).__name__}. For a compiled or "
            "wrapped model give the model inside."
        )
    config = text_config(model.config)
    count = layer_count(config)
    # ModernBERT's `decoder`, which get_decoder finds, is its output head.
    for root in (model.get_decoder(), model):
        stacks = [
            path
            for path, module in root.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if stacks:
            break
    depth = min((path.count(".") for path in stacks), default=0)
    outermost = [path for path in stacks if path.count(".") == depth]
    if len(outermost) != 1:
        raise LayerPruneError(
            f"Cannot tell the decoder layers of {config.model_type} ({type(model).__name__}): "
            f"one module list of {count} entries is expected, as its config counts, but there are "
            f"{len(outermost)}."
        )
    parent, _, attribute = outermost[0].rpartition(".")
    return Decoder(config, root.get_submodule(parent), attribute)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that counts decoder layers: itself, or the text part of a multimodal one."""
    text = config.get_text_config(decoder=True)
    # Of a flat encoder-decoder config that is a changed copy, which nobody would read again.
    return text if any(text is value for value in vars(config).values()) else config


def layer_count(config: PreTrainedConfig) -> int:
    """How many decoder layers `config` says there are.

    Raises:
        LayerPruneError: it does not say.
    """
    for name in COUNT_FIELDS:
        count = getattr(config, name, None)
        if type(count) is int:
            return count
    raise LayerPruneError(f"The config of {config.model_type} does not say how many layers there are.")


def count_fields(config: PreTrainedConfig) -> list[str]:
    """The fields in which `config` stores how many decoder layers there are; none where it counts a list."""
    first = next(name for name in COUNT_FIELDS if type(getattr(config, name, None)) is int)
    names = {config.attribute_map.get(first, first), *COUNT_FIELDS}
    return [name for name in sorted(names) if vars(config).get(name) == layer_count(config)]


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context `module` runs `forward` in place of its own."""
    attributes = vars(module)
    had = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        if had is not None:
            attributes["forward"] = had


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of each weight: FSDP, or the third stage of DeepSpeed's ZeRO."""
    kinds = FSDPModule, FullyShardedDataParallel
    return any(isinstance(module, kinds) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )
