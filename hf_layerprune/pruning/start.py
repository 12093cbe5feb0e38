"""The start of training: checks, the record of the run, its calibration data and its texts."""

import logging
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from ..checkpoints.saving import check_saves
from ..data import Batch
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.teacher import check_tokens
from ..errors import LayerPruneError
from ..reports.record import check_folder_is_free, start_record
from ..reports.texts import count_tokens, describe_text, describe_texts
from ..scoring.score import check_criterion_fits, reads_text
from ..surgery.decoder import is_sharded
from ..surgery.peft import adapter_configs, base_of, keep_base_known
from .arguments import PruningArguments, record_settings
from .calibration import calibration_batches, evaluation_rows
from .compatibility import check_compatibility, check_parameters_stay
from .diagnostics import LossMonitor, loss_in_nats
from .other_callbacks import TrainerOutput
from .prune import Evaluation, check_plan
from .recorder import Recorder
from .recovery import Recovery
from .resume import resumed_record
from .run import PruningRun
from .schedule import PhaseSchedule
from .termination import Termination


logger = logging.getLogger(__name__)


def check_start(
    settings: PruningArguments,
    task: Any,
    trainer: Trainer | None,
    args: TrainingArguments,
    state: TrainerState,
    model: PreTrainedModel,
    optimizer: Any,
) -> None:
    """Checks that layers can be removed in this training.

    Raises:
        LayerPruneError: they cannot. The error says what to change.
    """
    check_criterion_fits(base_of(model), settings.criterion, task)
    check_compatibility(args, model, optimizer)
    if settings.min_recovery is not None and (adapter_configs(model) or is_sharded(model)):
        raise LayerPruneError(
            "min_recovery puts layers back, but not under adapters or in sharded models: leave it out."
        )
    if trainer is None:
        logger.warning(
            "LayerPruningCallback does not know its Trainer: it cannot check the other callbacks, and does "
            "not report scores to TensorBoard and the like. Call set_trainer(trainer) on the callback before "
            "trainer.train()."
        )
    elif trainer.state is not state:
        raise LayerPruneError(
            "set_trainer got another Trainer than the one that trains: call it again with this Trainer."
        )


def begin_record(
    recorder: Recorder,
    settings: PruningArguments,
    teacher: PreTrainedModel | None,
    args: TrainingArguments,
    state: TrainerState,
    model: PreTrainedModel,
) -> None:
    """Starts the record of a new run, or takes that of the checkpoint from which a run is resumed.

    Raises:
        LayerPruneError: layers cannot be removed as asked for, or the output folder holds another run.
    """
    recorder.start_clock(args)
    values = record_settings(settings, teacher)
    if state.global_step:
        recorder.resume(resumed_record(args, state, model, values))
        return
    check_folder_is_free(str(args.output_dir), resume="resume_from_checkpoint=True")
    fixed = check_plan(model, settings.target_layers, settings.protected)
    check_parameters_stay(model)
    recorder.begin(start_record(model, values | {"protected_originals": fixed}, args))


def start_run(
    settings: PruningArguments,
    calibration: Any,
    task: Any,
    teacher: PreTrainedModel | None,
    evaluation: Evaluation | None,
    recorder: Recorder,
    termination: Termination,
    trainer: Trainer | None,
    args: TrainingArguments,
    state: TrainerState,
    model: PreTrainedModel,
    *,
    lr_scheduler: Any,
    train_dataloader: Any,
    eval_dataloader: Any = None,
    processing_class: Any = None,
    verify_save: bool = True,
) -> PruningRun:
    """Returns the run, whose record has begun.

    Args:
        settings, calibration, task, teacher, evaluation, verify_save: see [`LayerPruningCallback`].
        others: of the run, and as callbacks get them.

    Raises:
        LayerPruneError: the schedule, the texts or the teacher do not fit the training.
    """
    if adapter_configs(model):
        keep_base_known(model)
    if verify_save and not isinstance(args, DistillationTrainingArguments):  # whose trainer checks, too
        check_saves(model)
    if teacher is not None:
        check_tokens(teacher, base_of(model), processing_class)
    record = recorder.record
    schedule = PhaseSchedule(settings, record, state.max_steps, lr_scheduler)
    batches: list[Batch] = []
    reads = reads_text(settings.criterion, task)
    if calibration is None and reads:
        rows = evaluation_rows(settings.criterion, trainer, eval_dataloader)
        batches = calibration_batches(rows, args, train_dataloader, model, processing_class)
    elif calibration is not None:
        batches = calibration_batches(calibration, args, train_dataloader, model, processing_class)
    texts = describe_texts(calibration, batches if reads else [], evaluation)
    texts["healing"] = {"name": describe_text(train_dataloader)["name"]}
    record.texts = {**texts, **record.texts}  # a resumed run knows its texts
    counted = count_tokens(args, train_dataloader.dataset, processing_class)
    if settings.tokens_per_phase is not None and not counted:
        raise LayerPruneError(
            "tokens_per_phase is set, but the training data has no input_ids: its tokens cannot be "
            "counted. Set steps_per_phase instead."
        )
    recovery = None
    if settings.min_recovery is not None:
        recovery = Recovery(settings.min_recovery, str(args.output_dir), batches, task)
        recovery.check(len(record.phases))
    output, losses = TrainerOutput(trainer), LossMonitor(loss_in_nats(trainer, args))
    inputs = {"task": task, "teacher": teacher, "evaluation": evaluation}
    return PruningRun(settings, recorder, schedule, batches, output, termination, losses, recovery, **inputs)
