"""Scores layers, chooses the layers to remove, removes them and adds the removals to the record."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.saving import check_configs
from ..data.batches import make_batches
from ..data.targets import Batch
from ..errors import LayerPruneError
from ..forward.hooks import undisturbed
from ..reports.machine import peak_memory_mb
from ..reports.record import Phase, Removal, RunRecord, start_record
from ..reports.texts import describe_texts
from ..scoring.prefix_cache import PrefixCache
from ..scoring.score import check_choices, check_criterion_fits, reads_text, score_layers
from ..scoring.table import ScoreTable
from ..surgery.layer_stack import LayerStack
from ..surgery.lineage import get_lineage, plain_int
from ..surgery.removal import remove_layers
from .arguments import RemovalArguments, ScoringArguments, make_arguments, record_settings
from .target import resolve_target


logger = logging.getLogger(__name__)

MAX_GAP = "max-gap"
SELECTIONS = ("greedy", "one_shot", "block")  # ways to select layers without training

Evaluation = Callable[[PreTrainedModel], dict[str, float]]


def prune_layers(
    model: PreTrainedModel,
    args: RemovalArguments | None = None,
    *,
    calibration: Any = (),
    task: Any = None,
    teacher: PreTrainedModel | None = None,
    evaluation: Evaluation | None = None,
    select: str = "greedy",
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    **settings: Any,
) -> RunRecord:
    """Removes the least important layers of `model`, in place, without training.

    Args:
        model (`PreTrainedModel`): a causal language model.
        args ([`RemovalArguments`], *optional*): settings of the scoring and of the number of layers to keep.
        calibration, task, teacher, evaluation (*optional*): see [`LayerPruningCallback`].
        select (`str`, *optional*, defaults to `"greedy"`): the layers to remove, one of
            - `"greedy"`: the layer with the lowest score, one by one. All layers are scored again after each
              removal (SLEB, 2402.09025, with `criterion="loss"`).
            - `"one_shot"`: the layers with the lowest scores, all at once (ShortGPT, 2403.03853, with
              `"block_influence"`).
            - `"block"`: the consecutive layers with the lowest common score (LLM-Streamline, 2403.19135, with
              `"block_influence"`; Gromov et al., 2403.17887, with `"angular"`).
        collate (`Callable`, *optional*): makes a batch of calibration rows, see [`make_batches`].
        settings (*optional*): fields of [`RemovalArguments`] by name, instead of `args`.

    Returns:
        [`RunRecord`]: the run record.

    Raises:
        LayerPruneError: the target cannot be reached, or a layer cannot be removed exactly.
    """
    began = time.monotonic()
    args = resolve_target(make_arguments(RemovalArguments, args, settings), model)
    _check_selection(model, args, task, teacher, select)
    fixed = check_plan(model, args.target_layers, args.protected)
    batches = make_batches(calibration, 4, collate) if reads_text(args.criterion, task) else []
    pruning = record_settings(args, teacher) | {"protected_originals": fixed, "select": select}
    record = start_record(model, pruning)
    record.texts = describe_texts(calibration, batches, evaluation)
    record.dense = run_evaluation(evaluation, model)
    scoring = {**scoring_settings(args), "teacher": teacher, "task": task, "prefix_cache": PrefixCache()}
    excess = len(get_lineage(model).kept) - args.target_layers
    named = layers_without_choice(model, args.target_layers, fixed)
    if named:
        record.phases.append(phase_entry(model, 0, remove_named(model, named), evaluation))
        excess = 0
    while excess:
        phase_began = time.monotonic()
        block_size = excess if select == "block" else 1
        if args.pattern == MAX_GAP:
            table = evenly_spaced(get_lineage(model).kept, excess)
        else:
            table = score_present(model, batches, args.criterion, fixed, block_size=block_size, **scoring)
        removals = remove_least(model, table, excess if select == "one_shot" else 1)
        excess = len(get_lineage(model).kept) - args.target_layers
        record.phases.append(phase_entry(model, 0, removals, evaluation))
        record.phases[-1].seconds = round(time.monotonic() - phase_began, 2)
    record.seconds = round(time.monotonic() - began, 2)
    record.peak_memory_mb = peak_memory_mb()
    record.finished = True
    return record


def _check_selection(
    model: PreTrainedModel, args: RemovalArguments, task: Any, teacher: Any, select: str
) -> None:
    """Checks that criterion, pattern and selection go together.

    Raises:
        LayerPruneError: criterion, pattern and selection do not go together.
    """
    pattern = "output" if args.pattern == MAX_GAP else args.pattern
    check_choices(args.criterion, task, teacher, pattern, args.racing)
    check_criterion_fits(model, args.criterion, task)
    if select not in SELECTIONS:
        raise LayerPruneError(f"select is {select!r}: choose from {', '.join(SELECTIONS)}.")
    fits = args.criterion == "positional" and select == "one_shot" and args.protected is None
    if args.pattern == MAX_GAP and not fits:
        raise LayerPruneError(
            f"pattern is {MAX_GAP!r}, which places all layers together. Set criterion to 'positional' and "
            "select to 'one_shot', and leave protected out: the first and the last layer are kept."
        )


def check_plan(
    model: PreTrainedModel, target_layers: int, protected: Sequence[int] | None
) -> list[int] | None:
    """Checks that layers can be removed until the model has `target_layers` layers.

    Returns:
        `list[int]` or `None`: the protected layers by original index; None for the first and the last layer.

    Raises:
        LayerPruneError: the target is not below the present number of layers, too few layers are not
            protected, the layers of this model cannot be removed exactly, or its configs cannot be saved.
    """
    check_configs(model)
    stack, target_layers = LayerStack(model), plain_int(target_layers)
    kept = stack.lineage.kept
    if type(target_layers) is not int or not 1 <= target_layers < len(kept):
        raise LayerPruneError(
            f"target_layers is {target_layers!r}, but the model has {len(kept)} layers. Choose a value "
            f"between 1 and {len(kept) - 1}."
        )
    ends = {0, len(kept) - 1}
    fixed = ends if protected is None else stack.check_layers(protected)
    free = [layer for layer in range(len(kept)) if layer not in fixed]
    cuts, refused = stack.removable(free)
    if len(cuts) < len(kept) - target_layers:
        why = (
            f" Layers {sorted(refused)} cannot be removed: {next(iter(refused.values()))}" if refused else ""
        )
        raise LayerPruneError(
            f"target_layers is {target_layers}, so {len(kept) - target_layers} layers must be removed, but "
            f"only {len(cuts)} can be. Raise target_layers or protect fewer layers.{why}"
        )
    if refused:
        logger.warning("Layers %s stay: %s", sorted(refused), next(iter(refused.values())))
    return None if protected is None else sorted(kept[layer] for layer in fixed)


def layers_without_choice(
    model: PreTrainedModel, target_layers: int, protected: Sequence[int] | None
) -> list[int]:
    """Returns the present indices of the layers to remove if all layers except the protected are removed.

    The list is empty if there is a choice between layers, so that they must be scored.

    Args:
        model (`PreTrainedModel`): the model.
        target_layers (`int`): number of layers to keep.
        protected (sequence of `int`, *optional*): the layers to keep, by original index. Default: no layers
            are named.
    """
    kept = get_lineage(model).kept
    free = [] if protected is None else [i for i, layer in enumerate(kept) if layer not in protected]
    return free if len(free) == len(kept) - target_layers else []


def remove_named(model: PreTrainedModel, layers: Sequence[int]) -> list[Removal]:
    """Removes layers by their present index from `model`, in place. Returns the removals without scores.

    Raises:
        LayerPruneError: the layers cannot be removed together.
    """
    kept = get_lineage(model).kept
    remove_layers(model, layers)
    return [Removal(layer, kept[layer], None) for layer in layers]


def scoring_settings(args: ScoringArguments) -> dict[str, Any]:
    """Returns the settings that [`score_layers`] takes."""
    return {
        "racing": args.racing,
        "pattern": args.pattern,
        "seed": args.scoring_seed,
        "batch_tokens": args.batch_tokens,
    }


def score_present(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    criterion: str,
    protected: Sequence[int] | None,
    **scoring: Any,
) -> ScoreTable:
    """Scores the layers of `model`, except the protected layers (by original index)."""
    kept = get_lineage(model).kept
    now = None if protected is None else [kept.index(layer) for layer in protected]
    return score_layers(model, batches, criterion, protected=now, **scoring)


def remove_least(model: PreTrainedModel, table: ScoreTable, count: int = 1) -> list[Removal]:
    """Removes the `count` least important layers, or the least important block, from `model`, in place.

    Returns:
        `list[Removal]`: the removals for the record. The first removal holds the table.

    Raises:
        LayerPruneError: the layers cannot be removed together.
    """
    starts = table.ranking()[:count]
    removals = [
        Removal(layer, table.kept[layer], table.scores[start] if layer == start else None)
        for start in starts
        for layer in range(start, start + table.block_size)
    ]
    remove_layers(model, [removal.layer for removal in removals])
    removals[0].table = table
    return removals


def evenly_spaced(kept: Sequence[int], remove: int) -> ScoreTable:
    """Returns a table that keeps evenly spaced layers: max-gap of LayerChop (2305.14864, section 3.1)."""
    left = len(kept) - remove
    stay = {round(i * (len(kept) - 1) / max(1, left - 1)) for i in range(left)}
    scores = {i: float(i in stay) for i in range(len(kept))}
    return ScoreTable("positional", scores, None, list(kept))


def phase_entry(
    model: PreTrainedModel, step: int, removals: list[Removal], evaluation: Evaluation | None
) -> Phase:
    """Returns the entry of a phase for the record, directly after its removals."""
    return Phase(
        step=step,
        removals=removals,
        kept=get_lineage(model).kept,
        parameters=model.num_parameters(),
        cut=run_evaluation(evaluation, model),
    )


def run_evaluation(evaluation: Evaluation | None, model: PreTrainedModel) -> dict[str, float] | None:
    """Returns the result of `evaluation` with `model` in eval mode. The random state does not change."""
    if evaluation is None:
        return None
    with undisturbed(model):
        return evaluation(model)
