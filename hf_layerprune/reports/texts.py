"""Describes the texts of a run by name, sequences and tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from ..data.targets import Batch
from ..data.texts import tokenizer_of
from ..evaluation.evaluate import HeldOutText


def describe_texts(calibration: Any, batches: Sequence[Batch], evaluation: Any) -> dict[str, Any]:
    """Returns the result of [`describe_text`] for the calibration data and for the text of a [`HeldOutText`].

    Args:
        calibration (`Any`): the source of the calibration batches.
        batches (sequence of dict): the batches to score layers on, empty if the criterion reads no text.
        evaluation (`Any`): the evaluation function of the run.
    """
    texts = {"calibration": describe_text(calibration, batches)} if batches else {}
    if isinstance(evaluation, HeldOutText):
        texts["evaluation"] = describe_text(evaluation.data, evaluation.batches)
    return texts


def describe_text(data: Any, batches: Sequence[Batch] | None = None) -> dict[str, Any]:
    """Returns the `name`, `sequences` and `tokens` (without padding) of a text, if they are known.

    Args:
        data (`Dataset`, `DataLoader` or other): the source of the text.
        batches (sequence of dict, *optional*): the part that is read. Default: all of `data`.
    """
    while not hasattr(data, "info") and hasattr(data, "dataset"):  # a DataLoader, or the shard of one process
        data = data.dataset
    found: dict[str, Any] = {"name": _name_of(getattr(data, "info", None))}
    if batches is not None:
        found["sequences"] = sum(len(batch["input_ids"]) for batch in batches)
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
        found["tokens"] = sum(int(mask.sum()) for mask in masks)
    elif isinstance(data, Dataset) and "input_ids" in data.column_names:
        found["sequences"] = len(data)
        rows: Any = data.with_format("numpy")
        if "attention_mask" in data.column_names:
            found["tokens"] = sum(int(np.sum(mask)) for mask in rows["attention_mask"])
        else:
            found["tokens"] = sum(len(ids) for ids in rows["input_ids"])
    return found


def count_tokens(args: TrainingArguments, data: Any, tokenizer: Any = None) -> bool:
    """Changes `args` in place, so that the Trainer counts the training tokens.

    Args:
        args (`TrainingArguments`): the training arguments.
        data (`Dataset` or other): the training data.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): gives the padding token, which
            is not counted.

    Returns:
        `bool`: whether tokens are counted. Data without `input_ids`, as for GRPO, cannot be counted.
    """
    columns = _columns_of(data)
    if args.include_num_input_tokens_seen == "no":
        # A stream has no column names, but distillation always reads input_ids.
        if "input_ids" not in columns and not hasattr(args, "kl_weight"):
            return False
        pad_token = getattr(tokenizer_of(tokenizer), "pad_token_id", None)
        padded = "attention_mask" in columns or pad_token is not None
        args.include_num_input_tokens_seen = "non_padding" if padded else "all"
    return True


def _columns_of(data: Any) -> list[str]:
    while hasattr(data, "dataset"):  # the shard of one process
        data = data.dataset
    if getattr(data, "column_names", None):
        return list(data.column_names)
    # An IterableDataset of torch also has __getitem__.
    if isinstance(data, IterableDataset) or not hasattr(type(data), "__getitem__"):
        return []
    first = data[0]
    return list(first) if isinstance(first, Mapping) else []


def _name_of(info: Any) -> str | None:
    """Returns the name of a data set, None if it was read from files, whose name is only "json" or "text"."""
    name, kind = getattr(info, "dataset_name", None), getattr(info, "builder_name", None)
    if name is None or name == kind:
        return None
    return name if info.config_name in (None, "default") else f"{name}, {info.config_name}"
