"""Texts and chats as token sequences, and these as batches with masks and targets."""

import codecs
import gzip
import inspect
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)
from transformers.utils import logging

from .errors import LayerPruneError


logger: Any = logging.get_logger(__name__)  # of transformers, as it has warning_once

Batch = Mapping[str, torch.Tensor]

# The loader of the datasets library for each file type.
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".jsonl.gz": ("json", {}),
}


def load_texts(
    source: str, field: str = "text", split: str = "train", config: str | None = None
) -> list[str]:
    """Reads documents from a .txt, .jsonl or .jsonl.gz file, or from a data set on the hub.

    Args:
        source (`str`): path of a file, or id of a data set.
        field (`str`, *optional*, defaults to `"text"`): the column that holds the text.
        split (`str`, *optional*, defaults to `"train"`): the split of a data set, for example
            `"train[:1000]"`.
        config (`str`, *optional*): the configuration of a data set.

    Raises:
        LayerPruneError: there is no such file, data set or field, or no text in it.
    """
    dataset = _load(source, field, split, config)
    texts = list(_documents(dataset[field], source, field))
    if not texts:
        raise LayerPruneError(f"There is no text in {source}.")
    return texts


def _documents(values: Iterable[Any], source: str, field: str) -> Iterator[str]:
    """Yields the values that are texts and not empty. Logs the number of others, also if it is stopped
    early."""
    read, skipped = 0, 0
    try:
        for value in values:
            read += 1
            if isinstance(value, str) and value.strip():
                yield value
            else:
                skipped += 1
    finally:
        if skipped:
            logger.warning_once(
                f"{source}: {skipped} of {read} rows have no text in {field!r} and are skipped."
            )


def load_rows(source: str, split: str = "train", config: str | None = None, streaming: bool = False) -> Any:
    """Returns a data set of the `datasets` library from a .txt, .jsonl or .jsonl.gz file, or from the hub.

    Args:
        source, split, config: see [`load_texts`].
        streaming (`bool`, *optional*, defaults to `False`): read rows on demand.

    Raises:
        LayerPruneError: there is no such file or data set.
    """
    path = Path(source)
    kind = next((suffix for suffix in LOADERS if path.name.endswith(suffix)), None)
    if kind is not None and not path.is_file():
        raise LayerPruneError(f"No such file: {source}")
    if kind is None and path.exists():
        raise LayerPruneError(f"Cannot read {source}: expected a file ending in {', '.join(LOADERS)}.")
    if kind is not None:
        _check_utf8(path, STREAM_CHECKED if streaming else None)
    try:
        if kind is not None:
            loader, options = LOADERS[kind]
            options = options | {"data_files": str(path), "split": "train", "streaming": streaming}
            return load_dataset(loader, **options)
        return load_dataset(source, config, split=split, streaming=streaming)
    except (DatasetGenerationError, DatasetNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(source, error) from error


STREAM_CHECKED = 2**24  # bytes of a stream that are checked before it is read


def _check_utf8(path: Path, most: int | None) -> None:
    """Checks that a file, or its first `most` bytes, is UTF-8 text.

    Raises:
        LayerPruneError: it is not.
    """
    decoder, read, wide = codecs.getincrementaldecoder("utf-8")(), 0, False
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            while (most is None or read < most) and (piece := file.read(2**20)):
                wide = b"\0" in piece  # as every second byte of English in UTF-16 is
                decoder.decode(piece)
                if wide:
                    raise UnicodeError("it holds zero bytes")
                read += len(piece)
            if most is None:
                decoder.decode(b"", final=True)
    except UnicodeError as error:
        encoding = "UTF-16" if wide else "ISO-8859-1"
        raise LayerPruneError(
            f"{path} is not UTF-8 ({error}), but text files must be. Convert the file, for example: "
            f"iconv -f {encoding} -t UTF-8 {path.name} > NEW_FILE"
        ) from error
    except (OSError, EOFError, zlib.error):  # a missing or damaged file, which the loader reports
        return


def _unreadable(source: str, error: Exception) -> LayerPruneError:
    return LayerPruneError(f"Cannot read text from {source}: {' '.join(str(error).split())[:300]}")


def _load(source: str, field: str, split: str, config: str | None, streaming: bool = False) -> Any:
    dataset = load_rows(source, split, config, streaming)
    try:
        columns = dataset.column_names or list(next(iter(dataset)))  # of a stream only the rows tell
    except StopIteration as error:
        raise LayerPruneError(f"There is no text in {source}.") from error
    except (DatasetGenerationError, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(source, error) from error
    if field not in columns:
        raise LayerPruneError(f"{source} has no field {field!r}, only {columns}.")
    return dataset


def stream_sequences(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    first: int,
    source: str,
    field: str = "text",
    split: str = "train",
    config: str | None = None,
) -> tuple[Dataset, IterableDataset]:
    """Returns token sequences of a text that is read during training and is never completely in memory.

    Args:
        tokenizer, length: see [`token_sequences`].
        first (`int`): the number of sequences at the beginning that are held out for calibration and
            evaluation.
        source, field, split, config: see [`load_texts`].

    Returns:
        `tuple[Dataset, IterableDataset]`: the first sequences, and all others.

    Raises:
        LayerPruneError: as [`load_texts`], or the text has no sequence after the first ones.
    """
    texts = {"source": source, "field": field, "split": split, "config": config}
    settings: dict[str, Any] = {"tokenizer": tokenizer, "length": length, **texts}
    head = list(islice(_stream(**settings), first + 1))
    if len(head) <= first:
        raise LayerPruneError(
            f"{source} has {len(head)} sequences of {length} tokens, of which the first {first} are not "
            "trained on. Give more text, or ask for fewer sequences."
        )
    rest = IterableDataset.from_generator(_stream, gen_kwargs=settings | {"skip": first})
    return Dataset.from_list(head[:first]), rest


def _stream(
    tokenizer: PreTrainedTokenizerBase, length: int, skip: int = 0, **texts: Any
) -> Iterator[dict[str, list[int]]]:
    field = texts["field"]
    rows = (row[field] for row in _load(**texts, streaming=True))
    documents = _documents(rows, texts["source"], field)
    for sequence in islice(_sequences(documents, tokenizer, length), skip, None):
        yield {"input_ids": sequence, "labels": sequence}


def token_sequences(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> Dataset:
    """Tokenises documents, joins them with the end-of-text token, and cuts them into sequences of equal
    length. Each begins with the beginning-of-text token if the tokenizer adds one.

    Args:
        texts (iterable of `str`): documents.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        length (`int`): tokens per sequence. An incomplete last sequence is dropped.
        limit (`int`, *optional*): the largest number of sequences. Default: all.

    Returns:
        `datasets.Dataset`: columns `input_ids` and `labels`, each of `length` tokens.

    Raises:
        LayerPruneError: the text is shorter than one sequence, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise LayerPruneError(f"{limit} sequences are asked for. Choose at least 1.")
    sequences = list(islice(_sequences(texts, tokenizer, length), limit))
    return Dataset.from_dict({"input_ids": sequences, "labels": sequences})


def _sequences(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Yields the sequences of [`token_sequences`]. Raises its errors."""
    if length < 2:
        raise LayerPruneError(f"A sequence of {length} tokens has nothing to predict. Use 2 or more.")
    last = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    end = [] if last is None else [last]
    # The token that the tokenizer puts before a text, as [CLS] of BERT. Gemma needs it to predict well.
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    start = [token for token in tokenizer("")["input_ids"] if token in first][:1]
    size = length - len(start)
    tokens, has_sequence = list[int](), False
    for text in texts:
        # verbose=False: a document may be longer than the model's context, its sequences are not.
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        whole = len(tokens) // size * size
        for i in range(0, whole, size):
            has_sequence = True
            yield start + tokens[i : i + size]
        tokens = tokens[whole:]
    if not has_sequence:
        raise LayerPruneError(
            f"The text has {len(tokens)} tokens, less than one sequence of {length}. Give more text or "
            "a smaller sequence_length."
        )


def check_sequence_length(length: int, model: PreTrainedModel | PreTrainedConfig) -> None:
    """Checks that the context of a model is long enough for sequences of `length` tokens.

    Raises:
        LayerPruneError: the context is shorter.
    """
    longest = context_length(model)
    if longest is not None and length > longest:
        raise LayerPruneError(f"sequence_length is {length}, but the model reads {longest} tokens at most.")


def context_length(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """Returns the context length of a model in tokens; None if its config has none."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def split_sequences(sequences: Dataset, calibration: int, heldout: int) -> tuple[Dataset, Dataset, Dataset]:
    """Splits sequences into a part for calibration and one for evaluation, both spread evenly over the text,
    and the rest for training.

    Raises:
        LayerPruneError: there are too few sequences, or a part would be empty.
    """
    taken = calibration + heldout
    if calibration < 1 or heldout < 1 or taken > len(sequences):
        raise LayerPruneError(
            f"Cannot take {calibration} sequences for calibration and {heldout} for evaluation (at least 1 "
            f"each) out of {len(sequences)}. Give more text, a smaller sequence_length, or ask for fewer."
        )
    spread = [i * len(sequences) // taken for i in range(taken)]
    chosen = {spread[i * taken // calibration] for i in range(calibration)}
    return (
        sequences.select(sorted(chosen)),
        sequences.select([i for i in spread if i not in chosen]),
        sequences.select([i for i in range(len(sequences)) if i not in set(spread)]),
    )


def make_batches(
    data: Any,
    batch_size: int = 8,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    *,
    tokenizer: Any = None,
    sequence_length: int = 256,
    columns: Collection[str] | None = None,
) -> list[Batch]:
    """Returns batches of tokens from calibration or evaluation data of any common form.

    Args:
        data: tokens or text.
            Tokens: a data set, stream or list of rows, a tensor, one batch, or a list, generator or loader of
            batches. Batches are not changed.
            Text: a list of strings, or rows with `text`, `messages`, or `prompt` and `completion`, as in trl.
            It is cut into sequences ([`token_sequences`]), in which all tokens count.
        batch_size (`int`, *optional*, defaults to 8): rows per batch.
        collate (`Callable`, *optional*): makes a batch of rows of tokens, as a Trainer's `data_collator`.
            Default: rows of unequal length are padded.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's tokenizer or processor, for text.
        sequence_length (`int`, *optional*, defaults to 256): tokens per sequence of text, fewer of a short
            text.
        columns (collection of `str`, *optional*): the columns to keep, see [`model_columns`]. Default: all.

    Returns:
        `list[dict[str, torch.Tensor]]`: batches with `input_ids` `(batch, length)`.

    Raises:
        LayerPruneError: the data is empty or of another form, text has no tokenizer, or `batch_size` is
            below 1.

    Example:

    ```python
    batches = make_batches(["A text.", "Another one."], tokenizer=tokenizer)
    batches = make_batches(load_texts("text.jsonl")[:100], tokenizer=tokenizer, sequence_length=512)
    ```
    """
    if batch_size < 1:
        raise LayerPruneError(f"The batch size is {batch_size}: it must be at least 1.")
    rows = _rows_or_batches(data)
    if len(rows) == 0:
        raise LayerPruneError("The calibration or evaluation data is empty.")
    try:
        rows = [rows[i] for i in range(len(rows))]
    except (KeyError, TypeError) as error:  # a table, a set
        raise _unknown_form(data) from error
    if _is_batch(rows[0]):
        return [_as_batch(batch) for batch in rows]
    if not _is_tokens(rows[0]):
        tokenizer = tokenizer if hasattr(tokenizer, "bos_token_id") else getattr(tokenizer, "tokenizer", None)
        rows, collate = _text_sequences(rows, tokenizer, sequence_length), None
    elif columns is not None:
        rows = [{name: value for name, value in _as_row(row).items() if name in columns} for row in rows]
    else:
        rows = [_as_row(row) for row in rows]
    # A separate generator: a loader draws a seed, and scoring must not change the random state.
    generator = torch.Generator()
    return list(DataLoader(rows, batch_size, collate_fn=collate or _padded, generator=generator))


def iterate_batches(data: Any) -> Iterable[Batch]:
    """Returns the batches of a generator or loader one by one, those of other data by [`make_batches`]."""
    return data if isinstance(data, (DataLoader, Iterator)) else make_batches(data)


def model_columns(model: PreTrainedModel) -> set[str]:
    """Returns the names of the columns that `model` reads, and those of labels."""
    return {*inspect.signature(type(model).forward).parameters, "labels", "label", "label_ids"}


def check_token_labels(batches: Iterable[Batch]) -> None:
    """Checks that batches with labels have one label per token.

    Raises:
        LayerPruneError: labels have another shape, for example one label per row.
    """
    if any("labels" in batch and batch["labels"].shape != batch["input_ids"].shape for batch in batches):
        raise LayerPruneError(
            "The labels have another shape than input_ids. A causal language model needs one label for each "
            "token: leave the labels out, or give one for each token."
        )


def take_rows(stream: Iterable[Any]) -> list[Any]:
    """Returns all entries of a stream, generator or loader.

    Raises:
        LayerPruneError: it has more than [`MOST_ROWS`] entries, and may be endless.
    """
    rows = list(islice(stream, MOST_ROWS + 1))
    if len(rows) > MOST_ROWS:
        raise LayerPruneError(
            f"The data is a {type(stream).__name__} of more than {MOST_ROWS:,} entries. Give the first ones "
            "alone, for example data.take(1000) or itertools.islice(data, 1000)."
        )
    return rows


MOST_ROWS = 10_000
TEXT_COLUMNS = ("text", "messages", "prompt")


def _rows_or_batches(data: Any) -> Any:
    """Returns the rows or batches of data of any form, in a container with a length."""
    if isinstance(data, (str, bytes, Path)):
        raise LayerPruneError(
            f"The data is the string {str(data)[:80]!r}. Give a list of texts, and a tokenizer with it: "
            "load_texts(path) reads the texts of a file."
        )
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data) if data.dtype.kind in "iuf" else data.tolist()
    if torch.is_tensor(data):
        _check_token_ids(data)
        return [{"input_ids": row} for row in torch.atleast_2d(data)]
    if isinstance(data, Mapping):
        splits = [name for name, value in data.items() if isinstance(value, (Dataset, IterableDataset))]
        if splits:
            raise LayerPruneError(
                f"The data has the splits {splits}. Give one of them, as data[{splits[0]!r}]."
            )
        return [data]
    if isinstance(data, (DataLoader, IterableDataset, Iterator)) or not hasattr(data, "__len__"):
        try:
            return take_rows(data)
        except TypeError as error:
            raise _unknown_form(data) from error
    return data


def _is_batch(entry: Any) -> bool:
    """Returns whether an entry is a batch and no row."""
    value = entry.get("input_ids") if isinstance(entry, Mapping) else entry
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return value.ndim == 2
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (list, tuple))


def _is_tokens(entry: Any) -> bool:
    """Returns whether a row holds token ids."""
    if isinstance(entry, Mapping):
        return "input_ids" in entry
    return torch.is_tensor(entry) or (
        isinstance(entry, (list, tuple)) and bool(entry) and all(type(token) is int for token in entry)
    )


def _as_row(row: Any) -> dict[str, Any]:
    """Returns a row of tokens as a dict, without texts and empty values."""
    columns = row if isinstance(row, Mapping) else {"input_ids": row}
    numbers = {name: x for name, x in columns.items() if not isinstance(x, (str, bytes, type(None)))}
    _check_token_ids(torch.as_tensor(numbers["input_ids"]))
    return numbers


def _as_batch(batch: Any) -> Batch:
    """Returns a batch of tensors, from a batch of tensors or lists, or from bare token ids."""
    if not isinstance(batch, Mapping):
        batch = {"input_ids": batch}
    if not _is_batch(batch):
        raise LayerPruneError(
            "Only some entries of the data are batches: input_ids must be of two dimensions."
        )
    if torch.is_tensor(batch["input_ids"]):
        _check_token_ids(batch["input_ids"])
        return {name: value for name, value in batch.items() if torch.is_tensor(value)}
    lengths = {len(row) for row in batch["input_ids"]}
    if len(lengths) == 1:
        names = [name for name, value in batch.items() if np.ndim(value) and len(value)]
        return {name: torch.as_tensor(batch[name]) for name in names}
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return _padded(rows)


def _check_token_ids(ids: torch.Tensor) -> None:
    if ids.is_floating_point() or ids.dim() not in (1, 2):
        raise LayerPruneError(
            f"input_ids is a tensor of {ids.dtype} of shape {tuple(ids.shape)}. It must hold whole numbers, "
            "of shape (batch, length)."
        )


def _padded(rows: list[Any]) -> dict[str, Any]:
    """Returns a batch of rows. Rows of unequal length are padded on the right, with an attention mask."""
    lengths = [len(row["input_ids"]) for row in rows]
    if min(lengths) == max(lengths):
        return default_data_collator(rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100, "token_type_ids": 0, "position_ids": 0}
    padded = []
    for row, length in zip(rows, lengths, strict=True):
        row = {"attention_mask": [1] * length, **row}
        more = max(lengths) - length
        of_tokens = [name for name in row if name in fill and np.ndim(row[name]) and len(row[name]) == length]
        padded.append(
            row | {name: [*torch.as_tensor(row[name]).tolist(), *[fill[name]] * more] for name in of_tokens}
        )
    return default_data_collator(padded)


def _text_sequences(rows: Any, tokenizer: Any, length: int) -> Dataset:
    """Returns token sequences of rows of text, shorter ones if there is little text."""
    first = rows[0]
    known = isinstance(first, str) or (
        isinstance(first, Mapping) and any(name in first for name in TEXT_COLUMNS)
    )
    if not known and not _is_chat(first):
        raise _unknown_form(first)
    if tokenizer is None:
        raise LayerPruneError(
            "The data is text, which needs a tokenizer. Give tokenizer= (in training, processing_class= of "
            "the Trainer), or give tokens: token_sequences(texts, tokenizer, 256) makes them."
        )
    texts = [text for text in (_text_of(row, tokenizer) for row in rows) if text.strip()]
    if not texts:
        raise LayerPruneError("There is no text in the calibration or evaluation data.")
    tokens = 0
    for text in texts:
        tokens += len(tokenizer(text, verbose=False)["input_ids"])
        if tokens >= length:
            break
    return token_sequences(texts, tokenizer, max(2, min(length, tokens)))


def _is_chat(row: Any) -> bool:
    return isinstance(row, (list, tuple)) and bool(row) and isinstance(row[0], Mapping) and "role" in row[0]


def _text_of(row: Any, tokenizer: Any) -> str:
    """Returns the text of a row: a string, or a column of text, chat messages, or prompt and completion."""
    if isinstance(row, str):
        return row
    if _is_chat(row):
        return _chat_text(row, tokenizer)
    if not isinstance(row, Mapping) or not any(name in row for name in TEXT_COLUMNS):
        raise _unknown_form(row)
    if isinstance(row.get("text"), str):
        return row["text"]
    parts = row.get("messages") or [row.get("prompt"), row.get("completion")]
    if _is_chat(parts):
        return _chat_text(parts, tokenizer)
    if all(map(_is_chat, filter(None, parts))):
        return _chat_text([message for part in parts for message in part or []], tokenizer)
    return "".join(part for part in parts if isinstance(part, str))


def _chat_text(messages: Any, tokenizer: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates run their own code
        reason = " ".join(str(error).split())[:200]
        raise LayerPruneError(
            f"The chat template of the tokenizer cannot write these messages: {reason} Give texts, or a "
            "tokenizer with a chat template."
        ) from error


def _unknown_form(entry: Any) -> LayerPruneError:
    what = f"a row with {list(entry)}" if isinstance(entry, Mapping) else f"a {type(entry).__name__}"
    return LayerPruneError(
        f"The calibration or evaluation data holds {what}. Each row needs input_ids, or text in a column "
        "text, messages, or prompt and completion."
    )


def token_mask(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns which positions predict a token that counts, shifted as the logits are.

    Position t counts if its target, token t + 1, has a label (not -100), and neither of the two is
    padding.

    Args:
        input_ids (`torch.Tensor`): `(batch, length)`.
        labels (`torch.Tensor`, *optional*): `(batch, length)`. Default: every token has a label.
        attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 0 for padding.

    Returns:
        `torch.Tensor`: bool, `(batch, length - 1)`.

    Raises:
        LayerPruneError: the attention mask has another shape.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise LayerPruneError(
            f"The attention_mask has the shape {tuple(attention_mask.shape)}, but input_ids has the shape "
            f"{tuple(input_ids.shape)}. Give a mask of one number for each token, 0 for padding. For rows of "
            "several texts give position_ids and no mask."
        )
    mask = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    if labels is not None:
        mask = mask & (labels[:, 1:] != -100)
    if attention_mask is not None:
        not_padding = attention_mask.bool()
        mask = mask & not_padding[:, 1:] & not_padding[:, :-1]
    return mask


def targets_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mask `(batch, length - 1)` of the positions that count, and the labels `(batch,
    length)`."""
    labels = batch.get("labels")
    mask = token_mask(batch["input_ids"], labels, batch.get("attention_mask"))
    return mask, batch["input_ids"] if labels is None else labels
