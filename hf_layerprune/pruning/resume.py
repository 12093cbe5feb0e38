"""Checks that a checkpoint fits the model and the settings, and reads its record."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from ..checkpoints.loading import load_lineage, runs_own_code
from ..errors import LayerPruneError
from ..reports.record import RunRecord, check_same_settings, read_record, record_in_state
from ..surgery.decoder import find_decoder, is_sharded
from ..surgery.lineage import get_lineage
from ..surgery.peft import adapter_configs, base_of
from .arguments import TARGETS, PruningArguments, named_layers


logger = logging.getLogger(__name__)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Returns the folder of the checkpoint of the present step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def callback_states(state: TrainerState) -> dict[str, Any]:
    """Returns the states of callbacks by class name, in the form of a checkpoint."""
    states: Any = state.stateful_callbacks  # annotated as the list from which the dict is made
    return states


def target_of_run(
    settings: PruningArguments, args: TrainingArguments, state: TrainerState, model: PreTrainedModel
) -> PruningArguments:
    """Returns the settings of a resumed run with the target that its start computed from the whole model.

    Raises:
        LayerPruneError: `layers` names other layers than at the start.
    """
    folder = checkpoint_folder(args, state)
    record = record_in_state(callback_states(state)) or read_record(folder)
    if record is None or settings.target_layers is not None:
        return settings
    begun: dict[str, Any] = {"target_layers": record.pruning["target_layers"]}
    if settings.layers is not None:
        # The record does not hold `layers`, but the layers that stay.
        removed = {removal.original for removal in record.removals}
        stay = sorted({*get_lineage(model).kept, *removed} - {*named_layers(settings.layers)})
        check_same_settings(record.pruning, {"protected_originals": stay}, folder)
        begun["protected"] = record.pruning["protected"]
    return replace(settings, **dict.fromkeys(TARGETS[1:]), **begun)


def resumed_record(
    args: TrainingArguments, state: TrainerState, model: PreTrainedModel, settings: dict[str, Any]
) -> RunRecord:
    """Returns the record in the checkpoint from which a run is resumed.

    Raises:
        LayerPruneError: the checkpoint has no record, or its model or settings differ.
    """
    folder = checkpoint_folder(args, state)
    # Checkpoints of earlier versions hold the record in a separate file.
    record = record_in_state(callback_states(state)) or read_record(folder)
    if record is None:
        raise LayerPruneError(
            f"Cannot resume at step {state.global_step}: the checkpoint holds no record of "
            "LayerPruningCallback. Resume from a checkpoint of a run with this callback, or start a new run."
        )
    check_same_settings(record.pruning, settings, folder)
    check_same_depth(model, str(folder))
    if args.save_only_model and not (folder / SCHEDULER_NAME).is_file():
        logger.warning(
            "%s was written with save_only_model=True and holds no state of the optimizer and the learning "
            "rate schedule: both begin anew at step %d. Leave save_only_model out to resume exactly.",
            folder,
            state.global_step,
        )
    return record


def check_same_depth(model: Any, folder: str) -> None:
    """Checks that the model in a checkpoint has the same layers as `model`.

    Raises:
        LayerPruneError: the checkpoint has other layers. The error explains how to get the same layers.
    """
    saved, present = load_lineage(folder, runs_own_code(model)), get_lineage(model)
    if saved == present:
        return
    more = [i for i, original in enumerate(present.kept) if original not in saved.kept]
    advice = f"Load the model with from_pretrained({folder!r}) before you resume"
    if adapter_configs(model):
        advice = f"Take the same layers out of the base first, with remove_layers(model, {more})"
    raise LayerPruneError(
        f"The checkpoint has {saved}, the model {present}, so its weights would go to the wrong layers. "
        f"{advice}, or use DistillationTrainer, which does this itself."
    )


def check_depth_of_weights(output_dir: str, model: nn.Module, weights: dict[str, Any], *args: Any) -> None:
    """Checks before `model` loads weights that they have the same number of layers.

    This is a pre-hook of `load_state_dict`. A plain Trainer would ignore layers that do not fit, and fail
    later in the optimizer without an explanation.

    Args:
        output_dir (`str`): the output folder of the run.
        model (`nn.Module`): the model that loads the weights.
        weights (`dict`): the state dict.

    Raises:
        LayerPruneError: the weights have more or fewer layers. The error explains how to get the same layers.
    """
    if is_sharded(model):  # its parameters have other names; on_train_begin also checks the layers
        return
    decoder: Any = find_decoder(base_of(model)).layers
    prefix = next(name for name, part in model.named_modules() if part is decoder)
    saved, own = _by_layer(weights, prefix), _by_layer(model.state_dict(), prefix)
    parts = {part for parts in saved.values() for part in parts}  # adapters may be in some layers only
    expected = {number for number, names in own.items() if names & parts}
    adapted = bool(adapter_configs(model))
    lacking = expected - set(saved) if adapted or _is_whole(model, weights, prefix) else set()
    if not set(saved) - set(own) and not lacking:
        return
    # Callbacks do not know which checkpoint the Trainer loads. Any with the same number of layers will do.
    for folder in sorted(Path(output_dir).glob("checkpoint-*")):
        if len(load_lineage(folder, runs_own_code(model)).kept) == len(saved):
            check_same_depth(model, str(folder))
    advice = "Load the model from the checkpoint before you resume"
    if adapted:
        advice = "Take the same layers out of the base first, with remove_layers"
    raise LayerPruneError(
        f"The checkpoint has the layers {sorted(saved)}, the model {sorted(expected)}, so its weights would "
        f"go to the wrong layers. {advice}, or use DistillationTrainer, which does this itself."
    )


def _by_layer(weights: dict[str, Any], prefix: str) -> dict[int, set[str]]:
    """Returns the names of the parts of each layer that has weights."""
    layers: dict[int, set[str]] = {}
    for name in weights:
        if found := re.match(rf"{re.escape(prefix)}\.(\d+)\.(.*)", name):
            layers.setdefault(int(found[1]), set()).add(found[2])
    return layers


def _is_whole(model: nn.Module, weights: dict[str, Any], prefix: str) -> bool:
    """Returns whether the weights belong to a whole model, not to one file of several."""
    own = model.state_dict()
    held = {own[name].data_ptr() for name in weights if name in own}  # tied weights are saved once
    return all(value.data_ptr() in held for name, value in own.items() if not name.startswith(f"{prefix}."))


def check_groups_of_checkpoint(optimizer: Any, state: dict[str, Any]) -> None:
    """Checks before the user's own `optimizer` loads its state that the parameter groups are the same.

    Raises:
        LayerPruneError: the groups differ. The error explains how to make them equal.
    """
    ours, saved = (
        [len(one["params"]) for one in groups] for groups in (optimizer.param_groups, state["param_groups"])
    )
    if ours != saved:
        raise LayerPruneError(
            f"The optimizer has parameter groups of {ours} parameters, but the checkpoint's has groups of "
            f"{saved}: a group whose layers were removed stays as an empty one. Make the optimizer with the "
            'same groups (an empty one is {"params": []}), or resume with the original model in '
            "DistillationTrainer, which makes the same layers leave model and optimizer."
        )
