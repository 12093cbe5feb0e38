"""Removes decoder layers from a model in memory and puts them back, with config and layer indices."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import LayerPruneError
from .layer_stack import LayerCut, LayerStack
from .lineage import Lineage, get_lineage
from .peft import adapter_configs, keep_base_known


logger = logging.getLogger(__name__)


def remove_layers(model: Any, layers: int | Iterable[int]) -> Lineage:
    """Removes decoder layers from `model` in place, and returns the lineage of the pruned model.

    The config is updated: the number of layers, every field that names single layers, and the lineage. The
    layer indices in modules are updated too. The pruned model saves, reloads and generates as a plain
    transformers model. If the result is not exactly the model that the new config builds, the model is not
    changed.

    An existing optimizer keeps the removed parameters, see `LayerPruningCallback`. If the model was cut by
    hand before, its layers are renumbered, with a warning.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a causal language model. Layer indices in the configs of
            adapters are updated too, see [`~hf_layerprune.save_adapter`].
        layers (`int` or iterable of `int`): indices in the present model, from 0.

    Returns:
        `Lineage`: the original indices of the remaining layers.

    Raises:
        LayerPruneError: an index is out of range or given twice, no layer would remain, or these layers
            cannot be removed exactly (with the reason).
    """
    stack = LayerStack(model)
    renumbered = stack.remove(layers)
    if renumbered:
        logger.warning(
            "Layers %s carried the numbers of other places: layers were cut by hand before. All layers are "
            "numbered anew, so that each has its own place in the cache.",
            renumbered,
        )
    if adapter_configs(model):
        keep_base_known(model)
    return stack.lineage


def keep_lineage(model: Any, lineage: Lineage) -> None:
    """Removes layers from `model` in place, so that it has exactly the layers of `lineage`.

    Raises:
        LayerPruneError: `lineage` belongs to another original model, or has a layer that `model` lacks.
    """
    present = get_lineage(model)
    if present.original != lineage.original or not set(lineage.kept) <= set(present.kept):
        raise LayerPruneError(f"A model with {present} cannot be cut to {lineage}.")
    remove_layers(model, [i for i, o in enumerate(present.kept) if o not in lineage.kept])


def put_back(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Turns `model` in place into `whole`, a model of the same kind that has more of the layers.

    Modules outside the decoder layers remain the same objects. `whole` cannot be used afterwards.

    Raises:
        LayerPruneError: `whole` lacks a layer that `model` has.
    """
    mine, theirs = LayerStack(model), LayerStack(whole)
    present, before = mine.lineage, theirs.lineage
    if present.original != before.original or not set(present.kept) <= set(before.kept):
        raise LayerPruneError(f"A model with {present} cannot be made one with {before}.")
    decoder, layers = mine.decoder, theirs.layers
    inside, modules = set(decoder.layers.modules()), dict(whole.named_modules())
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if module in inside:
                continue
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, tensor in own:
                tensor.copy_(getattr(modules[name], key))
            new = vars(modules[name]).items()
            vars(module).update({k: v for k, v in new if k != "training" and not k.startswith("_")})
    layers.to(model.device).train(decoder.layers.training)
    setattr(decoder.parent, decoder.attribute, layers)


def without_layers(model: Any, layers: int | Iterable[int]) -> LayerCut:
    """Returns a context that removes layers from `model`. On exit the model is restored.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model.
        layers (`int` or iterable of `int`): indices in the present model, from 0.

    Raises:
        LayerPruneError: as [`remove_layers`], before the context is entered.
    """
    return LayerStack(model).without(layers)
