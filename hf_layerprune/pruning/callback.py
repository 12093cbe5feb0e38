"""Taking layers out of a model while a Trainer trains it."""

import logging
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, reduce
from datasets import Dataset
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..checkpoints.saving import check_saves
from ..data import Batch, columns_read, make_batches, most_tokens, take_rows
from ..distillation.arguments import DistillationTrainingArguments, quieten_replicas
from ..distillation.teacher import check_tokens
from ..errors import LayerPruneError
from ..reports.record import (
    RECORD_NAME,
    Record,
    check_folder_is_free,
    check_same_settings,
    count_tokens,
    describe_text,
    describe_texts,
    peak_memory_mb,
    read_record,
    start_record,
    write_record,
)
from ..scoring.leave_one_out import Prefixes
from ..scoring.score import LEAVE_ONE_OUT, check_choices, check_criterion_fits, reads_text
from ..scoring.table import ScoreTable
from ..surgery.decoder import is_sharded
from ..surgery.lineage import get_lineage, plain_int
from ..surgery.peft import adapter_configs, base_of, keep_base_known
from .compatibility import (
    check_backend,
    check_depth_of_checkpoint,
    check_groups_of_checkpoint,
    check_parameters_stay,
    check_same_depth,
    drop_removed_parameters,
    loss_is_known,
    neighbours,
    parameter_keepers,
    printers_after,
    trainer_of,
)
from .diagnostics import exploded, no_recovery, steep_fall
from .prune import (
    Evaluation,
    check_plan,
    phase_entry,
    plain_settings,
    remove_least,
    run_evaluation,
    score_present,
)
from .recovery import Recovery
from .schedule import RestartedSchedule, phase_sizes


logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM  # the exit code of a process that SIGTERM ended
SCORING_NAME = "scoring.jsonl"  # scores so far, while a phase begins
EVALUATION_ROWS = 256  # of eval_dataset, to score with where no calibration is given


class LayerPruningCallback(TrainerCallback):
    """Removes the least important decoder layers of the model in training, phase by phase.

    Iterative Layer-wise Distillation (2511.05085, section 3): each phase scores every layer, removes
    the least important one, and trains what is left. A layer goes at the START of a step, so that the
    evaluation and the checkpoint at the end of a phase see the healed model. The optimizer forgets the
    removed parameters and keeps its state of all others. Works in [`DistillationTrainer`] and in a plain
    [`~transformers.Trainer`]. The run record is written to `layer_pruning.json` in the output folder.

    At SIGTERM the run writes a checkpoint after the step it is in, and exits with code 143 (in scoring at
    once); `resume_from_checkpoint=True` goes on.

    Args:
        target_layers (`int`):
            How many layers the model shall have in the end.
        criterion (`str`, *optional*, defaults to `"loss"`):
            What makes a layer important: `"loss"`, `"kl"`, `"block_influence"`, `"task"` or another one of
            [`score_layers`].
        calibration (*optional*):
            Text to score with: a data set like the training one, ready batches, or another form that
            [`make_batches`] knows. Text is tokenised with the Trainer's `processing_class`. Left out, up to
            256 rows of the Trainer's `eval_dataset`.
        task (`Callable` or `evaluate.EvaluationModule`, *optional*):
            For `criterion="task"`: a function `score(model) -> float`, higher is better, or a metric.
        racing, teacher, pattern, seed (*optional*):
            As for [`score_layers`].
        layers_per_phase (`int` or `float`, *optional*, defaults to 1):
            Layers to remove before training goes on, or a share of those present, as 0.3 (Minitron,
            2407.14679); all are scored again after each. As many as shall go make one phase.
        steps_per_phase (`int`, *optional*):
            Training steps after each removal; left out, all steps are shared out equally. Steps that
            remain go to the last phase.
        tokens_per_phase (`int`, *optional*):
            Instead, so many tokens of all processes, without padding.
        restart_learning_rate (`bool`, *optional*, defaults to `False`):
            Each phase runs through the whole learning rate schedule, warm-up included; otherwise the run
            does once.
        protected (iterable of `int`, *optional*):
            Layers that stay, as indices in the starting model; left out, the first and the last.
        quality_floor (`float`, *optional*):
            Stop removing when the model's score is below this at the start of a phase: the task's
            score, or for `"loss"` minus the loss in nats per token.
        min_recovery (`float`, *optional*):
            For `"loss"` and `"task"`: the share of what its removals cost that a phase must win back, by its
            end, on the calibration data. Otherwise the run ends with the model as it was before that phase,
            layers put back; until then a copy of it lies in the output folder.
        evaluation (`Callable`, *optional*):
            A function `evaluation(model) -> dict[str, float]` whose results go into the record: of the
            starting model, after each cut and after each healing.
        verify_save (`bool`, *optional*, defaults to `True`):
            Load each checkpoint and each saved model again, as one more model in memory, and stop if its
            logits differ. The weights stay on disk. [`DistillationTrainer`] has a setting of its own.

    Raises:
        LayerPruneError: a setting that cannot work, from `trainer.train()`, before any training.
    """

    def __init__(
        self,
        *,
        target_layers: int,
        criterion: str = "loss",
        calibration: Any = None,
        task: Any = None,
        racing: float | None = None,
        teacher: PreTrainedModel | None = None,
        pattern: str = "output",
        seed: int = 0,
        layers_per_phase: int | float = 1,
        steps_per_phase: int | None = None,
        tokens_per_phase: int | None = None,
        restart_learning_rate: bool = False,
        protected: Iterable[int] | None = None,
        quality_floor: float | None = None,
        min_recovery: float | None = None,
        evaluation: Evaluation | None = None,
        verify_save: bool = True,
    ) -> None:
        target_layers, layers_per_phase = plain_int(target_layers), plain_int(layers_per_phase)
        steps_per_phase, tokens_per_phase = plain_int(steps_per_phase), plain_int(tokens_per_phase)
        for name, value in {
            "target_layers": target_layers,
            "layers_per_phase": layers_per_phase,
            "steps_per_phase": 1 if steps_per_phase is None else steps_per_phase,
            "tokens_per_phase": 1 if tokens_per_phase is None else tokens_per_phase,
        }.items():
            is_share = name == "layers_per_phase" and isinstance(value, float) and 0 < value < 1
            if not is_share and (type(value) is not int or value < 1):
                raise LayerPruneError(
                    f"{name} is {value!r}: it must be a whole number of at least 1"
                    + (", or a share between 0 and 1." if name == "layers_per_phase" else ".")
                )
        if steps_per_phase is not None and tokens_per_phase is not None:
            raise LayerPruneError("Give steps_per_phase or tokens_per_phase, not both.")
        for name, bound in {"quality_floor": quality_floor, "min_recovery": min_recovery}.items():
            if bound is not None and criterion not in ("loss", "task"):
                raise LayerPruneError(f"{criterion} measures no quality: leave {name} out.")
        if min_recovery is not None and not 0 < min_recovery < float("inf"):
            raise LayerPruneError(f"min_recovery is {min_recovery}: it is a share, as 0.5.")
        self.target_layers = target_layers
        self.criterion = criterion
        self.calibration = calibration
        self.task = task
        self.scoring = {"racing": racing, "teacher": teacher, "pattern": pattern, "seed": seed}
        check_choices(criterion, task, teacher, pattern, racing)
        self.layers_per_phase = layers_per_phase
        self.steps_per_phase = steps_per_phase
        self.tokens_per_phase = tokens_per_phase
        self.restart_learning_rate = restart_learning_rate
        self.protected = None if protected is None else [plain_int(layer) for layer in protected]
        self.quality_floor = quality_floor
        self.min_recovery = min_recovery
        self.evaluation = evaluation
        self.verify_save = verify_save
        self.record: Record = {}
        self._evaluations: list[dict[str, Any]] = []  # from before training
        self._hooks: list[Any] = []  # until training begins

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        quieten_replicas(args)
        self._hooks = []
        self.record, self._evaluations = {}, []  # of a run in another Trainer
        if model is not None and not isinstance(args, DistillationTrainingArguments):  # whose trainer cuts it
            self._hooks.append(model.register_load_state_dict_pre_hook(check_depth_of_checkpoint))
        if optimizer is not None:  # the user's own, with groups of any kind
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(check_groups_of_checkpoint))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        check_criterion_fits(base_of(model), self.criterion, self.task)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        quieten_replicas(args)
        check_backend(args, model, optimizer)
        self._loss_is_known = loss_is_known(trainer_of(self), args)
        if self.min_recovery is not None and (adapter_configs(model) or is_sharded(model)):
            raise LayerPruneError(
                "min_recovery puts layers back, but not under adapters or in sharded models: leave it out."
            )
        self._terminated, self._scores = False, False
        self._runs_away, self._losses = False, list[float]()
        is_main = threading.current_thread() is threading.main_thread()
        present = signal.getsignal(signal.SIGTERM)
        # Somebody else's handler stays, but not ours of a run that broke off.
        ours = getattr(present, "__func__", None) is LayerPruningCallback._on_sigterm
        if is_main and (ours or present is signal.SIG_DFL):
            signal.signal(signal.SIGTERM, self._on_sigterm)
        self._began = self._phase_began = time.monotonic()
        self._ended = False
        if state.global_step:
            self.record = _resumed_record(args, state, model, self._settings())
        else:
            check_folder_is_free(str(args.output_dir), resume="resume_from_checkpoint=True")
            fixed = check_plan(model, self.target_layers, self.protected)
            check_parameters_stay(model)
            self.record = start_record(model, self._settings() | {"protected_originals": fixed}, args)
            self.record["evaluations"] = list(self._evaluations)
        if adapter_configs(model):
            keep_base_known(model)
        if self.verify_save and not isinstance(args, DistillationTrainingArguments):  # which does by itself
            check_saves(model)
        teacher: Any = self.scoring["teacher"]
        if teacher is not None:
            check_tokens(teacher, base_of(model), kwargs.get("processing_class"))
        self._plan_phases(args, state)
        self._schedule = (
            RestartedSchedule(lr_scheduler, state.max_steps) if self.restart_learning_rate else None
        )
        self._restart_learning_rate(state, model)
        self._neighbours, self._printers = neighbours(self), printers_after(self)
        tokenizer = kwargs.get("processing_class")
        self._batches = self._calibration_batches(args, train_dataloader, model, tokenizer)
        self._describe_texts(train_dataloader)
        self._shows_tokens = args.include_num_input_tokens_seen != "no"
        counted = count_tokens(args, train_dataloader.dataset, tokenizer)
        if self.tokens_per_phase is not None and not counted:
            raise LayerPruneError(
                "tokens_per_phase is set, but the training data has no input_ids: its tokens cannot be "
                "counted. Set steps_per_phase instead."
            )
        self._recovery = None
        if self.min_recovery is not None:
            self._recovery = Recovery(self.min_recovery, str(args.output_dir), self._batches, self.task)
            self._recovery.check(len(self.record["phases"]))
        if not state.global_step:
            self.record["dense"] = run_evaluation(self.evaluation, model)

    def _describe_texts(self, train_dataloader: Any) -> None:
        read = self._batches if reads_text(self.criterion, self.task) else []
        texts = describe_texts(self.calibration, read, self.evaluation)
        texts["healing"] = {"name": describe_text(train_dataloader)["name"]}
        self.record["texts"] = {**texts, **self.record.get("texts", {})}  # of a run that goes on

    def _plan_phases(self, args: TrainingArguments, state: TrainerState) -> None:
        """How many steps a phase has, unless tokens are counted."""
        layers = self.record["model"]["layers"]
        phases = len(phase_sizes(layers, self.target_layers, self.layers_per_phase))
        if self.tokens_per_phase is not None:
            self._steps = 1
        else:
            self._steps = self.steps_per_phase or state.max_steps // phases
        if not 1 <= self._steps * phases <= state.max_steps:
            raise LayerPruneError(
                f"Removing {layers - self.target_layers} layers takes {phases} phases of at least "
                f"{max(1, self._steps)} steps, but training has {state.max_steps} steps: train longer "
                "or remove more layers per phase."
            )
        planned = self.record["pruning"].setdefault("phase_steps", self._steps)
        if planned != self._steps:
            raise LayerPruneError(
                f"The run was started with phases of {planned} steps, now it would go on with "
                f"{self._steps}: resume with the same max_steps and steps_per_phase."
            )

    def _share_over(self, state: TrainerState, step: int) -> float:
        """How much of the present phase, which is not the last, is over at a step."""
        phase = self.record["phases"][-1]
        if self.tokens_per_phase is not None:
            return (state.num_input_tokens_seen - phase["tokens"]) / self.tokens_per_phase
        return (step - phase["step"]) / self._steps

    def _restart_learning_rate(self, state: TrainerState, model: PreTrainedModel) -> None:
        """Let the present phase, if there is one, run through the whole schedule."""
        if self._schedule is None or not self.record["phases"]:
            return
        first = self.record["phases"][-1]["step"]
        is_last = not self._excess(model) or self.record["stopped"]

        def share(step: int) -> float:
            return (step - first) / (state.max_steps - first) if is_last else self._share_over(state, step)

        self._schedule.restart(share)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        trains = any(one.f_code.co_name == "_inner_training_loop" for one, _ in traceback.walk_stack(frame))
        # Scoring is noted as it goes on, and comes right after a checkpoint.
        if self._scores or not trains:
            raise SystemExit(TERMINATED)
        self._terminated = True

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        phases, excess = self.record["phases"], self._excess(model)
        over = not phases or self._share_over(state, state.global_step) >= 1
        if not over or not excess or self.record["stopped"]:
            return
        began = time.monotonic()
        removals: list[dict[str, Any]] = []
        prefixes = Prefixes()
        self._look_around(model)
        before = self._recovery and self._recovery.keep(model, len(phases) + 1)
        for _ in range(
            phase_sizes(excess + self.target_layers, self.target_layers, self.layers_per_phase)[0]
        ):
            self._scores = not removals
            with self._journal(args, model) as journal:
                table = score_present(
                    model,
                    self._batches,
                    self.criterion,
                    self.record["pruning"]["protected_originals"],
                    task=self.task,
                    journal=journal,
                    prefixes=prefixes,
                    progress=not args.disable_tqdm and state.is_local_process_zero,
                    **self.scoring,
                )
            self._scores = False
            [table] = broadcast_object_list([table])  # of one process, as all must remove the same
            if self._below_floor(table.quality, state):
                break
            if not removals:
                self._look_back(table.quality)
            removals += remove_least(model, table)
            drop_removed_parameters(optimizer, model)
            self._print_removal(args, state, control, removals[-1], len(get_lineage(model).kept))
            self._look_at(removals, model)
            self._report(args, state, control, model, _scalars(table, removals[-1]))
        if self._recovery and not removals:
            self._recovery.drop(len(phases) + 1)
        if removals:
            entry = phase_entry(model, state.global_step, removals, self.evaluation)
            entry["tokens"] = state.num_input_tokens_seen
            if self._recovery:
                entry["qualities"] = {"before": before, "cut": self._recovery.measure(model)}
            phases.append(entry)
            self._phase_began = began
            # What was best is not of this depth: early stopping begins anew.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            self._runs_away, self._losses = False, []
        self._restart_learning_rate(state, model)
        # From here on the folder holds a run; a mistake found before leaves it free for another try.
        self._write(args)

    @contextmanager
    def _journal(self, args: TrainingArguments, model: PreTrainedModel) -> Iterator[Path | None]:
        """Where scores are noted: by the main process in the output folder; the others have a copy, so that
        all leave out the same work and none waits for another. Nowhere if all must run each forward pass."""
        if is_sharded(model):
            yield None
            return
        path = Path(str(args.output_dir)) / SCORING_NAME
        found = path.read_bytes() if args.process_index == 0 and path.exists() else None
        [found] = broadcast_object_list([found])
        if args.process_index == 0:
            yield path
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / SCORING_NAME
            if found is not None:
                copy.write_bytes(found)
            yield copy

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if self._is_terminated(args):
            logger.warning("SIGTERM: a checkpoint of step %d, and the end.", state.global_step)
            control.should_save = control.should_training_stop = True
        if args.include_num_input_tokens_seen != "no":
            self.record["texts"]["healing"]["tokens"] = state.num_input_tokens_seen
        over = self.record["phases"] and self._share_over(state, state.global_step) >= 1
        if not over or not self._excess(model) or self.record["stopped"]:
            return
        if not self._has_recovered(model):
            control.should_training_stop, control.should_save = True, False
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            return
        self._end_phase(model, args)
        control.should_evaluate |= args.eval_strategy != "no"
        control.should_save |= args.save_strategy != "no"

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "undone" in self.record:  # the optimizer knows nothing of the layers that are back
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
        """Add the present depth to what is logged in training."""
        if model is not None and logs is not None and "loss" in logs and state.log_history:
            layers = {"layers": len(get_lineage(model).kept)}
            state.log_history[-1] |= layers
            logs |= layers  # for the callbacks that come after, as that which prints
            if not self._shows_tokens:  # they are counted for the record alone
                for name in ("num_input_tokens_seen", "train_runtime", "train_tokens_per_second"):
                    logs.pop(name, None)
            self._report(args, state, control, model, layers)
            self._losses.append(logs["loss"])
            # With float16, gradients that are no numbers are how its loss scale is found.
            norm = 0.0 if args.fp16 else logs.get("grad_norm", 0.0)
            sign = exploded(self._losses, norm, self._loss_is_known)
            if not self._runs_away:  # told once a phase
                self._tell(sign)
            self._runs_away |= sign is not None

    def _print_removal(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        removal: dict[str, Any],
        layers: int,
    ) -> None:
        """Print a line where the Trainer prints its logs; in our own log only where it prints none."""
        scored = {f"{self.criterion}_score": removal["score"]}
        line = {"removed_layer": removal["original"], **scored, "layers": layers, "step": state.global_step}
        for printer in self._printers:
            if isinstance(printer, (ProgressCallback, PrinterCallback)):
                printer.on_log(args, state, control, logs=dict(line))
            elif state.is_local_process_zero:  # that of notebooks has a table of losses only
                tqdm.write(str(line))
        if not self._printers:
            logger.info("%s", line)

    def _report(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        logs: Mapping[str, float],
    ) -> None:
        """Show numbers where the Trainer's own are shown, as in TensorBoard."""
        kinds = tuple(get_reporting_integration_callbacks(args.report_to))
        for reporter in self._neighbours:
            if isinstance(reporter, kinds):
                reporter.on_log(args, state, control, model=model, logs=logs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            return
        layers = len(get_lineage(model).kept)
        found = {"step": state.global_step, "layers": layers, **(metrics or {})}
        if not self.record:  # an evaluation before training
            self._evaluations.append(found)
            return
        self.record["evaluations"].append(found)
        if self.evaluation is None:
            prefix = next((name for name in metrics or {} if name.endswith("_loss")), "eval_loss")
            kind = prefix.removesuffix("_loss").removeprefix("eval").strip("_")  # of several data sets
            use = f"evaluation ({kind})" if kind else "evaluation"
            if use not in self.record["texts"]:
                self.record["texts"][use] = describe_text(kwargs.get("eval_dataloader"))
        self._write(args)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if self.record and state.is_world_process_zero:
            folder = _checkpoint_folder(args, state)
            write_record(self.record, folder)
            if is_sharded(model):  # one process alone cannot read with it, and may have saved only shards
                model.config.save_pretrained(folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._terminated and state.global_step < state.max_steps:
            raise SystemExit(TERMINATED)
        if not self.record["stopped"]:
            self._has_recovered(model)
        self._end_phase(model, args)
        if self._recovery:
            self._recovery.forget(len(self.record["phases"]))
        left = self._excess(model)
        if left and not self.record["stopped"]:
            self.record["stopped"] = (
                f"Training ended at step {state.global_step} with {left} layers still to remove."
            )
            logger.warning(self.record["stopped"])
        self.record["log"] = state.log_history
        self.record["finished"] = True
        self._write(args)
        self._ended = True

    def _has_recovered(self, model: PreTrainedModel) -> bool:
        """Whether the present phase won back enough; if not, the model is put back to before it."""
        phases = self.record["phases"]
        if self._recovery is None or not phases:
            return True
        undone = self._recovery.go_back(model, phases[-1], len(phases))
        if undone is not None:
            self.record |= {"undone": phases.pop(), "stopped": undone}
            logger.warning(undone)
        return undone is None

    def _look_back(self, quality: float | None) -> None:
        """Say so if the phase before won back next to nothing."""
        if self.record["phases"] and quality is not None:
            done = self.record["phases"][-1]["removals"]
            cut = done[-1]["table"]["quality"] - done[-1]["score"]
            self._tell(no_recovery(done[0]["table"]["quality"], cut, quality))

    def _look_at(self, removals: list[dict[str, Any]], model: PreTrainedModel) -> None:
        """Say so if the last removal was of an essential layer."""
        done = [one for phase in self.record["phases"] for one in phase["removals"]] + removals
        *earlier, fall = [one["score"] for one in done]
        if self.criterion in (*LEAVE_ONE_OUT, "task"):  # whose scores are what a removal costs
            self._tell(steep_fall(earlier, fall, done[-1]["original"], len(get_lineage(model).kept)))

    def _look_around(self, model: PreTrainedModel) -> None:
        """Say so, before the first removal, if another callback or a reference model would not survive it."""
        keepers = parameter_keepers(self._neighbours, model)
        if keepers and not self.record["phases"]:
            self._tell(
                f"{', '.join(keepers)} keeps parameters of the model, or copies of them. It is not told when "
                "layers go, so that what it makes of them would be of another depth, or of no use: look at "
                "what it does, or begin it after the last removal."
            )

        if not self.record["phases"] and adapter_configs(model):
            self._look_at_reference()

    def _look_at_reference(self) -> None:
        """Say so if trl takes the model without its adapters for the reference, as for DPO and GRPO."""
        trainer: Any = trainer_of(self)
        if getattr(trainer, "ref_model", self) is not None:
            return
        args = trainer.args
        if getattr(args, "beta", 0) and not getattr(args, "precompute_ref_log_probs", False):
            self._tell(
                f"The reference of {type(trainer).__name__} is this model without its adapters, so it "
                "loses the same layers. To compare with the original model, train without adapters, or set "
                "precompute_ref_log_probs=True where the trainer has it."
            )

    def _tell(self, sign: str | None) -> None:
        if sign is not None:
            self.record.setdefault("signs", []).append(sign)
            logger.warning(sign)

    def _is_terminated(self, args: TrainingArguments) -> bool:
        """Whether any process was told to end; all end together, as each waits for the others."""
        if args.world_size > 1:
            told = torch.tensor(int(self._terminated), device=args.device)
            self._terminated = bool(reduce(told, "sum"))
        return self._terminated

    def _settings(self) -> dict[str, Any]:
        return {
            "target_layers": self.target_layers,
            "criterion": self.criterion,
            **plain_settings(self.scoring),
            "layers_per_phase": self.layers_per_phase,
            "steps_per_phase": self.steps_per_phase,
            "tokens_per_phase": self.tokens_per_phase,
            "restart_learning_rate": self.restart_learning_rate,
            "protected": self.protected,
            "quality_floor": self.quality_floor,
            "min_recovery": self.min_recovery,
        }

    def _calibration_batches(
        self, args: TrainingArguments, train_dataloader: Any, model: Any, tokenizer: Any
    ) -> list[Batch]:
        if self.calibration is None and not reads_text(self.criterion, self.task):
            return []
        if isinstance(self.calibration, Iterator):  # a later call of train() reads it again
            self.calibration = take_rows(self.calibration)
        # The Trainer has dropped the columns that the model does not read; so do we.
        columns = getattr(train_dataloader.dataset, "column_names", None) or columns_read(base_of(model))
        return make_batches(
            self._evaluation_rows() if self.calibration is None else self.calibration,
            args.per_device_eval_batch_size,
            train_dataloader.collate_fn,
            tokenizer=tokenizer,
            block_length=min(256, most_tokens(base_of(model)) or 256),
            columns=columns,
        )

    def _evaluation_rows(self) -> Any:
        """Rows of the Trainer's `eval_dataset`, evenly spread, of several data sets those of the first."""
        name = "eval_dataset"
        data: Any = getattr(trainer_of(self), name, None)
        if isinstance(data, Mapping) and data:
            first, data = next(iter(data.items()))
            name = f"eval_dataset[{first!r}]"
        if data is None:
            raise LayerPruneError(
                f"The criterion {self.criterion!r} scores on text: give `calibration`, a data set like "
                "the training one or a list of batches, or give the Trainer an eval_dataset."
            )
        if not hasattr(data, "__len__"):
            data = Dataset.from_list(list(islice(data, EVALUATION_ROWS)))
        total, rows = len(data), min(len(data), EVALUATION_ROWS)
        if rows < total:
            spread = [i * total // rows for i in range(rows)]
            data = data.select(spread) if hasattr(data, "select") else Subset(data, spread)
        logger.warning(
            "No calibration is given, so layers are scored on %d rows of %s. Losses on these rows understate "
            "what a removal costs. Give other text as calibration= to avoid this.",
            rows,
            name,
        )
        return data

    def _excess(self, model: PreTrainedModel) -> int:
        return len(get_lineage(model).kept) - self.target_layers

    def _below_floor(self, quality: float | None, state: TrainerState) -> bool:
        if self.quality_floor is None or quality is None or quality >= self.quality_floor:
            return False
        self.record["stopped"] = (
            f"No layer was removed after step {state.global_step}: the score {quality:.4f} is below "
            f"the quality floor {self.quality_floor}."
        )
        logger.warning(self.record["stopped"])
        return True

    def _end_phase(self, model: PreTrainedModel, args: TrainingArguments) -> None:
        if self.record["phases"] and self.record["phases"][-1]["healed"] is None:
            phase = self.record["phases"][-1]
            phase["healed"] = run_evaluation(self.evaluation, model)
            phase["seconds"] = round(time.monotonic() - self._phase_began, 2)
            self._write(args)

    def _write(self, args: TrainingArguments) -> None:
        if not self._ended:
            now = time.monotonic()
            self.record["seconds"] = round(self.record["seconds"] + now - self._began, 2)
            self._began = now
        self.record["peak_memory_mb"] = max(self.record["peak_memory_mb"], peak_memory_mb())
        if args.process_index == 0:
            write_record(self.record, str(args.output_dir))


def _scalars(table: ScoreTable, removal: dict[str, Any]) -> dict[str, float]:
    """What a removal did, as numbers to be drawn over the steps."""
    scores = {f"{table.criterion}_score/layer_{table.kept[i]:02d}": s for i, s in table.scores.items()}
    quality = {} if table.quality is None else {"quality": table.quality}
    return scores | quality | {"removed_layer": removal["original"], "removed_score": removal["score"]}


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _resumed_record(
    args: TrainingArguments, state: TrainerState, model: PreTrainedModel, settings: dict[str, Any]
) -> Record:
    folder = _checkpoint_folder(args, state)
    record = read_record(folder)
    if record is None:  # killed between the Trainer's checkpoint and its record: the folder's is of then
        record = read_record(str(args.output_dir))
        if record and any(phase["step"] >= state.global_step for phase in record["phases"]):
            record = None
    if record is None:
        raise LayerPruneError(
            f"Cannot resume at step {state.global_step}: no {RECORD_NAME} in {folder}. Resume in the "
            "output folder of the run, from one of its own checkpoints."
        )
    check_same_settings(record["pruning"], settings, folder)
    check_same_depth(model, str(folder))
    if args.save_only_model and not (folder / SCHEDULER_NAME).is_file():
        logger.warning(
            "%s was written with save_only_model=True and holds no state of the optimizer and the learning "
            "rate schedule: both begin anew at step %d. Leave save_only_model out to resume exactly.",
            folder,
            state.global_step,
        )
    return record
