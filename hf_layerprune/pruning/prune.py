"""One removal after another: score, choose, remove, note it in the record."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.saving import check_configs
from ..data import Batch, make_batches
from ..errors import LayerPruneError
from ..forward.hooks import undisturbed
from ..reports.record import Record, describe_texts, peak_memory_mb, start_record
from ..scoring.leave_one_out import Prefixes
from ..scoring.score import check_choices, check_criterion_fits, reads_text, score_layers
from ..scoring.table import ScoreTable
from ..surgery.lineage import get_lineage, plain_int
from ..surgery.removal import check_layers, possible_cuts, remove_layers


logger = logging.getLogger(__name__)

MAX_GAP = "max-gap"
SELECTIONS = ("greedy", "one_shot", "run")  # without training

Evaluation = Callable[[PreTrainedModel], dict[str, float]]


def prune_layers(
    model: PreTrainedModel,
    *,
    target_layers: int,
    criterion: str = "loss",
    calibration: Any = (),
    task: Any = None,
    protected: Sequence[int] | None = None,
    evaluation: Evaluation | None = None,
    racing: float | None = None,
    teacher: PreTrainedModel | None = None,
    pattern: str = "output",
    seed: int = 0,
    select: str = "greedy",
) -> Record:
    """Remove the least important layers of `model`, in place, without training.

    Args:
        model (`PreTrainedModel`): a causal language model.
        select (`str`, *optional*, defaults to `"greedy"`): one by one, all scored again after each (SLEB,
            2402.09025, with `criterion="loss"`); `"one_shot"`, those that score least at once (ShortGPT,
            2403.03853, with `"block_influence"`); or `"run"`, the run of layers that scores least together
            (LLM-Streamline, 2403.19135, with `"block_influence"`; Gromov et al., 2403.17887, with
            `"angular"`).
        others: see [`LayerPruningCallback`].

    Returns:
        `dict`: the run record.

    Raises:
        LayerPruneError: the target cannot be reached, or a layer cannot be removed exactly.
    """
    began, target_layers = time.monotonic(), plain_int(target_layers)
    check_choices(criterion, task, teacher, "output" if pattern == MAX_GAP else pattern, racing)
    check_criterion_fits(model, criterion, task)
    if select not in SELECTIONS:
        raise LayerPruneError(f"select is {select!r}: choose from {', '.join(SELECTIONS)}.")
    if pattern == MAX_GAP and (criterion != "positional" or select != "one_shot" or protected is not None):
        raise LayerPruneError(
            f"pattern={MAX_GAP!r} goes with criterion='positional' and select='one_shot', as it is of all "
            "layers together, and protects the first and the last."
        )
    scoring: dict[str, Any] = {"racing": racing, "teacher": teacher, "pattern": pattern, "seed": seed}
    fixed = check_plan(model, target_layers, protected)
    batches = make_batches(calibration, 4) if reads_text(criterion, task) else []
    settings = {"target_layers": target_layers, "criterion": criterion, "protected_originals": fixed}
    settings["select"] = select
    record = start_record(model, settings | plain_settings(scoring))
    scoring |= {"prefixes": Prefixes(), "task": task}
    record["texts"] = describe_texts(calibration, batches if reads_text(criterion, task) else [], evaluation)
    record["dense"] = run_evaluation(evaluation, model)
    excess = len(get_lineage(model).kept) - target_layers
    while excess:
        phase_began = time.monotonic()
        run = excess if select == "run" else 1
        if pattern == MAX_GAP:
            table = evenly_spaced(get_lineage(model).kept, excess)
        else:
            table = score_present(model, batches, criterion, fixed, run=run, **scoring)
        removals = remove_least(model, table, excess if select == "one_shot" else 1)
        excess = len(get_lineage(model).kept) - target_layers
        seconds = {"seconds": round(time.monotonic() - phase_began, 2)}
        record["phases"].append(phase_entry(model, 0, removals, evaluation) | seconds)
    record |= {
        "seconds": round(time.monotonic() - began, 2),
        "peak_memory_mb": peak_memory_mb(),
        "finished": True,
    }
    return record


def check_plan(
    model: PreTrainedModel, target_layers: int, protected: Sequence[int] | None
) -> list[int] | None:
    """Check that layers can be removed until `target_layers` are left.

    Returns:
        `list[int]` or `None`: the protected layers by original index; None for the first and the last.

    Raises:
        LayerPruneError: the target is not below the present depth, too few layers are free to go, this
            model cannot be cut exactly, or its configs cannot be saved.
    """
    check_configs(model)
    kept, target_layers = get_lineage(model).kept, plain_int(target_layers)
    if type(target_layers) is not int or not 1 <= target_layers < len(kept):
        raise LayerPruneError(
            f"target_layers is {target_layers!r}, but the model has {len(kept)} layers: it must be "
            f"between 1 and {len(kept) - 1}."
        )
    ends = {0, len(kept) - 1}
    fixed = ends if protected is None else check_layers(model, protected)
    free = [layer for layer in range(len(kept)) if layer not in fixed]
    cuts, refused = possible_cuts(model, free)
    if len(cuts) < len(kept) - target_layers:
        why = (
            f" Layers {sorted(refused)} cannot be removed: {next(iter(refused.values()))}" if refused else ""
        )
        raise LayerPruneError(
            f"{len(kept) - target_layers} layers shall go, but only {len(cuts)} are not protected: "
            f"raise target_layers or protect fewer.{why}"
        )
    if refused:
        logger.warning("Layers %s stay: %s", sorted(refused), next(iter(refused.values())))
    return None if protected is None else sorted(kept[layer] for layer in fixed)


def score_present(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    criterion: str,
    protected: Sequence[int] | None,
    **scoring: Any,
) -> ScoreTable:
    """Score the layers of `model` that are not protected (by original index)."""
    kept = get_lineage(model).kept
    now = None if protected is None else [kept.index(layer) for layer in protected]
    return score_layers(model, batches, criterion, protected=now, **scoring)


def plain_settings(scoring: dict[str, Any]) -> dict[str, Any]:
    """Arguments of [`score_layers`] as a record holds them."""
    return {
        name: value if isinstance(value, (str, int, float)) else type(value).__name__
        for name, value in scoring.items()
        if value is not None
    }


def remove_least(model: PreTrainedModel, table: ScoreTable, count: int = 1) -> list[dict[str, Any]]:
    """Remove the `count` layers that matter least by `table`, or the run that does, from `model`, in place;
    return their entries in the record, the first with the table.

    Raises:
        LayerPruneError: they cannot be removed together.
    """
    starts = table.ranking()[:count]
    entries: list[dict[str, Any]] = [
        {
            "layer": layer,
            "original": table.kept[layer],
            "score": table.scores[start] if layer == start else None,
        }
        for start in starts
        for layer in range(start, start + table.run)
    ]
    remove_layers(model, [entry["layer"] for entry in entries])
    entries[0]["table"] = table.to_dict()
    return entries


def evenly_spaced(kept: Sequence[int], remove: int) -> ScoreTable:
    """LayerChop (2305.14864, section 3.1), max-gap: the layers left lie evenly from the first to the last."""
    left = len(kept) - remove
    stay = {round(i * (len(kept) - 1) / max(1, left - 1)) for i in range(left)}
    scores = {i: float(i in stay) for i in range(len(kept))}
    return ScoreTable("positional", scores, None, list(kept))


def phase_entry(
    model: PreTrainedModel,
    step: int,
    removals: list[dict[str, Any]],
    evaluation: Evaluation | None,
) -> dict[str, Any]:
    """The entry of a phase in the record, as it stands right after its removals."""
    return {
        "step": step,
        "removals": removals,
        "kept": get_lineage(model).kept,
        "parameters": model.num_parameters(),
        "cut": run_evaluation(evaluation, model),
        "healed": None,
        "seconds": 0.0,
    }


def run_evaluation(evaluation: Evaluation | None, model: PreTrainedModel) -> dict[str, float] | None:
    """What `evaluation` finds, with `model` in eval mode and the random state left as it is."""
    if evaluation is None:
        return None
    with undisturbed(model):
        return evaluation(model)
