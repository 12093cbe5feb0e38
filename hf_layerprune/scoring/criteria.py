"""How much a decoder layer matters, or a run of layers: one function for each published criterion.

Each takes a [`Request`] and returns what it [`Found`]: higher matters more.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import Batch, targets_of
from ..errors import LayerPruneError
from ..evaluation.evaluate import Task
from ..evaluation.multiple_choice import Choices, MultipleChoice, right_answers
from ..forward.hooks import captured, check_all_ran, hidden
from ..forward.lm_head import Reader, unit_losses
from ..forward.token_losses import _by_unit, _joined, cross_entropy, scaled_logits
from ..surgery.decoder import find_decoder, predicts_next_token, text_config
from .journal import Journal
from .leave_one_out import Cuts, Measure, Prefixes, Values, leave_out


# Orders in which layers go by their place alone (LayerChop, 2305.14864, section 3, and 2411.15558).
PATTERNS: dict[str, Callable[[float, int], float]] = {
    "output": lambda layer, count: count - layer,  # the deepest first
    "input": lambda layer, count: layer,
    "middle": lambda layer, count: abs(layer - (count - 1) / 2),
    "both": lambda layer, count: min(layer, count - 1 - layer),  # from both ends inwards
}


@dataclass(frozen=True)
class Request:
    """What a criterion is to look at.

    Args:
        model (`PreTrainedModel`): in eval mode, without gradients.
        batches (sequence of dict): calibration, each `input_ids` `(batch, length)` and so on.
        cuts (`Mapping`): for each candidate, by its first layer, the context in which the model lacks it.
        run (`int`): how many layers a candidate is.
        bar (`tqdm`): moves on by 1 after each candidate and batch.
        journal ([`Journal`]): where results go that need not be computed again.
        racing (`float` or `None`): the confidence with which candidates may be dropped early.
        tasks (sequence of `Callable`): for `task`.
        teacher (`PreTrainedModel` or `None`): for `kl`, the model to compare with; None for the model itself.
        pattern (`str`): for `positional`.
        seed (`int`): for `positional` at random.
        prefixes ([`Prefixes`] or `None`): of an earlier round, for leave-one-out.
    """

    model: PreTrainedModel
    batches: Sequence[Batch]
    cuts: Cuts
    run: int
    bar: tqdm
    journal: Journal
    racing: float | None = None
    tasks: Sequence[Task] = ()
    teacher: PreTrainedModel | None = None
    pattern: str = "output"
    seed: int = 0
    prefixes: Prefixes | None = None


@dataclass(frozen=True)
class Found:
    """What a criterion found.

    Args:
        scores (`dict[int, float]`): for each candidate, by its first layer; higher matters more.
        quality (`float` or `None`): of the model as it is, higher is better; None if none is measured.
        errors (`dict[int, float]`): standard errors of the scores over units, where there are any.
        seen (`dict[int, int]`): how many units of text each candidate was scored with.
    """

    scores: dict[int, float]
    quality: float | None = None
    errors: dict[int, float] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Values, quality: bool = False) -> "Found":
        """The scores of what was measured unit by unit."""
        errors = {layer: values.error(layer) for layer in values.without}
        return cls(
            scores={layer: values.score(layer) for layer in values.without},
            quality=values.quality() if quality else None,
            errors={layer: error for layer, error in errors.items() if error is not None},
            seen={layer: len(sums) for layer, sums in values.without.items()},
        )


def block_influence(request: Request) -> Found:
    """Block Influence (ShortGPT, 2403.03853, equation 1): `1 - E[cos(x_i, x_{i+n})]` over tokens, for a run
    of n layers as in LLM-Streamline (2403.19135, section 3.1).

    The states are the raw ones before and after the layers, also at the end of the stack. One forward pass
    scores all candidates.
    """

    def distance(before: torch.Tensor, after: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
        cosine = cosine.flatten(2).mean(-1) if cosine.dim() > 2 else cosine
        return torch.where(real, 1 - cosine, 0.0).sum(1)

    return _between(request, distance, lambda real: real.sum(1))


def angular(request: Request) -> Found:
    """Angular distance of the last token (Gromov et al., 2403.17887, equation 8): `arccos(cos(x_l, x_{l+n}))
    / pi`, mean over sequences. One forward pass scores all candidates."""

    def distance(before: torch.Tensor, after: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        places = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, places, -1).amax(1)
        rows = torch.arange(len(real), device=real.device)
        cosine = F.cosine_similarity(before[rows, last].float(), after[rows, last].float(), dim=-1)
        cosine = cosine.flatten(1).mean(-1) if cosine.dim() > 1 else cosine
        angles = cosine.clamp(-1, 1).arccos() / torch.pi
        return torch.where(last >= 0, angles, 0.0)

    return _between(request, distance, lambda real: real.any(1))


def loss(request: Request) -> Found:
    """Rise of the language-model loss (nats per token) without the layers (SLEB, 2402.09025; Shortened
    LLaMA, 2402.02834). The quality is minus the loss."""

    def refer(reader: Reader, batch: Batch) -> tuple[Any, torch.Tensor]:
        return None, unit_losses(reader, batch)

    def compare(reader: Reader, batch: Batch, reference: Any) -> torch.Tensor:
        return unit_losses(reader, batch)

    return Found.of(_read(request, refer, compare), quality=True)


def kl(request: Request) -> Found:
    """KL divergence (nats per token) of the output without the layers from that of the teacher, or of the
    model as it is. With a teacher, its rise; the quality is then minus the divergence of the model."""
    teacher = None
    if request.teacher is not None:
        sizes = [text_config(model.config).vocab_size for model in (request.model, request.teacher)]
        if sizes[0] != sizes[1]:
            raise LayerPruneError(f"Model and teacher have vocabularies of {sizes[0]} and {sizes[1]} tokens.")
        teacher = Reader(request.teacher, request.batches[0]["input_ids"])

    def refer(reader: Reader, batch: Batch) -> tuple[Any, torch.Tensor]:
        reference = (teacher or reader).states(batch)
        if teacher is None:
            return reference, torch.zeros_like(_tokens(batch), dtype=torch.float64)
        return reference, compare(reader, batch, reference)

    def compare(reader: Reader, batch: Batch, reference: Any) -> torch.Tensor:
        mask, _ = targets_of(batch)
        own = reader.rows(reader.states(batch)[:, :-1][mask])
        theirs = (teacher or reader).rows(reference[:, :-1][mask])
        found = [_divergence(a, b) for a, b in zip(own, theirs, strict=True)]
        return _by_unit(mask, _joined(found, mask))

    return Found.of(_read(request, refer, compare), quality=teacher is not None)


def hidden_mse(request: Request) -> Found:
    """Squared error of the last hidden state without the layers, relative to its own square (so that models
    compare), mean over tokens."""

    places = _predicting if predicts_next_token(request.model) else _real

    def tokens(batch: Batch) -> torch.Tensor:
        mask = places(batch)
        return _by_unit(mask, torch.ones(int(mask.sum()), dtype=torch.float64, device=mask.device))

    def refer(reader: Reader, batch: Batch) -> tuple[Any, torch.Tensor]:
        return reader.states(batch), torch.zeros_like(tokens(batch), dtype=torch.float64)

    def compare(reader: Reader, batch: Batch, reference: Any) -> torch.Tensor:
        mask = places(batch)
        length = mask.shape[1]
        own = reference[:, :length][mask].float()
        error = (reader.states(batch)[:, :length][mask].float() - own).square().sum(-1)
        return _by_unit(mask, (error / own.square().sum(-1)).double())

    example = request.batches[0]["input_ids"][:1]
    return Found.of(_leave_out(request, request.batches, Measure(tokens, refer, compare), example))


def taylor(request: Request) -> Found:
    """First-order estimate of the change of the loss without the layers' weights: the sum of `|gradient x
    weight|` over them, the gradient that of the mean loss (Shortened LLaMA, 2402.02834, section 3.1)."""
    model, stack = request.model, find_decoder(request.model).layers
    wanted = {i for layer in request.cuts for i in range(layer, layer + request.run)}
    parameters = {i: list(stack[i].parameters()) for i in sorted(wanted)}
    flat = [parameter for layer in parameters.values() for parameter in layer]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in flat]
    tokens = 0
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in flat:
            parameter.requires_grad_(True)
        for batch in request.batches:
            with torch.enable_grad():
                mask, targets = targets_of(batch)
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                logits = model(**inputs, use_cache=False).logits
                total = cross_entropy(logits[:, :-1][mask], targets[:, 1:][mask])
            tokens += int(mask.sum())
            found = torch.autograd.grad(total, flat, allow_unused=True)
            for gradient, more in zip(gradients, found, strict=True):
                if more is not None:
                    gradient += more
            for _ in request.cuts:
                request.bar.update()
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    if not tokens:
        raise LayerPruneError("No token of the calibration counts: all are masked or labelled -100.")
    importance = iter(
        (g / tokens * p.detach()).abs().double().sum().item() for g, p in zip(gradients, flat, strict=True)
    )
    by_layer = {i: sum(next(importance) for _ in layer) for i, layer in parameters.items()}
    return Found({layer: sum(by_layer[layer + i] for i in range(request.run)) for layer in request.cuts})


def task(request: Request) -> Found:
    """Fall of a task's score, or of the mean over several, without the layers (Iterative Layer-wise
    Distillation, 2511.05085, section 3). The quality is the score itself.

    A layer without which the score is not a number is infinitely important.
    """
    choices = [one for one in request.tasks if isinstance(one, MultipleChoice)]
    if len(choices) == len(request.tasks):
        return _answers(request, choices)

    def score() -> float:
        return sum(_number(one(request.model)) for one in request.tasks) / len(request.tasks)

    quality = request.journal.once(score)
    if not math.isfinite(quality):
        raise LayerPruneError(f"The task's score of the whole model is {quality}: not a finite number.")
    scores = {}
    for layer, cut in request.cuts.items():
        with cut:
            scores[layer] = quality - request.journal.once(score)
        request.bar.update()
    return Found({layer: fall for layer, fall in scores.items() if math.isfinite(fall)}, quality)


def _answers(request: Request, tasks: Sequence[MultipleChoice]) -> Found:
    """The fall of the mean share of right answers: with standard errors over questions, and with racing."""
    batches = []
    for one in tasks:
        reader = Reader(request.model, one.example(request.model))
        batches += [(batch, 1 / len(one)) for batch in one.batches(reader)]
    random.Random(0).shuffle(batches)
    request.bar.reset(len(batches) * len(request.cuts))

    def tokens(batch: tuple[Choices, float]) -> torch.Tensor:
        return torch.full((len(batch[0].answers),), batch[1], dtype=torch.float64)

    def refer(reader: Reader, batch: tuple[Choices, float]) -> tuple[Any, torch.Tensor]:
        return None, -right_answers(reader, batch[0]) * batch[1]

    def compare(reader: Reader, batch: tuple[Choices, float], reference: Any) -> torch.Tensor:
        return -right_answers(reader, batch[0]) * batch[1]

    example = tasks[0].example(request.model)
    return Found.of(_leave_out(request, batches, Measure(tokens, refer, compare), example), quality=True)


def positional(request: Request) -> Found:
    """A layer's place alone: by one of LayerChop's patterns (2305.14864, section 3), the deepest first
    (2411.15558), or at random."""
    count = len(find_decoder(request.model).layers)
    if request.pattern == "random":
        generator = torch.Generator().manual_seed(request.seed)
        order = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        return Found({layer: order[layer] for layer in request.cuts})
    middle = (request.run - 1) / 2
    place = PATTERNS[request.pattern]
    return Found({layer: float(place(layer + middle, count)) for layer in request.cuts})


CRITERIA: dict[str, Callable[[Request], Found]] = {
    "block_influence": block_influence,
    "angular": angular,
    "loss": loss,
    "kl": kl,
    "hidden_mse": hidden_mse,
    "taylor": taylor,
    "task": task,
    "positional": positional,
}


def _divergence(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL divergence at each position, `(positions,)`, float64."""
    own, theirs = (scaled_logits(one).log_softmax(-1) for one in (logits, expected))
    return F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1).double()


def _tokens(batch: Batch) -> torch.Tensor:
    """How many tokens of each unit count, `(units,)`."""
    mask, _ = targets_of(batch)
    return _by_unit(mask, torch.ones(int(mask.sum()), dtype=torch.float64, device=mask.device))


def _predicting(batch: Batch) -> torch.Tensor:
    """The positions `(batch, length - 1)` that predict a token that counts."""
    return targets_of(batch)[0]


def _real(batch: Batch) -> torch.Tensor:
    """The positions `(batch, length)` that are no padding."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _read(request: Request, refer: Any, compare: Any) -> Values:
    """Leave out each candidate in reading the calibration text."""
    example = request.batches[0]["input_ids"][:1]
    return _leave_out(request, request.batches, Measure(_tokens, refer, compare), example)


def _leave_out(request: Request, batches: Sequence[Any], measure: Measure, example: torch.Tensor) -> Values:
    return leave_out(
        request.model,
        batches,
        measure,
        example,
        request.cuts,
        request.racing,
        request.bar.update,
        request.journal,
        request.prefixes,
    )


def _between(
    request: Request,
    distance: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    tokens: Callable[[torch.Tensor], torch.Tensor],
) -> Found:
    """Compare the raw states before and after each candidate, in one forward pass for all."""
    values = Values(without={layer: [] for layer in request.cuts})
    ends = {end for layer in request.cuts for end in (layer, layer + request.run - 1)}
    reader = Reader(request.model, request.batches[0]["input_ids"])
    for batch in request.batches:
        with captured(request.model, ends) as states:
            reader.states(batch)
        check_all_ran(states, ends)
        real = _real(batch)
        counts = tokens(real).double().tolist()
        values.tokens += counts
        values.whole += [0.0] * len(counts)
        for layer, sums in values.without.items():
            before = _states(states[layer][0], real)
            after = _states(hidden(states[layer + request.run - 1][1]), real)
            sums += distance(before, after, real).double().tolist()
            request.bar.update()
    return Found.of(values)


def _states(state: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """States as `(batch, length, ...)`, where a layer may pass on several streams of them."""
    if state.dim() == 4 and state.shape[1:3] == real.shape:  # Gemma 3n has its streams in front
        state = state.movedim(0, 2)
    if state.shape[:2] != real.shape:
        raise LayerPruneError(
            f"Layers of this model pass on states of shape {tuple(state.shape)} for tokens of shape "
            f"{tuple(real.shape)}, which this criterion cannot read: use criterion='loss', or 'positional' "
            "if the model has no language-model head."
        )
    return state


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise LayerPruneError(f"The task's score is {score!r}: it must be a number.") from error
