"""Updates config fields that name single layers when layers are removed.

General rules use the form and the name of a field. Tables list the exceptions, with the reason. The
comparison with a freshly built model (`exact_cut.py`) finds errors of rules and tables.
"""

import re
from collections.abc import Callable, Collection, Sequence
from itertools import chain, pairwise
from typing import Any

from ..errors import LayerPruneError


Fields = dict[str, Any]

# Number of layers of a kind at the start: layer i is of this kind if i is smaller.
FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
# Number of layers of a kind at the end.
LAST = ("num_kv_shared_layers",)
# Index of the last layer of a kind; -1 is the last layer of the model.
UP_TO = ("moe_layer_end_index",)
# Layer numbers from 1.
ONE_BASED = ("ple_layer_ids",)


def cut_fields(fields: Fields, count: int, kept: Sequence[int]) -> Fields:
    """Returns the config fields after a removal.

    Args:
        fields (`dict`): the config's fields from `to_dict`. They are not changed.
        count (`int`): number of layers before the removal.
        kept (sequence of `int`): the present indices of the layers that stay.

    Raises:
        LayerPruneError: the remaining layers cannot run.
    """
    cut = {name: _cut_value(name, value, count, kept) for name, value in fields.items()}
    for special in SPECIAL:
        cut |= special(fields, count, kept)
    return cut


def is_per_layer(name: str, value: Any, count: int) -> bool:
    """Returns whether a field is a list with one entry for each layer, such as `layer_types`."""
    if not isinstance(value, (list, tuple)) or len(value) != count or _is_indices(name, value, count):
        return False
    # Other lists, such as mlp_multipliers of Falcon-H1, may have the same length by chance.
    return bool(re.search(r"layer|block|pattern|types|intermediate_size|topk", name)) and "mtp" not in name


def _cut_value(name: str, value: Any, count: int, kept: Sequence[int]) -> Any:
    if is_per_layer(name, value, count):
        return [value[layer] for layer in kept]
    if _is_indices(name, value, count):
        base = 1 if name in ONE_BASED or count in value else 0
        return [kept.index(layer - base) + base for layer in value if layer - base in kept]
    if name == "per_layer_config" and isinstance(value, dict):
        return {str(kept.index(int(layer))): entry for layer, entry in value.items() if int(layer) in kept}
    if type(value) is not int:
        return value
    if name in FIRST:
        return sum(layer < value for layer in kept)
    if name in LAST:
        return sum(layer >= count - value for layer in kept)
    if name in UP_TO and value >= 0:
        return sum(layer <= value for layer in kept) - 1
    return value


def _is_indices(name: str, value: Any, count: int) -> bool:
    """Returns whether a field is a list of increasing layer indices, such as `mlp_only_layers`."""
    if not isinstance(value, (list, tuple)) or not re.search(r"layer|_idxs", name) or "mtp" in name:
        return False
    rising = all(type(v) is int for v in value) and all(a < b for a, b in pairwise(value))
    # With two layers, [0, 1] may also be a flag for each layer.
    flags = len(value) == count <= 2 and not re.search(r"ids|idx|indices", name)
    return rising and all(0 <= v <= count for v in value) and not flags


def _sparse_steps(fields: Fields, count: int, kept: Sequence[int]) -> Fields:
    """Updates the sparse layers of Qwen2-MoE and similar models.

    Layer i has experts if (i + 1) % decoder_sparse_step is 0 and i is not in mlp_only_layers. A removal
    breaks the period, so the list must name all dense layers."""
    step, listed = fields.get("decoder_sparse_step"), fields.get("mlp_only_layers")
    if step is None or listed is None:
        return {}
    dense = [new for new, old in enumerate(kept) if old in listed or (old + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _repeated_block_types(fields: Fields, count: int, kept: Sequence[int]) -> Fields:
    """Updates block_types of RecurrentGemma. It is repeated over the layers, so it must name each layer."""
    types = fields.get("block_types")
    return {"block_types": [types[layer % len(types)] for layer in kept]} if types else {}


def _attention_types(fields: Fields, count: int, kept: Sequence[int]) -> Fields:
    """Updates attention_types of GPT-Neo: pairs of attention kinds and their number of repetitions."""
    pairs = fields.get("attention_types")
    if not pairs:
        return {}
    kinds = list(chain.from_iterable(kinds * times for kinds, times in pairs))
    return {"attention_types": [[[kinds[layer] for layer in kept], 1]]}


def _depth_scale(fields: Fields, count: int, kept: Sequence[int]) -> Fields:
    """Updates scale_depth of MiniCPM3. The residual of a layer is scaled by scale_depth /
    sqrt(num_hidden_layers), and this scale must not change."""
    scale = fields.get("scale_depth")
    return {"scale_depth": scale * (len(kept) / count) ** 0.5} if scale else {}


def _shared_indexers(fields: Fields, count: int, kept: Sequence[int]) -> Fields:
    """Checks the indexers of HY-V4 and GLM-MoE-DSA. A "shared" indexer uses the choice of the last "full"
    indexer, whose layer must remain."""
    types = fields.get("indexer_types") or []
    for layer in kept:
        source = max((i for i in range(layer + 1) if types[i : i + 1] == ["full"]), default=layer)
        if source not in kept:
            raise LayerPruneError(f"layer {layer} shares the indexer of layer {source}, which would be gone.")
    return {}


def _linear_first(fields: Fields, count: int, kept: Sequence[int]) -> Fields:
    """Checks the first layer of MiniMax. The cache counts tokens in layer 0, which must not have linear
    attention."""
    types = fields.get("layer_types")
    if fields["model_type"] == "minimax" and types and types[kept[0]] != types[0] == "full_attention":
        raise LayerPruneError("the first layer left has linear attention, which cannot count cached tokens.")
    return {}


def _rescaled_weights(fields: Fields, count: int, kept: Sequence[int]) -> Fields:
    """Checks rescale_every of RWKV. In its first eval pass, RWKV divides weights in place by powers of two
    that depend on depth."""
    if fields["model_type"] == "rwkv" and fields.get("rescale_every"):
        raise LayerPruneError("its weights are rescaled by depth as it runs: load it with rescale_every=0.")
    return {}


SPECIAL: tuple[Callable[[Fields, int, Sequence[int]], Fields], ...] = (
    _sparse_steps,
    _repeated_block_types,
    _attention_types,
    _depth_scale,
    _shared_indexers,
    _linear_first,
    _rescaled_weights,
)


# Matches the parts of a name pattern that stand for any layer index.
_ANY_LAYER = re.compile(r"\*|\.[*+]|\\d[*+]|\[0-9\][*+]|\[\^\.\][*+]")


def cut_names(value: Any, stack: str, others: Collection[str], kept: Sequence[int]) -> Any:
    """Returns a config entry, such as `llm_int8_skip_modules`, with the module names after a removal. Names
    of removed layers are dropped.

    Args:
        value: lists of names and dicts by name, nested to any depth. Other values stay the same.
        stack (`str`): the path of the list of layers, for example `"model.layers"`.
        others (collection of `str`): paths of other lists with the same last name. Their modules keep their
            names.
        kept (sequence of `int`): the present indices of the layers that stay.

    Raises:
        LayerPruneError: a name pattern cannot be updated for the removal.
    """

    def follow(name: Any) -> Any:
        return cut_name(name, stack, others, kept) if isinstance(name, str) else inside(name)

    def inside(value: Any) -> Any:
        return cut_names(value, stack, others, kept)

    if isinstance(value, dict):
        return {follow(k): inside(v) for k, v in value.items() if follow(k) is not None}
    if type(value) in (list, tuple, set):
        return type(value)(new for old, new in ((old, follow(old)) for old in value) if new is not None)
    return value


def cut_name(name: str, stack: str, others: Collection[str], kept: Sequence[int]) -> str | None:
    """Returns the name of a module, or a name pattern, after a removal. It is None if the layer was removed.

    Raises:
        LayerPruneError: the pattern cannot be updated for the removal.
    """
    last = stack.rpartition(".")[2]
    parts, end, gone = [], 0, False
    for match in re.finditer(rf"(?<!\w){re.escape(last)}\\?\.", name):
        rest = name[match.end() :]
        layer = re.match(r"\d+", rest)
        if _is_of_another(name[: match.end()].rstrip("\\."), stack, others) or _ANY_LAYER.match(rest):
            continue
        after = rest[layer.end() :] if layer else rest
        if not re.match(r"\\?\.|[)|$]|$", after) if layer else re.match(r"[(\[\\]", rest):
            raise LayerPruneError(
                f"the config names modules by the pattern {name!r}, which cannot follow a removal. Name each "
                "layer by itself."
            )
        if layer:
            gone |= int(layer[0]) not in kept
            new = str(kept.index(int(layer[0]))) if int(layer[0]) in kept else ""
            parts += [name[end : match.end()], new]
            end = match.end() + layer.end()
    if gone and "|" in name:
        raise LayerPruneError(
            f"the config names modules by the pattern {name!r}, of which a part would be gone. Name each "
            "layer by itself."
        )
    return None if gone else "".join([*parts, name[end:]])


def _is_of_another(path: str, stack: str, others: Collection[str]) -> bool:
    """Returns whether a path, whose beginning may be missing, is one of `others` and not `stack`."""

    def fits(whole: str) -> bool:
        return f".{whole}".endswith(f".{path}") or f".{path}".endswith(f".{whole}")

    return not fits(stack) and any(fits(other) for other in others)
