import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BitsAndBytesConfig

from hf_layerprune import LayerPruneError, get_lineage, remove_layers, save_model, score_layers
from hf_layerprune.surgery.decoder import find_decoder, layer_count, text_config
from hf_layerprune.surgery.layer_stack import LayerStack
from hf_layerprune.surgery.lineage import Lineage
from hf_layerprune.surgery.removal import keep_lineage, without_layers

from ..conftest import CONFIGS, LAYERS, logits, make_model, tokens
from ..tiny_models import TYPES, tiny_model


def skipping(model, layers, input_ids):
    """The reference: the uncut model with these layers bypassed by hooks."""

    def bypass(module, args, kwargs, output):
        state = args[0] if args else kwargs["hidden_states"]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    stack = find_decoder(model).layers
    handles = [stack[i].register_forward_hook(bypass, with_kwargs=True) for i in layers]
    result = logits(model, input_ids)
    for handle in handles:
        handle.remove()
    return result


def test_removing_nothing_changes_nothing(model):
    before, config = logits(model, tokens()), model.config.to_dict()
    lineage = remove_layers(model, [])
    assert lineage.kept == list(range(LAYERS))
    assert torch.equal(logits(model, tokens()), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("layers", [[3], [0], [5], [1, 4], [2, 3, 4]])
def test_removing_is_skipping(model, layers):
    reference = skipping(model, layers, tokens())
    assert not torch.allclose(reference, logits(model, tokens()), atol=1e-3)
    lineage = remove_layers(model, layers)
    assert lineage.removed == layers
    assert torch.equal(logits(model, tokens()), reference)


@pytest.mark.parametrize("layers", [[3], [1, 4], [2, 3, 4]])
def test_cached_generation_is_uncached_generation(model, layers):
    remove_layers(model, layers)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompt = tokens(1)
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **settings)
    uncached = model.generate(prompt, attention_mask=mask, use_cache=False, **settings)
    assert cached.tolist() == uncached.tolist()
    assert cached.shape == (1, 24)


RELOAD = """
import sys
sys.modules["hf_layerprune"] = None  # an import of it would fail
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    expected = load_file(folder + "/expected.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], (folder, info)
    with torch.no_grad():
        found = model(input_ids=expected["input_ids"], use_cache=False).logits
    assert torch.equal(found, expected["logits"]), folder
    settings = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    mask = torch.ones_like(expected["input_ids"])
    found = model.generate(expected["input_ids"], attention_mask=mask, **settings)
    assert found.tolist() == expected["generated"].tolist(), folder
    print(model.config.num_hidden_layers, model.config.layer_pruning["kept_layers"])
"""


def test_a_saved_model_reloads_where_this_package_is_not_installed(tmp_path):
    folders = []
    for family in CONFIGS:
        model = make_model(family)
        remove_layers(model, 4)
        remove_layers(model, 1)  # indices count in the present model
        folder = tmp_path / family
        model.save_pretrained(folder)
        prompt = tokens(1)
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
        )
        expected = {"input_ids": prompt, "logits": logits(model, prompt), "generated": generated}
        save_file(expected, folder / "expected.safetensors")
        config = json.loads((folder / "config.json").read_text())
        assert len(config.get("layer_types") or [0] * 4) == 4
        assert "auto_map" not in config
        folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", RELOAD, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4 [0, 2, 3, 5]"] * len(CONFIGS)


def test_lineage_lives_in_the_config(model, tmp_path):
    assert get_lineage(model).kept == list(range(LAYERS))
    remove_layers(model, [1, 2])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert remove_layers(again, [1]).kept == [0, 4, 5]
    assert get_lineage(again).removed == [1, 2, 3]
    again.config.num_hidden_layers = 2
    with pytest.raises(LayerPruneError, match="lists 3 layers, but num_hidden_layers is 2"):
        get_lineage(again)


def test_two_cuts_are_one(model):
    once, twice = copy.deepcopy(model), model
    remove_layers(once, [1, 4])
    remove_layers(twice, [1])
    remove_layers(twice, [3])
    assert get_lineage(once) == get_lineage(twice)
    assert torch.equal(logits(once, tokens()), logits(twice, tokens()))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([6], r"No layers \[6\]: this model has 6 layers \(0 to 5\)"),
        (-1, r"No layers \[-1\]"),
        ([1, 1], "named twice"),
        (range(6), "Cannot remove all 6 layers"),
        (["1"], "No layers"),
        ([True], "No layers"),
    ],
)
def test_wrong_layers_are_refused(llama, layers, message):
    before = logits(llama, tokens())
    with pytest.raises(LayerPruneError, match=message):
        remove_layers(llama, layers)
    assert torch.equal(logits(llama, tokens()), before)
    assert issubclass(LayerPruneError, ValueError)


def test_a_model_is_as_before_after_without_layers(model):
    before, config = logits(model, tokens()), model.config.to_dict()
    modules = [id(module) for module in model.modules()]

    def interrupted():
        with without_layers(model, [1, 3]):
            assert len(find_decoder(model).layers) == 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config.to_dict() == config
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(logits(model, tokens()), before)


def test_what_cannot_be_cut_exactly_is_refused_and_left_alone(llama):
    class Tagged(type(llama)):
        def __init__(self, config):
            super().__init__(config)
            for i, layer in enumerate(self.model.layers):
                layer.window = 4 if i == 1 else None  # what no rule of ours moves

    tagged = Tagged(copy.deepcopy(CONFIGS["llama"]))
    before = logits(tagged, tokens())
    with pytest.raises(LayerPruneError, match=r"layers\.0\.window is 4 here, None there"):
        remove_layers(tagged, 0)
    assert len(tagged.model.layers) == 6
    assert torch.equal(logits(tagged, tokens()), before)


def test_only_causal_language_models_are_cut():
    with pytest.raises(LayerPruneError, match="PreTrainedModel, got Linear"):
        remove_layers(nn.Linear(2, 2), 0)


def test_lineage():
    lineage = Lineage(8, [0, 2, 3, 6])
    assert lineage.removed == [1, 4, 5, 7]
    assert lineage.after_cuts == [1, 3]
    assert lineage.without({1}).kept == [0, 3, 6]
    for kept in ([], [1, 1], [2, 1], [0, 8], [-1, 2]):
        with pytest.raises(LayerPruneError, match="Not a lineage"):
            Lineage(8, kept)


def test_damaged_lineage_is_refused(llama):
    for entry in ({}, {"original_num_hidden_layers": "x", "kept_layers": [0]}, [1]):
        llama.config.layer_pruning = entry
        with pytest.raises(LayerPruneError, match="Damaged `layer_pruning`"):
            get_lineage(llama)


def test_keep_lineage(llama):
    keep_lineage(llama, Lineage(6, [0, 2, 5]))
    assert get_lineage(llama).kept == [0, 2, 5]
    with pytest.raises(LayerPruneError, match="cannot be cut to"):
        keep_lineage(llama, Lineage(6, [0, 1]))


def test_differences_that_were_there_before_are_no_obstacle(llama):
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.5  # switched on by hand, unlike the config
    llama.model.layers[2].extra = nn.ModuleDict()  # put in by hand, and empty
    remove_layers(llama, [1])
    assert llama.model.layers[1].self_attn.attention_dropout == 0.5
    assert llama.model.layers[1].extra is not None


def test_a_context_can_be_entered_again(model):
    whole = logits(model, tokens())
    cut = without_layers(model, [2])
    assert torch.equal(logits(model, tokens()), whole)
    found = []
    for _ in range(2):
        with cut:
            found.append(logits(model, tokens()))
        assert torch.equal(logits(model, tokens()), whole)
    assert torch.equal(found[0], found[1])
    remove_layers(model, [2])
    assert torch.equal(logits(model, tokens()), found[0])


def test_tables_packed_over_the_layers_are_cut():
    model = tiny_model("gemma3n_text")
    table = model.model.embed_tokens_per_layer.weight
    uncut, parts = table.clone(), table.shape[1] // 7
    table.requires_grad_(False)
    with without_layers(model, [0, 3]):
        assert model.model.embed_tokens_per_layer.embedding_dim == 5 * parts
    assert model.model.embed_tokens_per_layer.weight is table
    remove_layers(model, [0, 3])
    cut = model.model.embed_tokens_per_layer.weight
    kept = [i for i in range(7 * parts) if i // parts not in (0, 3)]
    assert torch.equal(cut, uncut[:, kept])
    assert not cut.requires_grad
    assert torch.equal(table, uncut)


def test_refused_layers_say_why_and_the_others_go():
    model = tiny_model("gemma3n_text")
    cuts, refused = LayerStack(model).removable(range(7))
    assert cuts.keys() == {0, 1, 3, 5, 6}
    assert "Cannot remove layers [2]" in refused[2]
    with pytest.raises(LayerPruneError, match="store_full_length_kv"):
        remove_layers(model, [1, 2])


@pytest.mark.parametrize("name", ["zaya", "qwen3_moe", "bart", "zamba2", "gemma3n_text", "bamba", "gemma3"])
def test_one_after_another_is_all_at_once(name, tmp_path):
    once, twice = tiny_model(name), tiny_model(name)
    remove_layers(once, [1, 5])
    remove_layers(twice, 5)
    twice.save_pretrained(tmp_path)
    twice = type(twice).from_pretrained(tmp_path, attn_implementation="eager")
    remove_layers(twice, 1)
    assert get_lineage(once) == get_lineage(twice) == Lineage(7, [0, 2, 3, 4, 6])
    fields = [model.config.to_dict() for model in (once, twice)]
    assert all(fields[0][name] == value for name, value in fields[1].items() if "layer" in name)
    # Grouped expert products of weights read from a file differ in the last bits, also of a whole model.
    close = {"rtol": 0, "atol": 1e-5 if name == "zaya" else 0}
    torch.testing.assert_close(logits(once, tokens()), logits(twice.eval(), tokens()), **close)


def test_no_attention_layer_left_is_refused():
    model = tiny_model("qwen3_next")  # attention in layers 1, 3 and 5
    remove_layers(model, [1, 3])
    with pytest.raises(LayerPruneError, match="no attention layer would be left"):
        remove_layers(model, 3)
    assert len(find_decoder(model).layers) == 5


def test_a_damaged_count_is_refused(llama):
    for count in (0, -1, 10**12):
        llama.config.num_hidden_layers = count
        with pytest.raises(LayerPruneError, match="layers: it is damaged"):
            get_lineage(llama)
    llama.config.num_hidden_layers = 6
    for original, kept in [(10**12, [0, 1]), (6, "012345"), (6, [0.0, 1.5]), (float("inf"), [0]), ("6", [0])]:
        llama.config.layer_pruning = {"original_num_hidden_layers": original, "kept_layers": kept}
        with pytest.raises(LayerPruneError, match="Damaged `layer_pruning`"):
            get_lineage(llama)


def test_a_context_of_another_depth_is_not_entered(llama):
    whole = logits(llama, tokens())
    first, second = without_layers(llama, [1]), without_layers(llama, [2])
    with first:
        inside = logits(llama, tokens())
        for other in (second, first):
            with pytest.raises(LayerPruneError, match="has lost layers since"):
                other.__enter__()
        assert torch.equal(logits(llama, tokens()), inside)
    assert torch.equal(logits(llama, tokens()), whole)
    remove_layers(llama, [5])
    with pytest.raises(LayerPruneError, match="has lost layers since"):
        first.__enter__()
    assert get_lineage(llama).kept == [0, 1, 2, 3, 4]


@pytest.mark.skipif("dots3_note_text" not in TYPES, reason="newer than this transformers")
def test_every_copy_of_the_config_follows():
    model = tiny_model("dots3_note_text")
    remove_layers(model, [1, 3])
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    assert len(configs) > 1  # its rotary embeddings have their own
    assert {config.num_hidden_layers for config in configs.values()} == {5}
    assert {len(config.layer_types) for config in configs.values()} == {5}


def test_tied_weights_are_tied_again():
    model = tiny_model("zamba2")
    remove_layers(model, [1, 3])
    before = logits(model, tokens())
    model.tie_weights()
    assert torch.equal(logits(model, tokens()), before)


def test_pictures_that_enter_at_layers_by_number_are_refused(llama):
    llama.config.vision = {"deepstack_visual_indexes": [1, 3]}
    with pytest.raises(LayerPruneError, match="pictures enter it at layers by their number"):
        remove_layers(llama, 4)


def test_a_kind_of_layer_may_be_used_up():
    model = tiny_model("dots1")
    sliding = [i for i, kind in enumerate(model.config.layer_types) if kind == "sliding_attention"]
    remove_layers(model, sliding)
    assert model.model.has_sliding_layers is False


def test_the_layers_of_an_encoder_are_not_counted():
    config = BartConfig(encoder_layers=4, decoder_layers=3)
    assert config.is_encoder_decoder
    assert layer_count(text_config(config)) == 3


def test_a_layer_that_reads_from_another_follows_it(llama):
    class Reading(type(llama)):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[-1].source_layer_index = len(self.model.layers) - 2

    model = Reading(copy.deepcopy(CONFIGS["llama"]))
    with pytest.raises(LayerPruneError, match="source_layer_index is 4 here, 3 there"):
        remove_layers(model, 4)
    remove_layers(model, [1, 2])
    assert model.model.layers[-1].source_layer_index == 2


def in_eight_bits(**settings):
    """The tiny Llama with its layers in eight bits, but for those named."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells each cast to float16
    make_model().save_pretrained("whole")
    config = BitsAndBytesConfig(load_in_8bit=True, **settings)
    options = {"device_map": {"": "cpu"}, "quantization_config": config, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained("whole", **options)


def quantised(model):
    return [type(layer.self_attn.q_proj).__name__ == "Linear8bitLt" for layer in model.model.layers]


@pytest.mark.parametrize(("gone", "skipped"), [(1, ["model.layers.1"]), (3, ["model.layers.2"]), (2, [])])
def test_names_of_what_is_not_quantised_follow(gone, skipped, tmp_path):
    model = in_eight_bits(llm_int8_skip_modules=["lm_head", "model.layers.2"])
    config, before = model.config.quantization_config, logits(model, tokens())
    with without_layers(model, gone):
        expected = logits(model, tokens())
    assert model.config.quantization_config is config
    assert torch.equal(logits(model, tokens()), before)
    remove_layers(model, gone)
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head", *skipped]
    assert config.llm_int8_skip_modules == ["lm_head", "model.layers.2"]  # it may be of another model, too
    save_model(model, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert quantised(again) == quantised(model)
    assert sum(quantised(model)) == (5 if gone == 2 else 4)
    assert torch.equal(logits(again, tokens()), expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([r"model\.layers\.(2|4)"], r"names modules by the pattern .* Name each layer by itself"),
        (["model..ayers.2"], "would mean others: model.layers.1"),
    ],
)
def test_names_that_cannot_follow_are_refused_before_a_removal(names, message):
    model = in_eight_bits(llm_int8_skip_modules=["lm_head", *names])
    before = logits(model, tokens())
    with pytest.raises(LayerPruneError, match=message):
        remove_layers(model, 1)
    assert len(model.model.layers) == 6
    assert torch.equal(logits(model, tokens()), before)


def test_names_in_any_entry_of_a_config_follow(llama):
    """As compressed-tensors, AutoRound and others have them, in a config that nothing is loaded with."""
    llama.config.quantization_config = {
        "quant_method": "x",
        "ignore": ["lm_head", r"re:.*layers\.3\.mlp.*"],
        "extra_config": {"model.layers.1.mlp": {"bits": 8}, "model.layers.4.mlp": {"bits": 16}},
    }
    llama.config.modules_to_not_convert = ["model.layers.5"]
    remove_layers(llama, [1, 2])
    assert llama.config.quantization_config == {
        "quant_method": "x",
        "ignore": ["lm_head", r"re:.*layers\.1\.mlp.*"],
        "extra_config": {"model.layers.2.mlp": {"bits": 16}},
    }
    assert llama.config.modules_to_not_convert == ["model.layers.3"]


def cut_by_hand(family, keep, kinds=True):
    """A model whose list of layers and count were changed, as scripts do, and nothing else."""
    model = make_model(family)
    decoder = find_decoder(model)
    setattr(decoder.parent, decoder.attribute, torch.nn.ModuleList([decoder.layers[i] for i in keep]))
    model.config.num_hidden_layers = len(keep)
    if getattr(model.config, "layer_types", None):
        types = model.config.layer_types
        model.config.layer_types = [types[i] for i in keep] if kinds else types[: len(keep)]
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_that_were_cut_by_hand_are_numbered_anew(family, caplog):
    model = cut_by_hand(family, [0, 2, 3, 5])
    remove_layers(model, 1)
    assert "Layers [2, 3] carried the numbers of other places" in caplog.text
    save_model(model, "cut")
    again = AutoModelForCausalLM.from_pretrained("cut").eval()
    settings = {"max_new_tokens": 8, "do_sample": False}
    prompt = {"input_ids": tokens(1, 6), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    assert torch.equal(model.generate(**prompt, **settings), again.generate(**prompt, **settings))


def test_scoring_leaves_numbers_as_they_are(caplog):
    model = cut_by_hand("llama", [0, 2, 3, 5])
    table = score_layers(model, [{"input_ids": tokens()}], progress=False)
    assert sorted(table.scores) == [1, 2]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 2, 3, 5]
    assert not caplog.text


def test_a_config_that_did_not_follow_a_cut_by_hand_is_refused():
    model = cut_by_hand("gemma2", [0, 2, 3, 5], kinds=False)
    with pytest.raises(LayerPruneError, match=r"a model built from the new config would differ: .*sliding"):
        remove_layers(model, 1)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 2, 3, 5]
    model = make_model()
    model.model.layers = model.model.layers[:4]
    with pytest.raises(
        LayerPruneError, match=r"has 4 layers in [a-z.]*layers, .* set config.num_hidden_layers = 4"
    ):
        remove_layers(model, 1)


def test_one_layer_in_two_places_is_refused():
    model = make_model()
    model.model.layers[3] = model.model.layers[2]
    with pytest.raises(LayerPruneError, match=r"Layers \[3\] .* are the same modules as earlier layers"):
        remove_layers(model, 1)


@pytest.mark.skipif("gemma4_text" not in TYPES, reason="newer than this transformers")
def test_settings_of_single_layers_follow():
    """Fails if transformers keeps them in another private attribute."""
    model = tiny_model("gemma4_text")
    before = {int(layer): entry for layer, entry in model.config.to_dict()["per_layer_config"].items()}
    count = len(find_decoder(model).layers)
    assert before
    remove_layers(model, [1])
    kept = [layer for layer in range(count) if layer != 1]
    after = {int(layer): entry for layer, entry in model.config.to_dict()["per_layer_config"].items()}
    assert after == {kept.index(layer): entry for layer, entry in before.items() if layer in kept}
