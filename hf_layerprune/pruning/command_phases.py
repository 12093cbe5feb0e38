"""Phases that a command of their own trains: with DeepSpeed, FSDP, or any other trainer of plain models."""

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
from ..data import make_batches
from ..errors import LayerPruneError
from ..reports.record import (
    COMMANDED,
    Record,
    check_folder_is_free,
    check_same_settings,
    describe_texts,
    peak_memory_mb,
    read_record,
    start_record,
    write_record,
)
from ..scoring.score import check_choices, reads_text
from ..surgery.lineage import get_lineage, plain_int
from .prune import Evaluation, check_plan, phase_entry, remove_least, run_evaluation, score_present
from .schedule import phase_sizes


logger = logging.getLogger(__name__)

PLACES = ("{model}", "{output_dir}")  # what a command must name


def run_phases(
    load: Callable[[str | None], PreTrainedModel],
    command: Sequence[str],
    output_dir: str | Path,
    *,
    target_layers: int,
    calibration: Any,
    layers_per_phase: int | float = 1,
    criterion: str = "loss",
    racing: float | None = None,
    protected: Sequence[int] | None = None,
    pattern: str = "output",
    seed: int = 0,
    evaluation: Evaluation | None = None,
) -> Record:
    """Remove layers and let a command train what is left, phase by phase, each in processes of its own.

    What cannot lose layers while it runs (DeepSpeed, FSDP1, other trainers) is so started anew for each
    phase, with a new optimizer. In `output_dir` each phase has a folder: `cut`, the model that the command
    begins with, and `healed`, where it leaves a plain model of the same layers. Called again after a stop, it
    goes on with the phase it was in, and the command may go on from its own checkpoints in `healed`.

    Args:
        load (`Callable`): a function `load(folder)` that gives the model there, and the original for None.
        command (sequence of `str`): what trains a phase, with `{model}` and `{output_dir}` for these folders,
            and `{phase}` for its number, as for a seed.
        output_dir (`str` or `Path`): a new folder, or that of a run that was stopped.
        calibration (`Dataset` or sequence of dict): sequences or batches to score with.
        others: see [`LayerPruningCallback`].

    Returns:
        `dict`: the run record; it is written after each step into `output_dir`.

    Raises:
        LayerPruneError: a setting that cannot work, a command that fails, or one that leaves another model
            than it was to train.
    """
    lacking = [place for place in PLACES if not any(place in word for word in command)]
    if lacking or shutil.which(command[0]) is None:  # an empty command lacks both
        raise LayerPruneError(
            f"The command {' '.join(command)!r} must be a program, and name {' and '.join(PLACES)}, for the "
            "model that it is to train and the folder where to leave it."
        )
    folder = Path(output_dir)
    target_layers, layers_per_phase = plain_int(target_layers), plain_int(layers_per_phase)
    settings = {
        "target_layers": target_layers,
        "layers_per_phase": layers_per_phase,
        "criterion": criterion,
        "racing": racing,
        "protected": None if protected is None else [plain_int(layer) for layer in protected],
        "pattern": pattern,
        "seed": seed,
    }
    check_choices(criterion, pattern=pattern, racing=racing)
    batches = make_batches(calibration, 4)
    record = read_record(folder)
    if record is None:
        model = load(None)
        fixed = check_plan(model, target_layers, protected)
        check_folder_is_free(folder)
        record = start_record(model, settings | {"protected_originals": fixed}) | {"method": COMMANDED}
        record["texts"] = describe_texts(
            calibration, batches if reads_text(criterion, None) else [], evaluation
        )
        record["dense"] = run_evaluation(evaluation, model)
        write_record(record, folder)
        del model
    check_same_settings(record["pruning"], settings, folder)
    began = time.monotonic() - record["seconds"]

    def note() -> None:
        record["seconds"] = round(time.monotonic() - began, 2)
        record["peak_memory_mb"] = max(record["peak_memory_mb"], peak_memory_mb())
        write_record(record, folder)

    phases, present = record["phases"], record["model"]["layers"]
    sizes = phase_sizes(present, target_layers, layers_per_phase)
    for number, size in enumerate(sizes, 1):
        here = folder / f"phase_{number}"
        if number > len(phases):
            model = load(str(folder / f"phase_{number - 1}" / "healed") if phases else None)
            removals: list[dict[str, Any]] = []
            for _ in range(size):
                scoring: dict[str, Any] = {"racing": racing, "pattern": pattern, "seed": seed}
                scoring |= {"journal": folder / "scoring.jsonl"}
                fixed = record["pruning"]["protected_originals"]
                table = score_present(model, batches, criterion, fixed, **scoring)
                removals += remove_least(model, table)
            save_model(model, here / "cut")
            phases.append(phase_entry(model, 0, removals, evaluation))
            note()
            del model
        if phases[number - 1]["healed"] is None:
            started = time.monotonic()
            _train(command, here, number)
            model = load(str(here / "healed"))
            _check_layers(model, here / "healed", phases[-1]["kept"])
            seconds = round(time.monotonic() - started, 2)
            phases[-1] |= {"healed": run_evaluation(evaluation, model) or {}, "seconds": seconds}
            note()
            del model
        shutil.rmtree(here / "cut", ignore_errors=True)
    record["finished"] = True
    note()
    return record


def _train(command: Sequence[str], here: Path, number: int) -> None:
    """Run the command of a phase."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the command
    healed = here / "healed"
    places = {"{model}": here / "cut", "{output_dir}": healed, "{phase}": number}
    words = list(command)
    for place, value in places.items():
        words = [word.replace(place, str(value)) for word in words]
    logger.info("Phase %d: %s", number, " ".join(words))
    done = subprocess.run(words)
    if done.returncode:
        raise LayerPruneError(
            f"The command ended with exit code {done.returncode}: {' '.join(words)}. Called again, the run "
            "goes on with this phase."
        )


def _check_layers(model: PreTrainedModel, healed: Path, kept: list[int]) -> None:
    """Check that the command of a phase left the layers that it was given."""
    lineage = get_lineage(model)
    if lineage.kept != kept:
        raise LayerPruneError(
            f"The command was to leave a model with the layers {kept} in {healed}, but left one with "
            f"{lineage.kept}: does it load the model that {{model}} names?"
        )
