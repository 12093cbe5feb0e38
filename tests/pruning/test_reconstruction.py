"""Reconstruction inside training: next to the new cut alone, and resumed to the same bits."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_layerprune import (
    LayerPruneError,
    LayerPruningCallback,
    cache_teacher_logits,
    get_lineage,
    read_record,
    reconstruct_layers,
    remove_layers,
)
from hf_layerprune.distillation import reconstruction as distillation
from hf_layerprune.distillation import window_training
from hf_layerprune.pruning import start
from hf_layerprune.pruning.prune import prune_layers
from hf_layerprune.reports.tables import table_rows

from ..conftest import make_model, tokens
from ..distillation.test_trainer import examples, make_trainer
from .test_callback import calibration, plain_trainer, pruning


RECONSTRUCTED = {
    "reconstruction_layers": 1,
    "reconstruction_epochs": 2,
    "reconstruction_learning_rate": 2e-3,
}
STILL = {"learning_rate": 0.0, "weight_decay": 0.0}  # so that reconstruction alone changes weights
SAVED = {"save_strategy": "steps", "save_steps": 1}


def reconstructing(**settings):
    return pruning(**RECONSTRUCTED | settings)


def in_distillation(model, callbacks, **settings):
    return make_trainer(model, callbacks=callbacks, **settings)


def run(model, kind="distillation", resume=None, callback=None, **settings):
    """Trains four steps, in which two layers go; returns the callback."""
    callback = callback or reconstructing()
    settings = {"max_steps": 4} | settings
    make = plain_trainer if kind == "plain" else in_distillation
    make(model, [callback], **settings).train(resume_from_checkpoint=resume)
    return callback


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def rows_of_phase(number, count=8):
    """The rows that a phase draws, with the seed 42 of the Trainer."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(42 + number))
    return torch.tensor(examples(count)["input_ids"])[order]


@pytest.mark.parametrize("kind", ["distillation", "plain"])
def test_each_phase_trains_the_layers_next_to_its_cut(kind):
    model, teacher = make_model(), make_model()
    callback = run(model, kind, **STILL)
    expected = copy.deepcopy(teacher)
    size = 4 if kind == "plain" else 8  # rows in a batch; a phase of two steps reads 8 or 16
    for number, phase in enumerate(callback.record.phases, 1):
        [removal] = phase.removals
        record = prune_layers(expected, target_layers=6 - number, calibration=calibration())
        assert record.removals[0].original == removal.original
        rows = rows_of_phase(number)
        result = reconstruct_layers(
            expected,
            teacher,
            [{"input_ids": batch} for batch in rows.split(size)],
            removed=[removal.original],
            epochs=2,
            learning_rate=2e-3,
            seed=42,
            progress=False,
        )
        found, wanted = dict(phase.reconstruction), result.to_dict()
        assert found.pop("seconds") > 0
        for one, other in zip(found.pop("windows"), wanted.pop("windows"), strict=True):
            assert one.pop("layers") == other.pop("layers")
            assert one == pytest.approx(other, rel=1e-4)
        assert found == pytest.approx(wanted, rel=1e-4)
        assert result.tokens == 8 * 12
        assert len(result.windows) == 1
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    assert sorted(path.name for path in Path("out").iterdir() if path.is_dir()) == []


def test_only_layers_next_to_the_new_cut_change():
    changed = []

    class Watch(LayerPruningCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            kept = get_lineage(model).kept
            before = {id(p): p.clone() for p in model.parameters()}
            super().on_step_begin(args, state, control, model=model, **kwargs)
            if get_lineage(model).kept != kept:
                now = get_lineage(model).kept
                gone = (set(kept) - set(now)).pop()
                place = sum(layer < gone for layer in now)
                inside = {
                    id(p) for layer in model.model.layers[place - 1 : place + 1] for p in layer.parameters()
                }
                for p in model.parameters():
                    assert torch.equal(p, before[id(p)]) == (id(p) not in inside)
                changed.append(gone)
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    callback = Watch(target_layers=3, calibration=calibration(), protected=[0, 2, 5], **RECONSTRUCTED)
    run(make_model(), callback=callback, max_steps=6)
    assert sorted(changed) == [1, 3, 4]


@pytest.mark.parametrize("trainable", ["around_cuts", "1"])
def test_layers_that_the_trainer_does_not_train_are_reconstructed(trainable):
    """The Trainer chooses what it trains after a removal, and those are not all that is reconstructed."""
    model = make_model()
    model.model.layers[0].requires_grad_(False)
    frozen = weights(model.model.layers[0])
    callback = reconstructing(reconstruction_layers=2, protected=[0, 5])
    with pytest.raises(LayerPruneError, match=r"Layers \[0\] have no trainable parameter"):
        run(copy.deepcopy(model), callback=reconstructing(), trainable=trainable)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    run(model, callback=callback, trainable=trainable, **STILL)
    for phase in callback.record.phases:
        [window] = phase.reconstruction["windows"]
        assert len(window["layers"]) >= 3
        assert window["error_after"] < window["error_before"]
    same = weights(model.model.layers[0])
    del frozen["input_layernorm.weight"], same["input_layernorm.weight"]
    assert_equal(same, frozen)
    chosen = [i for i, layer in enumerate(model.model.layers) if layer.mlp.up_proj.weight.requires_grad]
    assert chosen == ([3] if trainable == "1" else [i for i in chosen if i])


@pytest.mark.parametrize("kind", ["distillation", "plain"])
@pytest.mark.parametrize("stop", ["first", "second", "after"])
def test_a_killed_run_resumes_to_the_same_bits(kind, stop, monkeypatch):
    """Killed in the reconstruction of either phase after its first epoch, or in the step after it."""
    expected = make_model()
    run(expected, kind, output_dir="whole", **SAVED)
    save, calls = window_training.WindowTraining._save, []

    def save_and_stop(self, *args):
        save(self, *args)
        calls.append(args[1])
        if len(calls) == {"first": 1, "second": 3}.get(stop):
            raise KeyboardInterrupt

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if stop == "after" and state.global_step == 3:
                raise KeyboardInterrupt

    model, callback = make_model(), reconstructing()
    monkeypatch.setattr(window_training.WindowTraining, "_save", save_and_stop)
    make = plain_trainer if kind == "plain" else in_distillation
    trainer = make(model, [callback, Stop()], max_steps=4, **SAVED)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if stop != "after":
        assert Path("out/reconstruction/reconstruction_window_0.pt").is_file()
    again, step = make_model(), {"first": 0, "second": 2, "after": 2}[stop]
    resume: bool | str = False
    if step:
        resume = f"out/checkpoint-{step}"
        if kind == "plain":
            kept = get_lineage(type(model).from_pretrained(resume)).kept
            again = type(model).from_pretrained(resume)
            assert len(kept) == 5
    calls.clear()
    calls.extend([0] * 9)  # so that it stops no more
    found = run(again, kind, resume, **SAVED)
    epochs = [call for call in calls if call]
    assert epochs == {"first": [2, 1, 2], "second": [2], "after": [1, 2]}[stop]
    assert_equal(weights(again), weights(expected))
    whole = read_record("whole")
    for one, other in zip(found.record.phases, whole.phases, strict=True):
        assert one.reconstruction["windows"] == other.reconstruction["windows"]
        assert one.reconstruction["kl_after"] == other.reconstruction["kl_after"]
    assert sorted(path.name for path in Path("out").iterdir() if path.is_dir()) == [
        f"checkpoint-{number}" for number in (1, 2, 3, 4)
    ]


def test_adapters_are_reconstructed():
    model = make_model()
    base = weights(model)
    trainer = make_trainer(
        model,
        max_steps=4,
        callbacks=[callback := reconstructing()],
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        export="adapter",
        **STILL,
    )
    trainer.train()
    for phase in callback.record.phases:
        for window in phase.reconstruction["windows"]:
            assert window["error_after"] < window["error_before"]
    now = {name.replace(".base_layer", ""): value for name, value in weights(model).items()}
    kept = get_lineage(model).kept
    place = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(now[place], base[place.replace("1", str(kept[1]), 1)])


def test_streams_are_reconstructed_on_the_calibration_text():
    model, teacher = make_model(), make_model()
    callback = reconstructing(target_layers=5)
    trainer = make_trainer(
        model, examples(8).to_iterable_dataset(), callbacks=[callback], max_steps=2, **STILL
    )
    trainer.train()
    [phase] = callback.record.phases
    expected = make_model()
    remove_layers(expected, [removal.original for removal in phase.removals])
    batches = [{"input_ids": torch.tensor(calibration()["input_ids"])}]
    settings = {"epochs": 2, "learning_rate": 2e-3, "seed": 42, "progress": False}
    reconstruct_layers(expected, teacher, batches, **settings)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)


def test_so_many_tokens_are_read():
    callback = reconstructing(reconstruction_tokens=40)
    run(make_model(), callback=callback, per_device_train_batch_size=2)
    assert [phase.reconstruction["tokens"] for phase in callback.record.phases] == [48, 48]
    assert [phase.reconstruction["steps"] for phase in callback.record.phases] == [4, 4]


def test_what_cannot_be_reconstructed_is_refused_before_training():
    whole = make_model()
    ids = [{"input_ids": tokens(8, 12)}]
    cache_teacher_logits(whole, ids, "cached", 8)
    lora = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 2])}
    shallow = make_model()
    remove_layers(shallow, 3)
    cases = [
        ({"teacher_model": "cached"}, "holds cached logits"),
        (lora, r"Layers \[0, 3, 4, 5\] have no trainable parameter"),
        ({"teacher_model": shallow}, "has all layers of the student"),
    ]
    for settings, message in cases:
        model = make_model()
        with pytest.raises(LayerPruneError, match=message):
            run(model, **settings)
        assert len(get_lineage(model).kept) == 6
        assert not Path("out/layer_pruning.json").exists()
        shutil.rmtree("out", ignore_errors=True)


def test_layers_that_cannot_run_alone_are_refused_before_training(monkeypatch):
    monkeypatch.setattr(distillation, "can_replay", lambda *args: False)
    model = make_model()
    with pytest.raises(LayerPruneError, match="hand on more than one hidden state"):
        run(model)
    assert not get_lineage(model).removed


def test_sharded_models_are_refused_before_training(monkeypatch):
    monkeypatch.setattr(start, "is_sharded", lambda model: True)
    model = make_model()
    with pytest.raises(LayerPruneError, match="the weights are sharded over processes"):
        run(model)
    assert not get_lineage(model).removed


def test_a_plain_trainer_with_adapters_has_no_teacher():
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(LayerPruneError, match="Use DistillationTrainer with peft_config"):
        run(model, "plain")


class StopAt(TrainerCallback):
    """Stops training after a step, as early stopping does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **others):
        control.should_training_stop |= state.global_step == self.step


def test_a_plain_trainer_that_is_stopped_early_keeps_its_teacher(caplog):
    whole = make_model()
    run(whole, "plain", **SAVED)
    assert not Path("out/original_model").exists()
    shutil.rmtree("out")
    with caplog.at_level("INFO"):
        plain_trainer(make_model(), [reconstructing(), StopAt(1)], max_steps=4, **SAVED).train()
    assert "original_model unless the run is resumed" in caplog.text
    again = type(whole).from_pretrained("out/checkpoint-1")
    run(again, "plain", "out/checkpoint-1", **SAVED)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    assert not Path("out/original_model").exists()


def test_a_plain_trainer_says_that_its_teacher_is_gone():
    run(make_model(), "plain", **SAVED)
    again = type(make_model()).from_pretrained("out/checkpoint-2")
    with pytest.raises(LayerPruneError, match="original_model is gone"):
        run(again, "plain", "out/checkpoint-2", **SAVED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reconstruction_layers": -1}, "reconstruction_layers is -1"),
        ({"reconstruction_layers": 1.5}, "reconstruction_layers is 1.5"),
        ({"reconstruction_tokens": 0}, "reconstruction_tokens is 0"),
        ({"reconstruction_epochs": 0}, "at least 1 epoch"),
        ({"reconstruction_learning_rate": 0.0}, "a rate above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(LayerPruneError, match=message):
        reconstructing(**settings)


def test_the_table_shows_the_divergence_before_and_after():
    callback = run(make_model())
    heads, _, *rows = table_rows(callback.record.to_dict())
    for row, phase in zip(rows, callback.record.phases, strict=True):
        shown = dict(zip(heads, row, strict=True))
        assert float(shown["KL after removal"]) == pytest.approx(phase.reconstruction["kl_before"], rel=1e-3)
        assert float(shown["KL after reconstruction"]) == pytest.approx(
            phase.reconstruction["kl_after"], rel=1e-3
        )
