"""Scores all candidate layers of a model."""

import hashlib
import json
import logging
import random
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.batches import make_batches, model_columns, regroup_batches, split_rows
from ..data.processes import check_same_batches, gather, process_count, process_index, split_for_processes
from ..data.sequences import context_length
from ..data.targets import Batch, check_token_labels
from ..errors import LayerPruneError, choose_from
from ..evaluation.evaluate import next_token_metric
from ..evaluation.multiple_choice import MultipleChoice
from ..forward.hooks import undisturbed
from ..forward.memory import tokens_per_pass
from ..surgery.decoder import check_not_tensor_parallel, check_reads_text, describe_class, predicts_next_token
from ..surgery.layer_stack import LayerCut, LayerStack
from ..surgery.lineage import plain_int
from ..surgery.peft import base_of
from .criteria import CRITERIA, PATTERNS, CriterionResult, ScoringContext, find_criterion
from .journal import Journal
from .leave_one_out import Cuts
from .prefix_cache import PrefixCache, default_cache_mb
from .table import ScoreTable


logger = logging.getLogger(__name__)


def score_layers(
    model: Any,
    batches: Any = (),
    criterion: str = "loss",
    *,
    tokenizer: Any = None,
    block_size: int = 1,
    task: Any = None,
    teacher: PreTrainedModel | None = None,
    pattern: str = "output",
    seed: int = 0,
    racing: float | None = None,
    batch_tokens: int | None = None,
    cache_mb: int | None = None,
    protected: Iterable[int] | None = None,
    journal: str | Path | None = None,
    prefix_cache: PrefixCache | None = None,
    progress: bool = True,
) -> ScoreTable:
    """Scores the importance of each decoder layer of `model`. The model is not changed.

    In a distributed run, all processes must call this function with the same model and batches. Each process
    reads a part of the batches, and all processes return the same table.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a causal language model, scored with its adapters. Other
            text models (encoders, classifiers, reward and embedding models) work with the criteria that need
            no next token: `"block_influence"`, `"angular"`, `"hidden_mse"`, `"positional"` and `"task"`.
        batches: the calibration data. Each batch holds `input_ids` `(batch, length)`, and if needed
            `attention_mask` and `labels` of the same shape. Labels of -100 are ignored. Other forms that
            [`make_batches`] reads are accepted too, such as a data set, a tensor, a list of texts, or chats.
        criterion (`str`, *optional*, defaults to `"loss"`): one of `CRITERIA`: `"loss"`, `"kl"`,
            `"hidden_mse"`, `"block_influence"`, `"angular"`, `"taylor"`, `"task"`, `"positional"`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's tokenizer. Needed if `batches` is text.
        block_size (`int`, *optional*, defaults to 1): number of consecutive layers in a candidate. The table
            names each block by its first layer.
        task (`Callable` or `evaluate.EvaluationModule`, *optional*): for `criterion="task"`. Either a
            function `score(model) -> float` such as [`MultipleChoice`], higher is better, or a metric of
            predicted and true next tokens of `batches`. For a list of tasks, their mean is used.
        teacher (`PreTrainedModel`, *optional*): for `"kl"`, the model to compare with. Default: `model`.
        pattern (`str`, *optional*, defaults to `"output"`): for `"positional"`, the order of removal:
            `"output"` (the deepest layer first), `"input"`, `"middle"`, `"both"` or `"random"`.
        seed (`int`, *optional*, defaults to 0): the random seed for `pattern="random"`.
        racing (`float`, *optional*): a confidence such as 0.99, for `"loss"`, `"kl"`, `"hidden_mse"` and
            [`MultipleChoice`]. A candidate is dropped if its score is surely not below the current lowest
            score by more than one standard error of the lowest score. Dropped candidates keep the score on
            the text read so far. Batches are read in random order. Default: no candidate is dropped.
        batch_tokens (`int`, *optional*): tokens in a forward pass. Default: on a GPU as many as fit into half
            of its free memory, at most 32,768; on other devices the given batches are not changed.
        cache_mb (`int`, *optional*): memory for the hidden states of a batch, in MiB, for `"loss"`, `"kl"`
            and `"hidden_mse"`. Larger batches are split. Default: a quarter of the free memory of a GPU; 1024
            on other devices.
        protected (iterable of `int`, *optional*): present indices of layers that are not scored. Default:
            the first and the last layer.
        journal (`str` or `Path`, *optional*): a file that stores intermediate results. If scoring is
            interrupted, a second call with the same model and text continues from the file. The file is
            deleted at the end.
        prefix_cache ([`~hf_layerprune.scoring.prefix_cache.PrefixCache`], *optional*): a cache for several
            rounds of scoring without training. Layers before the first removed layer are not computed again.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        [`ScoreTable`]

    Raises:
        LayerPruneError: the criterion or a layer is unknown, there is no candidate or no calibration data,
            the model cannot be cut exactly, or no score is a finite number.
    """
    tasks, kind = check_choices(criterion, task, teacher, pattern, racing), find_criterion(criterion)
    _check_models(model, criterion, tasks, teacher)
    cache_mb = plain_int(cache_mb)
    if cache_mb is not None and (type(cache_mb) is not int or cache_mb < 1):
        raise LayerPruneError(f"cache_mb is {cache_mb!r}: it must be a whole number of at least 1.")
    stack = LayerStack(model)
    kept, block = stack.lineage.kept, _check_block(block_size, len(stack))
    cuts, refused = _candidates(stack, block, protected)
    given = _calibration(stack.base, batches, tokenizer) if reads_text(criterion, tasks) else []
    if reads_text(criterion, tasks) and not given:
        raise LayerPruneError("No calibration batches to score with.")
    check_same_batches(given)
    given = _on_device(stack.base, given)
    if prefix_cache is None or prefix_cache.layout is None:
        most = tokens_per_pass(stack.base, batch_tokens)
        layout = most, cache_mb or default_cache_mb(stack.base.device)
    else:
        layout = prefix_cache.layout
    if prefix_cache is not None:
        prefix_cache.layout = layout
    most, cache_mb = layout
    if racing is not None:  # its first batches must be a random sample of the text, and merged ones are not
        most = None
    if most is not None and given:
        total = sum(batch["input_ids"].numel() for batch in given)
        given = regroup_batches(given, min(most, -(-total // process_count())))
    given = split_for_processes(given)
    if kind.leave_one_out:
        given = _small_enough(stack, given, cache_mb)
        if racing is not None:  # racing needs the first batches to be like the others
            random.Random(0).shuffle(given)
    settings = [criterion, block, racing, sorted(cuts), pattern, seed, list(map(_task_label, tasks))]
    choices: dict[str, Any] = {
        "racing": racing,
        "teacher": teacher,
        "pattern": pattern,
        "seed": seed,
    }
    while True:
        work = "" if journal is None else fingerprint([stack.base, teacher], given, settings)
        notes = Journal(journal, work)
        choices["tasks"] = [
            next_token_metric(one, given) if hasattr(one, "compute") else one for one in tasks
        ]
        try:
            result = _score_batches(
                criterion, stack, given, cuts, block, notes, progress, prefix_cache=prefix_cache, **choices
            )
            break
        except RuntimeError as error:
            halves = [part for batch in given for part in split_rows(batch, -(-len(batch["input_ids"]) // 2))]
            if not should_reduce_batch_size(error) or len(halves) == len(given):
                raise
            logger.warning("Out of memory in scoring: it goes on with batches of half the size.")
            if prefix_cache is not None:
                prefix_cache.clear()
            given, prefix_cache = halves, None
            clear_device_cache(garbage_collection=True)
    # All processes use the scores of the first process. A task may give each process another score, but all
    # processes must remove the same layers.
    [result, *_] = gather(result)
    table = _table(criterion, result, kept, block, list(cuts), refused)
    notes.finish()
    return table


def _score_batches(
    criterion: str,
    stack: LayerStack,
    batches: list[Any],
    cuts: Cuts,
    block: int,
    journal: Journal,
    progress: bool,
    teacher: PreTrainedModel | None,
    **choices: Any,
) -> CriterionResult:
    """Scores all candidates, with the models in eval mode and a progress bar."""
    kind = CRITERIA[criterion]
    passes = 1 if kind.needs_task else len(batches) if kind.reads_text else 0
    shows = progress and process_index() == 0
    with (
        tqdm(total=passes * len(cuts), desc=f"scoring ({criterion})", disable=not shows, leave=False) as bar,
        undisturbed(stack.base),
        nullcontext() if teacher is None else undisturbed(teacher),
    ):
        return kind.score(
            ScoringContext(stack, batches, cuts, block, bar, journal, teacher=teacher, **choices)
        )


def _check_models(model: Any, criterion: str, tasks: list[Any], teacher: PreTrainedModel | None) -> None:
    """Checks that a criterion can score a model with this teacher.

    Raises:
        LayerPruneError: the criterion cannot score the model, or the teacher is on another device.
    """
    base = base_of(model)
    check_not_tensor_parallel(base)
    if isinstance(base, PreTrainedModel):
        check_reads_text(type(base), base.config, "This model")
        check_criterion_fits(base, criterion, tasks)
    if teacher is not None and teacher.device != model.device:
        raise LayerPruneError(
            f"The teacher is on {teacher.device}, the model on {model.device}: move the teacher there."
        )


def _check_block(block_size: Any, count: int) -> int:
    """Returns the number of layers in a candidate.

    Raises:
        LayerPruneError: the number is below 1, or not below the number of layers.
    """
    block = plain_int(block_size)
    if type(block) is not int or not 1 <= block < count:
        raise LayerPruneError(f"block_size is {block!r}: it must be at least 1 and below the {count} layers.")
    return block


def _candidates(
    stack: LayerStack, block: int, protected: Iterable[int] | None
) -> tuple[dict[int, LayerCut], dict[int, str]]:
    """Returns the candidates by their first layer: the blocks that are not protected and can be removed. Also
    returns the reason for each block that cannot be removed.

    Raises:
        LayerPruneError: there is no candidate.
    """
    count = len(stack)
    fixed = {0, count - 1} if protected is None else stack.check_layers(protected)
    starts = [i for i in range(count - block + 1) if fixed.isdisjoint(range(i, i + block))]
    if not starts:
        raise LayerPruneError(
            f"No layer to score: the model has {count} layers, of which {sorted(fixed)} are protected. "
            "Protect fewer layers, or score smaller blocks."
        )
    cuts, refused = stack.removable(starts, block)  # layers that cannot be removed need no score
    if not cuts:
        raise LayerPruneError(next(iter(refused.values())))
    return cuts, refused


def _on_device(model: PreTrainedModel, batches: list[Batch]) -> list[Any]:
    """Returns calibration batches on the model's device. Labels are kept only if they are next tokens.

    Raises:
        LayerPruneError: the rows of a batch have a single token, or the labels are not tokens.
    """
    on_device = [{k: v.to(model.device) for k, v in batch.items() if torch.is_tensor(v)} for batch in batches]
    if any(batch["input_ids"].shape[1] < 2 for batch in on_device):
        raise LayerPruneError("Calibration batches of one token have nothing to predict.")
    if not predicts_next_token(model):  # no criterion runs the head that reads the labels
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in on_device]
    check_token_labels(on_device)
    return on_device


def _table(
    criterion: str,
    result: CriterionResult,
    kept: list[int],
    block: int,
    candidates: list[int],
    refused: dict[int, str],
) -> ScoreTable:
    """Returns the table of all finite scores.

    Raises:
        LayerPruneError: there is no finite score.
    """
    for layer in candidates:
        if not np.isfinite(result.scores.get(layer, np.nan)):
            refused[layer] = f"Without layer {layer} the {criterion} score is not a finite number."
    scores = {layer: score for layer, score in result.scores.items() if layer not in refused}
    if not scores:
        raise LayerPruneError(
            f"No layer has a {criterion} score that is a finite number: check the model and the calibration "
            "data."
        )
    return ScoreTable(criterion, scores, result.quality, kept, refused, block, result.errors, result.seen)


def _calibration(model: PreTrainedModel, data: Any, tokenizer: Any) -> list[Batch]:
    """Returns calibration data of any form as batches that `model` reads."""
    if isinstance(data, (list, tuple)) and not data:
        return []
    length = min(256, context_length(model) or 256)
    return make_batches(data, tokenizer=tokenizer, sequence_length=length, columns=model_columns(model))


def read_table(path: str | Path) -> ScoreTable:
    """Returns the table in a file that `hf-layerprune score --json` wrote.

    Raises:
        LayerPruneError: the file does not exist or holds no score table.
    """
    try:
        return ScoreTable.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LayerPruneError(f"No score table can be read from {path}: {error}") from error


def rank_correlation(one: ScoreTable, other: ScoreTable) -> float:
    """Returns Spearman's rank correlation of two tables. It is 1 for the same ranking and 0 by chance.

    Only candidates in both tables are compared. They are matched by their original layer.

    Args:
        one, other ([`ScoreTable`]): the tables.

    Returns:
        `float`: the correlation, from -1 to 1.

    Raises:
        LayerPruneError: the tables have fewer than two candidates in common, or all scores of a table are
            equal.
    """
    mine = {one.kept[layer]: score for layer, score in one.scores.items()}
    theirs = {other.kept[layer]: score for layer, score in other.scores.items()}
    common = sorted(mine.keys() & theirs.keys())
    if len(common) < 2:
        raise LayerPruneError(f"The tables have {len(common)} candidates in common: nothing to correlate.")
    ranks = [_ranks([scores[layer] for layer in common]) for scores in (mine, theirs)]
    if min(np.std(rank) for rank in ranks) == 0:
        raise LayerPruneError("All candidates of a table score the same: there is no ranking.")
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _ranks(scores: list[float]) -> np.ndarray:
    _, place, number = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(number) - (number - 1) / 2)[place]  # equal scores get their mean rank


def check_choices(
    criterion: str,
    task: Any = None,
    teacher: PreTrainedModel | None = None,
    pattern: str = "output",
    racing: float | None = None,
) -> list[Any]:
    """Checks the arguments of [`score_layers`] that need no model, and returns the list of tasks.

    Raises:
        LayerPruneError: an argument has an unknown value, or two arguments cannot be combined.
    """
    tasks, kind = _as_list(task), find_criterion(criterion)
    if bool(tasks) != kind.needs_task:
        raise LayerPruneError("`task` (a function or a metric) and criterion='task' go together.")
    strange = [one for one in tasks if not callable(one) and not hasattr(one, "compute")]
    if strange:
        raise LayerPruneError(f"{strange[0]!r} is not a task. Give a function of the model, or a metric.")
    if teacher is not None and not kind.takes_teacher:
        others = " or ".join(f"criterion={name!r}" for name, one in CRITERIA.items() if one.takes_teacher)
        raise LayerPruneError(f"{criterion} takes no teacher. Leave it out, or choose {others}.")
    if pattern not in (*PATTERNS, "random"):
        raise LayerPruneError(
            f"There is no pattern {pattern!r}. {choose_from(str(pattern), [*PATTERNS, 'random'])}."
        )
    by_question = bool(tasks) and all(isinstance(one, MultipleChoice) for one in tasks)
    if racing is not None and not ((by_question or kind.leave_one_out) and 0.5 < racing < 1):
        names = ", ".join(name for name, one in CRITERIA.items() if one.leave_one_out)
        raise LayerPruneError(
            f"racing is {racing!r} and criterion is {criterion}. Choose a confidence above 0.5 and below 1, "
            f"as 0.99, with {names} or tasks of MultipleChoice."
        )
    return tasks


def check_criterion_fits(model: Any, criterion: str, task: Any = None) -> None:
    """Checks that a criterion can score a model or a class of models.

    Args:
        model (`PreTrainedModel` or a subclass): the model, or its class before its weights are loaded.
        criterion, task: as for [`score_layers`].

    Raises:
        LayerPruneError: the criterion or the task needs next tokens, but the model does not predict them.
    """
    if predicts_next_token(model):
        return
    asking = [one for one in _as_list(task) if isinstance(one, MultipleChoice) or hasattr(one, "compute")]
    if find_criterion(criterion).needs_next_token or asking:
        what = f"criterion {criterion!r}" if not asking else f"the task {type(asking[0]).__name__}"
        *others, last = [
            name for name, one in CRITERIA.items() if not (one.needs_next_token or one.needs_task)
        ]
        raise LayerPruneError(
            f"The {what} needs logits of the next token, but the model is {describe_class(model)}. Use "
            f"{', '.join(others)} or {last}, or in Python a task score(model)."
        )


def reads_text(criterion: str, task: Any) -> bool:
    """Returns whether a criterion reads calibration text. Tasks that are functions of the model do not."""
    tasks = _as_list(task)
    return find_criterion(criterion).reads_text and (
        not tasks or any(hasattr(one, "compute") for one in tasks)
    )


def _as_list(task: Any) -> list[Any]:
    if task is None:
        return []
    return list(task) if isinstance(task, (list, tuple)) else [task]


def _small_enough(stack: LayerStack, batches: list[Any], cache_mb: int) -> list[Any]:
    """Returns the batches, split into parts. The hidden states of all layers of a part fit into `cache_mb`
    MiB, or the part has a single row."""
    embeddings: Any = stack.base.get_input_embeddings().weight
    # The original depth is used so that parts, and their cached prefixes, stay the same after a removal.
    state = embeddings.shape[-1] * embeddings.element_size() * stack.lineage.original
    rows = [cache_mb * 2**20 // (state * batch["input_ids"].shape[1]) for batch in batches]
    return [part for batch, most in zip(batches, rows, strict=True) for part in split_rows(batch, most)]


def _task_label(task: Any) -> str:
    if isinstance(task, MultipleChoice):
        return repr((task.batch_tokens, task.encoded))
    return getattr(task, "__qualname__", type(task).__qualname__)


# Config fields that are set by saving and loading. They do not change the model.
SET_BY_SAVING = ("architectures", "dtype", "_name_or_path")


def _without(fields: Any, names: tuple[str, ...]) -> Any:
    """Returns a config as a mapping, without the fields of these names."""
    if not isinstance(fields, dict):
        return fields
    return {name: _without(value, names) for name, value in fields.items() if name not in names}


def fingerprint(models: list[Any], batches: list[Any], settings: list[Any]) -> str:
    """Returns a hash of the configs, of some values of each weight, of the batches, and of the settings."""
    present = [model for model in models if model is not None]
    configs = [_without(model.config.to_dict(), SET_BY_SAVING) for model in present]
    digest = hashlib.sha256(repr((settings, configs)).encode())
    tensors = [tensor for model in present for tensor in model.state_dict().values()]
    samples = [tensor.flatten()[:: max(1, tensor.numel() // 1000)] for tensor in tensors]
    for tensor in [*samples, *(value for batch in batches for value in batch.values())]:
        digest.update(repr((tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def check_plot_path(path: str | Path) -> None:
    """Checks, before scoring begins, that [`ScoreTable.plot`] can write to `path`.

    Raises:
        LayerPruneError: the folder does not exist, or the file ending is not an image format.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:] not in kinds or not Path(path).absolute().parent.is_dir():
        raise LayerPruneError(
            f"Cannot write a picture to {path}: its folder must exist, and its ending be one of "
            f"{', '.join(sorted(kinds))}."
        )
