"""Resuming from a checkpoint: which one, and its weights."""

from functools import reduce
from typing import Any

import torch

from ..checkpoints.loading import is_whole, last_checkpoint
from ..errors import LayerPruneError
from ..reports.record import checkpoint_of, read_record


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """Returns the checkpoint to resume from; None to start from the beginning.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*): a folder, or `True` for the last complete one.
        output_dir (`str`): the folder of the run.

    Raises:
        LayerPruneError: there is no such checkpoint, or it is incomplete.
    """
    if resume_from_checkpoint is True:
        resume_from_checkpoint = checkpoint_of(output_dir)
    if not resume_from_checkpoint:
        return None
    if not is_whole(resume_from_checkpoint):
        raise LayerPruneError(
            f"{resume_from_checkpoint} is no checkpoint that was written to its end; the last one in "
            f"{output_dir}: {last_checkpoint(output_dir) or 'none'}."
        )
    return resume_from_checkpoint


def check_teacher_is_original(checkpoint: str, teacher_layers: int) -> None:
    """Checks that a teacher copied from the student has all layers of the original model. It has not if
    the student was loaded from a checkpoint.

    Raises:
        LayerPruneError: it has not.
    """
    record = read_record(checkpoint)
    if record is not None and teacher_layers < record.model["layers"]:
        raise LayerPruneError(
            f"The run began with a model of {record.model['layers']} layers, but the teacher has "
            f"{teacher_layers}: start from the original model, or give it as teacher_model."
        )


def load_weights(student: Any, folder: str) -> None:
    """Loads the weights of a checkpoint in place, as a new process would: each tensor in its own dtype.

    Raises:
        LayerPruneError: the checkpoint lacks a weight.
    """
    dtypes = {p.dtype for p in student.parameters() if p.is_floating_point()}
    settings = {"dtype": reduce(torch.promote_types, dtypes), "output_loading_info": True}
    loaded, report = type(student).from_pretrained(folder, **settings)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise LayerPruneError(f"{folder} lacks {missing}: resume from another one.")
    student.load_state_dict(loaded.state_dict())
