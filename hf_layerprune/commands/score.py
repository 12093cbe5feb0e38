"""The commands `inspect` and `score`, which describe and score layers."""

from functools import partial
from typing import Any

from ..data.arguments import SequenceArguments
from ..errors import LayerPruneError
from ..files import check_folder_of
from ..recipes.arguments import CalibrationArguments, ModelArguments, TextArguments
from .common import parse, write_json
from .flags import DataArguments, InspectArguments, ScoreArguments


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
    from ..data.processes import process_index
    from ..pruning.prune import scoring_settings
    from ..recipes.inputs import (
        check_model,
        load_on_device,
        load_writer,
        make_sequences,
        picture_collator,
        processor_of,
    )
    from ..scoring.score import check_plot_path, read_table, score_layers

    if output.plot:
        check_plot_path(output.plot)
    check_folder_of(output.json)
    is_table = output.compare is not None and output.compare.endswith(".json")
    other = read_table(output.compare) if is_table else None
    config, tokenizer = check_model(name, source, "score", scoring.criterion)
    inputs = partial(load_writer, name, source), processor_of(name, source)
    sources = [data.sources] if is_table or not output.compare else [data.sources, output.compare]
    sequences = [
        make_sequences(one, text, sequence, config, tokenizer, sample.calibration_sequences, *inputs)
        for one in sources
    ]
    model = load_on_device(name, source)

    def table_of(sequences: Any, journal: str | None = None) -> Any:
        settings = scoring_settings(scoring) | {"protected": scoring.protected, "journal": journal}
        return score_layers(
            model,
            make_batches(sequences, 4, picture_collator(sequences, inputs[1], text, sequence)),
            scoring.criterion,
            block_size=output.block_size,
            **settings,
        )

    table = table_of(sequences[0], output.json and output.json + ".part")
    if output.plot and process_index() == 0:
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
    """Prints the rank correlation of two score tables.

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
