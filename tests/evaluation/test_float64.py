"""Devices without float64, as Apple GPUs: no sum over the outputs of a model is in float64 there."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_layerprune import MultipleChoice, score_layers
from hf_layerprune.forward import token_losses
from hf_layerprune.pruning.linear_map import replace_by_linear_map
from hf_layerprune.scoring.criteria import CRITERIA

from ..conftest import make_model, tokens
from .test_multiple_choice import QUESTIONS


class Float64Watch(TorchDispatchMode):
    """Notes operations that make float64 of other dtypes or of nothing. Statistics of lists are the
    CPU's own: they begin with float64."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_new = not any(torch.is_tensor(x) and x.dtype == torch.float64 for x in args)
        is_made = name in ("zeros", "ones", "zeros_like", "sum", "_to_copy")
        if is_made and is_new and torch.is_tensor(output) and output.dtype == torch.float64:
            self.found.append(name)
        return output


@pytest.fixture
def without_float64(monkeypatch):
    """The CPU as a device without float64."""
    monkeypatch.setattr(token_losses, "WITHOUT_FLOAT64", ("cpu",))


def batches():
    return [{"input_ids": tokens(2, 40, seed)} for seed in (1, 2)]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_need_no_float64(criterion, without_float64, tokenizer):
    task = MultipleChoice(QUESTIONS, tokenizer) if criterion == "task" else None
    settings = {"task": task} if task else {}
    with Float64Watch() as watch:
        table = score_layers(make_model(), batches(), criterion, **settings)
    assert watch.found == []
    token_losses.WITHOUT_FLOAT64 = ()
    exact = score_layers(make_model(), batches(), criterion, **settings)
    assert table.scores == pytest.approx(exact.scores, rel=1e-4, abs=1e-5)


def test_the_same_scores_are_in_float64_where_there_is(tokenizer):
    with Float64Watch() as watch:
        score_layers(make_model(), batches(), "loss")
    assert watch.found


def test_a_linear_map_is_fitted_on_the_cpu(without_float64):
    assert token_losses.float64_device(torch.device("cpu")) == torch.device("cpu")
    assert token_losses.float64_device(torch.device("meta")) == torch.device("meta")
    model = make_model()
    exact = copy.deepcopy(model)
    replace_by_linear_map(model, 2, 2, batches())
    token_losses.WITHOUT_FLOAT64 = ()
    replace_by_linear_map(exact, 2, 2, batches())
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_an_evaluation_needs_no_float64_for_its_questions(without_float64, tokenizer):
    questions = MultipleChoice(QUESTIONS, tokenizer)
    with Float64Watch() as watch:
        questions.read(make_model())
    assert watch.found == []
