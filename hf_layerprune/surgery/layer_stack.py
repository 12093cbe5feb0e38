"""A handle on the decoder layers of a model. It finds the layers that can be removed, and removes layers."""

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayerPruneError
from .decoder import Decoder, find_decoder, layer_count, text_config
from .edits import Edits
from .exact_cut import StateBefore, cut_exactly
from .fresh_model import module_facts
from .lineage import Lineage, get_lineage, plain_int
from .peft import adapter_configs, base_of


class LayerStack:
    """A handle on the decoder layers of a model. Public functions create it and pass it to other functions.

    Each call describes the present state of the model. The layers that can be removed are computed once for
    each state, and shared by all handles on the model.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model.

    Raises:
        LayerPruneError: the decoder layers of the model cannot be found.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._found = find_decoder(self.base)
        self._parent = _path_of(self._found.parent, self.base)

    @classmethod
    def of(cls, model: "Any | LayerStack") -> "LayerStack":
        """Returns a handle on `model`, or `model` if it is a handle."""
        return model if isinstance(model, LayerStack) else cls(model)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without the wrapper of PEFT."""
        return base_of(self.model)

    @property
    def decoder(self) -> Decoder:
        """The decoder that holds the layers. It is searched again if the model has changed."""
        base, decoder = self.base, self._found
        is_current = (
            decoder.config is text_config(base.config)
            and _submodule(base, self._parent) is decoder.parent
            and len(decoder.layers) == layer_count(decoder.config)
        )
        if not is_current:
            self._found = find_decoder(base)
            self._parent = _path_of(self._found.parent, base)
        return self._found

    @property
    def config(self) -> PreTrainedConfig:
        """The config that counts the layers: the model's config, or its text part."""
        return self.decoder.config

    @property
    def layers(self) -> nn.ModuleList:
        """The present layers of the model."""
        return self.decoder.layers

    @property
    def lineage(self) -> Lineage:
        """The layers of the original model that remain."""
        return get_lineage(self.base)

    def __len__(self) -> int:
        return len(self.layers)

    def removable(
        self, layers: Iterable[int] | None = None, block: int = 1
    ) -> tuple[dict[int, "LayerCut"], dict[int, str]]:
        """Finds the layers that can be removed exactly.

        Args:
            layers (iterable of `int`, *optional*): present indices. Default: all layers that begin a block.
            block (`int`, *optional*, defaults to 1): number of consecutive layers that are removed together.

        Returns:
            `tuple[dict[int, LayerCut], dict[int, str]]`: for each layer that can be removed, a context that
            removes the layer and the rest of its block. For each other layer, the reason.
        """
        removals, cuts, reasons = self._removals(), {}, {}
        for first in range(len(self) - block + 1) if layers is None else layers:
            try:
                removed = self.check_layers(range(first, first + block))
                cuts[first] = LayerCut(self, removals.find(self, removed))
            except LayerPruneError as error:
                reasons[first] = str(error)
        return cuts, reasons

    def remove(self, layers: int | Iterable[int]) -> list[int]:
        """Removes layers in place.

        Returns:
            `list[int]`: the remaining layers whose index was not their position before.

        Raises:
            LayerPruneError: as [`remove_layers`].
        """
        edits = self._removals().find(self, self.check_layers(layers))
        edits.make()
        edits.forget_old()
        return edits.renumbered

    def without(self, layers: int | Iterable[int]) -> "LayerCut":
        """Returns a context that removes layers from the model.

        Raises:
            LayerPruneError: as [`remove_layers`].
        """
        return LayerCut(self, self._removals().find(self, self.check_layers(layers)))

    def check_layers(self, layers: int | Iterable[int]) -> set[int]:
        """Returns the present indices in `layers` as a set that leaves at least one layer.

        Raises:
            LayerPruneError: an index is out of range or given twice, or all layers are given.
        """
        given: Any = plain_int(layers)
        try:
            named = [given] if isinstance(given, int) else [plain_int(layer) for layer in given]
        except TypeError:  # not a number and not a sequence
            named = [given]
        count = len(self)
        unknown = [layer for layer in named if type(layer) is not int or not 0 <= layer < count]
        if unknown:
            raise LayerPruneError(f"No layers {unknown}: this model has {count} layers (0 to {count - 1}).")
        if len(set(named)) < len(named):
            raise LayerPruneError(f"A layer is named twice in {named}.")
        if len(named) == count:
            raise LayerPruneError(f"Cannot remove all {count} layers: at least one must be left.")
        return set(named)

    def _removals(self) -> "_Removals":
        """Returns the known removals from the model in its present state."""
        state, known = _ModelState.of(self), _REMOVALS.get(self.layers)
        if known is None or not known.state.is_same(state):
            known = _REMOVALS[self.layers] = _Removals(state, StateBefore(self.model))
        return known


class LayerCut:
    """A context that removes layers from a model. On exit the model is restored. The context can be entered
    again at no cost while nothing else changes the model.

    Args:
        stack ([`LayerStack`]): the model's layers.
        edits ([`Edits`]): the edits that remove the layers, not yet made.
    """

    def __init__(self, stack: LayerStack, edits: Edits) -> None:
        self._stack, self._edits = stack, edits
        self._layers = weakref.ref(stack.layers)

    def __enter__(self) -> None:
        if self._stack.layers is not self._layers():
            raise LayerPruneError("The model has lost layers since this context was made.")
        self._edits.make()

    def __exit__(self, *exception: object) -> None:
        self._edits.undo()


@dataclass
class _ModelState:
    """The state of a model that decides whether a removal is exact. Weights are not part of it.

    Args:
        objects (list of `weakref.ref`): the model, its modules and configs.
        facts (`list`): the attributes of these objects, as plain values.
    """

    objects: list["weakref.ref[Any]"]
    facts: list[Any]

    @classmethod
    def of(cls, stack: LayerStack) -> "_ModelState":
        """Returns the present state of a model."""
        model, base = stack.model, stack.base
        adapters = list(adapter_configs(model).values())
        modules, quantizer = list(base.modules()), getattr(base, "hf_quantizer", None)
        configs = [getattr(module, "config", None) for module in modules]
        configs = [config for config in configs if isinstance(config, PreTrainedConfig)]
        parameters = dict(base.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        ties = [first.setdefault(id(parameter), name) for name, parameter in parameters.items()]
        facts = [
            [module_facts(module) for module in modules],
            ties,
            dict(base.all_tied_weights_keys),
            base.config.to_dict(),
            copy.deepcopy([adapter.to_dict() for adapter in adapters]),
            list(getattr(quantizer, "modules_to_not_convert", None) or []),
        ]
        objects = [owner for owner in (model, *modules, *configs, quantizer, *adapters) if owner is not None]
        return cls([weakref.ref(owner) for owner in objects], facts)

    def is_same(self, other: "_ModelState") -> bool:
        """Returns whether `other` is the same model in the same state."""
        pairs = zip(self.objects, other.objects, strict=False)
        return (
            len(self.objects) == len(other.objects)
            and all(a() is b() is not None for a, b in pairs)
            and self.facts == other.facts
        )


@dataclass
class _Removals:
    """The known removals from one state of a model.

    Args:
        state ([`_ModelState`]): the state.
        before ([`StateBefore`]): the differences of the model from a freshly built model.
        results (`dict`): for each set of layers, the edits that remove it exactly, or the reason why it
            cannot be removed.
    """

    state: _ModelState
    before: StateBefore
    results: dict[frozenset[int], Edits | LayerPruneError] = field(default_factory=dict)

    def find(self, stack: LayerStack, removed: set[int]) -> Edits:
        """Returns the edits that remove these layers, not yet made.

        Raises:
            LayerPruneError: these layers cannot be removed exactly.
        """
        key = frozenset(removed)
        if key not in self.results:
            try:
                edits = cut_exactly(stack.model, stack.decoder, removed, self.before)
            except LayerPruneError as error:
                self.results[key] = LayerPruneError(str(error))
                raise
            edits.undo()
            self.results[key] = edits
        result = self.results[key]
        if isinstance(result, LayerPruneError):
            raise LayerPruneError(str(result))
        return result


# This cache holds no strong reference to a model, a layer or a tensor.
_REMOVALS: "weakref.WeakKeyDictionary[nn.ModuleList, _Removals]" = weakref.WeakKeyDictionary()


def _path_of(module: nn.Module, model: nn.Module) -> str:
    return next(path for path, other in model.named_modules() if other is module)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
