"""Loads the model and the text of a run, and checks them before any long work."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_torch_tf32_available

from ..checkpoints.loading import load_class, load_model, load_processor, load_tokenizer, stored_dtype
from ..data.arguments import SequenceArguments
from ..data.batches import has_rows, make_batches, rows_of, split_rows
from ..data.own_text import SELF, write_own_text
from ..data.pictures import PictureCollator, check_pictures, hold_pictures, picture_dataset
from ..data.processes import process_index, run_together
from ..data.repeats import COLUMNS, check_repeat_share, repeat_passages
from ..data.sequences import (
    check_sequence_length,
    prepare_dataset,
    resolve_length,
    split_sequences,
    stream_sequences,
)
from ..data.sources import SUPPORTED, load_rows, names_of
from ..data.texts import holds_text
from ..distillation.arguments import DTYPES, DistillationTrainingArguments
from ..distillation.checks import quantised_weights
from ..distillation.teacher_cache import is_teacher_cache
from ..errors import LayerPruneError
from ..files import cache_folder
from ..forward.hooks import undisturbed
from ..scoring.score import check_criterion_fits, fingerprint
from ..surgery.decoder import check_next_token
from .arguments import ModelArguments, SampleArguments, TextArguments, TrainingSampleArguments


logger = logging.getLogger(__name__)

OWN_TEXT = "text that the model wrote"  # the name of generated text in records and cards
Parts = tuple[Dataset, Dataset, Any]  # rows for calibration, evaluation and training


Processor = Callable[[], Any]  # returns the processor of a vision-language model, or None


def no_processor() -> None:
    """Returns None: without a processor, no pictures are read."""


def processor_of(name: str, source: ModelArguments) -> Processor:
    """Returns a function that loads the processor of a model at its first call."""
    return cache(partial(load_processor, name, source.trust_remote_code))


def check_model(
    name: str, source: ModelArguments, what: str, criterion: str | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Returns the config and the tokenizer of a model, without loading its weights.

    Args:
        name (`str`): folder or hub id of the model.
        source ([`ModelArguments`]): settings of model loading.
        what (`str`): the purpose of the model, for errors.
        criterion (`str`, *optional*): the criterion that scores the layers. Without it, the model must
            predict next tokens.

    Raises:
        LayerPruneError: the model does not exist, or it is of an unsuitable kind.
    """
    config, cls = load_class(name, source.trust_remote_code, source.gguf_file)
    if criterion is None:
        check_next_token(cls, what)
    else:
        check_criterion_fits(cls, criterion)
    return config, load_tokenizer(name, source.trust_remote_code, source.gguf_file)


def check_loading_for_training(source: ModelArguments, all_weights: bool = True) -> None:
    """Checks before weights are loaded that a model can be trained with these loading settings.

    Args:
        source ([`ModelArguments`]): settings of model loading.
        all_weights (`bool`, *optional*, defaults to `True`): whether the weights of the model are trained
            instead of adapters.

    Raises:
        LayerPruneError: the model cannot be trained.
    """
    if source.device_map is not None:
        raise LayerPruneError(
            f"device_map is {source.device_map}, but training keeps a model on one device for each process. "
            "Leave device_map out, and start with `accelerate launch` to share a model over GPUs (FSDP)."
        )
    if all_weights and source.quantized:
        raise LayerPruneError(
            f"{source.quantized} is set, but quantised weights cannot be trained. Train LoRA adapters with "
            "`distill --lora_rank 16`, or load the model in float32."
        )
    if all_weights and source.dtype == "float16":
        raise LayerPruneError(
            "dtype is float16, but float16 weights cannot be trained: small gradients and updates become 0. "
            "Set dtype to float32, with bf16 or fp16 for the precision of the forward pass."
        )


def check_stored_weights(config: PreTrainedConfig, name: str) -> None:
    """Checks before weights are loaded that the weights of a stored model can be trained.

    Raises:
        LayerPruneError: the weights are quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise quantised_weights(config, name)


def check_teacher_exists(name: str | None, trust_remote_code: bool) -> None:
    """Checks before any text is read that the teacher exists. None means no teacher.

    Raises:
        LayerPruneError: the teacher does not exist or does not predict next tokens.
    """
    if name is not None and not is_teacher_cache(name):
        check_next_token(load_class(name, trust_remote_code)[1], "The teacher")


def load_on_device(name: str, source: ModelArguments, dtype: str = "auto") -> Any:
    """Returns a model on the devices of `source.device_map`. Default: the GPU, or the CPU if there is no GPU.

    Args:
        name (`str`): folder or hub id of the model.
        source ([`ModelArguments`]): settings of model loading.
        dtype (`str`, *optional*, defaults to `"auto"`): dtype of the weights, unless `source` sets a dtype.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = loading_options(source, dtype)
    if source.quantized and source.device_map is None:
        options["device_map"] = {"": device}  # a quantised model cannot be moved
    model: Any = load_model(name, **options)
    return model if "device_map" in options else model.to(device)


def loading_options(source: ModelArguments, dtype: str = "auto") -> dict[str, Any]:
    """Returns the arguments of [`load_model`]. Weights have `dtype`, unless `source` sets a dtype."""
    options: dict[str, Any] = {
        "dtype": dtype if source.dtype == "auto" else source.dtype,
        "trust_remote_code": source.trust_remote_code,
    }
    for name in ("attn_implementation", "device_map", "gguf_file"):
        if getattr(source, name) is not None:
            options[name] = getattr(source, name)
    if source.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif source.load_in_4bit:
        compute = torch.bfloat16 if has_bf16() else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    elif source.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    return options


def has_bf16() -> bool:
    """Returns whether a GPU that supports bfloat16 is available."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_of_training(given: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the precision settings for fast training: bfloat16 autocast and TF32, if the GPU supports them.

    On a CPU no setting is returned.

    Args:
        given (mapping): the settings of the user. They are not overridden.
    """
    if not torch.cuda.is_available() or given.get("use_cpu") or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return {}
    settings: dict[str, bool] = {}
    if has_bf16() and not {"bf16", "fp16"} & {*given}:
        settings["bf16"] = True
    if is_torch_tf32_available() and "tf32" not in given:
        settings["tf32"] = True
    return settings


def keep_stored_dtype(args: DistillationTrainingArguments, name: str, source: ModelArguments) -> None:
    """Sets `save_dtype` in `args`, in place, to the dtype of the stored model, unless it is already set."""
    if source.gguf_file is not None:  # GGUF stores weights in blocks
        return
    dtype = str(stored_dtype(name, source.trust_remote_code)).removeprefix("torch.")
    if args.save_dtype is None and dtype in DTYPES and dtype != "float32":
        args.save_dtype = dtype


def check_reporters(report_to: str | list[str]) -> None:
    """Checks that the services in `report_to` are known and installed.

    Raises:
        LayerPruneError: a service is unknown or not installed.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    try:
        for reporter in get_reporting_integration_callbacks(report_to):
            reporter()
    except (ImportError, RuntimeError, ValueError) as error:
        raise LayerPruneError(f"report_to={' '.join(names)!r}: {error}") from error


def make_sequences(
    data: Any,
    text: TextArguments,
    sequence: SequenceArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    limit: int | None = None,
    writer: Callable[[], PreTrainedModel] | None = None,
    processor: Processor = no_processor,
) -> Dataset:
    """Returns rows of tokens with labels, made of text. Rows with pictures are returned unchanged.

    Args:
        data: sources that [`load_rows`] reads, as a `str`, a `Path` or a list of `Path`; `"self"`; or rows in
            memory: texts, chats, prompts, a `Dataset`, or tokens in a form that [`make_batches`] accepts.
        text ([`TextArguments`]): settings of text loading.
        sequence ([`SequenceArguments`]): settings of the sequences.
        config (`PreTrainedConfig`): the config of the model that reads the text.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's tokenizer. Text needs it.
        limit (`int`, *optional*): maximum number of sequences made of text.
        writer (`Callable`, *optional*): a function that returns the model that generates text for `"self"`.
        processor (`Callable`, *optional*): a function that returns the processor for pictures, or None.

    Raises:
        LayerPruneError: the text does not exist, or it cannot be read or made into sequences with these
            settings.
    """
    if isinstance(data, Dataset) and {"input_ids", "labels"} <= {*data.column_names}:
        return data
    form = _form(text, sequence, config)
    sources = _sources_of(data)
    if SELF in sources:
        limit = min(limit or text.self_sequences, text.self_sequences)
        rows = _own_text(sources, text, form["length"], _needed(tokenizer), limit, sequence.loss_on, writer)
        form |= {"template": None, "column": "text"}
        sequences = prepare_dataset(rows, _needed(tokenizer), limit=limit, name=OWN_TEXT, **form)
        sequences.info.dataset_name = OWN_TEXT
        return sequences
    if sources:
        rows = load_rows(sources, text.data_split, text.data_config, text.data_revision)
        name = text_name(sources, text)
        if _has_pictures(rows, text, processor):
            rows.info.dataset_name = name
            return _picture_rows(rows, processor, text, sequence, limit)
        sequences = prepare_dataset(rows, _needed(tokenizer), limit=limit, name=name, **form)
        sequences.info.dataset_name = name
        return sequences
    if data is None:
        raise LayerPruneError(f"There is no data. Give {SUPPORTED}, or a list of texts.")
    rows = rows_of(data)
    if _holds_text(rows, text) and _has_pictures(rows, text, processor):
        return _picture_rows(rows, processor, text, sequence, limit)
    if _holds_text(rows, text):
        sequences = prepare_dataset(rows, _needed(tokenizer), limit=limit, **form)
        if isinstance(data, Dataset):
            sequences.info.dataset_name = data.info.dataset_name
        return sequences
    batches = make_batches(rows, 1)
    if not all(map(has_rows, batches)):
        raise LayerPruneError(
            "The data holds batches with pictures, or with values that are not one for each row. Give rows "
            "with text and a column images, or batches of tokens."
        )
    alone = [row for batch in batches for row in split_rows(batch, 1)]  # a given batch may have many rows
    tokens = [{name: value[0].tolist() for name, value in row.items()} for row in alone]
    return Dataset.from_list([{"labels": row["input_ids"]} | row for row in tokens])


def _has_pictures(rows: Any, text: TextArguments, processor: Processor) -> bool:
    """Returns whether rows are read with their pictures. A template reads only the columns that it names."""
    return text.data_template is None and hold_pictures(rows) and processor() is not None


def _picture_rows(
    rows: Any, processor: Processor, text: TextArguments, sequence: SequenceArguments, limit: int | None
) -> Dataset:
    """Returns the first rows, and checks that the processor can read all of them.

    Raises:
        LayerPruneError: a row cannot be read, or the sequences are set to be packed.
    """
    if sequence.packing == "packed":
        raise LayerPruneError(
            "packing is 'packed', but rows with pictures are not packed: each row is one sequence. Set "
            "packing to 'none'."
        )
    if not isinstance(rows, Dataset):
        rows = picture_dataset(rows[:limit], text.data_field)
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    check_pictures(rows, PictureCollator(processor(), sequence.loss_on, text.data_field))
    return rows


def picture_collator(
    rows: Any, processor: Processor, text: TextArguments, sequence: SequenceArguments
) -> PictureCollator | None:
    """Returns the data collator for rows of [`make_sequences`] with pictures, None for rows of tokens."""
    if not isinstance(rows, Dataset) or "input_ids" in rows.column_names:
        return None
    return PictureCollator(processor(), sequence.loss_on, text.data_field)


def load_writer(name: str, source: ModelArguments) -> PreTrainedModel:
    """Returns a model that generates text. On a CPU it computes in float32, which is faster there."""
    return load_on_device(name, source, dtype="auto" if torch.cuda.is_available() else "float32")


def _own_text(
    sources: list[str],
    text: TextArguments,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    loss_on: str,
    writer: Callable[[], PreTrainedModel] | None,
) -> list[dict[str, Any]]:
    """Returns rows of text that a model generates. They are read from the cache folder if it has them.

    Raises:
        LayerPruneError: no model can generate text, other data is also given, or a setting is only for files.
    """
    if sources != [SELF] or writer is None or text.streaming:
        given = "other data is given too" if sources != [SELF] else "streaming is set"
        given = "no single model is there to write it" if writer is None else given
        raise LayerPruneError(
            f"data is {SELF}, text that the model writes, but {given}. Give {SELF} alone, to a command or "
            "call with one model, without streaming."
        )
    if loss_on != "all":
        raise LayerPruneError(
            f"data is {SELF} and loss_on is {loss_on}, but half of the text that the model writes is "
            "documents, which have no completion. Leave loss_on out."
        )
    settings: dict[str, Any] = {"length": text.self_length or length, "temperature": text.self_temperature}

    def write() -> list[dict[str, Any]]:
        model: Any = writer()
        check_next_token(model, f"data {SELF}")
        check_sequence_length(settings["length"], model)
        mark = fingerprint([model], [], [settings, getattr(tokenizer, "chat_template", None)])
        path = cache_folder() / SELF / f"{Path(model.name_or_path).name or 'model'}-{mark[:16]}.jsonl"
        logger.info("The model writes text in %s.", path)
        with undisturbed(model):
            # Generate one more sequence, because the texts are cut into sequences again.
            return write_own_text(model, tokenizer, path, tokens=(sequences + 1) * length, **settings)

    # One process writes: all need the same text, and the file has one writer.
    return run_together(lambda: write() if process_index() == 0 else [])[0]


def _sources_of(data: Any) -> list[str]:
    """Returns the names of sources. The list is empty if `data` is rows in memory.

    Raises:
        LayerPruneError: a list of strings names files. The strings would be read as texts.
    """
    if isinstance(data, (str, Path)):
        return [str(data)]
    if not isinstance(data, (list, tuple)) or not data:
        return []
    if all(isinstance(one, Path) for one in data):
        return [str(one) for one in data]
    if isinstance(data[0], str) and len(data[0]) < 256 and data[0].strip() and Path(data[0]).is_file():
        raise LayerPruneError(
            f"data is a list of strings, which are taken for texts, but {data[0]} is a file. Give a list of "
            "pathlib.Path to read files."
        )
    return []


def _form(text: TextArguments, sequence: SequenceArguments, config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the settings of [`prepare_dataset`]."""
    return {
        "length": resolve_length(sequence.sequence_length, config),
        "packing": sequence.packing,
        "loss_on": sequence.loss_on,
        "template": text.data_template,
        "column": text.data_field,
    }


def _holds_text(rows: Any, text: TextArguments) -> bool:
    try:
        first = rows[0]
    except (IndexError, KeyError, TypeError):  # no rows, a table or a set
        return False
    if text.data_template is not None:
        return isinstance(first, dict)
    return holds_text(first, text.data_field)


def split_text(
    data: Any,
    text: TextArguments,
    sequence: SequenceArguments,
    sample: TrainingSampleArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    max_steps: int,
    writer: Callable[[], PreTrainedModel] | None = None,
    processor: Processor = no_processor,
) -> Parts:
    """Returns rows of tokens in three parts, for calibration, evaluation and training.

    Args:
        data, text, sequence, config, tokenizer, writer, processor: see [`make_sequences`].
        sample ([`TrainingSampleArguments`]): number of rows for calibration and evaluation, and the share of
            rows for training that repeat a passage.
        max_steps (`int`): number of training steps. A stream needs it, as it has no known length.

    Raises:
        LayerPruneError: [`make_sequences`] fails, or there is too little text.
    """
    calibration, heldout = sample.calibration_sequences, sample.heldout_sequences
    check_repeat_share(sample.repeat_share)
    if data is not None and not _sources_of(data):
        data = rows_of(data)  # an iterator can be read only once
    if not text.streaming or SELF in _sources_of(data):
        sequences = make_sequences(
            data, text, sequence, config, tokenizer, writer=writer, processor=processor
        )
        *others, train = split_sequences(sequences, calibration, heldout)
        return *others, _repeated(train, data, text, sequence, sample)
    sources = _sources_of(data)
    if not sources:
        raise LayerPruneError(
            f"streaming reads files or a data set on the hub, but data is a {type(data).__name__}. Leave "
            "streaming out."
        )
    if max_steps < 0:
        raise LayerPruneError("A stream has no known end. Set max_steps to say how long to train.")
    if max_steps == 0:
        sequences = make_sequences(data, text, sequence, config, tokenizer, calibration + heldout)
        return split_sequences(sequences, calibration, heldout)
    origin = {"split": text.data_split, "config": text.data_config, "revision": text.data_revision}
    form = _form(text, sequence, config) | origin
    head, train = stream_sequences(_needed(tokenizer), first=calibration + heldout, source=sources, **form)
    head.info.dataset_name = train.info.dataset_name = text_name(sources, text)
    train = _repeated(train, data, text, sequence, sample)
    return *split_sequences(head, calibration, heldout)[:2], train


def _repeated(
    train: Any, data: Any, text: TextArguments, sequence: SequenceArguments, sample: TrainingSampleArguments
) -> Any:
    """Returns the rows for training, with [`repeat_passages`] if they are text that was joined and cut.

    Other rows would lose half of a chat or of an answer. For them `sample.repeat_share` becomes 0, in place.
    """
    is_text = bool(_sources_of(data)) or _holds_text(data, text)
    is_joined = sequence.packing == "joined" and sequence.loss_on == "all"
    has_tokens = {*(train.column_names or COLUMNS)} == COLUMNS
    if not (is_text and is_joined and has_tokens):
        sample.repeat_share = 0.0
    return repeat_passages(train, sample.repeat_share)


def check_text_is_left(train: Any, sample: SampleArguments) -> None:
    """Checks that there are rows to train on.

    Raises:
        LayerPruneError: calibration and evaluation use all rows.
    """
    if isinstance(train, Dataset) and not len(train):
        taken = sample.calibration_sequences + sample.heldout_sequences
        raise LayerPruneError(
            f"Calibration and evaluation take all {taken} sequences of the text, so none is left to train "
            "on. Give more text, or lower calibration_sequences and heldout_sequences."
        )


def text_name(sources: Iterable[str | Path], text: TextArguments) -> str:
    """Returns the name of a text for a model card: its files, or its id and configuration on the hub."""
    name = names_of(sources)
    return f"{name}, {text.data_config}" if text.data_config else name


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise LayerPruneError("The data is text, which needs a tokenizer. Give tokenizer=.")
    return tokenizer
