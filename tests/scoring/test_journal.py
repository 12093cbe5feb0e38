import contextlib
import copy
import logging

import pytest
import torch

from hf_layerprune import LayerPruneError, MultipleChoice, score_layers
from hf_layerprune.scoring.journal import Journal

from ..conftest import make_model, tokens
from ..evaluation.test_multiple_choice import QUESTIONS


BATCHES = [{"input_ids": tokens(2, 64, seed=i)} for i in range(8)]


def test_what_is_there_is_not_computed_again(tmp_path):
    path, computed = tmp_path / "journal", []

    def work(path, until):
        journal = Journal(path, "squares")
        return [journal.once(lambda i=i: (computed.append(i), i * i / 3)[1]) for i in range(until)]

    assert work(path, 3) == [0, 1 / 3, 4 / 3]
    with path.open("a") as file:
        file.write("1.2")  # killed while it wrote
    assert work(path, 5) == work(None, 5)
    assert computed == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert work(path, 5) == work(path, 5)
    assert len(computed) == 10
    Journal(path, "squares").finish()
    assert not list(tmp_path.iterdir())


def test_other_work_starts_afresh(tmp_path, caplog):
    Journal(tmp_path / "journal", "squares").once(lambda: 1)
    with caplog.at_level(logging.WARNING):
        assert Journal(tmp_path / "journal", "cubes").once(lambda: 2) == 2
    assert "of another model or text" in caplog.text
    assert Journal(tmp_path / "journal", "cubes").once(lambda: 3) == 2


@pytest.mark.parametrize("text", ["my notes", "[1, 2]", "my notes\n", "[1, 2]\n", '"text"\n', '{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_left_alone(text, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(LayerPruneError, match="holds no scores"):
        Journal(tmp_path / "file", "squares")
    assert (tmp_path / "file").read_text() == text


@pytest.mark.parametrize(
    ("criterion", "settings"),
    [("loss", {}), ("loss", {"racing": 0.6}), ("kl", {}), ("task", {}), ("task", {"task": "questions"})],
)
def test_scoring_goes_on_where_it_was_stopped(criterion, settings, tokenizer, tmp_path):
    """Whenever it was stopped, the table is that of a run which was not, to the bit."""
    model, calls, limit = make_model(), [], [10**9]
    if settings.get("task"):
        settings = {"task": MultipleChoice(QUESTIONS, tokenizer, batch_tokens=60)}
    elif criterion == "task":
        settings = {"task": lambda model: model(tokens()).logits.sum().item()}

    def score(journal=None):
        calls.clear()
        return score_layers(model, BATCHES, criterion, journal=journal, progress=False, **settings)

    def stop(*_):
        calls.append(1)
        if len(calls) > limit[0]:
            raise KeyboardInterrupt

    model.model.layers[5].register_forward_hook(stop)
    expected = score()
    whole, path = len(calls), tmp_path / "scores"
    limit[0] = whole // 2
    with pytest.raises(KeyboardInterrupt):
        score(path)
    assert len(path.read_text().splitlines()) > 1
    limit[0] = whole
    assert score(path) == expected
    assert len(calls) < whole
    assert not path.exists()


def other_config(model):
    """The same weights, read in another way."""
    model = copy.deepcopy(model)
    model.config.rms_norm_eps = 0.1
    return model


def test_another_model_or_text_is_not_taken_for_the_same(llama, tmp_path, caplog):
    path = tmp_path / "scores"
    failing = [*BATCHES[:-1], {"input_ids": BATCHES[-1]["input_ids"], "labels": torch.full((2, 64), 999)}]
    with pytest.raises(IndexError):
        score_layers(llama, failing, journal=path, progress=False)
    text = path.read_text()
    assert len(text.splitlines()) == len(BATCHES)

    def goes_on(model, batches, **settings):
        path.write_text(text)
        caplog.clear()
        with caplog.at_level(logging.WARNING), contextlib.suppress(IndexError):
            score_layers(model, batches, journal=path, progress=False, **settings)
        return "starts afresh" not in caplog.text

    assert goes_on(llama, failing)
    assert not goes_on(make_model(seed=1), failing)
    assert not goes_on(copy.deepcopy(llama).double(), failing)
    assert not goes_on(other_config(llama), failing)
    assert not goes_on(llama, BATCHES)
    assert not goes_on(llama, failing[:-1])
    assert not goes_on(llama, [{name: x.reshape(4, 32) for name, x in batch.items()} for batch in failing])
    assert not goes_on(llama, failing, racing=0.9)
    assert not goes_on(llama, failing, protected=[1])
    assert not goes_on(llama, failing, criterion="kl")
    assert not goes_on(llama, failing, block_size=2)
    with pytest.raises(IndexError):
        score_layers(llama, failing, journal=path, racing=0.9, progress=False)
    text = path.read_text()
    assert goes_on(llama, failing, racing=0.9)
    assert not goes_on(llama, failing, racing=0.99)
