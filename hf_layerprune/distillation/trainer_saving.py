"""Saves the trainer's checkpoints, its final model or adapters, and the model card."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.loading import last_checkpoint
from ..checkpoints.saving import cast_state, save_adapter, save_model, saving
from ..checkpoints.verification import check_reload
from ..errors import LayerPruneError, one_line
from ..reports.card import write_card
from ..reports.record import read_record, write_record
from ..surgery.decoder import is_sharded
from ..surgery.peft import adapter_configs, base_of
from .arguments import DistillationTrainingArguments


def is_checkpoint(folder: str | Path) -> bool:
    """Returns whether a folder has the name of a checkpoint."""
    return re.fullmatch(PREFIX_CHECKPOINT_DIR + r"-\d+", Path(folder).name) is not None


@contextmanager
def use_cache_restored(model: Any, use_cache: bool | None) -> Iterator[None]:
    """Restores the user's `use_cache` in the model's config within this context. The Trainer disables it."""
    config = base_of(model).config
    training, config.use_cache = config.use_cache, use_cache
    try:
        yield
    finally:
        config.use_cache = training


@contextmanager
def checked_saving(
    model: Any, folder: str, args: DistillationTrainingArguments
) -> Iterator[dict[str, Any] | None]:
    """Checks the model that the Trainer saves in `folder` within this context.

    If `verify_save` is set, the saved model is loaded again afterwards and compared with `model`. Yields the
    weights in `save_dtype`, or None if they need no cast.
    """
    verify = args.verify_save and args.should_save
    if is_sharded(model):  # a single process cannot run a sharded model to compare it
        yield None
    elif adapter_configs(model):
        yield None
        if verify:
            check_reload(model, Path(folder))
    else:
        legacy = args.legacy_rope and args.should_save
        dtype = args.save_dtype if args.should_save and not is_checkpoint(folder) else None
        with saving(model, folder, verify=verify, legacy_rope=legacy, dtype=dtype):
            yield cast_state(model, dtype)


def export_adapters(
    model: Any, folder: str, args: DistillationTrainingArguments, tokenizer: Any, hub_model_id: str | None
) -> None:
    """Saves a trained model with adapters. `args.export` chooses the merged model or the adapters alone."""
    if args.export == "adapter":
        save_adapter(model, folder, verify=args.verify_save)
        record = read_record(str(args.output_dir))
        if record is not None:
            write_record(record, folder)
            write_card(record.to_dict(), Path(folder), hub_model_id)
    else:  # merge in a copy, as the teacher reads the same weights
        save_model(
            model,
            folder,
            verify=args.verify_save,
            legacy_rope=args.legacy_rope,
            dtype=args.save_dtype,
        )
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def card_from_record(trainer: Any, *args: Any, **kwargs: Any) -> bool:
    """Writes the model card from the run record in the output folder. Returns whether a record exists.

    The arguments are the same as in [`~transformers.Trainer.create_model_card`].
    """
    record = read_record(str(trainer.args.output_dir))
    if record is not None and trainer.is_world_process_zero():
        folder = Path(str(trainer.args.output_dir))
        write_card(record.to_dict(), folder, trainer.hub_model_id, *args, **kwargs)
    return record is not None


def not_pushed(error: Exception, folder: Any) -> LayerPruneError:
    """Returns the error for a failed push. The model is already saved in `folder`."""
    return LayerPruneError(
        f"Not pushed: {one_line(error)} The model is saved in {folder}: push it later, with "
        f"`hf upload REPOSITORY {folder} --exclude 'checkpoint-*'`."
    )


@contextmanager
def checkpoint_errors(output_dir: str, step: int, writes: bool) -> Iterator[None]:
    """Handles errors while the Trainer writes the checkpoint of a step within this context.

    An earlier checkpoint in the same folder counts as incomplete until the new checkpoint is complete.

    Args:
        output_dir (`str`): the folder of the run.
        step (`int`): the optimizer step.
        writes (`bool`): whether this process writes.

    Raises:
        LayerPruneError: the checkpoint cannot be written.
    """
    if writes:
        (Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}" / TRAINER_STATE_NAME).unlink(missing_ok=True)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, LayerPruneError) as error:
        # Errors of this package tell where the weights are, so the full text is kept.
        reason = str(error) if isinstance(error, LayerPruneError) else one_line(error)
        raise LayerPruneError(
            f"The checkpoint of step {step} cannot be written: {reason} The last whole one: "
            f"{last_checkpoint(output_dir) or 'none'}. If there was no room, make some, and go "
            "on from there with resume_from_checkpoint=True."
        ) from error
