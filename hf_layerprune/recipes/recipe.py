"""Published methods as files: which layers go, what stands in for them, how what is left is trained."""

import copy
import dataclasses
import difflib
import json
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, default_data_collator

from ..checkpoints.saving import save_model
from ..data import make_batches
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.reconstruction import reconstruct_layers
from ..distillation.trainable import trained_parameters
from ..distillation.trainer import DistillationTrainer
from ..errors import LayerPruneError
from ..evaluation.evaluate import HeldOutText
from ..pruning.callback import LayerPruningCallback
from ..pruning.prune import (
    MAX_GAP,
    SELECTIONS,
    check_plan,
    phase_entry,
    prune_layers,
    run_evaluation,
    score_present,
)
from ..pruning.replacement import KINDS, replace_by_linear_map, replace_run
from ..reports.card import write_card
from ..reports.machine import peak_memory_mb
from ..reports.record import (
    Record,
    Removal,
    RunRecord,
    changed_settings,
    check_same_settings,
    checkpoint_of,
    read_record,
    start_record,
    write_record,
)
from ..reports.texts import count_tokens, describe_text, describe_texts
from ..scoring.table import ScoreTable
from ..surgery.lineage import get_lineage
from ..surgery.removal import remove_layers, without_layers


SHIPPED = Path(__file__).parent
REPLACEMENT_LOSSES = {
    "mse": {"kl_weight": 0.0, "ce_weight": 0.0, "hidden_weight": 1.0},
    "lm": {"kl_weight": 0.0, "ce_weight": 1.0, "hidden_weight": 0.0},
    "kl": {"kl_weight": 1.0, "ce_weight": 0.0, "hidden_weight": 0.0},
}
OF_THE_MACHINE = ("use_cpu", "dataloader_pin_memory")


class _Loader(yaml.SafeLoader):
    """Reads 5e-5 as the number that it is in YAML 1.2; PyYAML takes it for a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class RecipeArguments:
    """What goes, and what stands in for it."""

    model: str = field(metadata={"help": "Folder or hub id of the model."})
    keep: int = field(metadata={"help": "How many layers the model shall have."})
    title: str = field(default="Layer pruning", metadata={"help": "Name of the method, for the model card."})
    paper: str = field(default="", metadata={"help": "Where it is described, for the model card."})
    select: str = field(
        default="phases",
        metadata={
            "help": "Which layers go: phase by phase with training between; greedy, one by one; those that "
            "score least in one shot; or the run that scores least.",
            "choices": ["phases", *SELECTIONS],
        },
    )
    pattern: str = field(
        default="output",
        metadata={"help": f"For criterion positional: output, input, middle, both, random or {MAX_GAP}."},
    )
    replacement: str = field(
        default="none",
        metadata={"help": "For select run, what stands in for the run.", "choices": list(KINDS)},
    )
    replacement_layers: int = field(default=1, metadata={"help": "How many layers stand in."})
    replacement_loss: str = field(
        default="mse",
        metadata={
            "help": "What trains them, and nothing else: the run's own output (mse), text (lm), or the whole "
            "model's logits (kl). A linear map, which is the least of mse already, is trained by kl instead. "
            "With none, what is left is trained as after any other cut.",
            "choices": [*REPLACEMENT_LOSSES, "none"],
        },
    )
    reconstruction_layers: int = field(
        default=0,
        metadata={
            "help": "Layers on each side of every cut to train on the teacher's hidden states, before the "
            "other training. Default: 0, none."
        },
    )
    reconstruction_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Training tokens to reconstruct layers on. Default: all that the other training reads."
        },
    )
    reconstruction_epochs: int = field(
        default=4, metadata={"help": "How often reconstruction reads these tokens."}
    )
    reconstruction_learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of reconstruction."}
    )
    heldout_blocks: int = field(default=16, metadata={"help": "Blocks of the text to measure perplexity on."})

    def __post_init__(self) -> None:
        if self.reconstruction_layers < 0:
            raise LayerPruneError(
                f"reconstruction_layers is {self.reconstruction_layers}. Choose 0 or more layers on each "
                "side of a cut."
            )
        if self.reconstruction_tokens is not None and self.reconstruction_tokens < 1:
            raise LayerPruneError(
                f"reconstruction_tokens is {self.reconstruction_tokens}. Choose at least 1, or leave it out."
            )
        if self.reconstruction_epochs < 1 or not 0 < self.reconstruction_learning_rate < float("inf"):
            raise LayerPruneError(
                f"reconstruction_epochs is {self.reconstruction_epochs} and reconstruction_learning_rate is "
                f"{self.reconstruction_learning_rate}. Choose at least 1 epoch and a rate above 0."
            )
        if self.reconstruction_layers and self.select == "phases":
            raise LayerPruneError(
                "reconstruction_layers needs all layers removed at once, but select is phases. Set select to "
                "greedy, least or run, or leave reconstruction_layers out."
            )
        if self.reconstruction_layers and self.replacement not in ("none", "linear"):
            raise LayerPruneError(
                f"reconstruction_layers is set, but replacement {self.replacement} trains its own layer. Use "
                "replacement none or linear."
            )
        if self.replacement != "none" and self.select != "run":
            raise LayerPruneError(f"replacement {self.replacement} stands in for a run: set select to run.")
        if self.replacement == "linear" and self.replacement_loss == "mse":
            self.replacement_loss = "kl"  # the map is the least of mse already


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def recipe_words(recipe: str, types: Sequence[Any]) -> list[str]:
    """A recipe as words of a command line.

    Args:
        recipe (`str`): the name of one that comes with the package, or a YAML file of fields of `types`.
        types (sequence of dataclasses): which fields there are.

    Raises:
        LayerPruneError: no such recipe, no plain YAML, or a field that there is not.
    """
    path = SHIPPED / f"{recipe}.yaml" if recipe in shipped_recipes() else Path(recipe)
    if not path.is_file():
        raise LayerPruneError(
            f"No recipe {recipe!r}: give a YAML file, or one of {', '.join(shipped_recipes())}."
        )
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayerPruneError(f"{path} is no plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise LayerPruneError(f"{path} is no recipe: it must be lines of `field: value`.")
    known = [one.name for kind in types for one in dataclasses.fields(kind) if one.init]
    words: list[str] = []
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise LayerPruneError(
                f"{path}: there is no field {name!r}" + (f"; do you mean {near[0]}?" if near else ".")
            )
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words.append(f"--{name}")
        words += [json.dumps(one) if isinstance(one, dict) else str(one) for one in values]
    return words


def resolved_fields(parts: Sequence[Any], args: DistillationTrainingArguments) -> dict[str, Any]:
    """What a recipe came to: the fields of its parts that are not at their default, without folders and what
    is of this machine."""
    found: dict[str, Any] = {}
    for part in parts:
        for one in dataclasses.fields(part):
            value = getattr(part, one.name)
            if value != one.default and one.name not in ("teacher", "resume"):
                local = one.name in ("model", "data") and Path(value).exists()
                found[one.name] = Path(value).name if local else value
    return found | {k: v for k, v in changed_settings(args).items() if k not in OF_THE_MACHINE}


def run_recipe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: RecipeArguments,
    args: DistillationTrainingArguments,
    *,
    calibration: Dataset,
    heldout: Dataset,
    train: Dataset,
    criterion: str = "loss",
    racing: float | None = None,
    protected: Sequence[int] | None = None,
    phases: dict[str, Any] | None = None,
    resume: str | bool | None = None,
    resolved: dict[str, Any] | None = None,
) -> Record:
    """Make `model`, in place, what a recipe says, and save it with its card in `args.output_dir`.

    Args:
        recipe ([`RecipeArguments`]): which layers go, and what stands in for them.
        args ([`DistillationTrainingArguments`]): how what is left is trained; with `max_steps=0` it is not.
        calibration, heldout, train (`Dataset`): blocks to score on, to measure on and to train on.
        criterion, racing, protected (*optional*): see [`LayerPruningCallback`].
        phases (`dict`, *optional*): for `select="phases"`, other settings of [`LayerPruningCallback`].
        resume (*optional*): see [`~transformers.Trainer.train`]; not for a replacement that is trained alone.
        resolved (`dict`, *optional*): the recipe's fields, for record and card.

    Returns:
        `dict`: the run record.

    Raises:
        LayerPruneError: settings that cannot work, before any long work.
    """
    reads = args.max_steps or recipe.reconstruction_layers
    if reads and isinstance(train, Dataset) and not len(train):
        raise LayerPruneError(
            "Calibration and evaluation take all blocks of the text, none is left to train on: give more "
            "text, or ask for fewer blocks."
        )
    if args.eval_strategy != "no":
        raise LayerPruneError("run measures before, between and after training: leave eval_strategy out.")
    if resume and recipe.replacement != "none" and recipe.replacement_loss != "none":
        raise LayerPruneError("What trains a replacement alone is short, and does not resume: begin anew.")
    found = checkpoint_of(str(args.output_dir)) if resume is True else resume or None
    choice: dict[str, Any] = {
        "target_layers": recipe.keep,
        "criterion": criterion,
        "calibration": calibration,
        "racing": racing,
        "protected": protected,
        "pattern": recipe.pattern,
        "evaluation": HeldOutText(heldout, args.per_device_eval_batch_size),
    }
    caches = getattr(model.config, "use_cache", None)  # which training may switch off
    if recipe.select == "phases":
        if not args.max_steps:
            raise LayerPruneError("select phases trains between removals: set max_steps or steps_per_phase.")
        pruning = LayerPruningCallback(**choice, **(phases or {}))
        _train(model, None, args, train, pruning, found)
        record = pruning.record.to_dict()
    else:
        record = _remove_and_heal(model, recipe, args, choice, train, found)
    if caches is not None:
        model.config.use_cache = caches
    healing = "healed by distillation" if args.kl_weight or args.hidden_weight else "healed on text"
    record["method"] = {
        "name": recipe.title,
        "url": recipe.paper,
        "healing": healing if args.max_steps else "not healed",
    }
    folder = Path(str(args.output_dir))
    legacy, dtype = args.legacy_rope, args.save_dtype
    save_model(model, folder, verify=args.verify_save, legacy_rope=legacy, dtype=dtype)
    tokenizer.save_pretrained(folder)
    if resolved is not None:
        record["recipe"] = resolved
    write_record(RunRecord.from_dict(record), folder)
    write_card(record, folder)
    return record


def _remove_and_heal(
    model: PreTrainedModel,
    recipe: RecipeArguments,
    args: DistillationTrainingArguments,
    choice: dict[str, Any],
    train: Dataset,
    checkpoint: str | None,
) -> Record:
    """Remove all layers first, and train what is left after that, from a checkpoint if there is one."""
    check_plan(model, recipe.keep, choice["protected"])
    if recipe.reconstruction_layers:
        train = _rows_read(recipe, args, train)
    began = time.monotonic()
    replaces = recipe.replacement != "none"
    alone = replaces and recipe.replacement_loss != "none"  # what replaces is all that is trained
    if alone:
        for name, value in REPLACEMENT_LOSSES[recipe.replacement_loss].items():
            setattr(args, name, value)
    teaches = bool(args.max_steps and (args.kl_weight or args.hidden_weight))
    reconstructs = recipe.reconstruction_layers > 0 and not checkpoint
    teacher = copy.deepcopy(model) if teaches or reconstructs else None
    trained: list[nn.Parameter] = []
    begun = read_record(str(args.output_dir)) if checkpoint else None
    if begun is not None:  # the weights are the checkpoint's, what it knows not of is how deep the model is
        cut = begun.to_dict()
        _check_same(cut, recipe, choice, args.output_dir)
        left = cut["phases"][-1]["kept"]
        remove_layers(model, [i for i, one in enumerate(get_lineage(model).kept) if one not in left])
        record = cut | {"resumed_at": Path(str(checkpoint)).name}
    elif replaces:
        record, trained = _replace(model, recipe, choice)
    else:
        record = prune_layers(model, **choice, select=recipe.select).to_dict()
    if reconstructs:
        assert teacher is not None
        record["reconstruction"] = _reconstruct(model, teacher, recipe, args, train)
    if args.max_steps:
        write_record(RunRecord.from_dict(record | {"finished": False}), str(args.output_dir))
        if alone:
            for parameter in model.parameters():
                parameter.requires_grad_(any(parameter is one for one in trained))
        with ExitStack() as shortened:
            if alone and args.hidden_weight:  # what comes after the replacement says nothing of it
                last = _last_replaced(record)
                args.hidden_layers, args.save_strategy = [last], "no"
                for one in filter(None, (model, teacher)):
                    kept = get_lineage(one).kept
                    after = [i for i, original in enumerate(kept) if original > last]
                    shortened.enter_context(without_layers(one, after))
            record["training"] = changed_settings(args)
            record["log"] = _train(model, teacher, args, train, checkpoint=checkpoint)
        tokens = record["log"][-1]["num_input_tokens_seen"]
        record.setdefault("texts", {})["healing"] = {"name": describe_text(train)["name"], "tokens": tokens}
        record["phases"][-1]["healed"] = run_evaluation(choice["evaluation"], model)
    record |= {"seconds": round(time.monotonic() - began, 2), "finished": True}  # since it was resumed
    record["phases"][-1]["seconds"] = record["seconds"]
    record["peak_memory_mb"] = peak_memory_mb()
    return record


def _reconstruct(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    recipe: RecipeArguments,
    args: DistillationTrainingArguments,
    train: Dataset,
) -> dict[str, Any]:
    """Train the layers next to the cuts on the teacher's hidden states; what came of it, for the record."""
    began = time.monotonic()
    length = len(train[0]["input_ids"])
    tokens = recipe.reconstruction_tokens or len(train) * length
    folder = Path(str(args.output_dir)) / "reconstruction"
    found = reconstruct_layers(
        model,
        teacher,
        make_batches(train.select(range(min(len(train), max(1, tokens // length)))), args.train_batch_size),
        layers_before=recipe.reconstruction_layers,
        layers_after=recipe.reconstruction_layers,
        epochs=recipe.reconstruction_epochs,
        learning_rate=recipe.reconstruction_learning_rate,
        autocast=torch.bfloat16 if args.bf16 else None,  # fp16 would need its gradients scaled
        seed=args.seed,
        folder=folder,
        progress=not args.disable_tqdm,
    )
    if args.process_index == 0:
        folder.rmdir()  # what was in it is gone
    return found.to_dict() | {"seconds": round(time.monotonic() - began, 2)}


def _rows_read(recipe: RecipeArguments, args: DistillationTrainingArguments, train: Dataset) -> Dataset:
    """The rows of the text that the training after reconstruction reads: so both see the same tokens.

    Raises:
        LayerPruneError: the text is read bit by bit.
    """
    if not isinstance(train, Dataset):
        raise LayerPruneError(
            "reconstruction_layers reads its tokens several times, but the data is streamed. Leave streaming "
            "out, or set reconstruction_layers to 0."
        )
    rows = len(train)
    if args.max_steps > 0:
        rows = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return train.shuffle(seed=args.seed).select(range(min(rows, len(train))))


def _check_same(cut: Record, recipe: RecipeArguments, choice: dict[str, Any], folder: str | None) -> None:
    """Check that a run goes on as it began."""
    asked = {name: choice[name] for name in ("target_layers", "criterion")}
    asked |= {"select": recipe.select, "replacement": recipe.replacement}
    check_same_settings({"replacement": "none", "select": "phases"} | cut["pruning"], asked, str(folder))


def _replace(
    model: PreTrainedModel, recipe: RecipeArguments, choice: dict[str, Any]
) -> tuple[Record, list[nn.Parameter]]:
    """Let something stand for the run that matters least; the record, and what of it is to be trained."""
    before, standing = get_lineage(model).kept, recipe.replacement_layers
    if not 1 <= standing < recipe.keep:
        raise LayerPruneError(
            f"replacement_layers is {standing}, of {recipe.keep} layers to keep: let at least one stand in, "
            "and fewer than are kept."
        )
    fixed = check_plan(model, recipe.keep, choice["protected"])
    settings = {name: choice[name] for name in ("target_layers", "criterion", "racing", "pattern")}
    settings |= {"protected_originals": fixed, "select": "run", "replacement": recipe.replacement}
    record = start_record(model, settings)
    batches = make_batches(choice["calibration"], 4)
    record.texts = describe_texts(choice["calibration"], batches, choice["evaluation"])
    record.dense = run_evaluation(choice["evaluation"], model)
    if recipe.replacement == "linear":  # part of the layer before
        standing = 0
    run = len(before) - recipe.keep + standing
    scoring = {"run": run, "racing": choice["racing"], "pattern": choice["pattern"]}
    table = score_present(model, batches, choice["criterion"], fixed, **scoring)
    first = table.ranking()[0]
    if recipe.replacement == "linear":
        trained = [replace_by_linear_map(model, first, run, batches)]
    else:
        trained = replace_run(model, first, run, recipe.replacement, standing)
    gone = [original for original in before if original not in get_lineage(model).kept]
    removals = [Removal(before.index(original), original, None) for original in gone]
    removals[0].score, removals[0].table = table.scores[first], table
    record.phases.append(phase_entry(model, 0, removals, choice["evaluation"]))
    record.finished = True
    return record.to_dict(), trained


def _last_replaced(record: Record) -> int:
    """The original layer in whose place the last one stands that replaces a run."""
    table = ScoreTable.from_dict(record["phases"][0]["removals"][0]["table"])
    return table.kept[table.ranking()[0] + table.run - 1]


def _train(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    args: DistillationTrainingArguments,
    train: Dataset,
    pruning: LayerPruningCallback | None = None,
    checkpoint: str | None = None,
) -> list[dict[str, Any]]:
    """Train, with a teacher where one is asked for, else on the labels alone; the log. The model is then as
    it was before, without the Trainer's mixed precision."""
    callbacks: list[Any] = [] if pruning is None else [pruning]
    kind: Any
    settings: dict[str, Any]
    taught = args.kl_weight or args.hidden_weight
    if taught or (pruning is not None and args.trainable != "all"):  # which is chosen anew after each removal
        kind, settings = DistillationTrainer, {"teacher_model": teacher}
    else:
        chosen = {id(parameter) for parameter in trained_parameters(model, args.trainable)}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)
        kind, settings = Trainer, {"data_collator": default_data_collator}
    try:
        trainer = kind(model, args, train_dataset=train, callbacks=callbacks, **settings)
    except ValueError as error:  # the Trainer refused an argument
        raise LayerPruneError(str(error)) from error
    if pruning is not None:
        pruning.set_trainer(trainer)
    count_tokens(args, train)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return trainer.state.log_history
