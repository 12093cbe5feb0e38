"""Finds the parts of a decoder layer: attention, feed-forward part, and their output projections."""

from typing import Any

from transformers import PreTrainedModel

from ..errors import LayerPruneError


FEED_FORWARD = ("mlp", "feed_forward", "ffn")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
OUTPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc_out", "fc2", "wo", "w2")
GATES = ("gate_proj", "gate_up_proj", "w1")


def part_of(module: Any, names: tuple[str, ...], model: PreTrainedModel) -> Any:
    """Returns the first submodule of `module` with one of these names.

    Raises:
        LayerPruneError: no submodule has one of these names.
    """
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise LayerPruneError(
        f"The {type(module).__name__} of this {model.config.model_type} model has no {', '.join(names)}. Use "
        "replacement='layer'."
    )
