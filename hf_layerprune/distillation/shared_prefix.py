"""Finds the first layers that are equal in student and teacher, so that they run once for both."""

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from ..forward.hooks import activations_kept, can_replay, captured, hidden, undisturbed
from ..forward.lm_head import balances_routers
from ..surgery.decoder import find_decoder, is_sharded
from ..surgery.lineage import get_lineage
from ..surgery.peft import base_of


logger = logging.getLogger(__name__)


class SharedPrefix:
    """Counts the first layers that student and teacher share.

    They are counted again when a parameter of the student is frozen or unfrozen, or when a frozen parameter
    changes.

    Args:
        teacher: the teacher. A teacher that is not a model shares no layers.
    """

    def __init__(self, teacher: Any) -> None:
        self.length = 0
        self._teacher = teacher
        self._parameters: list[tuple[bool, int]] | None = None

    def update(self, student: Any, input_ids: torch.Tensor) -> None:
        """Sets `length` to the number of first layers that `student` shares with the teacher.

        The student must be in training mode.
        """
        # Private: torch has no public counter of in-place changes to a tensor.
        parameters = [(p.requires_grad, 0 if p.requires_grad else p._version) for p in student.parameters()]
        if parameters == self._parameters:
            return
        self._parameters = parameters
        self.length = 0
        if not isinstance(self._teacher, PreTrainedModel):
            return
        if is_sharded(student) or balances_routers(student):
            _log_nothing_shared(
                "the student's weights are sharded"
                if is_sharded(student)
                else "the balancing loss of routers reads all layers"
            )
            return
        self.length = shared_prefix(student, self._teacher, input_ids)
        if self.length:
            logger.info(
                "The first %d of %d layers run once for teacher and student, and without gradient.",
                self.length,
                len(get_lineage(student).kept),
            )


def shared_prefix(student: Any, teacher: Any, input_ids: torch.Tensor) -> int:
    """Returns the number of first layers that are frozen and compute the same in `student` and `teacher`.

    Their tensors must be equal. Their outputs for some tokens must be equal bit for bit and without gradient,
    even with the student's dropout on.

    Args:
        student, teacher (`PreTrainedModel`): the models, the student in training mode.
        input_ids (`torch.Tensor`): `(batch, length)`, tokens to compare the outputs on.
    """
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if len(trained) == len(list(student.parameters())):
        return 0
    input_ids = input_ids[:1, :8]
    student_layers, teacher_layers = (find_decoder(base_of(model)).layers for model in (student, teacher))
    layers = range(min(len(student_layers), len(teacher_layers)) - 1)
    with torch.random.fork_rng(), activations_kept(student), captured(student, layers) as student_outputs:
        student(input_ids=input_ids, use_cache=False)
    with torch.no_grad(), captured(teacher, layers) as teacher_outputs:
        teacher(input_ids=input_ids, use_cache=False)

    def difference(layer: int) -> str | None:
        """Returns the reason why a layer cannot be shared; None if it can."""
        if layer not in student_outputs:
            return f"layer {layer} did not run"
        if any(id(parameter) in trained for parameter in student_layers[layer].parameters()):
            return f"layer {layer} is trained"
        outputs = hidden(student_outputs[layer][1]), hidden(teacher_outputs[layer][1])
        if _depends_on(outputs[0], trained):
            return "an embedding is trained"
        if outputs[0].dtype != outputs[1].dtype:
            return f"the student's hidden states are {outputs[0].dtype}, the teacher's {outputs[1].dtype}"
        if not _same_tensors(student_layers[layer].state_dict(), teacher_layers[layer].state_dict()):
            return f"the weights of layer {layer} differ"
        return None if torch.equal(*outputs) else f"the outputs of layer {layer} differ"

    count, reason = 0, None if layers else "a model has a single layer"
    for reason in map(difference, layers):
        if reason is not None:
            break
        count += 1
    if count:
        reason = _obstacle(student, teacher, input_ids, count)
    if reason is not None:
        _log_nothing_shared(reason)
        return 0
    return count


def _obstacle(student: Any, teacher: Any, input_ids: torch.Tensor, count: int) -> str | None:
    """Returns the reason why the student cannot continue after `count` equal layers; None if it can."""
    body: Any = base_of(teacher).base_model
    if not _same_tensors(_frozen_outside_layers(student), body.state_dict()):
        return "the embeddings, or other weights outside the layers, differ"
    with undisturbed(student):
        if not can_replay(student, input_ids, count):
            return "a layer reads more than the output of the layer before it"
    return None


def _log_nothing_shared(reason: str) -> None:
    logger.info("No layer runs once for teacher and student: %s.", reason)


def _depends_on(tensor: torch.Tensor, parameters: set[int]) -> bool:
    """Returns whether the gradient of `tensor` reaches one of these parameters, given by `id`.

    `requires_grad` is not enough: activation checkpointing sets it on the output of frozen embeddings.
    """
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in parameters:
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def _frozen_outside_layers(model: Any) -> dict[str, torch.Tensor]:
    """Returns the frozen tensors outside the decoder layers, including the embeddings."""
    base = base_of(model)
    body: Any = base.base_model
    in_layers = {id(tensor) for tensor in find_decoder(base).layers.state_dict(keep_vars=True).values()}
    tensors = body.state_dict(keep_vars=True).items()
    return {name: value for name, value in tensors if id(value) not in in_layers and not value.requires_grad}


def _same_tensors(tensors: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> bool:
    """Returns whether `reference` holds all `tensors` with equal values, compared in its dtype."""
    return all(
        name in reference and torch.equal(value.to(reference[name].dtype), reference[name])
        for name, value in tensors.items()
    )
