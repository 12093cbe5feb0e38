"""Taking decoder layers out of a live model, with config and indices kept in step."""

import copy
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import LayerPruneError
from .config_fields import cut_fields, cut_names
from .decoder import INDEX_ATTRIBUTES, Decoder, count_fields, find_decoder, layer_count
from .fresh_model import Difference, build_blueprint, differences, quiet
from .lineage import CONFIG_KEY, Lineage, get_lineage, lineage_entry, plain_int
from .peft import adapter_configs, adapter_differences, base_of, cut_adapter, keep_base_known


logger = logging.getLogger(__name__)

_ABSENT: Any = object()
_Key = tuple[nn.Module, str]


def remove_layers(model: Any, layers: int | Iterable[int]) -> Lineage:
    """Remove decoder layers from `model`, in place, and return what is left.

    The config follows (the number of layers, every field that speaks of single layers, the lineage), and so
    do the modules' own indices, so that the model saves, reloads and generates as a plain transformers
    model. The result must be what the new config builds; where it would not be, nothing is changed. An
    optimizer made before keeps the removed parameters: see `LayerPruningCallback`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a causal language model. Of adapters, every index in their
            configs follows as well; see [`~hf_layerprune.save_adapter`].
        layers (`int` or iterable of `int`): indices in the present model, from 0.

    Returns:
        `Lineage`: the original indices of the layers that are left.

    Layers that were cut by hand before are numbered anew, with a warning.

    Raises:
        LayerPruneError: an index is not one of the model's layers or named twice, no layer would be
            left, or these layers cannot be removed exactly (with the reason).
    """
    renumbered = _cut(model, check_layers(model, layers)).renumbered
    if renumbered:
        logger.warning(
            "Layers %s carried the numbers of other places: layers were cut by hand before. All layers are "
            "numbered anew, so that each has its own place in the cache.",
            renumbered,
        )
    if adapter_configs(model):
        keep_base_known(model)
    return get_lineage(model)


def keep_lineage(model: Any, lineage: Lineage) -> None:
    """Remove layers from `model`, in place, until it has exactly the layers that `lineage` keeps.

    Raises:
        LayerPruneError: `lineage` is of another original model, or has a layer that `model` has not.
    """
    present = get_lineage(model)
    if present.original != lineage.original or not set(lineage.kept) <= set(present.kept):
        raise LayerPruneError(f"A model with {present} cannot be cut to {lineage}.")
    remove_layers(model, [i for i, o in enumerate(present.kept) if o not in lineage.kept])


def put_back(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Make `model`, in place, what `whole` is: a model of its kind that has lost fewer layers. What is no
    decoder layer stays the same module; `whole` is used up.

    Raises:
        LayerPruneError: `whole` lacks a layer that `model` has.
    """
    present, before = get_lineage(model), get_lineage(whole)
    if present.original != before.original or not set(present.kept) <= set(before.kept):
        raise LayerPruneError(f"A model with {present} cannot be made one with {before}.")
    decoder, theirs = find_decoder(model), dict(whole.named_modules())
    inside, layers = set(decoder.layers.modules()), find_decoder(whole).layers
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if module in inside:
                continue
            for place in (module._parameters, module._buffers):
                for key, tensor in place.items():
                    if tensor is not None:
                        tensor.copy_(getattr(theirs[name], key))
            new = vars(theirs[name]).items()
            vars(module).update({k: v for k, v in new if k != "training" and not k.startswith("_")})
    layers.to(model.device).train(decoder.layers.training)
    decoder.parent._modules[decoder.attribute] = layers


class without_layers:
    """A context in which `model` has these layers removed; afterwards it is as it was. It can be entered
    again and again, which takes no time, as long as nothing else changes the model.

    Raises:
        LayerPruneError: as [`remove_layers`], before the context is entered.
    """

    def __init__(self, model: Any, layers: int | Iterable[int], known: set[_Key] | None = None) -> None:
        self._decoder = find_decoder(base_of(model))
        self._stack = self._decoder.layers
        self._edits = _cut(model, check_layers(model, layers), known)
        self._edits.undo()

    def __enter__(self) -> None:
        if self._decoder.layers is not self._stack:
            raise LayerPruneError("The model has lost layers since this context was made.")
        self._edits.redo()

    def __exit__(self, *exception: object) -> None:
        self._edits.undo()


def possible_cuts(
    model: PreTrainedModel, layers: Iterable[int], run: int = 1
) -> tuple[dict[int, without_layers], dict[int, str]]:
    """For each of `layers` that can be removed exactly, with the next ones up to a run of `run`, the context
    without them; for each other one, why it cannot."""
    cuts, reasons, known = {}, {}, _known_differences(base_of(model))
    for layer in layers:
        try:
            cuts[layer] = without_layers(model, range(layer, layer + run), known)
        except LayerPruneError as error:
            reasons[layer] = str(error)
    return cuts, reasons


def check_layers(model: Any, layers: int | Iterable[int]) -> set[int]:
    """The present layer indices in `layers`, as a set that leaves at least one layer.

    Raises:
        LayerPruneError: an index is not one of the model's layers or named twice, or all are named.
    """
    given: Any = plain_int(layers)
    try:
        named = [given] if isinstance(given, int) else [plain_int(layer) for layer in given]
    except TypeError:  # neither a number nor several
        named = [given]
    count = len(find_decoder(base_of(model)).layers)
    unknown = [layer for layer in named if type(layer) is not int or not 0 <= layer < count]
    if unknown:
        raise LayerPruneError(f"No layers {unknown}: this model has {count} layers (0 to {count - 1}).")
    if len(set(named)) < len(named):
        raise LayerPruneError(f"A layer is named twice in {named}.")
    if len(named) == count:
        raise LayerPruneError(f"Cannot remove all {count} layers: at least one must be left.")
    return set(named)


@dataclass(frozen=True)
class _Part:
    """The part of a parameter that packs all layers side by side which is left to the kept ones."""

    packed: nn.Parameter
    dimension: int
    width: int
    kept: list[int]

    def make(self) -> nn.Parameter:
        entries = [layer * self.width + i for layer in self.kept for i in range(self.width)]
        index = torch.tensor(entries, device=self.packed.device)
        part = self.packed.detach().index_select(self.dimension, index)
        return nn.Parameter(part, self.packed.requires_grad)


class _Edits:
    """Changes to the dicts in which Python keeps attributes; they can be taken back and made again."""

    def __init__(self) -> None:
        self.renumbered: list[int] = []  # layers whose number was not that of their place before
        self._log: list[tuple[dict[str, Any], str, Any, Any]] = []

    def set(self, place: dict[str, Any], name: str, value: Any) -> None:
        self._log.append((place, name, place.get(name, _ABSENT), value))
        _put(place, name, value)

    def undo(self) -> None:
        for place, name, old, _ in reversed(self._log):
            _put(place, name, old)

    def redo(self) -> None:
        for place, name, _, new in self._log:
            _put(place, name, new)


def _put(place: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        place.pop(name, None)
    else:  # a part is made only now, and let go with the undoing: it may be gigabytes
        place[name] = value.make() if isinstance(value, _Part) else value


@dataclass(frozen=True)
class _Removal:
    """What a removal means for what speaks of layers.

    Args:
        count (`int`): how many layers there were.
        kept (`list[int]`): the old indices of those that stay.
        changed (`dict`): the config's fields that changed, each as it was and as it is.
        places (`dict`): for each module inside a kept layer, the layer's old index.
    """

    count: int
    kept: list[int]
    changed: dict[str, tuple[Any, Any]]
    places: dict[nn.Module, int]

    def explains(self, difference: Difference) -> bool:
        """Whether an attribute only follows the removal: a layer's place, the number of layers, a list of the
        config's, or a table by layer."""
        name, here, there = difference.name, difference.here, difference.there
        if isinstance(here, list) and isinstance(there, list):
            moved = any(here == old and there == new for old, new in self.changed.values())
            kinds = len(set(here)) == len(here) and set(there) <= set(here)  # a set of those in use
            return moved or kinds
        if isinstance(here, dict) and isinstance(there, dict):
            return {self.kept.index(k): v for k, v in here.items() if k in self.kept} == there
        if type(here) is float and type(there) is float:
            return math.isclose(here, there, rel_tol=1e-12)  # the same, computed from other numbers
        layer = self.places.get(difference.module)
        if here is True and there is False:  # whether there is a layer of a kind
            return layer is None and bool(re.fullmatch(r"has_\w+_layers", name))
        if type(here) is not int or type(there) is not int:
            return False
        if (here, there) == (self.count, len(self.kept)):
            return True
        if layer is None:  # a threshold, or how many layers something has
            return "layer" in name and there == sum(i < here for i in self.kept)
        new = self.kept.index(layer)
        if (here, there) == (layer, new):
            return True
        # Which layer's keys and values it reads (Gemma 3n before transformers 5.23).
        if "layer" in name and here in self.kept and there == self.kept.index(here):
            return True
        # LongCat has two places in the cache for a layer.
        return name == "layer_idx" and (here // 2, here % 2) == (layer, there % 2) and there // 2 == new

    def unpacked(self, difference: Difference) -> tuple[int, int] | None:
        """If a tensor's shape, or a number of a module, packs all layers side by side as in Gemma's
        embed_tokens_per_layer: the packed dimension and the width of one layer's part."""
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


def _known_differences(model: PreTrainedModel) -> set[_Key]:
    """What differs from a fresh model before any removal."""
    try:
        return {difference.key for difference in differences(model, build_blueprint(model))}
    except Exception:  # no model can be built from this config; each removal will say so
        return set()


def _cut(model: Any, removed: set[int], known: set[_Key] | None = None) -> _Edits:
    """Remove layers in place and return what takes it back. If the result is not exact, nothing changes."""
    edits = _Edits()
    if not removed:
        return edits
    base, adapters = base_of(model), adapter_configs(model)
    decoder = find_decoder(base)
    config, old_layers = decoder.config, decoder.layers
    kept = [i for i in range(len(old_layers)) if i not in removed]
    lineage = get_lineage(base).without(removed)
    twice = [i for i, layer in enumerate(old_layers) if any(layer is other for other in old_layers[:i])]
    if twice:
        raise LayerPruneError(
            f"Layers {twice} of this {config.model_type} model are the same modules as earlier layers. Each "
            "layer needs its own place in the cache: put copies there, with copy.deepcopy(layer)."
        )
    known_to_adapters: set[str] = set()
    had_cache = _has_cache(config)
    try:
        if adapters:
            known_to_adapters = set(adapter_differences(model))
        _check_pictures(base)
        changed = _cut_config(edits, base, config, kept, lineage)
        _cut_names(edits, base, decoder, kept)
        layers = nn.ModuleList([old_layers[i] for i in kept])
        layers.training = old_layers.training
        edits.set(decoder.parent._modules, decoder.attribute, layers)
        places = {module: i for i in kept for module in old_layers[i].modules()}
        for module, old in places.items():
            for name in INDEX_ATTRIBUTES:
                if vars(module).get(name) == old:
                    edits.set(vars(module), name, kept.index(old))
        wrong = _reconcile(edits, base, _Removal(len(old_layers), kept, changed, places))
        if wrong and known is None:
            edits.undo()
            known = _known_differences(base)
            edits.redo()
        earlier = [difference for difference in wrong if difference.key in (known or ())]
        wrong = [difference for difference in wrong if difference.key not in (known or ())]
        wrong += _renumber(edits, earlier, places)
        if wrong:
            reasons = "; ".join(str(difference) for difference in wrong[:3])
            raise LayerPruneError(f"a model built from the new config would differ: {reasons}.")
        for adapter in adapters.values():
            for name, value in cut_adapter(adapter, decoder.attribute, kept).items():
                edits.set(vars(adapter), name, value)
        if adapters and (moved := set(adapter_differences(model)) - known_to_adapters):
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


def _renumber(edits: _Edits, earlier: list[Difference], places: dict[nn.Module, int]) -> list[Difference]:
    """Number the layers of a stack that was cut by hand, whose modules still carry the numbers that they had.

    Args:
        edits (`_Edits`): where the numbers are set.
        earlier (`list[Difference]`): what differed from a fresh model before the removal.
        places (`dict`): for each module inside a kept layer, the layer's old index.

    Returns:
        `list[Difference]`: where there are such numbers, what else of the layers differed before: a config
            that did not follow the cut.
    """
    inside = [difference for difference in earlier if difference.module in places]
    stale = [
        one for one in inside if one.name in INDEX_ATTRIBUTES and type(one.here) is type(one.there) is int
    ]
    for difference in stale:
        edits.set(vars(difference.module), difference.name, difference.there)
    edits.renumbered = sorted({places[difference.module] for difference in stale})
    return [difference for difference in inside if difference not in stale] if stale else []


def _check_pictures(model: PreTrainedModel) -> None:
    """Refuse a model that adds what it sees in pictures to the output of layers by their number.

    Raises:
        LayerPruneError: it does.
    """
    parts = [model.config.to_dict()]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        found = [name for name, value in part.items() if "deepstack" in str(name) and value]
        if found:
            raise LayerPruneError(f"pictures enter it at layers by their number ({found[0]}).")


def _reason(error: Exception) -> str:
    return f"no model can be built without them ({' '.join(str(error).split())[:200]})."


def _cut_config(
    edits: _Edits, model: PreTrainedModel, config: PreTrainedConfig, kept: list[int], lineage: Lineage
) -> dict[str, tuple[Any, Any]]:
    """Let `config`, and the copies of it that modules hold, follow the removal; return what changed."""
    before = config.to_dict()
    fields = cut_fields(before, layer_count(config), kept)
    fields |= dict.fromkeys(count_fields(config), len(kept)) | {CONFIG_KEY: lineage_entry(lineage)}
    with quiet():
        new = type(config).from_dict(copy.deepcopy(fields))
    after = new.to_dict()
    names = [
        name
        for name in vars(config).keys() | vars(new).keys()
        if name == "_heterogeneity_spec"
        or (not name.startswith("_") and name in after and before.get(name, _ABSENT) != after[name])
    ]
    changed = {name: (vars(config).get(name, _ABSENT), vars(new).get(name, _ABSENT)) for name in names}
    for name, (_, value) in changed.items():
        edits.set(vars(config), name, value)
    copies = {id(c): c for c in (getattr(m, "config", None) for m in model.modules())}
    for other in copies.values():
        if type(other) is type(config) and other is not config:
            for name, (old, value) in changed.items():
                if name in vars(other) and vars(other)[name] == old:
                    edits.set(vars(other), name, value)
    return changed


def _cut_names(edits: _Edits, model: PreTrainedModel, decoder: Decoder, kept: list[int]) -> None:
    """Let what names modules by their layer follow the removal: the config, its quantisation, and the
    quantizer that the model was loaded with.

    Raises:
        LayerPruneError: other modules would be quantised when the model is loaded.
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

    holders = {id(one): one for one in (model.config, decoder.config, quantizer) if one is not None}
    for holder in holders.values():
        settings = getattr(holder, "quantization_config", None)
        fields = changed(holder)
        if hasattr(settings, "__dict__") and (followed := changed(settings)):
            new = copy.copy(settings)  # the user's own may be for other models, too
            vars(new).update(followed)
            fields["quantization_config"] = new
        for name, value in fields.items():
            edits.set(vars(holder), name, value)
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


def _reconcile(edits: _Edits, model: PreTrainedModel, removal: _Removal) -> list[Difference]:
    """Let modules follow the removal; return the differences to a fresh model that are left."""
    blueprint = build_blueprint(model)
    left = []
    for difference in differences(model, blueprint):
        module, name, packed = difference.module, difference.name, removal.unpacked(difference)
        if removal.explains(difference):
            edits.set(vars(module), name, difference.there)
        elif packed:
            if name in module._parameters:
                parameter: Any = module._parameters[name]
                edits.set(module._parameters, name, _Part(parameter, *packed, removal.kept))
            else:
                edits.set(vars(module), name, difference.there)
        else:
            left.append(difference)
    edits.set(vars(model), "all_tied_weights_keys", blueprint.all_tied_weights_keys)
    fresh = dict(blueprint.named_modules())
    for path, module in model.named_modules():  # of Zamba they are made for each depth
        if "_tied_weights_keys" in vars(module) and path in fresh:
            edits.set(vars(module), "_tied_weights_keys", fresh[path]._tied_weights_keys)
    return left


def _has_cache(config: PreTrainedConfig) -> bool:
    """Whether a key/value cache for this config can tell its length."""
    try:
        DynamicCache(config=config).get_seq_length()
    except Exception:  # whatever it is, generation would meet it too
        return False
    return True
