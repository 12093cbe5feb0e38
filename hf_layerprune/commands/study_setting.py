"""The shared setup of the runs of a study: a model, texts, and functions that prune and heal the model."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.loading import load_model, load_tokenizer
from ..checkpoints.saving import check_writable
from ..data.batches import make_batches
from ..data.sequences import check_sequence_length, split_sequences, token_sequences
from ..data.texts import load_texts
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.learning_rate import healing_learning_rate
from ..distillation.reconstruction import reconstruct_layers
from ..distillation.trainer import DistillationTrainer
from ..errors import LayerPruneError
from ..evaluation.evaluate import evaluate_text
from ..pruning.linear_map import fits_linear_map, replace_by_linear_map
from ..pruning.prune import prune_layers
from ..scoring.journal import Journal
from ..scoring.score import fingerprint, score_layers
from ..surgery.lineage import get_lineage
from .quickstart import load_embedded_model, split_topics


WHOLE = {"tokens": 262_144, "calibration_sequences": 32, "heldout_sequences": 32}
QUICK = {"remove": 2, "tokens": 4096, "calibration_sequences": 4, "heldout_sequences": 8}

Row = dict[str, Any]
Cut = Callable[[int], tuple[PreTrainedModel, Row]]  # removes N layers; returns the model and the choice


@dataclass
class StudyArguments:
    """Settings of a study."""

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders or hub ids. Default: SmolLM2-135M-Instruct. The study `middle` takes several."
        },
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Text, as for other commands. Default: Python's help topics. The study `calibration` "
            "takes several."
        },
    )
    heldout: str | None = field(
        default=None,
        metadata={
            "help": "Text to measure on. Default: a part of the first data. Text like the training text "
            "overstates quality."
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the results. Default: study-NAME. A second call continues."},
    )
    quick: bool = field(
        default=False, metadata={"help": f"Small settings, for a trial. Those that are not given: {QUICK}."}
    )
    remove: int | None = field(
        default=None, metadata={"help": "Layers to remove. Default: a quarter of the layers."}
    )
    tokens: int | None = field(
        default=None, metadata={"help": f"Training tokens of each run. Default: {WHOLE['tokens']}."}
    )
    calibration_sequences: int | None = field(
        default=None,
        metadata={"help": f"Sequences to score layers on. Default: {WHOLE['calibration_sequences']}."},
    )
    heldout_sequences: int | None = field(
        default=None, metadata={"help": f"Sequences to measure on. Default: {WHOLE['heldout_sequences']}."}
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens in a sequence."})
    batch_size: int = field(default=4, metadata={"help": "Sequences in a training step."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak of a cosine schedule. Default: by the size of the weights."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of the text."})

    def __post_init__(self) -> None:
        for name, value in (QUICK if self.quick else WHOLE).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("tokens", "calibration_sequences", "heldout_sequences", "sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise LayerPruneError(f"{name} is {getattr(self, name)}: it must be at least 1.")


class Setting:
    """The shared setup of the runs of a study.

    Args:
        name (`str`): the name of the study.
        arguments ([`StudyArguments`]): the settings of the study.

    Raises:
        LayerPruneError: there is no such model or text, too little text, or the folder is not writable.
    """

    def __init__(self, name: str, arguments: StudyArguments) -> None:
        self.arguments, self.folder = arguments, Path(arguments.output_dir or f"study-{name}")
        check_writable(self.folder)
        self.dense, self.tokenizer = load(next(iter(arguments.models), None))
        if arguments.learning_rate is None:  # before the mark of the journal, so that it holds the rate
            arguments.learning_rate = healing_learning_rate(self.dense)
        self.layers = len(get_lineage(self.dense).kept)
        self.remove = max(1, self.layers // 4) if arguments.remove is None else arguments.remove
        if not 1 <= self.remove <= self.layers - 3:
            raise LayerPruneError(
                f"remove is {self.remove}, but the model has {self.layers} layers. Choose a value between 1 "
                f"and {self.layers - 3}."
            )
        names = [Path(source).name for source in arguments.data]
        self.names = (names if len(set(names)) == len(names) else arguments.data) or ["help topics"]
        check_sequence_length(arguments.sequence_length, self.dense)
        self.texts = [load_texts(source) for source in arguments.data] or [_help_topics()]
        self.sequences = [self.cut_up(texts) for texts in self.texts]
        sizes: Any = arguments.calibration_sequences, arguments.heldout_sequences
        for source, sequences in zip(self.names, self.sequences, strict=True):
            if len(sequences) < sizes[0]:
                raise LayerPruneError(
                    f"{source} makes {len(sequences)} sequences, but calibration_sequences is {sizes[0]}. "
                    "Give more text, or ask for fewer."
                )
        calibration, heldout, self.train = split_sequences(self.sequences[0], *sizes)
        if arguments.heldout:
            heldout = self.cut_up(load_texts(arguments.heldout))
            heldout = heldout.select(range(min(sizes[1], len(heldout))))
        self.calibration, self.heldout = make_batches(calibration, 4), make_batches(heldout, 4)
        tokens: Any = arguments.tokens
        self.steps = max(1, tokens // (arguments.batch_size * arguments.sequence_length))
        settings = [name, {k: v for k, v in asdict(arguments).items() if k != "output_dir"}]
        few = [
            sequences.select(range(0, len(sequences), 1 + len(sequences) // 100))
            for sequences in self.sequences
        ]
        text = [batch for some in few for batch in make_batches(some, 4)]
        mark = fingerprint([self.dense], [*text, *self.heldout], [*settings, *map(len, self.sequences)])
        self.journal = Journal(self.folder / "cells.jsonl", mark)

    def cut_up(self, texts: list[str], tokenizer: PreTrainedTokenizerBase | None = None) -> Dataset:
        """Returns texts as sequences of the study's length."""
        return token_sequences(texts, tokenizer or self.tokenizer, self.arguments.sequence_length)

    def loss(self, model: PreTrainedModel) -> float:
        """Returns the loss on held-out text, in nats per token."""
        return evaluate_text(model, self.heldout)["loss"]

    def cut(self, criterion: str, select: str, remove: int) -> tuple[PreTrainedModel, Row]:
        """Returns the model without the layers that a method chooses, and the choice."""
        model, began = copy.deepcopy(self.dense), time.monotonic()
        plan: Any = {"target_layers": self.layers - remove, "criterion": criterion, "select": select}
        record = prune_layers(model, calibration=self.calibration, **plan)
        seconds = round(time.monotonic() - began, 1)
        gone = [removal.original for removal in record.removals]
        return model, {"layers gone": gone, "seconds to score": seconds}

    def cut_with_map(self, remove: int) -> tuple[PreTrainedModel, Row]:
        """Returns the model with a linear map in place of the block with the lowest Block Influence, and the
        choice."""
        model, began = copy.deepcopy(self.dense), time.monotonic()
        table = score_layers(model, self.calibration, "block_influence", block_size=remove, progress=False)
        first, kept = table.ranking()[0], get_lineage(model).kept
        replace_by_linear_map(model, first, remove, self.calibration)
        seconds = round(time.monotonic() - began, 1)
        return model, {"layers gone": kept[first : first + remove], "seconds to score": seconds}

    def cut_block(self, remove: int) -> tuple[PreTrainedModel, Row]:
        """Returns the model without the block with the lowest Block Influence, and the choice. A linear map
        replaces the block if the model allows it."""
        if fits_linear_map(self.dense):
            return self.cut_with_map(remove)
        return self.cut("block_influence", "block", remove)

    def reconstruct(self, model: PreTrainedModel, layers: int, epochs: int, tokens: int) -> Row:
        """Trains the layers next to each cut in place. Returns the KL divergence before and after, and the
        time in seconds."""
        began, rows = time.monotonic(), self.train.shuffle(seed=self.arguments.seed)
        count = min(len(rows), max(1, tokens // self.arguments.sequence_length))
        result = reconstruct_layers(
            model,
            self.dense,
            make_batches(rows.select(range(count)), self.arguments.batch_size),
            layers_before=layers,
            layers_after=layers,
            epochs=epochs,
            autocast=torch.bfloat16,
            seed=self.arguments.seed,
            progress=False,
        )
        return {
            "KL cut": result.kl_before,
            "KL reconstructed": result.kl_after,
            "seconds to reconstruct": round(time.monotonic() - began, 1),
        }

    def cut_loss(self, cut: Cut, remove: int) -> Row:
        """Returns the loss after pruning by one method, or the reason why this method cannot prune the
        model."""
        try:
            model, found = cut(remove)
        except LayerPruneError as error:
            return {"loss": None, "not possible": str(error)}
        return {"loss": self.loss(model), **found}

    def cut_and_heal(self, cut: Cut, reconstruction: Mapping[str, int] | None = None, **changes: Any) -> Row:
        """Returns the loss after pruning by one method and after healing, or the reason why this method
        cannot prune the model.

        Args:
            cut (`Callable`): prunes the model.
            reconstruction (mapping, *optional*): arguments of [`~Setting.reconstruct`], which runs before
                healing.
            changes (*optional*): changed training arguments.
        """
        try:
            model, found = cut(self.remove)
            cut_loss = self.loss(model)
            if reconstruction is not None:
                found |= self.reconstruct(model, **reconstruction)
        except LayerPruneError as error:
            return {"cut": None, "healed": None, "not possible": str(error)}
        row = {"cut": cut_loss, **self.heal(model, **changes), **found}
        parts = [value for name, value in row.items() if name.startswith("seconds")]
        return row | {"seconds in all": round(sum(parts), 1)}

    def heal(self, model: PreTrainedModel, *callbacks: Any, **changes: Any) -> Row:
        """Distils the dense model into a model in place. Returns the loss and the time in seconds."""
        began = time.monotonic()
        settings: dict[str, Any] = {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.arguments.batch_size,
            "learning_rate": self.arguments.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "seed": self.arguments.seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "bf16": True,
            "use_cpu": not torch.cuda.is_available(),
        }
        with TemporaryDirectory() as folder:
            args = DistillationTrainingArguments(output_dir=folder, **settings | changes)
            teacher = copy.deepcopy(self.dense).to(torch.bfloat16)
            trainer = DistillationTrainer(
                model, args, teacher_model=teacher, train_dataset=self.train, callbacks=list(callbacks)
            )
            trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model.float()
        return {"healed": self.loss(model), "seconds": round(time.monotonic() - began, 1)}


def load(name: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Returns a model in float32 and its tokenizer. Without a name, it returns the quickstart model."""
    if name is None:
        model, tokenizer = load_embedded_model()
    else:
        model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _help_topics() -> list[str]:
    return [text for part in split_topics().values() for text in part]
