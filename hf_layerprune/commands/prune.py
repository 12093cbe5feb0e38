"""The commands `prune` and `phases`, which remove layers and do not train the model themselves."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data.arguments import SequenceArguments
from ..recipes.arguments import ModelArguments, SampleArguments, TextArguments
from .common import finish, keep_settings, parse
from .flags import DataArguments, SaveArguments


def prune(arguments: list[str]) -> None:
    """Removes the least important layers of MODEL one by one, without training.

    usage: hf-layerprune prune MODEL --data DATA --target_layers N --output_dir DIR [flags]
    example: hf-layerprune prune Qwen/Qwen3-0.6B --data text.jsonl --target_layers 20 --output_dir out
    """
    from ..pruning.arguments import RemovalArguments

    kinds = [ModelArguments, DataArguments, TextArguments, SequenceArguments, SampleArguments]
    parsed = parse(prune, arguments, [*kinds, RemovalArguments, SaveArguments])
    name, source, data, text, sequence, sample, removal, output = parsed
    from ..checkpoints.saving import save_model
    from ..data.sequences import split_sequences
    from ..evaluation.evaluate import HeldOutText
    from ..pruning.prune import prune_layers
    from ..recipes.inputs import (
        check_model,
        load_on_device,
        load_writer,
        make_sequences,
        picture_collator,
        processor_of,
    )
    from ..reports.record import check_folder_is_free, write_record
    from ..surgery.decoder import predicts_next_token

    check_folder_is_free(output.output_dir)
    config, tokenizer = check_model(name, source, "prune", removal.criterion)
    sizes = sample.calibration_sequences, sample.heldout_sequences
    writer, processor = partial(load_writer, name, source), processor_of(name, source)
    sequences = make_sequences(data.sources, text, sequence, config, tokenizer, sum(sizes), writer, processor)
    calibration, heldout, _ = split_sequences(sequences, *sizes)
    collate = picture_collator(sequences, processor, text, sequence)
    keep_settings(output.output_dir)
    model = load_on_device(name, source)
    record = prune_layers(
        model,
        removal,
        calibration=calibration,
        # Other kinds of models have no perplexity.
        evaluation=HeldOutText(heldout, collate=collate) if predicts_next_token(model) else None,
        collate=collate,
    )
    save_model(model, output.output_dir, verify=output.verify_save, legacy_rope=output.legacy_rope)
    write_record(record, output.output_dir)
    finish(name, tokenizer, record.to_dict(), output.output_dir)
    advice = "train it on your task" if record.dense is None else "`hf-layerprune distill` does both"
    print(f"\nSaved in {output.output_dir}. It was not healed: {advice}.")


def phases(arguments: list[str]) -> None:
    """Removes layers of MODEL in phases, and trains the model in each by your own COMMAND.

    usage: hf-layerprune phases MODEL --data DATA --target_layers N --output_dir DIR [flags] -- COMMAND
    example: hf-layerprune phases Qwen/Qwen3-0.6B --data text.jsonl --keep 20 --output_dir out
        -- python train.py {model} {output_dir}
    """
    from ..pruning.arguments import PhaseSizeArguments

    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, command = arguments[:at], arguments[at + 1 :]
    kinds = [ModelArguments, DataArguments, TextArguments, SequenceArguments, SampleArguments]
    parsed = parse(phases, arguments, [*kinds, PhaseSizeArguments, SaveArguments])
    name, source, data, text, sequence, sample, removal, output = parsed
    from ..checkpoints.loading import stored_dtype
    from ..checkpoints.saving import save_model
    from ..data.sequences import split_sequences
    from ..evaluation.evaluate import HeldOutText
    from ..pruning.command_phases import run_phases
    from ..recipes.inputs import (
        check_loading_for_training,
        check_model,
        load_on_device,
        load_writer,
        make_sequences,
        picture_collator,
        processor_of,
    )

    check_loading_for_training(replace(source, device_map=None))
    config, tokenizer = check_model(name, source, "phases")
    sizes = sample.calibration_sequences, sample.heldout_sequences
    writer, processor = partial(load_writer, name, source), processor_of(name, source)
    sequences = make_sequences(data.sources, text, sequence, config, tokenizer, sum(sizes), writer, processor)
    calibration, heldout, _ = split_sequences(sequences, *sizes)
    collate = picture_collator(sequences, processor, text, sequence)

    written = replace(source, gguf_file=None)  # a phase does not write a GGUF file

    def load(folder: str | None) -> Any:
        return load_on_device(folder or name, source if folder is None else written)

    record = run_phases(
        load,
        command,
        output.output_dir,
        args=removal,
        calibration=calibration,
        evaluation=HeldOutText(heldout, collate=collate),
        collate=collate,
    )
    last = Path(output.output_dir) / f"phase_{len(record.phases)}" / "healed"
    settings: dict[str, Any] = {"legacy_rope": output.legacy_rope}
    if source.gguf_file is None:
        settings["dtype"] = stored_dtype(name, source.trust_remote_code)
    save_model(load(str(last)), output.output_dir, verify=output.verify_save, **settings)
    finish(name, tokenizer, record.to_dict(), output.output_dir)
    keep_settings(output.output_dir)
    print(f"\nSaved in {output.output_dir}. The model of each phase is in its folder there.")
