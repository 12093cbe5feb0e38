"""Runs phases in which a separate command trains: DeepSpeed, FSDP, or any other trainer of plain models."""

import gc
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoints.saving import save_model
from ..data.batches import make_batches
from ..errors import LayerPruneError
from ..reports.machine import peak_memory_mb
from ..reports.record import (
    COMMANDED,
    Removal,
    RunRecord,
    check_folder_is_free,
    check_same_settings,
    read_record,
    start_record,
    write_record,
)
from ..reports.texts import describe_texts
from ..scoring.score import check_choices, reads_text
from ..surgery.lineage import get_lineage
from .arguments import PhaseSizeArguments, make_arguments, record_settings
from .prune import (
    Evaluation,
    check_plan,
    phase_entry,
    remove_least,
    run_evaluation,
    score_present,
    scoring_settings,
)
from .schedule import phase_sizes
from .target import resolve_target


logger = logging.getLogger(__name__)

PLACES = ("{model}", "{output_dir}")  # placeholders that a command must contain


def run_phases(
    load: Callable[[str | None], PreTrainedModel],
    command: Sequence[str],
    output_dir: str | Path,
    *,
    args: PhaseSizeArguments | None = None,
    calibration: Any = (),
    evaluation: Evaluation | None = None,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    **settings: Any,
) -> RunRecord:
    """Removes layers phase by phase. In each phase a command trains the pruned model in its own processes.

    Layers cannot be removed while DeepSpeed, FSDP1 or another trainer runs. The command therefore starts
    again in each phase, with a new optimizer. Each phase has a folder in `output_dir`. Its subfolder `cut`
    holds the model that the command starts with. The command saves a plain model with the same layers in the
    subfolder `healed`. After a stop, call the function again: it continues with the same phase, and the
    command may continue from its own checkpoints.

    Args:
        load (`Callable`): a function `load(folder)` that returns the model in a folder. `load(None)` returns
            the original model.
        command (sequence of `str`): the training command, with `{model}` and `{output_dir}` for these
            folders, and `{phase}` for the number of the phase.
        output_dir (`str` or `Path`): a new folder, or the folder of a stopped run.
        args ([`PhaseSizeArguments`], *optional*): settings of the scoring and of the number of layers that
            each phase removes.
        calibration (`Dataset` or sequence of dict): sequences or batches to score layers on.
        evaluation (`Callable`, *optional*): see [`LayerPruningCallback`].
        collate (`Callable`, *optional*): makes a batch of calibration rows, see [`make_batches`].
        settings (*optional*): fields of [`PhaseSizeArguments`] by name, instead of `args`.

    Returns:
        [`RunRecord`]: the run record. It is written into `output_dir` after each step.

    Raises:
        LayerPruneError: a setting is invalid, the command fails, or it saves a model with other layers.
    """
    lacking = [place for place in PLACES if not any(place in word for word in command)]
    if lacking or shutil.which(command[0]) is None:  # an empty command lacks both placeholders
        raise LayerPruneError(
            f"The command is {' '.join(command)!r}. It must begin with a program and contain "
            f"{' and '.join(PLACES)}: the model to train, and the folder to save it in."
        )
    folder = Path(output_dir)
    args = make_arguments(PhaseSizeArguments, args, settings)
    if args.target_layers is None:
        args = resolve_target(args, load(None))
    recorded = record_settings(args)
    check_choices(args.criterion, pattern=args.pattern, racing=args.racing)
    batches = make_batches(calibration, 4, collate)
    record = read_record(folder)
    if record is None:
        model = load(None)
        fixed = check_plan(model, args.target_layers, args.protected)
        check_folder_is_free(folder)
        record = start_record(model, recorded | {"protected_originals": fixed})
        record.method = COMMANDED
        read = batches if reads_text(args.criterion, None) else []
        record.texts = describe_texts(calibration, read, evaluation)
        record.dense = run_evaluation(evaluation, model)
        write_record(record, folder)
        del model
    check_same_settings(record.pruning, recorded, folder)
    began = time.monotonic() - record.seconds
    phases = record.phases
    sizes = phase_sizes(record.model["layers"], args.target_layers, args.layers_per_phase)
    for number, size in enumerate(sizes, 1):
        here = folder / f"phase_{number}"
        if number > len(phases):
            model = load(str(folder / f"phase_{number - 1}" / "healed") if phases else None)
            removals: list[Removal] = []
            for _ in range(size):
                scoring = {**scoring_settings(args), "journal": folder / "scoring.jsonl"}
                fixed = record.pruning["protected_originals"]
                table = score_present(model, batches, args.criterion, fixed, **scoring)
                removals += remove_least(model, table)
            save_model(model, here / "cut")
            phases.append(phase_entry(model, 0, removals, evaluation))
            _write(record, folder, began)
            del model
        phase = phases[number - 1]
        if phase.healed is None:
            started = time.monotonic()
            _train(command, here, number)
            model = load(str(here / "healed"))
            _check_layers(model, here / "healed", phase.kept)
            phase.healed = run_evaluation(evaluation, model) or {}
            phase.seconds = round(time.monotonic() - started, 2)
            _write(record, folder, began)
            del model
        shutil.rmtree(here / "cut", ignore_errors=True)
    record.finished = True
    _write(record, folder, began)
    return record


def _write(record: RunRecord, folder: Path, began: float) -> None:
    """Writes the record of a run that started at `began`, a time of `time.monotonic`."""
    record.seconds = round(time.monotonic() - began, 2)
    record.peak_memory_mb = max(record.peak_memory_mb, peak_memory_mb())
    write_record(record, folder)


def _train(command: Sequence[str], here: Path, number: int) -> None:
    """Runs the command of a phase."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # leave the memory to the command
    healed = here / "healed"
    places = {"{model}": here / "cut", "{output_dir}": healed, "{phase}": number}
    words = list(command)
    for place, value in places.items():
        words = [word.replace(place, str(value)) for word in words]
    logger.info("Phase %d: %s", number, " ".join(words))
    done = subprocess.run(words)
    if done.returncode:
        raise LayerPruneError(
            f"The command ended with exit code {done.returncode}: {' '.join(words)}. Call `phases` again to "
            "continue with this phase."
        )


def _check_layers(model: PreTrainedModel, healed: Path, kept: list[int]) -> None:
    """Checks that the command of a phase saved a model with the same layers."""
    lineage = get_lineage(model)
    if lineage.kept != kept:
        raise LayerPruneError(
            f"The model in {healed} has the layers {lineage.kept}, but the command was given a model with "
            f"layers {kept}. Check that the command loads {{model}}."
        )
