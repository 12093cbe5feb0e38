"""A tiny random model of every causal language model type of the installed transformers."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


LAYERS = 7
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# What a field of any config becomes, where that config has it as a number.
SMALL: dict[str, Any] = {
    name: value
    for value, names in {
        LAYERS: "num_hidden_layers decoder_layers num_decoder_layers encoder_layers num_encoder_layers "
        "num_layers n_layer n_layers num_blocks",
        2: "vision_layers depth num_key_value_heads num_kv_heads swa_num_key_value_heads "
        "linear_num_key_heads linear_num_value_heads index_n_heads eos_token_id num_experts_per_tok "
        "num_experts_per_token moe_k moe_topk",
        260: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
        32: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim "
        "attention_hidden_size lru_width input_embedding_size output_embedding_size mamba_d_ssm "
        "pronunciation_embed_dim shape_embed_dim",
        48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff dim_ff ffn_hidden_size "
        "feed_forward_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size",
        16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size position_bias_num_buckets",
        4: "num_attention_heads attention_heads decoder_attention_heads encoder_attention_heads n_head "
        "n_heads num_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads num_query_groups linear_num_heads qk_rope_head_dim rotary_dim "
        "laurel_rank gated_norm_rank hc_lowrank d_rel num_experts n_routed_experts num_local_experts "
        "moe_num_experts zero_expert_num sliding_window sliding_window_size attention_window_size "
        "window_size local_attention attention_chunk_size state_size ssm_state_size mamba_d_state "
        "time_step_rank mamba_dt_rank chunk_size mamba_chunk_size index_topk",
        8: "head_dim d_head dim_head swa_head_dim attention_head_size v_head_dim qk_nope_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim kv_channels query_pre_attn_scalar "
        "attention_head_dim hidden_size_per_layer_input index_head_dim router_hidden_size",
        12: "q_lora_rank kv_lora_rank o_lora_rank qk_head_dim",
        1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group "
        "o_groups mamba_n_groups n_groups mamba_ngroups num_codebooks bos_token_id",
        0: "num_nextn_predict_layers num_mtp_layers shared_intermediate_size pad_token_id rescale_every",
        64: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
        "max_source_positions rel_extent position_bias_max_distance",
        20: "pronunciation_vocab_size shape_vocab_size",
        3: "sep_token_id cls_token_id mask_token_id",
    }.items()
    for name in names.split()
}

# Latent attention: as many key as query heads, and the rotary part is a whole head.
LATENT = {"num_key_value_heads": 4, "head_dim": 4}
WINDOWS = {"use_sliding_window": True, "max_window_layers": 3}
SPARSE = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 4,
}
SHARING = "fsfssff"  # full and sliding attention: the last two read the keys and values of layer 2


def kinds(pattern: str, **names: str) -> list[str]:
    words = {"f": "full_attention", "l": "linear_attention", "s": "sliding_attention", **names}
    return [words[letter] for letter in pattern]


LINEAR = {"layer_types": kinds("lflflfl")}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
ZAMBA = {
    "layers_block_type": kinds("llhlhlh", h="hybrid"),
    "attention_head_dim": 16,
    "attention_hidden_size": 64,
    "num_key_value_heads": 4,
}

# What a type needs besides: fields that must fit together, and layers of different kinds, so that a rule
# that moves the wrong one is seen.
SPECIAL: dict[str, dict[str, Any]] = {
    name: special
    for names, special in [
        ("axk1 axk2 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu", LATENT),
        ("bert bert-generation big_bird camembert data2vec-text electra ernie git", {"is_decoder": True}),
        ("megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer", {"is_decoder": True}),
        ("xlm-roberta xlm-roberta-xl", {"is_decoder": True}),
        ("qwen2 qwen3 got_ocr2 moss_transcribe_diarize", WINDOWS),
        ("hunyuan_v1_dense hunyuan_v1_moe ministral", {"head_dim": 8}),
        ("qwen3_5_moe_text qwen3_5_text olmo_hybrid", LINEAR),
        ("qwen3_5_moe qwen3_5", {"text_config": LINEAR}),
        ("qwen3_moe flint", SPARSE),
        ("bailing_hybrid kimi_linear", LATENT | LINEAR),
    ]
    for name in names.split()
} | {
    "bamba": MAMBA | {"attn_layer_indices": [1, 4, 6]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16},
    },
    "deepseek_v2": LATENT | {"first_k_dense_replace": 2, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT | {"first_k_dense_replace": 2},
    "dots1": WINDOWS
    | {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 12,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 12,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": kinds(SHARING),
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.9] * 3 + [0.0] * 4,
    },
    "glm4_moe": {"first_k_dense_replace": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 3], [["global"], 1]]},
    "granitemoehybrid": MAMBA | {"layer_types": kinds("mamamam", m="mamba", a="attention")},
    "lfm2": {"full_attn_idxs": [1, 4, 6]},
    "lfm2_moe": {"layer_types": kinds("cfccfcf", c="conv"), "num_dense_layers": 2},
    "llama4": {"text_config": {"interleave_moe_layer_step": 2}},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mllama": {"text_config": {"cross_attention_layers": [2, 5]}},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {"layers_block_type": kinds("lofmolf", o="moe", m="mlp")},
    "qwen2_moe": WINDOWS | SPARSE,
    "qwen3_next": LINEAR | SPARSE,
    "qwen4_exp": {"text_config": INDEXER | {"layer_types": kinds("lflflfl", f="indexed_attention")}},
    "qwen4_exp_text": INDEXER | {"layer_types": kinds("lflflfl", f="indexed_attention")},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh", "local", "lsh", "local", "lsh", "local"],
    },
    "sarvam_mla": {"num_key_value_heads": 4},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA | {"num_hidden_layers": LAYERS, "n_mamba_heads": 4, "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1},
}

# Configurations in which a rule could go wrong without a word.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ernie4_5_moe, every second layer sparse": ("ernie4_5_moe", {"moe_layer_interval": 2}),
    "gemma4_text, shared keys and values": (
        "gemma4_text",
        {"layer_types": kinds(SHARING), "num_kv_shared_layers": 2},
    ),
    "gpt2, attention scaled by depth": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "hunyuan_v1_moe, experts by layer": (
        "hunyuan_v1_moe",
        {"moe_topk": [1, 2, 1, 2, 1, 1, 2], "head_dim": 8},
    ),
    "glm_moe_dsa, shared indexers": (
        "glm_moe_dsa",
        LATENT | {"indexer_types": ["full", "shared", "full", "shared", "shared", "full", "shared"]},
    ),
    "hy_v4, one full indexer": ("hy_v4", {"indexer_types": ["full"] + ["shared"] * 6}),
    "rwkv, weights rescaled by depth": ("rwkv", {"rescale_every": 2}),
    "qwen4_exp_text, layers with n-gram tables": (
        "qwen4_exp_text",
        INDEXER
        | {
            "layer_types": kinds("lflflfl", f="indexed_attention"),
            "ple_layer_ids": [1, 5],
            "eos_token_id": 2,
        },
    ),
}


def tiny_config(name: str) -> PreTrainedConfig:
    """The tiny config of a model type or a variant."""
    model_type, special = VARIANTS.get(name, (name, SPECIAL.get(name, {})))
    cls = CONFIG_MAPPING[model_type]
    return cls(**_merged(_small(cls()), special))


def tiny_model(name: str) -> PreTrainedModel:
    """The tiny model of a model type or a variant, every layer of which changes the logits far above
    rounding."""
    config = tiny_config(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > 10_000_000:
            raise ValueError(f"{size / 1e6:.0f} million parameters are left")
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.2)
            else:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    numbers = {
        name for name, value in fields.items() if isinstance(value, (int, float)) and type(value) is not bool
    }
    small = {name: value for name, value in SMALL.items() if name in numbers}
    if config.model_type == "zamba2":  # these are computed
        small = {k: v for k, v in small.items() if k not in ("kv_channels", "num_query_groups")}
    parts = {name: fields.get(name) for name in config.sub_configs}
    return small | {name: _small(part) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}


def _merged(fields: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    nested = {
        name: _merged(fields[name], value)
        for name, value in special.items()
        if isinstance(value, dict) and isinstance(fields.get(name), dict)
    }
    return fields | special | nested
