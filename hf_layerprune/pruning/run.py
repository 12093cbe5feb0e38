"""Runs the phases of a training run: removals, evaluations, and the end of the run."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ..data.targets import Batch
from ..reports.record import Removal
from ..scoring.criteria import find_criterion
from ..scoring.prefix_cache import PrefixCache
from ..scoring.score import reads_text
from ..scoring.table import ScoreTable
from ..surgery.decoder import is_sharded
from ..surgery.lineage import get_lineage
from .arguments import PruningArguments
from .compatibility import drop_removed_parameters
from .diagnostics import LossMonitor, no_recovery, removal_too_costly
from .other_callbacks import TrainerOutput
from .prune import (
    Evaluation,
    phase_entry,
    remove_least,
    run_evaluation,
    score_present,
    scoring_settings,
)
from .reconstruction import PhaseReconstruction
from .recorder import Recorder
from .recovery import Recovery
from .schedule import PhaseSchedule
from .termination import Termination


JOURNAL_NAME = "scoring.jsonl"  # file of the scores so far at the start of a phase


@dataclass
class PruningInputs:
    """The inputs of [`LayerPruningCallback`].

    Args:
        args ([`PruningArguments`]): the settings.
        calibration, task, teacher, evaluation, verify_save: see [`LayerPruningCallback`].
    """

    args: PruningArguments
    calibration: Any = None
    task: Any = None
    teacher: PreTrainedModel | None = None
    evaluation: Evaluation | None = None
    verify_save: bool = True

    @property
    def reads_text(self) -> bool:
        """Returns whether layers are scored on text."""
        return reads_text(self.args.criterion, self.task)


@dataclass
class PruningRun:
    """Removes layers from a model in training and records the removals.

    Args:
        inputs ([`PruningInputs`]): settings and functions of the user.
        recorder ([`Recorder`]): writes the record.
        schedule ([`PhaseSchedule`]): decides when phases start and end.
        batches (`list[dict]`): the calibration data.
        output ([`TrainerOutput`]): prints and reports removals.
        termination ([`Termination`]): ends the process at once while layers are scored.
        losses ([`LossMonitor`]): monitors the loss.
        recovery ([`Recovery`], *optional*): undoes a phase that recovers too little.
        reconstruction ([`PhaseReconstruction`], *optional*): trains the layers next to a new cut.
    """

    inputs: PruningInputs
    recorder: Recorder
    schedule: PhaseSchedule
    batches: list[Batch]
    output: TrainerOutput
    termination: Termination
    losses: LossMonitor
    recovery: Recovery | None = None
    reconstruction: PhaseReconstruction | None = None

    def excess(self, model: PreTrainedModel) -> int:
        """Returns the number of layers that remain to be removed."""
        return len(get_lineage(model).kept) - self.inputs.args.target_layers

    def is_last_phase(self, model: PreTrainedModel) -> bool:
        """Returns whether no more layers will be removed."""
        return not self.excess(model) or self.recorder.record.stopped is not None

    def is_phase_due(self, state: TrainerState, model: PreTrainedModel) -> bool:
        """Returns whether a phase is over and another phase follows. The first phase starts at once."""
        is_over = not self.recorder.record.phases or self.schedule.is_over(state)
        return is_over and not self.is_last_phase(model)

    def restart_learning_rate(self, state: TrainerState, model: PreTrainedModel) -> None:
        """Starts the learning rate schedule again, if the settings ask for it."""
        self.schedule.restart_learning_rate(state, self.is_last_phase(model))

    def start_phase(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        optimizer: Any,
    ) -> None:
        """Starts a phase: removes its layers from `model` and their parameters from `optimizer`, in place."""
        began, number = time.monotonic(), len(self.recorder.record.phases) + 1
        removals: list[Removal] = []
        prefix_cache = PrefixCache()
        before = 0.0 if self.recovery is None else self.recovery.keep(model, number)
        for _ in range(self.schedule.next_size(len(get_lineage(model).kept))):
            table = self._score(args, state, model, prefix_cache, is_first=not removals)
            if self._is_below_floor(table.quality, state):
                break
            if not removals:
                self._check_recovery(table.quality)
            removals += remove_least(model, table)
            drop_removed_parameters(optimizer, model)
            self._print(state, model, removals[-1])
            self._check_cost(removals, model)
            self.output.report(args, state, control, model, _reported(table, removals[-1]))
        if removals:
            phase = phase_entry(model, state.global_step, removals, self.inputs.evaluation)
            phase.tokens = state.num_input_tokens_seen
            if self.recovery is not None:
                phase.qualities = {"before": before, "cut": self.recovery.measure(model)}
            if self.reconstruction is not None:
                with self.termination.immediate():  # reconstruction has its own checkpoint
                    removed = [removal.original for removal in removals]
                    phase.reconstruction = self.reconstruction.run(model, removed, number)
            self.recorder.add_phase(phase, began)
            forget_best_model(state)
            self.losses.start_phase()
        elif self.recovery is not None:
            self.recovery.drop(number)
        self.restart_learning_rate(state, model)
        # From here on the folder holds a run. After an earlier error the folder can be used again.
        self.recorder.write()

    def _print(self, state: TrainerState, model: PreTrainedModel, removal: Removal | None = None) -> None:
        """Prints a removal. Without a removal, prints the last loss at the end of training."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        score = None if removal is None else removal.score
        cells = {
            "step": str(state.global_step),
            "layers": str(len(get_lineage(model).kept)),
            "removed": "" if removal is None else str(removal.original),
            f"{self.inputs.args.criterion} score": "" if score is None else f"{score:.4g}",
            "training loss": f"{losses[-1]:.4g}" if losses else "",
        }
        self.output.print_row(state, cells)

    def _score(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: PreTrainedModel,
        prefix_cache: PrefixCache,
        is_first: bool,
    ) -> ScoreTable:
        """Scores the layers. The first scoring of a phase comes directly after a checkpoint."""
        # A journal is named by samples of whole weights. No process has the whole weights of a sharded model.
        journal = None if is_sharded(model) else Path(str(args.output_dir)) / JOURNAL_NAME
        with self.termination.immediate(is_first):
            return score_present(
                model,
                self.batches,
                self.inputs.args.criterion,
                self.recorder.record.pruning["protected_originals"],
                task=self.inputs.task,
                teacher=self.inputs.teacher,
                journal=journal,
                prefix_cache=prefix_cache,
                progress=not args.disable_tqdm and state.is_local_process_zero,
                **scoring_settings(self.inputs.args),
            )

    def _is_below_floor(self, quality: float | None, state: TrainerState) -> bool:
        floor = self.inputs.args.quality_floor
        if floor is None or quality is None or quality >= floor:
            return False
        self.recorder.stop(
            f"No layer was removed after step {state.global_step}: the score {quality:.4f} is below "
            f"the quality floor {floor}."
        )
        return True

    def _check_recovery(self, quality: float | None) -> None:
        """Warns if the previous phase recovered almost nothing."""
        phases = self.recorder.record.phases
        tables = [removal.table for removal in phases[-1].removals if removal.table] if phases else []
        if quality is None or not tables or tables[0].quality is None or tables[-1].quality is None:
            return
        cut = tables[-1].quality - (phases[-1].removals[-1].score or 0.0)
        self.recorder.warn(no_recovery(tables[0].quality, cut, quality))

    def _check_cost(self, removals: list[Removal], model: PreTrainedModel) -> None:
        """Warns if the last removed layer was essential. The scores must be the cost of a removal."""
        if not find_criterion(self.inputs.args.criterion).score_is_cost:
            return
        *earlier, cost = [one.score or 0.0 for one in self.recorder.record.removals + removals]
        left = len(get_lineage(model).kept)
        self.recorder.warn(removal_too_costly(earlier, cost, removals[-1].original, left))

    def end_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
    ) -> None:
        """Ends the present phase if it is over, and ends training if the phase recovered too little."""
        if not self.recorder.record.phases or not self.is_phase_due(state, model):
            return
        if not self.has_recovered(model):
            control.should_training_stop, control.should_save = True, False
            forget_best_model(state)
            return
        self.end_phase(model)
        control.should_evaluate |= args.eval_strategy != "no"
        control.should_save |= args.save_strategy != "no"

    def has_recovered(self, model: PreTrainedModel) -> bool:
        """Returns whether the present phase recovered enough. If not, restores the model from before it."""
        phases = self.recorder.record.phases
        if self.recovery is None or not phases:
            return True
        message = self.recovery.go_back(model, phases[-1], len(phases))
        if message is None:
            return True
        self.recorder.record.undone = phases.pop()
        self.recorder.stop(message)
        return False

    def end_phase(self, model: PreTrainedModel) -> None:
        """Evaluates the model at the end of a phase."""
        if self.recorder.record.phases and self.recorder.record.phases[-1].healed is None:
            self.recorder.end_phase(run_evaluation(self.inputs.evaluation, model))

    def end(self, state: TrainerState, model: PreTrainedModel) -> None:
        """Ends the run."""
        record = self.recorder.record
        if record.stopped is None:
            self.has_recovered(model)
        self.end_phase(model)
        self._print(state, model)
        if self.recovery is not None:
            self.recovery.forget(len(record.phases))
        excess = self.excess(model)
        if excess and record.stopped is None:
            self.recorder.stop(
                f"Training ended at step {state.global_step} with {excess} layers still to remove."
            )
        self.recorder.end(state.log_history)


def forget_best_model(state: TrainerState) -> None:
    """Clears the best metric, because it belongs to another depth. Early stopping starts again."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _reported(table: ScoreTable, removal: Removal) -> dict[str, float]:
    """Returns the numbers of a removal and its scores for reporting."""
    scores = {f"{table.criterion}_score/layer_{table.kept[i]:02d}": s for i, s in table.scores.items()}
    quality = {} if table.quality is None else {"quality": table.quality}
    return scores | quality | {"removed_layer": removal.original, "removed_score": removal.score or 0.0}
