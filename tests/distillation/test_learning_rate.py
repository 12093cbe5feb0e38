"""Learning rates that fit the size of the weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_layerprune import reconstruct_layers, remove_layers
from hf_layerprune.distillation.learning_rate import healing_learning_rate, relative_learning_rate
from hf_layerprune.distillation.window_training import WindowTraining

from ..conftest import make_model, tokens


def test_the_rate_is_a_share_of_the_root_mean_square_of_all_matrices():
    small, large = torch.full((2, 3), 0.1), torch.full((4, 6), 0.3)
    vector = torch.full((100,), 9.0)  # norms and biases are not matrices
    mean_square = (6 * 0.01 + 24 * 0.09) / 30
    rate = relative_learning_rate([torch.nn.Parameter(one) for one in (small, vector, large)], 0.01)
    assert rate == pytest.approx(0.01 * mean_square**0.5, rel=0.05)
    assert rate == float(f"{rate:.2g}")


def test_the_rate_grows_with_the_weights_and_not_with_their_dtype():
    model = make_model()
    rate = healing_learning_rate(model)
    larger = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in larger.model.layers.parameters():
            parameter.mul_(10)
    assert healing_learning_rate(larger) == pytest.approx(10 * rate, rel=0.05)
    assert healing_learning_rate(copy.deepcopy(model).bfloat16()) == pytest.approx(rate, rel=0.05)


def test_a_large_matrix_loses_no_digits():
    large = torch.nn.Parameter(torch.full((10_000, 10_000), 0.02, dtype=torch.bfloat16), requires_grad=False)
    assert relative_learning_rate([large], 1.0) == 0.02


def test_weights_that_cannot_be_read_leave_the_trainers_rate():
    packed = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.uint8), requires_grad=False)
    assert relative_learning_rate([packed, torch.nn.Parameter(torch.ones(8))], 0.1) == 5e-5


def test_adapters_have_a_rate_of_their_own(monkeypatch):
    model = make_model()
    remove_layers(model, [2, 3])
    teacher, rates = make_model(), []
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    fit = WindowTraining.fit

    def spy(self, epochs, rate, *rest):
        rates.append(rate)
        fit(self, epochs, rate, *rest)

    monkeypatch.setattr(WindowTraining, "fit", spy)
    batches = [{"input_ids": tokens()}]
    reconstruct_layers(adapted, teacher, batches, epochs=1, progress=False)
    reconstruct_layers(model, teacher, batches, epochs=1, progress=False, learning_rate=2e-3)
    assert rates == [1e-3, 2e-3]


def test_embeddings_do_not_count():
    model = make_model()
    rate = healing_learning_rate(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100)
    assert healing_learning_rate(model) == rate
