"""Attention on a CPU that refuses what FlashAttention refuses."""

import torch
from transformers import AttentionInterface, modeling_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask


NAME = "flash_on_cpu"


def _attend(module, query, key, value, attention_mask, **kwargs):
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):  # as transformers does for it
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise RuntimeError(f"FlashAttention takes the mask of padding alone, not {attention_mask.shape}")
    return sdpa_attention_forward(module, query, key, value, None, **kwargs | {"is_causal": True})


def use_flash_attention(model, monkeypatch):
    """Makes a model, and what is loaded like it, attend so."""
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *args, **kwargs: None)
    AttentionInterface.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
    model.set_attn_implementation(NAME)
    return model
