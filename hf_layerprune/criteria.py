"""How much a decoder layer matters: one function for each published criterion.

Each takes a model (prepared by [`~hf_layerprune.score_layers`]: eval mode, no gradients), batches, the
candidate layers, each with the context in which the model lacks it, and a function to call when one
candidate was scored on one batch. Each returns the
quality of the model as it is (higher is better; None if the criterion measures none) and a score for
each candidate (higher matters more).
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .data import Batch
from .decoder import find_decoder
from .errors import LayerPruneError
from .losses import LAST, cross_entropy, token_mask
from .surgery import without_layers


logger = logging.getLogger(__name__)

Cuts = Mapping[int, without_layers]
Scores = tuple[float | None, dict[int, float]]
Tick = Callable[[], None]
Task = Callable[[PreTrainedModel], float]


def block_influence(model: PreTrainedModel, batches: Sequence[Batch], candidates: Cuts, tick: Tick) -> Scores:
    """Block Influence (ShortGPT, 2403.03853, equation 1): `1 - E[cos(x_i, x_{i+1})]` over tokens.

    x_i and x_{i+1} are the raw states before and after layer i. One forward pass scores all layers.
    """
    sums = dict.fromkeys(candidates, 0.0)
    tokens = 0
    for batch in batches:
        with captured(model, candidates) as states:
            _forward(model, batch)
        _check_all_ran(states, candidates)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        tokens += int(real.sum())
        for layer in candidates:
            before, after = (_tokens_of(hidden(state), real) for state in states[layer])
            sums[layer] += float((1 - F.cosine_similarity(before, after, dim=-1)).double().sum())
            tick()
    return None, {layer: total / _some(tokens) for layer, total in sums.items()}


def loss(model: PreTrainedModel, batches: Sequence[Batch], candidates: Cuts, tick: Tick) -> Scores:
    """Rise of the language-model loss (nats per token) without the layer (SLEB, 2402.09025; Shortened
    LLaMA, 2402.02834). The quality is minus the loss.

    The states before the missing layer are those of the whole model, so each candidate only computes
    what comes after it: the same numbers as one full pass each, to the bit, in about half the time. Where
    layers hand on more than their outputs (Gemma's shared keys and values), each gets its full pass.
    """
    replay = _can_replay(model, batches[0]["input_ids"][:1, :8], max(candidates))
    if not replay:
        logger.info("Layers of this model hand on more than their outputs: each score takes a full pass.")
    dense, tokens = 0.0, 0
    sums = dict.fromkeys(candidates, 0.0)
    for batch in batches:
        with captured(model, range(max(candidates) + 1)) as states:
            total, count = batch_loss(model, batch)
        _check_all_ran(states, range(max(candidates) + 1))
        outputs = [states[layer][1] for layer in sorted(states)]
        dense, tokens = dense + total, tokens + count
        for layer in candidates:
            with candidates[layer], _replayed(model, outputs[: layer if replay else 0]):
                sums[layer] += batch_loss(model, batch)[0]
            tick()
    tokens = _some(tokens)
    return -dense / tokens, {layer: (total - dense) / tokens for layer, total in sums.items()}


def task(model: PreTrainedModel, score: Task, candidates: Cuts, tick: Tick) -> Scores:
    """Fall of a task's score without the layer (Iterative Layer-wise Distillation, 2511.05085,
    section 3). The quality is the score itself."""
    quality = _number(score(model))
    scores = {}
    for layer in candidates:
        with candidates[layer]:
            scores[layer] = quality - _number(score(model))
        tick()
    return quality, scores


def next_token_metric(metric: Any, batches: Sequence[Batch]) -> Task:
    """A task from an `evaluate` metric: predicted against true next tokens over `batches`.

    Args:
        metric (`evaluate.EvaluationModule`): anything whose `compute(predictions=, references=)`
            returns a dict of numbers, of which the first is taken.
        batches (sequence of dict): each with `input_ids` `(batch, length)`.
    """

    def score(model: PreTrainedModel) -> float:
        predictions: list[int] = []
        references: list[int] = []
        for batch in batches:
            mask, tokens = _targets(batch)
            best = _forward(model, batch).logits[:, :-1].argmax(-1)
            predictions += best[mask].tolist()
            references += tokens[:, 1:][mask].tolist()
        result: Mapping[str, float] = metric.compute(predictions=predictions, references=references)
        return next(iter(result.values()))

    return score


def batch_loss(model: PreTrainedModel, batch: Batch) -> tuple[float, int]:
    """The summed next-token loss of one batch, in nats, and over how many tokens."""
    mask, tokens = _targets(batch)
    return float(cross_entropy(_forward(model, batch).logits, tokens, mask)), int(mask.sum())


@contextmanager
def captured(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, tuple[Any, Any]]]:
    """Within this context a forward pass of `model` fills the dict with each layer's first input, the
    state `(batch, length, hidden)` before it, and its output as it came (see [`hidden`]).
    [`~hf_layerprune.losses.LAST`] stands for the output head, whose input is the last hidden state."""
    states: dict[int, tuple[Any, Any]] = {}
    stack = find_decoder(model).layers

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            states[layer] = (args[0] if args else kwargs["hidden_states"]), output

        return hook

    with ExitStack() as hooks:
        for layer in layers:
            module = model.get_output_embeddings() if layer == LAST else stack[layer]
            handle = module.register_forward_hook(keep(layer), with_kwargs=True)
            hooks.callback(handle.remove)
        yield states


def hidden(output: Any) -> torch.Tensor:
    """The hidden state in what a decoder layer returned: itself, or the first of several things."""
    return output[0] if isinstance(output, (tuple, list)) else output


CRITERIA: dict[str, Callable[..., Scores]] = {
    "block_influence": block_influence,
    "loss": loss,
    "task": task,
}


@contextmanager
def _replayed(model: PreTrainedModel, outputs: Sequence[Any]) -> Iterator[None]:
    """Within this context the first layers compute nothing: they return these outputs again."""

    def patch(module: nn.Module, output: Any) -> Callable[[], None]:
        had = vars(module).get("forward")
        vars(module)["forward"] = lambda *args, **kwargs: output

        def unpatch() -> None:
            del vars(module)["forward"]
            if had is not None:
                vars(module)["forward"] = had

        return unpatch

    with ExitStack() as patches:
        for module, output in zip(find_decoder(model).layers, outputs, strict=False):
            patches.callback(patch(module, output))
        yield


def _tokens_of(state: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The states of real tokens, where a layer may pass on several streams of them."""
    if state.dim() == 4 and state.shape[1:3] == real.shape:  # Gemma 3n has its streams in front
        state = state.movedim(0, 2)
    if state.shape[:2] != real.shape:
        raise LayerPruneError(
            f"Layers of this model pass on states of shape {tuple(state.shape)} for tokens of shape "
            f"{tuple(real.shape)}, which block_influence cannot read: use criterion='loss'."
        )
    return state[real].float()


def _can_replay(model: PreTrainedModel, input_ids: torch.Tensor, deepest: int) -> bool:
    """Whether layers that only return what they returned before leave the logits as they are to the bit,
    however many of the first `deepest` they are."""
    with captured(model, range(deepest)) as states:
        expected = model(input_ids=input_ids, use_cache=False).logits
    _check_all_ran(states, range(deepest))
    outputs = [states[layer][1] for layer in range(deepest)]
    for count in range(1, deepest + 1):
        with _replayed(model, outputs[:count]):
            try:
                found = model(input_ids=input_ids, use_cache=False).logits
            except Exception:  # a layer missed what an earlier one should have left for it
                return False
        if not torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True):
            return False
    return True


def _check_all_ran(states: Collection[int], layers: Iterable[int]) -> None:
    idle = [layer for layer in layers if layer not in states]
    if idle:
        raise LayerPruneError(
            f"Layers {idle} did not run on the calibration data (they may look at pictures), so it says "
            "nothing of them: this model cannot be scored with text."
        )


def _some(tokens: int) -> int:
    if not tokens:
        raise LayerPruneError("No token of the calibration counts: all are masked or labelled -100.")
    return tokens


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise LayerPruneError(f"The task's score is {score!r}: it must be a number.") from error


def _forward(model: PreTrainedModel, batch: Batch) -> Any:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return model(**inputs, use_cache=False)


def _targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    labels = batch.get("labels")
    mask = token_mask(batch["input_ids"], labels, batch.get("attention_mask"))
    return mask, batch["input_ids"] if labels is None else labels
