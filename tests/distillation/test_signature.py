"""The constructor of DistillationTrainer against that of the installed transformers.Trainer."""

import inspect
import typing

import pytest
from transformers import Trainer

from hf_layerprune import DistillationTrainer, DistillationTrainingArguments, LayerPruneError


OWN = ["teacher_model", "peft_config", "trust_remote_code"]


def parameters(cls):
    return inspect.signature(cls.__init__).parameters


def test_the_constructor_has_the_parameters_of_the_trainer_in_their_order():
    own, theirs = parameters(DistillationTrainer), parameters(Trainer)
    assert list(own) == [*theirs, *OWN]
    for name, parameter in theirs.items():
        assert (own[name].kind, own[name].default) == (parameter.kind, parameter.default), name
    assert all(own[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OWN)


def test_the_constructor_has_the_annotations_of_the_trainer():
    own, theirs = (typing.get_type_hints(cls.__init__) for cls in (DistillationTrainer, Trainer))
    # The student may also be a folder or a hub id, and the settings are those of distillation.
    assert set(typing.get_args(theirs["model"])) < set(typing.get_args(own["model"]))
    assert own["args"] == DistillationTrainingArguments | None
    for name in [name for name in theirs if name not in ("model", "args")]:
        assert own[name] == theirs[name], name


def test_every_argument_of_the_trainer_reaches_it(llama, monkeypatch):
    given = {}

    def record(self, *args, **kwargs):
        given.update(inspect.signature(initialise).bind(self, *args, **kwargs).arguments)
        raise KeyboardInterrupt

    initialise = Trainer.__init__
    names = [name for name in parameters(Trainer) if name not in ("self", "model", "args")]
    monkeypatch.setattr(Trainer, "__init__", record)
    used = {name: object() for name in names if name not in ("model_init", "compute_loss_func")}
    args = DistillationTrainingArguments(output_dir="out", use_cpu=True)
    with pytest.raises(KeyboardInterrupt):
        DistillationTrainer(llama, args, **used)
    assert {name: given.get(name) for name in used} == used
    assert given["model"] is llama
    assert given["args"] is args


@pytest.mark.parametrize("name", ["model_init", "compute_loss_func"])
def test_arguments_that_distillation_does_not_use_are_refused(llama, name):
    with pytest.raises(LayerPruneError, match=f"no use for `{name}`"):
        DistillationTrainer(llama, **{name: lambda *args: llama})


def test_a_trainer_without_a_model_is_refused():
    with pytest.raises(LayerPruneError, match="model is None, but DistillationTrainer needs a student"):
        DistillationTrainer()
