"""Scoring all candidate layers of a model: one call, one table."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .criteria import CRITERIA, next_token_metric
from .data import Batch
from .errors import LayerPruneError
from .lineage import get_lineage
from .surgery import check_layers, possible_cuts


UNITS = {
    "block_influence": "Block Influence",
    "loss": "rise of the loss without it\n(nats per token)",
    "task": "fall of the task's score without it",
}


@dataclass(frozen=True)
class ScoreTable:
    """How much each candidate layer of a model matters.

    Args:
        criterion (`str`): the criterion that gave the scores.
        scores (`dict[int, float]`): for each candidate, by its index in the present model, its score;
            higher matters more.
        quality (`float` or `None`): of the model as it was scored, higher is better: minus the loss in
            nats per token (`loss`), the task's score (`task`), None (`block_influence`).
        kept (`list[int]`): for each present layer, its index in the original model.
        refused (`dict[int, str]`): for each layer that is no candidate because it cannot be removed
            exactly, by its present index, the reason.
    """

    criterion: str
    scores: dict[int, float]
    quality: float | None
    kept: list[int]
    refused: dict[int, str] = field(default_factory=dict)

    def ranking(self) -> list[int]:
        """The candidates, least important first; of equals the deeper first."""
        return sorted(self.scores, key=lambda layer: (self.scores[layer], -layer))

    def to_dict(self) -> dict[str, Any]:
        """The table as plain values for JSON, the layer indices as strings."""
        return asdict(self) | {
            "scores": {str(layer): score for layer, score in self.scores.items()},
            "refused": {str(layer): reason for layer, reason in self.refused.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ScoreTable":
        """The table that [`~ScoreTable.to_dict`] gave."""
        by_layer = {name: values.get(name, {}) for name in ("scores", "refused")}
        return cls(**values | {name: {int(k): v for k, v in d.items()} for name, d in by_layer.items()})

    def plot(self, path: str | Path) -> None:
        """Write a bar chart of the scores by original layer, the least important one marked."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.28 * len(self.kept)), 3.2), layout="constrained")
        axes = figure.subplots()
        least = self.ranking()[0]
        layers = sorted(self.scores)
        colours = ["tab:red" if layer == least else "tab:blue" for layer in layers]
        axes.bar([self.kept[i] for i in layers], [self.scores[i] for i in layers], color=colours)
        for layer in set(range(len(self.kept))) - set(layers):
            axes.text(self.kept[layer], 0, " protected", rotation=90, ha="center", color="gray", size=8)
        values = sorted(abs(v) for v in self.scores.values())
        if values[0] > 0 and values[-1] > 20 * values[len(values) // 2]:
            axes.set_yscale("symlog", linthresh=values[len(values) // 2])
        axes.set_xticks(range(max(self.kept) + 1))
        axes.tick_params("x", labelsize=7)
        axes.set_xlabel("decoder layer (index in the original model)")
        axes.set_ylabel(UNITS[self.criterion])
        axes.set_title(
            f"Importance of {len(layers)} of {len(self.kept)} layers; least important: {self.kept[least]}",
            fontsize=10,
        )
        figure.savefig(path, dpi=120)


def score_layers(
    model: PreTrainedModel,
    batches: Iterable[Batch] = (),
    criterion: str = "loss",
    *,
    task: Any = None,
    protected: Iterable[int] | None = None,
    progress: bool = True,
) -> ScoreTable:
    """Score how much each decoder layer of `model` matters. The model is not changed.

    Args:
        model (`PreTrainedModel`): a causal language model.
        batches (iterable of dict): calibration: `input_ids` `(batch, length)`, and where needed
            `attention_mask` and `labels` (-100 is not counted) of the same shape.
        criterion (`str`, *optional*, defaults to `"loss"`): `"loss"`, `"block_influence"` or `"task"`.
        task (`Callable` or `evaluate.EvaluationModule`, *optional*): for `criterion="task"`, a function
            `score(model) -> float`, higher is better, or a metric that is computed from predicted and
            true next tokens of `batches`.
        protected (iterable of `int`, *optional*): present indices that are no candidates; left out,
            the first and the last layer.
        progress (`bool`, *optional*, defaults to `True`): show a bar with the time left.

    Returns:
        [`ScoreTable`]

    Raises:
        LayerPruneError: an unknown criterion or layer, no candidate, a model that cannot be cut exactly,
            no calibration, or a score that is not a number.
    """
    if criterion not in CRITERIA:
        raise LayerPruneError(f"Unknown criterion {criterion!r}: choose from {', '.join(CRITERIA)}.")
    if (task is None) == (criterion == "task"):
        raise LayerPruneError("`task` (a function or a metric) and criterion='task' go together.")
    kept = get_lineage(model).kept
    ends = {0, len(kept) - 1}
    fixed = ends if protected is None else check_layers(model, protected)
    candidates = [layer for layer in range(len(kept)) if layer not in fixed]
    if not candidates or len(kept) == 1:
        raise LayerPruneError(f"No layer to score: {len(kept)} layers, protected {sorted(fixed)}.")
    cuts, refused = possible_cuts(model, candidates)  # a score of what cannot go would help nobody
    if not cuts:
        raise LayerPruneError(next(iter(refused.values())))
    on_device = [{k: v.to(model.device) for k, v in batch.items() if torch.is_tensor(v)} for batch in batches]
    if not on_device and not callable(task):
        raise LayerPruneError("No calibration batches to score with.")
    if any(batch["input_ids"].shape[1] < 2 for batch in on_device):
        raise LayerPruneError("Calibration batches of one token have nothing to predict.")
    source: Any = on_device
    if task is not None:
        source = next_token_metric(task, on_device) if hasattr(task, "compute") else task

    rounds = 1 if criterion == "task" else len(on_device)
    total = rounds * len(cuts)
    with (
        tqdm(total=total, desc=f"scoring ({criterion})", disable=not progress, leave=False) as bar,
        undisturbed(model),
    ):
        quality, scores = CRITERIA[criterion](model, source, cuts, bar.update)
    bad = [layer for layer, score in scores.items() if not np.isfinite(score)]
    if bad:
        raise LayerPruneError(
            f"The {criterion} score of layers {bad} is not a finite number: check the model and the "
            "calibration data."
        )
    return ScoreTable(criterion, scores, quality, kept, refused)


def check_plot_path(path: str | Path) -> None:
    """Check that [`ScoreTable.plot`] can write to `path`, before long work.

    Raises:
        LayerPruneError: its folder does not exist, or its ending is no kind of picture.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:] not in kinds or not Path(path).absolute().parent.is_dir():
        raise LayerPruneError(
            f"Cannot write a picture to {path}: its folder must exist, and its ending be one of "
            f"{', '.join(sorted(kinds))}."
        )


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Within this context `model` is in eval mode without gradients; afterwards its modules' modes and
    the random states of torch, numpy and Python are as before, also when it is left by an error."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
