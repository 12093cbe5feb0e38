"""Studies that answer questions about pruning by a grid of small runs. Runs can be stopped and continued."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..data.batches import make_batches
from ..data.sequences import check_sequence_length, split_sequences
from ..errors import LayerPruneError, choose_from
from ..evaluation.evaluate import evaluate_text
from ..pruning.callback import LayerPruningCallback
from ..reports.plots import plot_lines, plot_points
from ..reports.record import surroundings
from ..reports.tables import markdown_table
from ..scoring.criteria import CRITERIA
from ..scoring.score import rank_correlation, score_layers
from ..scoring.table import ScoreTable
from ..surgery.inspection import inspect_layers
from .quickstart import MODEL_NAME
from .study_setting import Cut, Row, Setting, StudyArguments, load


# Models to extrapolate to: layers, parameters of a layer, of embedding and head (Llama 2, 2307.09288).
LARGE = {"7B": (32, 202_383_360, 262_144_000), "70B": (80, 855_654_400, 524_288_000)}

RECONSTRUCTION_LAYERS, RECONSTRUCTION_EPOCHS = 3, 4  # unless a study varies them


def baseline(setting: Setting) -> Iterator[Row]:
    """What does each method of choosing layers cost without training, by number of removed layers?"""
    ways: dict[str, Cut] = {
        "sleb (greedy, loss)": partial(setting.cut, "loss", "greedy"),
        "shortgpt (one shot, Block Influence)": partial(setting.cut, "block_influence", "one_shot"),
        "block of least Block Influence": partial(setting.cut, "block_influence", "block"),
        "deepest": partial(setting.cut, "positional", "one_shot"),
        "replaceme (linear map)": setting.cut_with_map,
    }
    yield {"removed": 0, "way": "dense", "loss": setting.journal.once(lambda: setting.loss(setting.dense))}
    for remove in range(1, setting.remove + 1):
        for way, cut in ways.items():
            measured = setting.journal.once(partial(setting.cut_loss, cut, remove))
            yield {"removed": remove, "way": way, **measured}


def losses(setting: Setting) -> Iterator[Row]:
    """Which loss heals best: KL, hidden states, or both with different weights of KL?"""
    grid: dict[str, Row] = {"KL": {}, "text alone": {"kl_weight": 0.0, "ce_weight": 1.0}}
    grid["hidden"] = {"kl_weight": 0.0, "hidden_weight": 1.0}
    for weight in (0.01, 0.1, 1.0, 10.0, 100.0):
        grid[f"{weight:g} KL + hidden"] = {"kl_weight": weight, "hidden_weight": 1.0}
    grid["paper"] = {"loss_preset": "paper"}
    cut = partial(setting.cut, "block_influence", "block")
    for name, changes in grid.items():
        yield {"losses": name, **setting.journal.once(partial(setting.cut_and_heal, cut, **changes))}


def iterative(setting: Setting) -> Iterator[Row]:
    """Is iterative or one-shot pruning better, with and without reconstruction, at equal tokens and at equal
    time?

    The last row has twice the tokens, for a comparison by seconds."""

    def by_phases(restart: bool, **reconstruction: Any) -> Row:
        model, depth = copy.deepcopy(setting.dense), setting.layers - setting.remove
        pruning = LayerPruningCallback(
            target_layers=depth,
            calibration=setting.calibration,
            restart_learning_rate=restart,
            **reconstruction,
        )
        found = setting.heal(model, pruning)
        gone = [removal.original for removal in pruning.record.removals]
        row = {"cut": None, **found, "layers gone": gone, "seconds to score": None}
        return row | {"seconds in all": found["seconds"]}

    tokens = setting.steps * setting.arguments.batch_size * setting.arguments.sequence_length
    once = {"layers": RECONSTRUCTION_LAYERS, "epochs": RECONSTRUCTION_EPOCHS, "tokens": tokens}
    in_phases = {
        "reconstruction_layers": RECONSTRUCTION_LAYERS,
        "reconstruction_epochs": RECONSTRUCTION_EPOCHS,
    }
    twice = once | {"tokens": 2 * tokens}
    ways = {
        "iterative, a schedule for each phase": partial(by_phases, True),
        "iterative, one schedule": partial(by_phases, False),
        "iterative, one schedule, reconstruction": partial(by_phases, False, **in_phases),
        "one-shot, greedy": partial(setting.cut_and_heal, partial(setting.cut, "loss", "greedy")),
        "one-shot, by one table": partial(setting.cut_and_heal, partial(setting.cut, "loss", "one_shot")),
        "one-shot, linear map": partial(setting.cut_and_heal, setting.cut_with_map),
        "one-shot block, reconstruction": partial(setting.cut_and_heal, setting.cut_block, once),
        "one-shot block, reconstruction, twice the tokens": partial(
            setting.cut_and_heal, setting.cut_block, twice, max_steps=2 * setting.steps
        ),
    }
    for name, measured in ways.items():
        yield {"way": name, **setting.journal.once(measured)}


def reconstruction(setting: Setting) -> Iterator[Row]:
    """How many layers, epochs and tokens does reconstruction before distillation need?"""
    whole = setting.steps * setting.arguments.batch_size * setting.arguments.sequence_length
    base = {"layers": RECONSTRUCTION_LAYERS, "epochs": RECONSTRUCTION_EPOCHS, "tokens": whole}
    grid = [base | {"layers": layers} for layers in (1, 2, RECONSTRUCTION_LAYERS, 5)]
    grid += [base | {"epochs": epochs} for epochs in (1, 2, 8)]
    grid += [base | {"tokens": whole // part} for part in (16, 4)]
    measured = setting.journal.once(partial(setting.cut_and_heal, setting.cut_block))
    yield {"reconstruction": "none", "layers": 0, "epochs": 0, "tokens": 0, **measured}
    for one in grid:
        name = "{layers} layers, {epochs} epochs, {tokens} tokens".format(**one)
        measured = setting.journal.once(partial(setting.cut_and_heal, setting.cut_block, one))
        yield {"reconstruction": name, **one, **measured}


def criteria(setting: Setting) -> Iterator[Row]:
    """Which layers does each criterion remove, and how well does the model heal at an equal budget?"""
    for name in CRITERIA:
        if name == "task":
            continue
        cut = partial(setting.cut, name, "greedy")
        yield {"criterion": name, **setting.journal.once(partial(setting.cut_and_heal, cut))}


def calibration(setting: Setting) -> Iterator[Row]:
    """How much does the ranking of the layers depend on the text? A single text is split into thirds."""
    count: Any = setting.arguments.calibration_sequences
    names, parts = setting.names, [sequences.select(range(count)) for sequences in setting.sequences]
    if len(parts) == 1:
        third = len(setting.sequences[0]) // 3
        names = [f"{names[0]}, part {i + 1}" for i in range(3)]
        spread = [range(i * third, i * third + min(count, third)) for i in range(3)]
        parts = [setting.sequences[0].select(one) for one in spread]
    for criterion in ("loss", "block_influence"):

        def table(part: Any, criterion: str = criterion) -> Row:
            return score_layers(setting.dense, make_batches(part, 4), criterion).to_dict()

        tables = [ScoreTable.from_dict(setting.journal.once(partial(table, part))) for part in parts]
        few = max(1, len(tables[0].scores) // 4)
        for i, one in enumerate(tables):
            for j, other in enumerate(tables[:i]):
                same = set(one.ranking()[:few]) & set(other.ranking()[:few])
                yield {
                    "criterion": criterion,
                    "texts": f"{names[j]} / {names[i]}",
                    "rank correlation": rank_correlation(one, other),
                    f"same among the least {few}": len(same),
                }


def middle(setting: Setting) -> Iterator[Row]:
    """Are the middle layers the least important? The table shows the mean rank of each third, from 0 (least)
    to 1."""
    models = setting.arguments.models or [MODEL_NAME]
    sizes: Any = setting.arguments.calibration_sequences, setting.arguments.heldout_sequences
    for i, name in enumerate(models):

        def measured(i: int = i, name: str = name) -> Row:
            if i == 0:
                return score_layers(setting.dense, setting.calibration, "loss", protected=[]).to_dict()
            model, tokenizer = load(name)
            check_sequence_length(setting.arguments.sequence_length, model)
            sequences = setting.cut_up(setting.texts[0], tokenizer)
            some = split_sequences(sequences, *sizes)[0]
            return score_layers(model, make_batches(some, 4), "loss", protected=[]).to_dict()

        table = ScoreTable.from_dict(setting.journal.once(measured))
        order = table.ranking()
        last = max(1, len(order) - 1)
        thirds: list[list[float]] = [[], [], []]
        for rank, layer in enumerate(order):
            thirds[min(2, 3 * layer // len(table.kept))].append(rank / last)
        means = [round(sum(third) / max(1, len(third)), 3) for third in thirds]
        yield {
            "model": Path(name).name,
            "layers": len(table.kept),
            **dict(zip(("first third", "middle third", "last third"), means, strict=True)),
            "least important": order[: max(1, len(order) // 4)],
            "scores": [table.scores.get(layer) for layer in range(len(table.kept))],
        }


def scale(setting: Setting) -> Iterator[Row]:
    """What do scoring and healing cost by depth and size? Operations are counted here and extrapolated.

    Two depths of the model give the operations of one layer and of the head. They are assumed to grow with
    the number of parameters, those of attention too."""
    text = [{"input_ids": batch["input_ids"][:1]} for batch in setting.calibration[:1]]

    def count(work: Callable[[list[Any]], Any]) -> float:
        """Returns the operations per token, as the increase by a second batch. Some operations run only
        once."""
        totals = []
        for batches in (text, text * 2):
            with FlopCounterMode(display=False) as counter:
                work(batches)
            totals.append(counter.get_total_flops())
        return (totals[1] - totals[0]) / text[0]["input_ids"].numel()

    def at(depth: int) -> Row:
        model, _ = setting.cut("positional", "one_shot", setting.layers - depth)
        return {
            "layers": depth,
            "parameters": model.num_parameters(),
            "reading": count(lambda batches: evaluate_text(model, batches)),
            "scoring": count(lambda batches: score_layers(model, batches, "loss", progress=False)),
            "step": count(lambda batches: _distil(setting, model, batches)),
        }

    def row(name: str, layers: int, parameters: float, reading: float, scoring: float, step: float) -> Row:
        return {
            "model": name,
            "layers": layers,
            "parameters, millions": parameters / 1e6,
            "reading, GFLOP a token": reading / 1e9,
            "scoring all layers, GFLOP a token": scoring / 1e9,
            "distilling, GFLOP a token": step / 1e9,
            "scoring a token in tokens of distilling": scoring / step,
        }

    depths = [setting.layers - 1 - setting.remove, setting.layers - 1]
    shallow, deep = (setting.journal.once(partial(at, depth)) for depth in depths)
    for one in (shallow, deep):
        yield row("counted", *one.values())
    layer = (deep["reading"] - shallow["reading"]) / (depths[1] - depths[0])
    head = deep["reading"] - depths[1] * layer
    dense = head + setting.layers * layer
    student = (deep["step"] - dense) / deep["reading"]  # forward and backward, in units of a forward pass
    facts = inspect_layers(setting.dense)
    each = sum(one.parameters for one in facts.layers) / setting.layers
    own: Any = setting.dense.get_output_embeddings()
    sizes = {facts.model_type: (setting.layers, each, facts.parameters - setting.layers * each), **LARGE}
    for name, (layers, parameters, rest) in sizes.items():
        of_head = own.weight.numel() if name == facts.model_type else rest / 2
        a, h = layer * parameters / each, head * of_head / own.weight.numel()
        reading = h + layers * a
        # Without layer i, only the layers after it and the head are computed.
        scoring = reading + sum((layers - 1 - i) * a + h for i in range(1, layers - 1))
        yield row(name, layers, layers * parameters + rest, reading, scoring, (1 + student) * reading)


def _distil(setting: Setting, model: PreTrainedModel, batches: list[Any]) -> None:
    """Runs, on each batch, a forward pass of the teacher, and a forward and backward pass of the student."""
    for batch in [{"input_ids": one["input_ids"].to(model.device)} for one in batches]:
        with torch.no_grad():
            wanted = setting.dense(**batch, use_cache=False).logits.log_softmax(-1)
        said = model(**batch, use_cache=False).logits.log_softmax(-1)
        torch.nn.functional.kl_div(said, wanted, log_target=True, reduction="batchmean").backward()
        model.zero_grad()


STUDIES: Mapping[str, Callable[[Setting], Iterator[Row]]] = {
    "baseline": baseline,
    "losses": losses,
    "iterative": iterative,
    "reconstruction": reconstruction,
    "criteria": criteria,
    "calibration": calibration,
    "middle": middle,
    "scale": scale,
}


def check_study(name: str) -> None:
    """Checks that a study of this name exists.

    Raises:
        LayerPruneError: there is no such study.
    """
    if name not in STUDIES:
        given = f"There is no study {name!r}." if name else "NAME is missing."
        raise LayerPruneError(f"{given} {choose_from(name, STUDIES)}.")


def run_study(name: str, arguments: StudyArguments) -> list[Row]:
    """Runs a study. A second call with the same arguments continues a stopped study.

    Writes `study.json`, `table.md` and `plot.png` into the folder.

    Args:
        name (`str`): one of `STUDIES`.
        arguments ([`StudyArguments`]): the settings of the study.

    Raises:
        LayerPruneError: there is no such study, or [`Setting`] refuses the arguments.
    """
    check_study(name)
    setting = Setting(name, arguments)
    rows = list(STUDIES[name](setting))
    _plot(name, rows, setting.folder / "plot.png")
    (setting.folder / "table.md").write_text(markdown_table(study_rows(rows)) + "\n", encoding="utf-8")
    settings = asdict(arguments) | {
        "models": [Path(one).name for one in arguments.models] or [MODEL_NAME],
        "data": setting.names,
        "heldout": arguments.heldout and Path(arguments.heldout).name,
        "output_dir": None,
        "remove": setting.remove,
    }
    result = {
        "study": name,
        "question": STUDIES[name].__doc__,
        "settings": settings,
        **surroundings(setting.dense),
        "rows": rows,
    }
    (setting.folder / "study.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return rows


def study_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Returns the rows of a study as rows of text. The first row holds the column heads."""
    heads = [head for head in dict.fromkeys(k for row in rows for k in row) if head != "scores"]

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value))
        if isinstance(value, float):
            return f"{value:.4g}"
        return "" if value is None else str(value)

    return [heads, *([cell(row.get(head)) for head in heads] for row in rows)]


def _plot(name: str, rows: Sequence[Row], path: Path) -> None:
    if name == "baseline":
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in [row for row in rows[1:] if row["loss"] is not None]:
            lines.setdefault(row["way"], [(0, rows[0]["loss"])]).append((row["removed"], row["loss"]))
        plot_lines(lines, path, "layers removed", "held-out loss (nats per token)")
    elif name == "middle":
        lines = {
            row["model"]: [(i / (row["layers"] - 1), s) for i, s in enumerate(row["scores"]) if s is not None]
            for row in rows
        }
        plot_lines(lines, path, "depth", "loss increase without the layer", log=True)
    elif name == "calibration":
        points = {f"{row['criterion']}: {row['texts']}": row["rank correlation"] for row in rows}
        plot_points(points, path, "rank correlation")
    elif name == "scale":
        points = {f"{row['model']}, {row['layers']} layers": list(row.values())[-1] for row in rows}
        plot_points(points, path, "operations of scoring all layers on a token,\nin tokens of distillation")
    else:
        points = {str(next(iter(row.values()))): row["healed"] for row in rows if row["healed"] is not None}
        plot_points(points, path, "held-out loss after healing (nats per token)")
