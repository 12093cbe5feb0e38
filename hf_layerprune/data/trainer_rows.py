"""Prepares the raw rows of a Trainer as token sequences."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LayerPruneError
from .arguments import SequenceArguments
from .sequences import iter_sequences, prepare_dataset, resolve_length
from .texts import holds_text


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
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has a tokenizer
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


def _is_raw(data: Any) -> bool:
    if isinstance(data, (Dataset, IterableDataset)):
        names = data.column_names or list(next(iter(data), {}))  # a stream may lack column_names
        return holds_text(dict.fromkeys(names))
    return isinstance(data, (list, tuple)) and bool(data) and holds_text(data[0])


def _sequences(rows: IterableDataset, form: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
    yield from iter_sequences(rows, **form)
