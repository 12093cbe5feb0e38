"""The scores of all candidate layers, as a table that can be saved and plotted."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .criteria import CRITERIA


BY_LAYER = ("scores", "refused", "errors", "seen")


@dataclass(frozen=True)
class ScoreTable:
    """How much each candidate layer of a model matters.

    Args:
        criterion (`str`): the criterion that gave the scores.
        scores (`dict[int, float]`): for each candidate, by its index in the present model, its score;
            higher is more important.
        quality (`float` or `None`): of the scored model, higher is better. For `loss` minus the loss in nats
        per token, for `task` the task's score, else None.
        kept (`list[int]`): for each present layer, its index in the original model.
        refused (`dict[int, str]`): by present index, why a layer is not a candidate: it cannot be removed
        exactly, or the score without it is not finite.
        block_size (`int`): number of layers in a candidate, which is named by its first layer.
        errors (`dict[int, float]`): standard errors of the scores, if known: over sequences or questions, and
        for leave-one-out over parts of 64 tokens.
        seen (`dict[int, int]`): number of sequences, questions or parts that each candidate was scored on.
    """

    criterion: str
    scores: dict[int, float]
    quality: float | None
    kept: list[int]
    refused: dict[int, str] = field(default_factory=dict)
    block_size: int = 1
    errors: dict[int, float] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    def ranking(self) -> list[int]:
        """Returns the candidates, least important first. Of equal scores, the deeper layer comes first.

        Those that racing dropped early come last.
        """
        return sorted(self.scores, key=lambda i: (-self.seen.get(i, 0), self.scores[i], -i))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, with layer indices as strings."""
        values = asdict(self)
        return values | {name: {str(i): v for i, v in values[name].items()} for name in BY_LAYER}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ScoreTable":
        """Returns the table of the values of [`~ScoreTable.to_dict`], also of an earlier version."""
        values = {{"run": "block_size"}.get(name, name): value for name, value in values.items()}
        by_layer = {name: values.get(name, {}) for name in BY_LAYER}
        return cls(**values | {name: {int(i): v for i, v in d.items()} for name, d in by_layer.items()})

    def plot(self, path: str | Path) -> None:
        """Writes a bar chart of the scores by original layer, with the lowest score marked."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.28 * len(self.kept)), 3.2), layout="constrained")
        axes = figure.subplots()
        least = self.ranking()[0]
        layers = sorted(self.scores)
        places, heights = [self.kept[i] for i in layers], [self.scores[i] for i in layers]
        what = "layer" if self.block_size == 1 else f"first layer of a block of {self.block_size}"
        axes.bar(places, heights, color="tab:blue", label=what)
        axes.bar(self.kept[least], self.scores[least], color="tab:red", label="lowest score")
        if self.errors:
            errors = [self.errors.get(i, 0.0) for i in layers]
            axes.errorbar(places, heights, errors, fmt="none", ecolor="gray", label="± 1 standard error")
        for layer in set(range(len(self.kept))) - {i + j for i in layers for j in range(self.block_size)}:
            axes.text(self.kept[layer], 0, " not scored", rotation=90, ha="center", color="gray", size=8)
        values = sorted(abs(v) for v in self.scores.values())
        if values[0] > 0 and values[-1] > 20 * values[len(values) // 2]:
            axes.set_yscale("symlog", linthresh=values[len(values) // 2])
        axes.set_xticks(range(max(self.kept) + 1))
        axes.set_xlim(-0.8, max(self.kept) + 0.8)
        axes.tick_params("x", labelsize=7)
        axes.set_xlabel("decoder layer (index in the original model)")
        axes.set_ylabel(CRITERIA[self.criterion].unit)
        axes.set_title(
            f"Layer scores by {self.criterion}. Lowest score: layer {self.kept[least]}", fontsize=10
        )
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)
