"""Settings of model and text, for recipes and commands. Imports nothing, so that --help is quick."""

from dataclasses import dataclass, field


DATA_HELP = (
    "Text, chats or prompts: one or more files (.txt, .md, .json, .jsonl, .csv, .parquet, .arrow; also .gz "
    "and .zst), folders, globs, ids of data sets on the hub, or - for standard input."
)


@dataclass
class ModelArguments:
    """How a model is loaded."""

    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that comes with model and teacher. It can do anything."},
    )


@dataclass
class TextArguments:
    """How text is read."""

    data_field: str = field(
        default="text",
        metadata={"help": "The column that holds plain text. Chats and prompts are found by themselves."},
    )
    data_template: str | None = field(
        default=None,
        metadata={"help": "Text made of several columns, as '{instruction}\\n{output}'. \\n begins a line."},
    )
    data_split: str = field(
        default="train", metadata={"help": "Split of a data set on the hub or of save_to_disk."}
    )
    data_config: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the hub."}
    )
    data_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a data set on the hub."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "For run and distill: read the text as training goes on. Its first sequences are for "
            "calibration and evaluation."
        },
    )

    def __post_init__(self) -> None:
        if self.data_template is not None:  # a shell gives \\n as it is written
            self.data_template = self.data_template.replace("\\n", "\n")


@dataclass
class CalibrationArguments:
    """How much text layers are scored on."""

    calibration_sequences: int = field(default=16, metadata={"help": "Sequences of the text to score with."})


@dataclass
class SampleArguments(CalibrationArguments):
    """How much text is set apart."""

    heldout_sequences: int = field(
        default=16, metadata={"help": "Sequences of the text to measure perplexity on."}
    )
