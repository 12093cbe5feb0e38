"""The choice among the best few blocks: each is removed and reconstructed briefly, and compared by KL."""

import copy
import logging
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from ..data.targets import Batch
from ..distillation.reconstruction import mean_kl, reconstruct_layers
from ..scoring.table import ScoreTable
from ..surgery.lineage import get_lineage


logger = logging.getLogger(__name__)

TOKENS = 16_384  # of training text, read once for each candidate; and most of the calibration text


def compare_candidates(
    model: PreTrainedModel,
    table: ScoreTable,
    count: int,
    remove: Callable[[PreTrainedModel, int], Any],
    training: list[Batch],
    calibration: list[Batch],
    **settings: Any,
) -> list[dict[str, Any]]:
    """Returns the best blocks of a table, by score, with their KL after a brief reconstruction.

    Args:
        model (`PreTrainedModel`): the model before the removal, which stays as it is.
        table ([`ScoreTable`]): the scores of the blocks.
        count (`int`): how many blocks to compare. At most all of the table.
        remove (`Callable`): removes the block with this first layer from a copy of the model, in place.
        training (`list`): batches to reconstruct on.
        calibration (`list`): batches to measure KL(original || pruned) on.
        settings (*optional*): arguments of [`reconstruct_layers`].

    Returns:
        `list[dict]`: the `layers` (original indices), `score` and `kl` of each block, in the order of
        `table.ranking()`.
    """

    def compare(first: int) -> dict[str, Any]:
        """Returns the entry of one block. Its copy of the model ends with this call, so that memory holds one
        at a time."""
        pruned = copy.deepcopy(model)
        remove(pruned, first)
        reconstruct_layers(pruned, model, training, epochs=1, **settings)
        layers = sorted(set(get_lineage(model).kept) - set(get_lineage(pruned).kept))
        kl = mean_kl(pruned, model, calibration, TOKENS)
        logger.info("Block of layers %s: score %.4f, KL %.4f.", layers, table.scores[first], kl)
        return {"layers": layers, "score": table.scores[first], "kl": kl}

    return [compare(first) for first in table.ranking()[:count]]
