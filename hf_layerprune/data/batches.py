"""Makes batches of tokens from calibration and evaluation data of every common form."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..errors import LayerPruneError
from .collator import PaddingCollator
from .pictures import PictureCollator, hold_pictures
from .sequences import prepare_dataset
from .targets import Batch
from .texts import holds_text, iter_texts, reads_pictures, tokenizer_of, unknown_form


def make_batches(
    data: Any,
    batch_size: int = 8,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    *,
    tokenizer: Any = None,
    sequence_length: int = 256,
    packing: str = "joined",
    loss_on: str = "all",
    columns: Collection[str] | None = None,
) -> list[Batch]:
    """Returns batches of tokens from calibration or evaluation data of any common form.

    Args:
        data: tokens or text.
            Tokens: a data set, stream or list of rows, a tensor, one batch, or a list, generator or loader of
            batches. Batches are not changed.
            Text: a list of strings, or rows with `text`, `messages`, `conversations`, or `prompt` and
            `completion`, as in trl. It is cut into sequences, see [`prepare_dataset`]. Rows with pictures are
            prepared by the processor in `tokenizer`, see [`PictureCollator`].
        batch_size (`int`, *optional*, defaults to 8): rows per batch.
        collate (`Callable`, *optional*): makes a batch of rows of tokens, like a Trainer's `data_collator`.
            Default: a collator that pads rows of unequal length.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's tokenizer or processor, for text.
        sequence_length (`int`, *optional*, defaults to 256): number of tokens per sequence of text. It is
            smaller if the text is shorter.
        packing (`str`, *optional*, defaults to `"joined"`), loss_on (`str`, *optional*, defaults to `"all"`):
            for text, see [`prepare_dataset`].
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
    rows = rows_of(data)
    if len(rows) == 0:
        raise LayerPruneError("The calibration or evaluation data is empty.")
    try:
        rows = [rows[i] for i in range(len(rows))]
    except (KeyError, TypeError) as error:  # a table, a set
        raise unknown_form(data) from error
    if _is_batch(rows[0]):
        return [_as_batch(batch) for batch in rows]
    if not _is_tokens(rows[0]):
        with_pictures = isinstance(collate, PictureCollator)
        if not with_pictures and reads_pictures(tokenizer) and hold_pictures(rows):
            with_pictures = True
            if collate is None or isinstance(collate, PaddingCollator):
                collate = PictureCollator(tokenizer, loss_on)
        if not with_pictures:
            form: dict[str, Any] = {"packing": packing, "loss_on": loss_on}
            rows, collate = _text_sequences(rows, tokenizer, sequence_length, form), PaddingCollator()
    elif columns is not None:
        rows = [{name: value for name, value in _as_row(row).items() if name in columns} for row in rows]
    else:
        rows = [_as_row(row) for row in rows]
    # A loader draws a seed. Scoring must not change the random state, so the loader has its own generator.
    generator = torch.Generator()
    return list(DataLoader(rows, batch_size, collate_fn=collate or PaddingCollator(), generator=generator))


def regroup_batches(batches: list[Any], tokens: int) -> list[Any]:
    """Returns the same rows in batches of at most `tokens` tokens, or of one row if the row is longer.

    A batch holds only rows of one length and with the same columns. Batches with pictures are not changed.
    """

    def form(batch: Any) -> list[Any]:
        return [(name, value.shape[1:]) for name, value in sorted(batch.items())]

    regrouped: list[Any] = []
    for _, alike in groupby(batches, form):
        first, *others = alike
        # FlashAttention tells texts apart only in batches of one row.
        if "position_ids" in first or not has_rows(first):
            regrouped += [first, *others]
            continue
        rows = max(1, tokens // first["input_ids"].shape[1])
        whole = {name: torch.cat([first[name], *(one[name] for one in others)]) for name in first}
        regrouped += split_rows(whole, rows)
    return regrouped


def split_rows(batch: Any, rows: int) -> list[Any]:
    """Splits a batch into parts of at most `rows` rows. Each part has at least one row.

    A batch with pictures is not split: it does not say which row a picture belongs to.
    """
    if not has_rows(batch):
        return [batch]
    split = {name: value.split(max(1, rows)) for name, value in batch.items()}
    return [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]


def has_rows(batch: Any) -> bool:
    """Returns whether all values of a batch have one entry for each row, and none of them holds pictures."""
    rows = len(batch["input_ids"])
    return not has_pictures(batch) and all(len(value) == rows for value in batch.values())


def has_pictures(batch: Any) -> bool:
    """Returns whether a batch holds pictures beside its tokens."""
    return any(name.startswith(("pixel_", "image_")) for name in batch)


def iterate_batches(data: Any) -> Iterable[Batch]:
    """Returns a generator or loader unchanged, and the batches of other data from [`make_batches`]."""
    return data if isinstance(data, (DataLoader, Iterator)) else make_batches(data)


def model_columns(model: PreTrainedModel) -> set[str]:
    """Returns the names of the columns that `model` reads, and of the columns that hold labels."""
    return {*inspect.signature(type(model).forward).parameters, "labels", "label", "label_ids"}


def take_rows(stream: Iterable[Any]) -> list[Any]:
    """Returns all entries of a stream, generator or loader.

    Raises:
        LayerPruneError: the stream has more than [`MOST_ROWS`] entries and may be endless.
    """
    rows = list(islice(stream, MOST_ROWS + 1))
    if len(rows) > MOST_ROWS:
        raise LayerPruneError(
            f"The data is a {type(stream).__name__} of more than {MOST_ROWS:,} entries. Give the first ones "
            "alone, for example data.take(1000) or itertools.islice(data, 1000)."
        )
    return rows


MOST_ROWS = 10_000


def rows_of(data: Any) -> Any:
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
            raise unknown_form(data) from error
    return data


def _is_batch(entry: Any) -> bool:
    """Returns whether an entry is a batch, not a row."""
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
    """Returns a row of tokens as a dict. Texts and empty values are left out."""
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
    return PaddingCollator()(rows)


def _check_token_ids(ids: torch.Tensor) -> None:
    if ids.is_floating_point() or ids.dim() not in (1, 2):
        raise LayerPruneError(
            f"input_ids is a tensor of {ids.dtype} of shape {tuple(ids.shape)}. It must hold whole numbers, "
            "of shape (batch, length)."
        )


def _text_sequences(rows: Any, tokenizer: Any, length: int, form: dict[str, Any]) -> Dataset:
    """Returns token sequences of rows of text. They are shorter than `length` if there is little text."""
    if not holds_text(rows[0]):
        raise unknown_form(rows[0])
    tokenizer = tokenizer_of(tokenizer)
    if not hasattr(tokenizer, "bos_token_id"):
        raise LayerPruneError(
            "The data is text, which needs a tokenizer. Give tokenizer= (in training, processing_class= of "
            "the Trainer), or give tokens: prepare_dataset(rows, tokenizer, 256) makes them."
        )
    name = "The calibration or evaluation data"
    return prepare_dataset(rows, tokenizer, _fitting_length(rows, tokenizer, length), name=name, **form)


def _fitting_length(rows: Iterable[Any], tokenizer: Any, length: int) -> int:
    """Returns `length`, or the number of tokens of the text if it has fewer.

    Raises:
        LayerPruneError: there is no text.
    """
    tokens = 0
    for text in iter_texts(rows, tokenizer):
        tokens += len(tokenizer(text.text, verbose=False)["input_ids"])
        if tokens >= length:
            return length
    if not tokens:
        raise LayerPruneError("There is no text in the calibration or evaluation data.")
    return max(2, tokens)
