import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, get_scheduler

from hf_layerprune import LayerPruneError, evaluate_text, get_lineage
from hf_layerprune.data.batches import make_batches
from hf_layerprune.pruning.schedule import RestartedSchedule, phase_sizes

from ..conftest import logits, make_model, tokens
from ..distillation.test_trainer import examples, make_trainer
from .test_callback import calibration, plain_trainer, pruning


def test_how_many_layers_go_in_each_phase():
    assert phase_sizes(6, 3, 1) == [1, 1, 1]
    assert phase_sizes(6, 1, 2) == [2, 2, 1]
    assert phase_sizes(6, 2, 99) == [4]
    assert phase_sizes(32, 12, 0.3) == [9, 6, 5]  # 32, 23, 17, 12
    assert phase_sizes(6, 4, 0.1) == [1, 1]


@pytest.mark.parametrize(("share", "sizes"), [(0.34, [2, 1]), (99, [3])])
def test_a_share_of_the_layers_or_all_at_once(llama, share, sizes):
    callback = pruning(target_layers=3, layers_per_phase=share)
    plain_trainer(llama, callback).train()
    assert [len(phase.removals) for phase in callback.record.phases] == sizes
    assert len(get_lineage(llama).kept) == 3


def ragged(count=24):
    """Rows of 4 to 12 tokens, padded to 12."""
    ids = tokens(count, 12)
    lengths = [4 + i % 9 for i in range(count)]
    mask = [[1] * n + [0] * (12 - n) for n in lengths]
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask, "labels": ids.tolist()})


def test_phases_of_so_many_tokens(llama):
    seen = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.num_input_tokens_seen)

    callback = pruning(target_layers=3, steps_per_phase=None, tokens_per_phase=70)
    trainer = plain_trainer(llama, [callback, Count()], max_steps=12, per_device_train_batch_size=2)
    trainer.train_dataset = ragged()
    trainer.train()
    starts = [phase.step for phase in callback.record.phases]
    assert starts[0] == 0
    assert len(starts) == 3
    before = 0
    for start in starts[1:]:  # the first step after 70 more tokens
        assert seen[start - 1] - before >= 70 > seen[start - 2] - before
        before = seen[start - 1]
    assert len({b - a for a, b in pairwise(seen)}) > 1, "all steps have as many tokens"


def test_tokens_and_steps_do_not_go_together():
    with pytest.raises(LayerPruneError, match="not both"):
        pruning(steps_per_phase=2, tokens_per_phase=100)
    with pytest.raises(LayerPruneError, match=r"layers_per_phase is 1\.5: .* or a share between 0 and 1"):
        pruning(layers_per_phase=1.5)
    assert pruning(layers_per_phase=1.0).args.layers_per_phase == 1  # as flags give it


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_learning_rate_starts_again_with_each_phase(llama, kind):
    settings = {"lr_scheduler_type": kind, "learning_rate": 1e-3, "warmup_steps": 3}
    # Phases of 3, 3 and 6 steps; the schedule is of 12 steps, 3 of them warm-up.
    used = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            used.append(optimizer.param_groups[0]["lr"])

    callback = pruning(target_layers=3, steps_per_phase=3, restart_learning_rate=True)
    trainer = plain_trainer(llama, [callback, Look()], max_steps=12, **settings)
    trainer.train()
    assert used == rates(trainer)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    factor = get_scheduler(kind, optimizer, num_warmup_steps=3, num_training_steps=12).lr_lambdas[0]
    expected = [1e-3 * factor(12 * step / 3) for step in range(3)] * 2
    expected += [1e-3 * factor(12 * step / 6) for step in range(6)]
    assert rates(trainer) == pytest.approx(expected)
    assert rates(trainer)[3] == 0  # warming up again


def test_the_learning_rate_of_phases_of_tokens(llama):
    callback = pruning(target_layers=4, tokens_per_phase=96, restart_learning_rate=True)
    trainer = plain_trainer(llama, callback, max_steps=5, learning_rate=1e-3)
    trainer.train()
    # A step is of 48 tokens: two steps, and then three that are left.
    assert rates(trainer) == pytest.approx([1e-3, 0.5e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])


def test_the_learning_rate_runs_out_with_the_run_when_no_more_layers_go(llama):
    task = task_of(1.0, 0.5, 0.5, 0.5, 0.5, 0.4, *[0.1] * 3)
    callback = pruning(
        target_layers=3,
        criterion="task",
        task=task,
        quality_floor=0.5,
        steps_per_phase=2,
        restart_learning_rate=True,
    )
    trainer = plain_trainer(llama, callback, max_steps=8, learning_rate=1e-3)
    trainer.train()
    assert len(get_lineage(llama).kept) == 5
    # Two steps of the only phase; after the floor that phase is the last, of eight steps.
    assert rates(trainer) == pytest.approx([1e-3, 0.5e-3, *(1e-3 * (8 - step) / 8 for step in range(2, 8))])


def test_a_schedule_that_cannot_start_again_is_refused(llama):
    callback = pruning(restart_learning_rate=True)
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "max_steps": 4}
    trainer = make_trainer(llama, callbacks=[callback], eval_dataset=examples(4), **settings)
    with pytest.raises(LayerPruneError, match="ReduceLROnPlateau cannot be run through again"):
        trainer.train()
    with pytest.raises(LayerPruneError, match="Choose an lr_scheduler_type"):
        RestartedSchedule(None, 3)


@pytest.mark.parametrize("settings", [{"steps_per_phase": 3}, {"tokens_per_phase": 144}])
def test_a_resumed_run_has_the_same_learning_rates(settings):
    def run(folder, stop_at=None, resume=None):
        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == stop_at:
                    raise KeyboardInterrupt

        callback = pruning(target_layers=3, restart_learning_rate=True, **settings)
        saves = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
        trainer = make_trainer(
            make_model(), output_dir=folder, max_steps=10, callbacks=[callback, Stop()], **saves
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 4)
    resumed = run("stopped", resume=True)
    assert rates(resumed) == rates(whole)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def task_of(*scores):
    """A task that says these numbers, one for each model that it sees: a layer, a copy, or a change."""
    left = list(scores)
    return lambda model: left.pop(0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("kind", ["plain", "distillation"])
def test_layers_that_a_phase_could_not_do_without_are_put_back(kind, family):
    """The second phase makes the model worse still: the run ends with what the first one left."""
    model = make_model(family)
    left = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                left["lineage"], left["logits"] = get_lineage(model), logits(model.eval(), tokens())
                left["loss"] = evaluate_text(model, make_batches(calibration(), 4))["loss"]

    settings = {"target_layers": 2, "steps_per_phase": 3, "min_recovery": 0.5}
    saves = {"max_steps": 12, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    # Before a phase, the table's own, without each of four or three layers; cut, and at the end.
    first = [0.9, 0.9, 0.5, 0.4, 0.3, 0.2, 0.5, 0.8]
    second = [0.8, 0.8, 0.1, 0.1, 0.1, 0.4, 0.5]
    callback = pruning(criterion="task", task=task_of(*first, *second), **settings)
    if kind == "plain":
        trainer = plain_trainer(model, [callback, Look()], **saves)
    else:
        trainer = make_trainer(model, callbacks=[callback, Look()], **saves)
    trainer.train()
    assert trainer.state.global_step == 6
    # Its optimizer is that of the cut model, so there is no checkpoint of what was put back.
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert len({module.training for module in model.modules()}) == 1
    assert get_lineage(model) == left["lineage"]
    assert len(get_lineage(model).kept) == 5
    assert torch.equal(logits(model.eval(), tokens()), left["logits"])
    record = json.loads(Path("out/layer_pruning.json").read_text())
    assert len(record["phases"]) == 1
    assert record["phases"][0]["qualities"] == {"before": 0.9, "cut": 0.5, "now": 0.8}
    assert record["undone"]["qualities"] == {"before": 0.8, "cut": 0.4, "now": 0.5}
    assert "Phase 2 recovered less than 50%" in record["stopped"]
    model.save_pretrained("saved")
    again = type(model).from_pretrained("saved").eval()
    assert torch.equal(logits(again, tokens()), left["logits"])
    whole = type(model).from_pretrained("out/before_phase_2").eval()
    assert torch.equal(logits(whole, tokens()), left["logits"])
    assert [path.name for path in Path("out").glob("before*")] == ["before_phase_2"]
    if kind == "distillation":
        trainer.eval_dataset = calibration().select_columns(["input_ids", "labels"])
        assert trainer.evaluate()["eval_loss"] == pytest.approx(left["loss"], rel=1e-5)
        trainer.save_model("checked")


def test_the_last_phase_has_to_win_back_too(llama):
    before = logits(llama, tokens())
    task = task_of(0.9, 0.9, 0.5, 0.4, 0.3, 0.2, 0.5, 0.6)
    callback = pruning(target_layers=5, min_recovery=0.5, criterion="task", task=task)
    plain_trainer(llama, callback, max_steps=1).train()
    assert torch.equal(logits(llama.eval(), tokens()), before)
    assert "Phase 1 recovered less than" in callback.record.stopped


def test_a_phase_that_wins_back_leaves_nothing_behind(llama):
    callback = pruning(target_layers=5, min_recovery=1e-9)
    plain_trainer(llama, callback).train()
    assert len(get_lineage(llama).kept) == 5
    assert callback.record.stopped is None
    assert not list(Path("out").glob("before*"))
    qualities = callback.record.phases[0].qualities
    removal = callback.record.phases[0].removals[0]
    assert qualities["before"] == pytest.approx(removal.table.quality, abs=1e-5)
    assert qualities["before"] - qualities["cut"] == pytest.approx(removal.score, abs=1e-5)


def test_a_resumed_run_puts_back_what_the_stopped_one_removed():
    def run(stop_at=None, **settings):
        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == stop_at:
                    raise KeyboardInterrupt

        task = task_of(0.9, 0.9, 0.5, 0.4, 0.3, 0.2, 0.5) if stop_at else task_of(0.6)
        callback = pruning(target_layers=5, min_recovery=0.5, criterion="task", task=task)
        saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        trainer = make_trainer(make_model(), callbacks=[callback, Stop()], **saves)
        trainer.train(**settings)
        return trainer.model

    with pytest.raises(KeyboardInterrupt):
        run(stop_at=2)
    model = run(resume_from_checkpoint="out/checkpoint-2")
    assert torch.equal(logits(model.eval(), tokens()), logits(make_model(), tokens()))
    Path("out/before_phase_1").rename("out/elsewhere")
    with pytest.raises(LayerPruneError, match="before_phase_1 is missing"):
        run(resume_from_checkpoint="out/checkpoint-2")


def test_layers_are_not_put_back_under_adapters(llama):
    trainer = make_trainer(
        llama, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), callbacks=[pruning(min_recovery=0.5)]
    )
    with pytest.raises(LayerPruneError, match="cannot restore layers under adapters"):
        trainer.train()
    with pytest.raises(LayerPruneError, match=r"min_recovery is -1\.0"):
        pruning(min_recovery=-1.0)
    with pytest.raises(LayerPruneError, match="Leave min_recovery out"):
        pruning(criterion="kl", min_recovery=0.5)


@pytest.mark.parametrize("saves", [{"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "epoch"}])
def test_what_is_put_back_is_not_the_best_of_the_phase_that_failed(llama, saves):
    before = logits(llama, tokens())
    task = task_of(0.9, 0.9, 0.5, 0.4, 0.3, 0.2, 0.5, 0.6)
    settings = {"target_layers": 4, "steps_per_phase": 3, "min_recovery": 5.0, "criterion": "task"}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    best = best if "save_steps" in saves else {"num_train_epochs": 4, "max_steps": -1}
    callback = pruning(task=task, **settings)
    if "save_steps" not in saves:  # three steps are an epoch
        best |= {"per_device_train_batch_size": 8}
    trainer = make_trainer(
        llama,
        examples(24),
        eval_dataset=examples(8),
        callbacks=[callback],
        **{"max_steps": 6} | saves | best,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert torch.equal(logits(llama.eval(), tokens()), before)
    assert callback.record.finished
    assert "Phase 1 recovered less than" in callback.record.stopped
    depths = [
        json.loads(path.read_text())["num_hidden_layers"] for path in Path("out").glob("check*/config.json")
    ]
    assert set(depths) <= {5}  # of the cut model alone, whose optimizer it is


def test_a_floor_that_ends_the_removals_leaves_no_copy_behind(llama):
    callback = pruning(target_layers=4, min_recovery=1e-9, quality_floor=1e9)
    plain_trainer(llama, callback).train()
    assert len(get_lineage(llama).kept) == 6
    assert not list(Path("out").glob("before*"))
