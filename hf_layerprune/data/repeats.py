"""Repeats passages in training text, so that a pruned model keeps the ability to copy."""

from datasets import Dataset, IterableDataset

from ..errors import LayerPruneError


COLUMNS = {"input_ids", "labels"}


def repeat_passages(rows: Dataset | IterableDataset, share: float) -> Dataset | IterableDataset:
    """Returns the rows of tokens, with a share of them replaced by a passage that is read twice.

    Layers that find earlier tokens again are lost with a block of layers, and ordinary text rarely needs them
    (induction heads, 2209.11895). The passage is the first half of the row. The first token may mark the
    beginning of a text, so the second copy does not begin with it.

    Args:
        rows (`Dataset` or `IterableDataset`): sequences of text as of [`prepare_dataset`], with the columns
            `input_ids` and `labels`. Rows of less than 4 tokens stay as they are. Do not give chats: half of
            a row would be lost.
        share (`float`): the share of the rows to replace, at least 0 and at most 1. Replaced rows are spread
            evenly.

    Raises:
        LayerPruneError: `share` is not between 0 and 1, or the rows have other columns.

    Example:

    ```python
    from hf_layerprune import load_rows, load_tokenizer, prepare_dataset, repeat_passages

    train = prepare_dataset(load_rows("text.jsonl"), load_tokenizer("model"))
    train = repeat_passages(train, 0.125)
    ```
    """
    check_repeat_share(share)
    if not share:
        return rows
    columns = {*(rows.column_names or COLUMNS)}  # a stream may not know its columns
    if columns != COLUMNS:
        raise LayerPruneError(
            f"The rows have the columns {', '.join(sorted(columns))}, but a passage can be repeated only in "
            "rows of input_ids and labels. Prepare the text with packing='joined'."
        )
    settings = {"batched": True, "with_indices": True, "fn_kwargs": {"share": share}}
    if isinstance(rows, IterableDataset):
        return rows.map(_with_repeats, **settings)
    kind = rows.format["type"]
    return rows.with_format(None).map(_with_repeats, **settings, desc="Repeating passages").with_format(kind)


def check_repeat_share(share: float) -> None:
    """Checks that a share of rows is between 0 and 1.

    Raises:
        LayerPruneError: it is not.
    """
    if not 0 <= share <= 1:
        raise LayerPruneError(f"repeat_share is {share}. Choose a share of the rows between 0 and 1.")


def _with_repeats(
    columns: dict[str, list[list[int]]], places: list[int], share: float
) -> dict[str, list[list[int]]]:
    """Returns the columns of a batch of rows, in which a share of the rows read their first half twice."""
    repeated = [int((place + 1) * share) > int(place * share) for place in places]
    return {
        name: [_twice(row) if twice else row for row, twice in zip(rows, repeated, strict=True)]
        for name, rows in columns.items()
    }


def _twice(row: list[int]) -> list[int]:
    passage = 1 + len(row) // 2
    return row if len(row) < 4 else row[:passage] + row[1 : 1 + len(row) - passage]
