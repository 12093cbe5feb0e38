"""What a person looks at after a run, all from its record: a table, pictures, the model card."""

import json
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .adapters import PRUNED_BASE, is_hub_id
from .evaluation import mean_difference, share_kept, tasks_done
from .losses import DIVERGENCES, HIDDEN_ERRORS
from .record import DISTILLED, Record
from .scoring import UNITS, ScoreTable
from .tasks import TASKS


def table_rows(record: Record) -> list[list[str]]:
    """The run as a table of text: a row of headings, one for the dense model, one for each phase."""
    dense = record["dense"] or {}
    metric = next(iter(dense), None)
    speed = "tokens_per_second" in dense
    heads = ["layers", "removed", f"{record['pruning']['criterion']} score"]
    heads += [f"{metric} cut", "healed"] if metric else []
    heads += ["parameters", *(["tokens/s"] if speed else []), "seconds"]

    def row(
        layers: int, removed: str, score: str, cut: Any, healed: Any, parameters: int, seconds: str
    ) -> list[str]:
        cells = [str(layers), removed, score]
        cells += [_number(cut, metric), _number(healed, metric)] if metric else []
        cells += [f"{parameters / 1e6:.1f}M"]
        cells += [_number(healed or cut, "tokens_per_second")] if speed else []
        return [*cells, seconds]

    model = record["model"]
    rows = [heads, row(model["layers"], "", "", None, dense, model["parameters"], "")]
    for phase in record["phases"]:
        removed = ", ".join(str(removal["original"]) for removal in phase["removals"])
        scores = [removal["score"] for removal in phase["removals"]]
        score = ", ".join(f"{one:.3f}" for one in scores if one is not None)
        rows.append(
            row(
                len(phase["kept"]),
                removed,
                score,
                phase["cut"],
                phase["healed"],
                phase["parameters"],
                f"{phase['seconds']:.0f}",
            )
        )
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of text, the first of headings, as an aligned Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def evaluation_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Models side by side as a table of text, from [`evaluate_model`] and [`compare_models`]: a row for each
    measure, with standard errors where they are known."""
    columns = [_measures(one) for one in results.values()]
    heads = dict.fromkeys(head for column in columns for head in column)
    names = ["", *(Path(name).name for name in results)]
    return [names, *([head, *(column.get(head, "") for column in columns)] for head in heads)]


def _measures(found: Mapping[str, Any]) -> dict[str, str]:
    """What was found of one model, in words."""
    cells = {
        "layers": str(found["layers"]),
        "parameters": f"{found['parameters'] / 1e6:.1f}M",
        "weights MB": f"{found['weights_mb']:.0f}",
    }
    cells |= {"file MB": f"{found['file_mb']:.0f}"} if "file_mb" in found else {}
    cells |= {"peak memory MB": str(found["peak_memory_mb"])} if "peak_memory_mb" in found else {}
    if "perplexity" in found:  # not where only tasks were measured
        cells |= {
            "perplexity": f"{found['perplexity']:.2f}",
            "bits per byte": f"{found['bits_per_byte']:.3f}",
            "copied in one go": _with_error(found["copying"]["copied"], found["copying"]["standard_error"]),
            "copied token by token": f"{found['copying']['right']:.3f}",
            "tokens/s read": f"{found['tokens_per_second']:.0f}",
            "tokens/s generated": f"{found['generated_per_second']:.1f}",
        }
    tasks = found.get("tasks", {})
    cells |= {name: _with_error(task["accuracy"], task["standard_error"]) for name, task in tasks.items()}
    if tasks:
        cells["mean of tasks"] = _with_error(found["mean"], found["standard_error"])
        cells["less the first's"] = _with_error(*found["difference"].values())
    if "kept" in found:
        cells["kept above chance"] = "{share:.1%} ± {standard_error:.1%}".format(**found["kept"])
    steady = {name: task["stability"] for name, task in tasks.items() if "stability" in task}
    return cells | {f"stability, {name}": _with_error(*one.values()) for name, one in steady.items()}


def results_rows(records: Mapping[str, Record]) -> list[list[str]]:
    """Runs of one dense model side by side as a table of text, from their records with an `evaluation` (see
    `hf-layerprune card`): a row for the dense model, one for each run, in the order given, and the tasks that
    the dense model does ([`tasks_done`]). "Less the first's" is their mean less that of the first run of as
    many layers, with the paired standard error."""
    first = next(iter(records.values()))
    dense = first["evaluation"]["dense"]
    done = tasks_done(dense)
    heads = ["", "layers", "healing tokens", "perplexity", "copying", *done, "kept above chance"]
    leaders: dict[int, tuple[str, Any]] = {}

    def row(name: str, tokens: str, found: Mapping[str, Any], less: str) -> list[str]:
        kept = share_kept(dense, found)
        cells = [name, str(found["layers"]), tokens, f"{found['perplexity']:.1f}"]
        cells += [f"{found['copying']['right']:.3f}"]
        cells += [f"{found['tasks'][task]['accuracy']:.3f}" for task in done]
        return [*cells, "{share:.1%} ± {standard_error:.1%}".format(**kept), less]

    rows = [row("dense", "", dense, "")]
    for name, record in records.items():
        found = record["evaluation"]["model"]
        leader, best = leaders.setdefault(found["layers"], (name, found))
        less = "" if leader == name else "{:+.3f} ± {:.3f}".format(*mean_difference(best, found, done))
        rows.append(row(name, f"{healing_tokens(record):,}", found, less))
    return [[*heads, "less the first's"], *rows]


def healing_tokens(record: Record) -> int:
    """On how many tokens a run of a recipe trained in all."""
    recipe, steps = record["recipe"], record["training"].get("max_steps", 0)
    steps = max((entry.get("step", 0) for entry in record["log"]), default=max(0, steps))
    batch = recipe.get("per_device_train_batch_size", 8) * recipe.get("gradient_accumulation_steps", 1)
    return steps * batch * recipe.get("block_length", 256)


def plot_results(records: Mapping[str, Record], path: str | Path) -> None:
    """Draw what runs of one dense model keep above chance, with two standard errors, run by run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    dense = next(iter(records.values()))["evaluation"]["dense"]
    for place, record in enumerate(records.values()):
        found = record["evaluation"]["model"]
        kept = share_kept(dense, found)
        error = 200 * kept["standard_error"]
        axes.errorbar(place, 100 * kept["share"], error, fmt="o", capsize=3, color=f"C{found['layers'] % 10}")
    axes.axhline(100, color="gray", linestyle=":")
    axes.set_xticks(range(len(records)), list(records), rotation=40, ha="right", fontsize=8)
    axes.set_ylabel("kept of the dense model's mean\naccuracy above chance (%)")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def plot_scores(record: Record, folder: Path) -> list[str]:
    """Draw the score tables of all removals into `folder`; return the file names."""
    removals = [removal for phase in record["phases"] for removal in phase["removals"]]
    tables = [removal["table"] for removal in removals if "table" in removal]
    names = ["scores_all_phases.png"] if len(tables) > 1 else []
    if names:
        plot_phases([ScoreTable.from_dict(table) for table in tables], folder / names[0])
    for number, phase in enumerate(record["phases"], 1):
        for removal in [one for one in phase["removals"] if "table" in one]:  # of one table several may go
            names.append(f"scores_phase_{number}_layer_{removal['original']}.png")
            ScoreTable.from_dict(removal["table"]).plot(folder / names[-1])
    return names


def plot_record(record: Record, folder: Path) -> dict[str, str]:
    """Draw quality against depth, and the losses of training, into `folder`; the file names and what each
    shows, of what the record holds."""
    drawn = {}
    dense, phases = record["dense"] or {}, record["phases"]
    if "perplexity" in dense and phases:
        first = (record["model"]["layers"], dense["perplexity"])
        lines = {"cut": [first], "healed": [first]}
        for phase in phases:
            for name in lines:
                if phase[name]:
                    lines[name].append((len(phase["kept"]), phase[name]["perplexity"]))
        some = {name: points for name, points in lines.items() if len(points) > 1}
        plot_lines(some, folder / "quality.png", "decoder layers", "held-out perplexity")
        drawn["quality.png"] = "Quality against depth"
    names = ("loss", *DIVERGENCES, "ce", *(f"hidden_{kind}" for kind in HIDDEN_ERRORS))
    curves = {
        name: [(entry["step"], float(entry[name])) for entry in record["log"] if name in entry]
        for name in names
    }
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if len(curves) == 2:  # the loss, and the only part of it
        curves = {"loss": curves["loss"]} if "loss" in curves else curves
    if curves:
        plot_lines(curves, folder / "losses.png", "step", "training loss")
        drawn["losses.png"] = "Losses of training"
    return drawn


def plot_phases(tables: list[ScoreTable], path: str | Path) -> None:
    """Draw the scores of several removals, one after another, as a heat map: a row for each removal, a column
    for each original layer. Layers that were gone or no candidates are left white, the one that went next
    has a cross."""
    import numpy as np
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    width = 1 + max(layer for table in tables for layer in table.kept)
    grid = np.full((len(tables), width), np.nan)
    for row, table in enumerate(tables):
        for layer, score in table.scores.items():
            grid[row, table.kept[layer]] = score
    size = (max(6.0, 0.28 * width), max(2.2, 1.5 + 0.25 * len(tables)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    threshold = float(np.nanmedian(np.abs(grid))) or 1.0  # most scores are alike, a few very large
    picture = axes.imshow(grid, aspect="auto", cmap="viridis", norm=SymLogNorm(threshold))
    figure.colorbar(picture, label=UNITS[tables[0].criterion])
    chosen = [table.kept[table.ranking()[0]] for table in tables]
    axes.scatter(chosen, range(len(tables)), marker="x", color="red")
    axes.set_xticks(range(width))
    axes.set_yticks(range(len(tables)), [str(row + 1) for row in range(len(tables))])
    axes.tick_params("x", labelsize=7)
    axes.set_xlabel("decoder layer (index in the original model)")
    axes.set_ylabel("removal")
    figure.savefig(path, dpi=120)


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, x: str, y: str, log: bool = False
) -> None:
    """Draw named lines of points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if all(isinstance(place, int) for points in lines.values() for place, _ in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:  # but for those that are not above zero
        heights = [abs(height) for points in lines.values() for _, height in points]
        axes.set_yscale("symlog", linthresh=statistics.median(heights) or 1.0)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_points(points: Mapping[str, float], path: str | Path, x: str) -> None:
    """Draw named numbers one below another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1 + 0.3 * len(points)), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(points.values()), list(points), "o")
    for place, value in enumerate(points.values()):
        spot: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.4g}", (value, place), fontsize=8, **spot)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set_xlabel(x)
    figure.savefig(path, dpi=120)


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
    """Write the model card (README.md) and the pictures in it into `folder`.

    Args:
        record (`dict`): of the run that made the model.
        folder (`Path`): of the model, or of its adapters.
        repository (`str`, *optional*): hub id that the model is pushed to.
        language, license, tags, model_name, finetuned_from, dataset, others: what
            [`~transformers.Trainer.push_to_hub`] hands to a model card; `others` have no place in ours.
    """
    base = finetuned_from or record["model"]["name"]
    on_hub, adapter = is_hub_id(base), (folder / PRUNED_BASE).is_file()
    name = model_name or Path(folder).resolve().name
    phases = record["phases"]
    kept = phases[-1]["kept"] if phases else list(range(record["model"]["layers"]))
    removed = [removal["original"] for phase in phases for removal in phase["removals"]]
    healed = (phases[-1]["healed"] if phases else None) or {}
    extra = [tags] if isinstance(tags, str) else tags or []
    distilled = ["knowledge-distillation"] if record["method"]["healing"] == DISTILLED["healing"] else []
    measured = record.get("evaluation")
    auto_class, pipeline = _how_to_load(folder)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out-text",
            dataset_name="held-out text of the run",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in healed.items()
        if metric in ("perplexity", "loss", "accuracy")
    ]
    for task, found in measured["model"].get("tasks", {}).items() if measured else ():
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
    data = ModelCardData(
        language=language,
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=pipeline,
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if on_hub else None,
        datasets=dataset,
        tags=sorted({"hf_layerprune", "layer-pruning", *distilled, *extra}),
        model_name=name,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=files("hf_layerprune").joinpath("model_card.md").read_text(encoding="utf-8"),
        name=name,
        source=repository or name,
        auto_class=auto_class,
        base=base if on_hub else Path(base).name,
        on_hub=on_hub,
        adapter=adapter,
        removed=removed,
        kept=kept,
        record=record,
        table=markdown_table(table_rows(record)),
        measured=markdown_table(
            evaluation_rows({f"{base} (dense)": measured["dense"], name: measured["model"]})
        )
        if measured
        else None,
        text=measured and measured["text"],
        drawn=plot_record(record, folder),
        plots=plot_scores(record, folder),
        recipe=yaml.safe_dump(record["recipe"], sort_keys=False) if "recipe" in record else None,
    )
    card.save(folder / "README.md")


# How a class of models is loaded, and what the hub calls what it does, by the end of its name.
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
    """The auto class that loads the model in `folder`, and the hub's name of its task."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = (config.get("architectures") or [""])[0]
    known = (found for end, found in _AUTO_CLASSES.items() if named.endswith(end))
    return next(known, ("AutoModelForCausalLM", "text-generation"))


def _number(values: dict[str, float] | None, name: str | None) -> str:
    value = None if values is None or name is None else values.get(name)
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
