"""Taking decoder layers out of a live model, with config and indices kept in step."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .decoder import INDEX_ATTRIBUTES, find_decoder, per_layer_fields
from .errors import LayerPruneError
from .lineage import Lineage, get_lineage, write_lineage


def remove_layers(model: PreTrainedModel, layers: int | Iterable[int]) -> Lineage:
    """Remove decoder layers from `model`, in place, and return what is left.

    The config follows (`num_hidden_layers`, lists with one entry a layer, the lineage), and so do the
    layers' own indices, so that the model saves, reloads and generates as a plain transformers model.
    The result must be what the new config builds; where it would not be, nothing is
    changed. An optimizer made before keeps the removed parameters: see `LayerPruningCallback`.

    Args:
        model (`PreTrainedModel`): a causal language model.
        layers (`int` or iterable of `int`): indices in the present model, from 0.

    Returns:
        `Lineage`: the original indices of the layers that are left.

    Raises:
        LayerPruneError: an index is not one of the model's layers or named twice, no layer would be
            left, or this type of model cannot be cut exactly (with the reason).
    """
    removed = check_layers(model, layers)
    if removed:
        check_exact(model, removed)
        _cut(model, removed)
    return get_lineage(model)


def check_exact(model: PreTrainedModel, layers: int | Iterable[int]) -> None:
    """Check that `model` without these layers is what its new config builds. It is not changed.

    Raises:
        LayerPruneError: it is not, naming what would differ.
    """
    known = _differences(model)
    with without_layers(model, layers):
        new = [text for key, text in _differences(model).items() if key not in known]
    if new:
        raise LayerPruneError(
            f"Cannot remove layers {layers} of this {model.config.model_type} model exactly. A model "
            "built from the new config would differ: " + "; ".join(new[:3])
        )


def keep_lineage(model: PreTrainedModel, lineage: Lineage) -> None:
    """Remove layers from `model`, in place, until it has exactly the layers that `lineage` keeps.

    Raises:
        LayerPruneError: `lineage` is of another original model, or has a layer that `model` has not.
    """
    present = get_lineage(model)
    if present.original != lineage.original or not set(lineage.kept) <= set(present.kept):
        raise LayerPruneError(f"A model with {present} cannot be cut to {lineage}.")
    remove_layers(model, [i for i, o in enumerate(present.kept) if o not in lineage.kept])


@contextmanager
def without_layers(model: PreTrainedModel, layers: int | Iterable[int]) -> Iterator[None]:
    """Within this context `model` has these layers removed; afterwards it is as it was."""
    undo = _cut(model, check_layers(model, layers))
    try:
        yield
    finally:
        undo()


def check_layers(model: PreTrainedModel, layers: int | Iterable[int]) -> set[int]:
    """The present layer indices in `layers`, as a set that leaves at least one layer.

    Raises:
        LayerPruneError: an index is not one of the model's layers or named twice, or all are named.
    """
    named = [layers] if isinstance(layers, int) else list(layers)
    count = len(find_decoder(model).layers)
    unknown = [layer for layer in named if type(layer) is not int or not 0 <= layer < count]
    if unknown:
        raise LayerPruneError(f"No layers {unknown}: this model has {count} layers (0 to {count - 1}).")
    if len(set(named)) < len(named):
        raise LayerPruneError(f"A layer is named twice in {named}.")
    if len(named) == count:
        raise LayerPruneError(f"Cannot remove all {count} layers: at least one must be left.")
    return set(named)


def _cut(model: PreTrainedModel, removed: set[int]) -> Callable[[], None]:
    """Remove layers in place, unchecked; return the function that puts everything back."""
    decoder = find_decoder(model)
    config, old_layers, old_fields = decoder.config, decoder.layers, dict(vars(decoder.config))
    count = len(old_layers)
    kept = [i for i in range(count) if i not in removed]
    lineage = get_lineage(model).without(removed)
    old_indices = [
        (module, name, getattr(module, name))
        for layer in old_layers
        for module in layer.modules()
        for name in INDEX_ATTRIBUTES
        if hasattr(module, name)
    ]

    def undo() -> None:
        setattr(decoder.parent, decoder.attribute, old_layers)
        vars(config).clear()
        vars(config).update(old_fields)
        for module, name, value in old_indices:
            setattr(module, name, value)

    fields = per_layer_fields(config, count)
    try:
        config.num_hidden_layers = len(kept)
        for name in fields:
            setattr(config, name, [old_fields[name][i] for i in kept])
        write_lineage(config, lineage)
        layers = nn.ModuleList([old_layers[i] for i in kept])
        layers.training = old_layers.training
        setattr(decoder.parent, decoder.attribute, layers)
        for new, old in enumerate(kept):
            for module in old_layers[old].modules():
                for name in INDEX_ATTRIBUTES:
                    if getattr(module, name, None) == old:
                        setattr(module, name, new)
    except BaseException:
        undo()
        raise
    return undo


def _differences(model: PreTrainedModel) -> dict[Any, str]:
    """How `model` differs from one freshly built from its config (on the meta device, no memory).

    Keyed by the live module and the name of what differs, so that a difference which was there before
    a removal (dropout switched off, say) is known again after it, when the layer's path has changed.
    """
    with torch.device("meta"):
        # As a reload does it: through plain values, so that the config's own rules run again.
        config = type(model.config).from_dict(copy.deepcopy(model.config.to_dict()))
        fresh = dict(type(model)(config).named_modules())
    live = dict(model.named_modules())
    found: dict[Any, str] = {path: f"{path} is missing here" for path in fresh.keys() - live.keys()}
    for path, module in live.items():
        if path not in fresh:
            found[module, ""] = f"{path} is not in it"
            continue
        here, there = _facts(module), _facts(fresh[path])
        # What is not saved and not built anew is not needed: tables of an attention kind now gone.
        stale = here.keys() - there.keys() - module._parameters.keys() - _saved_buffers(module)
        for name in (here.keys() | there.keys()) - stale:
            if here.get(name) != there.get(name):
                where = f"{path}.{name}".lstrip(".")
                found[module, name] = f"{where} is {here.get(name)} here, {there.get(name)} there"
    return found


def _facts(module: nn.Module) -> dict[str, Any]:
    """The class, tensor shapes and scalar attributes of one module."""
    tensors = {**module._parameters, **module._buffers}
    facts: dict[str, Any] = {k: tuple(v.shape) for k, v in tensors.items() if v is not None}
    facts["class"] = type(module).__name__
    for name, value in vars(module).items():
        public = not name.startswith("_") and name != "training"
        if public and (value is None or isinstance(value, (bool, int, float, str))):
            facts[name] = value
    return facts


def _saved_buffers(module: nn.Module) -> set[str]:
    return module._buffers.keys() - module._non_persistent_buffers_set
