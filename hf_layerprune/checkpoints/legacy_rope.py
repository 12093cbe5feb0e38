"""Converts rotary settings to the names that transformers 4 and converters read."""

import copy
from typing import Any

from transformers import PreTrainedConfig

from ..errors import LayerPruneError
from ..surgery.decoder import text_config
from ..surgery.fresh_model import quiet


# Kinds of scaling with the same fields in transformers 4 and 5.
SCALINGS = ("linear", "dynamic", "yarn", "llama3")


def legacy_rotary(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the transformers 4 fields for `rope_parameters`, an empty dict without rotary embeddings.

    Raises:
        LayerPruneError: transformers 4 has no such settings, or transformers 5 would read the old fields
            differently.
    """
    text = text_config(config)
    fields = text.to_dict()
    rope = fields.get("rope_parameters") or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)]
    if kinds:
        full = rope.get("full_attention") or kinds[0]
        sliding = rope.get("sliding_attention") or full
        old = _flat(full, text.model_type)
        if text.model_type == "gemma3_text":
            old["rope_local_base_freq"] = sliding["rope_theta"]
        elif any(kind != full and kind != _unscaled(full) for kind in kinds):  # Olmo 3 scales one kind
            raise LayerPruneError(
                f"{_NO} {text.model_type} has separate settings for each kind of attention."
            )
    elif "rope_theta" in rope:
        old = _flat(rope, text.model_type)
    else:
        return {}
    with quiet():
        again = type(text).from_dict(copy.deepcopy(fields | old)).to_dict()["rope_parameters"]
    if _plain(again) != _plain(rope):
        raise LayerPruneError(f"{_NO} With them, transformers 5 would read {again} instead of {rope}.")
    return old


_NO = "These rotary settings have no older form: leave legacy_rope out."


def _flat(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    theta, factor = "rope_theta", "partial_rotary_factor"
    if model_type.startswith("gpt_neox"):
        theta, factor = "rotary_emb_base", "rotary_pct"
    old = {theta: rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        old[factor] = rope["partial_rotary_factor"]
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return old
    if kind not in SCALINGS:
        raise LayerPruneError(f"{_NO} They scale by {kind!r}, not by one of {', '.join(SCALINGS)}.")
    rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    return old | {"rope_scaling": rest | {"type": kind}}  # some types read the oldest name of rope_type


def _unscaled(rope: dict[str, Any]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": rope["rope_theta"]}


def _plain(rope: Any) -> Any:
    if not isinstance(rope, dict):
        return rope
    return {name: _plain(value) for name, value in rope.items() if name != "type"}
