"""Models and adapters into a folder, checked by loading them again."""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel

from .adapters import adapter_configs, base_of
from .checkpoint import PRUNED_BASE, load_pruned_adapter, one_line
from .decoder import text_config
from .errors import LayerPruneError
from .lineage import get_lineage, lineage_entry
from .losses import logit_spread
from .rotary import legacy_rotary
from .scoring import undisturbed


logger = logging.getLogger(__name__)

_ADVICE = (
    "The weights as they were in memory are safe in {folder}, but do not use them as they are. Please report "
    "this with the model's config."
)


def save_model(
    model: PreTrainedModel, folder: str | Path, *, verify: bool = True, legacy_rope: bool = False
) -> None:
    """Save `model` as a plain transformers model and check that it is the same when loaded again.

    Args:
        model (`PreTrainedModel`): the model.
        folder (`str` or `Path`): where to.
        verify (`bool`, *optional*, defaults to `True`): load it again, as a second model in memory, and
            compare the logits of a few tokens.
        legacy_rope (`bool`, *optional*, defaults to `False`): see [`saving`].

    Raises:
        LayerPruneError: it cannot be saved, or is another model when loaded. It says where the weights are.
    """
    with saving(model, folder, verify=verify, legacy_rope=legacy_rope):
        model.save_pretrained(folder)


def save_adapter(
    model: Any, folder: str | Path, *, base_model: str | None = None, verify: bool = True
) -> None:
    """Save only the adapters of a `PeftModel` whose base has lost layers, with what rebuilds that base: the
    base's name and its kept layers, in `pruned_base.json`. [`load_pruned_adapter`] reads it.

    Plain PEFT does not: it would put the adapters on the uncut base, on the wrong layers, without a word.

    Args:
        model (`PeftModel`): the model.
        folder (`str` or `Path`): where to.
        base_model (`str`, *optional*): folder or hub id of the base; left out, the one it was loaded from.
        verify (`bool`, *optional*, defaults to `True`): load all again, and compare the logits of a few
            tokens.

    Raises:
        LayerPruneError: it is no `PeftModel` with one adapter, its base has no name, or it is another model
            when loaded.
    """
    folder, configs = Path(folder), adapter_configs(model)
    if not configs:
        raise LayerPruneError(f"A {type(model).__name__} has no adapters to save: use save_model.")
    if list(configs) != ["default"] or list(model.active_adapters) != ["default"]:
        raise LayerPruneError(f"One active adapter named 'default' is expected, there are {list(configs)}.")
    base = base_of(model)
    name = base_model or next(iter(configs.values())).base_model_name_or_path or base.config._name_or_path
    if not name:
        raise LayerPruneError("Nobody knows where the base model is from: name it with base_model=.")
    model.save_pretrained(str(folder))
    write_pruned_base(model, folder, name)
    if verify:
        quantised = getattr(base.config, "quantization_config", None)
        options: dict[str, Any] = {"quantization_config": quantised} if quantised else {}
        _check_same(model, load_pruned_adapter(str(folder), dtype=base.dtype, **options), folder)


def write_pruned_base(model: Any, folder: Path, base_model: str | None = None) -> None:
    """Note in `folder` which layers of which model the adapters of a `PeftModel` are for."""
    base = base_of(model)
    record = {"base_model": base_model or base.config._name_or_path, **lineage_entry(get_lineage(base))}
    _write_whole(folder / PRUNED_BASE, json.dumps(record, indent=1) + "\n")


@contextmanager
def saving(model: PreTrainedModel, folder: str | Path, *, verify: bool, legacy_rope: bool) -> Iterator[None]:
    """The context in which something saves `model` in `folder`. If it fails, the weights are put there as
    bare tensors; if it works, what lies there is checked.

    Args:
        verify (`bool`): load the model again and compare the logits of a few tokens.
        legacy_rope (`bool`): write the rotary settings into config.json under their old names as well
            (`rope_theta`, `rope_scaling`), which transformers 4 and converters read.

    Raises:
        LayerPruneError: it cannot be saved, or is another model when loaded. It says where the weights are.
    """
    folder = Path(folder)
    if adapter_configs(model):
        raise LayerPruneError("A PeftModel is no plain model: merge it first, or use save_adapter.")
    old_names = legacy_rotary(model.config) if legacy_rope else {}
    try:
        check_writable(folder)
        yield
    except Exception as error:
        rescue = _rescue(model, folder)
        where = f"All its weights are safe, as they are in memory, in {rescue}."
        if rescue is None:
            where = "There is no room for its bare weights either: they are in memory alone. Save them again."
        raise LayerPruneError(
            f"The model cannot be saved as a plain model in {folder}: {one_line(error)} {where}"
        ) from error
    if old_names:
        _add_fields(folder / "config.json", old_names)
    if verify:
        check_reload(model, folder)


def check_writable(folder: str | Path) -> None:
    """Make `folder` if there is none, and check that files can be written there.

    Raises:
        LayerPruneError: they cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise LayerPruneError(f"Cannot write to the output folder {folder}: {error}") from error


def _rescue(model: PreTrainedModel, folder: Path) -> Path | None:
    """Put the bare weights into `folder`, or where the system keeps what is for a while, if they fit."""
    for place in (folder, Path(tempfile.gettempdir()) / f"{folder.name}-{os.getpid()}"):
        rescue = place / "rescued.safetensors"
        try:
            place.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(model, str(rescue))
        except (OSError, safetensors.SafetensorError):  # no room there either
            if rescue.is_file():
                rescue.unlink()
        else:
            return rescue
    return None


def check_reload(model: PreTrainedModel, folder: Path) -> None:
    """Check that what lies in `folder` loads, and gives `model`'s logits for a few tokens.

    Raises:
        LayerPruneError: it does not.
    """
    _check_same(model, load_again(model, folder), folder)


def load_again(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model in `folder`, loaded as `model` is.

    Raises:
        LayerPruneError: what lies there does not load, or its weights do not fit its config.
    """
    advice = _ADVICE.format(folder=folder)
    options = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    cls: Any = type(model)
    try:
        with undisturbed(model):  # building a model may draw random numbers
            again, report = cls.from_pretrained(str(folder), output_loading_info=True, **options)
    except Exception as error:
        raise LayerPruneError(f"What was saved does not load: {one_line(error)} {advice}") from error
    wrong = {what: sorted(map(str, names))[:3] for what, names in report.items() if names}
    if wrong:
        raise LayerPruneError(f"What was saved does not fit its config: {wrong}. {advice}")
    again.config._name_or_path = model.config._name_or_path
    return again


def _check_same(model: Any, again: Any, folder: Path) -> None:
    base = base_of(model)
    text = text_config(base.config)
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)
    tokens = torch.arange(2 * length, device=base.device).view(2, length) % text.vocab_size
    there = dict(base_of(again).named_buffers())
    for name, buffer in base.named_buffers():
        if name in there:  # `.to(torch.bfloat16)` rounds rotary tables, which loading does not
            there[name].data = there[name].to(buffer.dtype)
    try:
        with undisturbed(model):
            # Not through the precision context in which accelerate wraps a model in training.
            live = getattr(model, "_original_forward", model)(input_ids=tokens, use_cache=False).logits
            saved = again.eval().to(base.device)(input_ids=tokens, use_cache=False).logits
    except torch.OutOfMemoryError:
        logger.warning("What was saved in %s loads; there is no memory to compare its logits.", folder)
        clear_device_cache(garbage_collection=True)
        return
    except Exception as error:
        raise LayerPruneError(
            f"The model cannot be compared with what was saved, as it does not read tokens alone: "
            f"{one_line(error)} If that is right, save it without verify. {_ADVICE.format(folder=folder)}"
        ) from error
    live, saved = live.float(), saved.float()
    scale = logit_spread(live)
    tolerance = scale * (1e-3 if base.dtype == torch.float32 else 0.05)
    if not torch.allclose(live, saved, rtol=0, atol=tolerance, equal_nan=True):
        far = float((live - saved).abs().max()) / scale
        raise LayerPruneError(
            f"What was saved is another model when loaded: its logits are off by {far:.2g} of their standard "
            "deviation. (A model cast by hand, as with .bfloat16(), may be: load it with dtype= instead.) "
            f"{_ADVICE.format(folder=folder)}"
        )


def _add_fields(path: Path, fields: dict[str, Any]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("text_config", config).update(fields)
    _write_whole(path, json.dumps(config, indent=2) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
