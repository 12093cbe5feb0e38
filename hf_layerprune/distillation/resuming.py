"""Loads the student and the checkpoint from which a run starts."""

from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.loading import is_whole, last_checkpoint, load_lineage, load_model, runs_own_code
from ..errors import LayerPruneError
from ..reports.record import checkpoint_of, read_record
from ..surgery.lineage import Lineage
from ..surgery.peft import base_of
from ..surgery.removal import keep_lineage
from .teacher import find_tokenizer


def load_student(model: Any, processing_class: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    """Returns the student and its tokenizer or processor.

    A folder or hub id is loaded in float32. Its tokenizer is loaded if none is given.
    """
    if not isinstance(model, (str, Path)):
        return model, processing_class
    student = load_model(str(model), dtype="float32", trust_remote_code=trust_remote_code)
    if processing_class is None:
        processing_class = find_tokenizer(str(model), trust_remote_code)
    return student, processing_class


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """Returns the checkpoint to resume from; None to start from the beginning.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*): a folder, or `True` for the last complete
            checkpoint.
        output_dir (`str`): the output folder of the run.

    Raises:
        LayerPruneError: the checkpoint does not exist or is incomplete.
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


def remove_as_in_checkpoint(student: Any, checkpoint: str, copied_teacher: Lineage | None) -> None:
    """Removes from `student`, in place, the layers that a checkpoint lacks.

    Args:
        student (`PreTrainedModel` or `PeftModel`): the model that continues training.
        checkpoint (`str`): the folder of the checkpoint.
        copied_teacher ([`Lineage`], *optional*): the layers of a teacher that was copied from the student.

    Raises:
        LayerPruneError: the student lacks layers of the checkpoint, or a copied teacher lacks layers of the
            original model. The latter happens if the student was loaded from a checkpoint.
    """
    record = read_record(checkpoint)
    if record is not None and copied_teacher is not None:
        began, copied = record.model["layers"], len(copied_teacher.kept)
        if copied < began:
            raise LayerPruneError(
                f"The run began with a model of {began} layers, but the teacher has {copied}: start from "
                "the original model, or give it as teacher_model."
            )
    keep_lineage(student, load_lineage(checkpoint, runs_own_code(base_of(student))))


def load_weights(student: Any, folder: str) -> None:
    """Loads the weights of a checkpoint in place, like a new process would: each tensor in its own dtype.

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
