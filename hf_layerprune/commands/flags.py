"""Defines the flags of the command line that are not settings of the package. Each field is a flag."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..recipes.arguments import DATA_FORMS, DATA_HELP


# Python arguments whose flag has another name.
OTHER_NAMES = {"teacher_model": "teacher"}


def name_flags(message: str, names: Iterable[str]) -> str:
    """Returns a message with arguments written as flags, such as `--max_steps` for max_steps and
    `--trainable all` for trainable='all'.

    Args:
        message (`str`): a message of the library.
        names (iterable of `str`): names of the command's flags, without dashes. A name without an underscore
            is replaced only at the beginning of the message, or with a value.
    """
    flags = {name: f"--{name}" for name in names}
    flags |= {
        name: flags[other] for name, other in OTHER_NAMES.items() if name not in flags and other in flags
    }
    if not flags:
        return message
    if "resume" in flags:
        message = message.replace("resume_from_checkpoint=True", "--resume")

    def pattern(words: Iterable[str]) -> str:
        return rf"(?<![\w/.-])({'|'.join(sorted(words, key=len, reverse=True))})"

    underscored = [name for name in flags if "_" in name]
    message = re.sub(
        rf"{pattern(flags)}=(?:(['\"])(.*?)\2|(\w[\w.]*\b))",
        lambda found: f"{flags[found[1]]} {found[3] or found[4]}",
        message,
    )
    message = re.sub(rf"^{pattern(flags)}(?= is | has )", lambda found: flags[found[1]], message)
    if underscored:
        ends = r"(?![\w/]|\.\w)"
        message = re.sub(pattern(underscored) + ends, lambda found: flags[found[1]], message)
    return message


@dataclass
class DataArguments:
    """The text to read."""

    data: list[str] = field(metadata={"help": DATA_HELP})

    @property
    def sources(self) -> list[Path]:
        """The names of the data."""
        return [Path(one) for one in self.data]


@dataclass
class OptionalDataArguments:
    """The text that `evaluate` reads, if any."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text for perplexity and copy accuracy. Default: none. Files, folders, globs, hub ids "
            f"or - (stdin). {DATA_FORMS}"
        },
    )

    @property
    def sources(self) -> list[Path]:
        """The names of the data."""
        return [Path(one) for one in self.data or []]


@dataclass
class ScoreArguments:
    """Output of `score`."""

    plot: str | None = field(default=None, metadata={"help": "Write a bar chart of the scores to this file."})
    json: str | None = field(
        default=None,
        metadata={"help": "Write the scores to this file. Scoring that was stopped continues from it."},
    )
    block_size: int = field(
        default=1,
        metadata={
            "help": "Consecutive layers in a scored block. The score of a block stands at its first layer."
        },
    )
    compare: str | None = field(
        default=None,
        metadata={"help": "Other text, or a file of --json, to compare the ranking with."},
    )


@dataclass
class SaveArguments:
    """Where and how `prune` and `phases` save the model."""

    output_dir: str = field(metadata={"help": "A new folder for the model."})
    verify_save: bool = field(
        default=True, metadata={"help": "Load the saved model again and compare its weights and logits."}
    )
    legacy_rope: bool = field(
        default=False, metadata={"help": "Also write the rotary settings as transformers 4 reads them."}
    )


@dataclass
class LoraArguments:
    """The adapters of `distill`."""

    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters of this rank. The teacher then shares the weights of the model."
        },
    )


@dataclass
class PlanArguments:
    """The device of `plan`."""

    device: str | None = field(
        default=None,
        metadata={
            "help": "GPU to plan for, as a100-40gb, h100-80gb or rtx4090-24gb. Default: the GPU of this "
            "machine, else h100-80gb."
        },
    )


@dataclass
class ResumeArguments:
    """Resuming of `distill` and `run`."""

    resume: bool = field(
        default=False, metadata={"help": "Continue from the last whole checkpoint in output_dir."}
    )


@dataclass
class CacheTeacherArguments:
    """Output of `cache-teacher`."""

    output_dir: str = field(metadata={"help": "Folder for the cached logits. A second call continues."})
    top_k: int = field(default=64, metadata={"help": "Tokens to keep at each position, the most likely."})
    sampling: bool = field(
        default=False,
        metadata={
            "help": "Sample top_k tokens from the teacher's distribution instead. The gradient of `distill` "
            "is then that of all tokens on average (2503.16870)."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the logits, as in `distill`."})
    hidden_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "Layers whose outputs to keep, by original index. Default: none."},
    )


@dataclass
class InspectArguments:
    """Output of `inspect`."""

    json: str | None = field(default=None, metadata={"help": "Write the layers to this file."})


@dataclass
class EvaluateArguments:
    """Output of `evaluate`."""

    max_sequences: int = field(default=64, metadata={"help": "The most sequences of the text to use."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Zero-shot tasks, as hellaswag piqa, or NAME=FILE. Built in: hellaswag, arc_easy, "
            "arc_challenge, piqa, lambada_openai, sciq, boolq from the hub. NAME=FILE reads the rows of a"
            " task from JSON lines. questions=FILE reads your own questions, with context, choices and "
            "answer. The table also compares the answers with those of the first model (agreement, "
            "stability)."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Use only the first N questions of each task."})
    lm_eval: bool = field(
        default=False, metadata={"help": "Read the tasks through lm-eval, which has many more."}
    )
    json: str | None = field(
        default=None,
        metadata={
            "help": "Write the results to this file. A second call continues: results of the same model, "
            "text and questions are taken from the file. lm-eval always measures again."
        },
    )


@dataclass
class CardArguments:
    """Contents of a model card."""

    evaluation: str | None = field(
        default=None,
        metadata={
            "help": "Results of evaluate --json for the dense and the pruned model. The dense model must "
            "be the first."
        },
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the original model, if it was loaded from a folder."}
    )
    repository: str | None = field(
        default=None, metadata={"help": "Hub id from which the card loads the model."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence, by its id on the hub."})
    language: str | None = field(default=None, metadata={"help": "Language, as en."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Hub ids of the training data."})
