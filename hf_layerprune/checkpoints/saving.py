"""Saves models and adapters, and checks them by loading them again."""

import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import safetensors.torch
import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import LayerPruneError, one_line
from ..files import whole_file
from ..forward.hooks import compared_output, undisturbed
from ..surgery.decoder import is_sharded, text_config
from ..surgery.fresh_model import quiet
from ..surgery.peft import (
    adapter_configs,
    adapter_folder,
    bare_copy,
    base_name,
    base_of,
    keep_base_known,
    merged_copy,
    save_with_base,
    starts_from_weights,
)
from .legacy_rope import legacy_rotary
from .loading import load_pruned_adapter


logger = logging.getLogger(__name__)

_ADVICE = (
    "The weights in memory are safe in {folder}, but the folder is no working model. Please report this with "
    "the model's config."
)


def save_model(
    model: Any,
    folder: str | Path,
    *,
    verify: bool = True,
    legacy_rope: bool = False,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Saves `model` as a plain transformers model, and checks that the reloaded model is the same.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model. Adapters are merged in a copy. The check compares
            the reloaded model with `model`, adapters included.
        folder (`str` or `Path`): the folder to save in.
        verify (`bool`, *optional*, defaults to `True`): load the saved model, as a second one in memory, and
            compare the logits of a few tokens.
        legacy_rope (`bool`, *optional*, defaults to `False`): see [`saving`].
        dtype (`str` or `torch.dtype`, *optional*): see [`saving`].

    Raises:
        LayerPruneError: the model cannot be saved, or the reloaded one differs. The error says where the
            weights are.
    """
    if not adapter_configs(model):
        with saving(model, folder, verify=verify, legacy_rope=legacy_rope, dtype=dtype):
            _save_cast(model, folder, dtype)
        return
    try:
        merged: Any = merged_copy(model)
        if merged.device.type == "cpu" and _runs_flash_attention(merged):  # which has no CPU kernel
            merged.set_attn_implementation("sdpa")
        with saving(merged, folder, verify=verify, legacy_rope=legacy_rope, dtype=dtype, live=model):
            _save_cast(merged, folder, dtype)
    except (LayerPruneError, torch.OutOfMemoryError) as error:
        adapters = Path(folder) / "adapter"
        try:
            save_with_base(model, adapters)
            where = f"The adapters are saved in {adapters}."
        except (OSError, safetensors.SafetensorError):
            where = "There is no room for the adapters either. They are only in memory."
        raise LayerPruneError(f"{one_line(error, 1000)} {where}") from error


def check_merge(model: Any) -> None:
    """Checks, before training, that [`save_model`] can merge the adapters of a `PeftModel` in a copy.

    Raises:
        LayerPruneError: they cannot, or there is no memory for the copy.
    """
    try:
        with undisturbed(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT repeats them when the adapters are merged
            merged_copy(model)
    except torch.OutOfMemoryError as error:
        raise LayerPruneError(
            "There is no memory for a copy of the model, in which export='merged' merges the adapters. Set "
            "export='adapter', and merge where there is more."
        ) from error


def save_adapter(
    model: Any, folder: str | Path, *, base_model: str | None = None, verify: bool = True
) -> None:
    """Saves the adapters of a `PeftModel` with a pruned base, and how to rebuild that base.

    `pruned_base.json` names the base and its kept layers. [`load_pruned_adapter`] reads it. Plain PEFT would
    put the adapters on the wrong layers of the whole base, without an error.

    Args:
        model (`PeftModel`): the model.
        folder (`str` or `Path`): the folder to save in.
        base_model (`str`, *optional*): folder or hub id of the base. Default: where it was loaded from.
        verify (`bool`, *optional*, defaults to `True`): load base and adapters, and compare the logits of a
            few tokens.

    Raises:
        LayerPruneError: `model` is no `PeftModel` with one adapter, its base has no name, or the reloaded
            model differs.
    """
    folder, configs = Path(folder), adapter_configs(model)
    if not configs:
        raise LayerPruneError(f"A {type(model).__name__} has no adapters to save: use save_model.")
    if list(configs) != ["default"] or list(model.active_adapters) != ["default"]:
        raise LayerPruneError(f"One active adapter named 'default' is expected, there are {list(configs)}.")
    name = base_model or base_name(model)
    if not name:
        raise LayerPruneError("Cannot determine the base model. Pass base_model=.")
    configs["default"].base_model_name_or_path = name  # record, card and PEFT's config name it
    keep_base_known(model)
    save_with_base(model, folder)
    if verify:
        _check_same(model, _load_with_base(model, folder), folder)


@contextmanager
def saving(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    verify: bool,
    legacy_rope: bool,
    dtype: str | torch.dtype | None = None,
    live: Any = None,
) -> Iterator[None]:
    """Guards a block that saves `model` in `folder`: rescues the weights if it fails, else checks the result.

    Args:
        verify (`bool`): load the saved model and compare the logits of a few tokens.
        legacy_rope (`bool`): write the rotary settings into config.json under their old names as well
            (`rope_theta`, `rope_scaling`), for transformers 4 and converters.
        dtype (`str` or `torch.dtype`, *optional*): dtype of the saved weights, see [`cast_state`]. Default:
            that of `model`.
        live (`PeftModel`, *optional*): the model whose adapters were merged into `model`, compared as well.

    Raises:
        LayerPruneError: it cannot be saved, or the saved model differs. The error says where the weights are.
    """
    folder = Path(folder)
    if adapter_configs(model):
        raise LayerPruneError("A PeftModel is not a plain model. Merge it first, or use save_adapter.")
    old_names = legacy_rotary(model.config) if legacy_rope else {}
    try:
        check_writable(folder)
        with _unchecked(model):
            yield
    except Exception as error:
        rescue = _rescue(model, folder)
        where = f"All weights in memory are safe in {rescue}."
        if rescue is None:
            where = "There is no room for the bare weights either. They are only in memory: save them again."
        raise LayerPruneError(
            f"The model cannot be saved as a plain model in {folder}: {one_line(error)} {where}"
        ) from error
    if old_names:
        _add_fields(folder / "config.json", old_names)
    saved_dtype = _saved_dtype(model, dtype)
    if saved_dtype != model.dtype:
        _name_dtype(folder / "config.json", str(saved_dtype).removeprefix("torch."))
    if verify:
        again = load_again(model, folder)
        _put_back_precision(model, again, saved_dtype, folder)
        _check_same(model, again, folder)
        if live is not None:
            _check_same(live, again, folder, merged=True)


def _save_cast(model: PreTrainedModel, folder: str | Path, dtype: str | torch.dtype | None) -> None:
    state = cast_state(model, dtype)
    if state is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=state)


def cast_state(model: PreTrainedModel, dtype: str | torch.dtype | None) -> dict[str, torch.Tensor] | None:
    """Returns the state dict to save `model` with in `dtype`, or None if it has that dtype.

    Weights that transformers keeps in float32 when it loads this model in `dtype` stay as they are.
    """
    saved_dtype = _saved_dtype(model, dtype)
    if saved_dtype == model.dtype:
        return None
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}  # tied weights stay one tensor
    state = {}
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr(), tensor.shape
        if place not in cast:
            cast[place] = tensor.to(_dtype_of(model, name, tensor, saved_dtype))
        state[name] = cast[place]
    return state


def _saved_dtype(model: PreTrainedModel, dtype: str | torch.dtype | None) -> torch.dtype:
    """Returns the dtype that `model` is saved in. Quantised models keep their own."""
    if dtype is None or getattr(model, "hf_quantizer", None) is not None:
        return model.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _dtype_of(model: PreTrainedModel, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    # The rule by which `from_pretrained` keeps some modules in float32 has no public name.
    kept = any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in model._get_dtype_plan(dtype))
    return tensor.dtype if kept or not tensor.is_floating_point() else dtype


def _put_back_precision(
    model: PreTrainedModel, again: PreTrainedModel, dtype: torch.dtype, folder: Path
) -> None:
    """Checks that the weights of `again` are those of `model`, rounded to `dtype`, and undoes the rounding.

    The logits of both can then be compared exactly.
    """
    if dtype == model.dtype:
        return
    exact = model.state_dict()
    for name, tensor in again.state_dict().items():
        whole = exact[name].to(tensor.device)
        rounded = whole.to(_dtype_of(model, name, whole, dtype)).to(tensor.dtype)
        if not torch.allclose(tensor, rounded, rtol=0, atol=0, equal_nan=True):
            raise LayerPruneError(
                f"The saved model differs from the model in memory: {name} is not the weight in "
                f"memory, rounded to {dtype}. {_ADVICE.format(folder=folder)}"
            )
    again.load_state_dict(exact)


def check_writable(folder: str | Path) -> None:
    """Makes `folder` if there is none, and checks that files can be written there.

    Raises:
        LayerPruneError: they cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise LayerPruneError(f"Cannot write to the output folder {folder}: {error}") from error


def check_configs(model: Any) -> None:
    """Checks, before any long work, that transformers saves the configs of `model`. It refuses some values.

    Raises:
        LayerPruneError: it does not.
    """
    base = base_of(model)
    configs: dict[str, Any] = {"config": base.config}
    configs |= {"generation_config": base.generation_config} if base.can_generate() else {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        for name, config in configs.items():
            try:
                config.save_pretrained(folder)
            except Exception as error:  # any error here would also stop the first save
                raise LayerPruneError(
                    f"transformers refuses to save model.{name}: {one_line(error, 600)} Change model.{name} "
                    f"before training, or {name}.json in the folder of the model."
                ) from error


def _rescue(model: PreTrainedModel, folder: Path) -> Path | None:
    """Saves the bare weights in `folder`, or in the temporary folder if they do not fit. Returns the folder,
    None if they fit in neither."""
    for place in (folder, Path(tempfile.gettempdir()) / f"{folder.name}-{os.getpid()}"):
        rescue = place / "rescued.safetensors"
        try:
            place.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(model, str(rescue))
        except (OSError, safetensors.SafetensorError):  # no room there
            if rescue.is_file():
                rescue.unlink()
        else:
            return rescue
    return None


def check_reload(model: Any, folder: Path) -> None:
    """Checks that the model in `folder` loads, and gives the logits of `model` for a few tokens.

    Adapters in a checkpoint, or for a base without a name, are loaded on a copy of the base in memory, unless
    adding the adapters changed the base.

    Raises:
        LayerPruneError: it does not.
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
            again = load_again(model, folder)
        elif base_name(model) and (not is_checkpoint or starts_from_weights(model) or _is_quantised(model)):
            again = _load_with_base(model, folder)
        else:
            with undisturbed(model):
                again = load_pruned_adapter(str(folder), base_model=bare_copy(model))
    except torch.OutOfMemoryError:
        logger.warning("There is no memory to load and check the model saved in %s.", folder)
        clear_device_cache(garbage_collection=True)
        return
    _check_same(model, again, folder)


def _is_quantised(model: Any) -> bool:
    """Returns whether the base is quantised. A copy of its weights in memory would not run."""
    return getattr(base_of(model), "hf_quantizer", None) is not None


def _load_with_base(model: Any, folder: Path) -> Any:
    """Returns the adapters in `folder` on the base that they name, with the dtype of `model`'s base."""
    base = base_of(model)
    quantised = getattr(base.config, "quantization_config", None)
    options: dict[str, Any] = {"quantization_config": quantised} if quantised else {}
    with undisturbed(model):
        return load_pruned_adapter(str(folder), dtype=base.dtype, **options)


def check_saves(model: Any) -> None:
    """Makes a Trainer's `save_pretrained` of `model` reload and compare the saved model.

    The check is a method of this object, like accelerate's `forward`, so that copies of the model have it.
    """
    vars(model)["save_pretrained"] = MethodType(_save_and_check, model)


@contextmanager
def _unchecked(model: Any) -> Iterator[None]:
    """Switches off [`check_saves`] within this context: the caller checks the model or must not."""
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


def load_again(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Returns the model in `folder`, loaded with the class, dtype and attention of `model`.

    Raises:
        LayerPruneError: it does not load, or its weights do not fit its config.
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


def _check_same(model: Any, again: Any, folder: Path, merged: bool = False) -> None:
    base = base_of(model)
    text = text_config(base.config)
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)
    tokens = torch.arange(2 * length).view(2, length) % text.vocab_size
    there = dict(base_of(again).named_buffers())
    for name, buffer in base.named_buffers():
        if name in there:  # `.to(torch.bfloat16)` rounds rotary tables, which loading does not
            there[name].data = there[name].to(buffer.dtype)
    try:
        with undisturbed(model):
            # accelerate wraps `forward` in autocast and keeps the plain one under this private name. Its
            # public unwrapping changes the model, which is still in training here.
            live = _output(model, tokens, getattr(model, "_original_forward", None))
            # Merged weights are compared on their device: a GPU may have no room for them.
            saved = _output(again.eval() if merged else again.eval().to(base.device), tokens)
    except torch.OutOfMemoryError:
        logger.warning("The model in %s loads. There is no memory to compare its logits.", folder)
        clear_device_cache(garbage_collection=True)
        return
    except Exception as error:
        raise LayerPruneError(
            f"The saved model cannot be compared, as it reads more than tokens: {one_line(error)} "
            f"To save it without the comparison, set verify=False. {_ADVICE.format(folder=folder)}"
        ) from error
    distance, limit = _distance(live, saved), 1e-3 if base.dtype == torch.float32 else 0.05
    if merged and _is_exact(base):
        limit = 1e-2  # merging adapters rounds several times
    elif merged:
        distance, limit = _distance(live, saved, torch.median), 0.1
    if not distance <= limit:
        raise LayerPruneError(
            f"The saved model differs from the model in memory: its logits are off by {distance:.2g} "
            "standard deviations. A model that was cast, as by .bfloat16(), may differ: load it with dtype= "
            f"instead. {_ADVICE.format(folder=folder)}"
        )


def _output(model: Any, tokens: torch.Tensor, forward: Any = None) -> torch.Tensor:
    """Returns the output of a model for tokens, in float32 on the CPU."""
    base = base_of(model)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=_needs_autocast(base)):
        return compared_output(model, tokens.to(base.device), forward).float().cpu()


def _needs_autocast(base: PreTrainedModel) -> bool:
    """Returns whether a model runs only under autocast: FlashAttention needs 16-bit inputs."""
    return base.dtype == torch.float32 and _runs_flash_attention(base)


def _runs_flash_attention(base: PreTrainedModel) -> bool:
    """Returns whether a model uses FlashAttention."""
    # transformers has no public name for the attention that a model uses.
    return "flash" in str(text_config(base.config)._attn_implementation)


def _distance(live: torch.Tensor, saved: torch.Tensor, summary: Any = torch.max) -> float:
    """Returns the distance of logits in standard deviations. NaN and infinity equal themselves."""
    equal = (live == saved) | (live.isnan() & saved.isnan())
    apart = torch.where(equal, 0.0, (live - saved).abs())
    finite = live[live.isfinite()]
    scale = float(finite.std()) if len(finite) > 1 else 0.0
    return float(summary(apart)) / (scale or 1.0)


def _is_exact(base: PreTrainedModel) -> bool:
    """Returns whether merging adapters changes only the last digits of the logits.

    In bfloat16 it changes some logits by a standard deviation, as rounding of activations does, but the
    median by less than 0.05.
    """
    highest = torch.get_float32_matmul_precision() == "highest"
    is_float32 = base.dtype == torch.float32 and not _needs_autocast(base)
    return is_float32 and highest and getattr(base, "hf_quantizer", None) is None


def _name_dtype(path: Path, dtype: str) -> None:
    """Sets the dtype of the weights in the config.json at `path`."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *config.values()):
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = dtype
    _write_config(path, config)


def _add_fields(path: Path, fields: dict[str, Any]) -> None:
    """Adds fields to the text part of the config.json at `path`."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("text_config", config).update(fields)
    _write_config(path, config)


def _write_config(path: Path, config: dict[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(f"{json.dumps(config, indent=2)}\n".encode())
