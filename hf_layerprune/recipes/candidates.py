"""Compares the best few blocks: removes each block, reconstructs briefly, and measures the KL divergence."""

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

TOKENS = 16_384  # training tokens for each candidate, and maximum of calibration tokens


def compare_candidates(
    model: PreTrainedModel,
    table: ScoreTable,
    count: int,
    remove: Callable[[PreTrainedModel, int], Any],
    training: list[Batch],
    calibration: list[Batch],
    **settings: Any,
) -> list[dict[str, Any]]:
    """Returns the blocks of a table with the best scores, and their KL after a brief reconstruction.

    Args:
        model (`PreTrainedModel`): the model before the removal. It is not changed.
        table ([`ScoreTable`]): the scores of the blocks.
        count (`int`): number of blocks to compare, at most the number of blocks in the table.
        remove (`Callable`): removes the block with this first layer from a copy of the model, in place.
        training (`list`): batches to reconstruct on.
        calibration (`list`): batches to measure KL(original || pruned) on.
        settings (*optional*): arguments of [`reconstruct_layers`].

    Returns:
        `list[dict]`: the `layers` (original indices), `score` and `kl` of each block, in the order of
        `table.ranking()`.
    """

    def compare(first: int) -> dict[str, Any]:
        """Returns the entry of one block.

        Its copy of the model is freed after this call, so that memory holds only one copy at a time.
        """
        pruned = copy.deepcopy(model)
        remove(pruned, first)
        reconstruct_layers(pruned, model, training, epochs=1, **settings)
        layers = sorted(set(get_lineage(model).kept) - set(get_lineage(pruned).kept))
        kl = mean_kl(pruned, model, calibration, TOKENS)
        logger.info("Block of layers %s: score %.4f, KL %.4f.", layers, table.scores[first], kl)
        return {"layers": layers, "score": table.scores[first], "kl": kl}

    return [compare(first) for first in table.ranking()[:count]]
