"""Leave-one-out scores of layers: exact, computing only the layers after the missing one, and fast, dropping
candidates that are surely not the least important (racing)."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from statistics import NormalDist
from typing import Any

import torch

from ..errors import LayerPruneError
from ..forward.hooks import can_replay, captured, check_all_ran, replayed
from ..forward.lm_head import ChunkedLMHead
from ..surgery.layer_stack import LayerCut, LayerStack
from .journal import Journal


logger = logging.getLogger(__name__)

Cuts = Mapping[int, LayerCut]
Tick = Callable[[int], object]

FIRST_LOOK = 16  # units before the first candidates are dropped
NEXT_LOOK = 1.2  # factor of units from one check to the next


@dataclass(frozen=True)
class Metric:
    """A metric of a batch.

    Args:
        tokens (`Callable`): returns how many tokens of each unit count, `(units,)`.
        refer (`Callable`): reads the batch with the whole model. Returns the reference for models that have
            a layer less, and each unit's sum.
        compare (`Callable`): reads the batch with a model that has a layer less. Returns each unit's sum.
    """

    tokens: Callable[[Any], torch.Tensor]
    refer: Callable[[ChunkedLMHead, Any], tuple[Any, torch.Tensor]]
    compare: Callable[[ChunkedLMHead, Any, Any], torch.Tensor]


@dataclass
class PerUnitScores:
    """The sums over tokens, for each unit of text (a sequence, or a part of it) and candidate.

    Args:
        tokens (`list[float]`): of each unit, how many tokens count.
        whole (`list[float]`): of each unit, the whole model's value.
        without (`dict[int, list[float]]`): of each candidate, the value of each unit that it was scored on,
        from the first on.
    """

    tokens: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    without: dict[int, list[float]] = field(default_factory=dict)

    def score(self, layer: int) -> float:
        """Returns the increase without this candidate, per token of the units that it was scored on."""
        return self._rises(layer).sum().item() / self._count(len(self.without[layer]))

    def error(self, layer: int) -> float | None:
        """Returns the standard error of the score over units; None for less than two units."""
        return self._error(self._rises(layer))

    def quality(self) -> float:
        """Returns minus the whole model's mean per token."""
        return -sum(self.whole) / self._count(len(self.whole))

    def possible(self, layers: Collection[int], confidence: float, looks: int, units: int) -> list[int]:
        """Returns the candidates that may be less important than the least important so far, by more than a
        standard error of its score on all `units`.

        Candidates are compared unit by unit. The bound of their difference on all units is its standard error
        times the quantile of Student's distribution at `confidence`, with a Bonferroni correction for
        candidates and checks. The standard error is 0 once all units are scored.
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


class PrefixCache:
    """The outputs of layers for each calibration batch, kept for the next round of scoring.

    The layers before the first removed layer return the same outputs again, if the model was not trained in
    between and the batches are the same.

    Args:
        limit_mb (`int`, *optional*, defaults to 1024): MiB to keep. Further batches are not kept.
    """

    def __init__(self, limit_mb: int = 1024) -> None:
        self._left = limit_mb * 2**20
        self._found: dict[int, tuple[list[int], list[Any]]] = {}

    def known(self, batch: int, kept: Sequence[int]) -> list[Any]:
        """Returns the known outputs of the first layers of `kept` (original indices) for this batch."""
        layers, outputs = self._found.get(batch, ([], []))
        same = takewhile(lambda pair: pair[0] == pair[1], zip(layers, kept, strict=False))
        return outputs[: len(list(same))]

    def keep(self, batch: int, kept: Sequence[int], outputs: list[Any]) -> None:
        """Keeps the outputs of the first layers of `kept` (original indices), if there is room."""
        self._left += sum(map(_bytes_of, self._found.pop(batch, ([], []))[1]))
        size = sum(map(_bytes_of, outputs))
        if size <= self._left:
            self._left -= size
            self._found[batch] = list(kept), outputs


def _bytes_of(output: Any) -> int:
    parts = output if isinstance(output, (tuple, list)) else [output]
    return sum(part.nbytes for part in parts if torch.is_tensor(part))


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
    """Reads all batches with the whole model and without each candidate.

    The layers before the missing one return their outputs of the whole model. This gives the same scores as a
    full pass for each candidate, bit for bit, in about half the time. Models whose layers pass on more than
    their outputs (Gemma's shared keys and values) get a full pass for each candidate. A candidate is dropped
    if a sum without it is not finite.

    Args:
        stack ([`LayerStack`]): the layers of a model in eval mode, without gradients.
        batches (sequence): as `metric` reads them.
        metric ([`Metric`]): what is measured.
        example (`torch.Tensor`): `(1, length)`, some tokens of the batches.
        cuts (`Mapping`): for each candidate, by its first layer, the context in which the model lacks it.
        confidence (`float` or `None`): drop candidates that are surely not the least important (racing);
            None keeps all.
        tick (`Callable`): called with the number of finished steps of the progress bar.
        journal ([`Journal`]): of the sums of each batch.
        prefix_cache ([`PrefixCache`], *optional*): of an earlier round.

    Raises:
        LayerPruneError: the whole model's own sums are not finite.
    """
    scores = PerUnitScores(without={layer: [] for layer in cuts})
    lm_head = ChunkedLMHead(stack.base, example)
    alive, kept = sorted(cuts), stack.lineage.kept
    replay = can_replay(stack, example[:, :8], max(cuts))
    if not replay:
        logger.info("Layers of this model hand on more than their outputs: each score takes a full pass.")

    def read(number: int, batch: Any) -> list[list[float]]:
        """Returns the sums of the whole model, and without each remaining candidate."""
        known = prefix_cache.known(number, kept)[: max(cuts)] if prefix_cache and replay else []
        with replayed(stack, known), captured(stack, range(max(alive))) as states:
            reference, sums = metric.refer(lm_head, batch)
        check_all_ran(states, range(max(alive)))
        outputs = [states[layer][1] for layer in range(max(alive))]
        if prefix_cache and replay:
            prefix_cache.keep(number, kept, outputs)
        all_sums = [sums.tolist()]
        for layer in alive:
            with cuts[layer], replayed(stack, outputs[: layer if replay else 0]):
                all_sums.append(metric.compare(lm_head, batch, reference).tolist())
            tick(1)
        return all_sums

    units = sum(len(metric.tokens(batch)) for batch in batches)
    looks = max(1, math.ceil(math.log(max(2, units / FIRST_LOOK), NEXT_LOOK)))
    next_look: float = FIRST_LOOK
    for number, batch in enumerate(batches):
        left = len(batches) - number - 1
        if journal.is_ahead:
            tick(len(alive))
        whole, *without = journal.once(partial(read, number, batch))
        if not all(map(math.isfinite, whole)):
            raise LayerPruneError(
                f"The model's own score on calibration batch {number + 1} is not a finite number: "
                "check the model and the calibration data."
            )
        scores.tokens += metric.tokens(batch).tolist()
        scores.whole += whole
        for layer, sums in zip(alive, without, strict=True):
            scores.without[layer] += sums
        possible = [layer for layer in alive if all(map(math.isfinite, scores.without[layer]))]
        if confidence is not None and possible and len(scores.tokens) >= next_look and left:
            possible = scores.possible(possible, confidence, looks, units)
            while next_look <= len(scores.tokens):
                next_look *= NEXT_LOOK
        tick((len(alive) - len(possible)) * left)
        alive = possible
        if not alive or (confidence is not None and len(alive) == 1):
            tick(len(alive) * left)
            break
    return scores


def _student_quantile(probability: float, degrees: int) -> float:
    """Returns the quantile of Student's distribution (Cornish-Fisher, to the second order in 1 / degrees)."""
    z = NormalDist().inv_cdf(probability)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + (z**3 + z) / (4 * degrees) + second / degrees**2
