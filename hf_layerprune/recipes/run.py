"""Runs a recipe: removes layers, trains the pruned model, and saves it with its record and card."""

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..checkpoints.saving import save_model
from ..data.batches import make_batches
from ..data.collator import PaddingCollator
from ..data.pictures import PictureCollator
from ..data.targets import Batch
from ..data.texts import tokenizer_of
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.reconstruction import check_can_reconstruct, reconstruct_layers
from ..distillation.teacher import hold_in_autocast_dtype, make_teacher
from ..distillation.teacher_cache import CachedTeacherLogits
from ..distillation.trainable import freeze_vision, trained_parameters
from ..distillation.trainer import DistillationTrainer
from ..errors import LayerPruneError
from ..evaluation.evaluate import HeldOutText
from ..pruning.arguments import PruningArguments, RemovalArguments, narrowed
from ..pruning.callback import LayerPruningCallback
from ..pruning.linear_map import check_linear_map, replace_by_linear_map
from ..pruning.prune import (
    check_plan,
    phase_entry,
    prune_layers,
    run_evaluation,
    score_present,
    scoring_settings,
)
from ..pruning.replacement import replace_block
from ..reports.card import write_card
from ..reports.machine import peak_memory_mb
from ..reports.record import (
    Removal,
    RunRecord,
    changed_settings,
    check_same_settings,
    checkpoint_of,
    read_record,
    start_record,
    write_record,
)
from ..reports.texts import count_tokens, describe_text, describe_texts
from ..surgery.lineage import get_lineage
from ..surgery.removal import remove_layers, without_layers
from .candidates import TOKENS, compare_candidates
from .inputs import Parts
from .recipe import REPLACEMENT_LOSSES, RecipeArguments, check_recipe


@dataclass
class Run:
    """The inputs of a run of a recipe.

    Args:
        model (`PreTrainedModel`): the model to prune, in place.
        recipe ([`RecipeArguments`]): settings of the selection and the replacement of layers.
        pruning ([`PruningArguments`]): settings of scoring and of the number of layers to keep.
        args ([`DistillationTrainingArguments`]): the training arguments. With `max_steps=0` the pruned model
            is not trained.
        calibration, heldout, train (`Dataset`): rows of tokens for calibration, evaluation and training.
        teacher (`PreTrainedModel` or `str`, *optional*): the teacher, a model or a folder of cached logits.
            Default: a copy of `model`.
        owns_teacher (`bool`, *optional*, defaults to `True`): whether only this run uses the teacher, so that
            its weights may be cast.
        pictures ([`PictureCollator`], *optional*): the data collator, if the rows hold pictures instead of
            tokens.
    """

    model: PreTrainedModel
    recipe: RecipeArguments
    pruning: PruningArguments
    args: DistillationTrainingArguments
    calibration: Dataset
    heldout: Dataset
    train: Any
    teacher: Any = None
    owns_teacher: bool = True
    pictures: PictureCollator | None = None

    def __post_init__(self) -> None:
        self.evaluation = HeldOutText(self.heldout, self.args.per_device_eval_batch_size, self.pictures)
        if self.pictures:  # it reads columns that the model does not
            self.args.remove_unused_columns = False
        self.folder = Path(str(self.args.output_dir))

    @property
    def distills(self) -> bool:
        """Returns whether the pruned model learns from a teacher."""
        return bool(self.args.max_steps and (self.args.kl_weight or self.args.hidden_weight))


def run_recipe(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: RecipeArguments,
    pruning: PruningArguments,
    args: DistillationTrainingArguments,
    parts: Parts,
    *,
    resume: str | bool | None = None,
    resolved: dict[str, Any] | None = None,
    teacher: PreTrainedModel | str | None = None,
    trust_remote_code: bool = False,
    pictures: PictureCollator | None = None,
) -> RunRecord:
    """Runs a recipe on `model`, in place, and saves the pruned model with its card in `args.output_dir`.

    Args:
        model, recipe, pruning, args, pictures: see [`Run`].
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`): the tokenizer or processor, which is saved
            with the model.
        parts (tuple of three `Dataset`): rows of tokens for calibration, evaluation and training.
        resume (*optional*): see [`~transformers.Trainer.train`]. Training of a replacement cannot be resumed.
        resolved (`dict`, *optional*): the fields of the recipe, for record and card.
        teacher (`PreTrainedModel` or `str`, *optional*): a model, or the folder or hub id of a model or of
            cached logits. Default: a copy of `model`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the code that comes with the teacher.

    Returns:
        [`RunRecord`]: the run record.

    Raises:
        LayerPruneError: settings cannot work. It is raised before any long work.
    """
    owns_teacher = not isinstance(teacher, PreTrainedModel)
    run = Run(model, recipe, pruning, args, *parts, owns_teacher=owns_teacher, pictures=pictures)
    if teacher is not None:
        _check_teaches(run)
        others = args.hidden_weight > 0, False, tokenizer_of(tokenizer), trust_remote_code
        found: Any = make_teacher(teacher, model, *others)
        run.teacher = str(teacher) if isinstance(found, CachedTeacherLogits) else found.to(model.device)
    _check(run, resume)
    checkpoint = checkpoint_of(str(args.output_dir)) if resume is True else resume or None
    cache_setting = getattr(model.config, "use_cache", None)  # training may disable the cache
    if recipe.select == "phases":
        callback = pruning_callback(pruning, calibration=run.calibration, evaluation=run.evaluation)
        _train(run, run.teacher, callback, checkpoint)
        record = callback.record
    else:
        record = _remove_and_heal(run, checkpoint)
    if cache_setting is not None:
        model.config.use_cache = cache_setting
    healing = "healed by distillation" if args.kl_weight or args.hidden_weight else "healed on text"
    if not args.max_steps:
        healing = "healed by reconstruction" if record.phases[-1].reconstruction else "not healed"
    record.method = {
        "name": recipe.title,
        "url": recipe.paper,
        "healing": healing,
    }
    settings: Any = {"legacy_rope": args.legacy_rope, "dtype": args.save_dtype}
    save_model(model, run.folder, verify=args.verify_save, **settings)
    tokenizer.save_pretrained(run.folder)
    if resolved is not None:
        record.recipe = resolved
    write_record(record, run.folder)
    write_card(record.to_dict(), run.folder)
    return record


def pruning_callback(pruning: PruningArguments, **settings: Any) -> LayerPruningCallback:
    """Returns the callback with these settings."""
    return LayerPruningCallback(pruning, **settings)


def _check(run: Run, resume: str | bool | None) -> None:
    """Checks a run before any long work.

    Raises:
        LayerPruneError: settings cannot work.
    """
    reconstructs = run.pruning.reconstruction_layers or run.recipe.block_candidates > 1
    if (run.args.max_steps or reconstructs) and isinstance(run.train, Dataset) and not len(run.train):
        raise LayerPruneError(
            "Calibration and evaluation take all sequences of the text, so none is left to train on. Give "
            "more text, or lower calibration_sequences and heldout_sequences."
        )
    if run.args.eval_strategy != "no":
        raise LayerPruneError(
            "eval_strategy is set, but a recipe evaluates before, between and after training itself. Leave "
            "eval_strategy out."
        )
    if resume and run.recipe.trains_only_replacement:
        raise LayerPruneError(
            "Training of a replacement cannot be resumed. Start again in a new output_dir, without resume."
        )
    check_recipe(run.recipe, run.pruning)
    if run.recipe.select == "phases" and not run.args.max_steps:
        raise LayerPruneError("select phases trains between removals. Set max_steps or steps_per_phase.")
    if run.recipe.replacement == "linear":
        check_linear_map(run.model)
    if reconstructs and run.recipe.select != "phases":
        teacher = run.teacher if run.teacher and run.pruning.reconstruction_layers else run.model
        if isinstance(teacher, str):
            raise LayerPruneError(
                f"reconstruction_layers is set, but {teacher} holds cached logits and no hidden states. Give "
                "the original model as teacher, or set reconstruction_layers to 0."
            )
        check_can_reconstruct(run.model, teacher, make_batches([next(iter(run.train))], 1, run.pictures))


def _check_has_block(run: Run, length: int, protected: Sequence[int] | None) -> None:
    """Checks that at least one block of `length` consecutive layers may be removed.

    Args:
        run ([`Run`]): the run.
        length (`int`): number of layers in the block.
        protected (sequence of `int`, *optional*): the layers to keep, by original index. Default: the first
            and the last layer.

    Raises:
        LayerPruneError: each block has a protected layer.
    """
    kept = get_lineage(run.model).kept
    fixed = {kept[0], kept[-1]} if protected is None else {*protected}
    if not any(fixed.isdisjoint(kept[first : first + length]) for first in range(len(kept) - length + 1)):
        raise LayerPruneError(
            f"This recipe removes a block of {length} consecutive layers (replacement is "
            f"{run.recipe.replacement}), but only layers {[one for one in kept if one not in fixed]} may go. "
            "Name other layers, or set replacement to none and block_candidates to 1."
        )


def _layers_in_replacement(recipe: RecipeArguments) -> int:
    """Returns the number of layers in the replacement. A linear map is part of the previous layer."""
    return 0 if recipe.replacement in ("none", "linear") else recipe.replacement_layers


def _check_teaches(run: Run) -> None:
    """Checks that a run uses a teacher.

    Raises:
        LayerPruneError: the run uses no teacher.
    """
    reconstructs = run.pruning.reconstruction_layers and run.recipe.select != "phases"
    if not run.distills and not reconstructs:
        raise LayerPruneError(
            "teacher is given, but nothing learns from it: training is off (max_steps is 0), or is on the "
            "labels alone (kl_weight and hidden_weight are 0). Leave teacher out, or change these settings."
        )


def _remove_and_heal(run: Run, checkpoint: str | None) -> RunRecord:
    """Removes all layers before training, then trains the pruned model. Returns the record.

    Args:
        run ([`Run`]): the inputs of the run.
        checkpoint (`str`, *optional*): the checkpoint to resume training from.
    """
    model, recipe, args = run.model, run.recipe, run.args
    check_plan(model, run.pruning.target_layers, run.pruning.protected)
    if run.pruning.reconstruction_layers or recipe.block_candidates > 1:
        run.train = _rows_read(run)
    began = time.monotonic()
    if run.recipe.trains_only_replacement:
        for name, value in REPLACEMENT_LOSSES[recipe.replacement_loss].items():
            setattr(args, name, value)
    reconstructs = run.pruning.reconstruction_layers > 0 and not checkpoint
    teacher = run.teacher
    if teacher is None and (run.distills or reconstructs):
        teacher = copy.deepcopy(model)
    record, replaced = _remove(run, checkpoint)
    if reconstructs:
        assert teacher is not None
        record.finished = False
        write_record(record, run.folder)  # from here on a stopped run can be resumed
        record.phases[-1].reconstruction = _reconstruct(run, teacher)
    if args.max_steps:
        record.finished = False
        write_record(record, run.folder)
        _heal(run, teacher, record, replaced, checkpoint)
    record.finished = True
    record.seconds = round(time.monotonic() - began, 2)  # since the start or the resumption
    record.phases[-1].seconds = record.seconds
    record.peak_memory_mb = peak_memory_mb()
    return record


def _remove(run: Run, checkpoint: str | None) -> tuple[RunRecord, list[nn.Parameter]]:
    """Removes the layers. For a resumed run these are the layers in its record.

    Returns the record and the parameters of a replacement.
    """
    model, pruning = run.model, run.pruning
    begun = read_record(run.folder) if checkpoint else None
    if begun is not None:  # a checkpoint holds the weights, and the record holds the layers
        _check_same(begun, run)
        kept = begun.phases[-1].kept
        present = get_lineage(model).kept
        remove_layers(model, [place for place, layer in enumerate(present) if layer not in kept])
        begun.resumed_at = Path(str(checkpoint)).name
        return begun, []
    if run.recipe.replacement != "none" or run.recipe.block_candidates > 1:
        return _replace(run)
    removal, select = narrowed(pruning, RemovalArguments), run.recipe.select
    texts: Any = {"calibration": run.calibration, "evaluation": run.evaluation, "collate": run.pictures}
    return prune_layers(model, removal, select=select, **texts), []


def _heal(
    run: Run,
    teacher: PreTrainedModel | str | None,
    record: RunRecord,
    replaced: list[nn.Parameter],
    checkpoint: str | None,
) -> None:
    """Trains the pruned model and adds the result to the record, in place."""
    model, args = run.model, run.args
    if run.recipe.trains_only_replacement:
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is one for one in replaced))
    with ExitStack() as shortened:
        # Later layers do not change the output of a replacement.
        if run.recipe.trains_only_replacement and args.hidden_weight:
            last = _last_replaced(record)
            args.hidden_layers, args.save_strategy = [last], "no"
            for one in (each for each in (model, teacher) if isinstance(each, PreTrainedModel)):
                kept = get_lineage(one).kept
                after = [place for place, layer in enumerate(kept) if layer > last]
                shortened.enter_context(without_layers(one, after))
        record.training = changed_settings(args)
        record.log = _train(run, teacher, checkpoint=checkpoint)
    tokens = record.log[-1]["num_input_tokens_seen"]
    record.texts["healing"] = {"name": describe_text(run.train)["name"], "tokens": tokens}
    record.phases[-1].healed = run_evaluation(run.evaluation, model)


def _reconstruct(run: Run, teacher: PreTrainedModel) -> dict[str, Any]:
    """Trains the layers next to the cuts on the teacher's hidden states. Returns an entry for the record."""
    began, args = time.monotonic(), run.args
    folder = run.folder / "reconstruction"
    found = reconstruct_layers(
        run.model,
        teacher,
        _training_batches(run, run.pruning.reconstruction_tokens),
        epochs=run.pruning.reconstruction_epochs,
        folder=folder,
        **_reconstruction_settings(run),
    )
    if args.process_index == 0:
        folder.rmdir()  # its checkpoints are already deleted
    return found.to_dict() | {"seconds": round(time.monotonic() - began, 2)}


def _training_batches(run: Run, tokens: int | None) -> list[Batch]:
    """Returns batches of the first training rows with at most this number of tokens. None means all rows."""
    size = run.args.train_batch_size
    if tokens is None and isinstance(run.train, Dataset):
        return make_batches(run.train, size, run.pictures)
    read = 0
    if run.pictures:  # only the batches tell the number of tokens
        batches: list[Batch] = []
        for start in range(0, len(run.train), size):
            batch = run.pictures([run.train[i] for i in range(start, min(start + size, len(run.train)))])
            read += batch["input_ids"].numel()
            if batches and read > (tokens or 0):
                break
            batches.append(batch)
        return batches
    rows: list[dict[str, Any]] = []
    for row in run.train:
        read += len(row["input_ids"])
        if rows and tokens is not None and read > tokens:
            break
        rows.append(row)
    return make_batches(Dataset.from_list(rows), size)


def _reconstruction_settings(run: Run) -> dict[str, Any]:
    """Returns the arguments of [`reconstruct_layers`] that are the same in all reconstructions of a run."""
    layers = run.pruning.reconstruction_layers or 1  # to compare candidates
    return {
        "layers_before": layers,
        "layers_after": layers,
        "learning_rate": run.pruning.reconstruction_learning_rate,
        "autocast": torch.bfloat16 if run.args.bf16 else None,  # fp16 would need gradient scaling
        "seed": run.args.seed,
        "progress": not run.args.disable_tqdm,
    }


def _rows_read(run: Run) -> Dataset | IterableDataset:
    """Returns the rows that training reads after reconstruction, so that both read the same tokens."""
    train, args = run.train, run.args
    rows = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(train, IterableDataset):
        return train.take(rows)
    if args.max_steps <= 0:
        rows = len(train)
    return train.shuffle(seed=args.seed).select(range(min(rows, len(train))))


def _check_same(begun: RunRecord, run: Run) -> None:
    """Checks that a resumed run has the same settings as at its start."""
    settings = {name: getattr(run.pruning, name) for name in ("target_layers", "criterion")}
    settings |= {"select": run.recipe.select, "replacement": run.recipe.replacement}
    settings["protected_originals"] = check_plan(run.model, run.pruning.target_layers, run.pruning.protected)
    check_same_settings({"replacement": "none", "select": "phases"} | begun.pruning, settings, run.folder)


def _replace(run: Run) -> tuple[RunRecord, list[nn.Parameter]]:
    """Replaces the least important block of layers. Returns the record and the parameters to train.

    Raises:
        LayerPruneError: the number of layers in the replacement is not below the number of layers to keep.
    """
    model, kind, pruning = run.model, run.recipe.replacement, run.pruning
    before, given = get_lineage(model).kept, run.recipe.replacement_layers
    if not 1 <= given < pruning.target_layers:
        raise LayerPruneError(
            f"replacement_layers is {given}: it must be at least 1, and below target_layers "
            f"({pruning.target_layers})."
        )
    fixed = check_plan(model, pruning.target_layers, pruning.protected)
    replacing = _layers_in_replacement(run.recipe)
    length = len(before) - pruning.target_layers + replacing
    _check_has_block(run, length, fixed)
    names = ("target_layers", "criterion", "racing", "pattern")
    settings: dict[str, Any] = {name: getattr(pruning, name) for name in names}
    settings |= {"protected_originals": fixed, "select": "block", "replacement": kind}
    record = start_record(model, settings)
    batches = make_batches(run.calibration, 4, run.pictures)
    record.texts = describe_texts(run.calibration, batches, run.evaluation)
    record.dense = run_evaluation(run.evaluation, model)

    def remove(pruned: PreTrainedModel, first: int) -> list[nn.Parameter]:
        if kind == "linear":
            return [replace_by_linear_map(pruned, first, length, batches)]
        return replace_block(pruned, first, length, kind, replacing)

    scoring = scoring_settings(pruning) | {"block_size": length}
    table = score_present(model, batches, pruning.criterion, fixed, **scoring)
    first, candidates = table.ranking()[0], None
    if run.recipe.block_candidates > 1:
        texts = _training_batches(run, TOKENS), batches
        settings = _reconstruction_settings(run)
        candidates = compare_candidates(model, table, run.recipe.block_candidates, remove, *texts, **settings)
        divergences = [candidate["kl"] for candidate in candidates]
        first = table.ranking()[divergences.index(min(divergences))]
    trained = remove(model, first)
    gone = [layer for layer in before if layer not in get_lineage(model).kept]
    removals = [Removal(before.index(layer), layer, None) for layer in gone]
    removals[0].score, removals[0].table = table.scores[first], table
    record.phases.append(phase_entry(model, 0, removals, run.evaluation))
    record.phases[-1].candidates = candidates
    record.finished = True
    return record, trained


def _last_replaced(record: RunRecord) -> int:
    """Returns the original index of the last layer in the replaced block."""
    table = record.removals[0].table
    assert table is not None
    return table.kept[table.ranking()[0] + table.block_size - 1]


def _train(
    run: Run,
    teacher: PreTrainedModel | str | None,
    callback: LayerPruningCallback | None = None,
    checkpoint: str | None = None,
) -> list[dict[str, Any]]:
    """Trains the model, with a teacher if the losses need it. Returns the log.

    Afterwards it removes the Trainer's mixed precision from the model.

    Raises:
        LayerPruneError: the Trainer does not accept an argument.
    """
    model, args = run.model, run.args
    if run.pictures:  # teacher and student see the same
        freeze_vision(model)
    kind: Any
    settings: dict[str, Any]
    distills = args.kl_weight or args.hidden_weight
    chosen_anew = callback is not None and args.trainable != "all"  # after each removal
    if distills or chosen_anew:
        kind, settings = DistillationTrainer, {"teacher_model": teacher}
    else:
        chosen = {id(parameter) for parameter in trained_parameters(model, args.trainable)}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)
        kind, settings = Trainer, {}
    if run.pictures or kind is Trainer:
        settings["data_collator"] = run.pictures or PaddingCollator()
    callbacks = [] if callback is None else [callback]
    try:
        trainer = kind(model, args, train_dataset=run.train, callbacks=callbacks, **settings)
    except ValueError as error:
        raise LayerPruneError(str(error)) from error
    if callback is not None:
        callback.set_trainer(trainer)
    if isinstance(teacher, PreTrainedModel) and run.owns_teacher:
        hold_in_autocast_dtype(teacher, trainer.accelerator)
    count_tokens(args, run.train, run.pictures and run.pictures.processor)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return trainer.state.log_history
