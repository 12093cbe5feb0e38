"""Commands that inspect, score and remove layers without training: inspect, score, prune, phases."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.arguments import SequenceArguments
from ..errors import LayerPruneError
from ..files import check_folder_of
from ..recipes.arguments import CalibrationArguments, ModelArguments, SampleArguments, TextArguments
from .common import finish, parse, write_json
from .flags import DataArguments, InspectArguments, SaveArguments, ScoreArguments


def inspect(arguments: list[str]) -> None:
    """Lists the layers of MODEL and which can be removed, from its config alone.

    usage: hf-layerprune inspect MODEL [flags]
    example: hf-layerprune inspect Qwen/Qwen3-0.6B
    """
    name, source, output = parse(inspect, arguments, [ModelArguments, InspectArguments])
    from ..checkpoints.loading import load_meta_model
    from ..reports.tables import markdown_table
    from ..surgery.inspection import inspect_layers

    check_folder_of(output.json)
    found = inspect_layers(load_meta_model(name, source.trust_remote_code, source.gguf_file))
    rows = [["layer", "original", "kind", "parameters", "removable"]]
    for layer in found.layers:
        parameters = f"{layer.parameters / 1e6:.2f}M"
        can_go = "no" if layer.refused else "yes"
        rows.append([str(layer.layer), str(layer.original), layer.kind, parameters, can_go])
    print(markdown_table(rows))
    print(f"\n{found.model_type}: {len(found.layers)} of {found.original_layers} layers, ", end="")
    print(f"{found.parameters / 1e6:.1f}M parameters. The first and the last layer are protected by default.")
    for layer in found.layers:
        if layer.refused:
            print(f"\n{layer.refused}")
    if output.json:
        write_json(output.json, found.to_dict())


def score(arguments: list[str]) -> None:
    """Scores how much each layer of MODEL matters.

    usage: hf-layerprune score MODEL --data DATA [flags]
    example: hf-layerprune score Qwen/Qwen3-0.6B --data text.jsonl --plot scores.png
    """
    from ..pruning.arguments import ScoringArguments

    kinds = [ModelArguments, DataArguments, TextArguments, SequenceArguments, CalibrationArguments]
    parsed = parse(score, arguments, [*kinds, ScoringArguments, ScoreArguments])
    name, source, data, text, sequence, sample, scoring, output = parsed
    from ..data.batches import make_batches
    from ..pruning.prune import scoring_settings
    from ..recipes.inputs import check_model, load_on_device, make_sequences
    from ..scoring.score import check_plot_path, read_table, score_layers

    if output.plot:
        check_plot_path(output.plot)
    check_folder_of(output.json)
    is_table = output.compare is not None and output.compare.endswith(".json")
    other = read_table(output.compare) if is_table else None
    config, tokenizer = check_model(name, source, "score", scoring.criterion)
    sources = [data.sources] if is_table or not output.compare else [data.sources, output.compare]
    sequences = [
        make_sequences(one, text, sequence, config, tokenizer, sample.calibration_sequences)
        for one in sources
    ]
    model = load_on_device(name, source)

    def table_of(sequences: Any, journal: str | None = None) -> Any:
        settings = scoring_settings(scoring) | {"protected": scoring.protected, "journal": journal}
        return score_layers(
            model, make_batches(sequences, 4), scoring.criterion, block_size=output.block_size, **settings
        )

    table = table_of(sequences[0], output.json and output.json + ".part")
    if output.plot:
        table.plot(output.plot)
    if output.json:
        write_json(output.json, table.to_dict())
    for layer in table.ranking():
        line = f"layer {layer:3d}   {scoring.criterion} {table.scores[layer]:9.5f}"
        error = table.errors.get(layer)
        print(line if error is None else f"{line} +- {error:.5f}")
    if output.compare:
        _print_comparison(output.compare, table, other or table_of(sequences[1]))


def _print_comparison(name: str, table: Any, other: Any) -> None:
    """Prints how similarly two score tables rank the layers.

    Raises:
        LayerPruneError: the tables have blocks of different sizes.
    """
    from ..scoring.score import rank_correlation

    if other.block_size != table.block_size:
        raise LayerPruneError(
            f"{name} scores blocks of {other.block_size} layers, not of {table.block_size}."
        )
    few = max(1, len(table.scores) // 4)
    least = [{one.kept[layer] for layer in one.ranking()[:few]} for one in (table, other)]
    print(f"\nCompared with {name}: rank correlation {rank_correlation(table, other):.3f};")
    print(f"of the {few} least important layers of each, {len(least[0] & least[1])} are the same.")


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
    from ..recipes.inputs import check_model, load_on_device, make_sequences
    from ..reports.record import check_folder_is_free, write_record
    from ..surgery.decoder import predicts_next_token

    check_folder_is_free(output.output_dir)
    config, tokenizer = check_model(name, source, "prune", removal.criterion)
    sizes = sample.calibration_sequences, sample.heldout_sequences
    sequences = make_sequences(data.sources, text, sequence, config, tokenizer, sum(sizes))
    calibration, heldout, _ = split_sequences(sequences, *sizes)
    model = load_on_device(name, source)
    record = prune_layers(
        model,
        removal,
        calibration=calibration,
        # Models of other kinds have no perplexity.
        evaluation=HeldOutText(heldout) if predicts_next_token(model) else None,
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
    from ..recipes.inputs import check_loading_for_training, check_model, load_on_device, make_sequences

    check_loading_for_training(replace(source, device_map=None))
    config, tokenizer = check_model(name, source, "phases")
    sizes = sample.calibration_sequences, sample.heldout_sequences
    sequences = make_sequences(data.sources, text, sequence, config, tokenizer, sum(sizes))
    calibration, heldout, _ = split_sequences(sequences, *sizes)

    written = replace(source, gguf_file=None)  # a phase does not write a GGUF file

    def load(folder: str | None) -> Any:
        return load_on_device(folder or name, source if folder is None else written)

    record = run_phases(
        load,
        command,
        output.output_dir,
        args=removal,
        calibration=calibration,
        evaluation=HeldOutText(heldout),
    )
    last = Path(output.output_dir) / f"phase_{len(record.phases)}" / "healed"
    settings: dict[str, Any] = {"legacy_rope": output.legacy_rope}
    if source.gguf_file is None:
        settings["dtype"] = stored_dtype(name, source.trust_remote_code)
    save_model(load(str(last)), output.output_dir, verify=output.verify_save, **settings)
    finish(name, tokenizer, record.to_dict(), output.output_dir)
    print(f"\nSaved in {output.output_dir}. The model of each phase is in its folder there.")
