"""Updates, merges and saves PEFT adapters on a model whose layers are removed."""

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel

from ..errors import LayerPruneError
from ..files import whole_file
from .decoder import predicts_next_token
from .fresh_model import build_meta_model, quiet
from .lineage import get_lineage, lineage_entry


logger = logging.getLogger(__name__)

# Fields of a PeftConfig that hold module names: lists, or dicts by name. A name may include a layer index.
NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
PATTERNS = ("rank_pattern", "alpha_pattern")
PRUNED_BASE = "pruned_base.json"  # file beside adapters: the base model and its kept layers


def base_of(model: Any) -> PreTrainedModel:
    """Returns the transformers model inside a `PeftModel`, with its adapters. Other models are returned
    unchanged.

    Raises:
        LayerPruneError: adapters were added to a transformers model directly, without a `PeftModel`, or they
            are in a `PeftMixedModel`.
    """
    if isinstance(model, PreTrainedModel):
        # Private, as the public `active_adapters` needs PEFT and raises an error if there is no adapter, and
        # `peft_config` is also set on the model inside a PeftModel.
        if getattr(model, "_hf_peft_config_loaded", False):
            raise LayerPruneError(
                "This model got its adapters by `add_adapter` or by loading: make it with "
                "`peft.get_peft_model` or `PeftModel.from_pretrained`, or merge them first."
            )
        return model
    if not hasattr(model, "peft_config"):
        return model
    if not hasattr(model, "get_base_model"):
        raise LayerPruneError(
            f"{type(model).__name__} mixes adapters of several types and cannot be saved or merged as one. "
            "Use a PeftModel, as peft.get_peft_model makes."
        )
    return model.get_base_model()


def adapter_configs(model: Any) -> dict[str, Any]:
    """Returns the `PeftConfig` of each adapter of a `PeftModel`, an empty dict for any other model."""
    return {} if isinstance(model, PreTrainedModel) else dict(getattr(model, "peft_config", {}))


def cut_adapter(config: Any, stack: str, kept: Sequence[int]) -> dict[str, Any]:
    """Returns the fields of a `PeftConfig` that change when layers are removed.

    Args:
        config (`PeftConfig`): the config of one adapter. It is not changed.
        stack (`str`): the name of the list of layers in its parent, for example `"layers"`.
        kept (sequence of `int`): the present indices of the layers that stay.

    Raises:
        LayerPruneError: a field cannot be updated for the removal, or no adapted layer would remain.
    """
    if config.is_prompt_learning or getattr(config, "layer_replication", None):
        what = "layer_replication" if not config.is_prompt_learning else str(config.peft_type.value)
        raise LayerPruneError(
            f"the adapter ({what}) is made for the number of layers: merge or drop it first."
        )

    def follow(name: str) -> str | None:
        """Returns the name after the removal, None if its layer was removed."""
        # A name contains "layers.3.", perhaps with escaped dots, or begins with "3.", as PEFT shortens names.
        match = re.search(rf"(?:(?:^|\.){re.escape(stack)}\\?\.|^)(\d+)(?=\\?\.|$)", name)
        if match is None:
            return name
        layer = int(match[1])
        return f"{name[: match.start(1)]}{kept.index(layer)}{name[match.end(1) :]}" if layer in kept else None

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
    """Returns the differences of a live `PeftModel` from a model built from the configs of base and adapters.

    Raises:
        LayerPruneError: adapters of this type cannot be built without weights.
    """
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
                config.init_lora_weights = False  # some methods compute initial weights from the base weights
            try:
                if fresh is None:
                    fresh = type(model)(build_meta_model(model.get_base_model()), config, adapter_name=name)
                else:
                    fresh.add_adapter(name, config)
            except RuntimeError as error:  # the method needs the values of weights
                raise LayerPruneError(
                    f"PEFT cannot build {config.peft_type.value} adapters without weights, as is needed to "
                    "check them after a removal: use another type, such as LORA, or merge them first."
                ) from error
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


def check_adapter_type(config: Any) -> None:
    """Checks that a `PeftConfig` puts adapters on modules of the model.

    Raises:
        LayerPruneError: the config is for prompt learning or for adaption prompts.
    """
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        raise LayerPruneError(
            f"The adapters are {config.peft_type.value} (prompt learning): virtual tokens do not match the "
            "teacher's positions and cannot be merged. Adapters on the model's modules are supported. Use "
            "LoraConfig or another PEFT method that has target_modules."
        )


def starts_from_weights(model: Any) -> bool:
    """Returns whether adapters of a `PeftModel` were initialised from the base weights and changed them, as
    in PiSSA and OLoRA. Such adapters belong to the unchanged base."""
    inits = [getattr(config, "init_lora_weights", None) for config in adapter_configs(model).values()]
    return any(
        str(init).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")) for init in inits
    )


def unsaved_parameters(model: Any) -> list[str]:
    """Returns the names of the trained parameters of a `PeftModel` that PEFT does not save."""
    from peft import get_peft_model_state_dict

    saved = {
        tensor.data_ptr()
        for name in model.peft_config
        for tensor in get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        ).values()
    }
    return [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]


def merged_copy(model: Any) -> PreTrainedModel:
    """Returns a copy of a `PeftModel` with its adapters merged into the weights.

    The copy is on the CPU, so that a GPU holds the model only once. The copy of a quantised model is on the
    device of the model. A GPU merges the modules one by one. If a model ties LM head and embeddings and
    adapters change one of them, the copy is untied in its weights and its config.

    Raises:
        LayerPruneError: adapters of this type cannot be merged.
    """
    device = base_of(model).device
    is_quantised = getattr(base_of(model), "hf_quantizer", None) is not None
    copied = _copy(model) if is_quantised else _copy(model, _cpu_tensors(model))
    try:
        return merge_adapters(copied, None if is_quantised or device.type == "cpu" else device)
    except LayerPruneError as error:
        raise LayerPruneError(f"{error} Set export='adapter', or use save_adapter.") from error


def merge_adapters(model: Any, device: torch.device | None = None) -> PreTrainedModel:
    """Merges the adapters of a `PeftModel` into its weights in place, and returns the model without adapters.

    Tied weights are untied if the adapters make them differ, see [`merged_copy`].

    Args:
        model (`PeftModel`): the model.
        device (`torch.device`, *optional*): the device that merges the layers one by one. Each layer is then
            moved back. Default: the layers are merged on their own device.

    Raises:
        LayerPruneError: adapters of this type cannot be merged.
    """
    base = model.get_base_model()
    tied = getattr(base.config, "tie_word_embeddings", None)
    _untie(base)
    try:
        with warnings.catch_warnings():  # about ties, which are handled below
            warnings.filterwarnings("ignore", message=".*tie")
            if device is not None:
                merge_one_by_one(model, device)
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            merged = model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise LayerPruneError(f"These adapters cannot be merged into the model: {reason}") from error
    if tied is not None:
        merged.config.tie_word_embeddings = tied
    pairs = merged.get_expanded_tied_weights_keys(all_submodels=True)
    if all(torch.equal(merged.get_parameter(a), merged.get_parameter(b)) for a, b in pairs.items()):
        merged.tie_weights()
    else:
        logger.warning(
            "The adapters made the LM head and the embeddings differ, so the saved model does not tie them."
        )
        merged.config.tie_word_embeddings = False
        merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)
    return merged


def merge_one_by_one(model: Any, device: torch.device) -> None:
    """Merges the LoRA of each linear layer of a `PeftModel` on `device`, one layer at a time, and moves it
    back. A CPU takes a second for a large layer. `merge_and_unload` merges the other modules."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if type(module) is Linear:
            place = module.weight.device
            module.to(device).merge()
            module.to(place)


def bare_copy(model: Any) -> PreTrainedModel:
    """Returns a copy of the model inside a `PeftModel`, without its adapters. The copy shares the weights,
    unless loading adapters onto it may change them."""
    configs = adapter_configs(model).values()
    is_frozen = all(config.peft_type == "LORA" and config.bias == "none" for config in configs)
    if not is_frozen or starts_from_weights(model):
        return _copy(model).unload()
    return _copy(model, {id(p): nn.Parameter(p.detach(), False) for p in model.parameters()}).unload()


def _copy(model: Any, tensors: dict[int, torch.Tensor] | None = None) -> Any:
    """Returns a copy of a model that uses the given tensors instead of its own. The keys are the `id` of the
    replaced tensors."""
    computed = {id(tensor): tensor.detach() for tensor in _computed_tensors(model)}
    return copy.deepcopy(model, computed | (tensors or {}))


def _cpu_tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Returns copies on the CPU of the parameters and buffers of a model, by the `id` of the original."""
    copies: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        value = parameter.detach().to("cpu", copy=True)
        copies[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return copies


def _computed_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Returns the tensors in modules that autograd has computed, which deepcopy refuses."""

    def within(value: Any) -> Iterator[torch.Tensor]:
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, dict):
            for entry in value.values():
                yield from within(entry)

    return [tensor for m in model.modules() for tensor in within(vars(m)) if not tensor.is_leaf]


def _untie(model: nn.Module) -> None:
    """Gives each module its own copy of shared parameters."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(id(parameter))


def base_name(model: Any) -> str:
    """Returns the folder or hub id of the base model of a `PeftModel`, or "" if it is unknown."""
    named = next(iter(adapter_configs(model).values())).base_model_name_or_path
    return named or base_of(model).config.name_or_path or ""


def write_pruned_base(model: Any, folder: Path) -> None:
    """Writes [`PRUNED_BASE`] into `folder`: the base model of a `PeftModel` and its kept layers."""
    base = base_of(model)
    record = {"base_model": base_name(model), **lineage_entry(get_lineage(base))}
    record["class"] = type(base).__name__
    if not predicts_next_token(base):  # the stored base may lack this head
        record["num_labels"] = base.config.num_labels
    with whole_file(folder / PRUNED_BASE) as file:
        file.write(f"{json.dumps(record, indent=1)}\n".encode())


def keep_base_known(model: Any) -> None:
    """Makes every `save_pretrained` of a `PeftModel` also write [`PRUNED_BASE`], and a card that names
    [`load_pruned_adapter`]. Plain PEFT would put the adapters on the wrong layers of the whole base.

    Both methods are set on this object, like accelerate's `forward`, so that a copy of the model has them.
    """
    vars(model).setdefault("save_pretrained", MethodType(save_with_base, model))
    vars(model).setdefault("create_or_update_model_card", MethodType(_write_adapter_card, model))


def save_with_base(model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """See `PeftModel.save_pretrained`. Writes [`PRUNED_BASE`] beside each adapter."""
    type(model).save_pretrained(model, str(save_directory), *args, **kwargs)
    for name in model.peft_config if kwargs.get("is_main_process", True) else ():
        folder = adapter_folder(save_directory, name)
        if (folder / "adapter_config.json").is_file():
            write_pruned_base(model, folder)


def adapter_folder(folder: str | Path, name: str) -> Path:
    """Returns the folder of the adapter with this name when PEFT saves all adapters in `folder`."""
    return Path(folder) / ("" if name == "default" else name)


def _write_adapter_card(model: Any, output_dir: str | Path) -> None:
    """See `PeftModel.create_or_update_model_card`. Completes the card in a folder, or writes a short one."""
    path, name = Path(output_dir) / "README.md", base_name(model)
    text = files(__package__).joinpath("adapter_card.md").read_text(encoding="utf-8")
    source = Path(output_dir).resolve().name
    card = ModelCard.from_template(ModelCardData(), template_str=text, source=source)
    loading = card.text.strip()
    card.text = f"\n# {source}\n\n{loading}\n"
    if path.is_file():
        card = ModelCard.load(path)
        if "load_pruned_adapter" not in card.text:  # trl's quick start loads the adapters with plain PEFT
            kept = re.sub(r"## Quick start\n.*?(?=\n## |\Z)", "", card.text, flags=re.DOTALL).rstrip()
            card.text = f"{kept}\n\n{loading}\n"
    card.data.library_name = "peft"
    card.data.tags = sorted({"hf_layerprune", "layer-pruning", *(card.data.tags or [])})
    if is_hub_id(name):
        card.data.base_model, card.data.base_model_relation = name, "adapter"
    card.save(path)


def is_hub_id(name: str) -> bool:
    """Returns whether a model's name is a hub id, and not a local folder."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()
