import logging

import pytest

from hf_layerprune.distillation.losses import hidden_loss_dominates
from hf_layerprune.pruning.diagnostics import loss_diverged, no_recovery, removal_too_costly
from hf_layerprune.reports.record import read_record

from ..conftest import make_model
from ..distillation.test_trainer import make_trainer
from .test_callback import plain_trainer, pruning


@pytest.mark.parametrize(
    ("earlier", "fall", "told"),
    [
        ([], 5.0, False),
        ([0.1, 0.12, 0.11], 0.3, False),
        ([0.1, 0.12, 0.11], 0.34, True),
        ([-0.1], 0.2, False),
    ],
)
def test_an_essential_layer_is_named(earlier, fall, told):
    sign = removal_too_costly(earlier, fall, 17, 20)
    assert (sign is not None) == told
    if told:
        assert sign.startswith(f"Layer 17 cost {fall:.3f}")
        assert "stop with 21 layers" in sign


@pytest.mark.parametrize(
    ("now", "told"),
    [(-3.2, "-20 %"), (-3.0, "0 %"), (-2.92, "8 %"), (-2.89, None), (-1.9, None)],
)
def test_a_phase_that_wins_back_nothing_is_told(now, told):
    sign = no_recovery(-2.0, -3.0, now)
    assert sign is None if told is None else f"won back {told} of" in sign
    assert no_recovery(-2.0, -2.0, now) is None  # nothing was lost


def test_hidden_states_that_drown_the_rest_are_told():
    assert hidden_loss_dominates(9.0, 1.0) is None
    assert hidden_loss_dominates(0.0, 0.0) is None
    assert "12 of the loss, the other terms 1:" in hidden_loss_dominates(12.0, 1.0)


@pytest.mark.parametrize(
    ("losses", "norm", "told"),
    [
        ([2.0, 1.0, 0.1, 0.6], 1.0, False),  # above the lowest, below where the phase began
        ([2.0, 1.0, 4.9], 1.0, False),
        ([2.0, 1.0, 5.1], 1.0, True),
        ([0.0, 0.0], 0.0, False),
        ([1.0, float("nan")], 1.0, True),
        ([1.0, 1.0], float("inf"), True),
    ],
)
def test_a_loss_that_runs_away_is_told(losses, norm, told):
    sign = loss_diverged(losses, norm)
    assert (sign is not None) == told
    if told:
        assert f"The loss is {losses[-1]:.3g}, where it was" in sign


@pytest.mark.parametrize("kind", ["plain", "distillation"])
def test_a_run_that_runs_away_says_so_once_a_phase(kind, caplog):
    callback = pruning()
    settings = {"max_steps": 8, "learning_rate": 20.0, "optim": "sgd", "max_grad_norm": 0.0}
    if kind == "plain":
        plain_trainer(make_model(), callback, **settings).train()
    else:
        make_trainer(make_model(), callbacks=[callback], **settings).train()
    signs = [sign for sign in callback.record.warnings if "training runs away" in sign]
    assert 1 <= len(signs) <= 2
    caplog.clear()
    callback = pruning()
    plain_trainer(make_model(), callback, output_dir="calm", max_steps=8).train()
    assert not any("runs away" in sign for sign in callback.record.warnings)


def test_a_run_tells_its_signs(caplog):
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        # The second removal costs far more than the first, and nothing brings it back.
        worth = {6: 10.0, 5: 9.0, 4: 1.0}
        callback = pruning(criterion="task", task=lambda model: worth[model.config.num_hidden_layers])
        make_trainer(make_model(), max_steps=4, callbacks=[callback]).train()
    assert "won back 0 % of what its removal cost" in caplog.text
    assert "cost 8.000, where removals before it cost 1.000" in caplog.text
    assert [sign[:14] for sign in read_record("out").warnings] == ["The last phase", "Layer 3 cost 8"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        settings = {"max_steps": 2, "learning_rate": 1e-2, "output_dir": "other"}
        make_trainer(make_model(), teacher_model=make_model(seed=1), hidden_weight=1e3, **settings).train()
        assert caplog.text.count("hardly any effect") == 2
        caplog.clear()
        make_trainer(make_model(), teacher_model=make_model(seed=1), hidden_weight=1e-3, **settings).train()
    assert "hardly" not in caplog.text


def test_a_place_costs_nothing(monkeypatch):
    told = []
    monkeypatch.setattr("hf_layerprune.pruning.run.removal_too_costly", lambda *args: told.append(args))
    make_trainer(make_model(), max_steps=4, callbacks=[pruning(criterion="positional")]).train()
    assert told == []
    callback = pruning()
    make_trainer(make_model(), max_steps=4, output_dir="other", callbacks=[callback]).train()
    assert len(told) == 2
