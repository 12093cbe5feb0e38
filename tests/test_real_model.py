"""On SmolLM2-135M-Instruct, whose 30 trained layers differ as random ones do not."""

import copy

import pytest
import torch

from hf_layerprune import evaluate_text, get_lineage, remove_layers, score_layers
from hf_layerprune.commands.quickstart import load_embedded_model, split_topics
from hf_layerprune.data.batches import make_batches
from hf_layerprune.data.sequences import token_sequences

from .conftest import logits


@pytest.fixture(scope="module")
def real():
    model, tokenizer = load_embedded_model()
    blocks = token_sequences(split_topics()["calibration"], tokenizer, 128, limit=2)
    return model, tokenizer, make_batches(blocks, 2)


def test_the_scores_are_those_of_a_trained_model(real):
    model, _, batches = real
    table = score_layers(copy.deepcopy(model).to(torch.bfloat16), batches, progress=False)
    # Measured on web text: layers 1, 11 and 28 are essential, one of the middle ones is not.
    ranking = table.ranking()
    assert set(ranking[-3:]) == {1, 11, 28}
    assert table.scores[ranking[0]] < 0.2 < 1.0 < table.scores[11]
    influence = score_layers(model, batches, "block_influence", progress=False)
    assert influence.ranking()[-1] in (1, 24)
    assert influence.scores[11] < 0.1  # Block Influence misses layer 11


def test_a_cut_model_generates_and_reloads(real, tmp_path):
    model, tokenizer, batches = real
    dense = evaluate_text(model, batches)["perplexity"]
    cut = copy.deepcopy(model)
    remove_layers(cut, [5, 14, 17])
    found = evaluate_text(cut, batches)["perplexity"]
    assert dense < found < 2 * dense
    cut.save_pretrained(tmp_path)
    again = type(cut).from_pretrained(tmp_path)
    assert get_lineage(again).removed == [5, 14, 17]
    assert torch.equal(logits(again, batches[0]["input_ids"]), logits(cut, batches[0]["input_ids"]))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False}
    cached = cut.generate(**prompt, use_cache=True, **settings)
    assert cached.tolist() == again.generate(**prompt, use_cache=False, **settings).tolist()
    assert "Paris" in tokenizer.decode(cached[0])
