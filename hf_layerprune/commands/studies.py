"""Questions that a pruned model's owner asks, each answered by a grid of small runs that can be stopped."""

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.loading import load_model, load_tokenizer
from ..checkpoints.saving import check_writable
from ..data import check_block_length, load_texts, make_batches, split_blocks, token_blocks
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.trainer import DistillationTrainer
from ..errors import LayerPruneError
from ..evaluation.evaluate import evaluate_text
from ..pruning.callback import LayerPruningCallback
from ..pruning.prune import prune_layers
from ..pruning.replacement import replace_by_linear_map
from ..reports.card import markdown_table, plot_lines, plot_points
from ..reports.machine import surroundings
from ..scoring.criteria import CRITERIA
from ..scoring.journal import Journal
from ..scoring.score import fingerprint, rank_correlation, score_layers
from ..scoring.table import ScoreTable
from ..surgery.inspection import inspect_layers
from ..surgery.lineage import get_lineage
from .quickstart import MODEL_NAME, load_embedded_model, split_topics


WHOLE = {"tokens": 262_144, "calibration_blocks": 32, "heldout_blocks": 32}
QUICK = {"remove": 2, "tokens": 4096, "calibration_blocks": 4, "heldout_blocks": 8}
# What is extrapolated to: layers, parameters of each, and of embedding and head (Llama 2, 2307.09288).
LARGE = {"7B": (32, 202_383_360, 262_144_000), "70B": (80, 855_654_400, 524_288_000)}

Row = dict[str, Any]
Cut = Callable[[int], tuple[PreTrainedModel, Row]]  # so many layers; what was chosen


@dataclass
class StudyArguments:
    """On what a study is made."""

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or hub ids; `middle` takes several. Default: that of the quickstart."},
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Text, as for other commands; `calibration` takes several. Default: Python's help topics."
        },
    )
    heldout: str | None = field(
        default=None,
        metadata={"help": "Text to measure on. Default: a part of the first data, which flatters healing."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "A folder; called again, a study goes on. Default: study-NAME."}
    )
    quick: bool = field(
        default=False, metadata={"help": f"A small setting, for a look: {QUICK}, where not given."}
    )
    remove: int | None = field(
        default=None, metadata={"help": "Layers to remove. Default: a quarter of the model's."}
    )
    tokens: int | None = field(
        default=None, metadata={"help": f"Tokens of healing in each run. Default: {WHOLE['tokens']}."}
    )
    calibration_blocks: int | None = field(
        default=None, metadata={"help": f"Blocks to score on. Default: {WHOLE['calibration_blocks']}."}
    )
    heldout_blocks: int | None = field(
        default=None, metadata={"help": f"Blocks to measure on. Default: {WHOLE['heldout_blocks']}."}
    )
    block_length: int = field(default=256, metadata={"help": "Tokens in a block."})
    batch_size: int = field(default=4, metadata={"help": "Blocks in a training step."})
    learning_rate: float = field(default=3e-4, metadata={"help": "The highest, of a cosine schedule."})
    seed: int = field(default=0, metadata={"help": "Of the order of the text."})

    def __post_init__(self) -> None:
        for name, value in (QUICK if self.quick else WHOLE).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("tokens", "calibration_blocks", "heldout_blocks", "block_length", "batch_size"):
            if getattr(self, name) < 1:
                raise LayerPruneError(f"{name} is {getattr(self, name)}: it must be at least 1.")


class Setting:
    """What the runs of a study have in common.

    Args:
        name (`str`): of the study.
        arguments ([`StudyArguments`]): its settings.

    Raises:
        LayerPruneError: no such model or text, too little of it, or a folder that cannot be written to.
    """

    def __init__(self, name: str, arguments: StudyArguments) -> None:
        self.arguments, self.folder = arguments, Path(arguments.output_dir or f"study-{name}")
        check_writable(self.folder)
        self.dense, self.tokenizer = load(next(iter(arguments.models), None))
        self.layers = len(get_lineage(self.dense).kept)
        self.remove = max(1, self.layers // 4) if arguments.remove is None else arguments.remove
        if not 1 <= self.remove <= self.layers - 3:
            raise LayerPruneError(
                f"remove is {self.remove}, of {self.layers} layers: let one go at least, and leave three."
            )
        names = [Path(source).name for source in arguments.data]
        self.names = (names if len(set(names)) == len(names) else arguments.data) or ["help topics"]
        check_block_length(arguments.block_length, self.dense)
        self.texts = [load_texts(source) for source in arguments.data] or [_help_topics()]
        self.blocks = [self.cut_up(texts) for texts in self.texts]
        sizes: Any = arguments.calibration_blocks, arguments.heldout_blocks
        for source, blocks in zip(self.names, self.blocks, strict=True):
            if len(blocks) < sizes[0]:
                raise LayerPruneError(
                    f"{source} makes {len(blocks)} blocks, and calibration_blocks is {sizes[0]}: give more "
                    "text, or ask for fewer."
                )
        calibration, heldout, self.train = split_blocks(self.blocks[0], *sizes)
        if arguments.heldout:
            heldout = self.cut_up(load_texts(arguments.heldout))
            heldout = heldout.select(range(min(sizes[1], len(heldout))))
        self.calibration, self.heldout = make_batches(calibration, 4), make_batches(heldout, 4)
        tokens: Any = arguments.tokens
        self.steps = max(1, tokens // (arguments.batch_size * arguments.block_length))
        settings = [name, {k: v for k, v in asdict(arguments).items() if k != "output_dir"}]
        few = [blocks.select(range(0, len(blocks), 1 + len(blocks) // 100)) for blocks in self.blocks]
        text = [batch for some in few for batch in make_batches(some, 4)]
        mark = fingerprint([self.dense], [*text, *self.heldout], [*settings, *map(len, self.blocks)])
        self.journal = Journal(self.folder / "cells.jsonl", mark)

    def cut_up(self, texts: list[str], tokenizer: PreTrainedTokenizerBase | None = None) -> Dataset:
        """Texts as blocks of the study's length."""
        return token_blocks(texts, tokenizer or self.tokenizer, self.arguments.block_length)

    def loss(self, model: PreTrainedModel) -> float:
        """Of held-out text, in nats per token."""
        return evaluate_text(model, self.heldout)["loss"]

    def cut(self, criterion: str, select: str, remove: int) -> tuple[PreTrainedModel, Row]:
        """The model without the layers that one way of choosing gives, and what was chosen."""
        model, began = copy.deepcopy(self.dense), time.monotonic()
        plan: Any = {"target_layers": self.layers - remove, "criterion": criterion, "select": select}
        record = prune_layers(model, calibration=self.calibration, **plan)
        seconds = round(time.monotonic() - began, 1)
        gone = [removal.original for removal in record.removals]
        return model, {"layers gone": gone, "seconds to score": seconds}

    def cut_with_map(self, remove: int) -> tuple[PreTrainedModel, Row]:
        """The model with a linear map for the run of least Block Influence, and what was chosen."""
        model, began = copy.deepcopy(self.dense), time.monotonic()
        table = score_layers(model, self.calibration, "block_influence", run=remove, progress=False)
        first, kept = table.ranking()[0], get_lineage(model).kept
        replace_by_linear_map(model, first, remove, self.calibration)
        seconds = round(time.monotonic() - began, 1)
        return model, {"layers gone": kept[first : first + remove], "seconds to score": seconds}

    def cut_loss(self, cut: Cut, remove: int) -> Row:
        """What one way of cutting costs; nothing where this model cannot be cut so."""
        try:
            model, found = cut(remove)
        except LayerPruneError as error:
            return {"loss": None, "not possible": str(error)}
        return {"loss": self.loss(model), **found}

    def cut_and_heal(self, cut: Cut, **changes: Any) -> Row:
        """What one way of cutting costs, and what is left of that after training; nothing where this model
        cannot be cut so."""
        try:
            model, found = cut(self.remove)
        except LayerPruneError as error:
            return {"cut": None, "healed": None, "not possible": str(error)}
        return {"cut": self.loss(model), **self.heal(model, **changes), **found}

    def heal(self, model: PreTrainedModel, *callbacks: Any, **changes: Any) -> Row:
        """Train a model against the dense one, in place; how long that took and what it left."""
        began = time.monotonic()
        settings: dict[str, Any] = {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.arguments.batch_size,
            "learning_rate": self.arguments.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "seed": self.arguments.seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "bf16": True,
            "use_cpu": not torch.cuda.is_available(),
        }
        with TemporaryDirectory() as folder:
            args = DistillationTrainingArguments(output_dir=folder, **settings | changes)
            teacher = copy.deepcopy(self.dense).to(torch.bfloat16)
            trainer = DistillationTrainer(
                model, args, teacher_model=teacher, train_dataset=self.train, callbacks=list(callbacks)
            )
            trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model.float()
        return {"healed": self.loss(model), "seconds": round(time.monotonic() - began, 1)}


def load(name: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model in float32 with its tokenizer; without a name that of the quickstart."""
    if name is None:
        model, tokenizer = load_embedded_model()
    else:
        model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _help_topics() -> list[str]:
    return [text for part in split_topics().values() for text in part]


def baseline(setting: Setting) -> Iterator[Row]:
    """Remove more and more layers without training: what does each way of choosing cost?"""
    ways: dict[str, Cut] = {
        "sleb (greedy, loss)": partial(setting.cut, "loss", "greedy"),
        "shortgpt (one shot, Block Influence)": partial(setting.cut, "block_influence", "one_shot"),
        "run of least Block Influence": partial(setting.cut, "block_influence", "run"),
        "deepest": partial(setting.cut, "positional", "one_shot"),
        "replaceme (linear map)": setting.cut_with_map,
    }
    yield {"removed": 0, "way": "dense", "loss": setting.journal.once(lambda: setting.loss(setting.dense))}
    for remove in range(1, setting.remove + 1):
        for way, cut in ways.items():
            measured = setting.journal.once(partial(setting.cut_loss, cut, remove))
            yield {"removed": remove, "way": way, **measured}


def losses(setting: Setting) -> Iterator[Row]:
    """KL, hidden states, both, and the weight of KL over orders of magnitude: what heals?"""
    grid: dict[str, Row] = {"KL": {}, "text alone": {"kl_weight": 0.0, "ce_weight": 1.0}}
    grid["hidden"] = {"kl_weight": 0.0, "hidden_weight": 1.0}
    for weight in (0.01, 0.1, 1.0, 10.0, 100.0):
        grid[f"{weight:g} KL + hidden"] = {"kl_weight": weight, "hidden_weight": 1.0}
    grid["paper"] = {"loss_preset": "paper"}
    cut = partial(setting.cut, "block_influence", "run")
    for name, changes in grid.items():
        yield {"losses": name, **setting.journal.once(partial(setting.cut_and_heal, cut, **changes))}


def iterative(setting: Setting) -> Iterator[Row]:
    """Iterative or one-shot, at equal tokens: is scoring again, which counts in its seconds, worth it?"""

    def by_phases(restart: bool) -> Row:
        model, depth = copy.deepcopy(setting.dense), setting.layers - setting.remove
        pruning = LayerPruningCallback(
            target_layers=depth, calibration=setting.calibration, restart_learning_rate=restart
        )
        found = setting.heal(model, pruning)
        gone = [removal.original for removal in pruning.record.removals]
        return {"cut": None, **found, "layers gone": gone, "seconds to score": None}

    ways = {
        "iterative, a schedule for each phase": partial(by_phases, True),
        "iterative, one schedule": partial(by_phases, False),
        "one-shot, greedy": partial(setting.cut_and_heal, partial(setting.cut, "loss", "greedy")),
        "one-shot, by one table": partial(setting.cut_and_heal, partial(setting.cut, "loss", "one_shot")),
        "one-shot, linear map": partial(setting.cut_and_heal, setting.cut_with_map),
    }
    for name, measured in ways.items():
        yield {"way": name, **setting.journal.once(measured)}


def criteria(setting: Setting) -> Iterator[Row]:
    """Each criterion at equal budget: which layers does it take, and how well do they heal?"""
    for name in CRITERIA:
        if name == "task":
            continue
        cut = partial(setting.cut, name, "greedy")
        yield {"criterion": name, **setting.journal.once(partial(setting.cut_and_heal, cut))}


def calibration(setting: Setting) -> Iterator[Row]:
    """How much does the ranking of the layers depend on the text? Of one text, its thirds are compared."""
    count: Any = setting.arguments.calibration_blocks
    names, parts = setting.names, [blocks.select(range(count)) for blocks in setting.blocks]
    if len(parts) == 1:
        third = len(setting.blocks[0]) // 3
        names = [f"{names[0]}, part {i + 1}" for i in range(3)]
        spread = [range(i * third, i * third + min(count, third)) for i in range(3)]
        parts = [setting.blocks[0].select(one) for one in spread]
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
    """Are the middle layers the least important? The mean rank of each third, 0 the least, 1 the most."""
    models = setting.arguments.models or [MODEL_NAME]
    sizes: Any = setting.arguments.calibration_blocks, setting.arguments.heldout_blocks
    for i, name in enumerate(models):

        def measured(i: int = i, name: str = name) -> Row:
            if i == 0:
                return score_layers(setting.dense, setting.calibration, "loss", protected=[]).to_dict()
            model, tokenizer = load(name)
            check_block_length(setting.arguments.block_length, model)
            blocks = setting.cut_up(setting.texts[0], tokenizer)
            some = split_blocks(blocks, *sizes)[0]
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
    """What scoring and healing cost against depth and size: operations counted here, the rest on paper.

    Two depths of the model give the operations of one layer and of the head. They grow with their
    parameters; what attention does besides, which grows with the length of a text, is taken to do so too."""
    text = [{"input_ids": batch["input_ids"][:1]} for batch in setting.calibration[:1]]

    def count(work: Callable[[list[Any]], Any]) -> float:
        """For a token: what a second batch adds, since some operations are done once for all."""
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
    student = (deep["step"] - dense) / deep["reading"]  # forward and backward, in forwards
    facts = inspect_layers(setting.dense)
    each = sum(one.parameters for one in facts.layers) / setting.layers
    own: Any = setting.dense.get_output_embeddings()
    sizes = {facts.model_type: (setting.layers, each, facts.parameters - setting.layers * each), **LARGE}
    for name, (layers, parameters, rest) in sizes.items():
        of_head = own.weight.numel() if name == facts.model_type else rest / 2
        a, h = layer * parameters / each, head * of_head / own.weight.numel()
        reading = h + layers * a
        # Without layer i those after it are computed, from what came before; and the head.
        scoring = reading + sum((layers - 1 - i) * a + h for i in range(1, layers - 1))
        yield row(name, layers, layers * parameters + rest, reading, scoring, (1 + student) * reading)


def _distil(setting: Setting, model: PreTrainedModel, batches: list[Any]) -> None:
    """The operations of distillation: the teacher reads, the student reads and learns."""
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
    "criteria": criteria,
    "calibration": calibration,
    "middle": middle,
    "scale": scale,
}


def run_study(name: str, arguments: StudyArguments) -> list[Row]:
    """Answer one question; called again with the same arguments, it goes on where it was stopped.

    Leaves `study.json`, `table.md` and `plot.png` in the folder.

    Args:
        name (`str`): one of `STUDIES`.
        arguments ([`StudyArguments`]): on what.

    Raises:
        LayerPruneError: no such study, or what [`Setting`] refuses.
    """
    if name not in STUDIES:
        raise LayerPruneError(f"no study {name!r}: choose from {', '.join(STUDIES)}")
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
    """The rows of a study as a table of text."""
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
        plot_lines(lines, path, "depth", "rise of the loss without the layer", log=True)
    elif name == "calibration":
        points = {f"{row['criterion']}: {row['texts']}": row["rank correlation"] for row in rows}
        plot_points(points, path, "rank correlation")
    elif name == "scale":
        points = {f"{row['model']}, {row['layers']} layers": list(row.values())[-1] for row in rows}
        plot_points(points, path, "operations of scoring all layers on a token,\nin tokens of distillation")
    else:
        points = {str(next(iter(row.values()))): row["healed"] for row in rows if row["healed"] is not None}
        plot_points(points, path, "held-out loss after healing (nats per token)")
