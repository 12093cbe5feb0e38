"""A tiny vision-language model in a folder, with its processor."""

import copy
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)


LAYERS = 6
TEXT_CONFIG = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
VISION_CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_vlm():
    """A tiny Llava model in eval mode, the same at every call."""
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT_CONFIG),
        vision_config=CLIPVisionConfig(**VISION_CONFIG),
        image_token_index=258,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()


def make_processor(tokenizer):
    """Its processor. Token 258 stands for a picture."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    return LlavaProcessor(
        pictures,
        tokenizer,
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        **settings,
    )


def save_vlm(folder, tokenizer):
    """Saves model and processor in a folder."""
    make_vlm().save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)


def save_pictures(count):
    """Saves pictures of one colour each in the folder pictures, and returns their paths."""
    Path("pictures").mkdir(exist_ok=True)
    paths = [f"pictures/{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", (16, 16), (255 * i // count, 90, 255 - 255 * i // count)).save(path)
    return paths
