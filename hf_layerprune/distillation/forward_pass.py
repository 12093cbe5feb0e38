"""Runs teacher and student over the same batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.targets import Batch
from ..forward.hooks import captured, hidden, recomputes_activations, replayed, undisturbed
from ..forward.lm_head import ChunkedLMHead
from ..surgery.peft import base_of
from .compiled_layers import CompiledLayers
from .objective import ModelOutputs
from .teacher_cache import CachedTeacherLogits


class ForwardPass:
    """Runs teacher and student over batches.

    Args:
        teacher (`PreTrainedModel` or [`CachedTeacherLogits`]): the teacher, or its cached logits.
        student (`PreTrainedModel` or `PeftModel`): the student.
        input_ids (`torch.Tensor`): `(batch, length)`, tokens to test the LM heads with.
        compiled ([`CompiledLayers`], *optional*): compiles decoder layers. Default: no compilation.
    """

    def __init__(
        self,
        teacher: PreTrainedModel | CachedTeacherLogits,
        student: Any,
        input_ids: torch.Tensor,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self._compiled = compiled or CompiledLayers(enabled=False)
        self._teacher: ChunkedLMHead | CachedTeacherLogits
        if isinstance(teacher, CachedTeacherLogits):
            self._teacher = teacher
        else:
            with undisturbed(teacher):
                self._teacher = ChunkedLMHead(teacher, input_ids)
        with undisturbed(student):
            self._student = ChunkedLMHead(student, input_ids)

    def run(
        self,
        inputs: Batch,
        layer_pairs: Sequence[tuple[int, int]] = (),
        shared_layers: int = 0,
        wrapped_student: nn.Module | None = None,
    ) -> tuple[ModelOutputs, ModelOutputs]:
        """Returns the outputs of the student and the outputs of the teacher.

        Args:
            inputs (`dict`): `input_ids` `(batch, length)` and the other inputs of the models.
            layer_pairs (`list[tuple[int, int]]`, *optional*): the student and teacher layers whose hidden
                states are compared.
            shared_layers (`int`, *optional*, defaults to 0): number of first layers that run once for both
                models, see [`shared_prefix`].
            wrapped_student (`nn.Module`, *optional*): the student inside its wrapper for training on several
                devices.
        """
        last_shared = [shared_layers - 1] if shared_layers else []
        teacher = self._run_teacher(inputs, [layer for _, layer in layer_pairs] + last_shared)
        # The student continues after the last shared layer. Earlier outputs are kept only for the comparison.
        shared_outputs = [
            teacher.layers[layer if layer in teacher.layers else shared_layers - 1][1]
            for layer in range(shared_layers)
        ]
        model: Any = self._student.model
        if shared_outputs and recomputes_activations(model):
            shared_outputs[-1] = _with_gradient(shared_outputs[-1])
        with (
            captured(model, [layer for layer, _ in layer_pairs]) as layers,
            self._compiled.running(model),
            replayed(base_of(model), shared_outputs),
        ):
            states = self._student.states(inputs, wrapped_student)
        return ModelOutputs(self._student, states, layers), teacher

    def _run_teacher(self, inputs: Batch, layers: Sequence[int]) -> ModelOutputs:
        if isinstance(self._teacher, CachedTeacherLogits):
            return ModelOutputs(self._teacher, *self._teacher.read(inputs, layers))
        model: Any = self._teacher.model
        with torch.no_grad(), captured(model, layers) as states, self._compiled.running(model):
            last = self._teacher.states(inputs)
        return ModelOutputs(self._teacher, last, states)


def _with_gradient(output: Any) -> Any:
    """Returns the output of a layer with a hidden state that requires gradient.

    Reentrant activation checkpointing computes no gradients for the parameters of a layer if its input
    requires none.
    """
    state = hidden(output).detach().requires_grad_()
    return (state, *output[1:]) if isinstance(output, (tuple, list)) else state
