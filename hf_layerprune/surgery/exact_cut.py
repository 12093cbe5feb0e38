"""Removes layers so that the model equals the one that its new config builds, or undoes the removal."""

import copy
import math
import re
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import LayerPruneError
from .config_fields import cut_fields, cut_names
from .decoder import INDEX_ATTRIBUTES, Decoder, count_fields, layer_count
from .edits import Computed, Edits
from .fresh_model import Difference, build_meta_model, differences, quiet
from .lineage import CONFIG_KEY, Lineage, get_lineage, lineage_entry
from .peft import adapter_configs, adapter_differences, base_of, cut_adapter


_UNSET: Any = object()


class StateBefore:
    """The differences between a model and a freshly built model before a removal. They are computed at the
    first access.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model. It must not change afterwards.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    @cached_property
    def differences(self) -> set[Any]:
        """The keys of the differences from a freshly built model."""
        base = base_of(self._model())
        try:
            return {difference.key for difference in differences(base, build_meta_model(base))}
        except Exception:  # no model can be built from this config; each removal reports it
            return set()

    @cached_property
    def adapter_differences(self) -> set[str]:
        """The differences between the model's adapters and freshly built adapters. Empty without adapters."""
        model = self._model()
        return set(adapter_differences(model)) if adapter_configs(model) else set()


def _kept_layers(kept: list[int]) -> Computed:
    """Returns a change of a list of layers that keeps the layers with these indices."""

    def compute(stack: nn.ModuleList) -> nn.ModuleList:
        layers = nn.ModuleList([stack[i] for i in kept])
        layers.training = stack.training
        return layers

    return Computed(compute)


def _kept_part(dimension: int, width: int, kept: list[int]) -> Computed:
    """Returns a change of a parameter that packs all layers side by side. It keeps the parts of these
    layers."""

    def compute(packed: nn.Parameter) -> nn.Parameter:
        entries = [layer * width + i for layer in kept for i in range(width)]
        index = torch.tensor(entries, device=packed.device)
        return nn.Parameter(packed.detach().index_select(dimension, index), packed.requires_grad)

    return Computed(compute)


@dataclass(frozen=True)
class _Removal:
    """Decides which differences from a fresh model are expected after a removal.

    Args:
        count (`int`): number of layers before the removal.
        kept (`list[int]`): the old indices of the layers that stay.
        changed (`dict`): the config fields that changed, each with its old and new value.
        places (`dict`): for each module inside a kept layer, the layer's old index.
    """

    count: int
    kept: list[int]
    changed: dict[str, tuple[Any, Any]]
    places: dict[nn.Module, int]

    def explains(self, difference: Difference) -> bool:
        """Returns whether the removal explains a difference. The attribute is then a layer's position, the
        number of layers, a list of the config, or a table by layer."""
        name, here, there = difference.name, difference.here, difference.there
        if isinstance(here, list) and isinstance(there, list):
            moved = any(here == old and there == new for old, new in self.changed.values())
            kinds = len(set(here)) == len(here) and set(there) <= set(here)  # the distinct values in use
            return moved or kinds
        if isinstance(here, dict) and isinstance(there, dict):
            return {self.kept.index(k): v for k, v in here.items() if k in self.kept} == there
        if type(here) is float and type(there) is float:
            return math.isclose(here, there, rel_tol=1e-12)  # the same value, computed from other numbers
        layer = self.places.get(difference.module)
        if here is True and there is False:  # whether the model has a layer of a kind
            return layer is None and bool(re.fullmatch(r"has_\w+_layers", name))
        if type(here) is not int or type(there) is not int:
            return False
        if (here, there) == (self.count, len(self.kept)):
            return True
        if layer is None:  # a threshold, or a number of layers
            return "layer" in name and there == sum(i < here for i in self.kept)
        new = self.kept.index(layer)
        if (here, there) == (layer, new):
            return True
        # The layer whose keys and values it reads (Gemma 3n before transformers 5.23).
        if "layer" in name and here in self.kept and there == self.kept.index(here):
            return True
        # LongCat has two cache slots for a layer.
        return name == "layer_idx" and (here // 2, here % 2) == (layer, there % 2) and there // 2 == new

    def unpacked(self, difference: Difference) -> tuple[int, int] | None:
        """Returns the packed dimension and the width of one layer's part, None if the value is not packed.

        A packed value is a tensor's shape, or a number in a module, that puts all layers side by side, as in
        Gemma's embed_tokens_per_layer.
        """
        if "per_layer" not in difference.path:
            return None
        here, there = difference.here, difference.there
        here, there = ((here,), (there,)) if isinstance(here, int) else (here, there)
        if not isinstance(here, tuple) or not isinstance(there, tuple) or len(here) != len(there):
            return None
        unequal = [i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
        width, rest = divmod(here[unequal[0]], self.count)
        fits = len(unequal) == 1 and not rest and there[unequal[0]] == width * len(self.kept)
        return (unequal[0], width) if fits else None


def cut_exactly(model: Any, decoder: Decoder, removed: set[int], before: StateBefore) -> Edits:
    """Removes layers in place and returns the edits. If the result is not exact, the model is not changed.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model.
        decoder ([`Decoder`]): the decoder of the model.
        removed (`set[int]`): present indices of the layers to remove.
        before ([`StateBefore`]): the differences of the model before the removal.

    Raises:
        LayerPruneError: these layers cannot be removed exactly.
    """
    edits = Edits()
    if not removed:
        return edits
    base, adapters = base_of(model), adapter_configs(model)
    config, old_layers = decoder.config, decoder.layers
    kept = [i for i in range(len(old_layers)) if i not in removed]
    lineage = get_lineage(base).without(removed)
    twice = [i for i, layer in enumerate(old_layers) if any(layer is other for other in old_layers[:i])]
    if twice:
        raise LayerPruneError(
            f"Layers {twice} of this {config.model_type} model are the same modules as earlier layers. Each "
            "layer needs its own place in the cache: put copies there, with copy.deepcopy(layer)."
        )
    had_cache = _has_cache(config)
    try:
        adapter_differences_before = before.adapter_differences
        _check_pictures(base)
        changed = _cut_config(edits, base, config, kept, lineage)
        _cut_names(edits, base, decoder, kept)
        edits.set(decoder.parent, decoder.attribute, _kept_layers(kept))
        places = {module: i for i in kept for module in old_layers[i].modules()}
        for module, old in places.items():
            for name in INDEX_ATTRIBUTES:
                if vars(module).get(name) == old:
                    edits.set(module, name, kept.index(old))
        wrong = _reconcile(edits, base, _Removal(len(old_layers), kept, changed, places))
        known: set[Any] = set()
        if wrong:
            edits.undo()
            known = before.differences
            edits.make()
        earlier = [difference for difference in wrong if difference.key in known]
        wrong = [difference for difference in wrong if difference.key not in known]
        wrong += _renumber(edits, earlier, places)
        if wrong:
            reasons = "; ".join(str(difference) for difference in wrong[:3])
            raise LayerPruneError(f"a model built from the new config would differ: {reasons}.")
        for adapter in adapters.values():
            for name, value in cut_adapter(adapter, decoder.attribute, kept).items():
                edits.set(adapter, name, value)
        if adapters and (moved := set(adapter_differences(model)) - adapter_differences_before):
            reasons = "; ".join(sorted(moved)[:3])
            raise LayerPruneError(f"adapters built from their new configs would differ: {reasons}.")
        if had_cache and not _has_cache(config):
            raise LayerPruneError("no attention layer would be left to count the tokens in the cache.")
    except Exception as error:
        edits.undo()
        reason = str(error) if isinstance(error, LayerPruneError) else _reason(error)
        raise LayerPruneError(
            f"Cannot remove layers {sorted(removed)} of this {config.model_type} model exactly: {reason}"
        ) from error
    except BaseException:
        edits.undo()
        raise
    return edits


def _renumber(edits: Edits, earlier: list[Difference], places: dict[nn.Module, int]) -> list[Difference]:
    """Renumbers the layers of a model that was cut by hand, if modules still have their old indices.

    Args:
        edits ([`Edits`]): the edits to add the new indices to.
        earlier (`list[Difference]`): the differences from a fresh model that existed before the removal.
        places (`dict`): for each module inside a kept layer, the layer's old index.

    Returns:
        `list[Difference]`: the other earlier differences of the layers, if there are old indices, else none.
        They show that the config was not updated when the model was cut.
    """
    inside = [difference for difference in earlier if difference.module in places]
    stale = [
        difference
        for difference in inside
        if difference.name in INDEX_ATTRIBUTES and type(difference.here) is type(difference.there) is int
    ]
    for difference in stale:
        edits.set(difference.module, difference.name, difference.there)
    edits.renumbered = sorted({places[difference.module] for difference in stale})
    return [difference for difference in inside if difference not in stale] if stale else []


def _check_pictures(model: PreTrainedModel) -> None:
    """Checks that a model does not add image features to the output of layers with fixed indices.

    Raises:
        LayerPruneError: the model adds image features by layer index.
    """
    parts = [model.config.to_dict()]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        fields = [name for name, value in part.items() if "deepstack" in str(name) and value]
        if fields:
            raise LayerPruneError(f"pictures enter it at layers by their number ({fields[0]}).")


def _reason(error: Exception) -> str:
    return f"no model can be built without them ({' '.join(str(error).split())[:200]})."


def _cut_config(
    edits: Edits, model: PreTrainedModel, config: PreTrainedConfig, kept: list[int], lineage: Lineage
) -> dict[str, tuple[Any, Any]]:
    """Updates `config` and its copies in modules for the removal. Returns the changed fields, each with its
    old and new value."""
    before = config.to_dict()
    fields = cut_fields(before, layer_count(config), kept)
    fields |= dict.fromkeys(count_fields(config), len(kept)) | {CONFIG_KEY: lineage_entry(lineage)}
    with quiet():
        new = type(config).from_dict(copy.deepcopy(fields))
    after = new.to_dict()
    names = [
        name
        for name in vars(config).keys() | vars(new).keys()
        if name == "_heterogeneity_spec"  # private: the parsed per_layer_config has no public name
        or (not name.startswith("_") and name in after and before.get(name, _UNSET) != after[name])
    ]
    changed = {name: (vars(config).get(name, _UNSET), vars(new).get(name, _UNSET)) for name in names}
    for name, (_, value) in changed.items():
        edits.set(config, name, value)
    copies = {id(c): c for c in (getattr(m, "config", None) for m in model.modules())}
    for other in copies.values():
        if type(other) is type(config) and other is not config:
            for name, (old, value) in changed.items():
                if name in vars(other) and vars(other)[name] == old:
                    edits.set(other, name, value)
    return changed


def _cut_names(edits: Edits, model: PreTrainedModel, decoder: Decoder, kept: list[int]) -> None:
    """Updates module names that contain a layer index, in the config, its quantisation settings, and the
    quantizer that the model was loaded with.

    Raises:
        LayerPruneError: after the update, other modules would be quantised when the model is loaded.
    """
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    (stack,) = [path for path, m in lists.items() if m is decoder.layers]
    others = [path for path in lists if path != stack and path.endswith(f".{decoder.attribute}")]
    quantizer: Any = getattr(model, "hf_quantizer", None)
    skipped = getattr(quantizer, "modules_to_not_convert", None)

    def changed(holder: Any) -> dict[str, Any]:
        values = {name: value for name, value in vars(holder).items() if not name.startswith("_")}
        cut = {name: cut_names(value, stack, others, kept) for name, value in values.items()}
        return {name: value for name, value in cut.items() if value != values[name]}

    holders = {
        id(holder): holder for holder in (model.config, decoder.config, quantizer) if holder is not None
    }
    for holder in holders.values():
        settings = getattr(holder, "quantization_config", None)
        fields = changed(holder)
        if hasattr(settings, "__dict__") and (followed := changed(settings)):
            new = copy.copy(settings)  # the user may share this object with other models
            vars(new).update(followed)
            fields["quantization_config"] = new
        for name, value in fields.items():
            edits.set(holder, name, value)
    if skipped is None:
        return
    now = quantizer.modules_to_not_convert
    for new, old in enumerate(kept):
        for path, _ in decoder.layers[old].named_modules(prefix=f"{stack}.{old}"):
            moved = f"{stack}.{new}{path.removeprefix(f'{stack}.{old}')}"
            if should_convert_module(path, skipped) != should_convert_module(moved, now):
                raise LayerPruneError(
                    f"the names of modules that are not quantised, {sorted(skipped)}, would mean others: "
                    f"{moved}, which is {path} now. Name each layer by itself."
                )


def _reconcile(edits: Edits, model: PreTrainedModel, removal: _Removal) -> list[Difference]:
    """Updates modules for the removal, and returns the remaining differences from a fresh model."""
    meta_model = build_meta_model(model)
    left = []
    for difference in differences(model, meta_model):
        module, name, packed = difference.module, difference.name, removal.unpacked(difference)
        if removal.explains(difference):
            edits.set(module, name, difference.there)
        elif packed:
            is_parameter = isinstance(getattr(module, name), nn.Parameter)
            edits.set(module, name, _kept_part(*packed, removal.kept) if is_parameter else difference.there)
        else:
            left.append(difference)
    edits.set(model, "all_tied_weights_keys", meta_model.all_tied_weights_keys)
    fresh = dict(meta_model.named_modules())
    # Private, as transformers has no public name for the ties that a class declares. Zamba declares different
    # ties for each depth.
    for path, module in model.named_modules():
        if "_tied_weights_keys" in vars(module) and path in fresh:
            edits.set(module, "_tied_weights_keys", fresh[path]._tied_weights_keys)
    return left


def _has_cache(config: PreTrainedConfig) -> bool:
    """Returns whether a key/value cache for this config can return its length."""
    try:
        DynamicCache(config=config).get_seq_length()
    except Exception:  # any error here would also stop generation
        return False
    return True
