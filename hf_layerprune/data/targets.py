"""Finds the positions of a batch whose next-token prediction counts in the loss."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import LayerPruneError


Batch = Mapping[str, torch.Tensor]


def token_mask(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns a mask of the positions whose prediction counts, shifted like the logits.

    Position t counts if its target, token t + 1, has a label (not -100), and neither token is padding.

    Args:
        input_ids (`torch.Tensor`): `(batch, length)`.
        labels (`torch.Tensor`, *optional*): `(batch, length)`. Default: every token has a label.
        attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 0 for padding.

    Returns:
        `torch.Tensor`: bool, `(batch, length - 1)`.

    Raises:
        LayerPruneError: the attention mask has another shape.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise LayerPruneError(
            f"The attention_mask has the shape {tuple(attention_mask.shape)}, but input_ids has the shape "
            f"{tuple(input_ids.shape)}. Give a mask of one number for each token, 0 for padding. For rows of "
            "several texts give position_ids and no mask."
        )
    mask = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    if labels is not None:
        mask = mask & (labels[:, 1:] != -100)
    if attention_mask is not None:
        not_padding = attention_mask.bool()
        mask = mask & not_padding[:, 1:] & not_padding[:, :-1]
    return mask


def targets_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mask of the counted positions `(batch, length - 1)` and the labels `(batch, length)`."""
    labels = batch.get("labels")
    mask = token_mask(batch["input_ids"], labels, batch.get("attention_mask"))
    return mask, batch["input_ids"] if labels is None else labels


@dataclass(frozen=True)
class Positions:
    """The positions of a batch that count, as indices.

    They are computed once, because the CPU waits for the GPU in each computation.

    Args:
        rows, places (`torch.Tensor`): `(positions,)`, the row of each position and its place in the row.
        shape (`torch.Size`): the shape of the mask, `(batch, places)`.
    """

    rows: torch.Tensor
    places: torch.Tensor
    shape: torch.Size

    @classmethod
    def of(cls, mask: torch.Tensor) -> "Positions":
        """Makes the positions from a mask `(batch, places)` that is true at each of them."""
        rows, places = mask.nonzero(as_tuple=True)
        return cls(rows, places, mask.shape)

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the `values` at these positions, `(positions, ...)`.

        Args:
            values (`torch.Tensor`): `(batch, length, ...)`, where `length` is at least the number of places.
        """
        return values[self.rows, self.places]


def check_token_labels(batches: Iterable[Batch]) -> None:
    """Checks that batches with labels have one label per token.

    Raises:
        LayerPruneError: labels have another shape, for example one label per row.
    """
    if any("labels" in batch and batch["labels"].shape != batch["input_ids"].shape for batch in batches):
        raise LayerPruneError(
            "The labels have another shape than input_ids. A causal language model needs one label for each "
            "token: leave the labels out, or give one for each token."
        )
