"""Taking layers out of a model while a Trainer trains it."""

import logging
import signal
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, reduce
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .adapters import adapter_configs
from .arguments import DistillationTrainingArguments
from .checkpoint import load_lineage
from .data import Batch, make_batches
from .diagnosis import no_recovery, steep_fall
from .errors import LayerPruneError
from .leave_one_out import Prefixes
from .lineage import get_lineage
from .record import (
    RECORD_NAME,
    Record,
    check_folder_is_free,
    peak_memory_mb,
    read_record,
    start_record,
    write_record,
)
from .removal import (
    Evaluation,
    check_plan,
    phase_entry,
    plain_settings,
    remove_least,
    run_evaluation,
    score_present,
)
from .saving import check_reload, write_pruned_base
from .scoring import LEAVE_ONE_OUT, check_choices
from .surgery import possible_cuts


logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM  # the exit code of a process that SIGTERM ended
SCORING_NAME = "scoring.jsonl"  # scores so far, while a phase begins


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
        calibration (`Dataset` or list of batches, *optional*):
            Text to score with: a data set like the training one, or ready batches.
        task (`Callable` or `evaluate.EvaluationModule`, *optional*):
            For `criterion="task"`: a function `score(model) -> float`, higher is better, or a metric.
        racing, teacher, pattern, seed (*optional*):
            As for [`score_layers`].
        layers_per_phase (`int`, *optional*, defaults to 1):
            Layers to remove before training goes on; all are scored again after each.
        steps_per_phase (`int`, *optional*):
            Training steps after each removal; left out, all steps are shared out equally. Steps that
            remain go to the last phase.
        protected (iterable of `int`, *optional*):
            Layers that stay, as indices in the starting model; left out, the first and the last.
        quality_floor (`float`, *optional*):
            Stop removing when the model's score is below this at the start of a phase: the task's
            score, or for `"loss"` minus the loss in nats per token.
        evaluation (`Callable`, *optional*):
            A function `evaluation(model) -> dict[str, float]` whose results go into the record: of the
            starting model, after each cut and after each healing.
        verify_save (`bool`, *optional*, defaults to `True`):
            Load each checkpoint again, as one more model in memory, and stop if its logits differ. The
            weights stay on disk. [`DistillationTrainer`] has a setting of its own.

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
        layers_per_phase: int = 1,
        steps_per_phase: int | None = None,
        protected: Iterable[int] | None = None,
        quality_floor: float | None = None,
        evaluation: Evaluation | None = None,
        verify_save: bool = True,
    ) -> None:
        for name, value in {
            "target_layers": target_layers,
            "layers_per_phase": layers_per_phase,
            "steps_per_phase": 1 if steps_per_phase is None else steps_per_phase,
        }.items():
            if type(value) is not int or value < 1:
                raise LayerPruneError(f"{name} is {value!r}: it must be a whole number of at least 1.")
        if quality_floor is not None and criterion not in ("loss", "task"):
            raise LayerPruneError(f"{criterion} measures no quality: leave quality_floor out.")
        self.target_layers = target_layers
        self.criterion = criterion
        self.calibration = calibration
        self.task = task
        self.scoring = {"racing": racing, "teacher": teacher, "pattern": pattern, "seed": seed}
        check_choices(criterion, task, teacher, pattern, racing)
        self.layers_per_phase = layers_per_phase
        self.steps_per_phase = steps_per_phase
        self.protected = None if protected is None else list(protected)
        self.quality_floor = quality_floor
        self.evaluation = evaluation
        self.verify_save = verify_save
        self.record: Record = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        _check_backend(args, model, optimizer)
        self._terminated, self._scores = False, False
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
            check_folder_is_free(str(args.output_dir))
            fixed = check_plan(model, self.target_layers, self.protected)
            _check_parameters_stay(model)
            self.record = start_record(model, self._settings() | {"protected_originals": fixed}, args)
        excess = self.record["model"]["layers"] - self.target_layers
        self._phases = -(-excess // self.layers_per_phase)
        self._steps = self.steps_per_phase or state.max_steps // self._phases
        if not 1 <= self._steps * self._phases <= state.max_steps:
            raise LayerPruneError(
                f"Removing {excess} layers takes {self._phases} phases of at least "
                f"{max(1, self._steps)} steps, but training has {state.max_steps} steps: train longer "
                "or remove more layers per phase."
            )
        planned = self.record["pruning"].setdefault("phase_steps", self._steps)
        if planned != self._steps:
            raise LayerPruneError(
                f"The run was started with phases of {planned} steps, now it would go on with "
                f"{self._steps}: resume with the same max_steps and steps_per_phase."
            )
        self._batches = self._calibration_batches(args, train_dataloader)
        if not state.global_step:
            self.record["dense"] = run_evaluation(self.evaluation, model)

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
        phase = state.global_step // self._steps
        if phase >= self._phases or phase != len(self.record["phases"]) or self.record["stopped"]:
            return
        began = time.monotonic()
        removals: list[dict[str, Any]] = []
        prefixes = Prefixes()
        for _ in range(min(self.layers_per_phase, self._excess(model))):
            self._scores = not removals
            table = score_present(
                model,
                self._batches,
                self.criterion,
                self.record["pruning"]["protected_originals"],
                task=self.task,
                journal=Path(str(args.output_dir)) / SCORING_NAME if state.is_world_process_zero else None,
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
            removals.append(remove_least(model, table))
            drop_removed_parameters(optimizer, model)
            logger.info(
                "step %d: removed layer %d of the original model (%s score %.4f); %d layers left",
                state.global_step,
                removals[-1]["original"],
                self.criterion,
                removals[-1]["score"],
                len(get_lineage(model).kept),
            )
            self._look_at(removals, model)
        if removals:
            self.record["phases"].append(phase_entry(model, state.global_step, removals, self.evaluation))
            self._phase_began = began
        # From here on the folder holds a run; a mistake found before leaves it free for another try.
        self._write(args)

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
        phase, into = divmod(state.global_step, self._steps)
        if into or phase >= self._phases or self.record["stopped"]:
            return
        self._end_phase(model, args)
        control.should_evaluate |= args.eval_strategy != "no"
        control.should_save |= args.save_strategy != "no"

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.record or model is None:  # an evaluation before any training
            return
        layers = len(get_lineage(model).kept)
        found = {"step": state.global_step, "layers": layers, **(metrics or {})}
        self.record["evaluations"].append(found)
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
            if isinstance(args, DistillationTrainingArguments):
                return  # its trainer has done the rest
            if adapter_configs(model):
                write_pruned_base(model, folder)
            elif self.verify_save:
                check_reload(model, folder)

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
        self._end_phase(model, args)
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
            "protected": self.protected,
            "quality_floor": self.quality_floor,
        }

    def _calibration_batches(self, args: TrainingArguments, train_dataloader: Any) -> list[Batch]:
        if self.calibration is None:
            if callable(self.task) or self.criterion == "positional":
                return []
            raise LayerPruneError(
                f"The criterion {self.criterion!r} scores on text: give `calibration`, a data set like "
                "the training one or a list of batches."
            )
        data, like = self.calibration, train_dataloader.dataset
        if hasattr(data, "select_columns") and getattr(like, "column_names", None):
            # The Trainer has dropped the columns that the model does not read; so do we.
            shared = [name for name in data.column_names if name in like.column_names]
            data = data.select_columns(shared)
        return make_batches(data, args.per_device_eval_batch_size, train_dataloader.collate_fn)

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


def drop_removed_parameters(optimizer: Any, model: torch.nn.Module) -> None:
    """Make `optimizer`, in place, forget the parameters that `model` has no longer, and their state.

    The state of all others, the parameter groups and the learning rates stay as they are.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    live = {id(parameter) for parameter in model.parameters()}
    for group in inner.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in live]
    for parameter in [p for p in inner.state if id(p) not in live]:
        del inner.state[parameter]


def _check_backend(args: TrainingArguments, model: PreTrainedModel, optimizer: Any) -> None:
    """Refuse what would go wrong without a word when layers vanish.

    Raises:
        LayerPruneError: naming it, and the way round it.
    """
    if args.n_gpu > 1:
        raise LayerPruneError(
            f"{args.n_gpu} GPUs in one process: start with `accelerate launch` or `torchrun`, or with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if args.deepspeed or args.fsdp:
        raise LayerPruneError(
            "DeepSpeed and FSDP hold parameters in ways that do not let layers go in training: leave them "
            "out (each process then holds a whole model), or remove layers first (`hf-layerprune prune`)."
        )
    waits = args.ddp_find_unused_parameters is False or (
        args.ddp_find_unused_parameters is None and args.activation_checkpointing
    )
    if args.world_size > 1 and waits and not isinstance(args, DistillationTrainingArguments):
        raise LayerPruneError(
            "With several processes a plain Trainer would wait for the gradients of removed layers: set "
            "ddp_find_unused_parameters=True, or use DistillationTrainer."
        )
    if args.enable_jit_checkpoint:
        raise LayerPruneError(
            "enable_jit_checkpoint: leave it out, LayerPruningCallback itself writes a checkpoint at SIGTERM."
        )
    if args.load_best_model_at_end:
        raise LayerPruneError(
            "load_best_model_at_end would load weights of another depth: switch it off. The "
            "checkpoints of all phases stay on disk."
        )
    if args.auto_find_batch_size:
        raise LayerPruneError(
            "auto_find_batch_size starts again with a model already cut: set the batch size yourself."
        )
    inner = getattr(optimizer, "optimizer", optimizer)
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained <= held <= {id(p) for p in model.parameters()}:
        raise LayerPruneError(
            f"The optimizer ({type(inner).__name__}, optim={args.optim}) does not hold exactly the "
            "model's parameters, so removed layers could not be taken out of it. Use AdamW."
        )


def _check_parameters_stay(model: PreTrainedModel) -> None:
    """Refuse a model in which a removal makes new parameters of old ones, as the optimizer holds the old.

    Raises:
        LayerPruneError: naming one, and the way round it.
    """
    before = {id(parameter) for parameter in model.parameters()}
    cuts, _ = possible_cuts(model, range(len(get_lineage(model).kept)))
    with next(iter(cuts.values())):
        made = [name for name, parameter in model.named_parameters() if id(parameter) not in before]
    if made:
        raise LayerPruneError(
            f"{made[0]} holds a part for every layer; cut in training, the optimizer would lose its state. "
            "Remove layers first (`hf-layerprune prune`), then train with the original as teacher_model."
        )


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
    changed = {name: value for name, value in settings.items() if record["pruning"].get(name) != value}
    if changed:
        raise LayerPruneError(
            f"The run in {folder} was started with other settings than {changed}: resume with the same."
        )
    saved, present = load_lineage(folder), get_lineage(model)
    if saved != present:
        raise LayerPruneError(
            f"The checkpoint has {saved}, the model {present}, so its weights went to the wrong "
            f"layers. Load the model with from_pretrained({str(folder)!r}) before you resume, or use "
            "DistillationTrainer, which does."
        )
    return record
