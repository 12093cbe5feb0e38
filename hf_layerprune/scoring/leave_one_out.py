"""Leave-one-out scores of layers.

Only the layers after the removed layer are computed again, which gives exact scores. Racing drops candidates
that are surely not the least important.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist
from typing import Any

import torch

from ..data.processes import make_together, process_count, read_turn, run_together
from ..errors import LayerPruneError
from ..forward.attention_masks import masks_made_once
from ..forward.hooks import can_replay, captured, check_all_ran, replayed
from ..forward.lm_head import ChunkedLMHead
from ..surgery.decoder import is_sharded
from ..surgery.layer_stack import LayerCut, LayerStack
from .journal import Journal
from .prefix_cache import PrefixCache


logger = logging.getLogger(__name__)

Cuts = Mapping[int, LayerCut]
Tick = Callable[[int], object]

FIRST_LOOK = 16  # units before the first candidates are dropped
NEXT_LOOK = 1.2  # factor of units from one check to the next


@dataclass(frozen=True)
class Metric:
    """A metric of a batch.

    Args:
        tokens (`Callable`): returns the number of counted tokens in each unit, `(units,)`.
        refer (`Callable`): runs the whole model on the batch. Returns the reference for `compare`, and the
            sum of each unit.
        compare (`Callable`): runs the model without a candidate on the batch. Returns the sum of each unit.
    """

    tokens: Callable[[Any], torch.Tensor]
    refer: Callable[[ChunkedLMHead, Any], tuple[Any, torch.Tensor]]
    compare: Callable[[ChunkedLMHead, Any, Any], torch.Tensor]


@dataclass
class PerUnitScores:
    """The sums over tokens for each candidate and each unit of text (a sequence, or a part of it).

    Args:
        tokens (`list[float]`): the number of counted tokens in each unit.
        whole (`list[float]`): the whole model's value on each unit.
        without (`dict[int, list[float]]`): for each candidate, the value on each unit that it was scored on,
            starting with the first unit.
    """

    tokens: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    without: dict[int, list[float]] = field(default_factory=dict)

    def score(self, layer: int) -> float:
        """Returns the increase without this candidate, per token of the units it was scored on."""
        return self._rises(layer).sum().item() / self._count(len(self.without[layer]))

    def error(self, layer: int) -> float | None:
        """Returns the standard error of the score over units, or None for fewer than two units."""
        return self._error(self._rises(layer))

    def quality(self) -> float:
        """Returns minus the mean per token of the whole model."""
        return -sum(self.whole) / self._count(len(self.whole))

    def possible(self, layers: Collection[int], confidence: float, looks: int, units: int) -> list[int]:
        """Returns the candidates that may be less important than the current least important candidate.

        The margin is one standard error of that candidate's score on all `units`. Candidates are compared
        unit by unit. The bound of a difference on all units is its standard error times the quantile of
        Student's distribution at `confidence`. A Bonferroni correction covers candidates and checks. The
        standard error is 0 once all units are scored.
        """
        least = min(layers, key=self.score)
        seen = len(self.without[least])
        if seen < 2:
            return list(layers)
        tail = (1 - confidence) / max(1, (len(layers) - 1) * looks)
        limit = _student_quantile(1 - tail, seen - 1) * math.sqrt(1 - seen / units)
        alike = (self.error(least) or 0.0) * math.sqrt(seen / units)
        left = []
        for layer in layers:
            difference = self._rises(layer) - self._rises(least)
            gap = difference.sum().item() / self._count(seen)
            if layer == least or gap + alike <= limit * (self._error(difference) or 0.0):
                left.append(layer)
        return left

    def _rises(self, layer: int) -> torch.Tensor:
        values = torch.tensor(self.without[layer], dtype=torch.float64)
        return values - torch.tensor(self.whole[: len(values)], dtype=torch.float64)

    def _count(self, sequences: int) -> float:
        count = sum(self.tokens[:sequences])
        if not count:
            raise LayerPruneError("No token of the calibration counts: all are masked or labelled -100.")
        return count

    def _error(self, sums: torch.Tensor) -> float | None:
        """Returns the standard error of a ratio of sums over units (of values, of tokens)."""
        number = len(sums)
        if number < 2:
            return None
        tokens = torch.tensor(self.tokens[:number], dtype=torch.float64)
        residuals = sums - sums.sum() / self._count(number) * tokens
        variance = residuals.square().sum().item() * number / (number - 1)
        return math.sqrt(variance) / self._count(number)


def leave_out(
    stack: LayerStack,
    batches: Sequence[Any],
    metric: Metric,
    example: torch.Tensor,
    cuts: Cuts,
    confidence: float | None,
    tick: Tick,
    journal: Journal,
    prefix_cache: PrefixCache | None = None,
) -> PerUnitScores:
    """Evaluates a metric on all batches, with the whole model and without each candidate.

    The layers before the removed layer reuse their outputs from the whole model. The results equal those of a
    full pass per candidate bit for bit, and take about half the time. If layers pass on more than their
    outputs (Gemma's shared keys and values), each candidate gets a full pass. A candidate is dropped if a sum
    without it is not finite. In a distributed run, the processes share the batches and return the same
    scores.

    Args:
        stack ([`LayerStack`]): the layers of a model in eval mode, without gradients.
        batches (sequence): batches in the form that `metric` reads.
        metric ([`Metric`]): the metric to evaluate.
        example (`torch.Tensor`): `(1, length)`, some tokens of the batches.
        cuts (`Mapping`): for the first layer of each candidate, a context that removes the candidate.
        confidence (`float` or `None`): the confidence of racing, which drops candidates that are surely not
            the least important. None keeps all candidates.
        tick (`Callable`): called with the number of finished steps of the progress bar.
        journal ([`Journal`]): stores the sums of each batch.
        prefix_cache ([`PrefixCache`], *optional*): the layer outputs of an earlier round.

    Returns:
        [`PerUnitScores`]

    Raises:
        LayerPruneError: a sum of the whole model is not finite.
    """
    scores = PerUnitScores(without={layer: [] for layer in cuts})
    lm_head = make_together(lambda: ChunkedLMHead(stack.base, example))
    alive, kept = sorted(cuts), stack.lineage.kept
    with masks_made_once(stack.base):
        replay = all(run_together(lambda: can_replay(stack, example[:, :8], max(cuts))))
    if not replay:
        logger.info("Layers of this model hand on more than their outputs: each score takes a full pass.")
    in_step = is_sharded(stack.base)

    def sums_of(number: int, batch: Any) -> list[torch.Tensor]:
        """Returns the sums of each unit, for the whole model and without each remaining candidate."""
        known = prefix_cache.known(number, kept)[: max(cuts)] if prefix_cache and replay else []
        with replayed(stack, known), captured(stack, range(max(alive))) as states:
            reference, whole = metric.refer(lm_head, batch)
        check_all_ran(states, range(max(alive)))
        outputs = [states[layer][1] for layer in range(max(alive))]
        if prefix_cache and replay:
            prefix_cache.keep(number, kept, outputs)
        sums = [whole]
        for layer in alive:
            with cuts[layer], replayed(stack, outputs[: layer if replay else 0]):
                sums.append(metric.compare(lm_head, batch, reference))
            tick(min(process_count(), len(batches) - number))
        return sums

    def read(number: int, batch: Any) -> tuple[list[float], dict[int, list[float]]]:
        """Returns the sums as plain values, in one transfer: the CPU waits for a GPU in each transfer."""
        with masks_made_once(stack.base):
            whole, *without = torch.stack(sums_of(number, batch)).tolist()
        return whole, dict(zip(alive, without, strict=True))

    results: list[tuple[list[float], dict[int, list[float]]]] = []  # of this turn, not used yet

    def next_result(number: int) -> list[list[float]]:
        """Returns the sums of a batch. The processes read the next batches at once, one batch each."""
        if not results:
            results.extend(read_turn(batches, number, read, in_step))
        whole, without = results.pop(0)
        return [whole, *(without[layer] for layer in alive)]

    tokens = [metric.tokens(batch).tolist() for batch in batches]
    units = sum(map(len, tokens))
    looks = max(1, math.ceil(math.log(max(2, units / FIRST_LOOK), NEXT_LOOK)))
    next_look: float = FIRST_LOOK
    for number in range(len(batches)):
        left = len(batches) - number - 1
        if journal.is_ahead:
            tick(len(alive))
        whole, *without = journal.once(partial(next_result, number))
        if not all(map(math.isfinite, whole)):
            raise LayerPruneError(
                f"The model's own score on calibration batch {number + 1} is not a finite number: "
                "check the model and the calibration data."
            )
        scores.tokens += tokens[number]
        scores.whole += whole
        for layer, sums in zip(alive, without, strict=True):
            scores.without[layer] += sums
        possible = [layer for layer in alive if all(map(math.isfinite, scores.without[layer]))]
        if confidence is not None and possible and len(scores.tokens) >= next_look and left:
            possible = scores.possible(possible, confidence, looks, units)
            while next_look <= len(scores.tokens):
                next_look *= NEXT_LOOK
        unread = left - len(results)
        tick((len(alive) - len(possible)) * unread)
        alive = possible
        if not alive or (confidence is not None and len(alive) == 1):
            tick(len(alive) * unread)
            break
    return scores


def _student_quantile(probability: float, degrees: int) -> float:
    """Returns the quantile of Student's distribution, by Cornish-Fisher to second order in 1 / degrees."""
    z = NormalDist().inv_cdf(probability)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + (z**3 + z) / (4 * degrees) + second / degrees**2
