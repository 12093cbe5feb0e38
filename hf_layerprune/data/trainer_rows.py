"""Prepares the raw rows of a Trainer as token sequences, and finds rows with pictures."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayerPruneError
from .arguments import SequenceArguments
from .pictures import PictureCollator, check_pictures, hold_pictures
from .sequences import iter_sequences, prepare_dataset, resolve_length
from .texts import holds_text, reads_pictures, tokenizer_of


def prepare_rows(
    data: Any,
    tokenizer: Any,
    model: PreTrainedModel | PreTrainedConfig,
    settings: SequenceArguments,
    name: str,
) -> Any:
    """Returns raw rows as token sequences, and rows of tokens unchanged.

    Args:
        data (`Dataset`, `IterableDataset`, list, or `dict` of these): see [`prepare_dataset`]. Data of any
            other type is returned unchanged.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's tokenizer or processor.
        model (`PreTrainedModel` or `PreTrainedConfig`): the model. Its context limits the sequence length.
        settings ([`SequenceArguments`]): settings of the sequences.
        name (`str`): name of the argument that holds the data, for errors.

    Raises:
        LayerPruneError: raw rows are given without a tokenizer, or cannot be prepared.
    """
    if isinstance(data, dict):
        return {
            key: prepare_rows(value, tokenizer, model, settings, f"{name}[{key!r}]")
            for key, value in data.items()
        }
    if not _is_raw(data):
        return data
    tokenizer = tokenizer_of(tokenizer)
    if tokenizer is None:
        raise LayerPruneError(
            f"{name} holds text, which needs a tokenizer. Give processing_class=, or give tokens: "
            "prepare_dataset(rows, tokenizer) makes them."
        )
    form = {
        "tokenizer": tokenizer,
        "length": resolve_length(settings.sequence_length, model),
        "packing": settings.packing,
        "loss_on": settings.loss_on,
        "name": name,
    }
    if isinstance(data, IterableDataset):
        return IterableDataset.from_generator(_sequences, gen_kwargs={"rows": data, "form": form})
    sequences = prepare_dataset(data, **form)
    if isinstance(data, Dataset):
        sequences.info.dataset_name = data.info.dataset_name
    return sequences


def collator_for_pictures(
    datasets: list[Any], processing_class: Any, settings: SequenceArguments
) -> PictureCollator | None:
    """Returns the data collator for the raw data sets of a Trainer if one of them holds pictures, else None.

    Raises:
        LayerPruneError: rows cannot be read with pictures, such as rows of tokens beside rows with pictures.
    """
    if not reads_pictures(processing_class):
        return None
    given = [one for data in datasets for one in (data.values() if isinstance(data, dict) else [data])]
    firsts = [data.take(1) if isinstance(data, IterableDataset) else data for data in given]
    if not any(
        _is_raw(data) and hold_pictures(list(rows) if rows is not data else rows)
        for data, rows in zip(given, firsts, strict=True)
    ):
        return None
    collator = PictureCollator(processing_class, settings.loss_on)
    for data in (one for one in given if one is not None):
        if not _is_raw(data):
            raise LayerPruneError(
                "train_dataset or eval_dataset holds rows with pictures, and another data set holds "
                "tokens. One data collator reads them all: give rows with text or chats to each."
            )
        if not isinstance(data, IterableDataset):  # a stream is read once
            check_pictures(data, collator)
    return collator


def _is_raw(data: Any) -> bool:
    if isinstance(data, (Dataset, IterableDataset)):
        names = data.column_names or list(next(iter(data), {}))  # a stream may lack column_names
        return holds_text(dict.fromkeys(names))
    return isinstance(data, (list, tuple)) and bool(data) and holds_text(data[0])


def _sequences(rows: IterableDataset, form: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
    yield from iter_sequences(rows, **form)
