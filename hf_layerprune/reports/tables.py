"""Makes tables from the record of a run and from evaluations. The first row holds the column heads."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.comparison import mean_difference, share_kept, tasks_done
from ..scoring.score import reads_text
from .record import Record


EFFECTIVE_QUESTIONS = 30  # the smallest number for which stability is shown

ABOVE_CHANCE = "accuracy above chance (% of dense)"


def table_rows(record: Record) -> list[list[str]]:
    """Returns a run as a table, with a row for the dense model and a row for each phase. Columns without
    values are dropped."""
    dense, phases, metrics = qualities_of(record)
    cut, healed = (any(phase[i] for phase in phases) for i in (0, 1))
    speed = _speeds_compare(record, [dense, *(found[1] or found[0] for found in phases)])
    heads = ["layers", "removed", f"{record['pruning']['criterion']} score"]
    for metric in metrics:
        heads += (
            [f"{metric} after removal", "after healing" if len(metrics) == 1 else f"{metric} after healing"]
            if cut and healed
            else [metric]
        )
    heads += [
        "KL after removal",
        "KL after reconstruction",
        "parameters",
        *(["tokens/s"] if speed else []),
        "seconds",
    ]

    def row(
        layers: int,
        removed: str,
        score: str,
        found: tuple[Any, Any],
        reconstruction: Mapping[str, Any],
        parameters: int,
        seconds: str,
    ) -> list[str]:
        cells = [str(layers), removed, score]
        for metric in metrics:
            both = [_number(one, metric) for one in found]
            cells += both if cut and healed else [both[1] or both[0]]
        cells += [_number(reconstruction, name) for name in ("kl_before", "kl_after")]
        cells += [f"{parameters / 1e6:.1f}M"]
        cells += [_number(found[1] or found[0], "tokens_per_second")] if speed else []
        return [*cells, seconds]

    model = record["model"]
    rows = [heads, row(model["layers"], "", "", ({}, dense), {}, model["parameters"], "")]
    for phase, found in zip(record["phases"], phases, strict=True):
        removed = ", ".join(str(removal["original"]) for removal in phase["removals"])
        scores = [removal["score"] for removal in phase["removals"]]
        score = ", ".join(f"{one:.3f}" for one in scores if one is not None)
        seconds = f"{phase['seconds']:.0f}"
        told = (phase.get("reconstruction", {}), phase["parameters"], seconds)
        rows.append(row(len(phase["kept"]), removed, score, found, *told))
    return filled_columns(rows)


def candidate_rows(record: Record) -> list[list[str]]:
    """Returns a table of the blocks that were compared by KL divergence. Without such blocks, it has only
    column heads."""
    rows = [["block", f"{record['pruning']['criterion']} score", "KL"]]
    for candidate in (one for phase in record["phases"] for one in phase.get("candidates", [])):
        layers = ", ".join(map(str, candidate["layers"]))
        rows.append([layers, f"{candidate['score']:.3f}", _number(candidate, "kl")])
    return rows


def qualities_of(
    record: Record,
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], dict[str, Any]]], list[str]]:
    """Returns the evaluation of the dense model, the evaluations of each phase (after removal, after
    healing), and the metrics to show.

    The values come from the `evaluation` of the run if it has one, else from the Trainer. The Trainer does
    not evaluate right after a removal.
    """
    phases = record["phases"]
    if record["dense"] or not phases or any(phase["cut"] for phase in phases):
        dense = record["dense"] or {}
        own = [(phase["cut"] or {}, phase["healed"] or {}) for phase in phases]
        return dense, own, list(dense)[:1]
    at_depth: dict[int, dict[str, Any]] = {}
    for found in record.get("evaluations", []):  # the last evaluation at each depth is used
        values = {name: value for name, value in found.items() if _is_quality(name, value)}
        at_depth[found["layers"]] = at_depth.get(found["layers"], {}) | values
    metrics: dict[str, list[Any]] = {}  # if metrics have equal values, only the first is shown
    for name in dict.fromkeys(name for values in at_depth.values() for name in values):
        column = [values.get(name) for values in at_depth.values()]
        if not any(_same(column, other) for other in metrics.values()):
            metrics[name] = column
    healed: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, at_depth.get(len(phase["kept"]), {})) for phase in phases
    ]
    return at_depth.get(record["model"]["layers"], {}), healed, list(metrics)


def _speeds_compare(record: Record, measured: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether all speeds in a record were measured in one precision."""
    precisions = {found.get("precision") for found in measured if "tokens_per_second" in found}
    # Earlier versions did not store the precision. After a single removal, they measured the healed model in
    # the precision of training, but not the models it is compared with.
    healed_later = "select" in record["pruning"] and any(phase["healed"] for phase in record["phases"])
    return len(precisions) == 1 and not (None in precisions and healed_later)


def _is_quality(name: str, value: Any) -> bool:
    """Returns whether a metric of the Trainer measures quality, not time, memory or progress."""
    return isinstance(value, (int, float)) and not re.search(
        r"^(step|layers|epoch)$|(runtime|_per_second|_time|num_tokens|num_input_tokens_seen)$|_mem_", name
    )


def _same(first: list[Any], second: list[Any]) -> bool:
    return all(
        one == other or (None not in (one, other) and math.isclose(one, other, rel_tol=1e-4))
        for one, other in zip(first, second, strict=True)
    )


def text_rows(record: Record) -> list[list[str]]:
    """Returns a table of the texts of a run by use, with their sizes. It is empty if the record does not
    name any text."""
    texts = record.get("texts") or _texts_of_recipe(record)
    if "evaluation" not in texts and "tokens" in (record["dense"] or {}):  # from the user's own function
        texts = texts | {"evaluation": {"tokens": record["dense"]["tokens"]}}
    rows = [["", "text", "sequences", "tokens"]]
    for use in sorted(texts, key=lambda use: ("calibration", "healing", "evaluation").index(use.split()[0])):
        sizes = [texts[use].get(size) for size in ("sequences", "tokens")]
        rows.append([use, texts[use].get("name") or "", *(f"{size:,}" if size else "" for size in sizes)])
    return filled_columns([row for i, row in enumerate(rows) if not i or any(row[1:])])


def _texts_of_recipe(record: Record) -> dict[str, dict[str, Any]]:
    """Returns the texts of a recipe's run for a record of an earlier version, which does not name texts."""
    if "recipe" not in record:
        return {}
    recipe, length = record["recipe"], record["recipe"].get("sequence_length", 256)
    counts = {
        "calibration": recipe.get("calibration_sequences", 16)
        * reads_text(record["pruning"]["criterion"], None),
        "evaluation": recipe.get("heldout_sequences", 16),
    }
    texts = {use: {"sequences": count, "tokens": count * length} for use, count in counts.items()}
    texts["healing"] = {"tokens": healing_tokens(record)}
    return {use: {"name": recipe["data"], **found} for use, found in texts.items() if found["tokens"]}


def filled_columns(rows: list[list[str]]) -> list[list[str]]:
    """Returns rows of text without empty columns."""
    filled = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in filled] for row in rows]


def markdown_table(rows: list[list[str]]) -> str:
    """Returns rows of text as an aligned Markdown table. The first row holds the column heads."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def evaluation_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Returns a table of models side by side, with a row for each metric and standard errors if known.

    The results come from [`evaluate_model`] and [`compare_models`]. Speeds are shown only if all were
    measured in one precision.
    """
    speeds = len({found["dtype"] for found in results.values() if "dtype" in found}) < 2
    columns = [_measures(found, speeds, i == 0) for i, found in enumerate(results.values())]
    heads = dict.fromkeys(head for column in columns for head in column)
    names = ["", *(Path(name).name for name in results)]
    return [names, *([head, *(column.get(head, "") for column in columns)] for head in heads)]


def _measures(found: Mapping[str, Any], speeds: bool, is_first: bool) -> dict[str, str]:
    """Returns the metrics of one model as text."""
    cells = {
        "layers": str(found["layers"]),
        "parameters": f"{found['parameters'] / 1e6:.1f}M",
        "weights (MB)": f"{found['weights_mb']:.0f}",
    }
    cells |= {"precision": found["dtype"]} if "dtype" in found else {}
    cells |= {"safetensors (MB)": f"{found['file_mb']:.0f}"} if "file_mb" in found else {}
    cells |= {"peak memory (MB)": str(found["peak_memory_mb"])} if "peak_memory_mb" in found else {}
    if "perplexity" in found:
        cells |= {
            "perplexity": f"{found['perplexity']:.2f}",
            "bits per byte": f"{found['bits_per_byte']:.3f}",
        }
    if "copying" in found:
        copied = found["copying"]
        cells |= {
            "copied without error": _with_error(copied["copied"], copied["standard_error"]),
            "copy accuracy": f"{copied['right']:.3f}",
        }
    if speeds and "tokens_per_second" in found:
        cells["prefill tokens/s"] = f"{found['tokens_per_second']:.0f}"
        if "generated_per_second" in found:  # not for text with pictures
            cells["decode tokens/s"] = f"{found['generated_per_second']:.1f}"
    tasks = found.get("tasks", {})
    cells |= {name: _with_error(task["accuracy"], task["standard_error"]) for name, task in tasks.items()}
    if tasks:
        cells["mean accuracy"] = _with_error(found["mean"], found["standard_error"])
        cells["Δ accuracy"] = _with_error(*found["difference"].values())
    if "kept" in found:
        cells[ABOVE_CHANCE] = "{share:.1%} ± {standard_error:.1%}".format(**found["kept"])
    if is_first:  # the others are compared with it
        return cells
    for name, task in tasks.items():
        if "agreement" in task:
            cells[f"agreement, {name}"] = _with_error(*task["agreement"].values())
        if is_steady(task):
            error = task["stability"]["standard_error"]
            cells[f"stability, {name}"] = _with_error(task["stability"]["stability"], error)
    return cells


def is_steady(task: Mapping[str, Any]) -> bool:
    """Returns whether the stability of a task depends on many questions, and not on a few with large
    weights."""
    return task.get("stability", {}).get("effective_questions", 0.0) >= EFFECTIVE_QUESTIONS


def results_rows(records: Mapping[str, Record]) -> list[list[str]]:
    """Returns a table of runs of one dense model, with a row for the dense model and a row for each run, in
    the given order.

    The records need an `evaluation` (see `hf-layerprune card`). The table shows the tasks of [`tasks_done`].
    Δ accuracy is the difference in mean accuracy from the first run with equally many layers, with the paired
    standard error.
    """
    first = next(iter(records.values()))
    dense = first["evaluation"]["dense"]
    done = tasks_done(dense)
    heads = ["", "layers", "healing tokens", "perplexity", "copy accuracy", *done, ABOVE_CHANCE]
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
    return [[*heads, "Δ accuracy"], *rows]


def healing_tokens(record: Record) -> int:
    """Returns the training tokens of a run."""
    if record.get("texts"):
        return record["texts"].get("healing", {}).get("tokens", 0)
    recipe, steps = record["recipe"], record["training"].get("max_steps", 0)
    steps = max((entry.get("step", 0) for entry in record["log"]), default=max(0, steps))
    batch = recipe.get("per_device_train_batch_size", 8) * recipe.get("gradient_accumulation_steps", 1)
    return steps * batch * recipe.get("sequence_length", 256)


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def _number(values: Mapping[str, Any] | None, name: str | None) -> str:
    value = None if values is None or name is None else values.get(name)
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
