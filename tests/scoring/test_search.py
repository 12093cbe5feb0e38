from itertools import combinations

import pytest

from hf_layerprune import LayerPruneError, score_layers, select_layers
from hf_layerprune.surgery.decoder import find_decoder
from hf_layerprune.surgery.removal import without_layers

from ..conftest import logits, tokens
from .test_leave_one_out import many
from .test_score import batches as padded
from .test_score import mean_loss


def costs(model, count):
    whole = mean_loss(model)
    found = {}
    for layers in combinations(range(1, 5), count):
        with without_layers(model, layers):
            found[layers] = mean_loss(model) - whole
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_cost_is_that_of_removing_them(model, count):
    before = logits(model, tokens())
    every = costs(model, count)
    greedy = select_layers(model, padded(), count, refine=False, progress=False)
    refined = select_layers(model, padded(), count, progress=False)
    assert greedy.cost == pytest.approx(every[tuple(greedy.layers)], abs=1e-5)
    assert refined.cost == pytest.approx(every[tuple(refined.layers)], abs=1e-5)
    assert min(every.values()) - 1e-5 <= refined.cost <= greedy.cost + 1e-9
    assert [len(layers) for layers, _ in greedy.steps] == list(range(1, count + 1))
    assert (logits(model, tokens()) == before).all()
    assert len(find_decoder(model).layers) == 6


def test_refining_ends_where_no_exchange_helps(model):
    found = select_layers(model, padded(), 2, progress=False)
    every = costs(model, 2)
    for layers, cost in every.items():
        if len(set(layers) & set(found.layers)) == 1:
            assert cost >= found.cost - 1e-5
    values = [cost for layers, cost in found.steps if len(layers) == 2]
    assert values == sorted(values, reverse=True)


def test_a_run_is_the_least_important_one(llama):
    found = select_layers(llama, many(llama), 2, "block_influence", contiguous=True, progress=False)
    table = score_layers(llama, many(llama), "block_influence", block_size=2, progress=False)
    start = table.ranking()[0]
    assert found.layers == [start, start + 1]
    assert found.cost == table.scores[start]


def test_refining_leaves_a_run_that_can_be_bettered(llama):
    block = select_layers(llama, many(llama), 2, contiguous=True, refine=False, progress=False)
    better = select_layers(llama, many(llama), 2, contiguous=True, progress=False)
    assert better.cost <= block.cost
    assert block.layers[1] == block.layers[0] + 1


def test_protected_layers_stay(llama):
    found = select_layers(llama, padded(), 3, protected=[1, 4], progress=False)
    assert not set(found.layers) & {1, 4}
    for remove in (0, 5, "2"):
        with pytest.raises(LayerPruneError, match="layers are not protected"):
            select_layers(llama, padded(), remove, progress=False)
