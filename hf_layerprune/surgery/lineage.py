"""Tracks which layers of the original model remain. The lineage is stored in config.json."""

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayerPruneError
from .decoder import layer_count, text_config


CONFIG_KEY = "layer_pruning"
MOST_LAYERS = 1_000  # more than any model has, as a damaged config may hold any number


def plain_int(number: Any) -> Any:
    """Returns an integer of any type (numpy, torch) as an `int`, and other values unchanged."""
    if isinstance(number, bool):
        return number
    try:
        return operator.index(number)
    except TypeError:
        return number


@dataclass(frozen=True)
class Lineage:
    """The layers of the original model that a pruned model keeps.

    Args:
        original (`int`): number of layers of the original model.
        kept (`list[int]`): for each present layer, its index in the original model.
    """

    original: int
    kept: list[int]

    def __post_init__(self) -> None:
        # JSON cannot hold numbers of numpy or torch.
        object.__setattr__(self, "original", plain_int(self.original))
        object.__setattr__(self, "kept", [plain_int(layer) for layer in self.kept])
        increasing = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        if not (self.kept and increasing and self.kept[0] >= 0 and self.kept[-1] < self.original):
            raise LayerPruneError(
                f"Not a lineage: {self.kept} must be increasing layer indices below {self.original}."
            )

    @property
    def removed(self) -> list[int]:
        """The original indices of the removed layers."""
        return sorted(set(range(self.original)) - set(self.kept))

    @property
    def after_cuts(self) -> list[int]:
        """The present indices of the layers whose original predecessor was removed."""
        before = [-1, *self.kept[:-1]]
        return [i for i, (a, b) in enumerate(zip(before, self.kept, strict=True)) if b != a + 1]

    def without(self, layers: Collection[int]) -> "Lineage":
        """Returns the lineage after a removal of the layers with these present indices."""
        return Lineage(self.original, [o for i, o in enumerate(self.kept) if i not in layers])

    def __str__(self) -> str:
        return f"{len(self.kept)} of {self.original} layers, removed {self.removed}"


def get_lineage(model: PreTrainedModel | PreTrainedConfig) -> Lineage:
    """Returns the lineage of a model or a config. It contains all layers if no layer was removed.

    Raises:
        LayerPruneError: the entry in the config is damaged, or has another number of layers than the config.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    config = text_config(config)
    count = layer_count(config)
    if not 1 <= count <= MOST_LAYERS:
        raise LayerPruneError(f"The config of {config.model_type} has {count} layers: it is damaged.")
    entry: Any = getattr(config, CONFIG_KEY, None)
    if entry is None:
        return Lineage(count, list(range(count)))
    try:
        lineage = read_lineage(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise LayerPruneError(f"Damaged `{CONFIG_KEY}` in the config: {error}") from error
    if len(lineage.kept) != count:
        raise LayerPruneError(
            f"The config's `{CONFIG_KEY}` lists {len(lineage.kept)} layers, but num_hidden_layers "
            f"is {count}: the model was changed by something else since."
        )
    return lineage


def lineage_entry(lineage: Lineage) -> dict[str, Any]:
    """Returns the entry for `lineage` in a (text) config. Its field is [`CONFIG_KEY`]."""
    return {"original_num_hidden_layers": lineage.original, "kept_layers": lineage.kept}


def read_lineage(entry: Any) -> Lineage:
    """Returns the lineage in an entry of [`lineage_entry`].

    Raises:
        KeyError, TypeError, ValueError: the entry is damaged.
    """
    original, kept = entry["original_num_hidden_layers"], entry["kept_layers"]
    numbers = [original, *kept]
    if not isinstance(kept, list) or any(type(number) is not int for number in numbers):
        raise TypeError(f"{str(numbers)[:80]} are not all whole numbers")
    if original > MOST_LAYERS:
        raise ValueError(f"{original} layers")
    return Lineage(original, kept)
