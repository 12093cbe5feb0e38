"""Evaluates a model on perplexity, copy accuracy, speed and tasks."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batches import has_pictures, make_batches, model_columns, regroup_batches
from ..data.processes import check_same_batches, process_count, read_all
from ..data.sequences import context_length
from ..data.targets import Batch, check_token_labels, targets_of
from ..data.texts import tokenizer_of
from ..errors import LayerPruneError
from ..forward.hooks import undisturbed
from ..forward.lm_head import ChunkedLMHead, unit_losses
from ..forward.memory import tokens_per_pass
from ..surgery.decoder import check_next_token, check_not_tensor_parallel, is_sharded
from ..surgery.lineage import get_lineage
from ..surgery.peft import base_of
from .comparison import mean_and_error, task_scores
from .multiple_choice import MultipleChoice, Question
from .tasks import TASKS, chance


Task = Callable[[PreTrainedModel], float]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Any,
    questions: Mapping[str, Sequence[Question]] | None = None,
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Returns the size, perplexity, copy accuracy, speed and task scores of a model, without changing it.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`): the model's tokenizer or processor.
        batches: `input_ids` `(batch, length)` of whole passages, or another form that [`evaluate_text`]
            reads. If `batches` is empty, only the tasks are measured. For rows with pictures, only the
            perplexity is measured on them.
        questions (mapping of `str` to sequence of [`Question`], *optional*): the questions of each task, by
            its name in `TASKS`.
        batch_tokens (`int`, *optional*): tokens in a forward pass, see [`evaluate_text`] and
            [`MultipleChoice`].

    Returns:
        `dict[str, Any]`: the size of the model, and the results of [`evaluate_text`], [`copying`] (on 32
        rows), [`generation_speed`] and [`task_scores`].

    Raises:
        LayerPruneError: a question is too long, or a text is too short to copy. Both are checked first.
    """
    text_tokenizer = tokenizer_of(tokenizer)
    tasks = {
        name: MultipleChoice(
            asked, text_tokenizer, normalize=TASKS[name].normalize, batch_tokens=batch_tokens
        )
        for name, asked in (questions or {}).items()
    }
    for task in tasks.values():
        task.check_length(model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not isinstance(batches, (list, tuple)) or batches:
        batches = _as_batches(model, batches, tokenizer)
    on_text = bool(batches) and not any(map(has_pictures, batches))
    copied = copying(model, batches[: 1 + 31 // len(batches[0]["input_ids"])]) if on_text else None
    found: dict[str, Any] = {
        "layers": len(get_lineage(model).kept),
        "parameters": model.num_parameters(),
        "weights_mb": round(model.get_memory_footprint() / 2**20, 1),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if batches:
        found |= evaluate_text(model, batches, tokenizer, batch_tokens)
    if copied is not None:
        found |= {"generated_per_second": generation_speed(model, batches[0]), "copying": copied}
    if torch.cuda.is_available():
        found["peak_memory_mb"] = torch.cuda.max_memory_allocated() // 2**20
    if questions:
        with undisturbed(model):
            answers = {name: task.read(model) for name, task in tasks.items()}
        right = {name: [one.right for one in given] for name, given in answers.items()}
        found |= task_scores(right, {name: chance(asked) for name, asked in questions.items()})
        for name, given in answers.items():
            found["tasks"][name]["perplexities"] = [one.perplexities for one in given]
    return found


def evaluate_text(
    model: PreTrainedModel,
    batches: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Returns the perplexity of `model` on text, and its prefill speed.

    In a distributed run, all processes must call this function with the same model and batches. Each process
    reads a part of the batches, and all processes return the same result.

    Args:
        model (`PreTrainedModel`): a causal language model. It is not changed.
        batches: `input_ids` `(batch, length)`, and if needed `attention_mask` and `labels`. Other forms that
            [`make_batches`] reads are accepted too, such as a data set, a tensor, a list of texts, or chats.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's tokenizer, or its processor for rows
            with pictures. Needed for text, and for bits per byte, which compare models with different
            tokenizers.
        batch_tokens (`int`, *optional*): tokens in a forward pass. Default: on a GPU as many as fit into half
            of its free memory, at most 32,768; on other devices the given batches are not changed.

    Returns:
        `dict[str, Any]`:
            - `perplexity`
            - `loss`: nats per token, mean over all tokens
            - `tokens`: number of predicted tokens
            - `tokens_per_second`: tokens read in forward passes with loss, median over the batches
            - `precision`: dtype of the logits, such as "bfloat16", autocast included
            - `bits_per_byte`: only with a tokenizer, over the predicted tokens as UTF-8. End-of-text tokens
              have a loss but no bytes.

    Raises:
        LayerPruneError: no token has a label.
    """
    check_next_token(base_of(model), "evaluate_text")
    check_not_tensor_parallel(base_of(model))
    batches, tokenizer = _as_batches(model, batches, tokenizer), tokenizer_of(tokenizer)
    most = tokens_per_pass(model, batch_tokens)
    if most is not None:
        total = sum(batch["input_ids"].numel() for batch in batches)
        batches = regroup_batches(batches, min(most, -(-total // process_count())))
    lm_head: ChunkedLMHead | None = None

    def read(number: int, batch: Batch) -> tuple[float, int, int, float]:
        """Returns the summed loss, the number of predicted tokens, their bytes, and the tokens per second."""
        nonlocal lm_head
        on_device = {name: value.to(model.device) for name, value in batch.items()}
        lm_head = lm_head or ChunkedLMHead(model, on_device["input_ids"])
        began = time.perf_counter()
        mask, targets = targets_of(on_device)
        loss, count = float(unit_losses(lm_head, on_device).sum()), int(mask.sum())
        speed = batch["input_ids"].numel() / (time.perf_counter() - began)
        size = 0
        if tokenizer is not None:
            rows = (row[wanted].tolist() for row, wanted in zip(targets[:, 1:], mask, strict=True))
            texts = (str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows)
            size = sum(len(text.encode()) for text in texts)
        return loss, count, size, speed

    with undisturbed(model), output_dtypes(model) as dtypes:
        results = list(read_all(batches, read, is_sharded(model)))
    total, tokens, size = (sum(result[i] for result in results) for i in range(3))
    speeds = [speed for *_, speed in results]
    if not tokens:
        raise LayerPruneError(
            "There is no token to predict in the evaluation text. Give text of two tokens or more."
        )
    return {
        "perplexity": math.exp(min(total / tokens, 700.0)),
        "loss": total / tokens,
        "tokens": tokens,
        "tokens_per_second": statistics.median(speeds),
        "precision": str(dtypes[-1] if dtypes else model.dtype).removeprefix("torch."),
        **({"bits_per_byte": total / math.log(2) / max(1, size)} if tokenizer is not None else {}),
    }


def _as_batches(model: PreTrainedModel, data: Any, tokenizer: Any) -> list[Batch]:
    length = min(256, context_length(base_of(model)) or 256)
    columns = model_columns(base_of(model))
    batches = make_batches(data, tokenizer=tokenizer, sequence_length=length, columns=columns)
    check_token_labels(batches)
    check_same_batches(batches)
    return batches


@contextmanager
def output_dtypes(model: PreTrainedModel) -> Iterator[list[torch.dtype]]:
    """Collects the dtypes of the logits that `model` computes within this context, autocast included."""
    head, dtypes = model.get_output_embeddings(), list[torch.dtype]()
    if head is None:
        yield dtypes
        return
    handle = head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    try:
        yield dtypes
    finally:
        handle.remove()


class HeldOutText:
    """Evaluates models on one text. Pass it as `evaluation=` of a run, so that the card names the text.

    Args:
        data (`Dataset` or list of batches): sequences of tokens.
        batch_size (`int`, *optional*, defaults to 4): number of sequences in a batch.
        collate (`Callable`, *optional*): makes a batch of rows, see [`make_batches`].

    Raises:
        LayerPruneError: `data` is empty.
    """

    def __init__(
        self, data: Any, batch_size: int = 4, collate: Callable[[list[Any]], dict[str, Any]] | None = None
    ) -> None:
        self.data, self.batches = data, make_batches(data, batch_size, collate)

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns the result of [`evaluate_text`] for `model`."""
        return evaluate_text(model, self.batches)


def copying(model: PreTrainedModel, batches: Iterable[Batch], given: int = 8) -> dict[str, float]:
    """Returns the copy accuracy of `model`: how well it repeats a passage that it has just read.

    The model reads each passage (a row of `input_ids`) twice in a row. It is scored on the second copy, after
    the first `given` tokens. A passage is truncated to half of the context length.

    Args:
        model (`PreTrainedModel`): a causal language model. It is not changed.
        batches (iterable of dict): `input_ids` `(batch, length)` of whole passages. Padding on the right
            is removed.
        given (`int`, *optional*, defaults to 8): number of tokens of the second copy that are not scored.

    Returns:
        `dict[str, float]`:
            - `copied`: the share of the passage that greedy decoding repeats before its first error, mean
              over passages
            - `standard_error`: the standard error of `copied`
            - `right`: the next-token accuracy on the passage

    Raises:
        LayerPruneError: there is no passage, or a passage has at most `given` tokens.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    check_next_token(base_of(model), "copying")
    check_not_tensor_parallel(base_of(model))
    batches = list(batches)
    check_same_batches(batches)

    def read(number: int, batch: Batch) -> tuple[list[float], list[float]]:
        """Returns, for each passage, the share repeated before the first error, and the accuracy."""
        ids = _without_padding(batch, given).to(model.device)
        if not len(ids):
            return [], []
        length = ids.shape[1] if longest is None else min(ids.shape[1], longest // 2)
        if length <= given:
            raise LayerPruneError(
                f"A passage of {length} tokens is too short to copy: {given} are given. Use longer ones."
            )
        twice = torch.cat([ids[:, :length], ids[:, :length]], 1)
        lm_head = ChunkedLMHead(model, twice)
        states = lm_head.states({"input_ids": twice})[:, length + given - 1 : -1]
        predicted = torch.cat([logits.argmax(-1) for logits in lm_head.rows(states.flatten(0, 1))])
        right = (predicted.view(len(ids), -1) == twice[:, length + given :]).cpu()
        return right.long().cumprod(1).double().mean(1).tolist(), right.double().mean(1).tolist()

    with undisturbed(model):
        results = list(read_all(batches, read, is_sharded(model)))
    copied = [share for shares, _ in results for share in shares]
    correct = [accuracy for _, accuracies in results for accuracy in accuracies]
    if not copied:
        raise LayerPruneError("There is no passage to copy. Give at least one row of tokens.")
    mean, error = mean_and_error(copied)
    return {"copied": mean, "standard_error": error, "right": statistics.fmean(correct)}


def _without_padding(batch: Batch, given: int) -> torch.Tensor:
    """Returns the rows with more than `given` tokens, truncated to the length of the shortest."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return ids
    lengths = mask.sum(1)
    long = lengths > given
    return ids[long, : int(lengths[long].min())] if long.any() else ids[:0]


def generation_speed(model: Any, batch: Batch, new_tokens: int = 64, times: int = 3) -> float:
    """Returns the tokens per second of greedy decoding after the first 64 tokens of a text.

    One sequence is decoded with the model's own cache. The speed is the median of `times` runs after a
    warm-up run.
    """
    prompt = batch["input_ids"][:1, :64].to(model.device)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    pad = model.generation_config.eos_token_id
    settings["pad_token_id"] = pad[0] if isinstance(pad, list) else pad
    seconds = []
    with undisturbed(model):
        for _ in range(times + 1):
            began = time.perf_counter()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
            seconds.append(time.perf_counter() - began)
    return new_tokens / statistics.median(seconds[1:])


def measure_quality(model: PreTrainedModel, batches: Sequence[Batch], task: Any = None) -> float:
    """Returns the quality of `model`. Higher is better.

    The quality is the score on a task, or the mean over several tasks. Without a task it is minus the loss in
    nats per token.

    Args:
        model (`PreTrainedModel`): a causal language model. It is not changed.
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


def next_token_metric(metric: Any, batches: Sequence[Batch]) -> Task:
    """Returns a task that compares predicted with true next tokens by an `evaluate` metric.

    Args:
        metric (`evaluate.EvaluationModule`): an object whose `compute(predictions=, references=)` returns a
            dict of numbers. The first number is the score.
        batches (sequence of dict): each with `input_ids` `(batch, length)`.
    """

    def score(model: PreTrainedModel) -> float:
        results = list(read_all(batches, partial(_predict, model), is_sharded(model)))
        predictions = [token for predicted, _ in results for token in predicted]
        references = [token for _, followed in results for token in followed]
        result: Mapping[str, float] = metric.compute(predictions=predictions, references=references)
        return next(iter(result.values()))

    return score


def _predict(model: PreTrainedModel, number: int, batch: Batch) -> tuple[list[int], list[int]]:
    """Returns the most likely and the true next token at each counted position."""
    mask, tokens = targets_of(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    best = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
    return best[mask].tolist(), tokens[:, 1:][mask].tolist()
