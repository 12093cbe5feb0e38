"""The data collator for tokenizers without a padding token."""

import copy
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator


def collator_without_padding_token(tokenizer: Any) -> Any:
    """Returns a data collator for a tokenizer without a padding token, as Llama's and GPT-2's; None if it has
    one. Rows of unequal length are padded with the end-of-text token, which the attention mask hides."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.pad_token is not None:
        return None
    if tokenizer.eos_token is None:
        return default_data_collator
    padding = copy.deepcopy(tokenizer)  # the user's tokenizer is saved unchanged
    padding.pad_token = tokenizer.eos_token
    return DataCollatorWithPadding(padding)
