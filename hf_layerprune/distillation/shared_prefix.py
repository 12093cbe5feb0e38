"""The first layers that are the same in student and teacher, so that they run once for both."""

import logging
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel

from ..forward.hooks import can_replay, captured, hidden, undisturbed
from ..forward.lm_head import balances_routers
from ..surgery.decoder import find_decoder, is_sharded
from ..surgery.lineage import get_lineage
from ..surgery.peft import base_of


logger = logging.getLogger(__name__)


class SharedPrefix:
    """Counts the shared first layers, again whenever a parameter of the student is frozen, unfrozen or, while
    it is frozen, changed.

    Args:
        teacher: the teacher. A teacher that is no model shares nothing.
    """

    def __init__(self, teacher: Any) -> None:
        self.length = 0
        self._teacher = teacher
        self._parameters: list[tuple[bool, int]] | None = None

    def update(self, student: Any, input_ids: torch.Tensor) -> None:
        """Sets `length` to the number of first layers that `student`, in training mode, shares with the
        teacher."""
        # Private: torch has no public counter of in-place changes to a tensor.
        parameters = [(p.requires_grad, 0 if p.requires_grad else p._version) for p in student.parameters()]
        if parameters == self._parameters:
            return
        self._parameters = parameters
        # The balancing loss of routers reads all layers.
        if (
            isinstance(self._teacher, PreTrainedModel)
            and not is_sharded(student)
            and not balances_routers(student)
        ):
            self.length = shared_prefix(student, self._teacher, input_ids)
        if self.length:
            logger.info(
                "The first %d of %d layers run once for teacher and student, and without gradient.",
                self.length,
                len(get_lineage(student).kept),
            )


def shared_prefix(student: Any, teacher: Any, input_ids: torch.Tensor) -> int:
    """Returns how many of the first layers are frozen and compute the same in `student` and `teacher`.

    Their tensors must be equal, and their outputs for some tokens must be bit-identical and without gradient,
    also with the student's dropout on.

    Args:
        student, teacher (`PreTrainedModel`): the models; the student's mode is that of training.
        input_ids (`torch.Tensor`): `(batch, length)`, some tokens.
    """
    if all(parameter.requires_grad for parameter in student.parameters()):
        return 0
    input_ids = input_ids[:1, :8]
    student_layers, teacher_layers = (find_decoder(base_of(model)).layers for model in (student, teacher))
    layers = range(min(len(student_layers), len(teacher_layers)) - 1)
    with torch.random.fork_rng(), captured(student, layers) as student_outputs:
        student(input_ids=input_ids, use_cache=False)
    with torch.no_grad(), captured(teacher, layers) as teacher_outputs:
        teacher(input_ids=input_ids, use_cache=False)

    def is_shared(layer: int) -> bool:
        return (
            layer in student_outputs
            and not hidden(student_outputs[layer][1]).requires_grad
            and torch.equal(hidden(student_outputs[layer][1]), hidden(teacher_outputs[layer][1]))
            and _same_tensors(student_layers[layer].state_dict(), teacher_layers[layer].state_dict())
        )

    count = len(list(takewhile(is_shared, layers)))
    body: Any = base_of(teacher).base_model
    if not count or not _same_tensors(_frozen_outside_layers(student), body.state_dict()):
        return 0
    with undisturbed(student):
        return count if can_replay(student, input_ids, count) else 0


def _frozen_outside_layers(model: Any) -> dict[str, torch.Tensor]:
    """Returns the frozen tensors outside the decoder layers, among them the embeddings."""
    base = base_of(model)
    body: Any = base.base_model
    in_layers = {id(tensor) for tensor in find_decoder(base).layers.state_dict(keep_vars=True).values()}
    tensors = body.state_dict(keep_vars=True).items()
    return {name: value for name, value in tensors if id(value) not in in_layers and not value.requires_grad}


def _same_tensors(tensors: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> bool:
    """Returns whether `reference` has all `tensors`, by name and value."""
    return all(name in reference and torch.equal(value, reference[name]) for name, value in tensors.items())
