"""Memory and FLOPs of a run, planned from the config alone."""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_layerprune import DistillationTrainer, DistillationTrainingArguments, LayerPruneError
from hf_layerprune.commands.cli import main
from hf_layerprune.distillation.plan import (
    DEVICES,
    GIB,
    IN_BF16,
    TrainingSettings,
    measure_footprint,
    optimizer_bytes,
    plan_training,
    settings_that_fit,
)

from ..conftest import tokens
from ..tiny_models import tiny_model


GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "several_gpus.md"
QWEN_3B = Qwen2Config(
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
)
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)


def on_meta(cls, config, dtype=torch.float32):
    with torch.device("meta"):
        return cls(config).to(dtype)


def settings(**changes):
    given = {"batch": 4, "accumulation": 1, "bf16": True, "activation_checkpointing": False, "optim": "adamw"}
    return TrainingSettings(**given | changes)


@pytest.fixture(scope="module")
def qwen():
    return measure_footprint(on_meta(Qwen2ForCausalLM, QWEN_3B), batch=4, length=2048, bf16=True)


# The peaks that the real trainer reached on an emulated GPU, in GiB, with 4 x 2048 tokens.
@pytest.mark.parametrize(("checkpointing", "peak"), [(False, 93.58), (True, 54.63)])
def test_the_planned_peak_is_that_of_an_emulated_gpu(qwen, checkpointing, peak):
    plan = plan_training(
        qwen, settings(activation_checkpointing=checkpointing, teacher_bytes=2), 36, 36, 2048
    )
    assert plan.peak / GIB == pytest.approx(peak, rel=0.03)
    assert plan.parameters_before == plan.parameters_after == 3_085_938_688


@pytest.fixture(scope="module")
def llama_8b():
    return measure_footprint(on_meta(LlamaForCausalLM, LLAMA_8B), batch=4, length=2048, bf16=True)


def test_the_table_in_the_guide_is_planned(qwen, llama_8b):
    """4 x 2048 tokens, AdamW, bf16 autocast: all weights, with a copied teacher."""
    guide = GUIDE.read_text()
    for name, footprint in (("Qwen2.5-3B", qwen), ("Llama-3.1-8B", llama_8b)):
        for flag in ("", " with `--activation_checkpointing True`"):
            chosen = settings(activation_checkpointing=bool(flag), teacher_bytes=2)
            peak = plan_training(footprint, chosen, footprint.layers - 1, footprint.layers, 2048).peak / GIB
            fits = [device for device, (memory, _) in DEVICES.items() if peak <= memory]
            fitting = fits[0] if fits else "several GPUs with FSDP2"
            assert f"| {name}, all weights{flag} | {peak:.0f} | {fitting} |" in guide


def test_all_weights_of_llama_8b_fit_80_gb_in_bfloat16():
    """The real trainer on an emulated GPU: 39.8 GiB without optimizer states, 8 layers fewer."""
    footprint = measure_footprint(
        on_meta(LlamaForCausalLM, LLAMA_8B, torch.bfloat16), batch=4, length=2048, bf16=True
    )
    chosen = settings(
        activation_checkpointing=True, optim="adamw_torch_8bit", weight_bytes=2, teacher_bytes=2
    )
    states = plan_training(footprint, chosen, 24, 24, 2048).memory["optimizer"]
    assert (plan_training(footprint, chosen, 24, 24, 2048).peak - states) / GIB == pytest.approx(
        39.8, rel=0.03
    )
    peak = plan_training(footprint, chosen, 31, 32, 2048).peak / GIB
    assert peak < 74
    assert (
        f"| Llama-3.1-8B, all weights in bfloat16 (flags below) | {peak:.0f} | a100-80gb |"
        in GUIDE.read_text()
    )
    assert IN_BF16 in GUIDE.read_text()


@pytest.fixture(scope="module")
def llama_8b_lora():
    base = on_meta(LlamaForCausalLM, LLAMA_8B, torch.bfloat16)
    with torch.device("meta"):
        model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    return measure_footprint(model, batch=4, length=2048, bf16=True)


def test_lora_on_a_16_bit_base_needs_no_teacher_and_little_optimizer(llama_8b_lora):
    footprint = llama_8b_lora
    lora = settings(activation_checkpointing=True, weight_bytes=2, teacher_bytes=0)
    plan = plan_training(footprint, lora, 32, 32, 2048)
    assert plan.peak / GIB == pytest.approx(20.5, rel=0.03)  # on an emulated GPU
    assert plan.memory["optimizer"] < 0.4 * GIB
    assert plan.memory["teacher"] == 0
    assert plan.parameters_before == 8_030_261_248
    row = f"| Llama-3.1-8B in bfloat16, LoRA with `--activation_checkpointing True` | {plan.peak / GIB:.0f} |"
    assert f"{row} l4-24gb |" in GUIDE.read_text()


def test_removed_layers_leave_the_plan(qwen):
    whole = plan_training(qwen, settings(), 36, 36, 2048)
    pruned = plan_training(qwen, settings(), 27, 27, 2048)
    fields = copy.deepcopy(QWEN_3B.to_dict()) | {"num_hidden_layers": 27, "layer_types": None}
    config = Qwen2Config.from_dict(fields)
    smaller = on_meta(Qwen2ForCausalLM, config)
    assert pruned.parameters_after == smaller.num_parameters()
    fresh = measure_footprint(smaller, batch=4, length=2048, bf16=True)
    alone = plan_training(fresh, settings(), 27, 27, 2048)
    for part in ("weights", "optimizer", "gradients", "activations", "logits"):
        assert pruned.memory[part] == pytest.approx(alone.memory[part], rel=1e-3)
    assert pruned.memory["teacher"] == whole.memory["teacher"]
    assert pruned.step_flops < whole.step_flops


def test_the_counts_are_those_of_a_real_step(tmp_path):
    model = tiny_model("llama")
    with torch.device("meta"):
        meta = type(model)(model.config)
    footprint = measure_footprint(meta, batch=2, length=16, bf16=False)
    ids = tokens(2, 16)
    args = DistillationTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = DistillationTrainer(model, args, train_dataset=[{"input_ids": ids[0]}])
    optimizer = trainer.create_optimizer()
    trainer.compute_loss(model.train(), {"input_ids": ids})  # the first one finds the output heads
    counter = FlopCounterMode(display=False)
    with counter:
        trainer.compute_loss(model.train(), {"input_ids": ids}).backward()
    optimizer.step()
    plan = plan_training(
        footprint,
        settings(batch=2, bf16=False),
        len(model.model.layers),
        len(model.model.layers),
        16,
    )
    held = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert plan.memory["optimizer"] == sum(value.nbytes for value in held)
    assert plan.memory["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert plan.memory["weights"] == sum(p.nbytes for p in model.parameters())
    # The loss leaves out the last position of each sequence; embeddings and norms have no products.
    assert plan.step_flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_what_fits_is_said_in_order(qwen):
    full = plan_training(qwen, settings(), 27, 36, 2048).peak
    assert full / GIB > 80
    checkpointing, cached = "--activation_checkpointing True", "--teacher DIR of cached logits"
    cases = {
        80: [checkpointing],
        50: [checkpointing, "--optim adamw_8bit"],
        32: [checkpointing, IN_BF16],
        20: [checkpointing, IN_BF16, cached],
        10: [],
    }
    for memory, changes in cases.items():
        assert settings_that_fit(qwen, settings(), 27, 36, 2048, memory * GIB) == changes


def test_what_saves_nothing_is_not_advised(qwen, llama_8b_lora):
    in_bf16 = settings(optim="adamw_torch_8bit", weight_bytes=2, teacher_bytes=2)
    found = settings_that_fit(qwen, in_bf16, 27, 36, 2048, 20 * GIB)
    assert found == ["--activation_checkpointing True", "--teacher DIR of cached logits"]
    lora = settings(weight_bytes=2, teacher_bytes=0)
    assert settings_that_fit(llama_8b_lora, lora, 31, 32, 2048, 22 * GIB) == [
        "--activation_checkpointing True"
    ]
    assert settings_that_fit(llama_8b_lora, lora, 31, 32, 2048, 10 * GIB) == []


def test_measuring_leaves_no_hook():
    model = on_meta(LlamaForCausalLM, LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=100))
    measure_footprint(model, batch=1, length=8, bf16=False)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adamw_bnb_8bit", "adafactor"])
def test_optimizer_bytes(optim):
    assert optimizer_bytes(optim) == {"adamw_torch": 8, "sgd": 0, "adamw_bnb_8bit": 2, "adafactor": 0}[optim]


def test_a_model_that_cannot_run_without_values_is_refused():
    model = on_meta(LlamaForCausalLM, LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=100))
    model.model.forward = lambda **kwargs: (_ for _ in ()).throw(RuntimeError("no values\nat all"))
    with pytest.raises(LayerPruneError, match="does not run on tensors without values \\(no values\\)"):
        measure_footprint(model, batch=1, length=8, bf16=False)


def test_the_command_plans_from_the_config_alone(folder, capsys):
    from safetensors.torch import load_file

    words = ["plan", folder, "--target_layers", "4", "--sequence_length", "16", "--max_steps", "10"]
    for path in Path(folder).glob("*.safetensors"):
        assert load_file(path)
        path.unlink()
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "6 -> 4 layers, 0.1M -> 0.0M parameters" in text
    assert "The peak fits h100-80gb (79.2 GiB)" in text
    assert "10 steps take about" in text
    assert main([*words, "--device", "abacus"]) == 2
    assert "--device is 'abacus'. Choose from l4-24gb" in capsys.readouterr().err
    assert main(["plan", folder, "--target_layers", "9"]) == 2
    assert "--target_layers is 9, but the model has 6 layers" in capsys.readouterr().err


def peak_of(capsys, *words):
    assert main(["plan", *words]) == 0
    return float(re.search(r"peak \|\s+([\d.]+)", capsys.readouterr().out)[1])


def test_the_command_knows_dtype_and_adapters(capsys):
    config = LlamaConfig(num_hidden_layers=4, hidden_size=1024, intermediate_size=4096, vocab_size=32000)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained("large")
    words = [
        "large",
        "--target_layers",
        "3",
        "--sequence_length",
        "256",
        "--per_device_train_batch_size",
        "1",
    ]
    whole, lora = peak_of(capsys, *words), peak_of(capsys, *words, "--lora_rank", "8")
    half = peak_of(capsys, *words, "--lora_rank", "8", "--dtype", "bfloat16")
    assert whole > lora > half
    assert main(["plan", *words, "--load_in_4bit", "True"]) == 2
    assert "quantised weights cannot be trained" in capsys.readouterr().err
    assert main(["plan", *words, "--load_in_4bit", "True", "--lora_rank", "8"]) == 2
    assert "the memory of quantised weights is not planned" in capsys.readouterr().err
