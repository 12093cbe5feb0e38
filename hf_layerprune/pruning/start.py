"""Starts a run: checks, the record of the run, its calibration data and its texts."""

import logging
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from ..checkpoints.verification import check_saves
from ..data.targets import Batch
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.teacher import check_tokens
from ..errors import LayerPruneError
from ..reports.record import RunRecord, check_folder_is_free, start_record
from ..reports.texts import count_tokens, describe_text, describe_texts
from ..scoring.score import check_criterion_fits
from ..surgery.decoder import is_sharded
from ..surgery.peft import adapter_configs, base_of, keep_base_known
from .arguments import record_settings
from .calibration import calibration_batches, evaluation_rows
from .compatibility import check_compatibility, check_parameters_stay
from .diagnostics import LossMonitor, loss_in_nats
from .other_callbacks import TrainerOutput
from .prune import check_plan
from .reconstruction import PhaseReconstruction, find_teacher
from .recorder import Recorder
from .recovery import Recovery
from .resume import resumed_record
from .run import PruningInputs, PruningRun
from .schedule import PhaseSchedule
from .termination import Termination


logger = logging.getLogger(__name__)


def check_start(
    inputs: PruningInputs,
    trainer: Trainer | None,
    args: TrainingArguments,
    state: TrainerState,
    model: PreTrainedModel,
    optimizer: Any,
) -> None:
    """Checks that layers can be removed in this training.

    Raises:
        LayerPruneError: layers cannot be removed. The error explains what to change.
    """
    check_criterion_fits(base_of(model), inputs.args.criterion, inputs.task)
    check_compatibility(args, model, optimizer)
    if inputs.args.reconstruction_layers and is_sharded(model):
        raise LayerPruneError(
            "reconstruction_layers trains single layers, but the weights are sharded over processes. Leave "
            "sharding out, or set reconstruction_layers to 0."
        )
    if inputs.args.reconstruction_layers and args.fp16 and isinstance(args, DistillationTrainingArguments):
        raise LayerPruneError(
            "reconstruction_layers is set and fp16 is True, but reconstruction needs a teacher in float32 or "
            "bfloat16. Set bf16=True instead of fp16, or reconstruction_layers to 0."
        )
    if inputs.args.min_recovery is not None and (adapter_configs(model) or is_sharded(model)):
        raise LayerPruneError(
            "min_recovery cannot restore layers under adapters or in a sharded model. Leave it out."
        )
    if trainer is None:
        logger.warning(
            "LayerPruningCallback does not know its Trainer: it cannot check the other callbacks, and does "
            "not report scores to TensorBoard and the like. Call set_trainer(trainer) on the callback before "
            "trainer.train()."
        )
    elif trainer.state is not state:
        raise LayerPruneError(
            "set_trainer was called with another Trainer than the one that trains. Call it with this Trainer."
        )


def begin_record(
    recorder: Recorder,
    inputs: PruningInputs,
    args: TrainingArguments,
    state: TrainerState,
    model: PreTrainedModel,
) -> None:
    """Starts the record of a new run, or continues the record of the checkpoint of a resumed run.

    Raises:
        LayerPruneError: the settings do not fit the model, or the output folder holds another run.
    """
    recorder.start_clock(args)
    settings = record_settings(inputs.args, inputs.teacher)
    if state.global_step:
        recorder.resume(resumed_record(args, state, model, settings))
        return
    check_folder_is_free(str(args.output_dir), resume="resume_from_checkpoint=True")
    fixed = check_plan(model, inputs.args.target_layers, inputs.args.protected)
    check_parameters_stay(model)
    recorder.begin(start_record(model, settings | {"protected_originals": fixed}, args))


def start_run(
    inputs: PruningInputs,
    recorder: Recorder,
    termination: Termination,
    trainer: Trainer | None,
    args: TrainingArguments,
    state: TrainerState,
    model: PreTrainedModel,
    **others: Any,
) -> PruningRun:
    """Returns the run. Its record must already be started.

    Args:
        others: `lr_scheduler`, `train_dataloader`, `eval_dataloader` and `processing_class`, the keyword
            arguments of callbacks.

    Raises:
        LayerPruneError: the schedule, the texts or the teacher do not fit the training.
    """
    settings, record, loader = inputs.args, recorder.record, others["train_dataloader"]
    tokenizer = others.get("processing_class")
    if adapter_configs(model):
        keep_base_known(model)
    checks_itself = isinstance(args, DistillationTrainingArguments)  # its trainer verifies its own saves
    if inputs.verify_save and not checks_itself:
        check_saves(model)
    if inputs.teacher is not None:
        check_tokens(inputs.teacher, base_of(model), tokenizer)
    schedule = PhaseSchedule(settings, record, state.max_steps, others["lr_scheduler"])
    batches: list[Batch] = []
    calibration = inputs.calibration
    if calibration is None and inputs.reads_text:
        calibration = evaluation_rows(settings.criterion, trainer, others.get("eval_dataloader"))
    if calibration is not None:
        batches = calibration_batches(calibration, args, loader, model, tokenizer)
    _describe_texts(inputs, record, batches, loader)
    counted = count_tokens(args, loader.dataset, tokenizer)
    if settings.tokens_per_phase is not None and not counted:
        raise LayerPruneError(
            "tokens_per_phase is set, but the training data has no input_ids: its tokens cannot be "
            "counted. Set steps_per_phase instead."
        )
    recovery = None
    if settings.min_recovery is not None:
        recovery = Recovery(settings.min_recovery, str(args.output_dir), batches, inputs.task)
        recovery.check(len(record.phases))
    reconstruction = None
    if settings.reconstruction_layers:
        teacher = find_teacher(inputs.teacher, trainer, args, model, is_resumed=state.global_step > 0)
        phase = settings.tokens_per_phase, schedule.steps
        reconstruction = PhaseReconstruction(settings, args, teacher, model, loader, batches, *phase)
    output, losses = TrainerOutput(trainer), LossMonitor(loss_in_nats(trainer, args))
    watching: Any = (output, termination, losses, recovery, reconstruction)
    return PruningRun(inputs, recorder, schedule, batches, *watching)


def _describe_texts(inputs: PruningInputs, record: RunRecord, batches: list[Batch], loader: Any) -> None:
    read = batches if inputs.reads_text else []
    texts = describe_texts(inputs.calibration, read, inputs.evaluation)
    texts["healing"] = {"name": describe_text(loader)["name"]}
    record.texts = {**texts, **record.texts}  # the record of a resumed run already has texts
