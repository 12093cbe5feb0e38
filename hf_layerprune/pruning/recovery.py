"""Measures the share of lost quality that a phase recovers, and undoes a phase that recovers too little."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from ..checkpoints.saving import save_model
from ..checkpoints.verification import load_again
from ..data.targets import Batch
from ..errors import LayerPruneError
from ..evaluation.evaluate import measure_quality
from ..reports.record import Phase
from ..surgery.removal import put_back


class Recovery:
    """Saves the model before each phase, and restores it if the phase recovers too little.

    Args:
        share (`float`): the share of the quality lost by its removals that a phase must recover.
        output_dir (`str`): the folder for the copies `before_phase_1` and so on.
        batches (sequence of dict): the calibration data, on which quality is measured.
        task (*optional*): the task that measures quality, instead of the loss, as for [`score_layers`].
    """

    def __init__(self, share: float, output_dir: str, batches: Sequence[Batch], task: Any = None) -> None:
        self._share, self._folder, self._batches, self._task = share, Path(output_dir), batches, task

    def keep(self, model: PreTrainedModel, number: int) -> float:
        """Saves the model before a phase and returns its quality. Deletes the copy from two phases ago."""
        if PartialState().is_main_process:
            save_model(model, self._copy(number), verify=False)
            shutil.rmtree(self._copy(number - 2), ignore_errors=True)
        PartialState().wait_for_everyone()
        return self.measure(model)

    def measure(self, model: PreTrainedModel) -> float:
        """Returns the quality of the model, higher is better."""
        return measure_quality(model, self._batches, self._task)

    def check(self, number: int) -> None:
        """Checks that the copy before a phase exists.

        Raises:
            LayerPruneError: the copy does not exist.
        """
        copy = self._copy(number)
        if number and not copy.is_dir():
            raise LayerPruneError(
                f"{copy} is missing, but min_recovery may have to restore it. Resume without min_recovery, "
                "or start again in a new output_dir."
            )

    def go_back(self, model: PreTrainedModel, phase: Phase, number: int) -> str | None:
        """Restores `model`, in place, at the end of a phase that recovered too little.

        Args:
            model (`PreTrainedModel`): the model at the end of the phase.
            phase ([`Phase`]): the phase, with the qualities `before` and `cut`. This method adds `now`.
            number (`int`): the number of the phase.

        Returns:
            `str` or `None`: a message about the restored model; None if the phase recovered enough.
        """
        qualities = phase.qualities
        assert qualities is not None
        before, cut = qualities["before"], qualities["cut"]
        now = qualities["now"] = self.measure(model)
        enough = cut >= before or now - cut >= self._share * (before - cut)
        [enough] = broadcast_object_list([enough])
        if enough:
            return None
        put_back(model, load_again(model, self._copy(number)))
        removed = [removal.original for removal in phase.removals]
        return (
            f"Phase {number} recovered less than {self._share:.0%} of what the removal of layers {removed} "
            f"cost (quality {before:.4f} before the removal, {cut:.4f} after it, {now:.4f} at the end of the "
            f"phase). The model with these layers is restored, as in {self._copy(number).name}."
        )

    def forget(self, phases: int) -> None:
        """Deletes the copies of the first phases, which all recovered enough."""
        for number in range(1, phases + 1):
            self.drop(number)

    def drop(self, number: int) -> None:
        """Deletes the copy of a phase."""
        if PartialState().is_main_process:
            shutil.rmtree(self._copy(number), ignore_errors=True)

    def _copy(self, number: int) -> Path:
        return self._folder / f"before_phase_{number}"
