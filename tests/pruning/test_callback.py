import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_layerprune import (
    LayerPruneError,
    LayerPruningCallback,
    MultipleChoice,
    get_lineage,
    score_layers,
)
from hf_layerprune.distillation.losses import divergence
from hf_layerprune.pruning.prune import prune_layers
from hf_layerprune.surgery.decoder import find_decoder
from hf_layerprune.surgery.removal import remove_layers

from ..conftest import logits, make_model, tokens
from ..distillation.test_trainer import examples, make_trainer
from ..evaluation.test_multiple_choice import QUESTIONS
from ..tiny_models import tiny_model


def calibration():
    ids = tokens(4, 12, seed=5).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "text": ["unused"] * 4})


def pruning(**settings):
    return LayerPruningCallback(**{"target_layers": 4, "calibration": calibration()} | settings)


def plain_trainer(model, callback, **settings):
    settings = {
        "output_dir": "out",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    } | settings
    callbacks = callback if isinstance(callback, list) else [callback]
    args = TrainingArguments(**settings)
    return hand_over(Trainer(model, args, train_dataset=examples(), callbacks=callbacks))


def hand_over(trainer):
    """Gives a plain Trainer to its LayerPruningCallback, as its user does."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, LayerPruningCallback):
            callback.set_trainer(trainer)
    return trainer


class Watch(LayerPruningCallback):
    """Notes, at each step, the depth of the model and what the optimizer holds."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        before = {id(p): state for p, state in optimizer.optimizer.state.items()}
        super().on_step_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)
        inner = optimizer.optimizer
        live = [id(p) for p in model.parameters()]
        held = [id(p) for group in inner.param_groups for p in group["params"]]
        assert sorted(held) == sorted(live)
        assert {id(p) for p in inner.state} == (set(live) if state.global_step else set())
        # The state of what is left is the very same.
        assert all(before[id(p)] is value for p, value in inner.state.items())
        self.__dict__.setdefault("depths", []).append(len(find_decoder(model).layers))


@pytest.mark.parametrize("kind", ["plain", "distillation"])
def test_layers_go_at_the_start_of_a_phase_and_the_optimizer_forgets_them(model, kind):
    callback = Watch(target_layers=3, calibration=calibration())
    if kind == "plain":
        trainer = plain_trainer(model, callback)
    else:
        trainer = make_trainer(model, max_steps=6, callbacks=[callback], hidden_weight=0.1)
    trainer.train()
    assert callback.depths == [5, 5, 4, 4, 3, 3]
    assert model.config.num_hidden_layers == 3
    record = json.loads(Path("out/layer_pruning.json").read_text())
    assert record["finished"]
    assert [phase["step"] for phase in record["phases"]] == [0, 2, 4]
    assert record["phases"][-1]["kept"] == get_lineage(model).kept
    assert record["phases"][-1]["parameters"] == model.num_parameters()
    assert len(record["log"]) >= 6


def test_each_phase_removes_what_scores_least_in_the_trained_model(llama):
    removed = []

    class Check(LayerPruningCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            expected = score_layers(model, [{"input_ids": tokens(4, 12, seed=5)}], progress=False)
            kept = get_lineage(model).kept
            super().on_step_begin(args, state, control, model=model, **kwargs)
            if get_lineage(model).kept != kept:
                least = min(expected.scores, key=expected.scores.get)
                assert get_lineage(model).kept == [o for i, o in enumerate(kept) if i != least]
                removed.append(kept[least])

    plain_trainer(llama, Check(target_layers=3, calibration=calibration()), learning_rate=1e-2).train()
    phases = json.loads(Path("out/layer_pruning.json").read_text())["phases"]
    assert [phase["removals"][0]["original"] for phase in phases] == removed
    assert get_lineage(llama).removed == sorted(removed)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adamw_bnb_8bit"])
def test_removing_and_training_on_equals_building_the_cut_model_afresh(llama, optim):
    """Against a plain loop in which each phase has a new model and a new optimizer that got the state."""
    teacher, rate = copy.deepcopy(llama), 1e-3 if optim != "sgd" else 0.1
    trainer = make_trainer(
        llama,
        max_steps=4,
        learning_rate=rate,
        optim=optim,
        max_grad_norm=0,
        per_device_train_batch_size=8,
        callbacks=[
            pruning(protected=[0, 1, 5], evaluation=lambda m: {"mean": logits(m, tokens()).mean().item()})
        ],
    )
    trainer.train()

    present = copy.deepcopy(teacher)
    make, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    settings |= {"weight_decay": 0.0}
    optimizer = make(present.parameters(), **settings)
    batch = tokens(8, 12)
    for step in range(4):
        if step % 2 == 0:
            table = score_layers(
                present,
                [{"input_ids": tokens(4, 12, seed=5)}],
                protected=[get_lineage(present).kept.index(i) for i in (0, 1, 5)],
                progress=False,
            )
            fresh = copy.deepcopy(present)
            remove_layers(fresh, table.ranking()[0])
            kept = [
                p
                for i, layer in enumerate(find_decoder(present).layers)
                if i != table.ranking()[0]
                for p in layer.parameters()
            ]
            names = {id(p) for layer in find_decoder(present).layers for p in layer.parameters()}
            others = [p for p in present.parameters() if id(p) not in names]
            fresh_layers = {id(p) for layer in find_decoder(fresh).layers for p in layer.parameters()}
            new = [p for layer in find_decoder(fresh).layers for p in layer.parameters()]
            new += [p for p in fresh.parameters() if id(p) not in fresh_layers]
            old_state = optimizer.state
            optimizer = make(fresh.parameters(), **settings)
            for old, now in zip(kept + others, new, strict=True):
                if old in old_state:
                    optimizer.state[now] = copy.deepcopy(old_state[old])
            present = fresh
        with torch.no_grad():
            taught = teacher(input_ids=batch, use_cache=False).logits
        learnt = present(input_ids=batch, use_cache=False).logits
        divergence(*(x[:, :-1].flatten(0, 1) for x in (learnt, taught))).div(batch[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert get_lineage(llama) == get_lineage(present)
    # A state in eight bits may fall to either side of a step.
    close = 1e-4 if optim == "adamw_bnb_8bit" else 1e-6
    torch.testing.assert_close(llama.state_dict(), present.state_dict(), rtol=1e-4, atol=close)
    assert [log["layers"] for log in trainer.state.log_history if "loss" in log] == [5, 5, 4, 4]
    held = {id(p) for p in trainer.optimizer.optimizer.state}
    assert held <= {id(p) for p in llama.parameters()}


def test_a_phase_end_sees_the_healed_model(llama):
    seen = []

    def evaluation(model):
        assert not model.training
        seen.append(len(find_decoder(model).layers))
        return {"loss": float(logits(model, tokens()).std())}

    trainer = make_trainer(
        llama,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=100,
        save_strategy="steps",
        save_steps=100,
        eval_dataset=examples(4),
        callbacks=[pruning(evaluation=evaluation, steps_per_phase=2)],
    )
    trainer.train()
    # Dense, then cut and healed in each of the two phases; the steps left over heal the last one.
    assert seen == [6, 5, 5, 4, 4]
    record = json.loads(Path("out/layer_pruning.json").read_text())
    assert [(e["step"], e["layers"]) for e in record["evaluations"]] == [(2, 5), (6, 4)]
    assert record["phases"][0]["cut"]["loss"] != record["phases"][0]["healed"]["loss"]
    saved = {
        path.name: json.loads((path / "config.json").read_text())["num_hidden_layers"]
        for path in Path("out").glob("checkpoint-*")
    }
    assert saved == {"checkpoint-2": 5, "checkpoint-6": 4}


def test_several_layers_a_phase(llama):
    callback = pruning(target_layers=3, layers_per_phase=2)
    plain_trainer(llama, callback).train()
    assert [len(phase.removals) for phase in callback.record.phases] == [2, 1]
    assert [phase.step for phase in callback.record.phases] == [0, 3]


def test_protected_layers_stay(llama):
    callback = pruning(target_layers=3, protected=[1, 3, 4], criterion="block_influence")
    plain_trainer(llama, callback).train()
    assert get_lineage(llama).kept == [1, 3, 4]


def test_protected_layers_count_in_the_starting_model(llama):
    remove_layers(llama, 2)  # originals 0, 1, 3, 4, 5 are left
    plain_trainer(llama, pruning(target_layers=3, protected=[0, 2, 4])).train()
    assert get_lineage(llama).kept == [0, 3, 5]


def test_the_quality_floor_stops_removals_but_not_training(llama):
    scores = iter([1.0] * 5 + [0.4] * 20)
    callback = pruning(
        target_layers=2, criterion="task", calibration=None, quality_floor=0.5, task=lambda m: next(scores)
    )
    trainer = plain_trainer(llama, callback)
    trainer.train()
    assert len(find_decoder(llama).layers) == 5
    assert trainer.state.global_step == 6
    assert "0.4000 is below the quality floor 0.5" in callback.record.stopped


def test_training_with_and_without_the_floor_for_loss(llama):
    callback = pruning(quality_floor=-1.0)  # a random model's loss is far above 1 nat
    plain_trainer(llama, callback).train()
    assert len(find_decoder(llama).layers) == 6
    assert callback.record.phases == []


def test_a_run_that_ends_early_says_so(llama):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    callback = pruning(target_layers=3)
    plain_trainer(llama, [callback, Stop()]).train()
    assert "ended at step 2 with 2 layers still to remove" in callback.record.stopped


def test_scoring_in_training_moves_no_random_state():
    """Dropout and data order are those of a run that scores by something else."""
    states = []
    for criterion in ("loss", "task"):
        model = make_model("gpt2", resid_pdrop=0.1)
        task = None if criterion == "loss" else (lambda m: float(torch.rand(1)))
        callback = pruning(
            target_layers=5,
            criterion=criterion,
            task=task,
            protected=[0, 1, 2, 3, 5],
        )
        trainer = plain_trainer(model, callback, output_dir=criterion, max_steps=3)
        trainer.train()
        states.append(model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize("kill_at", [2, 3])
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(kill_at):
    def run(folder, resume=False, stop=None):
        model = make_model("gpt2", resid_pdrop=0.1)
        callback = pruning(target_layers=3)
        trainer = make_trainer(
            model,
            output_dir=folder,
            max_steps=6,
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=1,
            hidden_weight=0.1,
            callbacks=[callback],
        )
        if stop:
            trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer.model, callback.record

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == kill_at:
                raise Killed

    whole, record = run("whole")
    with pytest.raises(Killed):
        run("killed", stop=Kill())
    resumed, again = run("killed", resume=True)
    assert get_lineage(resumed) == get_lineage(whole)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert [p.removals for p in again.phases] == [p.removals for p in record.phases]


def test_a_plain_trainer_does_not_resume_at_another_depth(llama):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    plain_trainer(llama, pruning(), **settings).train()
    for added in (False, True):  # a callback that comes later sees the model only when training begins
        trainer = plain_trainer(make_model(), [] if added else pruning(), **settings)
        if added:
            trainer.add_callback(pruning())
            hand_over(trainer)
            Path("out/checkpoint-2/optimizer.pt").rename("out/optimizer.pt")  # the Trainer would not notice
        with pytest.raises(
            LayerPruneError, match=r"wrong layers\. .*from_pretrained\('out/checkpoint-2'\) before you resume"
        ):
            trainer.train(resume_from_checkpoint="out/checkpoint-2")
    Path("out/optimizer.pt").rename("out/checkpoint-2/optimizer.pt")
    model = type(llama).from_pretrained("out/checkpoint-2")
    trainer = plain_trainer(model, pruning(target_layers=3), **settings)
    with pytest.raises(LayerPruneError, match="began with target_layers=4, not 3"):
        trainer.train(resume_from_checkpoint="out/checkpoint-2")
    trainer = plain_trainer(model, pruning(), **settings | {"max_steps": 8})
    with pytest.raises(LayerPruneError, match="phases of 2 steps, now it would go on with 4"):
        trainer.train(resume_from_checkpoint="out/checkpoint-2")
    plain_trainer(model, pruning(), **settings).train(resume_from_checkpoint="out/checkpoint-2")
    torch.testing.assert_close(model.state_dict(), llama.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_layers": 0}, "target_layers is 0"),
        ({"target_layers": 2.0}, "target_layers is 2.0"),
        ({"layers_per_phase": 0}, "layers_per_phase is 0"),
        ({"steps_per_phase": -1}, "steps_per_phase is -1"),
        ({"criterion": "block_influence", "quality_floor": 1.0}, "leave quality_floor out"),
        ({"target_layers": 6}, "target_layers is 6, but the model has 6 layers"),
        ({"target_layers": 30}, "target_layers is 30, but the model has 6 layers"),
        ({"protected": [7]}, r"No layers \[7\]"),
        ({"target_layers": 2, "protected": [0, 1, 5]}, "only 3 are not protected"),
        ({"steps_per_phase": 4}, "training has 6 steps"),
        ({"target_layers": 1, "protected": []}, None),
        ({"calibration": None}, "give `calibration`"),
        ({"calibration": []}, "data is empty"),
        ({"criterion": "luck"}, "There is no criterion"),
        ({"criterion": "task"}, "go together"),
    ],
)
def test_bad_settings_are_refused_before_training(llama, settings, message):
    weights = copy.deepcopy(llama.state_dict())
    if message is None:
        plain_trainer(llama, pruning(**settings)).train()
        assert len(find_decoder(llama).layers) == 1
        return
    with pytest.raises(LayerPruneError, match=message):
        plain_trainer(llama, pruning(**settings)).train()
    torch.testing.assert_close(llama.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint"),
        ({"max_steps": 1}, "training has 1 steps"),
    ],
)
def test_trainer_settings_that_cannot_work_are_refused(llama, settings, message):
    trainer = make_trainer(llama, callbacks=[pruning()], eval_dataset=examples(), **settings)
    with pytest.raises(LayerPruneError, match=message):
        trainer.train()


def test_an_optimizer_that_holds_something_else_is_refused(llama):
    trainer = plain_trainer(llama, pruning())
    trainer.optimizer = torch.optim.AdamW([next(llama.parameters())])
    with pytest.raises(LayerPruneError, match="does not hold exactly"):
        trainer.train()


def test_a_run_that_broke_off_without_a_checkpoint_can_be_started_again(llama):
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise MemoryError

    with pytest.raises(MemoryError):
        plain_trainer(make_model(), [pruning(), Broken()]).train()
    assert Path("out/layer_pruning.json").exists()
    plain_trainer(llama, pruning()).train()
    with pytest.raises(LayerPruneError, match="already holds another run"):
        plain_trainer(make_model(), pruning()).train()


def test_a_checkpoint_does_not_teach_itself(llama):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(llama, callbacks=[pruning()], **settings).train()
    model = type(llama).from_pretrained("out/checkpoint-2")
    with pytest.raises(LayerPruneError, match="began with a model of 6 layers, but the teacher has 5"):
        make_trainer(model, callbacks=[pruning()], **settings).train("out/checkpoint-2")
    trainer = make_trainer(model, callbacks=[pruning()], teacher_model=make_model(), **settings)
    trainer.train("out/checkpoint-2")
    torch.testing.assert_close(model.state_dict(), llama.state_dict(), rtol=0, atol=0)


def test_hidden_layers_that_are_all_gone_are_refused(llama):
    settings = {"kl_weight": 0.0, "hidden_weight": 1.0, "hidden_layers": [2], "max_steps": 4}
    callback = pruning(target_layers=5, protected=[0, 1, 3, 4, 5])
    with pytest.raises(LayerPruneError, match=r"All of hidden_layers \[2\] were removed"):
        make_trainer(llama, callbacks=[callback], **settings).train()


def test_a_streamed_training_set_is_fine(llama):
    stream = examples().to_iterable_dataset().map(lambda row: row)
    trainer = make_trainer(llama, stream, callbacks=[pruning()], max_steps=4)
    trainer.train()
    assert len(find_decoder(llama).layers) == 4


@pytest.mark.parametrize("taken", ["layer_pruning.json", "config.json", "checkpoint-3/x"])
def test_a_folder_of_another_run_is_refused(llama, taken):
    Path("out", taken).parent.mkdir(parents=True)
    Path("out", taken).write_text('{"format": 1, "finished": true}')
    with pytest.raises(LayerPruneError, match="already holds another run or model"):
        plain_trainer(llama, pruning()).train()


def test_a_layer_that_cannot_go_stays(caplog):
    model = tiny_model("modernbert-decoder")  # layer 0 is built otherwise than the others
    callback = pruning(target_layers=5, protected=[])
    plain_trainer(model, callback).train()
    assert 0 in get_lineage(model).kept
    assert all(0 in phase.removals[0].table.refused for phase in callback.record.phases)
    assert "Layers [0] stay: " in caplog.text
    model = tiny_model("modernbert-decoder")
    again = plain_trainer(model, pruning(target_layers=5, protected=[2, 3, 4, 5, 6]), output_dir="other")
    with pytest.raises(LayerPruneError, match=r"only 1 are not protected.* Layers \[0\] cannot be removed"):
        again.train()


def test_tables_packed_over_the_layers_are_not_cut_in_training():
    model = tiny_model("gemma3n_text")
    with pytest.raises(LayerPruneError, match=r"embed_tokens_per_layer.*holds a part for every layer"):
        plain_trainer(model, pruning()).train()
    assert len(find_decoder(model).layers) == 7
    record = prune_layers(model, target_layers=5, calibration=calibration())  # without training they are
    assert record.phases[-1].kept == get_lineage(model).kept


def test_checkpoints_of_a_plain_trainer_are_checked(llama):
    llama.model.layers[0].self_attn.scaling *= 2  # nothing in the config says so
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    with pytest.raises(LayerPruneError, match=r"saved model differs.*safe in out/checkpoint-2"):
        plain_trainer(llama, pruning(), **saves).train()
    plain_trainer(make_model(), pruning(verify_save=False), output_dir="off", **saves).train()


def test_scoring_that_was_interrupted_goes_on_in_the_next_run(llama):
    """In the same folder, from the same model: what was scored is not scored again."""
    batches = [{"input_ids": tokens(2, 16, seed=i)} for i in range(8)]
    calls, limit = [], [10**9]

    def count(module, args, output):
        calls.append(1)
        if len(calls) > limit[0]:
            raise KeyboardInterrupt

    def run(folder):
        model = copy.deepcopy(llama)
        find_decoder(model).layers[5].mlp.register_forward_hook(count)
        calls.clear()
        callback = pruning(calibration=batches, target_layers=5)
        make_trainer(model, output_dir=folder, max_steps=1, callbacks=[callback]).train()
        return callback.record.phases[0].removals

    expected, whole = run("whole"), len(calls)
    limit[0] = whole // 2
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    assert Path("stopped/scoring.jsonl").read_text().count("\n") > 2
    limit[0] = 10**9
    assert run("stopped") == expected
    assert len(calls) < whole
    assert not Path("stopped/scoring.jsonl").exists()


def test_layers_go_by_a_pattern(llama):
    callback = pruning(criterion="positional", pattern="input", calibration=None, target_layers=4)
    plain_trainer(llama, callback).train()
    assert get_lineage(llama).kept == [0, 3, 4, 5]
    assert callback.record.pruning["pattern"] == "input"
    with pytest.raises(LayerPruneError, match="There is no pattern 'sideways'"):
        pruning(criterion="positional", pattern="sideways")


def test_what_reads_no_text_needs_no_calibration(llama, tokenizer):
    tasks = [MultipleChoice(QUESTIONS, tokenizer), MultipleChoice(QUESTIONS[:4], tokenizer)]
    callback = LayerPruningCallback(target_layers=5, criterion="task", task=tasks)
    plain_trainer(llama, callback).train()
    assert len(get_lineage(llama).kept) == 5
    prune_layers(llama, target_layers=4, criterion="positional")
    assert len(get_lineage(llama).kept) == 4
