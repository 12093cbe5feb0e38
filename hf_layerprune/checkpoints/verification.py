"""Loads saved models and adapters again, and compares them with the live model.

The weights are compared one by one. The reloaded model then uses the live weights, so that its logits can be
compared without a second copy of the weights on the device.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import LayerPruneError, one_line
from ..forward.hooks import undisturbed
from ..surgery.decoder import is_sharded
from ..surgery.peft import (
    adapter_configs,
    adapter_folder,
    bare_copy,
    base_name,
    base_of,
    save_with_base,
    starts_from_weights,
)
from .loading import load_class, load_pruned_adapter, runs_own_code
from .sample_logits import difference_beyond_rounding, sample_logits


logger = logging.getLogger(__name__)

_ADVICE = (
    "The weights in memory are safe in {folder}, but the folder is no working model. Please report this with "
    "the model's config."
)


def load_again(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Returns the model in `folder`, loaded on the CPU with the class, dtype and attention of `model`.

    If the model was saved in this dtype, its weights are views of the files and take no memory.

    Raises:
        LayerPruneError: the model does not load, or its weights do not fit its config.
    """
    advice = _ADVICE.format(folder=folder)
    # transformers has no public name for the attention that a model uses.
    options = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    cls: Any = type(model)
    try:
        with undisturbed(model):  # building a model may draw random numbers
            again, report = cls.from_pretrained(str(folder), output_loading_info=True, **options)
    except Exception as error:
        raise LayerPruneError(f"The saved model does not load: {one_line(error)} {advice}") from error
    wrong = {what: sorted(map(str, names))[:3] for what, names in report.items() if names}
    if wrong:
        raise LayerPruneError(f"The saved weights do not fit the config: {wrong}. {advice}")
    again.config.name_or_path = model.config.name_or_path
    return again


def check_same_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype, live: Any = None) -> None:
    """Checks that the model in `folder` loads and equals `model`.

    Its weights must be the weights of `model`, rounded to `dtype`. With the exact weights, it must give the
    logits of `model` for a few tokens.

    Args:
        model (`PreTrainedModel`): the model that was saved.
        folder (`Path`): the folder of the saved model.
        dtype (`torch.dtype`): the dtype that it was saved in.
        live (`PeftModel`, *optional*): the model whose adapters were merged into `model`. Its logits are
            compared too.

    Raises:
        LayerPruneError: the saved model does not load, or differs.
    """
    again = load_again(model, folder)
    different = share_equal_weights(model, again, dtype)
    if different:
        raise LayerPruneError(
            f"The saved model differs from the model in memory: {different[0]} is not the weight in memory, "
            f"rounded to {dtype}. {len(different)} tensors differ. {_ADVICE.format(folder=folder)}"
        )
    compare_logits(model, again, folder)
    if live is not None:
        compare_logits(live, again, folder, merged=True)


def share_equal_weights(model: Any, again: Any, dtype: torch.dtype | None = None) -> list[str]:
    """Makes a reloaded model use the live weights that equal its own. Both models then take the memory of one
    model.

    The weights are compared one by one, on the device of the live weight. Weights of a quantised model, or of
    a model on several devices, are not compared.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the live model.
        again (`PreTrainedModel` or `PeftModel`): the reloaded model, changed in place.
        dtype (`torch.dtype`, *optional*): the dtype that the model was saved in. Live weights are rounded to
            it before they are compared. Default: the live weights are not rounded.

    Returns:
        `list[str]`: the names of the tensors that differ.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if is_quantised(model) or len(devices) > 1:
        return []
    live, equal, different = model.state_dict(), {}, []
    for name, saved in again.state_dict().items():
        if name not in live:  # the loading report lists missing weights
            continue
        exact = live[name]
        if _equal(exact, saved, exact.dtype if dtype is None else dtype_in_file(model, name, exact, dtype)):
            equal[name] = exact
        else:
            different.append(name)
    again.load_state_dict(equal, strict=False, assign=True)
    return different


def _equal(live: torch.Tensor, saved: torch.Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a live tensor, saved in `dtype`, equals the loaded tensor. NaN equals NaN."""
    if live.device == saved.device and live.data_ptr() == saved.data_ptr():
        return live.shape == saved.shape and live.dtype == saved.dtype
    if live.shape != saved.shape:
        return False
    rounded, saved = live.to(dtype).to(saved.dtype), saved.to(live.device)
    if not saved.is_floating_point():
        return torch.equal(rounded, saved)
    if not torch.equal(rounded.isfinite(), live.isfinite()):  # the dtype has no room for a weight
        return False
    return torch.allclose(rounded, saved, rtol=0, atol=0, equal_nan=True)


def dtype_in_file(model: PreTrainedModel, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a tensor in the file of a model that is saved in `dtype`. Integers, and weights
    that transformers keeps in float32, keep their dtype."""
    # The rule by which `from_pretrained` keeps some modules in float32 has no public name.
    kept = any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in model._get_dtype_plan(dtype))
    return tensor.dtype if kept or not tensor.is_floating_point() else dtype


def check_reload(model: Any, folder: Path) -> None:
    """Checks that the model in `folder` loads, and gives the logits of `model` for a few tokens.

    Adapters in a checkpoint, or with a base without a name, are loaded onto a copy of the base in memory. A
    named base is loaded again if it is quantised, or if adding the adapters changed it.

    Raises:
        LayerPruneError: the model does not load, or its logits differ.
    """
    is_checkpoint = re.fullmatch(PREFIX_CHECKPOINT_DIR + r"-\d+", folder.name)
    if adapter_configs(model):
        active = list(model.active_adapters)
        if len(active) != 1:  # PEFT saves each adapter alone, but the model is the sum of all
            logger.warning(
                "%d adapters are active (%s). Each is saved in its own folder, so the model is not compared "
                "with what was saved in %s.",
                len(active),
                ", ".join(active),
                folder,
            )
            return
        folder = adapter_folder(folder, active[0])
    try:
        if not adapter_configs(model):
            check_same_model(model, folder, model.dtype)
            return
        if base_name(model) and (not is_checkpoint or starts_from_weights(model) or is_quantised(model)):
            again = load_with_base(model, folder)
        else:
            with undisturbed(model):
                again = load_pruned_adapter(str(folder), base_model=bare_copy(model))
    except torch.OutOfMemoryError:
        logger.warning("There is no memory to load and check the model saved in %s.", folder)
        clear_device_cache(garbage_collection=True)
        return
    check_same_adapters(model, again, folder)


def check_same_adapters(model: Any, again: Any, folder: Path) -> None:
    """Checks that reloaded adapters are those of `model`, and on their base give its logits for a few tokens.

    Base weights may differ in the last digits, for example if PiSSA computes them again.

    Raises:
        LayerPruneError: the logits differ.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    different = sorted(trained.intersection(share_equal_weights(model, again)))
    if different:
        raise LayerPruneError(
            f"The saved adapters differ from those in memory: {different[0]} is another tensor, as are "
            f"{len(different) - 1} more. {_ADVICE.format(folder=folder)}"
        )
    compare_logits(model, again, folder)


def is_quantised(model: Any) -> bool:
    """Returns whether the base is quantised. A copy of quantised weights in memory would not run."""
    return getattr(base_of(model), "hf_quantizer", None) is not None


def load_with_base(model: Any, folder: Path) -> Any:
    """Returns the adapters in `folder`, loaded onto the base that they name. The dtype is that of `model`."""
    base = base_of(model)
    quantised = getattr(base.config, "quantization_config", None)
    options: dict[str, Any] = {}
    if quantised and not _is_stored_quantised(model):
        options["quantization_config"] = quantised
    with undisturbed(model):
        return load_pruned_adapter(str(folder), dtype=base.dtype, **options)


def _is_stored_quantised(model: Any) -> bool:
    """Returns whether the base is stored with quantised weights, and not quantised when it is loaded."""
    config, _ = load_class(base_name(model), runs_own_code(base_of(model)))
    return getattr(config, "quantization_config", None) is not None


def check_saves(model: Any) -> None:
    """Makes a Trainer's `save_pretrained` of `model` reload and compare the saved model.

    The check is a method of this object, like accelerate's `forward`, so that copies of the model have it.
    """
    vars(model)["save_pretrained"] = MethodType(_save_and_check, model)


@contextmanager
def unchecked(model: Any) -> Iterator[None]:
    """Switches off [`check_saves`] within this context, for callers that check the model themselves or must
    not check it."""
    method = vars(model).get("save_pretrained")
    ours = getattr(method, "__func__", None) is _save_and_check
    if ours:
        del vars(model)["save_pretrained"]
    try:
        yield
    finally:
        if ours:
            vars(model)["save_pretrained"] = method


def _save_and_check(model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """See `PreTrainedModel.save_pretrained`."""
    save = save_with_base if adapter_configs(model) else type(model).save_pretrained
    save(model, save_directory, *args, **kwargs)
    by_trainer = not args and kwargs.keys() <= {"state_dict", "is_main_process"}
    writes = kwargs.get("is_main_process", True)
    if by_trainer and writes and not is_sharded(model):  # a sharded model needs all processes to run
        check_reload(model, Path(save_directory))


def compare_logits(model: Any, again: Any, folder: Path, merged: bool = False) -> None:
    """Checks that a reloaded model gives the logits of the live model for a few tokens.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the live model.
        again (`PreTrainedModel` or `PeftModel`): the reloaded model. It is moved to the device of the live
            model. Weights that both models share are already there.
        folder (`Path`): the folder of the saved model.
        merged (`bool`, *optional*, defaults to `False`): whether the adapters of the live model are merged
            into the reloaded model. The reloaded model is then not moved, as a GPU may have no room for it.

    Raises:
        LayerPruneError: the logits differ.
    """
    base = base_of(model)
    there = dict(base_of(again).named_buffers())
    for name, buffer in base.named_buffers():
        if name in there:  # `.to(torch.bfloat16)` rounds rotary tables, loading does not
            there[name].data = there[name].to(buffer.dtype)
    try:
        with undisturbed(model):
            # accelerate wraps `forward` in autocast and keeps the plain method under this private name. Its
            # public unwrapping changes the model, which is still in training here.
            live = sample_logits(model, getattr(model, "_original_forward", None))
            saved = sample_logits(again.eval() if merged else again.eval().to(base.device))
    except torch.OutOfMemoryError:
        logger.warning("The model in %s loads. There is no memory to compare its logits.", folder)
        clear_device_cache(garbage_collection=True)
        return
    except Exception as error:
        raise LayerPruneError(
            f"The saved model cannot be compared, as it reads more than tokens: {one_line(error)} "
            f"To save it without the comparison, set verify=False. {_ADVICE.format(folder=folder)}"
        ) from error
    distance = difference_beyond_rounding(live, saved, model, merged)
    if distance is not None:
        raise LayerPruneError(
            f"The saved model differs from the model in memory: its logits are off by {distance:.2g} "
            "standard deviations. A model that was cast, as by .bfloat16(), may differ: load it with dtype= "
            f"instead. {_ADVICE.format(folder=folder)}"
        )
