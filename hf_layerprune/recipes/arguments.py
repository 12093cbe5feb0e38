"""Settings of model and text for recipes and commands.

This module imports very little, so that --help is fast.
"""

from dataclasses import dataclass, field

from ..errors import LayerPruneError


DATA_FORMS = (
    "Rows hold text, chats or prompts, for vision-language models also pictures. Files are .txt, .md, "
    ".json, .jsonl, .csv, .parquet or .arrow, also packed as .gz and .zst."
)
DATA_HELP = (
    "Files, folders, globs, hub ids, - (stdin) or self (model text). With self the model writes the text. "
    f"{DATA_FORMS}"
)


@dataclass
class ModelArguments:
    """Settings of model loading.

    Raises:
        LayerPruneError: two settings exclude each other.
    """

    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that comes with model and teacher. It can do anything."},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights. Default: float32 for training, else the stored dtype.",
            "choices": ["auto", "bfloat16", "float32", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention, as sdpa, eager or flash_attention_2. Default: the choice of transformers."
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "Devices of the weights, as auto for all GPUs. Default: one device. Not for training."
        },
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantise the weights to 8 bits on loading (bitsandbytes)."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the weights to 4 bits on loading (bitsandbytes, NF4)."}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file in the folder or repository of MODEL to load."}
    )

    def __post_init__(self) -> None:
        formats = {"load_in_8bit": self.load_in_8bit, "load_in_4bit": self.load_in_4bit}
        formats["gguf_file"] = self.gguf_file is not None
        given = [name for name, is_given in formats.items() if is_given]
        if len(given) > 1:
            raise LayerPruneError(
                f"{given[0]} is set together with {given[1]}, but a model has one format. Set one of them."
            )

    @property
    def quantized(self) -> str | None:
        """Returns the name of the setting that quantises the weights; None if they are not quantised."""
        names = [name for name in ("load_in_8bit", "load_in_4bit") if getattr(self, name)]
        return names[0] if names else None


@dataclass
class TeacherArguments:
    """The model that the pruned model learns from."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder (also of `cache-teacher`) or hub id of the teacher. It may have more layers, as "
            "the original of a pruned MODEL. Default: the model itself."
        },
    )


@dataclass
class TextArguments:
    """Settings of text loading."""

    data_field: str = field(
        default="text",
        metadata={"help": "Column with plain text. Chats and prompts are found without it."},
    )
    data_template: str | None = field(
        default=None,
        metadata={"help": "Text from several columns, as '{instruction}\\n{output}'. \\n begins a new line."},
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
            "help": "Read the text during training. For run and distill. The first sequences are for "
            "calibration and evaluation."
        },
    )

    self_sequences: int = field(
        default=512,
        metadata={"help": "For data self: sequences to write at most. Default: 512."},
    )
    self_length: int | None = field(
        default=None,
        metadata={"help": "For data self: tokens of a text at most. Default: the sequence length."},
    )
    self_temperature: float = field(
        default=1.0, metadata={"help": "For data self: temperature of sampling. Default: 1."}
    )

    def __post_init__(self) -> None:
        if self.self_sequences < 1 or self.self_temperature <= 0 or (self.self_length or 2) < 2:
            raise LayerPruneError(
                f"self_sequences is {self.self_sequences}, self_length is {self.self_length} and "
                f"self_temperature is {self.self_temperature}. Choose at least 1 sequence, a length of 2 or "
                "more tokens, and a temperature above 0."
            )
        if self.data_template is not None:  # a shell passes \\n as two characters
            self.data_template = self.data_template.replace("\\n", "\n")


@dataclass
class CalibrationArguments:
    """Settings of the amount of calibration text."""

    calibration_sequences: int = field(
        default=16, metadata={"help": "Sequences of the text to score layers on."}
    )


@dataclass
class SampleArguments(CalibrationArguments):
    """Settings of the amount of calibration and evaluation text."""

    heldout_sequences: int = field(
        default=16, metadata={"help": "Sequences of the text to measure perplexity on."}
    )


@dataclass
class TrainingSampleArguments(SampleArguments):
    """Settings of the amount of text, and of the text to train on."""

    repeat_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training sequences whose first half is read twice, so that the model still "
            "copies text. Only for text with packing joined and loss_on all."
        },
    )
