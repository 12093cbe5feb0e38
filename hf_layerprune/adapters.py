"""Adapters of PEFT on a model whose layers go: what of their configs speaks of layers."""

import copy
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .blueprint import build_blueprint, quiet
from .errors import LayerPruneError


# Fields of a PeftConfig that name modules, each a list or a dict by name, where a name may hold a layer.
NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
PATTERNS = ("rank_pattern", "alpha_pattern")


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, its adapters in it; any other model as it is.

    Raises:
        LayerPruneError: adapters were put into a transformers model directly, so that nothing holds them.
    """
    if isinstance(model, PreTrainedModel):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise LayerPruneError(
                "This model got its adapters by `add_adapter` or by loading: make it with "
                "`peft.get_peft_model` or `PeftModel.from_pretrained`, or merge them first."
            )
        return model
    return model.get_base_model() if hasattr(model, "peft_config") else model


def adapter_configs(model: Any) -> dict[str, Any]:
    """The `PeftConfig` of each adapter of a `PeftModel`; none of any other model."""
    return {} if isinstance(model, PreTrainedModel) else dict(getattr(model, "peft_config", {}))


def cut_adapter(config: Any, stack: str, kept: Sequence[int]) -> dict[str, Any]:
    """The fields of a `PeftConfig` that change when layers go.

    Args:
        config (`PeftConfig`): of one adapter. It is not changed.
        stack (`str`): the name of the list of layers in its parent, for example `"layers"`.
        kept (sequence of `int`): the present indices of the layers that stay.

    Raises:
        LayerPruneError: a field cannot follow, or no adapted layer would be left.
    """
    if config.is_prompt_learning or getattr(config, "layer_replication", None):
        what = "layer_replication" if not config.is_prompt_learning else str(config.peft_type.value)
        raise LayerPruneError(
            f"the adapter ({what}) is made for the number of layers: merge or drop it first."
        )

    def follow(name: str) -> str | None:
        """The name after the removal; None if its layer is gone."""
        # With "layers.3." in it, the dots perhaps escaped, or from "3." on, as PEFT shortens many names.
        found = re.search(rf"(?:(?:^|\.){re.escape(stack)}\\?\.|^)(\d+)(?=\\?\.|$)", name)
        if found is None:
            return name
        layer = int(found[1])
        return f"{name[: found.start(1)]}{kept.index(layer)}{name[found.end(1) :]}" if layer in kept else None

    changed: dict[str, Any] = {}
    layers = getattr(config, "layers_to_transform", None)
    if layers is not None and layers != []:
        named = [layers] if isinstance(layers, int) else layers
        changed["layers_to_transform"] = [kept.index(layer) for layer in named if layer in kept]
        if not changed["layers_to_transform"]:
            raise LayerPruneError(f"the adapter is only on layers {named}: none of them would be left.")
    for name in NAMES:
        value = getattr(config, name, None)
        if value and not isinstance(value, str):
            followed = [new for new in map(follow, value) if new is not None]
            if not followed and name.startswith("target"):
                raise LayerPruneError(f"nothing of the adapter's {name} would be left.")
            changed[name] = type(value)(followed) if followed else None
    for name in PATTERNS:
        value = getattr(config, name, None)
        if value:
            changed[name] = {follow(key): entry for key, entry in value.items() if follow(key) is not None}
    return changed


def adapter_differences(model: Any) -> list[str]:
    """How a live `PeftModel` differs from one built from its base's config and its adapters' configs."""
    fresh: Any = None
    with (
        torch.device("meta"),
        torch.random.fork_rng(devices=[]),
        quiet(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for name, config in model.peft_config.items():
            config = copy.deepcopy(config)
            if hasattr(config, "init_lora_weights"):
                config.init_lora_weights = False  # some ways compute them from the base's
            if fresh is None:
                fresh = type(model)(build_blueprint(model.get_base_model()), config, adapter_name=name)
            else:
                fresh.add_adapter(name, config)
    here, there = _adapter_facts(model), _adapter_facts(fresh)
    return [
        f"{name} is {here.get(name, 'absent')} here, {there.get(name, 'absent')} there"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]


def _adapter_facts(model: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        for name in ("r", "scaling"):
            value = getattr(module, name, None)
            if isinstance(value, dict) and value:
                facts[f"{path}.{name}"] = {k: round(float(v), 6) for k, v in value.items()}
    return facts
