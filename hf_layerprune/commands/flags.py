"""Flags that only the command line has. Each field is a flag."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..recipes.arguments import DATA_HELP


# Arguments in Python that a command calls otherwise.
OTHER_NAMES = {"teacher_model": "teacher"}


def name_flags(message: str, names: Iterable[str]) -> str:
    """Returns a message of the library as a user of the command line reads it: `--max_steps` for max_steps,
    `--trainable all` for trainable='all'.

    Args:
        message (`str`): what went wrong.
        names (iterable of `str`): of the command's flags, without dashes. One that is also a word of English
            is replaced only where the message begins with it, or gives it a value.
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
    """Which text is read."""

    data: list[str] = field(metadata={"help": DATA_HELP})

    @property
    def sources(self) -> list[Path]:
        """The names of the data."""
        return [Path(one) for one in self.data]


@dataclass
class OptionalDataArguments:
    """Which text `evaluate` reads, if any."""

    data: list[str] | None = field(
        default=None,
        metadata={"help": f"What to read and copy. {DATA_HELP} Default: only --tasks are measured."},
    )

    @property
    def sources(self) -> list[Path]:
        """The names of the data."""
        return [Path(one) for one in self.data or []]


@dataclass
class ScoreArguments:
    """Output of `score`."""

    plot: str | None = field(default=None, metadata={"help": "Write a bar chart to this file."})
    json: str | None = field(
        default=None,
        metadata={"help": "Write the table to this file; stopped and called again, scoring goes on."},
    )
    block_size: int = field(
        default=1, metadata={"help": "Score blocks of so many consecutive layers, each by its first layer."}
    )
    compare: str | None = field(
        default=None,
        metadata={"help": "Other text, or a table of --json: how alike do they rank the layers?"},
    )


@dataclass
class SaveArguments:
    """Where and how `prune` and `phases` save the model."""

    output_dir: str = field(metadata={"help": "A new folder for the model."})
    verify_save: bool = field(
        default=True, metadata={"help": "Load the saved model again and compare its logits."}
    )
    legacy_rope: bool = field(
        default=False, metadata={"help": "Write rotary settings as transformers 4 reads them, too."}
    )


@dataclass
class TeacherArguments:
    """The teacher and the adapters of `distill`."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder (also of `cache-teacher`) or hub id of the teacher. Default: the model itself."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train LoRA adapters of this rank; the teacher then shares the model's weights."},
    )


@dataclass
class PlanArguments:
    """For which device `plan` plans."""

    device: str | None = field(
        default=None,
        metadata={
            "help": "GPU to plan for, as a100-40gb, h100-80gb or rtx4090-24gb. Default: the GPU of "
            "this machine, else h100-80gb."
        },
    )


@dataclass
class ResumeArguments:
    """How `distill` and `run` go on after a stop."""

    resume: bool = field(
        default=False, metadata={"help": "Go on from the last whole checkpoint in output_dir."}
    )


@dataclass
class CacheTeacherArguments:
    """Output of `cache-teacher`."""

    output_dir: str = field(metadata={"help": "A folder for what it says; called again, this goes on."})
    top_k: int = field(default=64, metadata={"help": "Tokens to keep at each position, the likeliest."})
    temperature: float = field(default=1.0, metadata={"help": "That of `distill`."})
    hidden_layers: list[int] = field(
        default_factory=list, metadata={"help": "Original indices of the layers whose outputs to keep."}
    )


@dataclass
class InspectArguments:
    """Output of `inspect`."""

    json: str | None = field(default=None, metadata={"help": "Write what was found to this file."})


@dataclass
class EvaluateArguments:
    """Output of `evaluate`."""

    max_sequences: int = field(default=64, metadata={"help": "Sequences of the text to use at most."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "hellaswag, arc_easy, arc_challenge, piqa, lambada_openai, sciq, boolq from the hub, or "
            "NAME=FILE with its rows as JSON lines; questions=FILE for your own, with context, choices and "
            "answer. What is kept, and how far each model answers as the first does (agreement, stability)."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first so many questions of a task."})
    lm_eval: bool = field(
        default=False, metadata={"help": "Read the tasks through lm-eval, which knows many more."}
    )
    json: str | None = field(
        default=None,
        metadata={
            "help": "Write the numbers to this file. What it holds already, of the same model, text and "
            "questions, is not measured again (but by lm-eval), so that long evaluations go on after a stop."
        },
    )


@dataclass
class CardArguments:
    """What is said in a model card."""

    evaluation: str | None = field(
        default=None, metadata={"help": "What evaluate --json wrote of the dense model first, and of this."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the original, where it was a folder."}
    )
    repository: str | None = field(default=None, metadata={"help": "Hub id to load the model by."})
    license: str | None = field(default=None, metadata={"help": "Licence, as the hub names it."})
    language: str | None = field(default=None, metadata={"help": "Language, as en."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Ids of what it was healed on."})
