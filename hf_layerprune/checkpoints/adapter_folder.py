"""Loads PEFT adapters from a folder, finds their base model, and merges them into it."""

import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..errors import LayerPruneError, one_line
from ..forward.hooks import undisturbed
from ..surgery.peft import check_adapter_type, merge_adapters
from .sample_logits import difference_beyond_rounding, sample_logits


# Initialisations that compute adapters from the base weights and change these weights. Loading the adapters
# does not repeat the change, as it depends on data or on chance.
NOT_REPEATED = ("pissa_niter", "corda", "loftq", "lora_ga")


def adapter_base(name: str) -> str | None:
    """Returns the name of the base model in the config of adapters, None if `name` is a model.

    Args:
        name (`str`): folder or hub id of the adapters or the model.

    Raises:
        LayerPruneError: the adapters name no base model, or cannot be merged into it.
    """
    config = _adapter_config(name)
    if config is None:
        return None
    check_adapter_type(config)
    init = str(getattr(config, "init_lora_weights", None)).lower()
    if init.startswith(NOT_REPEATED):
        raise LayerPruneError(
            f"The adapters in {name} were made with init_lora_weights={init!r}, which changes the weights of "
            "the base model in a way that loading does not repeat. Merge them where they were trained "
            "(merge_and_unload), save that model, and give its folder."
        )
    base = config.base_model_name_or_path
    if not base or (Path(base).is_dir() and Path(name).is_dir() and Path(base).samefile(name)):
        raise LayerPruneError(
            f"{name} holds adapters of PEFT and no model, and base_model_name_or_path in "
            f"{ADAPTER_CONFIG_NAME} is {base!r}. Set it to the folder or hub id of the base model."
        )
    return str(base)


def _adapter_config(name: str) -> Any:
    """Returns the `PeftConfig` of the adapters in `name`, None if there are no adapters.

    Raises:
        LayerPruneError: the config cannot be read.
    """
    if Path(name).exists() and not (Path(name) / ADAPTER_CONFIG_NAME).is_file():
        return None
    try:
        cached_file(name, ADAPTER_CONFIG_NAME)
    except OSError:
        return None
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(name)
    except Exception as error:  # a damaged file can raise any error
        raise LayerPruneError(
            f"{ADAPTER_CONFIG_NAME} in {name} cannot be read: {one_line(error)} Save the adapters again."
        ) from error


def load_adapter(base: PreTrainedModel, name: str) -> Any:
    """Returns a `PeftModel` of the adapters in `name` on their base model, in eval mode.

    Raises:
        LayerPruneError: the adapters do not fit the base model.
    """
    from peft import (
        PeftModel,
        get_peft_model_state_dict,
        load_peft_weights,
        set_peft_model_state_dict,
    )

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie")  # merge_adapters handles ties
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            model = PeftModel.from_pretrained(base, name)
        # PEFT silently drops tensors that have no place in the model, such as the head of a classifier.
        tensors = load_peft_weights(name, device="cpu")
        report: Any = set_peft_model_state_dict(model, tensors)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LayerPruneError(
            f"Cannot load the adapters in {name} into a {type(base).__name__}: {one_line(error)}"
        ) from error
    if report.unexpected_keys:
        raise LayerPruneError(
            f"Cannot load the adapters in {name} into a {type(base).__name__}: it has no place for "
            f"{sorted(report.unexpected_keys)[0]}. Give the base model that they were trained on."
        )
    # Layers without tensors would keep adapters that do nothing.
    missing = set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(tensors)
    if missing:
        raise LayerPruneError(
            f"The adapters in {name} have no tensor for {sorted(missing)[0]} of the {type(base).__name__}. "
            "Give the base model that they were trained on, or save them again."
        )
    return model.eval()


def merge_exactly(model: Any, name: str) -> PreTrainedModel:
    """Merges the adapters of a `PeftModel` into its weights in place, and checks the logits of the result.

    Args:
        model (`PeftModel`): the base model with its adapters, in eval mode.
        name (`str`): folder or hub id of the adapters, for errors.

    Raises:
        LayerPruneError: the adapters cannot be merged, or the logits of the merged model differ.
    """
    with undisturbed(model):
        before = sample_logits(model)
    try:
        merged = merge_adapters(model)
    except LayerPruneError as error:
        raise LayerPruneError(f"{name}: {error}") from error
    with undisturbed(merged):
        distance = difference_beyond_rounding(before, sample_logits(merged), merged, merged=True)
    if distance is not None:
        raise LayerPruneError(
            f"The adapters in {name} cannot be merged exactly: the logits of the merged model are off by "
            f"{distance:.2g} of their standard deviation. Give a model without adapters."
        )
    return merged.requires_grad_(True)  # PEFT froze the base model
