"""Whether a phase wins back what its removals cost, and the way back from one that does not."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from ..checkpoints.saving import load_again, save_model
from ..data import Batch
from ..errors import LayerPruneError
from ..evaluation.evaluate import measure_quality
from ..surgery.removal import put_back


class Recovery:
    """Keeps the model as it was before a phase, and goes back to it where that is better.

    Args:
        share (`float`): of what its removals cost, what a phase must win back.
        output_dir (`str`): where the copies lie, as `before_phase_1` and so on, until they are not needed.
        batches (sequence of dict): the calibration data, on which the model is measured.
        task (*optional*): what it is measured by instead of its loss, as for [`score_layers`].
    """

    def __init__(self, share: float, output_dir: str, batches: Sequence[Batch], task: Any = None) -> None:
        self._share, self._folder, self._batches, self._task = share, Path(output_dir), batches, task

    def keep(self, model: PreTrainedModel, number: int) -> float:
        """Keep the model before a phase, and none from before the last one; how good it is."""
        if PartialState().is_main_process:
            save_model(model, self._copy(number), verify=False)
            shutil.rmtree(self._copy(number - 2), ignore_errors=True)
        PartialState().wait_for_everyone()
        return self.measure(model)

    def measure(self, model: PreTrainedModel) -> float:
        """How good the model is, higher is better."""
        return measure_quality(model, self._batches, self._task)

    def check(self, number: int) -> None:
        """Check that there is a way back from a phase.

        Raises:
            LayerPruneError: the copy is gone.
        """
        copy = self._copy(number)
        if number and not copy.is_dir():
            raise LayerPruneError(f"{copy} is gone, and min_recovery may have to go back to it.")

    def go_back(self, model: PreTrainedModel, phase: dict[str, Any], number: int) -> str | None:
        """At the end of a phase that did not win back enough, make `model`, in place, what it was before.

        Args:
            phase (`dict`): its entry in the record, with `qualities` `before` and `cut`; `now` is added.

        Returns:
            `str` or `None`: what was done, in words; None if the phase won back enough.
        """
        qualities = phase["qualities"]
        before, cut = qualities["before"], qualities["cut"]
        now = qualities["now"] = self.measure(model)
        enough = cut >= before or now - cut >= self._share * (before - cut)
        [enough] = broadcast_object_list([enough])
        if enough:
            return None
        put_back(model, load_again(model, self._copy(number)))
        removed = [removal["original"] for removal in phase["removals"]]
        return (
            f"Phase {number} did not win back {self._share:.0%} of what the removal of {removed} cost "
            f"(quality {before:.4f} before it, {cut:.4f} cut, {now:.4f} at its end): the model is as it was "
            f"before it, with these layers, as in {self._copy(number).name}."
        )

    def forget(self, phases: int) -> None:
        """Remove the copies from before so many phases, which all won back enough."""
        for number in range(1, phases + 1):
            self.drop(number)

    def drop(self, number: int) -> None:
        """Remove the copy from before a phase."""
        if PartialState().is_main_process:
            shutil.rmtree(self._copy(number), ignore_errors=True)

    def _copy(self, number: int) -> Path:
        return self._folder / f"before_phase_{number}"
