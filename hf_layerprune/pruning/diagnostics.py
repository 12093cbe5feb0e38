"""Signs that a run goes wrong, in plain words, while something can be done about it."""

from collections.abc import Sequence
from math import isfinite
from statistics import median


STEEP = 3.0  # times the median removal so far
LITTLE = 0.1  # of what a removal cost
EXPLODED = 5.0  # times the lowest loss of the phase
FAR = 0.5  # nats above it: of losses near 0 any rise is many times


def steep_fall(earlier: Sequence[float], fall: float, layer: int, left: int) -> str | None:
    """Whether a removal costs much more than those before it, so that the layer does essential work.

    Args:
        earlier (`list[float]`): what each earlier removal cost, in the criterion's own unit.
        fall (`float`): what this one cost.
        layer (`int`): which it was, by its index in the original model.
        left (`int`): how many layers are left.
    """
    usual = median(earlier) if earlier else 0.0
    if not fall > STEEP * usual > 0:
        return None
    return (
        f"Layer {layer} cost {fall:.3f}, where removals before it cost {usual:.3f} (median): no layer that "
        f"is left is unimportant. Consider to stop with {left + 1} layers (target_layers, quality_floor), or "
        "to heal longer before the next removal (steps_per_phase)."
    )


def no_recovery(before: float, cut: float, now: float) -> str | None:
    """Whether the training after a removal won back next to nothing of what it cost.

    Args:
        before, cut, now (`float`): the quality before the removal, right after it, and after the training.
    """
    if not cut < before or now - cut > LITTLE * (before - cut):
        return None
    share = 100 * (now - cut) / (before - cut)
    return (
        f"The last phase won back {share:.0f} % of what its removal cost ({before:.3f} before it, {cut:.3f} "
        f"cut, {now:.3f} now): it trained too little, too slowly or too few parameters. Raise "
        "steps_per_phase or learning_rate, give more text, or set trainable='all'."
    )


def exploded(losses: Sequence[float], grad_norm: float, in_nats: bool = True) -> str | None:
    """Whether the loss runs away, or the gradient is no number any more.

    Args:
        losses (`list[float]`): of this phase, the last one now.
        grad_norm (`float`): the norm of the gradient now; a plain Trainer hides a loss that is no number.
        in_nats (`bool`, *optional*, defaults to `True`): whether the loss is a cross-entropy or a divergence.
            Others, as of reinforcement learning, may take any value; only their gradient is looked at.
    """
    loss, lowest = losses[-1], min(losses)
    grew = in_nats and loss > max(losses[0], EXPLODED * lowest, lowest + FAR)
    if isfinite(loss) and isfinite(grad_norm) and not grew:
        return None
    return (
        f"The loss is {loss:.3g}, where it was {lowest:.3g} before in this phase, and the gradient's norm is "
        f"{grad_norm:.3g}: training runs away. Lower learning_rate or max_grad_norm, warm up (warmup_steps), "
        "or lower the weight of the term that grew (hidden_weight)."
    )
