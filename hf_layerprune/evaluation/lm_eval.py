"""Evaluates a model in memory on tasks of lm-evaluation-harness."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError
from ..forward.hooks import undisturbed
from .comparison import task_scores
from .tasks import TASKS


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Returns the scores of a model on tasks, measured by lm-eval.

    Args:
        model (`PreTrainedModel`): a causal language model. It is not changed.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        tasks (sequence of `str`): names of multiple-choice or last-word tasks of lm-eval, whose rows are
            downloaded from the hub. Or `name=file` with the rows in a JSON Lines file.
        limit (`int`, *optional*): number of questions of each task. Default: all.
        batch_size (`int`, *optional*, defaults to 8): number of choices in a batch.

    Returns:
        `dict`: see [`task_scores`]. The metric is `acc_norm` or `acc` as in `TASKS`. For other tasks it is
        `acc_norm` if lm-eval reports that.

    Raises:
        LayerPruneError: lm-eval is not installed, does not know a task, or reports no accuracy for it.
    """
    right: dict[str, list[bool]] = {}
    chances: dict[str, float] = {}
    for name, samples in lm_eval_samples(model, tokenizer, tasks, limit, batch_size).items():
        names_here = ("acc_norm", "acc") if name not in TASKS or TASKS[name].normalize else ("acc",)
        metric = next((one for one in names_here if one in samples[0]), None)
        if metric is None:
            raise LayerPruneError(f"lm-eval gives no accuracy for {name}. Choose tasks with right answers.")
        if any(sample[metric] not in (0, 1) for sample in samples):
            raise LayerPruneError(
                f"{metric} of lm-eval's {name} is not 0 or 1 but a share. Choose other tasks."
            )
        right[name] = [bool(sample[metric]) for sample in samples]
        choices = [len(sample["resps"]) for sample in samples]
        chances[name] = sum(1 / count for count in choices if count > 1) / len(choices)
    return task_scores(right, chances)


def known_tasks(tasks: Sequence[str]) -> Any:
    """Checks that lm-eval knows these tasks, and returns its task manager. See [`run_lm_eval`]."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LayerPruneError("lm-eval is not installed: pip install 'hf-layerprune[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager()
    parts = [task.partition("=") for task in tasks]
    if unknown := [name for name, _, _ in parts if name not in manager.all_tasks]:
        raise LayerPruneError(
            f"lm-eval has no task {', '.join(unknown)}. List its tasks with `lm-eval ls tasks`."
        )
    if missing := [file for _, _, file in parts if file and not Path(file).is_file()]:
        raise LayerPruneError(f"No such file: {missing[0]}")
    return manager


def lm_eval_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the samples that lm-eval logs for each task, in the order of questions. See [`run_lm_eval`]."""
    manager = known_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # lm-eval accepts changed settings of a known task only inside a group.
    group: Any = {"group": "layerprune", "task": [_settings(task) for task in tasks]}
    with undisturbed(model):
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[group],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    return {
        name: sorted(samples, key=lambda sample: sample["doc_id"])
        for name, samples in found["samples"].items()
    }


def _settings(task: str) -> dict[str, Any]:
    name, _, file = task.partition("=")
    if not file:
        return {"task": name}
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(Path(file).resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    if name == "boolq":  # rows of SuperGLUE, or of the original data set
        settings["doc_to_target"] = "{{(label if label is defined else answer) | int}}"
    return settings
