"""Saves models and adapters so that no failure loses their weights."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..errors import LayerPruneError, one_line
from ..files import whole_file
from ..forward.hooks import undisturbed
from ..surgery.fresh_model import quiet
from ..surgery.peft import (
    adapter_configs,
    base_name,
    base_of,
    keep_base_known,
    merged_copy,
    save_with_base,
)
from .legacy_rope import legacy_rotary
from .sample_logits import runs_flash_attention
from .verification import (
    check_same_adapters,
    check_same_model,
    dtype_in_file,
    load_with_base,
    unchecked,
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
        model (`PreTrainedModel` or `PeftModel`): the model. Adapters are merged in a copy on the CPU, and
            stored in a new folder `adapter` until the model is saved. The check compares the reloaded model
            with `model`, adapters included.
        folder (`str` or `Path`): the folder to save in.
        verify (`bool`, *optional*, defaults to `True`): whether to load the saved model on the CPU, and
            compare its weights and the logits of a few tokens. A GPU holds the weights only once.
        legacy_rope (`bool`, *optional*, defaults to `False`): see [`saving`].
        dtype (`str` or `torch.dtype`, *optional*): see [`saving`].

    Raises:
        LayerPruneError: the model cannot be saved, or the reloaded model differs. The error names the folder
            of the weights.
    """
    if not adapter_configs(model):
        with saving(model, folder, verify=verify, legacy_rope=legacy_rope, dtype=dtype):
            _save_cast(model, folder, dtype)
        return
    with _adapters_kept(model, Path(folder)):
        merged: Any = merged_copy(model)
        if merged.device.type == "cpu" and runs_flash_attention(merged):  # which has no CPU kernel
            merged.set_attn_implementation("sdpa")
        with saving(merged, folder, verify=verify, legacy_rope=legacy_rope, dtype=dtype, live=model):
            _save_cast(merged, folder, dtype)


@contextmanager
def _adapters_kept(model: Any, folder: Path) -> Iterator[None]:
    """Stores the adapters in a new folder in `folder` within this context, so that no failure or kill loses
    them. On exit the new folder is deleted, unless the block failed.

    Raises:
        LayerPruneError: the block failed. The error names the folder of the adapters.
    """
    # A folder of this name may hold the adapters that training began with.
    names = chain(["adapter"], (f"adapter_{number}" for number in count(2)))
    kept = next(folder / name for name in names if not (folder / name).exists())
    where = f"The adapters are saved in {kept}."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about whole layers that it adds
            save_with_base(model, kept)
    except (OSError, safetensors.SafetensorError):
        where = "There is no room for the adapters either. They are only in memory."
    try:
        yield
    except (LayerPruneError, torch.OutOfMemoryError) as error:
        raise LayerPruneError(f"{one_line(error, 1000)} {where}") from error
    shutil.rmtree(kept, ignore_errors=True)


def check_merge(model: Any) -> None:
    """Checks, before training, that [`save_model`] can merge the adapters of a `PeftModel` in a copy.

    Raises:
        LayerPruneError: the adapters cannot be merged, or there is no memory for the copy.
    """
    try:
        with undisturbed(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT repeats its warnings when the adapters are merged
            merged_copy(model)
    except torch.OutOfMemoryError as error:
        raise LayerPruneError(
            "There is no memory for a copy of the model, in which export='merged' merges the adapters. Set "
            "export='adapter', and merge where there is more."
        ) from error


def save_adapter(
    model: Any, folder: str | Path, *, base_model: str | None = None, verify: bool = True
) -> None:
    """Saves the adapters of a `PeftModel` with a pruned base, and the information to rebuild the base.

    `pruned_base.json` names the base and its kept layers. [`load_pruned_adapter`] reads this file. Plain PEFT
    would put the adapters on the wrong layers of the whole base, without an error.

    Args:
        model (`PeftModel`): the model.
        folder (`str` or `Path`): the folder to save in.
        base_model (`str`, *optional*): folder or hub id of the base. Default: the folder or hub id that it
            was loaded from.
        verify (`bool`, *optional*, defaults to `True`): whether to load base and adapters, and compare the
            logits of a few tokens.

    Raises:
        LayerPruneError: `model` is not a `PeftModel` with one adapter, its base has no name, or the reloaded
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
    configs["default"].base_model_name_or_path = name  # for record, card and PEFT's config
    keep_base_known(model)
    save_with_base(model, folder)
    if verify:
        check_same_adapters(model, load_with_base(model, folder), folder)


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
    """Guards a block that saves `model` in `folder`. If the block fails, the weights are rescued, else the
    saved model is checked.

    Args:
        model (`PreTrainedModel`): the model that the block saves.
        folder (`str` or `Path`): the folder that the block saves in.
        verify (`bool`): whether to load the saved model, and compare its weights and the logits of a few
            tokens.
        legacy_rope (`bool`): whether to write the rotary settings into config.json also under their old names
            (`rope_theta`, `rope_scaling`), for transformers 4 and converters.
        dtype (`str` or `torch.dtype`, *optional*): dtype of the saved weights, see [`cast_state`]. Default:
            the dtype of `model`.
        live (`PeftModel`, *optional*): the model whose adapters were merged into `model`. Its logits are
            compared too.

    Raises:
        LayerPruneError: the model cannot be saved, or the saved model differs. The error names the folder of
            the weights.
    """
    folder = Path(folder)
    if adapter_configs(model):
        raise LayerPruneError("A PeftModel is not a plain model. Merge it first, or use save_adapter.")
    check_no_adapters_in(folder)
    old_names = legacy_rotary(model.config) if legacy_rope else {}
    try:
        check_writable(folder)
        with unchecked(model):
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
        check_same_model(model, folder, saved_dtype, live)


def _save_cast(model: PreTrainedModel, folder: str | Path, dtype: str | torch.dtype | None) -> None:
    state = cast_state(model, dtype)
    if state is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=state)


def cast_state(model: PreTrainedModel, dtype: str | torch.dtype | None) -> dict[str, torch.Tensor] | None:
    """Returns the state dict to save `model` with in `dtype`, or None if it has that dtype.

    Weights that transformers keeps in float32 when it loads this model in `dtype` are not cast.
    """
    saved_dtype = _saved_dtype(model, dtype)
    if saved_dtype == model.dtype:
        return None
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}  # tied weights stay one tensor
    state = {}
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr(), tensor.shape
        if place not in cast:
            # Cast on the CPU, as a GPU may have no room for the cast weights.
            cast[place] = tensor.to("cpu", dtype_in_file(model, name, tensor, saved_dtype))
        state[name] = cast[place]
    return state


def _saved_dtype(model: PreTrainedModel, dtype: str | torch.dtype | None) -> torch.dtype:
    """Returns the dtype that `model` is saved in. Quantised models keep their dtype."""
    if dtype is None or getattr(model, "hf_quantizer", None) is not None:
        return model.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def check_writable(folder: str | Path) -> None:
    """Creates `folder` if it does not exist, and checks that files can be written there.

    Raises:
        LayerPruneError: no file can be written there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise LayerPruneError(f"Cannot write to the output folder {folder}: {error}") from error


def check_no_adapters_in(folder: str | Path) -> None:
    """Checks that a plain model saved in `folder` is the one that is loaded from there.

    Raises:
        LayerPruneError: the folder holds adapters. transformers and this package would load these.
    """
    if (Path(folder) / ADAPTER_CONFIG_NAME).is_file():
        raise LayerPruneError(
            f"{folder} holds adapters ({ADAPTER_CONFIG_NAME}), which would be loaded instead of a plain "
            "model saved there. Choose another folder for the plain model, or delete the adapters."
        )


def check_configs(model: Any) -> None:
    """Checks, before training, that transformers can save `model`.

    transformers refuses to save some config values, and the weights of some quantised checkpoints.

    Raises:
        LayerPruneError: transformers cannot save the model.
    """
    base = base_of(model)
    try:
        if not adapter_configs(model):  # else only the adapters are saved
            revert_weight_conversion(base, {})
    except NotImplementedError as error:
        raise LayerPruneError(
            f"{base.name_or_path} holds quantised weights, which transformers loads but cannot save again. "
            "Give the model before quantisation, and quantise the pruned model. LoRA can be trained on "
            "quantised weights: `distill --lora_rank 16 --export adapter`."
        ) from error
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
    """Saves the bare weights in `folder`, or in the temporary folder if there is no room. Returns the path of
    the file, None if there is no room in either folder."""
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
