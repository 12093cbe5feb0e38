"""What a model can do, before and after."""

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from .criteria import next_token_metric, unit_losses
from .data import Batch
from .errors import LayerPruneError
from .multiple_choice import Answer
from .reading import Reader, targets_of
from .scoring import undisturbed


def evaluate_text(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Perplexity of `model` on text, and its speed reading it.

    Args:
        model (`PreTrainedModel`): a causal language model; it is not changed.
        batches (iterable of dict): `input_ids` `(batch, length)`, where needed `attention_mask`, `labels`.

    Returns:
        `dict[str, float]`: `perplexity`, `loss` (nats per token, mean over all tokens), `tokens` (that
        were predicted), `tokens_per_second` (read by a forward pass with its loss, median of
            the batches, since the first is slow).

    Raises:
        LayerPruneError: there is no token to predict.
    """
    total, tokens, speeds = 0.0, 0, []
    reader: Reader | None = None
    with undisturbed(model):
        for batch in batches:
            on_device = {name: value.to(model.device) for name, value in batch.items()}
            began = time.perf_counter()
            reader = reader or Reader(model, on_device["input_ids"])
            loss, count = float(unit_losses(reader, on_device).sum()), int(targets_of(on_device)[0].sum())
            speeds.append(batch["input_ids"].numel() / (time.perf_counter() - began))
            total, tokens = total + loss, tokens + count
    if not tokens:
        raise LayerPruneError("There is no token to predict in the evaluation text.")
    return {
        "perplexity": math.exp(min(total / tokens, 700.0)),
        "loss": total / tokens,
        "tokens": tokens,
        "tokens_per_second": statistics.median(speeds),
    }


def stability(original: Sequence[Answer], pruned: Sequence[Answer]) -> dict[str, float]:
    """How far a pruned model answers as the original does (LLM-Streamline, 2403.19135, section 3.4).

    The questions on which both are right, or both wrong, count by a softmax over the questions of how far
    the original model's perplexities of the choices spread (their standard deviation). The released code
    sums the first weights instead of those of the questions that match, and differs where these do.

    Args:
        original, pruned (sequence of [`Answer`]): of the same questions, from [`MultipleChoice.read`].

    Returns:
        `dict[str, float]`: `stability`, from 0 to 1, and its `standard_error` over questions.

    Raises:
        LayerPruneError: not of the same questions, or a perplexity that is not a number.
    """
    sizes = [[len(answer.perplexities) for answer in answers] for answers in (original, pruned)]
    if sizes[0] != sizes[1] or not original:
        raise LayerPruneError("Stability compares answers to the same questions, and at least one.")
    with np.errstate(over="ignore", invalid="ignore"):
        spread = np.array([np.std(answer.perplexities) for answer in original])
    if not np.isfinite(spread).all():
        raise LayerPruneError("The original model's perplexity of a choice is not a finite number.")
    weights = np.exp(spread - spread.max())
    weights /= weights.sum()
    same = np.array([one.right == two.right for one, two in zip(original, pruned, strict=True)], float)
    found = float(weights @ same)
    return {"stability": found, "standard_error": float(np.sqrt((weights**2) @ (same - found) ** 2))}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; that of one value is not known (NaN)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def measure_quality(model: PreTrainedModel, batches: Sequence[Batch], task: Any = None) -> float:
    """How good `model` is, higher is better: its score in a task or the mean of several, without any minus
    its loss in nats per token.

    Args:
        model (`PreTrainedModel`): a causal language model; it is not changed.
        batches (sequence of dict): the calibration data.
        task (*optional*): as for [`score_layers`].
    """
    if task is None:
        return -evaluate_text(model, batches)["loss"]
    tasks = list(task) if isinstance(task, (list, tuple)) else [task]
    here = [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]
    scores = [next_token_metric(one, here) if hasattr(one, "compute") else one for one in tasks]
    with undisturbed(model):
        return sum(float(score(model)) for score in scores) / len(scores)
