import json
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerPruneError, load_pruned_adapter, remove_layers, save_adapter, save_model
from hf_layerprune.checkpoints import saving, verification
from hf_layerprune.checkpoints.sample_logits import logits_distance
from hf_layerprune.pruning.prune import prune_layers
from hf_layerprune.surgery import peft as adapters

from ..conftest import logits, make_model, tokens
from ..distillation.test_trainer import make_trainer
from ..pruning.test_callback import calibration, plain_trainer, pruning
from ..tiny_models import tiny_model


def addresses(model):
    return {parameter.data_ptr() for parameter in model.parameters()}


def tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_the_same(model, tmp_path, dtype):
    model = model.to(dtype)
    remove_layers(model, [1, 4])
    state = torch.get_rng_state()
    model.train()
    save_model(model, tmp_path)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(dtype)
    assert torch.equal(logits(again, tokens()), logits(model.eval(), tokens()))


def test_another_model_when_loaded_is_refused_and_its_weights_kept(llama, tmp_path):
    llama.model.layers[2].self_attn.scaling *= 2  # nothing in the config says so
    with pytest.raises(
        LayerPruneError, match=r"saved model differs from the model in memory: its logits are off by"
    ):
        save_model(llama, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors(llama).items())
    save_model(llama, tmp_path, verify=False)


def test_a_weight_that_logits_do_not_tell_is_compared(llama, tmp_path, monkeypatch):
    save = llama.save_pretrained

    def save_another(folder):
        state = llama.state_dict()
        save(folder, state_dict=state | {"model.norm.weight": state["model.norm.weight"] * (1 + 1e-6)})

    monkeypatch.setattr(llama, "save_pretrained", save_another)
    with pytest.raises(LayerPruneError, match=r"model\.norm\.weight is not the weight in memory.*1 tensors"):
        save_model(llama, tmp_path)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_model_is_compared_with_the_live_weights_in_it(family, dtype, tmp_path, monkeypatch):
    """A GPU has no room for a second model. What is compared shares all its weights with the live model."""
    model, pairs = make_model(family), []
    monkeypatch.setattr(verification, "compare_logits", lambda *args: pairs.append(args[:2]))
    save_model(model, tmp_path, dtype=dtype)
    ((live, again),) = pairs
    assert live is model
    assert again is not model
    assert addresses(again) == addresses(model)


def test_reloaded_adapters_are_compared_with_the_live_weights_in_them(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "base")
    model, _ = untied_with_adapters()
    compared = []
    monkeypatch.setattr(verification, "compare_logits", lambda live, again, folder: compared.append(again))
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    (again,) = compared
    assert addresses(again) == addresses(model)


def test_missing_tensors_are_refused(llama, tmp_path):
    llama.config.num_hidden_layers = 7
    with pytest.raises(LayerPruneError, match=r"do not fit the config: {'missing_keys'"):
        save_model(llama, tmp_path)


def test_what_does_not_load_is_refused(llama, tmp_path, monkeypatch):
    save = llama.save_pretrained

    def save_half(folder):
        save(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])

    monkeypatch.setattr(llama, "save_pretrained", save_half)
    with pytest.raises(LayerPruneError, match=r"The saved model does not load"):
        save_model(llama, tmp_path)


def test_weights_are_kept_when_saving_fails(tmp_path):
    model = make_model("qwen3")
    model.config.layer_types = model.config.layer_types[:-1]  # transformers refuses such a config
    with pytest.raises(LayerPruneError, match=r"cannot be saved as a plain model.*rescued\.safetensors"):
        save_model(model, tmp_path / "folder")
    saved = load_file(tmp_path / "folder" / "rescued.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors(model).items())


def test_a_model_that_has_become_nan_can_be_saved(llama, tmp_path):
    llama.lm_head.weight.data.fill_(float("nan"))
    save_model(llama, tmp_path)
    assert (tmp_path / "model.safetensors").exists()


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OLD_SCALED = {k: v for k, v in SCALED.items() if k != "rope_theta"} | {"type": "llama3"}
SPLIT = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("family", "rope", "old"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 123.0}, {"rope_theta": 123.0}),
        (
            "llama",
            SCALED,
            {"rope_theta": 5e5, "rope_scaling": OLD_SCALED},
        ),
        (
            "gemma3_text",
            SPLIT,
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
            },
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 99.0, "rotary_pct": 0.5},
        ),
        ("gpt2", None, {}),
    ],
)
def test_legacy_rotary_keys(family, rope, old, tmp_path):
    model = make_model(family, **({"rope_parameters": rope} if rope else {}))
    save_model(model, tmp_path / "new")
    save_model(model, tmp_path / "old", legacy_rope=True)  # which also reloads it
    new, both = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("new", "old"))
    assert both == new | old
    assert not old.keys() & new.keys()


@pytest.mark.parametrize(
    ("family", "rope", "message"),
    [
        (
            "llama",
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 4.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 16,
            },
            "scale by 'longrope'",
        ),
        ("modernbert-decoder", None, "separate settings for each kind of attention"),
        ("gemma4_text", None, "no older form"),
    ],
)
def test_settings_without_an_older_form_are_refused_before_saving(family, rope, message, tmp_path):
    model = tiny_model(family) if rope is None else make_model(family, rope_parameters=rope)
    with pytest.raises(LayerPruneError, match=message):
        save_model(model, tmp_path / "folder", legacy_rope=True)
    assert not (tmp_path / "folder").exists()


def test_a_model_that_lost_a_kind_of_attention_is_saved(tmp_path):
    model = tiny_model("olmo3")
    full = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    remove_layers(model, full)
    save_model(model, tmp_path)


def test_short_and_mixed_models_are_saved(tmp_path):
    save_model(make_model("gpt2", n_positions=8), tmp_path / "short")
    model = make_model("llama").to(torch.bfloat16)
    model.lm_head.float()
    model.model.norm.float()
    save_model(model, tmp_path / "mixed")


def test_without_memory_for_a_second_model_the_save_stands(llama, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    again = make_model()
    monkeypatch.setattr(again, "to", full)
    monkeypatch.setattr(verification, "load_again", lambda *args: again)
    save_model(llama, tmp_path / "saved")
    assert "There is no memory to compare its logits" in caplog.text
    assert (tmp_path / "saved" / "model.safetensors").is_file()


TIED = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both, tied by PEFT": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "a head of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "neither": {"target_modules": ["q_proj"]},
}


def with_adapters(settings=None, **changes):
    """A tiny tied model with adapters, all moved away from where they start."""
    torch.manual_seed(0)
    settings = settings or {"target_modules": ["q_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on tied layers
        model = get_peft_model(make_model(tie_word_embeddings=True, **changes), LoraConfig(r=2, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("settings", TIED.values(), ids=TIED)
def test_adapters_of_a_tied_model_are_merged_as_they_were_trained(settings, tmp_path, caplog):
    model = with_adapters(settings)
    remove_layers(model, [2])
    model(input_ids=tokens(), labels=tokens()).loss.backward()  # what autograd has computed is copied, too
    live, head = logits(model, tokens()), model.get_base_model().get_output_embeddings()
    save_model(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, tokens()), live, rtol=0, atol=1e-4)
    stays_tied = settings in (TIED["both, tied by PEFT"], TIED["tokens"], TIED["neither"])
    assert again.config.tie_word_embeddings == stays_tied
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == stays_tied
    assert ("does not tie them" in caplog.text) != stays_tied
    # The live model has kept its adapters, its ties and its config.
    assert torch.equal(logits(model, tokens()), live)
    assert model.get_base_model().get_output_embeddings() is head
    assert model.config.tie_word_embeddings


def test_merged_adapters_are_compared_with_the_live_ones(tmp_path, monkeypatch):
    """What is saved is as it should be, but of other adapters."""
    model, others = with_adapters(), with_adapters()
    others.base_model.model.model.layers[1].self_attn.q_proj.lora_B.default.weight.data.mul_(-1)
    monkeypatch.setattr(saving, "merged_copy", lambda model: adapters.merged_copy(others))
    with pytest.raises(LayerPruneError, match=r"saved model differs.* adapters are saved in .*adapter"):
        save_model(model, tmp_path)
    again = load_pruned_adapter(str(tmp_path / "adapter"), base_model=make_model(tie_word_embeddings=True))
    assert torch.equal(logits(again.eval(), tokens()), logits(model, tokens()))
    save_model(model, tmp_path, verify=False)


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are copied where they are, and to the CPU."""

    def __init__(self):
        super().__init__()
        self.bytes = {"clone": 0, "_to_copy": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "clone" or (name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu")):
            self.bytes[name] += output.nbytes
        return output


def untied_with_adapters():
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    return model.eval(), sum(p.nbytes for p in model.get_base_model().parameters())


def test_adapters_are_merged_in_a_copy_on_the_cpu():
    """A GPU has no room for a second model at the end of training."""
    model, size = untied_with_adapters()
    before = logits(model, tokens())
    with CopiedBytes() as copied:
        merged = adapters.merged_copy(model)
    assert copied.bytes["_to_copy"] >= size
    assert copied.bytes["clone"] < 0.1 * size
    assert torch.equal(logits(model, tokens()), before)
    torch.testing.assert_close(logits(merged, tokens()), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", TIED.values(), ids=TIED)
def test_layers_that_a_gpu_merged_are_not_merged_again(settings, monkeypatch, recwarn):
    model, devices = with_adapters(settings), []
    expected = adapters.merged_copy(model).state_dict()
    merge = adapters.merge_one_by_one

    def merge_on_the_cpu(copied, device):
        merge(copied, torch.device("cpu"))
        devices.append(device)
        layers = copied.get_base_model().model.layers
        assert [layer.self_attn.q_proj.merged for layer in layers] == [True] * len(layers)

    monkeypatch.setattr(adapters, "merge_one_by_one", merge_on_the_cpu)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(type(model.get_base_model()), "device", property(lambda self: gpu))
    recwarn.clear()
    found = adapters.merged_copy(model).state_dict()
    assert devices == [gpu]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not [warning for warning in recwarn if "merged" in str(warning.message)]


def test_a_checkpoint_of_adapters_is_checked_without_a_copy_of_the_base():
    model, size = untied_with_adapters()
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    with CopiedBytes() as copied:
        bare = adapters.bare_copy(model)
    assert sum(copied.bytes.values()) < 0.1 * size
    layers = bare.model.layers, model.get_base_model().model.layers
    assert len({layer[1].mlp.up_proj.weight.data_ptr() for layer in layers}) == 1
    assert not any("lora" in name for name in bare.state_dict())
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen


def test_adapters_are_on_disk_before_they_are_merged(tmp_path, monkeypatch):
    model = with_adapters()

    def kill(model):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving, "merged_copy", kill)
        with pytest.raises(KeyboardInterrupt):
            save_model(model, tmp_path)
    again = load_pruned_adapter(str(tmp_path / "adapter"), base_model=make_model(tie_word_embeddings=True))
    assert torch.equal(logits(again.eval(), tokens()), logits(model, tokens()))
    save_model(model, tmp_path / "whole")
    assert not (tmp_path / "whole" / "adapter").exists()


def test_weights_are_cast_on_the_cpu(llama):
    with CopiedBytes() as copied:
        saving.cast_state(llama, "bfloat16")
    assert copied.bytes["_to_copy"] == sum(parameter.nbytes for parameter in llama.parameters()) // 2


def test_adapters_merged_in_half_precision_are_saved(tmp_path):
    model = with_adapters().to(torch.bfloat16)
    save_model(model, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_adapters_that_cannot_be_merged_are_saved_beside(tmp_path, monkeypatch):
    model = with_adapters()

    def refuse(self):
        raise NotImplementedError("no merging here")

    monkeypatch.setattr(type(model.base_model), "merge_and_unload", refuse)
    message = (
        r"cannot be merged into the model: no merging here .*export='adapter'.* The adapters are saved in"
    )
    with pytest.raises(LayerPruneError, match=message):
        save_model(model, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_adapters_without_room_anywhere_are_said_to_be_in_memory(tmp_path):
    (tmp_path / "file").write_text("")  # nothing can be written below it
    with pytest.raises(LayerPruneError, match=r"cannot be saved .* no room for the adapters either"):
        save_model(with_adapters(), tmp_path / "file" / "folder")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])  # of which two are tied
def test_a_model_is_saved_in_the_dtype_asked_for(family, dtype, tmp_path):
    model = make_model(family)
    save_model(model, tmp_path / "whole")
    save_model(model, tmp_path / "half", dtype=dtype)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    assert model.dtype == torch.float32
    rounded = model.to(dtype).state_dict()
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in again.state_dict().items())


def test_a_weight_that_is_not_the_rounded_one_is_refused(llama, tmp_path, monkeypatch):
    cast = saving.cast_state

    def cast_others(model, dtype):
        state = cast(model, dtype)
        state["model.norm.weight"] = state["model.norm.weight"] + 0.01
        return state

    monkeypatch.setattr(saving, "cast_state", cast_others)
    with pytest.raises(LayerPruneError, match=r"model.norm.weight is not the weight in memory, rounded"):
        save_model(llama, tmp_path, dtype="bfloat16")


def test_what_a_model_keeps_in_float32_is_saved_so(llama, tmp_path):
    llama._keep_in_fp32_modules_strict = {"norm"}  # as e_score_correction_bias of DeepSeek V3
    save_model(llama, tmp_path, dtype="bfloat16", verify=False)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["model.norm.weight"].dtype == torch.float32
    assert saved["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_logits_that_can_never_be_said_do_not_hide_a_difference(llama):
    here = torch.tensor([[0.0, 1.0, float("-inf"), float("nan")]])
    assert logits_distance(here, here.clone()) == 0
    assert logits_distance(here, here + torch.tensor([[0.0, 1.0, 0.0, 0.0]])) > 1
    assert not logits_distance(here, here.nan_to_num(neginf=0.0)) <= 1


@pytest.mark.parametrize("kind", ["distillation", "callback", "prune"])
def test_a_generation_config_that_cannot_be_saved_is_reported_before_training(kind, llama):
    llama.generation_config.do_sample = False
    llama.generation_config.temperature = 0.7  # as many scripts set it; generate only warns of it
    message = r"refuses to save model\.generation_config: .*temperature.* Change model\.generation_config"
    if kind == "prune":
        begin = partial(prune_layers, llama, target_layers=4, calibration=calibration())
    else:
        begin = make_trainer(llama).train if kind == "distillation" else plain_trainer(llama, pruning()).train
    with pytest.raises(LayerPruneError, match=message):
        begin()
    assert len(llama.model.layers) == 6


def test_special_tokens_that_the_trainer_sets_are_part_of_it(llama, tokenizer, tmp_path):
    """A config that is as it was loaded may be saved back, but not with other special tokens."""
    llama.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.7, "pad_token_id": 3}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    saving.check_configs(model)
    with pytest.raises(LayerPruneError, match="temperature"):
        make_trainer(model, processing_class=tokenizer).train()


def test_a_config_that_cannot_be_saved_is_reported():
    model = make_model("qwen3")
    model.config.layer_types = model.config.layer_types[:-1]
    with pytest.raises(LayerPruneError, match=r"refuses to save model\.config: "):
        saving.check_configs(model)


def test_a_model_is_loaded_again_with_its_own_attention(tmp_path):
    """transformers keeps it under a private name."""
    model = make_model()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    assert verification.load_again(model, tmp_path).config._attn_implementation == "eager"


def test_accelerate_keeps_the_plain_forward():
    """Under a private name, while it wraps `forward` in autocast. In a process of its own, as the first
    Accelerator of a process sets the precision of all."""
    code = (
        "import torch\n"
        "from accelerate import Accelerator\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = {'hidden_size': 16, 'intermediate_size': 32, 'num_attention_heads': 2}\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval()\n"
        "prepared = Accelerator(cpu=True, mixed_precision='bf16').prepare(model)\n"
        "ids = torch.arange(12)[None]\n"
        "with torch.no_grad():\n"
        "    exact = prepared._original_forward(input_ids=ids).logits\n"
        "    rounded = prepared(input_ids=ids).logits\n"
        "print(exact.dtype, torch.equal(exact, rounded))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch.float32", "False"]


def test_a_weight_too_large_for_the_dtype_is_refused(llama):
    llama.model.layers[1].self_attn.q_proj.weight.data[0, 0] = 1e6
    with pytest.raises(LayerPruneError, match=r"q_proj\.weight is not the weight in memory"):
        save_model(llama, "out", dtype="float16")
