"""The phases of a run: how many layers go in each, when it is over, and how its learning rate runs."""

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ..errors import LayerPruneError


def phase_sizes(present: int, target: int, layers_per_phase: int | float) -> list[int]:
    """How many layers go in each phase, from `present` to `target`.

    Args:
        present, target (`int`): layers there are, and layers there shall be.
        layers_per_phase (`int` or `float`): a number, or a share of the layers that a phase begins with.
    """
    sizes: list[int] = []
    while present > target:
        is_share = isinstance(layers_per_phase, float)
        size = max(1, int(layers_per_phase * present)) if is_share else int(layers_per_phase)
        sizes.append(min(size, present - target))
        present -= sizes[-1]
    return sizes


class RestartedSchedule:
    """A learning rate schedule of which each phase runs through the whole, in place.

    Args:
        scheduler (`LambdaLR`): of the run, which takes the learning rate times a factor of the step.
        total (`int`): its steps.

    Raises:
        LayerPruneError: the schedule is no factor of the step alone.
    """

    def __init__(self, scheduler: Any, total: int) -> None:
        if not isinstance(scheduler, LambdaLR):
            raise LayerPruneError(
                f"restart_learning_rate: a {type(scheduler).__name__} cannot be run through again for each "
                "phase; choose an lr_scheduler_type such as linear or cosine."
            )
        self._scheduler, self._total = scheduler, total
        self._factors: list[Callable[[Any], float]] = scheduler.lr_lambdas

    def restart(self, share: Callable[[int], float]) -> None:
        """Begin a phase, of which `share(step)` is over at a step of the run."""

        def within(factor: Callable[[Any], float]) -> Callable[[int], float]:
            return lambda step: factor(share(step) * self._total)

        scheduler = self._scheduler
        scheduler.lr_lambdas = [within(factor) for factor in self._factors]
        rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in rates]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
