"""Prepares the raw rows of a Trainer as token sequences, and chooses its data collator."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayerPruneError
from .arguments import SequenceArguments
from .collator import PaddingCollator, padding_collator
from .pictures import PictureCollator, check_pictures, holds_pictures
from .sequences import iter_sequences, prepare_dataset, resolve_length
from .texts import holds_text, reads_pictures, tokenizer_of


def prepare_rows(
    data: Any,
    tokenizer: Any,
    model: PreTrainedModel | PreTrainedConfig,
    settings: SequenceArguments,
    name: str,
) -> Any:
    """Returns raw rows as token sequences. Rows of tokens and rows with pictures are returned unchanged.

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
    if not _is_raw(data) or has_picture_rows(data, tokenizer):
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


def has_picture_rows(data: Any, processing_class: Any) -> bool:
    """Returns whether the data of a Trainer holds rows with pictures that `processing_class` can read."""
    if isinstance(data, dict):
        return any(has_picture_rows(value, processing_class) for value in data.values())
    if not reads_pictures(processing_class) or not _is_raw(data):
        return False
    return holds_pictures(data.take(1) if isinstance(data, IterableDataset) else data, processing_class)


def make_collator(
    datasets: list[Any], processing_class: Any, settings: SequenceArguments
) -> PaddingCollator | PictureCollator:
    """Returns the data collator for the data sets of a Trainer.

    Raises:
        LayerPruneError: rows with pictures cannot be read.
    """
    with_pictures = [data for data in datasets if has_picture_rows(data, processing_class)]
    if not with_pictures:
        return padding_collator(processing_class)
    collator = PictureCollator(processing_class, settings.loss_on)
    for data in with_pictures:
        for rows in data.values() if isinstance(data, dict) else [data]:
            if not isinstance(rows, IterableDataset):  # a stream is read once
                check_pictures(rows, collator)
    return collator


def _is_raw(data: Any) -> bool:
    if isinstance(data, (Dataset, IterableDataset)):
        names = data.column_names or list(next(iter(data), {}))  # a stream may lack column_names
        return holds_text(dict.fromkeys(names))
    return isinstance(data, (list, tuple)) and bool(data) and holds_text(data[0])


def _sequences(rows: IterableDataset, form: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
    yield from iter_sequences(rows, **form)
