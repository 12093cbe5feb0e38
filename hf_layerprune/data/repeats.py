"""Repeats passages in training text, so that a pruned model keeps the ability to copy."""

from typing import Any

from datasets import Dataset, IterableDataset

from ..errors import LayerPruneError


def repeat_passages(rows: Dataset | IterableDataset, share: float) -> Dataset | IterableDataset:
    """Returns the rows of tokens, with a share of them replaced by a passage that is read twice.

    Layers that find earlier tokens again are lost with a block of layers, and ordinary text rarely needs them
    (induction heads, 2209.11895). The passage is the first half of the row. The first token may mark the
    beginning of a text, so the second copy does not begin with it.

    Args:
        rows (`Dataset` or `IterableDataset`): columns `input_ids` and `labels`. Rows of less than 4 tokens
            stay as they are.
        share (`float`): the share of the rows to replace, at least 0 and at most 1. Replaced rows are spread
            evenly.

    Raises:
        LayerPruneError: `share` is not between 0 and 1.

    Example:

    ```python
    from hf_layerprune import load_rows, load_tokenizer, prepare_dataset, repeat_passages

    train = prepare_dataset(load_rows("text.jsonl"), load_tokenizer("model"))
    train = repeat_passages(train, 0.125)
    ```
    """
    check_repeat_share(share)
    return rows.map(_with_repeats, with_indices=True, fn_kwargs={"share": share}) if share else rows


def check_repeat_share(share: float) -> None:
    """Checks that a share of rows is between 0 and 1.

    Raises:
        LayerPruneError: it is not.
    """
    if not 0 <= share <= 1:
        raise LayerPruneError(f"repeat_share is {share}. Choose a share of the rows between 0 and 1.")


def _with_repeats(row: dict[str, Any], index: int, share: float) -> dict[str, Any]:
    """Returns the row, or its first half twice if the row is one of those to replace."""
    length = len(row["input_ids"])
    if length < 4 or int((index + 1) * share) == int(index * share):
        return row
    passage = 1 + length // 2
    return {name: values[:passage] + values[1 : 1 + length - passage] for name, values in row.items()}
