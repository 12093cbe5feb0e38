"""The commands `evaluate` and `card`, which measure models and write cards."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..data.arguments import BatchArguments, SequenceArguments
from ..errors import LayerPruneError
from ..files import check_folder_of
from ..recipes.arguments import ModelArguments, TextArguments
from .common import parse, write_json
from .flags import CardArguments, EvaluateArguments, OptionalDataArguments


def evaluate(arguments: list[str]) -> None:
    """Compares models on text and zero-shot tasks. The first MODEL is the dense one.

    usage: hf-layerprune evaluate MODEL [MODEL ...] [--data DATA] [--tasks TASK ...] [flags]
    example: hf-layerprune evaluate Qwen/Qwen3-0.6B pruned --data heldout.jsonl --tasks hellaswag piqa
    """
    kinds = [ModelArguments, OptionalDataArguments, TextArguments, SequenceArguments, BatchArguments]
    kinds = [*kinds, EvaluateArguments]
    names, source, data, text, sequence, batch, output = parse(evaluate, arguments, kinds, several=True)
    from ..data.processes import gather
    from ..data.sources import names_of
    from ..evaluation.comparison import compare_models
    from ..reports.tables import evaluation_rows, markdown_table

    check_folder_of(output.json)
    _check_tasks(data.sources, output)
    measure = _Measurement(names, source, data.sources, (text, sequence), output, batch.batch_tokens)
    earlier = gather(_read_json(output.json)["models"] if _can_go_on(output) else {})[0]
    read = names_of(data.sources) or None
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        results[name] = measure.of(name, earlier)
        if output.json:
            write_json(output.json, {"text": read, "models": earlier | results})
    compare_models(results)
    for task, _, file in (task.partition("=") for task in output.tasks):
        for found in results.values():
            if task in found["tasks"]:  # for a group, lm-eval lists the tasks of the group
                found["tasks"][task]["source"] = "/".join(Path(file).parts[-2:]) or None
    print(markdown_table(evaluation_rows(results)))
    if output.json:
        write_json(output.json, {"text": read, "models": results})


def _check_tasks(data: list[Path], output: EvaluateArguments) -> None:
    """Checks that a text or a task is given, and that no task is repeated.

    Raises:
        LayerPruneError: there is no text and no task, or a task is repeated.
    """
    if not data and not output.tasks:
        raise LayerPruneError("There is nothing to measure: give a text with --data, or --tasks, or both.")
    if output.limit is not None and output.limit < 2:
        raise LayerPruneError(f"limit is {output.limit}: it must be at least 2.")
    counts = Counter(task.partition("=")[0] for task in output.tasks)
    repeated = [name for name, times in counts.items() if times > 1]
    if repeated:
        raise LayerPruneError(f"tasks has {repeated[0]} more than once: put all its rows into one file.")


def _can_go_on(output: EvaluateArguments) -> bool:
    """Returns whether the results file may hold reusable results. Results of lm-eval are not reused."""
    return output.json is not None and Path(output.json).exists() and not output.lm_eval


class _Measurement:
    """Reads texts, questions and tokenizers of an evaluation before any weights are loaded.

    Args:
        names (list of `str`): folders or hub ids of the models.
        source ([`ModelArguments`]): the settings for loading models.
        data (list of `Path`): sources of text.
        form ([`TextArguments`], [`SequenceArguments`]): the settings for reading text and making sequences.
        output ([`EvaluateArguments`]): the settings of the evaluation.
        batch_tokens (`int`, *optional*): tokens in a forward pass.

    Raises:
        LayerPruneError: there is no such model, text or task.
    """

    def __init__(
        self,
        names: list[str],
        source: Any,
        data: list[Path],
        form: tuple[TextArguments, SequenceArguments],
        output: EvaluateArguments,
        batch_tokens: int | None,
    ):
        from ..evaluation.tasks import load_task, split_name
        from ..recipes.inputs import check_model, make_sequences, processor_of

        self.source, self.output, self.batch_tokens = source, output, batch_tokens
        text, sequence = form
        self.through_lm_eval = output.lm_eval and bool(output.tasks)
        self.questions: dict[str, Any] = {}
        if self.through_lm_eval:
            from ..evaluation.lm_eval import known_tasks

            known_tasks(output.tasks)
        else:
            self.questions = {split_name(task)[0]: load_task(task, output.limit) for task in output.tasks}
        self.tokenizers: dict[str, Any] = {}
        self.processors: dict[str, Any] = {}
        self.sequences: dict[str, Any] = {}
        self.form = form
        for name in names:
            config, self.tokenizers[name] = check_model(name, source, "evaluate")
            self.processors[name] = processor_of(name, source)
            if data:
                limits: Any = {"limit": output.max_sequences, "processor": self.processors[name]}
                self.sequences[name] = make_sequences(
                    data, text, sequence, config, self.tokenizers[name], **limits
                )

    def of(self, name: str, earlier: dict[str, Any]) -> dict[str, Any]:
        """Returns the results of a model. It reuses earlier results if model, text and settings are equal."""
        from ..data.batches import make_batches
        from ..evaluation.evaluate import evaluate_model
        from ..recipes.inputs import load_on_device, picture_collator
        from ..scoring.score import fingerprint

        output, tokenizer = self.output, self.tokenizers[name]
        model = load_on_device(name, self.source)
        batches, rows = [], self.sequences.get(name)
        if rows is not None:
            batches = make_batches(rows, 4, picture_collator(rows, self.processors[name], *self.form))
        settings = [output.lm_eval, output.limit, output.tasks, self.questions]
        mark = fingerprint([model], batches, settings)
        known = next((found for found in earlier.values() if found.get("fingerprint") == mark), None)
        results = known or evaluate_model(model, tokenizer, batches, self.questions, self.batch_tokens)
        if self.through_lm_eval and not known:
            from ..evaluation.lm_eval import run_lm_eval

            results |= run_lm_eval(model, tokenizer, output.tasks, output.limit)
        results["fingerprint"] = mark
        weights = list(Path(name).glob("model*.safetensors"))  # not the files of adapters
        if weights:
            results["file_mb"] = round(sum(file.stat().st_size for file in weights) / 2**20, 1)
        return results


def card(arguments: list[str]) -> None:
    """Writes the model card in FOLDER again, from its record and the results of `evaluate`.

    usage: hf-layerprune card FOLDER [flags]
    example: hf-layerprune card pruned --evaluation results.json --license apache-2.0
    """
    folder, output = parse(
        card, arguments, [CardArguments], positional=("FOLDER", "Folder of a run, with its record.")
    )
    from ..reports.card import write_card
    from ..reports.record import read_record, write_record

    record = read_record(folder)
    if record is None:
        raise LayerPruneError(f"{folder} holds no layer_pruning.json: give the folder of a run.")
    if output.base_model:
        record.model["name"] = output.base_model
    if output.evaluation:
        record.evaluation = _evaluation_of(folder, output.evaluation)
    write_record(record, folder)
    names = {"license": output.license, "dataset": output.datasets, "language": output.language}
    write_card(record.to_dict(), Path(folder), output.repository, **names)
    print(f"{Path(folder) / 'README.md'}")


def _evaluation_of(folder: str, evaluation: str) -> dict[str, Any]:
    """Returns the results of the dense model and of the model in `folder` from a file of `evaluate --json`.

    Raises:
        LayerPruneError: the file lacks results of that model.
    """
    results = _read_json(evaluation)
    (first, dense), *others = results["models"].items()
    name = Path(folder).resolve().name
    same = [pair for pair in others if Path(pair[0]).name == name]
    here = [pair for pair in same if len(same) == 1 or Path(pair[0]).resolve() == Path(folder).resolve()]
    found = here[0][1] if here else None
    if found is None:
        names = ", ".join(Path(other).name for other, _ in others) or f"{Path(first).name} alone"
        raise LayerPruneError(
            f"{evaluation} is of {names}, not of {name}: evaluate the dense model first, and this one."
        )
    if "tasks" in found and "difference" not in found:
        raise LayerPruneError(f"{evaluation} was not finished. Run evaluate again to continue.")
    for one in (dense, found):
        for task in one.get("tasks", {}).values():
            task.pop("perplexities", None)
    return {"text": results["text"], "dense": dense, "model": found}


def _read_json(path: str) -> dict[str, Any]:
    """Returns the results in a file that `evaluate --json` wrote.

    Raises:
        LayerPruneError: the file holds no such results.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        models = dict(found["models"])
        if not models:
            raise ValueError("no models")
        return {"text": found["text"], "models": models}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayerPruneError(f"{path} is not from evaluate --json: {error!r}") from error
