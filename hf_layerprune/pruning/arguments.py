"""Settings of scoring, removal and phases. Python, the command line and recipes share them."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from ..data.arguments import BatchArguments
from ..errors import LayerPruneError, did_you_mean
from ..scoring.criteria import CRITERIA, find_criterion
from ..surgery.lineage import plain_int


@dataclass(kw_only=True)
class ScoringArguments(BatchArguments):
    """Settings of layer scoring.

    Args:
        criterion (`str`, *optional*, defaults to `"loss"`): the criterion, see [`score_layers`].
        racing (`float`, *optional*): the confidence at which [`score_layers`] stops scoring a layer.
        pattern (`str`, *optional*, defaults to `"output"`): the pattern for `criterion="positional"`.
        scoring_seed (`int`, *optional*, defaults to 0): the seed for `pattern="random"`.
        protected (`list[int]`, *optional*): layers to keep. Default: the first and the last layer.
        batch_tokens (`int`, *optional*): number of tokens in a forward pass of scoring, see
            [`BatchArguments`].
    """

    criterion: str = field(
        default="loss",
        metadata={
            "help": "Importance criterion. Use block_influence, angular, hidden_mse or positional for "
            "models that predict no next token: classifiers, encoders, reward and embedding models.",
            "choices": [
                name for name, one in CRITERIA.items() if not one.needs_task
            ],  # choices on the command line and in recipes
        },
    )
    racing: float | None = field(
        default=None,
        metadata={
            "help": "Confidence, as 0.99, to stop scoring layers that surely matter. Default: score all "
            "layers on all sequences."
        },
    )
    pattern: str = field(
        default="output",
        metadata={"help": "For positional: output, input, middle, both, random or max-gap."},
    )
    scoring_seed: int = field(default=0, metadata={"help": "Seed of the pattern random."})
    protected: list[int] | None = field(
        default=None, metadata={"help": "Present indices of layers to keep. Default: the first and the last."}
    )

    def __post_init__(self) -> None:
        if self.protected is not None:
            self.protected = [plain_int(layer) for layer in self.protected]


@dataclass(kw_only=True)
class RemovalArguments(ScoringArguments):
    """Settings of layer scoring and of the number of layers to keep. Give exactly one target.

    Args:
        target_layers (`int`, *optional*): number of layers to keep.
        target_ratio (`float`, *optional*): share of the layers to keep, for example 0.75. The number of
            layers is rounded down.
        target_parameters (`str` or `int`, *optional*): maximum number of parameters of the pruned model, for
            example `"2.4B"`. The largest number of layers of average size that fits is kept.
        target_speedup (`float`, *optional*): speedup of a forward pass, for example 1.25. It is measured by
            the FLOPs for one sequence of the default length. The largest number of layers of average cost
            that gives this speedup is kept.
        layers (list of `str` or `int`, *optional*): the layers to remove, as original indices: numbers,
            ranges (`"12-18"`) and comma lists (`"3,7,9-11"`). All other layers are protected.
    """

    # None until resolve_target() sets it from the model.
    target_layers: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Number of layers to keep. --keep is the same.", "aliases": ["--keep"]},
    )
    target_ratio: float | None = field(
        default=None, metadata={"help": "Instead, the share of layers to keep, as 0.75. Rounded down."}
    )
    target_parameters: str | None = field(
        default=None, metadata={"help": "Instead, the most parameters to keep, as 2.4B or 300M."}
    )
    target_speedup: float | None = field(
        default=None,
        metadata={
            "help": "Instead, the speedup of a forward pass (prompt processing) by its FLOPs, as 1.25."
        },
    )
    layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Instead, the layers that go, by the original numbers that `inspect` shows: 12-18, or "
            "3,7,9-11."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if not given:
            raise LayerPruneError(
                "target_layers is missing. Give the number of layers to keep, or target_ratio, "
                "target_parameters, target_speedup or layers."
            )
        if len(given) > 1:
            raise LayerPruneError(f"{' and '.join(given)} are given. Give one of them.")
        if self.target_layers is not None:
            self.target_layers = check_count("target_layers", self.target_layers)
        if self.target_ratio is not None and not 0 < self.target_ratio < 1:
            raise LayerPruneError(
                f"target_ratio is {self.target_ratio}. Choose a share between 0 and 1, as 0.75."
            )
        if self.target_parameters is not None:
            parameter_count(self.target_parameters)
        if self.target_speedup is not None and not 1 < self.target_speedup < float("inf"):
            raise LayerPruneError(
                f"target_speedup is {self.target_speedup}. Choose a number above 1, as 1.25."
            )
        if self.layers is not None:
            named_layers(self.layers)


@dataclass(kw_only=True)
class PhaseSizeArguments(RemovalArguments):
    """Settings of the number of layers that each phase removes.

    Args:
        layers_per_phase (`int` or `float`, *optional*, defaults to 1):
            Number of layers to remove in each phase, or a share of the present layers, such as 0.3 (Minitron,
            2407.14679). The layers are scored again after each removal. If the value is the number of all
            layers to remove, there is one phase.
    """

    layers_per_phase: float = field(
        default=1, metadata={"help": "Layers to remove in each phase, or a share of them, as 0.3."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.layers_per_phase
        if not (isinstance(size, float) and 0 < size < 1):  # not a share
            whole = int(size) if isinstance(size, float) and size.is_integer() else size  # flags give floats
            self.layers_per_phase = check_count("layers_per_phase", whole, "or a share between 0 and 1")


@dataclass(kw_only=True)
class ReconstructionArguments:
    """Settings of block reconstruction, which trains the layers next to a cut, see [`reconstruct_layers`].

    Args:
        reconstruction_layers (`int`, *optional*, defaults to 0):
            Number of layers on each side of a new cut to train after each removal, before training continues.
            With 0 there is no reconstruction. A plain Trainer needs a copy of the original model as teacher.
            The copy is in memory, and in the output folder until training ends. [`DistillationTrainer`] uses
            its own teacher.
        reconstruction_tokens (`int`, *optional*):
            Number of training tokens for the reconstruction. Default: the number of tokens in the training
            after the removal, which is the most for recipes that remove all layers at once. If the callback
            trains on a stream, calibration tokens are read instead.
        reconstruction_epochs (`int`, *optional*, defaults to 4):
            Number of passes over these tokens.
        reconstruction_learning_rate (`float`, *optional*):
            Peak of a cosine schedule. Default: 0.003 times the root mean square of the weights, or 0.001 for
            adapters.
    """

    reconstruction_layers: int = field(
        default=0,
        metadata={
            "help": "Layers beside each cut to train on the teacher's hidden states. They are trained "
            "after each removal, before the other training. Default: 0, none."
        },
    )
    reconstruction_tokens: int | None = field(
        default=None,
        metadata={"help": "Training tokens of reconstruction. Default: as many as the other training reads."},
    )
    reconstruction_epochs: int = field(
        default=4, metadata={"help": "Passes of reconstruction over its tokens."}
    )
    reconstruction_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of reconstruction. Default: by the size of the weights."},
    )

    def __post_init__(self) -> None:
        self.reconstruction_layers = plain_int(self.reconstruction_layers)
        if type(self.reconstruction_layers) is not int or self.reconstruction_layers < 0:
            raise LayerPruneError(
                f"reconstruction_layers is {self.reconstruction_layers!r}. Choose 0 or more layers on each "
                "side of a cut."
            )
        if self.reconstruction_tokens is not None and self.reconstruction_tokens < 1:
            raise LayerPruneError(
                f"reconstruction_tokens is {self.reconstruction_tokens}. Choose at least 1, or leave it out."
            )
        rate = self.reconstruction_learning_rate
        if self.reconstruction_epochs < 1 or (rate is not None and not 0 < rate < float("inf")):
            raise LayerPruneError(
                f"reconstruction_epochs is {self.reconstruction_epochs} and reconstruction_learning_rate is "
                f"{rate}. Choose at least 1 epoch and a rate above 0."
            )


@dataclass(kw_only=True)
class PruningArguments(ReconstructionArguments, PhaseSizeArguments):
    """Settings of [`LayerPruningCallback`].

    The fields of [`ReconstructionArguments`] control the reconstruction of layers next to a new cut.

    Args:
        steps_per_phase (`int`, *optional*):
            Number of training steps after each removal. Default: all phases have the same number of steps.
            The last phase gets the remaining steps.
        tokens_per_phase (`int`, *optional*):
            Number of training tokens after each removal, instead of steps. It counts the tokens of all
            processes without padding.
        restart_learning_rate (`bool`, *optional*, defaults to `False`):
            Run the whole learning rate schedule in each phase, including warm-up. By default the schedule
            runs once over all phases.
        quality_floor (`float`, *optional*):
            Stop removing layers when the quality of the model is below this value at the start of a phase.
            Quality is the score of the task, or for `"loss"` the negative loss in nats per token.
        min_recovery (`float`, *optional*):
            For `"loss"` and `"task"`: the share of the quality lost by its removals that a phase must
            recover, on the calibration data. If the phase recovers less, the run ends and restores the model
            from before the phase. The output folder holds a copy of this model during the phase.

    Raises:
        LayerPruneError: a setting is invalid.
    """

    steps_per_phase: int | None = field(
        default=None, metadata={"help": "Training steps after each removal. Default: equal shares."}
    )
    tokens_per_phase: int | None = field(
        default=None, metadata={"help": "Instead, training tokens after each removal."}
    )
    restart_learning_rate: bool = field(
        default=False, metadata={"help": "Run the whole learning rate schedule in each phase."}
    )
    quality_floor: float | None = field(
        default=None,
        metadata={"help": "Stop removing layers when minus the calibration loss is below this value."},
    )
    min_recovery: float | None = field(
        default=None,
        metadata={
            "help": "Share of the loss increase that a phase must recover, as 0.5. Otherwise the run "
            "ends, and the layers of that phase are put back."
        },
    )

    def __post_init__(self) -> None:
        ReconstructionArguments.__post_init__(self)
        PhaseSizeArguments.__post_init__(self)
        for name in ("steps_per_phase", "tokens_per_phase"):
            if getattr(self, name) is not None:
                setattr(self, name, check_count(name, getattr(self, name)))
        if self.steps_per_phase is not None and self.tokens_per_phase is not None:
            raise LayerPruneError("Give steps_per_phase or tokens_per_phase, not both.")
        for name in ("quality_floor", "min_recovery"):
            if getattr(self, name) is not None and not find_criterion(self.criterion).measures_quality:
                raise LayerPruneError(
                    f"{name} is set, but criterion {self.criterion} measures no quality. Leave {name} out."
                )
        if self.min_recovery is not None and not 0 < self.min_recovery < float("inf"):
            raise LayerPruneError(
                f"min_recovery is {self.min_recovery}. Choose a share above 0, such as 0.5."
            )


TARGETS = ("target_layers", "target_ratio", "target_parameters", "target_speedup", "layers")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def with_given(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` updated with the `given` settings. A given target replaces any other target."""
    replaced = TARGETS if any(name in given for name in TARGETS) else ()
    return {name: value for name, value in values.items() if name not in replaced} | {**given}


Arguments = TypeVar("Arguments", bound=RemovalArguments)


def make_arguments(kind: type[Arguments], args: Arguments | None, settings: dict[str, Any]) -> Arguments:
    """Returns `args` with the given settings changed, or new arguments with these settings.

    Raises:
        LayerPruneError: a setting is unknown or invalid.
    """
    names = [one.name for one in fields(kind)]
    for name in settings:
        if name not in names:
            advice = did_you_mean(name, names) or f"Choose from {', '.join(names)}."
            raise LayerPruneError(f"There is no setting {name!r}. {advice}")
    return kind(**settings) if args is None else replace(args, **settings)


def narrowed(args: RemovalArguments, kind: type[Arguments]) -> Arguments:
    """Returns an instance of the base class `kind` with the same values."""
    return kind(**{one.name: getattr(args, one.name) for one in fields(kind)})


def record_settings(args: RemovalArguments, teacher: Any = None) -> dict[str, Any]:
    """Returns the settings in the form of a run record."""
    settings = {name: value for name, value in asdict(args).items() if name not in TARGETS[1:]}
    return settings | ({} if teacher is None else {"teacher": type(teacher).__name__})


def parameter_count(value: str | int | None) -> int:
    """Returns a number of parameters that is given as a number or as text like `"2.4B"`.

    Raises:
        LayerPruneError: the value is not a number of parameters.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMB]?)", str(value).strip().upper())
    if found is None or not float(found[1]):
        raise LayerPruneError(
            f"target_parameters is {value!r}. Give a number above 0, with K, M or B for thousands, millions "
            "and billions, as 2.4B."
        )
    return round(float(found[1]) * UNITS[found[2]])


def named_layers(value: Any) -> list[int]:
    """Returns the layers that a setting names, in order.

    Args:
        value (`str`, `int` or iterable of these): numbers, ranges such as `"12-18"`, and comma lists of both.

    Raises:
        LayerPruneError: the value has another form or names no layer.
    """
    entries = [value] if isinstance(value, (str, int)) else list(value)
    layers: set[int] = set()
    for part in ",".join(str(plain_int(entry)) for entry in entries).split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise LayerPruneError(
                f"layers is {value!r}. Give numbers and ranges of layers, the smaller number first, as 12-18 "
                "or 3,7,9-11."
            )
        layers |= {*range(first, last + 1)}
    return sorted(layers)


def check_count(name: str, value: object, otherwise: str = "") -> int:
    """Checks a setting that must be a whole number of at least 1. Returns it as an `int`.

    Raises:
        LayerPruneError: the value is not a whole number of at least 1.
    """
    number = plain_int(value)
    if type(number) is not int or number < 1:
        ending = f", {otherwise}." if otherwise else "."
        raise LayerPruneError(f"{name} is {value!r}: it must be a whole number of at least 1{ending}")
    return number
