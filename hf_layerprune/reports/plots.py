"""Draws plots from the record of a run: layer scores, quality by number of layers, losses."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.comparison import share_kept
from ..forward.token_losses import DIVERGENCES, HIDDEN_ERRORS
from ..scoring.criteria import CRITERIA
from ..scoring.table import ScoreTable
from .record import Record
from .tables import qualities_of


def plot_results(records: Mapping[str, Record], path: str | Path) -> None:
    """Draws the accuracy above chance of each run (% of dense), with two standard errors."""
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


def plot_scores(record: Record, folder: Path) -> list[str]:
    """Draws the score tables of all removals into `folder`, and returns the file names."""
    removals = [removal for phase in record["phases"] for removal in phase["removals"]]
    tables = [removal["table"] for removal in removals if "table" in removal]
    names = ["scores_all_phases.png"] if len(tables) > 1 else []
    if names:
        plot_phases([ScoreTable.from_dict(table) for table in tables], folder / names[0])
    for number, phase in enumerate(record["phases"], 1):
        for removal in [one for one in phase["removals"] if "table" in one]:  # one table for several
            names.append(f"scores_phase_{number}_layer_{removal['original']}.png")
            ScoreTable.from_dict(removal["table"]).plot(folder / names[-1])
    return names


def plot_record(record: Record, folder: Path) -> dict[str, str]:
    """Draws the quality by number of layers and the training losses into `folder`, if the record holds them.
    Returns the title of each file."""
    drawn = {}
    dense, phases, metrics = qualities_of(record)
    metric = "perplexity" if "perplexity" in dense else next(iter(metrics), "")
    depths = [len(phase["kept"]) for phase in record["phases"]]
    start = [(record["model"]["layers"], dense[metric])] if metric in dense else []
    lines = {}
    for place, name in enumerate(("after removal", "after healing")):
        found = [
            (depth, phase[place][metric])
            for depth, phase in zip(depths, phases, strict=True)
            if metric in phase[place]
        ]
        if found:
            lines[name] = start + found
    if any(len(points) > 1 for points in lines.values()):
        label = "held-out perplexity" if metric == "perplexity" else metric
        plot_lines(lines, folder / "quality.png", "decoder layers", label)
        drawn["quality.png"] = "Quality by number of layers"
    names = ("loss", *DIVERGENCES, "ce", *(f"hidden_{kind}" for kind in HIDDEN_ERRORS))
    curves = {
        name: [(entry["step"], float(entry[name])) for entry in record["log"] if name in entry]
        for name in names
    }
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if len(curves) == 2:  # the loss and its only term
        curves = {"loss": curves["loss"]} if "loss" in curves else curves
    if curves:
        plot_lines(curves, folder / "losses.png", "step", "training loss", False, removal_marks(record))
        drawn["losses.png"] = "Training losses"
    return drawn


def removal_marks(record: Record) -> list[tuple[int, str]]:
    """Returns the steps at which layers were removed, each with the original indices of the layers."""
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
    """Draws the scores of several removals as a heat map, with a row for each removal and a column for each
    original layer. Layers without a score are white. A cross marks the layer that was removed next."""
    import numpy as np
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    width = 1 + max(layer for table in tables for layer in table.kept)
    grid = np.full((len(tables), width), np.nan)
    for row, table in enumerate(tables):
        for layer, score in table.scores.items():
            grid[row, table.kept[layer]] = score
    size = (max(6.0, 0.28 * width), max(2.2, 1.5 + 0.25 * len(tables)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    threshold = float(np.nanmedian(np.abs(grid))) or 1.0  # most scores are similar, a few are very large
    picture = axes.imshow(grid, aspect="auto", cmap="viridis", norm=SymLogNorm(threshold))
    figure.colorbar(picture, label=CRITERIA[tables[0].criterion].unit)
    chosen = [table.kept[table.ranking()[0]] for table in tables]
    removed = axes.scatter(chosen, range(len(tables)), marker="x", color="red", label="removed")
    white = Patch(facecolor="white", edgecolor="gray", label="not scored: protected, or removed before")
    axes.set_xticks(range(width))
    axes.set_yticks(range(len(tables)), [str(row + 1) for row in range(len(tables))])
    axes.tick_params("x", labelsize=7)
    axes.set_xlabel("decoder layer (index in the original model)")
    axes.set_ylabel("removal")
    figure.legend(handles=[removed, white], loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    x: str,
    y: str,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> None:
    """Draws named lines of points, and labelled vertical lines at the places of `marks`."""
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
    if log:  # linear near zero
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
    """Draws named numbers, one below another."""
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
