"""The comparison of the best few blocks."""

import copy
import weakref
from types import SimpleNamespace

from hf_layerprune import remove_layers, score_layers
from hf_layerprune.data.batches import make_batches
from hf_layerprune.recipes import candidates

from ..conftest import make_model, tokens


def test_memory_holds_one_candidate_at_a_time(monkeypatch):
    model, batches = make_model(), make_batches([{"input_ids": tokens(4, 12)}])
    table = score_layers(model, batches, "loss", block_size=2, progress=False)
    copies, alive = [], []

    def copied(original):
        alive.append(sum(reference() is not None for reference in copies))
        copies.append(weakref.ref(pruned := copy.deepcopy(original)))
        return pruned

    def remove(candidate, first):
        remove_layers(candidate, [first, first + 1])

    monkeypatch.setattr(candidates, "copy", SimpleNamespace(deepcopy=copied))
    entries = candidates.compare_candidates(model, table, 3, remove, batches, batches, progress=False)
    assert len(entries) == 3
    assert alive == [0, 0, 0]
