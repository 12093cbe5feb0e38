import copy
import gc
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_layerprune import LayerPruneError, LayerPruningCallback, remove_layers, score_layers
from hf_layerprune.pruning.prune import prune_layers
from hf_layerprune.scoring.criteria import CRITERIA
from hf_layerprune.surgery import exact_cut, layer_stack, peft
from hf_layerprune.surgery.decoder import find_decoder
from hf_layerprune.surgery.layer_stack import LayerStack
from hf_layerprune.surgery.removal import put_back, without_layers

from ..conftest import LAYERS, logits, make_model, tokens
from ..tiny_models import tiny_model


@pytest.fixture
def builds(monkeypatch):
    """A list that grows by one with each model that is built to compare with."""
    made, build = [], exact_cut.build_meta_model

    def counted(model):
        made.append(model.config.num_hidden_layers)
        return build(model)

    for module in (exact_cut, peft):
        monkeypatch.setattr(module, "build_meta_model", counted)
    return made


def calibration():
    return [{"input_ids": tokens()}]


def test_it_describes_the_model(llama):
    stack = LayerStack(llama)
    assert stack.base is llama
    assert stack.config is llama.config
    assert stack.layers is llama.model.layers
    assert (len(stack), stack.lineage.kept) == (LAYERS, list(range(LAYERS)))
    assert LayerStack.of(stack) is stack
    assert LayerStack.of(llama).base is llama
    adapted = LayerStack(get_peft_model(llama, LoraConfig(target_modules=["q_proj"])))
    assert adapted.base is llama
    assert adapted.layers is llama.model.layers


def test_it_follows_a_removal_by_itself_and_by_another(llama):
    stack, other = LayerStack(llama), LayerStack(llama)
    stack.remove([1])
    assert stack.lineage.kept == other.lineage.kept == [0, 2, 3, 4, 5]
    remove_layers(llama, 1)
    assert stack.layers is other.layers is llama.model.layers
    with stack.without(0):
        assert stack.lineage.kept == [3, 4, 5]
        assert len(other) == 3
    assert stack.lineage.kept == [0, 3, 4, 5]
    assert len(other) == 4


def test_it_follows_changes_by_hand(llama):
    stack = LayerStack(llama)
    llama.model.layers = llama.model.layers[:3]
    with pytest.raises(LayerPruneError, match=r"has 3 layers in model\.layers, but its config counts 6"):
        _ = stack.layers
    llama.config.num_hidden_layers = 3
    assert len(stack) == 3
    assert stack.removable()[0].keys() == {0, 1, 2}
    llama.model = make_model("llama").model
    llama.config = llama.model.config
    assert stack.layers is llama.model.layers
    assert stack.config is llama.config
    assert stack.removable()[0].keys() == set(range(LAYERS))


def test_the_layers_that_can_be_removed_are_computed_once_per_state(llama, builds):
    stack = LayerStack(llama)
    cuts, _ = stack.removable()
    assert len(builds) == LAYERS
    for layer in cuts:
        with cuts[layer]:
            pass
    assert LayerStack(llama).removable(range(2))[0].keys() == {0, 1}  # of another handle
    without_layers(llama, 3)
    remove_layers(llama, 2)
    assert len(builds) == LAYERS
    stack.removable([1, 2])
    stack.removable([1], block=2)
    assert len(builds) == LAYERS + 3


def test_refusals_are_computed_once_too(builds):
    stack = LayerStack(tiny_model("gemma3n_text"))
    cuts, reasons = stack.removable()
    many = len(builds)
    assert (stack.removable()[0].keys(), stack.removable()[1]) == (cuts.keys(), reasons)
    with pytest.raises(LayerPruneError, match=r"Cannot remove layers \[2\]"):
        stack.remove(2)
    assert reasons.keys() == {2, 4}
    assert len(builds) == many


def replaced(model):
    model.model.layers[3] = copy.deepcopy(model.model.layers[3])


def renumbered(model):
    model.model.layers[3].self_attn.layer_idx = 2


def extended(model):
    model.model.layers[3].mlp.extra = nn.Linear(2, 2)


def configured(model):
    model.config.rms_norm_eps = 0.5


def configured_anew(model):
    model.config = copy.deepcopy(model.config)


def untied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def adapted(model):
    return get_peft_model(model, LoraConfig(layers_to_transform=[1, 3], target_modules=["q_proj"]))


def lost_by_hand(model):
    del model.model.layers[5]
    model.config.num_hidden_layers = 5


@pytest.mark.parametrize(
    "change",
    [replaced, renumbered, extended, configured, configured_anew, untied, adapted, lost_by_hand],
)
def test_nothing_is_remembered_of_another_state(llama, change, builds):
    whole = copy.deepcopy(llama)
    LayerStack(llama).removable()
    changed, expected = change(llama) or llama, change(whole) or whole
    cuts, reasons = LayerStack(changed).removable()
    fresh_cuts, fresh_reasons = LayerStack(expected).removable()
    assert (cuts.keys(), reasons) == (fresh_cuts.keys(), fresh_reasons)
    before = len(builds)
    if 1 in cuts:
        remove_layers(changed, 1)
        remove_layers(expected, 1)
        assert len(builds) == before
        assert changed.config.to_dict() == expected.config.to_dict()
        assert torch.equal(logits(changed, tokens()), logits(expected, tokens()))


def test_a_removal_is_of_the_present_mode_and_weights():
    model = tiny_model("gemma3n_text").eval()  # whose layers share a table
    other = tiny_model("gemma3n_text").eval()
    LayerStack(model).removable()
    for one in (model, other):
        with torch.no_grad():
            one.model.embed_tokens_per_layer.weight.mul_(2)
        one.train()
        one.model.layers.train(False)
        remove_layers(one, 3)
        assert one.training
        assert not one.model.layers.training
    assert torch.equal(logits(model, tokens()), logits(other, tokens()))


def test_layers_that_were_put_back_are_removable(llama):
    whole = copy.deepcopy(llama)
    stack = LayerStack(llama)
    stack.removable()
    stack.remove([1, 2])
    put_back(llama, whole)
    assert stack.removable()[0].keys() == set(range(LAYERS))
    stack.remove([1])
    assert stack.lineage.kept == [0, 2, 3, 4, 5]


def test_a_copy_of_a_model_has_removals_of_its_own(llama):
    LayerStack(llama).removable()
    copied = copy.deepcopy(llama)
    remove_layers(copied, [1])
    assert len(llama.model.layers) == LAYERS
    assert len(copied.model.layers) == LAYERS - 1
    remove_layers(llama, [1])
    assert torch.equal(logits(llama, tokens()), logits(copied, tokens()))


def test_a_new_wrapper_around_the_same_adapters_is_another_model(llama):
    llama.model.layers[2].self_attn.attention_dropout = 0.5  # differs from a fresh model before any removal
    config = LoraConfig(target_modules=["q_proj"])
    wrapped = get_peft_model(llama, config)
    LayerStack(wrapped).removable([])
    copied = copy.copy(wrapped)
    del wrapped
    gc.collect()
    cuts, reasons = LayerStack(copied).removable([3, 4])
    assert (cuts.keys(), reasons) == ({3, 4}, {})


def test_nothing_is_kept_alive(llama):
    gc.disable()
    try:
        stack = LayerStack(llama)
        cuts, _ = stack.removable()
        with cuts[1]:
            pass
        gone = [weakref.ref(llama.model.layers[i].mlp.up_proj.weight) for i in (1, 2)]
        remove_layers(llama, 1)
        stack.removable()
        llama.model.layers = llama.model.layers[:1]  # by hand
        assert not any(weight() is not None for weight in gone)
        model = make_model("llama")
        score_layers(model, calibration(), progress=False)
        table = weakref.ref(model.model.embed_tokens.weight)
        del model
        assert table() is None
    finally:
        gc.enable()


def test_an_interrupted_removal_changes_nothing(llama):
    before, config = logits(llama, tokens()), llama.config.to_dict()
    cut = LayerStack(llama).without(2)
    layers = llama.model.layers

    class Interrupting(nn.ModuleList):
        def __getitem__(self, index):
            raise KeyboardInterrupt

    layers.__class__ = Interrupting
    with pytest.raises(KeyboardInterrupt):
        cut.__enter__()
    layers.__class__ = nn.ModuleList
    assert llama.model.layers is layers
    assert llama.config.to_dict() == config
    assert torch.equal(logits(llama, tokens()), before)


@pytest.mark.parametrize("select", ["greedy", "one_shot"])
def test_at_most_one_model_a_layer_is_built_before_layers_are_pruned(llama, builds, select):
    prune_layers(llama, target_layers=5, calibration=calibration(), select=select)
    assert len(llama.model.layers) == 5
    assert len(builds) <= LAYERS


@pytest.mark.parametrize("criterion", ["loss", "block_influence"])
def test_at_most_one_model_a_layer_is_built_before_the_first_removal_in_training(
    llama, builds, criterion, tmp_path
):
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens(4, 12).tolist()])
    callback = LayerPruningCallback(
        target_layers=5,
        steps_per_phase=1,
        calibration=calibration(),
        criterion=criterion,
        verify_save=False,
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    Trainer(
        llama, arguments, train_dataset=data, data_collator=default_data_collator, callbacks=[callback]
    ).train()
    assert len(llama.model.layers) == 5
    assert len(builds) <= LAYERS


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"task"}))
def test_the_decoder_is_found_once_to_score(llama, criterion, monkeypatch):
    calls = []
    monkeypatch.setattr(layer_stack, "find_decoder", lambda model: calls.append(1) or find_decoder(model))
    score_layers(llama, calibration(), criterion, progress=False)
    assert len(calls) == 1
