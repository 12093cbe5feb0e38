"""The model that teaches: where it comes from, and whether it can teach this student."""

import copy

from transformers import PreTrainedModel

from .checkpoint import load_model
from .decoder import find_decoder
from .errors import LayerPruneError
from .lineage import get_lineage


def make_teacher(
    teacher: PreTrainedModel | str | None, student: PreTrainedModel, hidden_states: bool
) -> PreTrainedModel:
    """A frozen model in eval mode that can teach `student`.

    Args:
        teacher (`PreTrainedModel` or `str`, *optional*): a model (frozen in place), a folder or a hub
            id; left out, a copy of `student` as it is now.
        student (`PreTrainedModel`): the model that will be trained.
        hidden_states (`bool`): whether hidden states will be compared.

    Raises:
        LayerPruneError: the teacher has another vocabulary, fewer layers than the student once had or
            not the layers it has now, shares weights with it, or cannot be loaded.
    """
    if teacher is None:
        teacher = copy.deepcopy(student)
    elif isinstance(teacher, str):
        teacher = load_model(teacher, dtype=student.dtype)
    _check(teacher, student, hidden_states)
    return teacher.eval().requires_grad_(False)


def _check(teacher: PreTrainedModel, student: PreTrainedModel, hidden_states: bool) -> None:
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    if shared:
        raise LayerPruneError(
            f"Teacher and student share {len(shared)} weights, so that training would change the "
            "teacher. Leave `teacher_model` out to get a frozen copy."
        )
    theirs, ours = find_decoder(teacher).config, find_decoder(student).config
    if theirs.vocab_size != ours.vocab_size:
        raise LayerPruneError(
            f"The teacher's vocabulary has {theirs.vocab_size} tokens, the student's "
            f"{ours.vocab_size}: logits can only be compared over the same vocabulary."
        )
    lineage, needed = get_lineage(teacher), get_lineage(student)
    gone = sorted(set(needed.kept) - set(lineage.kept))
    if lineage.original < needed.original or gone:
        raise LayerPruneError(
            f"The teacher has {lineage}, but the student descends from a model of {needed.original} "
            f"layers and still has {needed.kept}. Give the original model as teacher."
        )
    if hidden_states and (theirs.hidden_size != ours.hidden_size or lineage.original != needed.original):
        raise LayerPruneError(
            "Hidden states can only be compared with the model that the student was cut from: the "
            f"teacher has {lineage.original} layers of width {theirs.hidden_size}, the student "
            f"descends from {needed.original} of width {ours.hidden_size}. Set hidden_weight=0 to "
            "learn from the teacher's logits alone."
        )
