"""Finds the decoder layers of a language model and the config fields that count them."""

import copy
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayerPruneError


# Fields that count decoder layers, the most specific first. num_hidden_layers counts the encoder layers of
# Bart, and is twice num_layers in LongCat.
COUNT_FIELDS = ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers", "num_blocks")

# Module attributes that hold the position of a layer (key/value cache slot, attention kind).
INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")

SUPPORTED = (
    "causal language models, text encoders, classifiers, reward and embedding models, and the text layers of "
    "vision-language models"
)

# Descriptions of model classes, by the end of the class name.
_KINDS = {
    "SequenceClassification|RewardModel": "a sequence classifier",
    "TokenClassification": "a token classifier",
    "QuestionAnswering": "a question-answering model",
    "MaskedLM|PreTraining": "a masked language model",
    "MultipleChoice": "a multiple-choice model",
}


@dataclass(frozen=True)
class Decoder:
    """The decoder stack of a model.

    Args:
        config (`PreTrainedConfig`): the config that counts these layers, shared by all modules.
        parent (`nn.Module`): the module that holds the list of layers.
        attribute (`str`): the name of the list in `parent`, for example `"layers"` or `"h"`.
    """

    config: PreTrainedConfig
    parent: nn.Module
    attribute: str

    @property
    def layers(self) -> nn.ModuleList:
        """The present decoder layers, in order."""
        return getattr(self.parent, self.attribute)


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Returns the decoder of `model`: the outermost module list whose length equals the number of layers in
    the config.

    Raises:
        LayerPruneError: the model is not a `PreTrainedModel`, or has no such list, or more than one.
    """
    if not isinstance(model, PreTrainedModel):
        raise LayerPruneError(
            f"Expected a transformers PreTrainedModel, got {type(model).__name__}. For a compiled or "
            "wrapped model give the model inside."
        )
    config = text_config(model.config)
    count = layer_count(config)
    # get_decoder returns the output head of ModernBERT, which is named `decoder`.
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
    if not outermost:
        _check_counted(model, root, count)
    if len(outermost) != 1:
        raise LayerPruneError(
            f"Cannot tell the decoder layers of {config.model_type} ({type(model).__name__}): "
            f"one module list of {count} entries is expected, as its config counts, but there are "
            f"{len(outermost)}."
        )
    parent, _, attribute = outermost[0].rpartition(".")
    return Decoder(config, root.get_submodule(parent), attribute)


def _check_counted(model: PreTrainedModel, root: nn.Module, count: int) -> None:
    """Checks that the only stack of layers of a model has as many layers as the config counts.

    Raises:
        LayerPruneError: the numbers differ.
    """
    lists = [(path, module) for path, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    depth = min((path.count(".") for path, _ in lists), default=0)
    outermost = [(path, module) for path, module in lists if path.count(".") == depth]
    if len(outermost) == 1:
        (path, stack), fields = outermost[0], count_fields(text_config(model.config))
        if _builds_as_many(model, stack):  # ALBERT runs one layer several times, Funnel has blocks of layers
            return
        raise LayerPruneError(
            f"{type(model).__name__} has {len(stack)} layers in {path}, but its config counts {count}. If "
            f"layers were cut by hand, set config.{fields[0]} = {len(stack)}, or load the model again and "
            "use remove_layers."
        )


def _builds_as_many(model: PreTrainedModel, stack: nn.ModuleList) -> bool:
    """Returns whether a new model of the same config has equally many modules in this stack."""
    path = next(name for name, module in model.named_modules() if module is stack)
    try:
        with torch.device("meta"):
            fresh: Any = type(model)(copy.deepcopy(model.config)).get_submodule(path)
    except Exception:  # the config belongs to another kind of model
        return False
    return len(fresh) == len(stack)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the config that counts decoder layers: `config`, or the text part of a multimodal config."""
    text = config.get_text_config(decoder=True)
    # For a flat encoder-decoder config, this is a changed copy that the model does not read.
    return text if any(text is value for value in vars(config).values()) else config


def layer_count(config: PreTrainedConfig) -> int:
    """Returns the number of decoder layers in `config`.

    Raises:
        LayerPruneError: no field of the config counts the layers.
    """
    for name in COUNT_FIELDS:
        count = getattr(config, name, None)
        if type(count) is int:
            return count
    raise LayerPruneError(f"The config of {config.model_type} does not say how many layers there are.")


def count_fields(config: PreTrainedConfig) -> list[str]:
    """Returns the fields of `config` that store the number of decoder layers. It is an empty list if the
    config computes the number from a list."""
    first = next(name for name in COUNT_FIELDS if type(getattr(config, name, None)) is int)
    names = {config.attribute_map.get(first, first), *COUNT_FIELDS}
    return [name for name in sorted(names) if vars(config).get(name) == layer_count(config)]


def predicts_next_token(model: Any) -> bool:
    """Returns whether a model or a class of models gives logits of the next token. Causal language models and
    vision-language models do.

    Args:
        model (`PreTrainedModel` or a subclass): the model or its class.
    """
    cls = model if isinstance(model, type) else type(model)
    if not issubclass(cls, PreTrainedModel):  # an auto class; other checks refuse other objects
        return not re.search("|".join(_KINDS), cls.__name__)
    if cls.can_generate():
        return True
    known = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
    if not known.__name__.endswith("PreTrainedModel"):
        return False
    # A class of the user: only an instance shows whether it has an LM head.
    return isinstance(model, type) or model.get_output_embeddings() is not None


def describe_class(model: Any) -> str:
    """Returns a description of a model's kind, with the name of its class."""
    cls = model if isinstance(model, type) else type(model)
    kinds = (kind for pattern, kind in _KINDS.items() if re.search(pattern, cls.__name__))
    default = (
        "a causal language model" if predicts_next_token(model) else "a model without a language-model head"
    )
    return f"{next(kinds, default)} ({cls.__name__})"


def check_next_token(model: Any, what: str) -> None:
    """Checks that a model or a class of models predicts next tokens, as `what` needs.

    Raises:
        LayerPruneError: the model does not predict next tokens.
    """
    if not predicts_next_token(model):
        raise LayerPruneError(
            f"{what} needs logits of the next token, but the model is {describe_class(model)}. Give a causal "
            "language model. Other models go with score, prune and LayerPruningCallback in a plain Trainer."
        )


def check_reads_text(cls: Any, config: PreTrainedConfig, name: str) -> None:
    """Checks, before any weights are loaded, that a class of models can run on tokens alone.

    Args:
        cls (a subclass of `PreTrainedModel`): the class to load.
        config (`PreTrainedConfig`): the config of the model.
        name (`str`): the name of the model, for the error.

    Raises:
        LayerPruneError: the class is an encoder-decoder model, or reads images or audio.
    """
    takes = getattr(cls, "main_input_name", "input_ids")
    is_auto = not issubclass(cls, PreTrainedModel)
    called = config.model_type if is_auto else cls.__name__
    is_half = not is_auto and called.endswith(("ForCausalLM", "EncoderModel"))
    if getattr(config, "is_encoder_decoder", False) is True and not is_half:
        kind = f"an encoder-decoder model ({called})"
    elif takes != "input_ids":
        kind = f"a model of {takes}, not of text ({called})"
    elif not is_auto and "pixel_values" in _arguments(cls) and "inputs_embeds" not in _arguments(cls):
        kind = f"a model that reads pictures beside text ({called})"
    else:
        return
    raise LayerPruneError(f"{name} is {kind}, but hf_layerprune supports {SUPPORTED}.")


def _arguments(cls: Any) -> set[str]:
    return set(inspect.signature(cls.forward).parameters)


def check_not_tensor_parallel(model: Any) -> None:
    """Checks that the layers of a model are not split over processes.

    Scoring and evaluation give each process its own batches. Tensor parallelism would add up the states of
    different batches.

    Raises:
        LayerPruneError: the model was loaded with a tensor-parallel plan.
    """
    size = getattr(model, "tp_size", None) or 1
    if size > 1:
        raise LayerPruneError(
            f"The model is split over {size} processes by tensor parallelism, but each process reads its own "
            "batches. Load the model without tp_plan: with device_map='auto' in one process, or with FSDP2."
        )


def is_sharded(model: nn.Module) -> bool:
    """Returns whether each process holds only a part of each weight, as in FSDP or DeepSpeed ZeRO stage 3."""
    kinds = FSDPModule, FullyShardedDataParallel
    return any(isinstance(module, kinds) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )
