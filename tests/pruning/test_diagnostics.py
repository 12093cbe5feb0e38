import logging

import pytest

from hf_layerprune.distillation.losses import hidden_loss_dominates
from hf_layerprune.pruning.diagnostics import loss_diverged, no_recovery, removal_too_costly
from hf_layerprune.reports.record import read_record

from ..conftest import make_model
from ..distillation.test_trainer import make_trainer
from .test_callback import plain_trainer, pruning


@pytest.mark.parametrize(
    ("earlier", "cost", "warns"),
    [
        ([], 5.0, False),
        ([0.1, 0.12, 0.11], 0.3, False),
        ([0.1, 0.12, 0.11], 0.34, True),
        ([-0.1], 0.2, False),
    ],
)
def test_warns_of_an_essential_layer(earlier, cost, warns):
    warning = removal_too_costly(earlier, cost, 17, 20)
    assert (warning is not None) == warns
    if warns:
        assert warning.startswith(f"The removal of layer 17 cost {cost:.3f}")
        assert "Stop with 21 layers" in warning


@pytest.mark.parametrize(
    ("now", "warns"),
    [(-3.2, "-20 %"), (-3.0, "0 %"), (-2.92, "8 %"), (-2.89, None), (-1.9, None)],
)
def test_warns_of_a_phase_that_recovers_nothing(now, warns):
    warning = no_recovery(-2.0, -3.0, now)
    assert warning is None if warns is None else f"recovered {warns} of" in warning
    assert no_recovery(-2.0, -2.0, now) is None  # nothing was lost


def test_warns_of_a_dominating_hidden_loss():
    assert hidden_loss_dominates(9.0, 1.0) is None
    assert hidden_loss_dominates(0.0, 0.0) is None
    assert "12 of the loss, the other terms 1:" in hidden_loss_dominates(12.0, 1.0)


@pytest.mark.parametrize(
    ("losses", "norm", "warns"),
    [
        ([2.0, 1.0, 0.1, 0.6], 1.0, False),  # above the lowest, below where the phase began
        ([2.0, 1.0, 4.9], 1.0, False),
        ([2.0, 1.0, 5.1], 1.0, True),
        ([0.0, 0.0], 0.0, False),
        ([1.0, float("nan")], 1.0, True),
        ([1.0, 1.0], float("inf"), True),
    ],
)
def test_warns_of_a_diverging_loss(losses, norm, warns):
    warning = loss_diverged(losses, norm)
    assert (warning is not None) == warns
    if warns:
        assert f"The loss is {losses[-1]:.3g}, up from" in warning


@pytest.mark.parametrize("kind", ["plain", "distillation"])
def test_a_diverging_run_warns_once_in_a_phase(kind, caplog):
    callback = pruning()
    settings = {"max_steps": 8, "learning_rate": 20.0, "optim": "sgd", "max_grad_norm": 0.0}
    if kind == "plain":
        plain_trainer(make_model(), callback, **settings).train()
    else:
        make_trainer(make_model(), callbacks=[callback], **settings).train()
    warnings = [warning for warning in callback.record.warnings if "training diverges" in warning]
    assert 1 <= len(warnings) <= 2
    caplog.clear()
    callback = pruning()
    plain_trainer(make_model(), callback, output_dir="calm", max_steps=8).train()
    assert not any("diverges" in warning for warning in callback.record.warnings)


def test_warnings_are_logged_and_recorded(caplog):
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        # The second removal costs far more than the first, and nothing brings it back.
        worth = {6: 10.0, 5: 9.0, 4: 1.0}
        callback = pruning(criterion="task", task=lambda model: worth[model.config.num_hidden_layers])
        make_trainer(make_model(), max_steps=4, callbacks=[callback]).train()
    assert "recovered 0 % of what its removal cost" in caplog.text
    assert "cost 8.000, and earlier removals cost 1.000" in caplog.text
    assert [warning[:26] for warning in read_record("out").warnings] == [
        "The last phase recovered 0",
        "The removal of layer 3 cos",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        settings = {"max_steps": 2, "learning_rate": 1e-2, "output_dir": "other"}
        make_trainer(make_model(), teacher_model=make_model(seed=1), hidden_weight=1e3, **settings).train()
        assert caplog.text.count("hardly any effect") == 2
        caplog.clear()
        make_trainer(make_model(), teacher_model=make_model(seed=1), hidden_weight=1e-3, **settings).train()
    assert "hardly" not in caplog.text


def test_a_place_costs_nothing(monkeypatch):
    warns = []
    monkeypatch.setattr("hf_layerprune.pruning.run.removal_too_costly", lambda *args: warns.append(args))
    make_trainer(make_model(), max_steps=4, callbacks=[pruning(criterion="positional")]).train()
    assert warns == []
    callback = pruning()
    make_trainer(make_model(), max_steps=4, output_dir="other", callbacks=[callback]).train()
    assert len(warns) == 2
