import copy

import pytest
import torch
from torch import nn

from hf_layerprune.surgery.fresh_model import build_meta_model, differences

from ..conftest import make_model
from ..tiny_models import tiny_model


def found(model):
    return [str(difference) for difference in differences(model, build_meta_model(model))]


def test_a_model_is_as_its_config_says(model):
    assert found(model) == []


def test_a_meta_model_takes_no_memory_and_changes_nothing(llama):
    config = llama.config.to_dict()
    assert {p.device.type for p in build_meta_model(llama).parameters()} == {"meta"}
    assert llama.config.to_dict() == config


@pytest.mark.parametrize("name", ["llama", "diffllama"])
def test_a_meta_model_draws_no_random_number(name):
    model, state = tiny_model(name), torch.get_rng_state()
    build_meta_model(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_kind_of_difference_is_named(llama):
    attention = llama.model.layers[3].self_attn
    attention.scaling = 0.5
    attention.kinds = ["a", "b"]
    attention.table = {1: 2}
    attention.q_proj = nn.Linear(32, 16, bias=False)
    attention.extra = nn.Module()
    del llama.model.layers[2].mlp.up_proj
    assert found(llama) == sorted(
        [
            "model.layers.2.mlp.up_proj is absent here, a module there",
            "model.layers.3.self_attn.extra is a module here, absent there",
            "model.layers.3.self_attn.q_proj.out_features is 16 here, 32 there",
            "model.layers.3.self_attn.q_proj.weight is (16, 32) here, (32, 32) there",
            f"model.layers.3.self_attn.scaling is 0.5 here, {8**-0.5} there",
        ]
    )


def test_weights_that_are_not_tied_as_they_should_be():
    model = make_model("gpt2")
    model.lm_head.weight = nn.Parameter(copy.deepcopy(model.lm_head.weight.detach()))
    assert len(found(model)) == 1
    assert "lm_head.weight is a parameter of its own here, tied to" in found(model)[0]


def test_tables_that_are_not_saved_and_not_built_anew_are_no_difference(llama):
    llama.model.rotary_emb.register_buffer("of_a_kind_now_gone", torch.ones(2), persistent=False)
    assert found(llama) == []
    llama.model.rotary_emb.register_buffer("saved", torch.ones(2))
    assert found(llama) == ["model.rotary_emb.saved is (2,) here, absent there"]
