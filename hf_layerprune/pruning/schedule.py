"""Schedules the phases of a run: the number of layers to remove, the steps and the learning rate."""

import warnings
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from ..errors import LayerPruneError
from ..reports.record import RunRecord
from .arguments import PruningArguments


def phase_sizes(present: int, target: int, layers_per_phase: int | float) -> list[int]:
    """Returns the number of layers that each phase removes.

    Args:
        present, target (`int`): the present number of layers, and the number of layers to keep.
        layers_per_phase (`int` or `float`): number of layers, or share of the layers at the start of a phase.
    """
    sizes: list[int] = []
    while present > target:
        is_share = isinstance(layers_per_phase, float)
        size = max(1, int(layers_per_phase * present)) if is_share else int(layers_per_phase)
        sizes.append(min(size, present - target))
        present -= sizes[-1]
    return sizes


class RestartedSchedule:
    """A learning rate schedule that each phase runs from start to end.

    Args:
        scheduler (`LambdaLR`): the scheduler of the run. It is changed in place.
        total (`int`): number of steps of the schedule.

    Raises:
        LayerPruneError: the learning rate of the schedule does not depend only on the step.
    """

    def __init__(self, scheduler: Any, total: int) -> None:
        if not isinstance(scheduler, LambdaLR):
            raise LayerPruneError(
                f"restart_learning_rate is set, but a {type(scheduler).__name__} cannot be run through again "
                "for each phase. Choose an lr_scheduler_type such as linear or cosine."
            )
        self._scheduler, self._total = scheduler, total
        self._factors: list[Callable[[Any], float]] = scheduler.lr_lambdas

    def restart(self, share: Callable[[int], float]) -> None:
        """Starts the schedule of a phase.

        Args:
            share (`Callable`): a function `share(step)` that returns the share of the phase that is over at a
                step of the run.
        """

        def within(factor: Callable[[Any], float]) -> Callable[[int], float]:
            return lambda step: factor(share(step) * self._total)

        self._scheduler.lr_lambdas = [within(factor) for factor in self._factors]
        # Repeat the present step, with the new factors.
        self._scheduler.last_epoch -= 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the scheduler steps before the optimizer
            self._scheduler.step()


class PhaseSchedule:
    """Decides when the phases of a run start and end.

    Args:
        args ([`PruningArguments`]): the settings of the run.
        record ([`RunRecord`]): the record of the run. It stores the number of steps of a phase.
        max_steps (`int`): number of training steps of the run.
        lr_scheduler (`LambdaLR`): the learning rate scheduler of the run.

    Raises:
        LayerPruneError: training is too short, or a resumed run would have phases of another length.
    """

    def __init__(self, args: PruningArguments, record: RunRecord, max_steps: int, lr_scheduler: Any) -> None:
        self._args, self._record, self._max_steps = args, record, max_steps
        self._steps = self._plan()
        self._learning_rate = (
            RestartedSchedule(lr_scheduler, max_steps) if args.restart_learning_rate else None
        )

    def _plan(self) -> int:
        """Computes the number of steps of a phase; 1 if phases are counted in tokens."""
        layers, target = self._record.model["layers"], self._args.target_layers
        phases = len(phase_sizes(layers, target, self._args.layers_per_phase))
        steps = self._args.steps_per_phase or self._max_steps // phases
        if self._args.tokens_per_phase is not None:
            steps = 1
        if not 1 <= steps * phases <= self._max_steps:
            raise LayerPruneError(
                f"Removing {layers - target} layers takes {phases} phases of at least {max(1, steps)} "
                f"steps, but training has {self._max_steps} steps: train longer or remove more layers per "
                "phase."
            )
        planned = self._record.pruning.setdefault("phase_steps", steps)
        if planned != steps:
            raise LayerPruneError(
                f"The run was started with phases of {planned} steps, now it would go on with {steps}: "
                "resume with the same max_steps and steps_per_phase."
            )
        return steps

    @property
    def steps(self) -> int:
        """Returns the number of steps of a phase; 1 if phases are counted in tokens."""
        return self._steps

    def next_size(self, layers: int) -> int:
        """Returns the number of layers that the next phase removes from a model with `layers` layers."""
        return phase_sizes(layers, self._args.target_layers, self._args.layers_per_phase)[0]

    def is_over(self, state: TrainerState) -> bool:
        """Returns whether the present phase is over. It must not be the last phase."""
        return self._share_over(state, state.global_step) >= 1

    def restart_learning_rate(self, state: TrainerState, is_last: bool) -> None:
        """Starts the learning rate schedule again for the present phase, if the settings ask for it."""
        if self._learning_rate is None or not self._record.phases:
            return
        first = self._record.phases[-1].step

        def share(step: int) -> float:
            if is_last:
                return (step - first) / (state.max_steps - first)
            return self._share_over(state, step)

        self._learning_rate.restart(share)

    def _share_over(self, state: TrainerState, step: int) -> float:
        phase = self._record.phases[-1]
        if self._args.tokens_per_phase is not None:
            return (state.num_input_tokens_seen - (phase.tokens or 0)) / self._args.tokens_per_phase
        return (step - phase.step) / self._steps
