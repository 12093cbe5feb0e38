"""The Trainer callback that removes layers during training."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from ..data.batches import take_rows
from ..distillation.arguments import DistillationTrainingArguments, quieten_replicas
from ..errors import LayerPruneError
from ..reports.record import RunRecord
from ..scoring.score import check_choices
from ..surgery.decoder import is_sharded
from ..surgery.lineage import get_lineage
from .arguments import PruningArguments, make_arguments
from .compatibility import check_restores_no_callbacks
from .other_callbacks import move_before_printing, trainer_warnings
from .prune import Evaluation, run_evaluation
from .reconstruction import forget_original
from .recorder import Recorder
from .resume import (
    callback_states,
    check_depth_of_weights,
    check_groups_of_checkpoint,
    checkpoint_folder,
    target_of_run,
)
from .run import PruningInputs, PruningRun
from .start import begin_record, check_start, start_run
from .target import resolve_target
from .termination import Termination


logger = logging.getLogger(__name__)


class LayerPruningCallback(TrainerCallback, ExportableState):
    """Removes the least important decoder layers of a model in training, phase by phase.

    Each phase scores every layer, removes the least important layer, and trains the pruned model (Iterative
    Layer-wise Distillation, 2511.05085, section 3). A layer is removed at the START of a step. The evaluation
    and the checkpoint at the end of a phase therefore see the healed model. The optimizer drops the removed
    parameters and keeps the state of all other parameters. The run record is written to `layer_pruning.json`
    in the output folder. Checkpoints hold it in the state of the Trainer.

    The callback works in [`DistillationTrainer`] and in a plain [`~transformers.Trainer`]. For a plain
    Trainer, call `callback.set_trainer(trainer)` before `trainer.train()`. The callback then warns about
    other callbacks that hold parameters, reports scores, for example to TensorBoard, and can take rows of
    `eval_dataset` as calibration data.

    At SIGTERM the run writes a checkpoint after the present step and exits with code 143. If it is scoring
    layers, it exits at once. `resume_from_checkpoint=True` continues the run.

    Args:
        args ([`PruningArguments`], *optional*):
            Settings that control which layers are removed, and when.
        calibration (*optional*):
            Text to score layers on: a data set like the training data, batches, or another form that
            [`make_batches`] accepts. Text is tokenised with the Trainer's `processing_class`. Default: up to
            256 rows of the Trainer's `eval_dataset`.
        task (`Callable` or `evaluate.EvaluationModule`, *optional*):
            For `criterion="task"`: a function `score(model) -> float`, higher is better, or a metric.
        teacher (`PreTrainedModel`, *optional*):
            The teacher that scores layers, see [`score_layers`].
        evaluation (`Callable`, *optional*):
            A function `evaluation(model) -> dict[str, float]`. It evaluates the starting model and the model
            after each cut and after each healing. The results are written to the record.
        verify_save (`bool`, *optional*, defaults to `True`):
            Load each checkpoint and each saved model again, as one more model in memory, and stop if its
            logits differ. The weights stay on disk. [`DistillationTrainer`] has its own setting.
        settings (*optional*):
            Fields of [`PruningArguments`] by name, instead of `args`.

    Raises:
        LayerPruneError: a setting is invalid. Some settings can only be checked in `trainer.train()`, before
            any training.
    """

    def __init__(
        self,
        args: PruningArguments | None = None,
        *,
        calibration: Any = None,
        task: Any = None,
        teacher: PreTrainedModel | None = None,
        evaluation: Evaluation | None = None,
        verify_save: bool = True,
        **settings: Any,
    ) -> None:
        self.args = make_arguments(PruningArguments, args, settings)
        check_choices(self.args.criterion, task, teacher, self.args.pattern, self.args.racing)
        self.inputs = PruningInputs(self.args, calibration, task, teacher, evaluation, verify_save)
        self.trainer: Trainer | None = None
        self._recorder = Recorder()
        self._termination = Termination()
        self._loading_hooks: list[Any] = []  # until training begins
        self._run: PruningRun | None = None
        self._shows_tokens = False

    @property
    def record(self) -> RunRecord:
        """Returns the record of the run so far."""
        return self._recorder.record

    def set_trainer(self, trainer: Trainer) -> None:
        """Sets the Trainer. [`DistillationTrainer`] calls this method itself."""
        move_before_printing(self, trainer.callback_handler.callbacks)
        self.trainer = trainer

    def _resolve_target(self, model: PreTrainedModel) -> None:
        self.args = self.inputs.args = resolve_target(self.args, model)

    def state(self) -> dict[str, Any]:
        """Returns the settings and the record, which the Trainer writes into a checkpoint."""
        return {"args": asdict(self.args), "attributes": {"record": self.record.to_dict()}}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Prepares the callback for a new Trainer."""
        quieten_replicas(args)
        check_restores_no_callbacks(args)
        is_open = self.inputs.args.target_layers is None and model is not None
        if is_open and not get_lineage(model).removed:  # a run with a pruned model may be resumed
            self._resolve_target(model)
        self.trainer, self._recorder, self._loading_hooks = None, Recorder(), []
        if model is not None and not isinstance(args, DistillationTrainingArguments):  # that trainer cuts it
            check = partial(check_depth_of_weights, str(args.output_dir))
            self._loading_hooks.append(model.register_load_state_dict_pre_hook(check))
        if optimizer is not None:  # the user's own optimizer, with any groups
            self._loading_hooks.append(
                optimizer.register_load_state_dict_pre_hook(check_groups_of_checkpoint)
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Checks all settings, and starts or resumes the run."""
        assert model is not None
        for hook in self._loading_hooks:
            hook.remove()
        self._loading_hooks = []
        quieten_replicas(args)
        name, states = type(self).__name__, callback_states(state)
        if isinstance(states.get(name), list):
            raise LayerPruneError(f"The Trainer has more than one {name}: give it only one.")
        if state.global_step:
            self.args = target_of_run(self.args, args, state, model)
        self._resolve_target(model)
        check_start(self.inputs, self.trainer, args, state, model, optimizer)
        self._termination.install(self.trainer)
        begin_record(self._recorder, self.inputs, args, state, model)
        states[name] = self.state()  # a checkpoint of an earlier version has no state
        if isinstance(self.inputs.calibration, Iterator):  # a later call of train() reads it again
            self.inputs.calibration = take_rows(self.inputs.calibration)
        self._shows_tokens = args.include_num_input_tokens_seen != "no"
        self._run = start_run(
            self.inputs, self._recorder, self._termination, self.trainer, args, state, model, **kwargs
        )
        self._run.restart_learning_rate(state, model)
        if not state.global_step:
            self.record.dense = run_evaluation(self.inputs.evaluation, model)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Removes layers if a phase begins."""
        assert model is not None
        assert self._run is not None
        if not self._run.is_phase_due(state, model):
            return
        if self.trainer is not None and not self.record.phases:
            for warning in trainer_warnings(self.trainer, self, model):
                self._recorder.warn(warning)
        self._run.start_phase(args, state, control, model, optimizer)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Ends a phase that is over. After SIGTERM, saves a checkpoint and stops training."""
        assert model is not None
        assert self._run is not None
        if self._termination.is_requested(args):
            logger.warning("SIGTERM: saving a checkpoint of step %d, then exiting.", state.global_step)
            control.should_save = control.should_training_stop = True
        if args.include_num_input_tokens_seen != "no":
            self.record.texts["healing"]["tokens"] = state.num_input_tokens_seen
        self._run.end_step(args, state, control, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prevents a checkpoint of a model with restored layers, because the optimizer does not have them."""
        if self.record.undone is not None:
            control.should_save = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the present number of layers to the training logs, and monitors the loss."""
        if model is None or logs is None or "loss" not in logs or self._run is None or not state.log_history:
            return
        layers = {"layers": len(get_lineage(model).kept)}
        state.log_history[-1] |= layers
        logs |= layers  # for later callbacks, for example the printing callback
        if not self._shows_tokens:  # tokens are counted only for the record
            for name in ("num_input_tokens_seen", "train_runtime", "train_tokens_per_second"):
                logs.pop(name, None)
        self._run.output.report(args, state, control, model, layers)
        # With float16, gradients that are not finite are normal: they adjust the loss scale.
        norm = 0.0 if args.fp16 else logs.get("grad_norm", 0.0)
        self._recorder.warn(self._run.losses.check(logs["loss"], norm))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records an evaluation."""
        if model is None:
            return
        layers = len(get_lineage(model).kept)
        self._recorder.add_evaluation({"step": state.global_step, "layers": layers, **(metrics or {})})
        if not self._recorder.has_begun:
            return
        if self.inputs.evaluation is None:
            self._recorder.describe_evaluation(metrics or {}, kwargs.get("eval_dataloader"))
        self._recorder.write()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the config of a sharded model, as the Trainer may have saved only its shards."""
        assert model is not None
        if state.is_world_process_zero and is_sharded(model):
            model.config.save_pretrained(checkpoint_folder(args, state))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Ends the run, and the process after SIGTERM."""
        assert model is not None
        assert self._run is not None
        self._termination.uninstall()
        if state.global_step < state.max_steps:
            self._termination.end_process()
        is_over = state.global_step >= state.max_steps or self.record.stopped is not None
        self._run.end(state, model)
        forget_original(args, is_over)
