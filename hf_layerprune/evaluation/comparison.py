"""Compares models on the same tasks by accuracy, accuracy above chance, agreement and stability."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import LayerPruneError
from .multiple_choice import Answer


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error. The error is NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def task_scores(right: Mapping[str, Sequence[bool]], chances: Mapping[str, float]) -> dict[str, Any]:
    """Returns the accuracies of a model on tasks, and their mean (2511.05085, section 4).

    Args:
        right (mapping of `str` to sequence of `bool`): for each task, which questions were answered right.
        chances (mapping of `str` to `float`): for each task, the accuracy of guessing.

    Returns:
        `dict[str, Any]`:
            - `tasks`: for each task its `accuracy`, `standard_error`, `chance`, number of `questions`, and
              `right`, a string with 1 for each right answer and 0 for each wrong answer
            - `mean`: the mean accuracy over tasks
            - `standard_error`: the standard error of the mean
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
    """Returns the tasks on which a model is better than chance by more than two standard errors.

    If the dense model is at chance on a task, such as BoolQ for a small model, the task does not measure the
    cost of pruning.

    Args:
        dense (`dict`): the result of [`task_scores`] for the dense model.
    """
    return [
        name
        for name, task in dense["tasks"].items()
        if task["accuracy"] - task["chance"] > 2 * task["standard_error"]
    ]


def share_kept(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, float]:
    """Returns the share of the dense model's mean accuracy above chance that a pruned model keeps.

    Only the tasks of [`tasks_done`] count.

    Args:
        dense, pruned (`dict`): the results of [`task_scores`] on the same questions.

    Returns:
        `dict[str, float]`: the `share`, which is 1 for the dense model and 0 for guessing, and its
        `standard_error`, paired by question (delta method).

    Raises:
        LayerPruneError: the questions differ, or the dense model is not better than chance on any task.
    """
    names = tasks_done(dense)
    if not names:
        raise LayerPruneError(
            "The first model is not better than chance in any task, so no share of its accuracy can be kept. "
            "Choose tasks that it can do."
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
    """Returns the mean accuracy of the second model minus that of the first, and its paired standard error.

    Args:
        first, second (`dict`): the results of [`task_scores`] on the same questions.
        names (sequence of `str`, *optional*): the tasks to compare. Default: all.

    Raises:
        LayerPruneError: the questions differ.
    """
    both = _pairs(first, second, list({**first["tasks"], **second["tasks"]}) if names is None else names)
    spread = sum(np.var(two - one, ddof=1) / len(one) for one, two in both)
    mean = statistics.fmean(float(np.mean(two - one)) for one, two in both)
    return mean, math.sqrt(spread) / len(both)


def agreement(original: str, pruned: str) -> dict[str, float]:
    """Returns the `share` of the questions that two models both answer right or both answer wrong, and its
    `standard_error`.

    Args:
        original, pruned (`str`): `right` of one task from [`task_scores`], for the same questions.
    """
    same = [float(one == other) for one, other in zip(original, pruned, strict=True)]
    return dict(zip(("share", "standard_error"), mean_and_error(same), strict=True))


def stability(original: Sequence[Answer], pruned: Sequence[Answer]) -> dict[str, float]:
    """Returns the stability of a pruned model (LLM-Streamline, 2403.19135, section 3.4).

    Stability is the share of the questions that both models answer right or both answer wrong. The weight of
    a question is a softmax over the standard deviations of the original model's perplexities of the choices.
    With large perplexities, one question may have all the weight. Stability is then 0 or 1, and [`agreement`]
    is the better metric. The released code of the paper sums the first weights instead of the weights of the
    matching questions.

    Args:
        original, pruned (sequence of [`Answer`]): the answers to the same questions, from
            [`MultipleChoice.read`].

    Returns:
        `dict[str, float]`:
            - `stability`: from 0 to 1
            - `standard_error`: the standard error of the stability over questions
            - `effective_questions`: 1 if one question has all the weight, the number of questions if all
              weights are equal

    Raises:
        LayerPruneError: the questions differ, or a perplexity is not a finite number.
    """
    sizes = [[len(answer.perplexities) for answer in answers] for answers in (original, pruned)]
    if sizes[0] != sizes[1] or not original:
        raise LayerPruneError("Stability compares answers to the same questions, and needs at least one.")
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


def compare_models(results: Mapping[str, dict[str, Any]]) -> None:
    """Adds comparisons with the first model to the results of [`evaluate_model`], in place.

    The comparisons are `kept` ([`share_kept`]) and `difference` ([`mean_difference`]). Each task gets
    `agreement`, and `stability` if the perplexities of the choices are known.

    Args:
        results (mapping of `str` to `dict`): the results of each model. The first is the dense model.
    """
    first, *_ = results.values()
    if "tasks" not in first:
        return
    for one in results.values():
        one.pop("kept", None)  # an earlier comparison with another model
        if tasks_done(first):
            one["kept"] = share_kept(first, one)
        one["difference"] = dict(zip(("mean", "standard_error"), mean_difference(first, one), strict=True))
        for name, task in one["tasks"].items():
            task["agreement"] = agreement(first["tasks"][name]["right"], task["right"])
            if "perplexities" in task:
                task["stability"] = stability(_answers(first["tasks"][name]), _answers(task))


def _answers(task: Mapping[str, Any]) -> list[Answer]:
    return [Answer(one == "1", given) for one, given in zip(task["right"], task["perplexities"], strict=True)]


def _pairs(
    first: Mapping[str, Any], second: Mapping[str, Any], names: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    tasks = [{name: one["tasks"].get(name, {}) for name in names} for one in (first, second)]
    sizes = [{name: task.get("questions", 0) for name, task in one.items()} for one in tasks]
    if sizes[0] != sizes[1]:
        raise LayerPruneError(
            f"Not the same questions: {sizes[0]} and {sizes[1]}. Evaluate both models on the same tasks."
        )

    def right(one: Mapping[str, Any], name: str) -> np.ndarray:
        return np.array([*map(float, one["tasks"][name]["right"])])

    return [(right(first, name), right(second, name)) for name in names]
