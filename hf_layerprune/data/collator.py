"""Data collator that makes one batch of rows of tokens and pads rows of unequal length."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import default_data_collator

from .texts import tokenizer_of


class PaddingCollator:
    """Data collator that pads rows of unequal length on the right.

    `labels` are padded with -100, `attention_mask` and other columns of tokens with 0. Rows with
    `position_ids` hold several texts. They get no attention mask, as it would let tokens attend to other
    texts.

    Args:
        pad_token_id (`int`, *optional*, defaults to 0): the token that pads `input_ids`.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.fill = {
            "input_ids": pad_token_id,
            "attention_mask": 0,
            "labels": -100,
            "token_type_ids": 0,
            "position_ids": 0,
        }

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Returns a batch of rows."""
        lengths = [len(row["input_ids"]) for row in rows]
        if min(lengths) == max(lengths):
            return default_data_collator(list(rows))
        return default_data_collator([self._padded(row, max(lengths)) for row in rows])

    def _padded(self, row: Any, longest: int) -> dict[str, Any]:
        length = len(row["input_ids"])
        if "position_ids" in row:  # an attention mask would hide the starts of texts
            row = {"labels": row["input_ids"], **row}
        else:
            row = {"attention_mask": [1] * length, **row}
        of_tokens = [
            name for name in row if name in self.fill and np.ndim(row[name]) and len(row[name]) == length
        ]
        more = longest - length
        return row | {
            name: [*torch.as_tensor(row[name]).tolist(), *[self.fill[name]] * more] for name in of_tokens
        }


def padding_collator(tokenizer: Any) -> PaddingCollator:
    """Returns the collator for a tokenizer or processor.

    The collator pads with the padding token. It uses the end-of-text token if the tokenizer has no padding
    token, as for Llama and GPT-2.
    """
    tokenizer = tokenizer_of(tokenizer)
    tokens = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    return PaddingCollator(next((token for token in tokens if isinstance(token, int)), 0))
