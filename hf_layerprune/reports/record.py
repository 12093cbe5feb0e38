"""The one record that a run leaves: settings, versions, every score table, removal and evaluation."""

import dataclasses
import json
import logging
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, TrainingArguments

from ..checkpoints.loading import is_whole, last_checkpoint
from ..checkpoints.saving import check_writable
from ..data import Batch
from ..errors import LayerPruneError
from ..evaluation.evaluate import HeldOutText
from ..files import whole_file
from ..surgery.lineage import get_lineage


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
    # By a name, as the settings of distillation stand below this file.
    method = UNHEALED if args is None else DISTILLED if hasattr(args, "kl_weight") else TRAINED
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
        "texts": {},
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


def describe_texts(calibration: Any, batches: Sequence[Batch], evaluation: Any) -> dict[str, Any]:
    """Returns [`describe_text`] of what layers are scored on, and of the text of a [`HeldOutText`].

    Args:
        calibration (`Any`): where the batches are from.
        batches (sequence of dict): read to score layers; none for a criterion that reads no text.
        evaluation (`Any`): an evaluation of the run.
    """
    texts = {"calibration": describe_text(calibration, batches)} if batches else {}
    if isinstance(evaluation, HeldOutText):
        texts["evaluation"] = describe_text(evaluation.data, evaluation.batches)
    return texts


def describe_text(data: Any, batches: Sequence[Batch] | None = None) -> dict[str, Any]:
    """Returns what a card says of a text: its `name`, where the data set knows one, and, where they can be
    counted, its `sequences` and their `tokens` without padding.

    Args:
        data (`Dataset`, `DataLoader` or other): where the text is from.
        batches (sequence of dict, *optional*): what is read of it; left out, all of `data`.
    """
    while not hasattr(data, "info") and hasattr(data, "dataset"):  # a loader, or the share of one process
        data = data.dataset
    found: dict[str, Any] = {"name": _name_of(getattr(data, "info", None))}
    if batches is not None:
        found["sequences"] = sum(len(batch["input_ids"]) for batch in batches)
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
        found["tokens"] = sum(int(mask.sum()) for mask in masks)
    elif isinstance(data, Dataset) and "input_ids" in data.column_names:
        found["sequences"] = len(data)
        rows: Any = data.with_format("numpy")
        if "attention_mask" in data.column_names:
            found["tokens"] = sum(int(np.sum(mask)) for mask in rows["attention_mask"])
        else:
            found["tokens"] = sum(len(ids) for ids in rows["input_ids"])
    return found


def count_tokens(args: TrainingArguments, data: Any, tokenizer: Any = None) -> bool:
    """Makes the Trainer count the tokens it trains on, in `args`, in place, unless it does already.

    Args:
        data (`Dataset` or other): what it trains on.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): knows the padding, which does not count.

    Returns:
        `bool`: whether they are counted. They cannot be where the data has no `input_ids`, as for GRPO.
    """
    columns = _columns_of(data)
    if args.include_num_input_tokens_seen == "no":
        # A stream does not say what is in it, but distillation reads input_ids only.
        if "input_ids" not in columns and not hasattr(args, "kl_weight"):
            return False
        padded = "attention_mask" in columns or getattr(tokenizer, "pad_token_id", None) is not None
        args.include_num_input_tokens_seen = "non_padding" if padded else "all"
    return True


def _columns_of(data: Any) -> list[str]:
    while hasattr(data, "dataset"):  # the share of one process
        data = data.dataset
    if getattr(data, "column_names", None):
        return list(data.column_names)
    if isinstance(data, IterableDataset) or not hasattr(
        type(data), "__getitem__"
    ):  # of torch the first has it
        return []
    first = data[0]
    return list(first) if isinstance(first, Mapping) else []


def _name_of(info: Any) -> str | None:
    """The name of a data set; one that was read from files has that of their kind instead, as "json"."""
    name, kind = getattr(info, "dataset_name", None), getattr(info, "builder_name", None)
    if name is None or name == kind:
        return None
    return name if info.config_name in (None, "default") else f"{name}, {info.config_name}"


def write_record(record: Record, folder: str | Path) -> None:
    """Write the record into `folder`, whole or not at all."""
    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps(record, indent=1).encode())


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


def check_folder_is_free(folder: str | Path, resume: str | None = None) -> None:
    """Make `folder` if there is none, and check that a new run may write into it.

    Args:
        folder (`str` or `Path`): where the run is to write.
        resume (`str`, *optional*): how the user resumes such a run, where that can be.

    Raises:
        LayerPruneError: it holds another run or model already, or cannot be written to.
    """
    check_writable(folder)
    record = read_record(folder)
    # A run that broke off before its first checkpoint left nothing but its record and half of that.
    names = ["config.json", "adapter_config.json"] + [RECORD_NAME] * bool(record and record["finished"])
    found = [name for name in names if (Path(folder) / name).exists()]
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if is_whole(path) or not record]
    found += sorted(path.name for path in checkpoints)
    if found:
        advice = f", or resume that run with {resume}" if resume and any(map(is_whole, checkpoints)) else ""
        raise LayerPruneError(
            f"The output folder {folder} already holds another run or model ({found[0]}). Choose a new folder"
            f"{advice}."
        )


def check_same_settings(begun: Mapping[str, Any], present: Mapping[str, Any], folder: str | Path) -> None:
    """Check that a run goes on with the settings it began with.

    Raises:
        LayerPruneError: it began with others, naming both.
    """
    changed = [name for name, value in present.items() if begun.get(name) != value]
    if changed:
        each = ", ".join(f"{name}={begun.get(name)}, not {present[name]}" for name in changed)
        raise LayerPruneError(
            f"The run in {folder} began with {each}. Resume it with the settings it began with, or start a "
            "new run in another folder."
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
