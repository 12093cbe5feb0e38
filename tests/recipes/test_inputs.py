"""How models are loaded by commands and recipes, and the precision of their training."""

import logging
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from hf_layerprune import LayerPruneError
from hf_layerprune.commands.cli import main
from hf_layerprune.data.arguments import SequenceArguments
from hf_layerprune.recipes import inputs
from hf_layerprune.recipes.arguments import ModelArguments, TextArguments

from ..conftest import make_model
from ..distillation.test_trainer import make_trainer


DATA = ["--data", "text.txt", "--sequence_length", "32", "--calibration_sequences", "4"]
SHORT = ["--max_steps", "1", "--use_cpu", "True", "--report_to", "none", "--output_dir", "out"]


def load(folder, **settings):
    return inputs.load_on_device(folder, ModelArguments(**settings))


def test_a_model_is_loaded_as_asked(folder):
    make_model().to(torch.bfloat16).save_pretrained(folder)
    assert load(folder).dtype == torch.bfloat16
    assert inputs.load_on_device(folder, ModelArguments(), "float32").dtype == torch.float32
    asked = inputs.load_on_device(folder, ModelArguments(dtype="float16"), "float32")
    assert asked.dtype == torch.float16
    assert load(folder, attn_implementation="eager").config._attn_implementation == "eager"
    assert load(folder, device_map="cpu").device == torch.device("cpu")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_is_quantised_on_loading(bits, folder):
    model = load(folder, **{f"load_in_{bits}bit": True})
    assert model.is_quantized
    assert model.model.layers[0].mlp.up_proj.weight.dtype == (torch.int8 if bits == 8 else torch.uint8)


def test_a_command_takes_the_flags_of_loading(folder, capsys):
    flags = ["--dtype", "bfloat16", "--attn_implementation", "eager", "--load_in_8bit", "True"]
    assert main(["score", folder, *DATA, *flags]) == 0
    assert capsys.readouterr().out.startswith("layer ")


def write_gguf(path, model):
    """Writes the tiny Llama as a GGUF file, with bytes as tokens."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_loaded(folder):
    write_gguf(f"{folder}/model.gguf", make_model())
    model = load(folder, gguf_file="model.gguf")
    expected = make_model().model.layers[3].mlp.up_proj.weight
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight, expected)
    assert len(model.model.layers) == 6
    with pytest.raises(LayerPruneError, match=r"gguf_file is none.gguf, but model has no such file"):
        load(folder, gguf_file="none.gguf")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_in_4bit", "True"], "--load_in_4bit is set, but quantised weights cannot be trained"),
        (["--load_in_8bit", "True"], "`distill --lora_rank 16`"),
        (["--dtype", "float16"], "--dtype is float16, but float16 weights cannot be trained"),
        (["--device_map", "auto"], "--device_map is auto, but training keeps a model on one device"),
        (["--load_in_4bit", "True", "--load_in_8bit", "True"], "but a model has one format"),
        (["--gguf_file", "x.gguf", "--load_in_8bit", "True"], "--load_in_8bit is set together with"),
    ],
)
@pytest.mark.parametrize("command", ["distill", "run"])
def test_what_cannot_be_trained_is_refused_before_loading(
    command, flags, message, folder, capsys, monkeypatch
):
    monkeypatch.setattr("hf_layerprune.checkpoints.loading._load", lambda *_, **__: pytest.fail("loaded"))
    words = ["distill", folder] if command == "distill" else ["run", "default", "--model", folder]
    assert main([*words, *DATA, "--target_layers", "4", *SHORT, *flags]) == 2
    assert message in capsys.readouterr().err


def test_adapters_are_trained_on_a_quantised_model(folder):
    flags = ["--load_in_8bit", "True", "--lora_rank", "2", "--target_layers", "5", "--export", "adapter"]
    assert main(["distill", folder, *DATA, *flags, *SHORT, "--heldout_sequences", "2"]) == 0


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, {"bf16": True, "tf32": True}),
        ({"bf16": False}, {"tf32": True}),
        ({"fp16": True, "tf32": False}, {}),
        ({"use_cpu": True}, {}),
        ({"use_cpu": False}, {"bf16": True, "tf32": True}),
    ],
)
def test_a_gpu_trains_in_bfloat16_and_tf32_unless_told_otherwise(given, settings, monkeypatch):
    gpu = {"is_available": lambda: True, "is_bf16_supported": lambda including_emulation: True}
    monkeypatch.setattr(inputs, "torch", SimpleNamespace(cuda=SimpleNamespace(**gpu)))
    monkeypatch.setattr(inputs, "is_torch_tf32_available", lambda: True)
    assert inputs.precision_of_training(given) == settings
    gpu["is_bf16_supported"] = lambda including_emulation: False
    monkeypatch.setattr(inputs, "torch", SimpleNamespace(cuda=SimpleNamespace(**gpu)))
    assert "bf16" not in inputs.precision_of_training(given)


def test_a_cpu_trains_as_before():
    assert inputs.precision_of_training({}) == {}


@pytest.mark.parametrize("command", ["distill", "run"])
def test_commands_train_in_the_precision_of_the_machine(command, folder, monkeypatch):
    """`bf16` also works on a CPU."""
    place = "inputs" if command == "distill" else "prune"
    monkeypatch.setattr(f"hf_layerprune.recipes.{place}.precision_of_training", lambda given: {"bf16": True})
    words = ["distill", folder] if command == "distill" else ["run", "sleb", "--model", folder]
    seen = []

    def keep(args, *others):
        seen.append(args.bf16)
        raise LayerPruneError("seen")

    monkeypatch.setattr(f"hf_layerprune.recipes.{place}.keep_stored_dtype", keep)
    assert main([*words, *DATA, "--target_layers", "4", *SHORT]) == 2
    assert seen == [True]


@pytest.mark.parametrize(
    ("dtype", "settings", "warns"),
    [
        (torch.bfloat16, {}, True),
        (torch.bfloat16, {"bf16": True}, True),
        (torch.bfloat16, {"optim": "adamw_torch_8bit"}, True),
        (torch.bfloat16, {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}, False),
        (torch.bfloat16, {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round = true"}, False),
        (torch.bfloat16, {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=False"}, True),
        (torch.float32, {"bf16": True}, False),
    ],
)
def test_lost_updates_of_16_bit_weights_are_warned_of(dtype, settings, warns, caplog):
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        make_trainer(make_model().to(dtype), **settings)
    assert ("rounds most small updates away" in caplog.text) == warns


def test_float16_weights_are_not_trained_in_float16(monkeypatch):
    monkeypatch.setattr("accelerate.accelerator.is_fp16_available", lambda: True, raising=False)
    with pytest.raises(LayerPruneError, match=r"trained weights are float16.*dtype=torch.float32"):
        make_trainer(make_model().to(torch.float16), fp16=True)


@pytest.mark.parametrize("form", [list, lambda batches: iter(batches)], ids=["list", "iterator"])
def test_all_rows_of_given_batches_are_read(form):
    ids = torch.arange(48).view(4, 12)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in (ids[:3], ids[3:])]
    settings = TextArguments(), SequenceArguments(sequence_length=12), make_model().config, None
    rows = inputs.make_sequences(form(batches), *settings)
    assert rows["input_ids"] == rows["labels"] == ids.tolist()
    with_pictures = [batches[0] | {"pixel_values": torch.zeros(3, 3, 2, 2)}]
    with pytest.raises(LayerPruneError, match="holds batches with pictures"):
        inputs.make_sequences(with_pictures, *settings)
