"""Writes the model card of a run from its record."""

import copy
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.comparison import compare_models
from ..evaluation.tasks import TASKS
from ..surgery.peft import PRUNED_BASE, is_hub_id
from .plots import plot_record, plot_scores
from .record import DISTILLED, Record
from .tables import (
    ABOVE_CHANCE,
    EFFECTIVE_QUESTIONS,
    candidate_rows,
    evaluation_rows,
    is_steady,
    markdown_table,
    qualities_of,
    table_rows,
    text_rows,
)


def write_card(
    record: Record,
    folder: Path,
    repository: str | None = None,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | list[str] | None = None,
    **others: Any,
) -> None:
    """Writes the model card (README.md) and its plots into `folder`.

    Args:
        record (`dict`): the record of the run.
        folder (`Path`): the folder of the model or of its adapters.
        repository (`str`, *optional*): hub id that the model is pushed to.
        language, license, tags, model_name, finetuned_from, dataset, others: arguments that
            [`~transformers.Trainer.push_to_hub`] passes to a model card. `others` are ignored.
    """
    model = record["model"]
    base = finetuned_from or model["name"] or f"A model of type {model['model_type']}"
    name = model_name or Path(folder).resolve().name
    adapter, on_hub = (folder / PRUNED_BASE).is_file(), is_hub_id(base)
    auto_class, pipeline = _how_to_load(folder)
    distilled = record["method"]["healing"] == DISTILLED["healing"]
    extra = [tags] if isinstance(tags, str) else tags or []
    data = ModelCardData(
        language=language,
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=pipeline,
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if on_hub else None,
        datasets=dataset,
        tags=sorted({"hf_layerprune", "layer-pruning", *["knowledge-distillation"] * distilled, *extra}),
        model_name=name,
        eval_results=_held_out_results(record) + _task_results(record) or None,
    )
    phases = record["phases"]
    card = ModelCard.from_template(
        data,
        template_str=files(__package__).joinpath("model_card.md").read_text(encoding="utf-8"),
        name=name,
        source=repository or name,
        auto_class=auto_class,
        base=base if on_hub else Path(base).name,
        on_hub=on_hub,
        adapter=adapter,
        removed=[removal["original"] for phase in phases for removal in phase["removals"]],
        kept=phases[-1]["kept"] if phases else list(range(model["layers"])),
        record=record,
        pruning={name: value for name, value in record["pruning"].items() if value is not None},
        drawn=plot_record(record, folder),
        plots=plot_scores(record, folder),
        recipe=yaml.safe_dump(record["recipe"], sort_keys=False) if "recipe" in record else None,
        **_tables(record, base, name),
    )
    card.save(folder / "README.md")


def _tables(record: Record, base: str, name: str) -> dict[str, Any]:
    """Returns the tables of a card and their explanations, by their names in the template."""
    table, texts, candidates = table_rows(record), text_rows(record), candidate_rows(record)
    tables = {
        "table": markdown_table(table),
        "texts": markdown_table(texts) if len(texts) > 1 else None,
        "healed_apart": any(head.endswith("after healing") for head in table[0]),
        "candidates": markdown_table(candidates) if len(candidates) > 1 else None,
        "candidates_compared": len(candidates) - 1,
        "reconstructed": any("reconstruction" in phase for phase in record["phases"]),
        "measured_by": qualities_of(record)[2],
        "measured": None,
        "explained": [],
    }
    evaluation = copy.deepcopy(record.get("evaluation"))
    if evaluation:
        compared = {f"{base} (dense)": evaluation["dense"], name: evaluation["model"]}
        compare_models(compared)
        rows = evaluation_rows(compared)
        heads = [row[0] for row in rows]
        explained = _explanations(evaluation["text"], evaluation["model"], heads)
        tables |= {"measured": markdown_table(rows), "explained": explained}
    return tables


def _held_out_results(record: Record) -> list[EvalResult]:
    """Returns the evaluation of the final model by the run, in the format of the hub."""
    _, qualities, _ = qualities_of(record)
    final: dict[str, Any] = next(filter(None, reversed(qualities[-1])), {}) if qualities else {}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out-text",
            dataset_name="held-out text of the run",
            metric_type=metric.removeprefix("eval_"),
            metric_value=round(value, 4),
        )
        for metric, value in final.items()
        if metric.removeprefix("eval_") in ("perplexity", "loss", "accuracy")
    ]


def _task_results(record: Record) -> list[EvalResult]:
    """Returns the task accuracies of [`evaluate_model`], in the format of the hub."""
    evaluation = record.get("evaluation")
    results = []
    for task, found in evaluation["model"].get("tasks", {}).items() if evaluation else ():
        known, file = TASKS.get(task), found.get("source")
        asked = f"{found['questions']} questions" + (f" of {file}" if file else "")
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=(known.dataset or task) if known else task,
                dataset_name=task,
                dataset_config=known.config if known else None,
                dataset_split=(known.split or None) if known and not file else None,
                metric_type="acc_norm" if known and known.normalize else "acc",
                metric_value=round(found["accuracy"], 4),
                metric_name=f"accuracy, zero-shot, {asked}",
            )
        )
    return results


def _explanations(text: str, model: Mapping[str, Any], rows: Sequence[str]) -> list[str]:
    """Returns an explanation of each metric in the rows of the evaluation."""
    tasks = model.get("tasks", {})
    sentences = {
        "perplexity": f"Perplexity and copy accuracy are measured on {text}.",
        "copy accuracy": "Copy accuracy is the next-token accuracy on a passage the model has just read. "
        "Copied without error is the share of that passage that greedy decoding repeats correctly.",
        "mean accuracy": "The tasks are zero-shot, with the prompts of lm-evaluation-harness. "
        "± is one standard error.",
        "Δ accuracy": "Δ accuracy is the difference in mean accuracy from the dense model, by question.",
        ABOVE_CHANCE: "Accuracy above chance is the mean accuracy minus chance, as a share of the dense "
        "model's. It counts the tasks in which the dense model is above chance by two standard errors.",
    }
    said = [sentence for head, sentence in sentences.items() if head in rows]
    if any("agreement" in task for task in tasks.values()):
        said.append(
            "Agreement is the share of the questions that both models answer right or both answer wrong."
        )
    if any(map(is_steady, tasks.values())):
        said.append(
            "Stability (LLM-Streamline) is the same share, weighted by the spread of the dense model's "
            "perplexities of the choices. It is shown for tasks with at least "
            f"{EFFECTIVE_QUESTIONS} effective questions."
        )
    return said


# The auto class and the hub's task name for a class of models, by the end of its name.
_AUTO_CLASSES = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForPreTraining": ("AutoModelForPreTraining", "fill-mask"),
    "ForConditionalGeneration": ("AutoModelForImageTextToText", "image-text-to-text"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "Model": ("AutoModel", "feature-extraction"),
}


def _how_to_load(folder: Path) -> tuple[str, str]:
    """Returns the auto class that loads the model in `folder`, and the hub's name of its task."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = (config.get("architectures") or [""])[0]
    known = (found for end, found in _AUTO_CLASSES.items() if named.endswith(end))
    return next(known, ("AutoModelForCausalLM", "text-generation"))
