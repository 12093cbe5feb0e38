"""Warns about problems in a run: costly removals, no recovery, a diverging loss."""

from collections.abc import Sequence
from math import isfinite
from statistics import median

from transformers import Trainer, TrainingArguments

from ..distillation.arguments import DistillationTrainingArguments


COSTLY = 3.0  # a removal is costly above this multiple of the median cost so far
LITTLE = 0.1  # a recovery is little below this share of the cost of a removal
DIVERGED = 5.0  # a loss has diverged above this multiple of the lowest loss of the phase
FAR = 0.5  # and this many nats above the lowest loss, because near 0 any rise is a large multiple


def removal_too_costly(earlier: Sequence[float], cost: float, layer: int, left: int) -> str | None:
    """Returns a warning if a removal costs much more than the earlier removals: the layer was essential.

    Args:
        earlier (`list[float]`): the cost of each earlier removal, in the unit of the criterion.
        cost (`float`): the cost of this removal.
        layer (`int`): the removed layer, by original index.
        left (`int`): the number of remaining layers.
    """
    usual = median(earlier) if earlier else 0.0
    if not cost > COSTLY * usual > 0:
        return None
    return (
        f"The removal of layer {layer} cost {cost:.3f}, and earlier removals cost {usual:.3f} (median). All "
        f"layers left are important. Stop with {left + 1} layers (target_layers, quality_floor), or train "
        "longer before the next removal (steps_per_phase)."
    )


def no_recovery(before: float, cut: float, now: float) -> str | None:
    """Returns a warning if the training after a removal recovered hardly any of its cost.

    Args:
        before, cut, now (`float`): the quality before the removal, directly after it, and after the training.
    """
    if not cut < before or now - cut > LITTLE * (before - cut):
        return None
    share = 100 * (now - cut) / (before - cut)
    return (
        f"The last phase recovered {share:.0f} % of what its removal cost ({before:.3f} before the removal, "
        f"{cut:.3f} after it, {now:.3f} now). Raise steps_per_phase or learning_rate, give more text, or set "
        "trainable='all'."
    )


def loss_diverged(losses: Sequence[float], grad_norm: float, in_nats: bool = True) -> str | None:
    """Returns a warning if the loss diverges, or the gradient is not finite.

    Args:
        losses (`list[float]`): the losses of this phase, with the present loss at the end.
        grad_norm (`float`): the present norm of the gradient. A plain Trainer hides a loss that is nan.
        in_nats (`bool`, *optional*, defaults to `True`): whether the loss is a cross-entropy or a divergence.
            Other losses, for example in reinforcement learning, may have any value. For them only the
            gradient is checked.
    """
    loss, lowest = losses[-1], min(losses)
    grew = in_nats and loss > max(losses[0], DIVERGED * lowest, lowest + FAR)
    if isfinite(loss) and isfinite(grad_norm) and not grew:
        return None
    return (
        f"The loss is {loss:.3g}, up from {lowest:.3g} in this phase, and the gradient norm is "
        f"{grad_norm:.3g}: training diverges. Lower learning_rate or max_grad_norm, raise warmup_steps, or "
        "lower the weight of the term that grew (hidden_weight)."
    )


def loss_in_nats(trainer: Trainer | None, args: TrainingArguments) -> bool:
    """Returns whether the loss of a Trainer is a cross-entropy or a divergence.

    Other losses, for example in reinforcement learning, and the loss of an unknown Trainer may have any
    value.
    """
    if isinstance(args, DistillationTrainingArguments):
        return True
    own = next((c for c in type(trainer).__mro__ if "compute_loss" in vars(c)), None)
    usual = own is Trainer or (own is not None and own.__name__ == "SFTTrainer")
    return trainer is not None and usual and trainer.compute_loss_func is None


class LossMonitor:
    """Monitors the loss of each phase.

    Args:
        in_nats (`bool`, *optional*, defaults to `False`): see [`loss_diverged`].
    """

    def __init__(self, in_nats: bool = False) -> None:
        self._in_nats = in_nats
        self._losses: list[float] = []
        self._has_warned = False

    def start_phase(self) -> None:
        """Clears the losses of the previous phase."""
        self._losses, self._has_warned = [], False

    def check(self, loss: float, grad_norm: float) -> str | None:
        """Returns a warning if the loss diverges, at most once per phase."""
        self._losses.append(loss)
        warning = None if self._has_warned else loss_diverged(self._losses, grad_norm, self._in_nats)
        self._has_warned |= warning is not None
        return warning
