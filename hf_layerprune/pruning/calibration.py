"""Makes the batches on which layers are scored in training."""

import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import Dataset
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments

from ..data.arguments import SequenceArguments
from ..data.batches import make_batches, model_columns
from ..data.sequences import resolve_length
from ..data.targets import Batch
from ..errors import LayerPruneError
from ..surgery.peft import base_of


logger = logging.getLogger(__name__)

EVALUATION_ROWS = 256  # rows of eval_dataset for scoring if no calibration data is given


def calibration_batches(
    calibration: Any, args: TrainingArguments, train_dataloader: Any, model: Any, tokenizer: Any
) -> list[Batch]:
    """Returns the calibration data as batches, with the columns and the collator of training."""
    # The Trainer has dropped the columns that the model does not read.
    columns = getattr(train_dataloader.dataset, "column_names", None) or model_columns(base_of(model))
    sequence = _sequence_settings(args)
    return make_batches(
        calibration,
        args.per_device_eval_batch_size,
        train_dataloader.collate_fn,
        tokenizer=tokenizer,
        sequence_length=resolve_length(sequence.sequence_length, base_of(model)),
        packing=sequence.packing,
        loss_on=sequence.loss_on,
        columns=columns,
    )


def _sequence_settings(args: TrainingArguments) -> SequenceArguments:
    """Returns the settings with which training makes sequences, so that scoring counts the same tokens."""
    if isinstance(args, SequenceArguments):
        return args
    # These two arguments belong to trl.
    answers = getattr(args, "completion_only_loss", None) or getattr(args, "assistant_only_loss", None)
    return SequenceArguments(loss_on="completion" if answers else "all")


def evaluation_rows(criterion: str, trainer: Trainer | None, eval_dataloader: Any) -> Any:
    """Returns evenly spaced rows of the Trainer's `eval_dataset`.

    If there are several data sets, the rows are from the first one.

    Args:
        trainer (`Trainer`, *optional*): the Trainer. Without it, the rows are from `eval_dataloader`.
        eval_dataloader (`DataLoader`, *optional*): the data loader that callbacks get. It holds the data of
            the last evaluation.

    Raises:
        LayerPruneError: there is no evaluation data.
    """
    name = "eval_dataset"
    data: Any = getattr(eval_dataloader, "dataset", None) if trainer is None else trainer.eval_dataset
    if isinstance(data, Mapping) and data:
        first, data = next(iter(data.items()))
        name = f"eval_dataset[{first!r}]"
    if data is None:
        advice = "" if trainer is not None else ", and call set_trainer(trainer) on this callback"
        raise LayerPruneError(
            f"The criterion {criterion!r} scores on text: give `calibration`, a data set like the training "
            f"one or a list of batches, or give the Trainer an eval_dataset{advice}."
        )
    if not hasattr(data, "__len__"):
        data = Dataset.from_list(list(islice(data, EVALUATION_ROWS)))
    total, rows = len(data), min(len(data), EVALUATION_ROWS)
    if rows < total:
        spread = [i * total // rows for i in range(rows)]
        data = data.select(spread) if hasattr(data, "select") else Subset(data, spread)
    logger.warning(
        "No calibration is given, so layers are scored on %d rows of %s. Losses on these rows understate "
        "what a removal costs. Give other text as calibration= to avoid this.",
        rows,
        name,
    )
    return data
