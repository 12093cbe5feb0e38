"""Computes the distillation loss from the outputs of student and teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from ..errors import LayerPruneError
from ..forward.hooks import LAST, hidden
from ..forward.lm_head import ChunkedLMHead
from ..forward.token_losses import cross_entropy
from .losses import divergence, hidden_error, top_k_log_probs
from .teacher_cache import CachedTeacherLogits
from .tiled_loss import tiled_loss


class LossSettings(Protocol):
    """The settings of the loss, see [`DistillationTrainingArguments`]."""

    kl_weight: float
    divergence: str
    jsd_beta: float
    temperature: float
    top_k: int | None
    ce_weight: float
    hidden_weight: float
    hidden_loss: str
    torch_compile: bool
    torch_compile_backend: Any  # a str if torch_compile is set
    torch_compile_mode: str | None


@dataclass(frozen=True)
class ModelOutputs:
    """The outputs of one model for a batch.

    Args:
        lm_head ([`ChunkedLMHead`] or [`CachedTeacherLogits`]): makes logits of `last_hidden_state`.
        last_hidden_state (`torch.Tensor`, [`TopKLogProbs`] or [`SampledTokens`]): `(batch, length, hidden)`,
            the input of the LM head; or the cached tokens of a teacher.
        layers (`dict[int, tuple]`): the input and output of each compared layer, in the form of
            [`~hf_layerprune.forward.hooks.captured`].
    """

    lm_head: ChunkedLMHead | CachedTeacherLogits
    last_hidden_state: Any
    layers: dict[int, tuple[Any, Any]]

    def hidden_state(self, layer: int) -> torch.Tensor:
        """Returns the output `(batch, length, hidden)` of a layer.

        Args:
            layer (`int`): the present index, or [`~hf_layerprune.forward.hooks.LAST`].

        Raises:
            LayerPruneError: the layer did not run.
        """
        if layer not in self.layers:
            raise LayerPruneError(
                f"No hidden state was seen at layer {layer}: it did not run, or was compiled. Switch layer "
                "dropping and compilation off, or set hidden_weight=0."
            )
        layer_input, layer_output = self.layers[layer]
        return layer_input if layer == LAST else hidden(layer_output)

    def logits(self) -> torch.Tensor:
        """Returns the logits `(batch, length, vocabulary)`."""
        states = self.last_hidden_state
        lm_head: Any = self.lm_head
        return lm_head.head(states.flatten(0, 1)).unflatten(0, states.shape[:2])


@dataclass(frozen=True)
class DistillationLoss:
    """The loss of a batch. All values are float32 sums over tokens.

    Args:
        total (`torch.Tensor`): the weighted sum of all terms, with gradient.
        terms (`dict[str, torch.Tensor]`): each term by its name in the log, without weight and gradient.
        logit_loss (`torch.Tensor`): the weighted sum of the terms that read logits, without gradient.
        hidden_error (`torch.Tensor`): the hidden-state error, without weight and gradient. It is 0 if no
            layers are compared.
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    logit_loss: torch.Tensor
    hidden_error: torch.Tensor


def distillation_loss(
    student: ModelOutputs,
    teacher: ModelOutputs,
    labels: torch.Tensor,
    mask: torch.Tensor,
    settings: LossSettings,
    *,
    layer_pairs: Sequence[tuple[int, int]] = (),
    router_losses: Sequence[tuple[float, torch.Tensor]] = (),
    hidden_scale: float = 1.0,
    with_cross_entropy: bool = False,
) -> DistillationLoss:
    """Returns the distillation loss of a batch.

    The terms are the divergence of the logits, the cross-entropy on the labels, the hidden-state error, and
    the balancing losses of a mixture of experts.

    Args:
        student, teacher ([`ModelOutputs`]): the outputs of both models.
        labels (`torch.Tensor`): `(batch, length)`.
        mask (`torch.Tensor`): `(batch, length - 1)`, the positions whose prediction counts, see
            [`~hf_layerprune.data.targets.token_mask`].
        settings ([`LossSettings`]): weights and kinds of the terms.
        layer_pairs (`list[tuple[int, int]]`, *optional*): the compared student and teacher layers, see
            [`hidden_pairs`]. Default: none.
        router_losses (`list[tuple[float, torch.Tensor]]`, *optional*): the weight and value of each balancing
            loss of the student. The value is a mean over the batch.
        hidden_scale (`float`, *optional*, defaults to 1.0): multiplies `hidden_weight`.
        with_cross_entropy (`bool`, *optional*, defaults to `False`): compute the cross-entropy even if its
            weight is 0.
    """
    # Convert the mask to indices once: each use of a mask as an index makes the CPU wait for the GPU.
    rows, places = mask.nonzero(as_tuple=True)
    student_states = student.last_hidden_state[rows, places]
    teacher_states = teacher.last_hidden_state[rows, places]
    weights = {settings.divergence: settings.kl_weight, "ce": settings.ce_weight}
    with_cross_entropy |= settings.ce_weight > 0
    total = torch.zeros((), device=student_states.device)
    terms: dict[str, torch.Tensor] = {}
    if settings.kl_weight > 0 or with_cross_entropy:
        lm_head: Any = student.lm_head
        total, terms = tiled_loss(
            lm_head,
            student_states,
            teacher.lm_head,
            teacher_states,
            labels[rows, places + 1],
            partial(
                _logit_losses,
                settings=settings,
                vocabulary=min(student.lm_head.vocabulary, teacher.lm_head.vocabulary),
                with_cross_entropy=with_cross_entropy,
            ),
            weights,
        )
    logit_loss, error = total.detach(), torch.zeros_like(total)
    if layer_pairs:
        errors = [
            hidden_error(
                student.hidden_state(student_layer)[rows, places],
                teacher.hidden_state(teacher_layer)[rows, places],
                settings.hidden_loss,
            )
            for student_layer, teacher_layer in layer_pairs
        ]
        error = torch.stack(errors).mean()
        total = total + settings.hidden_weight * hidden_scale * error
        terms[f"hidden_{settings.hidden_loss}"] = error.detach()
    for weight, mean in router_losses:
        router_loss = mean * mask.sum()  # a sum over tokens, like all other terms
        total = total + weight * router_loss
        terms["aux_loss"] = router_loss.detach()
    return DistillationLoss(total, terms, logit_loss, error.detach())


def _logit_losses(
    student_logits: torch.Tensor,
    teacher_logits: Any,
    targets: torch.Tensor,
    settings: LossSettings,
    vocabulary: int,
    with_cross_entropy: bool,
) -> dict[str, torch.Tensor]:
    """Returns the sum of each loss that reads logits. Tokens from index `vocabulary` on are padding."""
    if torch.is_tensor(teacher_logits):
        teacher_logits = teacher_logits[:, :vocabulary]
        if settings.top_k:
            teacher_logits = top_k_log_probs(teacher_logits, settings.top_k, settings.temperature)
    losses = {
        settings.divergence: divergence(
            student_logits[:, :vocabulary],
            teacher_logits,
            settings.divergence,
            settings.temperature,
            settings.jsd_beta,
            compilation=(settings.torch_compile_backend, settings.torch_compile_mode)
            if settings.torch_compile
            else None,
        )
    }
    if with_cross_entropy:
        losses["ce"] = cross_entropy(student_logits, targets)
    return losses
