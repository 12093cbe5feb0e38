"""The scores of all candidate layers, as a table that can be saved and plotted."""

from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .criteria import CRITERIA


if TYPE_CHECKING:
    from matplotlib.figure import Figure


BY_LAYER = ("scores", "refused", "errors", "seen")


@dataclass(frozen=True)
class ScoreTable:
    """The importance of each candidate layer of a model.

    Args:
        criterion (`str`): the criterion that gave the scores.
        scores (`dict[int, float]`): the score of each candidate, by its index in the present model. Higher
            means more important.
        quality (`float` or `None`): the quality of the scored model. Higher is better. It is minus the loss
            in nats per token for `loss`, the task's score for `task`, and None if it was not measured. With
            a teacher, `kl` gives minus the KL divergence from the teacher, in nats per token.
        kept (`list[int]`): for each present layer, its index in the original model.
        refused (`dict[int, str]`): by present index, the reason why a layer is not a candidate. It cannot be
            removed exactly, or the score without it is not finite.
        block_size (`int`): number of layers in a candidate, which is named by its first layer.
        errors (`dict[int, float]`): standard errors of the scores, if known. They are over sequences or
            questions, and for leave-one-out over parts of 64 tokens.
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
        """Returns the candidates, least important first. If scores are equal, the deeper layer comes first.

        Candidates that racing dropped come last.
        """
        return sorted(self.scores, key=lambda i: (-self.seen.get(i, 0), self.scores[i], -i))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, with layer indices as strings."""
        values = asdict(self)
        return values | {name: {str(i): v for i, v in values[name].items()} for name in BY_LAYER}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ScoreTable":
        """Returns the table from values of [`~ScoreTable.to_dict`]. Earlier versions can be read too."""
        values = {{"run": "block_size"}.get(name, name): value for name, value in values.items()}
        by_layer = {name: values.get(name, {}) for name in BY_LAYER}
        return cls(**values | {name: {int(i): v for i, v in d.items()} for name, d in by_layer.items()})

    def __repr__(self) -> str:
        """Returns the table as text: a row for each candidate, least important first."""
        heads = ["layer", "original", f"{self.criterion} score", *(["± error"] if self.errors else [])]
        rows = [heads]
        for layer in self.ranking():
            cells = [str(layer), str(self.kept[layer]), f"{self.scores[layer]:.5f}"]
            rows.append(
                cells + [f"{self.errors[layer]:.5f}" if layer in self.errors else ""] * (len(heads) - 3)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        lines = [
            "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
        refused = [f"Layer {layer} cannot be removed: {reason}" for layer, reason in self.refused.items()]
        return "\n".join([*lines, *(["", *refused] if refused else [])])

    def _repr_markdown_(self) -> str:
        """Returns the table as a notebook shows it."""
        return repr(self)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Returns a bar chart of the scores by original layer, with the lowest score marked.

        Args:
            path (`str` or `Path`, *optional*): a file to write the chart to. The file ending sets the format.
        """
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
        if path is not None:
            figure.savefig(path, dpi=120)
        # Notebooks need this method to show a figure that was not made by pyplot.
        vars(figure)["_repr_png_"] = partial(_png, figure)
        return figure


def _png(figure: "Figure") -> bytes:
    """Returns a figure as a PNG file."""
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=120)
        return file.getvalue()
