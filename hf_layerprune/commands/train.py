"""The commands `cache-teacher`, `distill` and `run`."""

from functools import partial
from pathlib import Path
from typing import Any

from ..data.arguments import BatchArguments, SequenceArguments
from ..errors import LayerPruneError
from ..recipes.arguments import ModelArguments, TeacherArguments, TextArguments, TrainingSampleArguments
from .common import (
    OUTPUT_DIR,
    given_values,
    keep_settings,
    parse,
    parse_given,
    print_table,
    read_config,
    save_config,
)
from .config_file import COMMON_FLAGS, common_flags
from .flags import CacheTeacherArguments, DataArguments, LoraArguments, ResumeArguments
from .help import help_wanted


def cache_teacher(arguments: list[str]) -> None:
    """Caches MODEL's top-k or sampled logits so that `distill --teacher DIR` needs no teacher in memory.

    usage: hf-layerprune cache-teacher MODEL --data DATA --output_dir DIR [flags]
    example: hf-layerprune cache-teacher Qwen/Qwen3-0.6B --data text.jsonl --output_dir teacher
    """
    kinds = [ModelArguments, DataArguments, TextArguments, SequenceArguments, BatchArguments]
    kinds = [*kinds, CacheTeacherArguments]
    name, source, data, text, sequence, batch, output = parse(cache_teacher, arguments, kinds)
    from ..data.batches import make_batches, regroup_batches
    from ..distillation.teacher_cache import CachedTeacherLogits, cache_teacher_logits
    from ..forward.memory import tokens_per_pass
    from ..recipes.inputs import (
        check_model,
        load_on_device,
        load_writer,
        make_sequences,
        picture_collator,
        processor_of,
    )

    config, tokenizer = check_model(name, source, "cache-teacher")
    inputs: Any = {"writer": partial(load_writer, name, source), "processor": processor_of(name, source)}
    sequences = make_sequences(data.sources, text, sequence, config, tokenizer, **inputs)
    if picture_collator(sequences, inputs["processor"], text, sequence):
        raise LayerPruneError(
            "The data holds pictures, but logits are cached for text alone. Train with the teacher "
            "itself, or read text columns alone with data_template, as '{text}'."
        )
    batches = make_batches(sequences)
    model = load_on_device(name, source)
    most = tokens_per_pass(model, batch.batch_tokens)
    if most is not None:
        batches = regroup_batches(batches, most)
    settings: Any = {"temperature": output.temperature, "hidden_layers": output.hidden_layers}
    settings["sampling"] = output.sampling
    cache_teacher_logits(model, batches, output.output_dir, output.top_k, **settings)
    size = sum(file.stat().st_size for file in Path(output.output_dir).iterdir()) / 2**20
    rows = len(CachedTeacherLogits(output.output_dir).keys)
    keep_settings(output.output_dir)
    print(
        f"{output.output_dir}: {rows} sequences, {size:.1f} MB. `hf-layerprune distill --teacher` reads them."
    )


def distill(arguments: list[str]) -> None:
    """Removes layers of MODEL while it is distilled from the original model (arXiv 2511.05085).

    usage: hf-layerprune distill MODEL --data DATA --target_layers N --output_dir DIR [flags]
    example: hf-layerprune distill Qwen/Qwen3-0.6B --data text.jsonl --target_layers 20 --output_dir out
    """
    from ..distillation.arguments import DistillationTrainingArguments
    from ..pruning.arguments import PruningArguments

    kinds = [
        ModelArguments,
        DataArguments,
        TextArguments,
        TrainingSampleArguments,
        TeacherArguments,
        LoraArguments,
        ResumeArguments,
        PruningArguments,
        DistillationTrainingArguments,
    ]
    parsed = parse(distill, arguments, kinds)
    from ..recipes.inputs import precision_of_training

    config = common_flags(arguments).config
    given = read_config(config, kinds, model=True) if config else {}
    precision = precision_of_training(given | parse_given(distill, arguments, kinds, model=True))
    if precision:
        words = [word for setting, value in precision.items() for word in (f"--{setting}", str(value))]
        kept = dict(given_values)
        parsed = parse(distill, [*arguments, *words], kinds)
        given_values.clear()
        given_values.update(kept)  # the settings beside the model name no precision of this machine
    name, source, data, text, sample, teacher, lora, resuming, pruning, args = parsed
    from ..checkpoints.loading import copy_companions
    from ..distillation.learning_rate import healing_learning_rate
    from ..distillation.teacher_cache import is_teacher_cache
    from ..evaluation.evaluate import HeldOutText
    from ..recipes.inputs import (
        check_loading_for_training,
        check_model,
        check_reporters,
        check_stored_weights,
        check_teacher_exists,
        check_text_is_left,
        keep_stored_dtype,
        load_on_device,
        load_writer,
        picture_collator,
        processor_of,
        split_text,
    )
    from ..recipes.run import pruning_callback
    from ..recipes.run_plan import announce_plan
    from ..reports.record import check_folder_is_free

    resume = resuming.resume or args.resume_from_checkpoint == "True" or args.resume_from_checkpoint
    trust = source.trust_remote_code
    check_loading_for_training(source, all_weights=lora.lora_rank is None)
    check_reporters(args.report_to)
    if not resume:
        check_folder_is_free(args.output_dir, resume="--resume")
    keep_stored_dtype(args, name, source)
    config, tokenizer = check_model(name, source, "distill")
    if lora.lora_rank is None:
        check_stored_weights(config, name)
    check_teacher_exists(teacher.teacher, trust)
    is_cache = teacher.teacher is None or is_teacher_cache(teacher.teacher)
    if sample.repeat_share and teacher.teacher and is_cache:
        raise LayerPruneError(
            f"repeat_share is {sample.repeat_share}, but {teacher.teacher} holds the logits of the text as "
            "it is. Leave repeat_share out."
        )
    writer = partial(load_writer, name if is_cache else teacher.teacher, source)
    processor = processor_of(name, source)
    calibration, heldout, train = split_text(
        data.sources, text, args, sample, config, tokenizer, args.max_steps, writer, processor
    )
    check_text_is_left(train, sample)
    taught: Any = {"teacher": teacher.teacher, "lora_rank": lora.lora_rank, "given": given_values}
    announce_plan(name, source, pruning, args, train, **taught)
    if not resume and args.process_index == 0:
        keep_settings(args.output_dir)
    model = load_on_device(name, source, dtype="float32")
    if lora.lora_rank is None and "learning_rate" not in given_values:
        args.learning_rate = healing_learning_rate(model)
    collate = picture_collator(train, processor, text, args)
    evaluation = HeldOutText(heldout, args.per_device_eval_batch_size, collate)
    callback = pruning_callback(pruning, calibration=calibration, evaluation=evaluation)
    trainer = _make_trainer(
        model=model,
        args=args,
        teacher_model=teacher.teacher,
        trust_remote_code=trust,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        peft_config=_lora_config(lora.lora_rank),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    copy_companions(name, args.output_dir)
    trainer.create_model_card()
    print_table(callback.record.to_dict())
    print(f"\nSaved in {args.output_dir}.")


def _make_trainer(**settings: Any) -> Any:
    """Returns a [`DistillationTrainer`].

    Raises:
        LayerPruneError: the Trainer refuses an argument.
    """
    from ..distillation.trainer import DistillationTrainer

    try:
        return DistillationTrainer(**settings)
    except ValueError as error:
        raise LayerPruneError(str(error)) from error


def _lora_config(rank: int | None) -> Any:
    """Returns the config of LoRA adapters with this rank, None without a rank."""
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, target_modules="all-linear")


def run(arguments: list[str]) -> None:
    """Prunes and heals a model by a published method. Flags change the settings of the recipe.

    usage: hf-layerprune run RECIPE --model MODEL --data DATA --target_layers N --output_dir DIR [flags]
    example: hf-layerprune run default --model Qwen/Qwen3-0.6B --data text.jsonl --keep 20 --output_dir out
    """
    from ..pruning.arguments import with_given
    from ..recipes.fields import fill
    from ..recipes.prune import prune
    from ..recipes.recipe import RECIPE_KINDS, read_recipe, shipped_recipes

    kinds = [*RECIPE_KINDS, ResumeArguments]
    if help_wanted(arguments):
        names = (
            f"A YAML file, or one of {', '.join(shipped_recipes())}. `run RECIPE --help` shows its defaults."
        )
        shown = {} if arguments[0].startswith("-") else read_recipe(arguments[0])
        parse(run, arguments, kinds, model=False, positional=("RECIPE", names), defaults=shown)
    common = common_flags(arguments)
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is None and common.config is None:
        raise LayerPruneError(
            f"RECIPE is missing. Choose from {', '.join(shipped_recipes())}, or give a YAML file."
        )
    # Errors up to here name fields, later errors name flags.
    recipe = {} if name is None else read_recipe(name)
    recipe = with_given(recipe, read_config(common.config, kinds) if common.config else {})
    given = parse_given(run, arguments if name is None else arguments[1:], kinds)
    given = {flag: value for flag, value in given.items() if flag not in COMMON_FLAGS}
    if common.save_config:
        fill(RECIPE_KINDS, with_given(recipe, given))
        save_config(common.save_config, with_given(recipe, given))
    values = with_given(recipe, given)
    resume = values.pop("resume", False) or values.pop("resume_from_checkpoint", None)
    _, record = prune(recipe=values, resume_from_checkpoint=resume)
    print_table(record.to_dict())
    print(f"\nSaved in {values.get('output_dir', OUTPUT_DIR)}.")
