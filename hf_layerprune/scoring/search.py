"""Selects layers to remove together without training: greedily or as a block, then refined by exchanges."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..data.batches import take_rows
from ..errors import LayerPruneError
from ..surgery.layer_stack import LayerStack
from ..surgery.lineage import plain_int
from .criteria import find_criterion
from .prefix_cache import PrefixCache
from .score import score_layers
from .table import ScoreTable


@dataclass(frozen=True)
class Selection:
    """A set of layers to remove.

    Args:
        layers (`list[int]`): present indices, in order.
        cost (`float`): the cost of the removal in the criterion's unit. For `"loss"` and `"task"` it is the
            decrease of quality, for other criteria the sum of the scores at each step.
        steps (`list[tuple[list[int], float]]`): the set after each step, with its cost.
    """

    layers: list[int]
    cost: float
    steps: list[tuple[list[int], float]]


def select_layers(
    model: PreTrainedModel,
    batches: Any,
    remove: int,
    criterion: str = "loss",
    *,
    contiguous: bool = False,
    refine: bool = True,
    protected: Iterable[int] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Selection:
    """Selects the set of layers whose removal costs least. The model is not changed.

    - Greedy: removes the least important layer, scores the remaining layers, and repeats (SLEB, 2402.09025).
    - Contiguous: removes the least important block (LLM-Streamline, 2403.19135; Gromov et al., 2403.17887).
    - Refinement: puts one layer of the set back and removes the cheapest other layer instead, as long as this
      lowers the cost.

    Args:
        model (`PreTrainedModel`): a causal language model.
        batches: the calibration data, as for [`score_layers`].
        remove (`int`): number of layers to remove.
        criterion (`str`, *optional*, defaults to `"loss"`): see [`score_layers`].
        contiguous (`bool`, *optional*, defaults to `False`): whether to start from a block.
        refine (`bool`, *optional*, defaults to `True`): whether to exchange layers afterwards. Only `"loss"`
            and `"task"` are refined, as they measure the quality of the model. With `racing` there is no
            refinement, as racing reads only a part of the text.
        protected (iterable of `int`, *optional*): layers to keep. Default: the first and the last layer.
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.
        settings: other arguments of [`score_layers`].

    Returns:
        [`Selection`]

    Raises:
        LayerPruneError: `remove` is not a possible number of layers, or [`score_layers`] refuses an argument.
    """
    stack = LayerStack(model)
    kept = stack.lineage.kept
    given = take_rows(batches) if isinstance(batches, Iterator) else batches  # the data is read several times
    fixed = {0, len(kept) - 1} if protected is None else stack.check_layers(protected)
    remove = plain_int(remove)
    if type(remove) is not int or not 1 <= remove <= len(kept) - len(fixed) - (not fixed):
        raise LayerPruneError(
            f"remove is {remove!r}, but {len(kept) - len(fixed)} layers are not protected. Remove fewer."
        )
    measured = find_criterion(criterion).measures_quality and settings.get("racing") is None

    def table(gone: Sequence[int], block: int = 1) -> tuple[ScoreTable, dict[int, int]]:
        """Returns the scores of the model without some layers, and the present index of each scored layer."""
        left = [layer for layer in range(len(kept)) if layer not in gone]
        stay = [left.index(layer) for layer in fixed]
        with stack.without(gone):
            scores = score_layers(
                model,
                given,
                criterion,
                block_size=block,
                protected=stay,
                prefix_cache=prefix_cache,
                progress=progress,
                **settings,
            )
        return scores, dict(enumerate(left))

    prefix_cache = PrefixCache()
    steps: list[tuple[list[int], float]] = []
    whole, cost, layers = 0.0, 0.0, list[int]()
    if contiguous:
        scores, _ = table([], remove)
        start = scores.ranking()[0]
        whole, cost = scores.quality or 0.0, scores.scores[start]
        layers = list(range(start, start + remove))
        steps.append((layers, cost))
    while len(layers) < remove:
        scores, place = table(layers)
        best = scores.ranking()[0]
        if not layers:
            whole = scores.quality or 0.0
        cost += scores.scores[best]
        layers = sorted([*layers, place[best]])
        steps.append((layers, cost))
    helped = refine and measured
    while helped:
        helped = False
        for layer in list(layers):
            others = [other for other in layers if other != layer]
            scores, place = table(others)
            best = scores.ranking()[0]
            cost_after = whole - (scores.quality or 0.0) + scores.scores[best]
            if place[best] != layer and cost_after < cost - 1e-9 * abs(cost):
                layers, cost, helped = sorted([*others, place[best]]), cost_after, True
                steps.append((layers, cost))
                break
    return Selection(layers, cost, steps)
