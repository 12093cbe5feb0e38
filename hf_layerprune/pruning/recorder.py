"""Writes the record of a run into its output folder during the run."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ..reports.machine import peak_memory_mb
from ..reports.record import Phase, RunRecord, write_record
from ..reports.texts import describe_text


logger = logging.getLogger(__name__)


class Recorder:
    """Writes the record of a run, including its time and memory.

    Attributes:
        record ([`RunRecord`]): the record so far.
        has_begun (`bool`): whether a run has started.
    """

    def __init__(self) -> None:
        self.record = RunRecord()
        self.has_begun = False
        self._earlier_evaluations: list[dict[str, Any]] = []
        self._folder = ""
        self._writes = False
        self._has_ended = False
        self._last_write = 0.0
        self._phase_began = 0.0

    def start_clock(self, args: TrainingArguments) -> None:
        """Starts measuring the time of a run."""
        self._folder, self._writes = str(args.output_dir), args.process_index == 0
        self._has_ended = False
        self._last_write = self._phase_began = time.monotonic()

    def begin(self, record: RunRecord) -> None:
        """Starts a new record. It includes the evaluations from before training."""
        self.record, self.has_begun = record, True
        record.evaluations = list(self._earlier_evaluations)

    def resume(self, record: RunRecord) -> None:
        """Continues the record of a checkpoint."""
        self.record, self.has_begun = record, True

    def add_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Adds an evaluation of the Trainer."""
        (self.record.evaluations if self.has_begun else self._earlier_evaluations).append(evaluation)

    def describe_evaluation(self, metrics: Mapping[str, float], eval_dataloader: Any) -> None:
        """Adds a description of the evaluation text, once for each data set."""
        prefix = next((name for name in metrics if name.endswith("_loss")), "eval_loss")
        name = prefix.removesuffix("_loss").removeprefix("eval").strip("_")  # if there are several data sets
        use = f"evaluation ({name})" if name else "evaluation"
        if use not in self.record.texts:
            self.record.texts[use] = describe_text(eval_dataloader)

    def add_phase(self, phase: Phase, began: float) -> None:
        """Adds a phase that started at `began`, a time of `time.monotonic`."""
        self.record.phases.append(phase)
        self._phase_began = began

    def end_phase(self, healed: dict[str, float] | None) -> None:
        """Adds the evaluation at the end of the present phase."""
        phase = self.record.phases[-1]
        phase.healed = healed
        phase.seconds = round(time.monotonic() - self._phase_began, 2)
        self.write()

    def warn(self, warning: str | None) -> None:
        """Logs a warning and adds it to the record. Does nothing for None."""
        if warning is not None:
            self.record.warnings.append(warning)
            logger.warning(warning)

    def stop(self, reason: str) -> None:
        """Adds the reason why no more layers are removed."""
        self.record.stopped = reason
        logger.warning(reason)

    def end(self, log: list[dict[str, Any]]) -> None:
        """Adds the end of the run and the log of the Trainer."""
        self.record.log = log
        self.record.finished = True
        self.write()
        self._has_ended = True

    def write(self) -> None:
        """Writes the record into the output folder."""
        if not self._has_ended:
            now = time.monotonic()
            self.record.seconds = round(self.record.seconds + now - self._last_write, 2)
            self._last_write = now
        self.record.peak_memory_mb = max(self.record.peak_memory_mb, peak_memory_mb())
        if self._writes:
            write_record(self.record, self._folder)
