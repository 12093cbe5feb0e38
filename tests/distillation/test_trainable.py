import copy
import logging

import pytest
import torch

from hf_layerprune import DistillationTrainer, DistillationTrainingArguments, LayerPruneError, remove_layers
from hf_layerprune.distillation.shared_prefix import shared_prefix
from hf_layerprune.distillation.trainable import trained_layers, trained_parameters
from hf_layerprune.surgery.decoder import find_decoder
from hf_layerprune.surgery.lineage import Lineage

from ..conftest import logits, make_model, tokens
from ..pruning.test_callback import pruning
from ..tiny_models import tiny_model
from .test_trainer import make_trainer, students


def layers_of(model):
    return find_decoder(model).layers


@pytest.mark.parametrize(
    ("kept", "what", "layers"),
    [
        ([0, 1, 3, 4, 5], "around_cuts", [1, 2]),
        ([0, 1, 4, 5], "around_cuts", [1, 2]),
        ([0, 2, 4, 5], "around_cuts", [0, 1, 2]),
        ([1, 2, 3, 4, 5], "around_cuts", [0]),
        ([0, 1, 2], "around_cuts", [2]),
        ([0, 1, 2, 3, 4, 5], "around_cuts", []),
        ([0, 1, 3, 4, 5], "2", [3, 4]),
        ([0, 1, 3], "9", [0, 1, 2]),
        ([0, 1, 3], "all", [0, 1, 2]),
    ],
)
def test_layers_are_chosen_by_the_lineage(kept, what, layers):
    assert trained_layers(Lineage(6, kept), what) == layers


def test_parameters_of_the_layers_and_of_the_head():
    model = make_model("llama")
    remove_layers(model, [3])
    named = {id(parameter): name for name, parameter in model.named_parameters()}

    def places(what):
        names = [named[id(parameter)] for parameter in trained_parameters(model, what)]
        return {name.split(".")[2] if "layers" in name else name for name in names}

    assert places("around_cuts") == {"2", "3"}
    assert places("2") == {"3", "4", "lm_head.weight"}
    assert len(trained_parameters(model, "all")) == len(named)
    tied = make_model("gpt2")  # whose head is its embedding
    assert all(p is not tied.lm_head.weight for p in trained_parameters(tied, "2"))
    with pytest.raises(LayerPruneError, match="has lost no layer"):
        trained_parameters(tied, "around_cuts")


@pytest.mark.parametrize("what", ["none", "0", "-1", "1.5", ""])
def test_what_is_no_choice_is_refused(what):
    with pytest.raises(LayerPruneError, match="'around_cuts', or a number of last layers"):
        DistillationTrainingArguments(trainable=what)


def test_only_the_layers_next_to_each_cut_change(model):
    student, before = model, {name: value.clone() for name, value in model.named_parameters()}
    layers = [list(layer.parameters()) for layer in layers_of(student)]
    seen = []

    def keep(optimizer, args, kwargs):
        held = {id(p) for p in optimizer.state}
        live = [i for i, layer in enumerate(layers) if any(id(p) in held for p in layer)]
        trained = [i for i in trainer._kept_layers if layers[i][0].requires_grad]
        seen.append((list(trainer._kept_layers), trained, live))

    # Least by place are 4, then 3: what is trained next to the first cut is not next to the second.
    callback = pruning(criterion="positional", calibration=None, steps_per_phase=2)
    trainer = make_trainer(
        student,
        teacher_model=copy.deepcopy(model),
        trainable="around_cuts",
        max_steps=4,
        callbacks=[callback],
    )
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(keep)
    trainer.train()
    assert seen[1] == ([0, 1, 2, 3, 5], [3, 5], [3, 5])
    assert seen[3] == ([0, 1, 2, 5], [2, 5], [2, 5])
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    trained = {names[id(p)] for i in (2, 5) for p in layers[i]}
    for name, parameter in student.named_parameters():
        original = name
        if any(parameter is p for p in layers[5]):
            original = name.replace(".3.", ".5.")
        assert torch.equal(parameter, before[original]) == (name not in trained), name


def both_ways(monkeypatch, make, **settings):
    """Loss and gradients with and without the shared prefix; how long it was."""
    found = []
    for share in (True, False):
        with monkeypatch.context() as patch:
            if not share:
                patch.setattr("hf_layerprune.distillation.shared_prefix.shared_prefix", lambda *_: 0)
            student, teacher = make()
            trainer = make_trainer(student, teacher_model=teacher, **settings)
            student.train()
            student.zero_grad()
            inputs = next(iter(trainer.get_train_dataloader()))
            loss = trainer.compute_loss(student, dict(inputs))
            loss.backward()
            gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
            found.append((loss.item(), gradients, trainer._shared_prefix.length))
    (loss, gradients, shared), (plain_loss, plain, none) = found
    assert none == 0
    assert loss == plain_loss
    torch.testing.assert_close(gradients, plain, rtol=0, atol=0)
    assert sum(gradient.norm() for gradient in gradients.values()) > 0
    return shared


@pytest.mark.parametrize(
    ("removed", "settings", "shared"),
    [
        ([3], {"trainable": "around_cuts"}, 2),
        ([3], {"trainable": "around_cuts", "hidden_weight": 0.3}, 2),
        ([3], {"trainable": "around_cuts", "hidden_weight": 0.3, "hidden_layers": [0, 1, 4, 5]}, 2),
        ([1, 3], {"trainable": "1"}, 1),
        ([4], {"trainable": "1"}, 4),
        ([3], {"trainable": "all"}, 0),
        ([0], {"trainable": "around_cuts"}, 0),
    ],
)
def test_sharing_layers_changes_nothing(model, removed, settings, shared, monkeypatch):
    def make():
        student, teacher = copy.deepcopy(model), copy.deepcopy(model)
        remove_layers(student, removed)
        return student, teacher

    assert both_ways(monkeypatch, make, **settings) == shared


def test_shared_layers_run_once(monkeypatch):
    student, teacher = students()
    calls = []
    for name, model in (("student", student), ("teacher", teacher)):
        for i, layer in enumerate(layers_of(model)):
            layer.mlp.register_forward_hook(lambda *_, what=(name, i): calls.append(what))
    trainer = make_trainer(student, teacher_model=teacher, trainable="2")
    student.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(student, dict(inputs))
    calls.clear()
    trainer.compute_loss(student, dict(inputs))
    assert trainer._shared_prefix.length == 1  # layers 1 and 2 of six are gone
    assert sorted(calls) == [("student", i) for i in (1, 2, 3)] + [("teacher", i) for i in range(6)]


def change(**changes):
    """A student cut at 4 and its teacher, in which something differs."""
    model = make_model()
    student, teacher = copy.deepcopy(model), copy.deepcopy(model)
    remove_layers(student, 4)
    with torch.no_grad():
        if "weight" in changes:
            layers_of(teacher)[changes["weight"]].mlp.up_proj.weight[0, 0] += 1e-3
        if "token" in changes:
            teacher.model.embed_tokens.weight[changes["token"], 0] += 1.0
    if "dropout" in changes:
        layers_of(student)[changes["dropout"]].self_attn.attention_dropout = 0.5
    if "dtype" in changes:
        teacher.to(changes["dtype"])
    return student, teacher


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, 3),
        ({"weight": 2}, 2),
        ({"weight": 0}, 0),
        ({"weight": 4}, 3),
        ({"token": 7}, 0),
        ({"dropout": 1}, 1),
        ({"dtype": torch.bfloat16}, 0),
    ],
)
def test_only_what_is_the_same_is_shared(changes, shared, monkeypatch):
    student, teacher = change(**changes)
    trainer = make_trainer(student, teacher_model=teacher, trainable="around_cuts")
    student.train()
    trainer.compute_loss(student, dict(next(iter(trainer.get_train_dataloader()))))
    assert trainer._shared_prefix.length == shared


def test_the_log_says_why_nothing_is_shared(caplog):
    student, teacher = change(dtype=torch.bfloat16)
    trainer = make_trainer(student, teacher_model=teacher, trainable="around_cuts")
    student.train()
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        trainer.compute_loss(student, dict(next(iter(trainer.get_train_dataloader()))))
    reason = "the student's hidden states are torch.float32, the teacher's torch.bfloat16"
    assert f"No layer runs once for teacher and student: {reason}." in caplog.text


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_are_shared_under_activation_checkpointing(reentrant):
    """The shared layers neither run in the student nor again in the backward pass, and the gradients of the
    other layers are those without checkpointing."""
    settings = {"trainable": "around_cuts", "hidden_weight": 0.3}
    checkpointing = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    found = []
    for more in ({}, checkpointing):
        student, teacher = change()
        calls = []
        for i, layer in enumerate(layers_of(student)):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.append(i))
        trainer = make_trainer(student, teacher_model=teacher, learning_rate=0.0, **settings, **more)
        kept = {}

        def keep(model, *args, trainer=trainer, kept=kept, calls=calls, **kwargs):
            calls.clear()
            loss = DistillationTrainer.training_step(trainer, model, *args, **kwargs)
            kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return loss

        trainer.training_step = keep
        trainer.train()
        trainer.training_step(student, next(iter(trainer.get_train_dataloader())))
        found.append(kept)
        assert trainer._shared_prefix.length == 3
        assert not {0, 1, 2} & set(calls)
        assert len(calls) == (4 if more else 2)  # layers 3 and 5 of six: forward, and again in backward
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)
    assert len(found[0]) > 5


def test_what_is_trained_or_changed_later_is_no_longer_shared():
    student, teacher = change()
    trainer = make_trainer(student, teacher_model=teacher, trainable="around_cuts")
    student.train()
    inputs = next(iter(trainer.get_train_dataloader()))

    def shared():
        trainer.compute_loss(student, dict(inputs))
        return trainer._shared_prefix.length

    assert shared() == 3
    layers_of(student)[2].mlp.up_proj.weight.requires_grad_(True)
    assert shared() == 2
    with torch.no_grad():
        layers_of(student)[1].mlp.up_proj.weight.mul_(1.1)
    assert shared() == 1
    student.model.embed_tokens.requires_grad_(True)
    assert shared() == 0


def test_an_expert_that_differs_is_seen_though_no_token_went_there():
    teacher = tiny_model("mixtral")
    student = copy.deepcopy(teacher)
    remove_layers(student, 4)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    student.lm_head.requires_grad_(True)
    ids = tokens(1, 2) % 60
    assert shared_prefix(student, teacher, ids) == 4
    experts = layers_of(teacher)[2].mlp.experts
    with torch.no_grad():
        experts.down_proj[_idle(teacher, ids)] += 1
    assert shared_prefix(student, teacher, ids) == 2


def _idle(model, ids):
    """An expert of layer 2 whose weights do not matter for these tokens."""
    before = logits(model, ids)
    for expert in range(len(layers_of(model)[2].mlp.experts.down_proj)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            layers_of(other)[2].mlp.experts.down_proj[expert] += 1
        if torch.equal(logits(other, ids), before):
            return expert
    raise AssertionError("all experts were used")
