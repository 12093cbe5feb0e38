"""Stores the record of a run: settings, versions, and every score table, removal and evaluation."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints.loading import is_whole, last_checkpoint
from ..checkpoints.saving import check_writable
from ..errors import LayerPruneError
from ..files import whole_file
from ..scoring.table import ScoreTable
from ..surgery.lineage import get_lineage
from .machine import surroundings


logger = logging.getLogger(__name__)

RECORD_NAME = "layer_pruning.json"
# The method of a run, by the training of the pruned model.
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

Record = dict[str, Any]  # a RunRecord as JSON holds it


@dataclass
class Removal:
    """A layer that was removed.

    Args:
        layer (`int`): index of the layer in the model before the removal.
        original (`int`): index of the layer in the original model.
        score (`float`, *optional*): score of the layer. If several layers are removed together, only the
            first has a score.
        table ([`ScoreTable`], *optional*): the scores by which the layer was chosen. If several layers are
            removed together, only the first has a table.
    """

    layer: int
    original: int
    score: float | None
    table: ScoreTable | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the removal as plain values for JSON."""
        values = {"layer": self.layer, "original": self.original, "score": self.score}
        return values if self.table is None else values | {"table": self.table.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Removal":
        """Returns the removal from values of [`~Removal.to_dict`]."""
        table = values.get("table")
        return cls(**{**values, "table": None if table is None else ScoreTable.from_dict(table)})


@dataclass
class Phase:
    """Layers that were removed together, and the training after them.

    Args:
        step (`int`): the training step before which the layers were removed.
        removals (`list[Removal]`): the removed layers, in order.
        kept (`list[int]`): the layers after the removals, by original index.
        parameters (`int`): the parameters after the removals.
        cut (`dict[str, float]`, *optional*): the evaluation after the removals.
        healed (`dict[str, float]`, *optional*): the evaluation after the training.
        seconds (`float`, *optional*): the time of the phase in seconds.
        tokens (`int`, *optional*): the training tokens before the phase.
        qualities (`dict[str, float]`, *optional*): for `min_recovery`, the quality `before` the removals,
            right after them (`cut`), and at the end of the phase (`now`).
        reconstruction (`dict`, *optional*): the result of [`reconstruct_layers`] after the removals, and its
            `seconds`.
        candidates (`list[dict]`, *optional*): the blocks that were compared by KL before the removals, with
            their `layers` (original indices), `score` and `kl`.
    """

    step: int
    removals: list[Removal]
    kept: list[int]
    parameters: int
    cut: dict[str, float] | None = None
    healed: dict[str, float] | None = None
    seconds: float = 0.0
    tokens: int | None = None
    qualities: dict[str, float] | None = None
    reconstruction: dict[str, Any] | None = None
    candidates: list[dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the phase as plain values for JSON."""
        values = _set_values(self, optional=("tokens", "qualities", "reconstruction", "candidates"))
        return values | {"removals": [removal.to_dict() for removal in self.removals]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Phase":
        """Returns the phase from values of [`~Phase.to_dict`]."""
        return cls(**{**values, "removals": [Removal.from_dict(one) for one in values["removals"]]})


@dataclass
class RunRecord:
    """The record of a run. Cards, plots and tables are made from it, and a resumed run reads it.

    Args:
        method (`dict`): `name`, `url` and `healing` of the method.
        model (`dict`): `name`, `model_type`, `layers` and `parameters` of the original model.
        pruning (`dict`): the settings of scoring and removal.
        training (`dict`): the training arguments that differ from their default.
        versions, machine (`dict`): see [`surroundings`].
        texts (`dict`): for each use of a text, the result of [`describe_text`].
        dense (`dict[str, float]`, *optional*): the evaluation of the original model.
        phases (`list[Phase]`): the phases so far.
        evaluations (`list[dict]`): the evaluations of the Trainer, with `step` and `layers`.
        log (`list[dict]`): the log of the Trainer.
        stopped (`str`, *optional*): the reason why the run removed fewer layers than requested.
        seconds (`float`): the time of the run in seconds.
        peak_memory_mb (`int`): the peak memory in MB.
        finished (`bool`): whether the run was completed.
        format (`int`): the version of the file format.
        warnings (`list[str]`): the warnings of the run.
        undone (`Phase`, *optional*): the phase whose layers were put back.
        recipe (`dict`, *optional*): the recipe of the run.
        evaluation (`dict`, *optional*): a comparison with the original model, made after the run.
        resumed_at (`str`, *optional*): the checkpoint from which a recipe was resumed.
    """

    method: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    dense: dict[str, float] | None = None
    phases: list[Phase] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    seconds: float = 0.0
    peak_memory_mb: int = 0
    finished: bool = False
    format: int = 1
    warnings: list[str] = field(default_factory=list)
    undone: Phase | None = None
    recipe: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    resumed_at: str | None = None

    @property
    def removals(self) -> list[Removal]:
        """All removals so far, in order."""
        return [removal for phase in self.phases for removal in phase.removals]

    def to_dict(self) -> Record:
        """Returns the record as plain values for JSON. Values that are not set are left out."""
        values = _set_values(self, optional=("warnings", "undone", "recipe", "evaluation", "resumed_at"))
        values["phases"] = [phase.to_dict() for phase in self.phases]
        if self.undone is not None:
            values["undone"] = self.undone.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunRecord":
        """Returns the record from values of [`~RunRecord.to_dict`]. Earlier versions can be read too."""
        values = {{"signs": "warnings"}.get(name, name): value for name, value in values.items()}
        reconstruction = values.pop("reconstruction", None)
        values["phases"] = [Phase.from_dict(phase) for phase in values.get("phases", [])]
        if reconstruction is not None:
            values["phases"][-1].reconstruction = reconstruction
        if values.get("undone") is not None:
            values["undone"] = Phase.from_dict(values["undone"])
        return cls(**values)


def _set_values(entry: Any, optional: tuple[str, ...]) -> dict[str, Any]:
    """Returns the fields of a dataclass by name, without optional fields that are not set."""
    values = {one.name: getattr(entry, one.name) for one in dataclasses.fields(entry)}
    return {name: value for name, value in values.items() if value not in (None, []) or name not in optional}


def start_record(
    model: PreTrainedModel, settings: dict[str, Any], args: TrainingArguments | None = None
) -> RunRecord:
    """Returns the record of a run that begins with `model`."""
    name = Path(model.config.name_or_path or "")  # a local model is named without its path
    # Recognised by an attribute, as this file must not import distillation.
    method = UNHEALED if args is None else DISTILLED if hasattr(args, "kl_weight") else TRAINED
    return RunRecord(
        method=method,
        model={
            "name": name.name if name.is_absolute() or name.exists() else str(name),
            "model_type": model.config.model_type,
            "layers": len(get_lineage(model).kept),
            "parameters": model.num_parameters(),
        },
        pruning=settings,
        training={} if args is None else changed_settings(args),
        **surroundings(model),
    )


def write_record(record: RunRecord, folder: str | Path) -> None:
    """Writes the record into `folder`, completely or not at all."""
    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps(record.to_dict(), indent=1).encode())


def read_record(folder: str | Path) -> RunRecord | None:
    """Returns the record in `folder`, None if there is no record.

    A checkpoint holds the record in the state of the Trainer, see [`record_in_state`].

    Raises:
        LayerPruneError: the file is not a record.
    """
    for name in (RECORD_NAME, TRAINER_STATE_NAME):
        path = Path(folder) / name
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                if name == RECORD_NAME:
                    return _checked(values)
                return record_in_state(values["stateful_callbacks"])
            except (ValueError, KeyError, TypeError) as error:
                raise LayerPruneError(f"{path} is not a record of this version: {error}") from error
    return None


def record_in_state(stateful_callbacks: Mapping[str, Any]) -> RunRecord | None:
    """Returns the record in the callback states of a checkpoint, None if there is no record.

    Args:
        stateful_callbacks (`dict`): see [`~transformers.TrainerState`].
    """
    states = [state for state in stateful_callbacks.values() if isinstance(state, Mapping)]
    records = [state["attributes"].get("record") for state in states if state.get("attributes")]
    found = [record for record in records if isinstance(record, Mapping) and "pruning" in record]
    return _checked(found[0]) if found else None


def _checked(values: Mapping[str, Any]) -> RunRecord:
    if values["format"] != 1:
        raise ValueError(f"format {values['format']}")
    return RunRecord.from_dict(values)


def check_folder_is_free(folder: str | Path, resume: str | None = None) -> None:
    """Creates `folder` if it does not exist, and checks that a new run may write into it.

    Args:
        folder (`str` or `Path`): the output folder.
        resume (`str`, *optional*): the flag or argument that resumes a run, for the error.

    Raises:
        LayerPruneError: the folder holds another run or model, or is not writable.
    """
    check_writable(folder)
    record = read_record(folder)
    # A run that was killed before its first checkpoint leaves a record and an incomplete checkpoint.
    names = ["config.json", "adapter_config.json"] + [RECORD_NAME] * bool(record and record.finished)
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
    """Checks that a resumed run has the settings that it began with.

    Raises:
        LayerPruneError: a setting differs. The error names both values.
    """
    if "seed" in begun:  # an earlier name of scoring_seed
        begun = {"scoring_seed": begun["seed"], **begun}
    changed = [name for name, value in present.items() if begun.get(name) != value]
    if changed:
        each = ", ".join(f"{name}={begun.get(name)}, not {present[name]}" for name in changed)
        raise LayerPruneError(
            f"The run in {folder} began with {each}. Resume it with the settings it began with, or start a "
            "new run in another folder."
        )


def checkpoint_of(folder: str | Path) -> str | None:
    """Returns the last checkpoint of the run in `folder`, None if it was killed before its first checkpoint.

    Raises:
        LayerPruneError: there is no run in `folder`, or the run is finished.
    """
    found, begun = last_checkpoint(folder), read_record(folder)
    if found is None and (begun is None or begun.finished):
        raise LayerPruneError(f"No checkpoint to resume from in {folder}.")
    if found is None:
        logger.warning("The run in %s came to no checkpoint: it begins again.", folder)
    return found


def is_secret(name: str) -> bool:
    """Returns whether a setting is a secret, such as `hub_token`. No file beside a model may hold it."""
    return name.endswith("_token")


def changed_settings(args: Any) -> dict[str, Any]:
    """Returns the training arguments that differ from their default, without folders and secrets."""
    values = args.to_dict()
    changed = {}
    for one in dataclasses.fields(args):
        factory = one.default_factory
        default = one.default if factory is dataclasses.MISSING else factory()
        value = values[one.name]
        private = is_secret(one.name) or one.name.endswith(("_dir", "run_name", "hub_model_id"))
        filled_in = default is None and not value  # by transformers
        plain = isinstance(value, (int, float, str)) or one.name in ("hidden_layers", "lr_scheduler_kwargs")
        if plain and value != default and not private and not filled_in:
            changed[one.name] = value
    return {**changed, "seed": args.seed, "max_steps": args.max_steps}
