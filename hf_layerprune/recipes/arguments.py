"""Settings of model and text, for recipes and commands. Imports nothing, so that --help is quick."""

from dataclasses import dataclass, field


@dataclass
class ModelArguments:
    """How a model is loaded."""

    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that comes with model and teacher. It can do anything."},
    )


@dataclass
class TextArguments:
    """How text is read and cut."""

    data_field: str = field(default="text", metadata={"help": "The field that holds the text."})
    data_split: str = field(default="train", metadata={"help": "Split of a data set on the hub."})
    data_config: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the hub."}
    )
    sequence_length: int = field(default=256, metadata={"help": "Tokens in a sequence."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "For run and distill: read the text as training goes on. Its first sequences are for "
            "calibration and evaluation."
        },
    )


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
