"""Recipes: YAML files with settings for the removal, replacement and training of layers."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from ..distillation.arguments import DistillationTrainingArguments
from ..errors import LayerPruneError, choose_from
from ..files import whole_file
from ..pruning.arguments import PruningArguments, ReconstructionArguments, RemovalArguments
from ..pruning.prune import SELECTIONS
from ..pruning.replacement import KINDS
from ..reports.record import changed_settings, is_secret
from .arguments import DATA_HELP, ModelArguments, TeacherArguments, TextArguments, TrainingSampleArguments
from .fields import check_fields


SHIPPED = Path(__file__).parent
REPLACEMENT_LOSSES = {
    "mse": {"kl_weight": 0.0, "ce_weight": 0.0, "hidden_weight": 1.0},
    "lm": {"kl_weight": 0.0, "ce_weight": 1.0, "hidden_weight": 0.0},
    "kl": {"kl_weight": 1.0, "ce_weight": 0.0, "hidden_weight": 0.0},
}
SETTINGS_NAME = "layer_pruning.yaml"  # file of the settings of a run, beside its model
OF_THE_FOLDER = ("output_dir", "resume", "resume_from_checkpoint")
OF_THE_MACHINE = ("use_cpu", "dataloader_pin_memory")


class _Loader(yaml.SafeLoader):
    """Reads 5e-5 as a number, as in YAML 1.2. PyYAML reads it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class RecipeArguments:
    """The fields of a recipe, apart from the fields of scoring, removal and training."""

    model: str | None = field(default=None, metadata={"help": "Folder or hub id of the model."})
    data: list[str] | None = field(default=None, metadata={"help": DATA_HELP})
    title: str = field(default="Layer pruning", metadata={"help": "Name of the method, for the model card."})
    paper: str = field(default="", metadata={"help": "Reference of the method, for the model card."})
    select: str = field(
        default="phases",
        metadata={
            "help": "Which layers go. phases: in phases, with training after each; greedy: one after "
            "another; one_shot: the layers with the lowest scores; block: the block with the lowest "
            "score.",
            "choices": ["phases", *SELECTIONS],
        },
    )
    block_candidates: int = field(
        default=1,
        metadata={
            "help": "For select block: blocks to reconstruct and compare by KL. The block with the lowest"
            " KL on the calibration text is removed. Default: 1, no comparison."
        },
    )
    replacement: str = field(
        default="none",
        metadata={
            "help": "For select block: what replaces it. auto: a linear map where the model allows it, "
            "otherwise nothing.",
            "choices": ["auto", *KINDS],
        },
    )
    replacement_layers: int = field(default=1, metadata={"help": "Layers in the replacement."})
    replacement_loss: str = field(
        default="mse",
        metadata={
            "help": "Loss of the replacement. mse: to the output of the block; lm: on text; kl: to the "
            "logits of the whole model. It trains the replacement alone. A linear map minimises mse "
            "already and is trained by kl. With none, the whole pruned model is trained as after any "
            "removal.",
            "choices": [*REPLACEMENT_LOSSES, "none"],
        },
    )

    def __post_init__(self) -> None:
        if self.replacement != "none" and self.select != "block":
            raise LayerPruneError(
                f"replacement {self.replacement} replaces a block of layers. Set select to block."
            )
        if self.block_candidates < 1 or (self.block_candidates > 1 and self.select != "block"):
            raise LayerPruneError(
                f"block_candidates is {self.block_candidates} and select is {self.select}. Choose 1 or more "
                "candidates, and set select to block to compare several."
            )
        if self.replacement == "linear" and self.replacement_loss == "mse":
            self.replacement_loss = "kl"  # the map already minimises the mse
        if self.replacement == "auto" and self.replacement_loss != "none":
            raise LayerPruneError(
                f"replacement is auto and replacement_loss {self.replacement_loss}, but there may be no "
                "replacement to train. Set replacement to linear, or replacement_loss to none."
            )

    @property
    def trains_only_replacement(self) -> bool:
        """Returns whether only the replacement is trained."""
        return self.replacement != "none" and self.replacement_loss != "none"


# The dataclasses whose fields a recipe file may set.
RECIPE_KINDS = (
    RecipeArguments,
    ModelArguments,
    TeacherArguments,
    TextArguments,
    TrainingSampleArguments,
    PruningArguments,
    DistillationTrainingArguments,
)


def shipped_recipes() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Returns the fields of a recipe, with the types of their dataclasses.

    Args:
        recipe (`str` or `Path`): the name of a recipe that comes with the package, or a YAML file of fields
            of `RECIPE_KINDS`.

    Raises:
        LayerPruneError: the recipe does not exist, it is not plain YAML, or a field or a value is wrong.
    """
    path = SHIPPED / f"{recipe}.yaml" if recipe in shipped_recipes() else Path(recipe)
    if not path.is_file():
        advice = choose_from(str(recipe), shipped_recipes())
        raise LayerPruneError(f"There is no recipe {str(recipe)!r}. {advice}, or give a YAML file.")
    return check_fields(read_yaml(path), RECIPE_KINDS, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the values of a YAML file that are not null.

    Raises:
        LayerPruneError: the file does not exist, it is not a mapping in plain YAML, or it allows code to run.
    """
    if not path.is_file():
        raise LayerPruneError(f"No such file: {path}. Give a YAML file of lines `field: value`.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayerPruneError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise LayerPruneError(f"{path} is no recipe: it must be lines of `field: value`.")
    if values.get("trust_remote_code"):
        raise LayerPruneError(
            f"{path}: trust_remote_code is true, but a file cannot allow the code of a model to run. Leave "
            "it out, and give the flag `--trust_remote_code True` (in Python, trust_remote_code=True)."
        )
    return {name: value for name, value in values.items() if value is not None}


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes values to a YAML file for [`read_yaml`]. It allows no code to run and holds no secret."""
    left_out = [name for name in values if name == "trust_remote_code" or is_secret(name)]
    plain = {name: _plain(value) for name, value in values.items() if name not in left_out}
    with whole_file(path) as file:
        file.write(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())


def write_settings(values: Mapping[str, Any], folder: str | Path) -> None:
    """Writes the settings of a run beside its model.

    `run` and `--config` can repeat the run with this file in another folder.

    Args:
        values (mapping): the values of recipe, config file and flags.
        folder (`str` or `Path`): the output folder.
    """
    settings = {name: value for name, value in values.items() if name not in OF_THE_FOLDER}
    write_yaml(Path(folder) / SETTINGS_NAME, settings)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def check_recipe(recipe: RecipeArguments, pruning: PruningArguments, reads_text: bool = True) -> None:
    """Checks that the fields of a recipe go together.

    Args:
        recipe ([`RecipeArguments`]): settings of the selection and the replacement of layers.
        pruning ([`PruningArguments`]): settings of scoring and reconstruction.
        reads_text (`bool`, *optional*, defaults to `True`): whether there is text to train on. A stream is
            not read when `max_steps` is 0.

    Raises:
        LayerPruneError: two fields do not go together.
    """
    _check_phases_are_used(recipe.select, pruning)
    name = "reconstruction_layers" if pruning.reconstruction_layers else "block_candidates"
    if not pruning.reconstruction_layers and recipe.block_candidates == 1:
        return
    if recipe.replacement not in ("auto", "none", "linear"):
        raise LayerPruneError(
            f"{name} is set, but replacement {recipe.replacement} trains its own layer. Use replacement "
            f"auto, none or linear, or set {name} to {0 if pruning.reconstruction_layers else 1}."
        )
    if not reads_text and recipe.select != "phases":
        raise LayerPruneError(
            f"{name} trains layers on the text, but a stream is not read when max_steps is 0. Set max_steps, "
            "or leave streaming out."
        )


def _check_phases_are_used(select: str, pruning: PruningArguments) -> None:
    """Checks that settings of phases are set only for `select="phases"`.

    Raises:
        LayerPruneError: a setting of phases is set, but the selection does not use it.
    """
    if select == "phases":
        return
    always = {
        one.name for kind in (RemovalArguments, ReconstructionArguments) for one in dataclasses.fields(kind)
    }
    of_phases = [one for one in dataclasses.fields(pruning) if one.name not in always]
    idle = [one.name for one in of_phases if getattr(pruning, one.name) != one.default]
    if idle:
        raise LayerPruneError(
            f"A recipe has no use for {', '.join(idle)} with select={select!r}. Leave it out, or set select "
            "to phases."
        )


def resolved_fields(parts: Sequence[Any], args: DistillationTrainingArguments) -> dict[str, Any]:
    """Returns the fields of a run that differ from their defaults, in the form of a recipe file.

    Folders and settings of this machine are left out.

    Args:
        parts (sequence of dataclasses): instances of `RECIPE_KINDS`, without the training arguments.
        args ([`DistillationTrainingArguments`]): the training arguments.
    """
    resolved: dict[str, Any] = {}
    for part in parts:
        for one in dataclasses.fields(part):
            value = getattr(part, one.name)
            if value != one.default:
                resolved[one.name] = value
    for name in ("model", "teacher", "data"):
        if name in resolved:
            resolved[name] = _without_folders(resolved[name])
    return resolved | {k: v for k, v in changed_settings(args).items() if k not in OF_THE_MACHINE}


def _without_folders(value: str | list[str]) -> str | list[str]:
    """Returns the names of files and folders without their parents. Hub ids are not changed."""
    names = [
        Path(one).name if Path(one).exists() else one
        for one in ([value] if isinstance(value, str) else value)
    ]
    return names[0] if len(names) == 1 else names
