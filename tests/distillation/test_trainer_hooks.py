"""The private methods of transformers.Trainer that DistillationTrainer overrides, and who calls them."""

import inspect

import pytest
from transformers import Trainer

from hf_layerprune import DistillationTrainer

from .test_trainer import examples, make_trainer


PRIVATE = ["_load_from_checkpoint", "_load_best_model", "_save_checkpoint", "_save"]


def test_these_are_all_private_methods_that_are_overridden():
    overridden = {
        name for name in vars(DistillationTrainer) if name.startswith("_") and hasattr(Trainer, name)
    }
    assert {name for name in overridden if not name.startswith("__")} == set(PRIVATE)


@pytest.mark.parametrize("name", ["_load_from_checkpoint", "_load_best_model", "_save"])
def test_the_overridden_methods_have_the_parameters_of_the_trainer(name):
    own, theirs = (inspect.signature(getattr(cls, name)) for cls in (DistillationTrainer, Trainer))
    assert list(own.parameters) == list(theirs.parameters)


def test_the_trainer_calls_the_overridden_methods(llama, monkeypatch):
    calls = []
    for name in PRIVATE:
        method = getattr(DistillationTrainer, name)

        def record(self, *args, name=name, method=method, **kwargs):
            calls.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, name, record)
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "eval_dataset": examples(4)}
    make_trainer(llama, max_steps=1, **settings).train()
    # The best model is loaded as any other checkpoint.
    assert calls == ["_save_checkpoint", "_save", "_load_best_model", "_load_from_checkpoint"]
    calls.clear()
    trainer = make_trainer(llama, max_steps=2, **settings)
    trainer.train(resume_from_checkpoint="out/checkpoint-1")
    assert calls[0] == "_load_from_checkpoint"
    calls.clear()
    trainer.save_model("saved")
    assert calls == ["_save"]
