"""What a person looks at after a run, all from its record: a table, pictures, the model card."""

import copy
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.evaluate import compare_models, mean_difference, share_kept, tasks_done
from ..evaluation.tasks import TASKS
from ..forward.token_losses import DIVERGENCES, HIDDEN_ERRORS
from ..scoring.score import reads_text
from ..scoring.table import UNITS, ScoreTable
from ..surgery.peft import PRUNED_BASE, is_hub_id
from .record import DISTILLED, Record


EFFECTIVE_QUESTIONS = 30  # over how many the weights of a stability must spread


def table_rows(record: Record) -> list[list[str]]:
    """The run as a table of text: a row of headings, one for the dense model, one for each phase. A column
    stands there only where the record has something for it."""
    dense, phases, metrics = _qualities(record)
    cut, healed = (any(phase[i] for phase in phases) for i in (0, 1))
    speed = _speeds_compare(record, [dense, *(found[1] or found[0] for found in phases)])
    heads = ["layers", "removed", f"{record['pruning']['criterion']} score"]
    for metric in metrics:
        heads += (
            [f"{metric} cut", "healed" if len(metrics) == 1 else f"{metric} healed"]
            if cut and healed
            else [metric]
        )
    heads += ["parameters", *(["tokens/s"] if speed else []), "seconds"]

    def row(
        layers: int, removed: str, score: str, found: tuple[Any, Any], parameters: int, seconds: str
    ) -> list[str]:
        cells = [str(layers), removed, score]
        for metric in metrics:
            both = [_number(one, metric) for one in found]
            cells += both if cut and healed else [both[1] or both[0]]
        cells += [f"{parameters / 1e6:.1f}M"]
        cells += [_number(found[1] or found[0], "tokens_per_second")] if speed else []
        return [*cells, seconds]

    model = record["model"]
    rows = [heads, row(model["layers"], "", "", ({}, dense), model["parameters"], "")]
    for phase, found in zip(record["phases"], phases, strict=True):
        removed = ", ".join(str(removal["original"]) for removal in phase["removals"])
        scores = [removal["score"] for removal in phase["removals"]]
        score = ", ".join(f"{one:.3f}" for one in scores if one is not None)
        seconds = f"{phase['seconds']:.0f}"
        rows.append(row(len(phase["kept"]), removed, score, found, phase["parameters"], seconds))
    return filled_columns(rows)


def _qualities(
    record: Record,
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], dict[str, Any]]], list[str]]:
    """What was measured of the dense model, of each phase's model when cut and when healed, and which metrics
    are shown: by the run's own `evaluation`, else by the Trainer, which measures no model just cut."""
    phases = record["phases"]
    if record["dense"] or not phases or any(phase["cut"] for phase in phases):
        dense = record["dense"] or {}
        own = [(phase["cut"] or {}, phase["healed"] or {}) for phase in phases]
        return dense, own, list(dense)[:1]
    at_depth: dict[int, dict[str, Any]] = {}
    for found in record.get("evaluations", []):  # the last at each depth counts
        values = {name: value for name, value in found.items() if _is_quality(name, value)}
        at_depth[found["layers"]] = at_depth.get(found["layers"], {}) | values
    metrics: dict[str, list[Any]] = {}  # of those that are the same everywhere the first is shown
    for name in dict.fromkeys(name for values in at_depth.values() for name in values):
        column = [values.get(name) for values in at_depth.values()]
        if not any(_same(column, other) for other in metrics.values()):
            metrics[name] = column
    healed: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, at_depth.get(len(phase["kept"]), {})) for phase in phases
    ]
    return at_depth.get(record["model"]["layers"], {}), healed, list(metrics)


def _speeds_compare(record: Record, measured: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the speeds in a record were all measured in one precision."""
    precisions = {found.get("precision") for found in measured if "tokens_per_second" in found}
    # Earlier versions did not note it. They read in that of training what was healed after one removal, but
    # not what it was compared with.
    healed_later = "select" in record["pruning"] and any(phase["healed"] for phase in record["phases"])
    return len(precisions) == 1 and not (None in precisions and healed_later)


def _is_quality(name: str, value: Any) -> bool:
    """Whether a metric of the Trainer is of the model, and not of time, memory or progress."""
    return isinstance(value, (int, float)) and not re.search(
        r"^(step|layers|epoch)$|(runtime|_per_second|_time|num_tokens|num_input_tokens_seen)$|_mem_", name
    )


def _same(first: list[Any], second: list[Any]) -> bool:
    return all(
        one == other or (None not in (one, other) and math.isclose(one, other, rel_tol=1e-4))
        for one, other in zip(first, second, strict=True)
    )


def text_rows(record: Record) -> list[list[str]]:
    """What was read for what, and how much of it, as a table of text; empty where the record does not say."""
    texts = record.get("texts") or _texts_of_recipe(record)
    if "evaluation" not in texts and "tokens" in (record["dense"] or {}):  # of a function of the user's own
        texts = texts | {"evaluation": {"tokens": record["dense"]["tokens"]}}
    rows = [["", "text", "sequences", "tokens"]]
    for use in sorted(texts, key=lambda use: ("calibration", "healing", "evaluation").index(use.split()[0])):
        sizes = [texts[use].get(size) for size in ("sequences", "tokens")]
        rows.append([use, texts[use].get("name") or "", *(f"{size:,}" if size else "" for size in sizes)])
    return filled_columns([row for i, row in enumerate(rows) if not i or any(row[1:])])


def _texts_of_recipe(record: Record) -> dict[str, dict[str, Any]]:
    """The texts of a run of a recipe whose record, of an earlier version, does not name them."""
    if "recipe" not in record:
        return {}
    recipe, length = record["recipe"], record["recipe"].get("block_length", 256)
    counts = {
        "calibration": recipe.get("calibration_blocks", 16)
        * reads_text(record["pruning"]["criterion"], None),
        "evaluation": recipe.get("heldout_blocks", 16),
    }
    texts = {use: {"sequences": count, "tokens": count * length} for use, count in counts.items()}
    texts["healing"] = {"tokens": healing_tokens(record)}
    return {use: {"name": recipe["data"], **found} for use, found in texts.items() if found["tokens"]}


def filled_columns(rows: list[list[str]]) -> list[list[str]]:
    """Rows of text without the columns in which nothing stands below the heading."""
    filled = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in filled] for row in rows]


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
    measure, with standard errors where they are known. Speeds stand there only if all were measured in one
    precision."""
    speeds = len({found["dtype"] for found in results.values() if "dtype" in found}) < 2
    columns = [_measures(found, speeds, i == 0) for i, found in enumerate(results.values())]
    heads = dict.fromkeys(head for column in columns for head in column)
    names = ["", *(Path(name).name for name in results)]
    return [names, *([head, *(column.get(head, "") for column in columns)] for head in heads)]


def _measures(found: Mapping[str, Any], speeds: bool, is_first: bool) -> dict[str, str]:
    """What was found of one model, in words."""
    cells = {
        "layers": str(found["layers"]),
        "parameters": f"{found['parameters'] / 1e6:.1f}M",
        "weights MB": f"{found['weights_mb']:.0f}",
    }
    cells |= {"precision": found["dtype"]} if "dtype" in found else {}
    cells |= {"file MB": f"{found['file_mb']:.0f}"} if "file_mb" in found else {}
    cells |= {"peak memory MB": str(found["peak_memory_mb"])} if "peak_memory_mb" in found else {}
    if "perplexity" in found:
        cells |= {
            "perplexity": f"{found['perplexity']:.2f}",
            "bits per byte": f"{found['bits_per_byte']:.3f}",
        }
    if "copying" in found:
        cells |= {
            "copied in one go": _with_error(found["copying"]["copied"], found["copying"]["standard_error"]),
            "copied token by token": f"{found['copying']['right']:.3f}",
        }
    if speeds and "tokens_per_second" in found:
        cells |= {
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
    if is_first:  # with which the others are compared
        return cells
    for name, task in tasks.items():
        if "agreement" in task:
            cells[f"agreement, {name}"] = _with_error(*task["agreement"].values())
        if is_steady(task):
            error = task["stability"]["standard_error"]
            cells[f"stability, {name}"] = _with_error(task["stability"]["stability"], error)
    return cells


def is_steady(task: Mapping[str, Any]) -> bool:
    """Whether the stability of a task is of many questions, not of one or two that outweigh the others."""
    return task.get("stability", {}).get("effective_questions", 0.0) >= EFFECTIVE_QUESTIONS


def _explanations(text: str, model: Mapping[str, Any], rows: Sequence[str]) -> list[str]:
    """What a reader of [`evaluation_rows`] has to know, for each measure that stands there."""
    tasks = model.get("tasks", {})
    sentences = {
        "perplexity": f"Perplexity and copying are measured on {text}.",
        "mean of tasks": "The tasks are zero-shot, with the prompts of lm-evaluation-harness. "
        "± is one standard error.",
        "kept above chance": "Kept above chance is the share of the dense model's mean accuracy above "
        "chance, over the tasks in which the dense model is above chance by two standard errors. Its error "
        "is paired by question.",
        "copied in one go": "Copied in one go is the share of a passage just read that greedy decoding "
        "repeats before its first mistake. Copied token by token is the next-token accuracy on that passage.",
    }
    said = [sentence for head, sentence in sentences.items() if head in rows]
    if any("agreement" in task for task in tasks.values()):
        said.append(
            "Agreement is the share of the questions that both models answer right or both answer wrong."
        )
    if any(map(is_steady, tasks.values())):
        said.append(
            "Stability (LLM-Streamline) is the same share, weighted by how far the dense model's "
            f"perplexities of the choices spread. It is shown where the weights spread over "
            f"{EFFECTIVE_QUESTIONS} effective questions or more."
        )
    return said


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
    if record.get("texts"):
        return record["texts"].get("healing", {}).get("tokens", 0)
    recipe, steps = record["recipe"], record["training"].get("max_steps", 0)
    steps = max((entry.get("step", 0) for entry in record["log"]), default=max(0, steps))
    batch = recipe.get("per_device_train_batch_size", 8) * recipe.get("gradient_accumulation_steps", 1)
    return steps * batch * recipe.get("block_length", 256)


def plot_results(records: Mapping[str, Record], path: str | Path) -> None:
    """Draw what runs of one dense model keep above chance, with two standard errors, run by run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    dense = next(iter(records.values()))["evaluation"]["dense"]
    depths: dict[int, list[tuple[int, float, float]]] = {}
    for place, record in enumerate(records.values()):
        found = record["evaluation"]["model"]
        kept = share_kept(dense, found)
        point = (place, 100 * kept["share"], 200 * kept["standard_error"])
        depths.setdefault(found["layers"], []).append(point)
    for layers, points in depths.items():
        places, shares, errors = zip(*points, strict=True)
        label = f"{layers} layers, ± 2 standard errors"
        axes.errorbar(places, shares, errors, fmt="o", capsize=3, color=f"C{layers % 10}", label=label)
    axes.axhline(100, color="gray", linestyle=":", label=f"dense model, {dense['layers']} layers")
    axes.set_xticks(range(len(records)), list(records), rotation=40, ha="right", fontsize=8)
    axes.set_ylabel("accuracy above chance (% of dense)")
    axes.legend(fontsize=8)
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
    dense, phases, metrics = _qualities(record)
    metric = "perplexity" if "perplexity" in dense else next(iter(metrics), "")
    depths = [len(phase["kept"]) for phase in record["phases"]]
    lines = {}
    for place, name in enumerate(("cut", "healed")):
        found = [
            (depth, phase[place][metric])
            for depth, phase in zip(depths, phases, strict=True)
            if metric in phase[place]
        ]
        if found:
            lines[name] = [(record["model"]["layers"], dense[metric])] * (metric in dense) + found
    if any(len(points) > 1 for points in lines.values()):
        label = "held-out perplexity" if metric == "perplexity" else metric
        plot_lines(lines, folder / "quality.png", "decoder layers", label)
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
        plot_lines(curves, folder / "losses.png", "step", "training loss", False, removal_marks(record))
        drawn["losses.png"] = "Losses of training"
    return drawn


def removal_marks(record: Record) -> list[tuple[int, str]]:
    """The steps at which layers were removed, each with their original indices."""
    removed: dict[int, list[str]] = {}
    for phase in record["phases"]:
        removed.setdefault(phase["step"], []).extend(
            str(removal["original"]) for removal in phase["removals"]
        )
    return [
        (step, f"layer{'s' * (len(layers) > 1)} {', '.join(layers)} removed")
        for step, layers in removed.items()
    ]


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
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    x: str,
    y: str,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> None:
    """Draw named lines of points, and vertical lines at `marks`, places with what happened there."""
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
    for place, what in marks:
        axes.axvline(place, color="gray", linestyle="--", linewidth=1)
        beside: dict[str, Any] = {
            "xytext": (2, 0),
            "textcoords": "offset points",
            "va": "top",
            "rotation": 90,
        }
        at: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "fontsize": 7, "color": "dimgray"}
        axes.annotate(what, (place, 0.98), **beside, **at)
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
    base = finetuned_from or record["model"]["name"] or f"A model of type {record['model']['model_type']}"
    on_hub, adapter = is_hub_id(base), (folder / PRUNED_BASE).is_file()
    name = model_name or Path(folder).resolve().name
    phases = record["phases"]
    kept = phases[-1]["kept"] if phases else list(range(record["model"]["layers"]))
    removed = [removal["original"] for phase in phases for removal in phase["removals"]]
    _, qualities, metrics = _qualities(record)
    final: dict[str, Any] = next(filter(None, reversed(qualities[-1])), {}) if qualities else {}
    extra = [tags] if isinstance(tags, str) else tags or []
    distilled = ["knowledge-distillation"] if record["method"]["healing"] == DISTILLED["healing"] else []
    measured = copy.deepcopy(record.get("evaluation"))
    auto_class, pipeline = _how_to_load(folder)
    results = [
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
    table, texts = table_rows(record), text_rows(record)
    compared = {f"{base} (dense)": measured["dense"], name: measured["model"]} if measured else {}
    if measured:
        compare_models(compared)
    sides = evaluation_rows(compared) if measured else []
    card = ModelCard.from_template(
        data,
        template_str=files(__package__).joinpath("model_card.md").read_text(encoding="utf-8"),
        name=name,
        source=repository or name,
        auto_class=auto_class,
        base=base if on_hub else Path(base).name,
        on_hub=on_hub,
        adapter=adapter,
        removed=removed,
        kept=kept,
        record=record,
        table=markdown_table(table),
        texts=markdown_table(texts) if len(texts) > 1 else None,
        healed_apart=any(head.endswith("healed") for head in table[0]),
        measured_by=metrics,
        measured=markdown_table(sides) if measured else None,
        explained=_explanations(measured["text"], measured["model"], [row[0] for row in sides])
        if measured
        else [],
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
