"""What a model can do, before and after."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, check_token_labels, columns_read, make_batches, most_tokens, targets_of
from ..errors import LayerPruneError
from ..forward.hooks import undisturbed
from ..forward.lm_head import Reader, unit_losses
from ..surgery.decoder import check_next_token
from ..surgery.lineage import get_lineage
from ..surgery.peft import base_of
from .multiple_choice import Answer, MultipleChoice, Question
from .tasks import TASKS, chance


Task = Callable[[PreTrainedModel], float]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Any,
    questions: Mapping[str, Sequence[Question]] | None = None,
) -> dict[str, Any]:
    """What [`evaluate_text`], [`copying`] (of 32 rows), [`generation_speed`] and [`task_scores`] say of a
    model, which is not changed, with its size.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        batches: `input_ids` `(batch, length)` of whole passages, or as for [`evaluate_text`]. Left empty,
            only the tasks are measured.
        questions (mapping of `str` to sequence of [`Question`], *optional*): of tasks named in `TASKS`.

    Raises:
        LayerPruneError: a question that cannot be asked, or text too short to be copied, before the rest.
    """
    tasks = {
        name: MultipleChoice(asked, tokenizer, normalize=TASKS[name].normalize)
        for name, asked in (questions or {}).items()
    }
    for task in tasks.values():
        task.check_length(model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not isinstance(batches, (list, tuple)) or batches:
        batches = _as_batches(model, batches, tokenizer)
    copied = copying(model, batches[: 1 + 31 // len(batches[0]["input_ids"])]) if batches else None
    found: dict[str, Any] = {
        "layers": len(get_lineage(model).kept),
        "parameters": model.num_parameters(),
        "weights_mb": round(model.get_memory_footprint() / 2**20, 1),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if copied is not None:
        found |= evaluate_text(model, batches, tokenizer)
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


def compare_models(results: Mapping[str, dict[str, Any]]) -> None:
    """Add in place, to the results of models from [`evaluate_model`], what each keeps of the first: `kept`
    ([`share_kept`]), `difference` ([`mean_difference`]), each task's `agreement` and, where the perplexities
    of the choices are known, its `stability`."""
    first, *_ = results.values()
    if "tasks" not in first:
        return
    for one in results.values():
        one.pop("kept", None)  # of another first model, where this one was measured before
        if tasks_done(first):
            one["kept"] = share_kept(first, one)
        one["difference"] = dict(zip(("mean", "standard_error"), mean_difference(first, one), strict=True))
        for name, task in one["tasks"].items():
            task["agreement"] = agreement(first["tasks"][name]["right"], task["right"])
            if "perplexities" in task:
                task["stability"] = stability(_answers(first["tasks"][name]), _answers(task))


def _answers(task: Mapping[str, Any]) -> list[Answer]:
    return [Answer(one == "1", given) for one, given in zip(task["right"], task["perplexities"], strict=True)]


def evaluate_text(
    model: PreTrainedModel, batches: Any, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Perplexity of `model` on text, and its speed reading it.

    Args:
        model (`PreTrainedModel`): a causal language model; it is not changed.
        batches: `input_ids` `(batch, length)`, where needed `attention_mask`, `labels`. Or another form that
            [`make_batches`] knows: a data set, a tensor, a list of texts, chats.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's, for text, and for bits per byte, by
            which models with different tokenizers compare.

    Returns:
        `dict[str, Any]`: `perplexity`, `loss` (nats per token, mean over all tokens), `tokens` (that
        were predicted), `tokens_per_second` (read by a forward pass with its loss, median of
            the batches, since the first is slow), `precision` (of its matrix products, as "bfloat16", also
            where the Trainer sets that), and with a tokenizer `bits_per_byte` (of the text of the predicted
            tokens in UTF-8; what marks the end of a text has a loss, and no byte).

    Raises:
        LayerPruneError: there is no token to predict.
    """
    check_next_token(base_of(model), "evaluate_text")
    total, tokens, size, speeds = 0.0, 0, 0, []
    reader: Reader | None = None
    batches = _as_batches(model, batches, tokenizer)
    with undisturbed(model), output_dtypes(model) as dtypes:
        for batch in batches:
            on_device = {name: value.to(model.device) for name, value in batch.items()}
            reader = reader or Reader(model, on_device["input_ids"])
            began = time.perf_counter()
            mask, targets = targets_of(on_device)
            loss, count = float(unit_losses(reader, on_device).sum()), int(mask.sum())
            speeds.append(batch["input_ids"].numel() / (time.perf_counter() - began))
            total, tokens = total + loss, tokens + count
            if tokenizer is not None:
                rows = (row[wanted].tolist() for row, wanted in zip(targets[:, 1:], mask, strict=True))
                texts = (str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows)
                size += sum(len(text.encode()) for text in texts)
    if not tokens:
        raise LayerPruneError("There is no token to predict in the evaluation text.")
    return {
        "perplexity": math.exp(min(total / tokens, 700.0)),
        "loss": total / tokens,
        "tokens": tokens,
        "tokens_per_second": statistics.median(speeds),
        "precision": str(dtypes[-1] if dtypes else model.dtype).removeprefix("torch."),
        **({"bits_per_byte": total / math.log(2) / max(1, size)} if tokenizer is not None else {}),
    }


def _as_batches(model: PreTrainedModel, data: Any, tokenizer: Any) -> list[Batch]:
    length = min(256, most_tokens(base_of(model)) or 256)
    columns = columns_read(base_of(model))
    batches = make_batches(data, tokenizer=tokenizer, block_length=length, columns=columns)
    check_token_labels(batches)
    return batches


@contextmanager
def output_dtypes(model: PreTrainedModel) -> Iterator[list[torch.dtype]]:
    """Within this context the list has the types of what the output head of `model` makes, in which autocast
    shows, too."""
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
    """Evaluates models on one text: an `evaluation=` for a run, whose card then says what was read.

    Args:
        data (`Dataset` or list of batches): sequences of tokens.
        batch_size (`int`, *optional*, defaults to 4): sequences read at once.

    Raises:
        LayerPruneError: `data` is empty.
    """

    def __init__(self, data: Any, batch_size: int = 4) -> None:
        self.data, self.batches = data, make_batches(data, batch_size)

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns what [`evaluate_text`] measures of `model`."""
        return evaluate_text(model, self.batches)


def copying(model: PreTrainedModel, batches: Iterable[Batch], given: int = 8) -> dict[str, float]:
    """How far `model` goes on with a passage that it has just read, as one mistake ends it.

    Each passage, a row of `input_ids`, is read twice; of the second time the first tokens are given. Where
    twice its length is more than the model reads, its first half is the passage.

    Args:
        model (`PreTrainedModel`): a causal language model; it is not changed.
        batches (iterable of dict): `input_ids` `(batch, length)` of whole passages, without padding.
        given (`int`, *optional*, defaults to 8): tokens of the second time that are given.

    Returns:
        `dict[str, float]`: `copied`, the share of the rest that greedy decoding would repeat before its first
        mistake, mean over passages; its `standard_error`; `right`, the share of all tokens that it finds when
        those before are given.

    Raises:
        LayerPruneError: no passage, or one not longer than what is given of it.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    check_next_token(base_of(model), "copying")
    copied: list[float] = []
    found: list[float] = []
    with undisturbed(model):
        for batch in batches:
            ids = batch["input_ids"].to(model.device)
            length = ids.shape[1] if longest is None else min(ids.shape[1], longest // 2)
            if length <= given:
                raise LayerPruneError(
                    f"A passage of {length} tokens is too short to copy: {given} are given."
                )
            twice = torch.cat([ids[:, :length], ids[:, :length]], 1)
            reader = Reader(model, twice)
            states = reader.states({"input_ids": twice})[:, length + given - 1 : -1]
            said = torch.cat([few.argmax(-1) for few in reader.rows(states.flatten(0, 1))])
            right = said.view(len(ids), -1) == twice[:, length + given :]
            copied += right.long().cumprod(1).double().mean(1).tolist()
            found += right.double().mean(1).tolist()
    if not copied:
        raise LayerPruneError("There is no passage to copy.")
    mean, error = mean_and_error(copied)
    return {"copied": mean, "standard_error": error, "right": statistics.fmean(found)}


def generation_speed(model: Any, batch: Batch, new_tokens: int = 64, times: int = 3) -> float:
    """Tokens per second of greedy decoding after the first 64 tokens of a text, one sequence at a time, with
    the cache that the model has: median of some times after one that does not count."""
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


def agreement(original: str, pruned: str) -> dict[str, float]:
    """Returns the `share` of the questions that two models both answer right or both answer wrong, and its
    `standard_error`.

    Args:
        original, pruned (`str`): `right` of one task from [`task_scores`], of the same questions.
    """
    same = [float(one == other) for one, other in zip(original, pruned, strict=True)]
    return dict(zip(("share", "standard_error"), mean_and_error(same), strict=True))


def stability(original: Sequence[Answer], pruned: Sequence[Answer]) -> dict[str, float]:
    """How far a pruned model answers as the original does (LLM-Streamline, 2403.19135, section 3.4).

    The questions on which both are right, or both wrong, count by a softmax over the questions of how far
    the original model's perplexities of the choices spread (their standard deviation). Where these are large,
    one question decides: then it is 0 or 1, and [`agreement`] says more. The released code
    sums the first weights instead of those of the questions that match, and differs where these do.

    Args:
        original, pruned (sequence of [`Answer`]): of the same questions, from [`MultipleChoice.read`].

    Returns:
        `dict[str, float]`: `stability`, from 0 to 1, its `standard_error` over questions, and over how many
        `effective_questions` the weights spread: 1 where one decides, all of them where all count alike.

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
    return {
        "stability": found,
        "standard_error": float(np.sqrt((weights**2) @ (same - found) ** 2)),
        "effective_questions": float(1 / (weights @ weights)),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; that of one value is not known (NaN)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def task_scores(right: Mapping[str, Sequence[bool]], chances: Mapping[str, float]) -> dict[str, Any]:
    """Accuracies of a model in tasks, and their mean, the aggregate (2511.05085, section 4).

    Args:
        right (mapping of `str` to sequence of `bool`): for each task, which questions were answered right.
        chances (mapping of `str` to `float`): for each task, the accuracy of guessing.

    Returns:
        `dict`: `tasks`, for each `accuracy`, `standard_error`, `chance`, `questions` and `right`, a string
        of ones and zeros; `mean` with its `standard_error`.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for name, answers in right.items():
        accuracy, error = mean_and_error([float(one) for one in answers])
        tasks[name] = {
            "accuracy": accuracy,
            "standard_error": error,
            "chance": chances[name],
            "questions": len(answers),
            "right": "".join("1" if one else "0" for one in answers),
        }
    errors = [task["standard_error"] for task in tasks.values()]
    return {
        "tasks": tasks,
        "mean": statistics.fmean(task["accuracy"] for task in tasks.values()),
        "standard_error": math.sqrt(sum(error**2 for error in errors)) / len(errors),
    }


def tasks_done(dense: Mapping[str, Any]) -> list[str]:
    """The tasks in which a model is better than guessing by more than two standard errors. What it cannot do
    itself, as a small one BoolQ, says nothing of what is kept of it.

    Args:
        dense (`dict`): from [`task_scores`].
    """
    return [
        name
        for name, task in dense["tasks"].items()
        if task["accuracy"] - task["chance"] > 2 * task["standard_error"]
    ]


def share_kept(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, float]:
    """What a pruned model keeps of the dense one's mean accuracy above chance, in the tasks that this does.

    Args:
        dense, pruned (`dict`): from [`task_scores`], of the same questions.

    Returns:
        `dict[str, float]`: `share`, 1 for the dense model, 0 for guessing; and its `standard_error` from the
        questions in pairs (delta method), so that what both find hard does not count.

    Raises:
        LayerPruneError: not the same tasks and questions, or the dense model is better than chance in none.
    """
    names = tasks_done(dense)
    if not names:
        raise LayerPruneError(
            "The first model is better than chance in no task: no share of that can be kept."
        )
    both = _pairs(dense, pruned, names)
    before, after = (
        sum(one["tasks"][name]["accuracy"] - one["tasks"][name]["chance"] for name in names)
        for one in (dense, pruned)
    )
    share = after / before
    spread = sum(np.var(two - share * one, ddof=1) / len(one) for one, two in both)
    return {"share": share, "standard_error": math.sqrt(spread) / before}


def mean_difference(
    first: Mapping[str, Any], second: Mapping[str, Any], names: Sequence[str] | None = None
) -> tuple[float, float]:
    """How much higher the aggregate of the second of two models is, and the paired standard error of that.

    Args:
        first, second (`dict`): from [`task_scores`], of the same questions.
        names (sequence of `str`, *optional*): of the tasks; left out, all.

    Raises:
        LayerPruneError: not the same tasks and questions.
    """
    both = _pairs(first, second, list(first["tasks"]) if names is None else names)
    spread = sum(np.var(two - one, ddof=1) / len(one) for one, two in both)
    mean = statistics.fmean(float(np.mean(two - one)) for one, two in both)
    return mean, math.sqrt(spread) / len(both)


def _pairs(
    first: Mapping[str, Any], second: Mapping[str, Any], names: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    sizes = [{name: task["questions"] for name, task in one["tasks"].items()} for one in (first, second)]
    if sizes[0] != sizes[1]:
        raise LayerPruneError(f"Not the same questions: {sizes[0]} and {sizes[1]}.")

    def right(one: Mapping[str, Any], name: str) -> np.ndarray:
        return np.array([*map(float, one["tasks"][name]["right"])])

    return [(right(first, name), right(second, name)) for name in names]


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
            mask, tokens = targets_of(batch)
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            best = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
            predictions += best[mask].tolist()
            references += tokens[:, 1:][mask].tolist()
        result: Mapping[str, float] = metric.compute(predictions=predictions, references=references)
        return next(iter(result.values()))

    return score
