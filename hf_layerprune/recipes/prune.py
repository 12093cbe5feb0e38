"""Runs a whole pruning method in one call: text, scores, removal, training, saving."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..checkpoints.loading import copy_companions, load_meta_model, load_tokenizer
from ..data.texts import reads_pictures, tokenizer_of
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.learning_rate import healing_learning_rate
from ..distillation.teacher_cache import is_teacher_cache
from ..errors import LayerPruneError
from ..pruning.arguments import PruningArguments, with_given
from ..pruning.linear_map import fits_linear_map
from ..pruning.schedule import phase_sizes
from ..pruning.target import resolve_target
from ..reports.record import RunRecord, check_folder_is_free
from ..surgery.decoder import check_next_token, layer_count, text_config
from .arguments import ModelArguments
from .fields import check_fields, fill
from .inputs import (
    check_loading_for_training,
    check_model,
    check_reporters,
    check_stored_weights,
    check_teacher_exists,
    keep_stored_dtype,
    load_on_device,
    load_writer,
    picture_collator,
    precision_of_training,
    processor_of,
    split_text,
)
from .recipe import (
    RECIPE_KINDS,
    RecipeArguments,
    check_recipe,
    read_recipe,
    resolved_fields,
    write_settings,
)
from .run import run_recipe
from .run_plan import announce_plan


class PruneOutput(NamedTuple):
    """The result of [`prune`].

    Args:
        model (`PreTrainedModel`): the pruned model, in eval mode.
        record ([`RunRecord`]): the record of the run, as in `layer_pruning.json`.
    """

    model: PreTrainedModel
    record: RunRecord


def prune(
    model: str | Path | PreTrainedModel | None = None,
    data: Any = None,
    keep: int | None = None,
    recipe: str | Path | Mapping[str, Any] = "default",
    *,
    teacher: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    resume_from_checkpoint: str | bool | None = None,
    **fields: Any,
) -> PruneOutput:
    """Prunes a model with a recipe, and saves it with its tokenizer, record and card in `output_dir`.

    The command `hf-layerprune run` does the same.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): folder or hub id of the model, or the model itself, which
            is changed in place. Default: the model of the recipe.
        data: text, chats or prompts for calibration, training and evaluation. Default: the data of the
            recipe. One of
            - a `str`, a `Path` or a list of `Path`: files, folders, globs, or ids of data sets on the hub,
              see [`load_rows`].
            - `"self"`: text that the model generates itself.
            - rows in memory: a list of texts, a `Dataset`, or another form that [`make_batches`] accepts.
        keep (`int`, *optional*): number of layers to keep. `target_ratio=0.75`, `target_parameters="2.4B"`,
            `target_speedup=1.25` or `layers="12-18"` (the layers to remove) may be given instead. Default:
            the target of the recipe.
        recipe (`str`, `Path` or mapping, *optional*, defaults to `"default"`): the name of a recipe that
            comes with the package, a YAML file, or a mapping of its fields.
        teacher (`str`, `Path` or `PreTrainedModel`, *optional*): folder or hub id of the teacher, a cache of
            [`cache_teacher_logits`], or the teacher itself, which is frozen in place. It may have more layers
            than the model, for example the original of a pruned model. Default: a copy of the model.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): the tokenizer, or the processor
            for rows with pictures. Default: those in the model's folder.
        resume_from_checkpoint (`str` or `bool`, *optional*): see [`~transformers.Trainer.train`].
        fields: other fields of a recipe, which replace the values of the recipe. They are the fields of
            [`PruningArguments`] and [`DistillationTrainingArguments`] (`output_dir`, `max_steps`,
            `learning_rate`, ...), and `sequence_length`, `packing`, `loss_on`, `data_template`,
            `calibration_sequences`, `select`, ...

    Returns:
        [`PruneOutput`]: the pruned model and the record of the run.

    Raises:
        LayerPruneError: a field or a value is wrong, or settings cannot work. It is raised before any long
            work.

    Example:

    ```python
    from hf_layerprune import prune

    model, record = prune("HuggingFaceTB/SmolLM2-135M", "text.jsonl", keep=24, output_dir="pruned")
    ```
    """
    in_memory = isinstance(model, PreTrainedModel)
    named = {} if in_memory else {"model": model}
    is_source = isinstance(data, (str, Path)) or (
        isinstance(data, (list, tuple)) and bool(data) and all(isinstance(one, Path) for one in data)
    )
    named |= {"data": data} if is_source else {}
    named |= {} if isinstance(teacher, PreTrainedModel) else {"teacher": teacher}
    settings = _values(recipe, named | {"keep": keep}, fields)
    values = _of_machine(settings)
    chosen, source, taught, text, sample, pruning, args = fill(RECIPE_KINDS, values)
    trust = source.trust_remote_code
    check_recipe(chosen, pruning, reads_text=args.max_steps != 0 or not text.streaming)
    check_reporters(args.report_to)
    check_teacher_exists(taught.teacher, trust)
    if taught.teacher and is_teacher_cache(taught.teacher):  # it knows only the rows of the text
        sample = replace(sample, repeat_share=0.0)
    resume = resume_from_checkpoint or args.resume_from_checkpoint
    if not resume:
        check_folder_is_free(args.output_dir, resume="resume_from_checkpoint=True")
    trains = args.max_steps != 0 or pruning.reconstruction_layers > 0 or chosen.block_candidates > 1
    if isinstance(model, PreTrainedModel):
        check_next_token(model, "prune")
        config, tokenizer = model.config, tokenizer or _tokenizer_of(model, trust)
    else:
        check_loading_for_training(source, all_weights=trains)
        config, own_tokenizer = check_model(chosen.model, source, "prune")
        tokenizer = tokenizer or own_tokenizer
        keep_stored_dtype(args, chosen.model, source)
    if trains:
        check_stored_weights(config, chosen.model or "the model")
    if pruning.target_layers is None:
        whole = model if isinstance(model, PreTrainedModel) else _meta_model(chosen.model, source)
        pruning = resolve_target(pruning, whole)
    _set_steps(chosen, pruning, args, layer_count(text_config(config)))
    read = [Path(one) for one in chosen.data or []] or None if data is None or is_source else data
    given = teacher if isinstance(teacher, PreTrainedModel) else taught.teacher
    writer = partial(_writer, model if in_memory else chosen.model, given, source)
    name = model.name_or_path if isinstance(model, PreTrainedModel) else chosen.model
    processor = (lambda: tokenizer) if reads_pictures(tokenizer) else processor_of(str(name), source)
    reader = tokenizer_of(tokenizer)
    rows = split_text(read, text, args, sample, config, reader, args.max_steps, writer, processor)
    distills = args.max_steps and (args.kl_weight or args.hidden_weight)
    if distills and not in_memory and not chosen.trains_only_replacement:
        announce_plan(
            chosen.model,
            source,
            pruning,
            args,
            rows[2],
            select=chosen.select,
            teacher=taught.teacher,
            given=settings,
        )
    if not resume and args.process_index == 0:
        # Of objects in memory only a teacher has a name by which the run can be repeated.
        teacher_name = getattr(teacher, "name_or_path", None)
        write_settings(settings | ({"teacher": teacher_name} if teacher_name else {}), args.output_dir)
    pruned: Any = model if in_memory else load_on_device(chosen.model, source, dtype="float32")
    if in_memory and trains and not hasattr(pruned, "hf_device_map"):
        pruned.to(args.device)  # as the Trainer does, which begins after reconstruction
    frozen = {id(parameter) for parameter in pruned.parameters() if not parameter.requires_grad}
    if chosen.replacement == "auto":
        chosen = replace(chosen, replacement="linear" if fits_linear_map(pruned) else "none")
    if args.max_steps != 0 and "learning_rate" not in settings:
        args.learning_rate = healing_learning_rate(pruned)
    resolved = resolved_fields([chosen, taught, text, sample, pruning], args)
    run: dict[str, Any] = {"resume": True if resume == "True" else resume, "resolved": resolved}
    run |= {"teacher": given, "trust_remote_code": trust}
    run["pictures"] = picture_collator(rows[2], processor, text, args)
    record = run_recipe(pruned, tokenizer, chosen, pruning, args, rows, **run)
    if not in_memory or run["pictures"]:
        copy_companions(str(name), args.output_dir)
    for parameter in pruned.parameters():  # a recipe may train only a part of the model
        parameter.requires_grad_(id(parameter) not in frozen)
    pruned.zero_grad()
    return PruneOutput(pruned.eval(), record)


def _meta_model(name: str | None, source: ModelArguments) -> PreTrainedModel:
    return load_meta_model(str(name), source.trust_remote_code, source.gguf_file)


def _values(
    recipe: str | Path | Mapping[str, Any], named: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the values of all fields. The caller's values replace the values of the recipe.

    Raises:
        LayerPruneError: a field or a value is wrong, or neither the caller nor the recipe names a model.
    """
    if isinstance(recipe, Mapping):
        values = check_fields(recipe, RECIPE_KINDS, "recipe")
    else:
        values = read_recipe(recipe)
    given = {name: value for name, value in named.items() if value is not None}
    given = check_fields(given | {**fields}, RECIPE_KINDS, "prune")
    values = with_given(values, given)
    if "model" in named and values.get("model") is None:
        raise LayerPruneError("model has no value. Give a folder, a hub id or a model.")
    return values


def _tokenizer_of(model: PreTrainedModel, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in the folder or hub repository that a model was loaded from.

    Raises:
        LayerPruneError: the model was not loaded from a folder or the hub, or no tokenizer exists there.
    """
    if not model.name_or_path:
        raise LayerPruneError(
            "tokenizer is missing, and the model was made in memory, so it names no folder to load one from. "
            "Give tokenizer=."
        )
    return load_tokenizer(str(model.name_or_path), trust_remote_code)


def _writer(model: Any, teacher: Any, source: ModelArguments) -> PreTrainedModel:
    """Returns the model that generates the text of `data="self"`.

    It is the teacher, or `model` if the teacher is not a model.
    """
    is_cache = isinstance(teacher, str) and is_teacher_cache(teacher)
    writer = model if teacher is None or is_cache else teacher
    return writer if isinstance(writer, PreTrainedModel) else load_writer(str(writer), source)


def _of_machine(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with the defaults for this machine: `use_cpu` on a CPU, and the precision."""
    if not torch.cuda.is_available():
        values = {"use_cpu": True} | values
    return values | precision_of_training(values)


def _set_steps(
    recipe: RecipeArguments, pruning: PruningArguments, args: DistillationTrainingArguments, layers: int
) -> None:
    """Sets `max_steps`, in place, to the steps of all phases if only the steps of one phase are given."""
    if recipe.select == "phases" and args.max_steps < 0 and pruning.steps_per_phase:
        phases = phase_sizes(layers, pruning.target_layers, pruning.layers_per_phase)
        args.max_steps = pruning.steps_per_phase * len(phases)
