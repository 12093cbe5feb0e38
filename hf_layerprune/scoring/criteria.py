"""Criteria that score the importance of decoder layers or blocks of layers. `CRITERIA` lists them by name.

Each criterion is a function that takes a [`ScoringContext`] and returns a [`CriterionResult`]. A higher score
means a more important layer.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.processes import (
    make_together,
    process_count,
    process_index,
    read_all,
    run_together,
    sum_over_processes,
)
from ..data.targets import Batch, Positions, targets_of
from ..errors import LayerPruneError, choose_from
from ..evaluation.evaluate import Task
from ..evaluation.multiple_choice import Choices, MultipleChoice, right_answers
from ..forward.hooks import captured, check_all_ran, hidden
from ..forward.lm_head import ChunkedLMHead, unit_losses
from ..forward.token_losses import cross_entropy, joined, scaled_logits, sum_by_unit, sum_dtype
from ..surgery.decoder import is_sharded, predicts_next_token, text_config
from ..surgery.layer_stack import LayerStack
from .journal import Journal
from .leave_one_out import Cuts, Metric, PerUnitScores, leave_out
from .prefix_cache import PrefixCache


# Orders of removal by position alone (LayerChop, 2305.14864, section 3, and 2411.15558).
PATTERNS: dict[str, Callable[[float, int], float]] = {
    "output": lambda layer, count: count - layer,  # the deepest first
    "input": lambda layer, count: layer,
    "middle": lambda layer, count: abs(layer - (count - 1) / 2),
    "both": lambda layer, count: min(layer, count - 1 - layer),  # from both ends inward
}


@dataclass(frozen=True)
class ScoringContext:
    """The model to score, and the data and settings of the criterion.

    Args:
        stack ([`LayerStack`]): the layers of a model in eval mode, without gradients.
        batches (sequence of dict): calibration batches with `input_ids` `(batch, length)`.
        cuts (`Mapping`): for the first layer of each candidate, a context that removes the candidate.
        block (`int`): number of layers in a candidate.
        bar (`tqdm`): the progress bar, advanced by 1 for each candidate and batch.
        journal ([`Journal`]): stores results, so that interrupted scoring continues.
        racing (`float` or `None`): the confidence with which candidates may be dropped early. None: none is.
        tasks (sequence of `Callable`): for `task`, the tasks to evaluate.
        teacher (`PreTrainedModel` or `None`): for `kl`, the model to compare with. None: the model itself.
        pattern (`str`): for `positional`, the order of removal.
        seed (`int`): for the pattern `random`, the random seed.
        prefix_cache ([`PrefixCache`] or `None`): for leave-one-out, the layer outputs of an earlier round.
    """

    stack: LayerStack
    batches: Sequence[Batch]
    cuts: Cuts
    block: int
    bar: tqdm
    journal: Journal
    racing: float | None = None
    tasks: Sequence[Task] = ()
    teacher: PreTrainedModel | None = None
    pattern: str = "output"
    seed: int = 0
    prefix_cache: PrefixCache | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model whose layers are scored."""
        return self.stack.base


@dataclass(frozen=True)
class CriterionResult:
    """The scores by one criterion.

    Args:
        scores (`dict[int, float]`): for the first layer of each candidate, its score. Higher means more
            important.
        quality (`float` or `None`): the quality of the whole model. Higher is better. None if the criterion
            does not measure it.
        errors (`dict[int, float]`): the standard errors of the scores over units, if they are known.
        seen (`dict[int, int]`): the number of text units that each candidate was scored on.
    """

    scores: dict[int, float]
    quality: float | None = None
    errors: dict[int, float] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, per_unit: PerUnitScores, quality: bool = False) -> "CriterionResult":
        """Returns the means over all units."""
        errors = {layer: per_unit.error(layer) for layer in per_unit.without}
        return cls(
            scores={layer: per_unit.score(layer) for layer in per_unit.without},
            quality=per_unit.quality() if quality else None,
            errors={layer: error for layer, error in errors.items() if error is not None},
            seen={layer: len(sums) for layer, sums in per_unit.without.items()},
        )


@dataclass(frozen=True)
class Criterion:
    """One way to score layers.

    Args:
        score (`Callable`): scores all candidates.
        unit (`str`): the unit of the scores, for the axis of a plot.
        reads_text (`bool`): whether the criterion reads calibration text. A task may read its own text.
        leave_one_out (`bool`): whether the criterion runs the model without each candidate. Racing and the
            prefix cache are for such criteria.
        needs_next_token (`bool`): whether the model must be a causal language model.
        takes_teacher (`bool`): whether a teacher can be given.
        needs_task (`bool`): whether a task must be given.
        measures_quality (`bool`): whether scores are decreases of a measured quality of the model.
    """

    score: Callable[[ScoringContext], CriterionResult]
    unit: str
    reads_text: bool = True
    leave_one_out: bool = False
    needs_next_token: bool = False
    takes_teacher: bool = False
    needs_task: bool = False
    measures_quality: bool = False

    @property
    def score_is_cost(self) -> bool:
        """Whether a score measures the loss of quality caused by the removal."""
        return self.leave_one_out or self.needs_task


def block_influence(context: ScoringContext) -> CriterionResult:
    """Returns the Block Influence of each candidate: `1 - E[cos(x_i, x_{i+n})]` over tokens (ShortGPT,
    2403.03853, equation 1). Blocks of n layers follow LLM-Streamline (2403.19135, section 3.1).

    The states are the raw hidden states before and after the layers, without the final norm. One forward pass
    scores all candidates.
    """

    def distance(before: torch.Tensor, after: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
        cosine = cosine.flatten(2).mean(-1) if cosine.dim() > 2 else cosine
        return torch.where(real, 1 - cosine, 0.0).sum(1)

    return _compare_states(context, distance, lambda real: real.sum(1))


def angular(context: ScoringContext) -> CriterionResult:
    """Returns the angular distance of the last token, `arccos(cos(x_l, x_{l+n})) / pi`, as the mean over
    sequences (Gromov et al., 2403.17887, equation 8). One forward pass scores all candidates."""

    def distance(before: torch.Tensor, after: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        places = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, places, -1).amax(1)
        rows = torch.arange(len(real), device=real.device)
        cosine = F.cosine_similarity(before[rows, last].float(), after[rows, last].float(), dim=-1)
        cosine = cosine.flatten(1).mean(-1) if cosine.dim() > 1 else cosine
        angles = cosine.clamp(-1, 1).arccos() / torch.pi
        return torch.where(last >= 0, angles, 0.0)

    return _compare_states(context, distance, lambda real: real.any(1))


def loss(context: ScoringContext) -> CriterionResult:
    """Returns the increase of the language-model loss without the layers, in nats per token. The quality is
    minus the loss (SLEB, 2402.09025; Shortened LLaMA, 2402.02834)."""

    def refer(lm_head: ChunkedLMHead, batch: Batch) -> tuple[Any, torch.Tensor]:
        positions = Positions.of(targets_of(batch)[0])
        return positions, unit_losses(lm_head, batch, positions)

    def compare(lm_head: ChunkedLMHead, batch: Batch, reference: Any) -> torch.Tensor:
        return unit_losses(lm_head, batch, reference)

    return CriterionResult.of(_read_without_each(context, refer, compare), quality=True)


def kl(context: ScoringContext) -> CriterionResult:
    """Returns the KL divergence of the output without the layers from the output of the whole model, in nats
    per token. With a teacher, it returns the increase of the KL divergence from the teacher. The quality is
    then minus the model's divergence from the teacher."""
    teacher = None
    if context.teacher is not None:
        sizes = [text_config(model.config).vocab_size for model in (context.model, context.teacher)]
        if sizes[0] != sizes[1]:
            raise LayerPruneError(
                f"Model and teacher have vocabularies of {sizes[0]} and {sizes[1]} tokens. Choose a "
                "teacher with the same tokenizer."
            )
        model, example = context.teacher, context.batches[0]["input_ids"]
        teacher = make_together(lambda: ChunkedLMHead(model, example))

    def refer(lm_head: ChunkedLMHead, batch: Batch) -> tuple[Any, torch.Tensor]:
        positions = Positions.of(targets_of(batch)[0])
        reference = positions, positions.select((teacher or lm_head).states(batch))
        if teacher is None:
            return reference, sum_by_unit(positions, torch.zeros_like(positions.rows))
        return reference, compare(lm_head, batch, reference)

    def compare(lm_head: ChunkedLMHead, batch: Batch, reference: Any) -> torch.Tensor:
        positions, expected = reference
        own = lm_head.rows(positions.select(lm_head.states(batch)))
        theirs = (teacher or lm_head).rows(expected)
        divergences = [_kl_at_positions(a, b) for a, b in zip(own, theirs, strict=True)]
        return sum_by_unit(positions, joined(divergences, positions))

    return CriterionResult.of(_read_without_each(context, refer, compare), quality=teacher is not None)


def hidden_mse(context: ScoringContext) -> CriterionResult:
    """Returns the squared error of the last hidden state without the layers, as the mean over tokens. It is
    relative to the square of the state, so that models can be compared."""

    places = _predicting_positions if predicts_next_token(context.model) else _without_padding

    def tokens(batch: Batch) -> torch.Tensor:
        return _count_by_unit(places(batch))

    def refer(lm_head: ChunkedLMHead, batch: Batch) -> tuple[Any, torch.Tensor]:
        positions = Positions.of(places(batch))
        own = positions.select(lm_head.states(batch)).float()
        return (positions, own), sum_by_unit(positions, torch.zeros_like(positions.rows))

    def compare(lm_head: ChunkedLMHead, batch: Batch, reference: Any) -> torch.Tensor:
        positions, own = reference
        error = (positions.select(lm_head.states(batch)).float() - own).square().sum(-1)
        return sum_by_unit(positions, error / own.square().sum(-1))

    example = context.batches[0]["input_ids"][:1]
    return CriterionResult.of(_leave_out(context, context.batches, Metric(tokens, refer, compare), example))


def taylor(context: ScoringContext) -> CriterionResult:
    """Returns a first-order estimate of the change of the loss without the weights of the layers: the sum of
    `|gradient x weight|`, with the gradient of the mean loss (Shortened LLaMA, 2402.02834, section 3.1)."""
    model, layers = context.model, context.stack.layers
    if is_sharded(model):
        raise LayerPruneError(
            "criterion='taylor' needs the gradients of whole weights, but the weights are sharded over "
            "processes. Score layers before the model is sharded, or choose criterion='loss'."
        )
    wanted = {i for layer in context.cuts for i in range(layer, layer + context.block)}
    parameters = {i: list(layers[i].parameters()) for i in sorted(wanted)}
    flat = [parameter for layer in parameters.values() for parameter in layer]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in flat]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in flat:
            parameter.requires_grad_(True)
        tokens = sum(run_together(lambda: _add_gradients(context, flat, gradients)))
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    sum_over_processes(gradients)
    if not tokens:
        raise LayerPruneError("No token of the calibration counts: all are masked or labelled -100.")
    sums = [
        (g / tokens * p.detach()).abs().sum(dtype=sum_dtype(g.device))
        for g, p in zip(gradients, flat, strict=True)
    ]
    importance = iter(torch.stack([one.to(model.device) for one in sums]).tolist())
    by_layer = {i: sum(next(importance) for _ in layer) for i, layer in parameters.items()}
    return CriterionResult(
        {layer: sum(by_layer[layer + i] for i in range(context.block)) for layer in context.cuts}
    )


def _add_gradients(
    context: ScoringContext, parameters: list[nn.Parameter], gradients: list[torch.Tensor]
) -> int:
    """Adds the gradients of the loss, summed over the tokens in the batches of this process. Returns the
    number of these tokens."""
    tokens = 0
    batches = context.batches[process_index() :: process_count()]
    for number, batch in enumerate(batches):
        with torch.enable_grad():
            mask, targets = targets_of(batch)
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = context.model(**inputs, use_cache=False).logits
            total = cross_entropy(logits[:, :-1][mask], targets[:, 1:][mask])
        tokens += int(mask.sum())
        batch_gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for gradient, batch_gradient in zip(gradients, batch_gradients, strict=True):
            if batch_gradient is not None:
                gradient += batch_gradient
        read = min(process_count(), len(context.batches) - number * process_count())
        context.bar.update(read * len(context.cuts))
    return tokens


def task(context: ScoringContext) -> CriterionResult:
    """Returns the decrease of a task's score without the layers. For several tasks, their mean is used. The
    quality is the score of the whole model (Iterative Layer-wise Distillation, 2511.05085, section 3).

    A layer gets no score if the task's score without it is not a finite number.
    """
    choices = [one for one in context.tasks if isinstance(one, MultipleChoice)]
    if len(choices) == len(context.tasks):
        return _score_answers(context, choices)

    def score() -> float:
        return sum(_as_number(one(context.model)) for one in context.tasks) / len(context.tasks)

    quality = context.journal.once(score)
    if not math.isfinite(quality):
        raise LayerPruneError(f"The task's score of the whole model is {quality}: not a finite number.")
    scores = {}
    for layer, cut in context.cuts.items():
        with cut:
            scores[layer] = quality - context.journal.once(score)
        context.bar.update()
    return CriterionResult({layer: fall for layer, fall in scores.items() if math.isfinite(fall)}, quality)


def _score_answers(context: ScoringContext, tasks: Sequence[MultipleChoice]) -> CriterionResult:
    """Scores layers by the share of right answers, with standard errors over questions and with racing."""
    batches = []
    for questions in tasks:
        lm_head = questions.lm_head(context.model)
        batches += [(batch, 1 / len(questions)) for batch in questions.batches(lm_head)]
    random.Random(0).shuffle(batches)
    context.bar.reset(len(batches) * len(context.cuts))

    def tokens(batch: tuple[Choices, float]) -> torch.Tensor:
        return torch.full((len(batch[0].answers),), batch[1], dtype=torch.float64)

    def refer(lm_head: ChunkedLMHead, batch: tuple[Choices, float]) -> tuple[Any, torch.Tensor]:
        return None, -right_answers(lm_head, batch[0]) * batch[1]

    def compare(lm_head: ChunkedLMHead, batch: tuple[Choices, float], reference: Any) -> torch.Tensor:
        return -right_answers(lm_head, batch[0]) * batch[1]

    example = tasks[0].example(context.model)
    return CriterionResult.of(
        _leave_out(context, batches, Metric(tokens, refer, compare), example), quality=True
    )


def positional(context: ScoringContext) -> CriterionResult:
    """Scores layers by position alone: a pattern of LayerChop (2305.14864, section 3), the deepest first
    (2411.15558), or a random order."""
    count = len(context.stack)
    if context.pattern == "random":
        generator = torch.Generator().manual_seed(context.seed)
        order = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        return CriterionResult({layer: order[layer] for layer in context.cuts})
    middle = (context.block - 1) / 2
    place = PATTERNS[context.pattern]
    return CriterionResult({layer: float(place(layer + middle, count)) for layer in context.cuts})


CRITERIA: dict[str, Criterion] = {
    "block_influence": Criterion(block_influence, "Block Influence"),
    "angular": Criterion(angular, "angular distance of the last token\n(multiples of pi)"),
    "loss": Criterion(
        loss,
        "loss increase without the layer\n(nats per token)",
        leave_one_out=True,
        needs_next_token=True,
        measures_quality=True,
    ),
    "kl": Criterion(
        kl,
        "KL divergence without the layer\n(nats per token)",
        leave_one_out=True,
        needs_next_token=True,
        takes_teacher=True,
    ),
    "hidden_mse": Criterion(
        hidden_mse, "relative error of the last\nhidden state without the layer", leave_one_out=True
    ),
    "taylor": Criterion(taylor, "sum of |gradient x weight|", needs_next_token=True),
    "task": Criterion(task, "task score decrease\nwithout the layer", needs_task=True, measures_quality=True),
    "positional": Criterion(positional, "rank in the pattern", reads_text=False),
}


def find_criterion(name: str) -> Criterion:
    """Returns the criterion of this name.

    Raises:
        LayerPruneError: there is no such criterion.
    """
    if name not in CRITERIA:
        raise LayerPruneError(f"There is no criterion {name!r}. {choose_from(str(name), CRITERIA)}.")
    return CRITERIA[name]


def _kl_at_positions(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Returns the KL divergence at each position, `(positions,)`."""
    own, theirs = (scaled_logits(one).log_softmax(-1) for one in (logits, expected))
    return F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1)


def _count_tokens(batch: Batch) -> torch.Tensor:
    """Returns the number of counted tokens in each unit, `(units,)`."""
    return _count_by_unit(targets_of(batch)[0])


def _count_by_unit(mask: torch.Tensor) -> torch.Tensor:
    """Returns the number of positions in each unit that are true in a mask."""
    positions = Positions.of(mask)
    return sum_by_unit(positions, torch.ones_like(positions.rows))


def _predicting_positions(batch: Batch) -> torch.Tensor:
    """Returns a mask `(batch, length - 1)` of the positions whose next token is counted."""
    return targets_of(batch)[0]


def _without_padding(batch: Batch) -> torch.Tensor:
    """Returns a mask `(batch, length)` of the positions that are not padding."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _read_without_each(context: ScoringContext, refer: Any, compare: Any) -> PerUnitScores:
    """Evaluates a metric on the calibration text without each candidate."""
    example = context.batches[0]["input_ids"][:1]
    return _leave_out(context, context.batches, Metric(_count_tokens, refer, compare), example)


def _leave_out(
    context: ScoringContext, batches: Sequence[Any], metric: Metric, example: torch.Tensor
) -> PerUnitScores:
    return leave_out(
        context.stack,
        batches,
        metric,
        example,
        context.cuts,
        context.racing,
        context.bar.update,
        context.journal,
        context.prefix_cache,
    )


def _compare_states(
    context: ScoringContext,
    distance: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    tokens: Callable[[torch.Tensor], torch.Tensor],
) -> CriterionResult:
    """Compares the raw hidden states before and after each candidate, in one forward pass."""
    per_unit = PerUnitScores(without={layer: [] for layer in context.cuts})
    ends = {end for layer in context.cuts for end in (layer, layer + context.block - 1)}
    lm_head = make_together(lambda: ChunkedLMHead(context.model, context.batches[0]["input_ids"]))

    def read(number: int, batch: Batch) -> list[list[float]]:
        """Returns the number of counted tokens in each unit, and the distances of each candidate."""
        with captured(context.stack, ends) as states:
            lm_head.states(batch)
        check_all_ran(states, ends)
        real = _without_padding(batch)
        rows = [tokens(real)]
        for layer in context.cuts:
            before = _by_position(states[layer][0], real)
            after = _by_position(hidden(states[layer + context.block - 1][1]), real)
            rows.append(distance(before, after, real))
            context.bar.update(min(process_count(), len(context.batches) - number))
        return torch.stack([row.float() for row in rows]).tolist()

    for counts, *distances in read_all(context.batches, read, is_sharded(context.model)):
        per_unit.tokens += counts
        per_unit.whole += [0.0] * len(counts)
        for sums, values in zip(per_unit.without.values(), distances, strict=True):
            sums += values
    return CriterionResult.of(per_unit)


def _by_position(state: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Returns hidden states as `(batch, length, ...)`. The states of some models have several streams."""
    if state.dim() == 4 and state.shape[1:3] == real.shape:  # Gemma 3n has the streams in the first dimension
        state = state.movedim(0, 2)
    if state.shape[:2] != real.shape:
        raise LayerPruneError(
            f"Layers of this model pass on states of shape {tuple(state.shape)} for tokens of shape "
            f"{tuple(real.shape)}, which this criterion cannot read: use criterion='loss', or 'positional' "
            "if the model has no language-model head."
        )
    return state


def _as_number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise LayerPruneError(f"The task's score is {score!r}: it must be a number.") from error
