"""How many tokens a forward pass takes, and how many states are kept."""

import pytest
import torch

from hf_layerprune import LayerPruneError, remove_layers, score_layers
from hf_layerprune.commands.cli import main
from hf_layerprune.data.batches import regroup_batches
from hf_layerprune.evaluation.evaluate import evaluate_text
from hf_layerprune.forward import memory
from hf_layerprune.scoring import prefix_cache
from hf_layerprune.scoring.prefix_cache import PrefixCache, default_cache_mb

from ..conftest import make_model, tokens


MIB = 2**20


def text():
    """Seven rows of two lengths, in four batches."""
    rows = [(3, 12), (1, 12), (1, 10), (2, 10)]
    return [{"input_ids": tokens(*shape, seed=i)} for i, shape in enumerate(rows)]


def shapes(model):
    """The list of batches that the last layer reads, without first looks at the model."""
    seen = []
    model.model.layers[-1].register_forward_hook(
        lambda module, args, output: seen.append(tuple(args[0].shape[:2])) if args[0].shape[1] > 8 else None
    )
    return seen


def test_batches_are_merged_and_split_to_so_many_tokens():
    found = regroup_batches(text(), 24)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, 12), (2, 12), (2, 10), (1, 10)]
    rows = [row.tolist() for batch in text() for row in batch["input_ids"]]
    assert [row.tolist() for batch in found for row in batch["input_ids"]] == rows
    assert [len(batch["input_ids"]) for batch in regroup_batches(text(), 1)] == [1] * 7
    masked = [{"input_ids": tokens(1, 12), "attention_mask": torch.ones(1, 12)}, {"input_ids": tokens(1, 12)}]
    assert len(regroup_batches(masked, 99)) == 2


@pytest.mark.parametrize("criterion", ["loss", "kl", "block_influence", "taylor"])
def test_scores_do_not_depend_on_the_size_of_a_pass(criterion):
    tables = []
    for size, expected in ((None, {(3, 12), (1, 12), (1, 10), (2, 10)}), (48, {(4, 12), (3, 10)})):
        seen = shapes(model := make_model())
        tables.append(score_layers(model, text(), criterion, batch_tokens=size, progress=False))
        assert {*seen} == expected
    assert tables[0].scores == pytest.approx(tables[1].scores, rel=1e-4, abs=1e-6)


def test_the_loss_does_not_depend_on_the_size_of_a_pass(llama):
    seen = shapes(llama)
    losses = [evaluate_text(llama, text(), batch_tokens=size)["loss"] for size in (None, 48)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert seen[4:] == [(4, 12), (3, 10)]


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "many"])
def test_a_size_that_is_no_number_of_tokens_is_refused(size, llama):
    for measure in (score_layers, evaluate_text):
        with pytest.raises(LayerPruneError, match=f"batch_tokens is {size!r}: it must be a whole number"):
            measure(llama, text(), batch_tokens=size)


def test_free_memory_of_a_gpu_decides(llama, monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900 * MIB, 2000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 150 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50 * MIB)
    assert memory.free_gpu_memory(device) == 1000 * MIB  # what torch holds and does not use is free
    assert default_cache_mb(device) == 128  # a quarter, down to a power of two
    assert memory.free_gpu_memory(llama.device) is None
    assert default_cache_mb(llama.device) == 1024
    assert memory.tokens_per_pass(llama) is None

    free = [0]
    monkeypatch.setattr(memory, "free_gpu_memory", lambda device: free[0])
    per_token = 4 * (32 * (6 + 16) + 4 * 48)
    for free[0], expected in (
        (10**15, 2**15),
        (2 * 1025 * per_token, 1024),
        (2 * 1023 * per_token, 512),
        (0, 1),
    ):
        assert memory.tokens_per_pass(llama) == expected
    assert memory.tokens_per_pass(llama, 7) == 7


def test_later_rounds_read_the_batches_of_the_first(llama, monkeypatch):
    """The states that are kept leave less free memory: smaller batches would be taken for those before."""
    free = [4 * 48 * 2 * 4 * (32 * 22 + 4 * 48)]
    monkeypatch.setattr(memory, "free_gpu_memory", lambda device: free[0])
    cache, seen = PrefixCache(100), shapes(llama)
    score_layers(llama, text(), prefix_cache=cache, progress=False)
    assert {*seen} == {(4, 12), (3, 10)}
    remove_layers(llama, 3)
    seen.clear()
    free[0] //= 8
    found = score_layers(llama, text(), prefix_cache=cache, progress=False)
    assert {*seen} == {(4, 12), (3, 10)}
    expected = score_layers(llama, text(), batch_tokens=48, progress=False)
    assert found == expected


def test_states_beyond_the_share_of_a_gpu_go_to_pinned_memory(monkeypatch):
    """On the device `meta` in place of a GPU."""
    gpu = torch.device("meta")
    monkeypatch.setattr(prefix_cache, "free_gpu_memory", lambda device: 8 * MIB)
    monkeypatch.setattr(prefix_cache, "_pinned", lambda part: torch.ones(part.shape))
    monkeypatch.setattr(prefix_cache.psutil, "virtual_memory", lambda: type("", (), {"available": 3 * MIB}))
    cache = PrefixCache()
    outputs = [(torch.empty(MIB // 4, device=gpu), None), torch.empty(MIB // 8, device=gpu)]  # 1.5 MiB
    for batch in range(4):
        cache.keep(batch, [0, 1], outputs)
    held = [cache._found[batch][2][1].device.type for batch in sorted(cache._found)]
    assert held == ["meta", "cpu"]  # 2 MiB on the GPU, 1.5 in main memory
    for batch in (0, 1):
        first, second = cache.known(batch, [0, 1])
        assert first[0].device == second.device == gpu
        assert first[1] is None
    cache.keep(1, [0], outputs[:1])  # in the place of what was there
    assert cache.known(1, [0, 1])[0][0].device == gpu
    cache.keep(2, [0], outputs[1:])
    assert len(cache.known(2, [0, 1])) == 1


@pytest.mark.parametrize("command", ["score", "evaluate", "cache-teacher"])
def test_the_flag_is_that_of_each_command(command, folder, monkeypatch):
    sizes, own = [], torch.nn.Embedding.forward

    def forward(self, ids):
        sizes.append(ids.numel())
        return own(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    words = [command, "model", "--data", "text.txt", "--sequence_length", "16", "--batch_tokens", "160"]
    words += ["--output_dir", "cache"] if command == "cache-teacher" else []
    assert main(words) == 0
    assert 160 in sizes
    assert max(sizes) <= (8 * 32 if command == "evaluate" else 160)  # copying reads passages twice
