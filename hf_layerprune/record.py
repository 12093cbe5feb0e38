"""The one record that a run leaves: settings, versions, every score table, removal and evaluation."""

import dataclasses
import json
import logging
import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from .arguments import DistillationTrainingArguments
from .checkpoint import is_whole, last_checkpoint
from .errors import LayerPruneError
from .lineage import get_lineage
from .saving import check_writable


logger = logging.getLogger(__name__)

RECORD_NAME = "layer_pruning.json"
# What a run did, by how it healed.
DISTILLED = {
    "name": "Iterative Layer-wise Distillation",
    "url": "https://arxiv.org/abs/2511.05085",
    "healing": "healed by distillation",
}
TRAINED = {
    "name": "Iterative layer pruning",
    "url": "https://arxiv.org/abs/2511.05085",
    "healing": "healed by training on its loss",
}
COMMANDED = {
    "name": "Iterative layer pruning",
    "url": "https://arxiv.org/abs/2511.05085",
    "healing": "healed in each phase by a command of its own",
}
UNHEALED = {
    "name": "Greedy layer removal",
    "url": "https://arxiv.org/abs/2402.09025",
    "healing": "not healed",
}

Record = dict[str, Any]


def start_record(
    model: PreTrainedModel, settings: dict[str, Any], args: TrainingArguments | None = None
) -> Record:
    """The record of a run that begins with `model`, before anything has happened."""
    name = Path(model.config._name_or_path)  # of a local model without the path of this machine
    if args is None:
        method = UNHEALED
    else:
        method = DISTILLED if isinstance(args, DistillationTrainingArguments) else TRAINED
    return {
        "format": 1,
        "method": method,
        "model": {
            "name": name.name if name.is_absolute() or name.exists() else str(name),
            "model_type": model.config.model_type,
            "layers": len(get_lineage(model).kept),
            "parameters": model.num_parameters(),
        },
        "pruning": settings,
        "training": {} if args is None else changed_settings(args),
        **surroundings(model),
        "dense": None,
        "phases": [],
        "evaluations": [],
        "log": [],
        "stopped": None,
        "seconds": 0.0,
        "peak_memory_mb": 0,
        "finished": False,
    }


def surroundings(model: PreTrainedModel) -> dict[str, Any]:
    """On what something is measured: versions and machine."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "hf-layerprune")},
        },
        "machine": {
            "device": str(model.device),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cpu_threads": torch.get_num_threads(),
        },
    }


def write_record(record: Record, folder: str | Path) -> None:
    """Write the record into `folder`, whole or not at all."""
    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_record(folder: str | Path) -> Record | None:
    """The record in `folder`, None if it holds none.

    Raises:
        LayerPruneError: the file there is no record.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != 1:
            raise ValueError(f"format {record['format']}")
    except (ValueError, KeyError, TypeError) as error:
        raise LayerPruneError(f"{path} is not a record of this version: {error}") from error
    return record


def check_folder_is_free(folder: str | Path) -> None:
    """Make `folder` if there is none, and check that a new run may write into it.

    Raises:
        LayerPruneError: it holds another run or model already, or cannot be written to.
    """
    check_writable(folder)
    record = read_record(folder)
    # A run that broke off before its first checkpoint left nothing but its record and half of that.
    names = ["config.json", "adapter_config.json"] + [RECORD_NAME] * bool(record and record["finished"])
    found = [name for name in names if (Path(folder) / name).exists()]
    checkpoints = Path(folder).glob("checkpoint-*")
    found += sorted(path.name for path in checkpoints if is_whole(path) or not record)
    if found:
        raise LayerPruneError(
            f"The output folder {folder} already holds another run or model ({found[0]}): choose a new "
            "one, or resume that run (resume_from_checkpoint=True)."
        )


def checkpoint_of(folder: str | Path) -> str | None:
    """The checkpoint from which the run in `folder` goes on; None of one that broke off before its first,
    which begins again.

    Raises:
        LayerPruneError: there is no such run, or it is finished.
    """
    found, begun = last_checkpoint(folder), read_record(folder)
    if found is None and (begun is None or begun["finished"]):
        raise LayerPruneError(f"No checkpoint to resume from in {folder}.")
    if found is None:
        logger.warning("The run in %s came to no checkpoint: it begins again.", folder)
    return found


def peak_memory_mb() -> int:
    """The most memory this process has held so far: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    # Linux counts in kB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def changed_settings(args: Any) -> dict[str, Any]:
    """The training arguments that are not at their default, without folders and secrets."""
    values = args.to_dict()
    changed = {}
    for field in dataclasses.fields(args):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        value = values[field.name]
        private = field.name.endswith(("_dir", "_token", "run_name", "hub_model_id"))
        filled_in = default is None and not value  # by transformers, when it was left out
        plain = isinstance(value, (int, float, str)) or field.name in ("hidden_layers", "lr_scheduler_kwargs")
        if plain and value != default and not private and not filled_in:
            changed[field.name] = value
    return {**changed, "seed": args.seed, "max_steps": args.max_steps}
