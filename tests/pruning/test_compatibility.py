import copy

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from trl import BEMACallback

from hf_layerprune import LayerPruneError, get_lineage
from hf_layerprune.surgery.decoder import find_decoder

from ..conftest import make_model
from ..distillation.test_trainer import examples, make_trainer
from .test_callback import plain_trainer, pruning


def state_bytes(optimizer):
    parts = [part for state in optimizer.state.values() for part in state.values()]
    return sum(part.untyped_storage().nbytes() for part in parts if torch.is_tensor(part))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adamw_bnb_8bit"])
def test_the_optimizer_holds_what_a_fresh_one_would(optim):
    """After each removal, in bytes of state, once both have stepped."""
    sizes = []

    class Weigh(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
            fresh = kind(copy.deepcopy(model).parameters(), **settings)
            for parameter in fresh.param_groups[0]["params"]:
                parameter.grad = torch.ones_like(parameter)
            fresh.step()
            sizes.append((state_bytes(optimizer.optimizer), state_bytes(fresh)))

    settings = {"optim": optim, "optim_args": "momentum=0.9"} if optim == "sgd" else {"optim": optim}
    # Large enough that bitsandbytes keeps eight bits of them.
    model = make_model(hidden_size=128, intermediate_size=256, head_dim=32)
    plain_trainer(model, [pruning(target_layers=3), Weigh()], **settings).train()
    ours, fresh = zip(*sizes, strict=True)
    assert ours == fresh
    assert ours[0] > ours[2] > ours[4] > 0


def test_an_optimizer_made_of_several_is_refused(llama):
    class Several(torch.optim.Optimizer):
        def __init__(self, parameters):
            parameters = list(parameters)
            super().__init__(parameters, {})
            self.parts = [torch.optim.SGD(parameters[:3]), torch.optim.AdamW(parameters[3:])]
            self.param_groups = [g for one in self.parts for g in one.param_groups]

        @property
        def state(self):
            return {p: s for one in self.parts for p, s in one.state.items()}

        @state.setter
        def state(self, value):
            pass

    trainer = plain_trainer(llama, pruning())
    trainer.optimizer = Several(llama.parameters())
    with pytest.raises(LayerPruneError, match=r"\(Several, .* does not hold exactly"):
        trainer.train()


@pytest.mark.parametrize("optim", ["galore_adamw", "lomo", "apollo_adamw", "galore_adamw_layerwise"])
def test_optimizers_that_keep_more_are_refused_by_name(llama, optim):
    trainer = plain_trainer(llama, pruning())
    trainer.optimizer = torch.optim.AdamW(llama.parameters())  # their packages need not be here
    trainer.args.optim = optim
    with pytest.raises(LayerPruneError, match=f"optim is {optim}, .*adamw_torch.*hf-layerprune phases"):
        trainer.train()


class Average(TrainerCallback):
    """A moving average as many write it: copies by name, made when training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.shadow = {"weights": [p.detach().clone() for p in model.parameters()]}


class Holds(TrainerCallback):
    def __init__(self, what):
        self.what = what


def test_callbacks_that_keep_parameters_are_named(llama, caplog):
    innocent = Holds({"numbers": [1, 2], "tensor": torch.zeros(3), "model": llama})
    plain_trainer(llama, [innocent, pruning()], output_dir="fine").train()
    assert "keeps parameters" not in caplog.text
    average = BEMACallback(update_freq=1, update_after=0, device="cpu")
    pruned = pruning()
    model = make_model()
    plain_trainer(model, [average, Average(), Holds(find_decoder(model).layers[2]), pruned]).train()
    [sign] = [sign for sign in pruned.record.warnings if "keeps parameters" in sign]
    assert sign.startswith("BEMACallback, Average, Holds keeps")


def test_callbacks_of_another_trainer_do_not_matter(llama):
    other = plain_trainer(make_model(), [Average()], output_dir="other")
    [average] = [one for one in other.callback_handler.callbacks if isinstance(one, Average)]
    average.on_train_begin(None, None, None, model=other.model)
    pruned = pruning()
    plain_trainer(llama, pruned).train()
    assert not any("keeps" in sign for sign in pruned.record.warnings)


def test_the_same_is_seen_of_callbacks_that_begin_later(llama):
    pruned = pruning()
    plain_trainer(llama, [pruned, Average()]).train()
    assert any(sign.startswith("Average keeps") for sign in pruned.record.warnings)


def events(folder):
    [file] = folder.rglob("events.out.tfevents*")
    board = EventAccumulator(str(file))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


@pytest.mark.parametrize("kind", ["plain", "distillation"])
def test_tensorboard_shows_scores_depth_and_losses(llama, tmp_path, kind):
    callback = pruning(target_layers=4)
    settings = {"report_to": "tensorboard", "logging_steps": 1, "max_steps": 4}
    if kind == "plain":
        plain_trainer(llama, callback, **settings).train()
    else:
        make_trainer(llama, callbacks=[callback], **settings).train()
    shown = events(tmp_path / "out")
    assert shown["train/layers"] == [(1, 5), (2, 5), (3, 4), (4, 4)]
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]
    assert ("train/kl" in shown) == (kind == "distillation")
    for place, phase in enumerate(callback.record.phases):
        [removal] = phase.removals
        table = removal.table
        assert shown["train/removed_layer"][place] == (phase.step, removal.original)
        assert shown["train/removed_score"][place][1] == pytest.approx(removal.score, abs=1e-5)
        for layer, score in table.scores.items():
            tag = f"train/loss_score/layer_{table.kept[layer]:02d}"
            assert dict(shown[tag])[phase.step] == pytest.approx(score, abs=1e-5)


def early_stopping(patience, metrics, **settings):
    """A run of 12 steps, evaluated after each, in which these numbers are the evaluations' loss."""
    left = iter(metrics)
    model = make_model()
    trainer = make_trainer(
        model,
        eval_dataset=examples(4),
        max_steps=12,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        callbacks=[pruning(steps_per_phase=3), EarlyStoppingCallback(patience)],
        **settings,
    )
    evaluate = trainer.evaluation_loop

    def loop(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        return output._replace(metrics=output.metrics | {"eval_loss": next(left)})

    trainer.evaluation_loop = loop
    return trainer


def test_early_stopping_does_not_compare_depths():
    """After a removal all is worse than before it, which is no reason to stop."""
    trainer = early_stopping(2, [1, 1.1, 0.9, 5, 4.5, 4.6, 4.4, 4.5, 4.6, 4.7])
    trainer.train()
    assert trainer.state.global_step == 9  # the second evaluation without a better one in the last phase
    assert len(get_lineage(trainer.model).kept) == 4


def test_the_best_model_of_the_last_depth_is_loaded():
    weights = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights[state.global_step] = copy.deepcopy(model.state_dict())

    saves = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = early_stopping(9, [0.1, 0.2, 0.3, 5, 2, 3, 4, 4, 4, 4, 4, 4], learning_rate=1e-2, **saves)
    trainer.add_callback(Look())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    torch.testing.assert_close(trainer.model.state_dict(), weights[5], rtol=0, atol=0)
    assert len(get_lineage(trainer.model).kept) == 4


def test_a_plain_trainer_does_not_load_the_best_model(llama):
    saves = {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}
    trainer = plain_trainer(llama, pruning(), **saves)
    with pytest.raises(LayerPruneError, match="load_best_model_at_end"):
        trainer.train()


def test_reconstruction_in_float16_is_refused_before_a_layer_goes(llama):
    callback = pruning(reconstruction_layers=1)
    trainer = make_trainer(llama, callbacks=[callback], max_steps=4)
    trainer.args.fp16 = True
    with pytest.raises(LayerPruneError, match="reconstruction_layers is set and fp16 is True"):
        trainer.train()
    assert len(get_lineage(llama).kept) == 6
