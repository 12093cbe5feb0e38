"""Tiny random models of eight families, a byte tokenizer and text: nothing is fetched."""

import copy
import os
import random
import signal
import warnings
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; they run side by side

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

LAYERS = 6
VOCABULARY = 260
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
    # So large that each layer changes the logits well above rounding.
    "initializer_range": 0.2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(
        **{k: v for k, v in GROUPED.items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=3,
    ),
    "qwen3": Qwen3Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3_text": Gemma3TextConfig(**GROUPED, sliding_window=4, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
        initializer_range=0.2,
    ),
    "gpt_neox": GPTNeoXConfig(**COMMON),
}


@pytest.fixture(autouse=True)
def _quiet_and_seeded(monkeypatch, tmp_path):
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    handler = signal.getsignal(signal.SIGTERM)  # a Trainer that was stopped leaves its own
    yield
    signal.signal(signal.SIGTERM, handler)


def make_model(family="llama", seed=0, **changes):
    """A tiny random model in eval mode, the same for the same seed."""
    config = copy.deepcopy(CONFIGS[family])
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=CONFIGS)
def model(request):
    """A tiny model of each of the eight families."""
    return make_model(request.param)


@pytest.fixture
def llama():
    return make_model("llama")


TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 40


@pytest.fixture
def folder(tokenizer):
    """A folder with the tiny Llama and its tokenizer, beside it text.txt."""
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("text.txt").write_text(TEXT)
    return "model"


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes as tokens 0 to 255, 256 ends a text, 257 pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def tokens(batch=2, length=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, length), generator=generator)


def logits(model, input_ids, **inputs):
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False, **inputs).logits
