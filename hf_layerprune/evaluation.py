"""What a model can do, before and after."""

import math
import statistics
import time
from collections.abc import Iterable

from transformers import PreTrainedModel

from .criteria import unit_losses
from .data import Batch
from .errors import LayerPruneError
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
