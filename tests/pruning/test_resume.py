"""What a checkpoint holds of a run, and whether a run can be resumed from it."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_layerprune import LayerPruneError, LayerPruningCallback, remove_layers
from hf_layerprune.pruning.resume import check_depth_of_weights
from hf_layerprune.reports.record import read_record

from ..conftest import make_model
from ..distillation.test_trainer import examples, make_trainer
from .test_callback import hand_over, plain_trainer, pruning


SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def trainer_state(step):
    return json.loads(Path(f"out/checkpoint-{step}/trainer_state.json").read_text())


def test_the_trainer_writes_the_record_into_a_checkpoint(llama):
    callback = pruning()
    make_trainer(llama, callbacks=[callback], **SAVES).train()
    assert not list(Path("out").glob("checkpoint-*/layer_pruning.json"))
    for step, layers in ((2, 5), (4, 4)):
        found = read_record(f"out/checkpoint-{step}")
        assert [len(phase.kept) for phase in found.phases] == list(range(5, layers - 1, -1))
        assert [phase.removals for phase in found.phases] == [
            phase.removals for phase in callback.record.phases[: len(found.phases)]
        ]
        assert found.texts["healing"]["tokens"] == 96 * step
        assert not found.finished


def old_checkpoint(step):
    """Makes a checkpoint what versions before wrote: the record in a file of its own."""
    state = trainer_state(step)
    record = state["stateful_callbacks"].pop("LayerPruningCallback")["attributes"]["record"]
    record["pruning"]["seed"] = record["pruning"].pop("scoring_seed")
    Path(f"out/checkpoint-{step}/trainer_state.json").write_text(json.dumps(state))
    Path(f"out/checkpoint-{step}/layer_pruning.json").write_text(json.dumps(record))


def test_a_checkpoint_of_an_earlier_version_is_resumed(llama):
    make_trainer(llama, callbacks=[pruning()], **SAVES).train()
    old_checkpoint(2)
    trainer = make_trainer(make_model(), callbacks=[pruning()], **SAVES)
    trainer.train("out/checkpoint-2")
    torch.testing.assert_close(trainer.model.state_dict(), llama.state_dict(), rtol=0, atol=0)
    assert "record" in trainer_state(4)["stateful_callbacks"]["LayerPruningCallback"]["attributes"]
    with pytest.raises(LayerPruneError, match="began with scoring_seed=0, not 1"):
        make_trainer(make_model(), callbacks=[pruning(scoring_seed=1)], **SAVES).train("out/checkpoint-2")


def test_a_checkpoint_without_a_record_is_refused(llama):
    make_trainer(llama, **SAVES).train()
    with pytest.raises(LayerPruneError, match=r"Cannot resume at step 2: .* holds no record"):
        make_trainer(make_model(), callbacks=[pruning()], **SAVES).train("out/checkpoint-2")


def test_a_new_callback_made_by_the_trainer_is_refused(llama):
    settings = {"restore_callback_states_from_checkpoint": True}
    with pytest.raises(LayerPruneError, match="restore_callback_states_from_checkpoint makes a new"):
        make_trainer(llama, callbacks=[pruning()], **settings)
    trainer = make_trainer(llama, **settings)
    trainer.add_callback(pruning())
    with pytest.raises(LayerPruneError, match="restore_callback_states_from_checkpoint makes a new"):
        trainer.train()


def test_two_callbacks_are_refused(llama):
    trainer = make_trainer(llama, callbacks=[pruning(), pruning()])
    with pytest.raises(LayerPruneError, match="more than one LayerPruningCallback"):
        trainer.train()


def test_weights_of_another_depth_are_refused(llama, tmp_path):
    check = partial(check_depth_of_weights, str(tmp_path))
    whole = llama.state_dict()
    check(llama, whole)
    shorter = make_model()
    remove_layers(shorter, 3)
    with pytest.raises(LayerPruneError, match=r"the layers \[0, 1, 2, 3, 4\], the model \[0, .* 5\]"):
        check(llama, shorter.state_dict())
    with pytest.raises(LayerPruneError, match="wrong layers"):
        check(shorter, whole)


def test_one_file_of_several_is_no_other_depth(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="60KB")
    files = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    assert len(files) > 2
    for weights in files:
        check_depth_of_weights("", llama, weights)
    remove_layers(llama, 5)
    [last] = [weights for weights in files if any(".layers.5." in name for name in weights)]
    with pytest.raises(LayerPruneError, match="wrong layers"):
        check_depth_of_weights("", llama, last)


def test_adapters_of_some_layers_are_no_other_depth(llama):
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 2])
    model = get_peft_model(llama, config)
    weights = {name: value for name, value in model.state_dict().items() if "lora" in name}
    check_depth_of_weights("", model, weights)
    fewer = {name: value for name, value in weights.items() if ".1." in name}
    with pytest.raises(LayerPruneError, match="Take the same layers out of the base first"):
        check_depth_of_weights("", model, fewer)


# A plain Trainer, and who tells the callback of it


def test_a_plain_trainer_works_without_being_handed_over(llama, caplog, capsys):
    ends = []
    for hands_over in (False, True):
        model, callback = make_model(), pruning()
        trainer = plain_trainer(model, [], output_dir=f"out-{hands_over}", logging_steps=1)
        trainer.callback_handler.callbacks.insert(0, callback)
        if hands_over:
            hand_over(trainer)
        caplog.clear()
        capsys.readouterr()
        trainer.train()
        assert ("does not know its Trainer" in caplog.text) != hands_over
        printed = capsys.readouterr()
        rows = [line for line in (printed.out + printed.err).splitlines() if line.startswith("| ")]
        assert [row.split("|")[2].strip() for row in rows] == ["layers", "5", "4", "4"]
        assert [log["layers"] for log in trainer.state.log_history if "loss" in log] == [5, 5, 5, 4, 4, 4]
        ends.append(model.state_dict())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_evaluation_data_of_an_unknown_trainer_has_to_be_handed_over(llama):
    args = TrainingArguments("out", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    callback = pruning(calibration=None)
    trainer = Trainer(llama, args, train_dataset=examples(), eval_dataset=examples(4), callbacks=[callback])
    with pytest.raises(LayerPruneError, match=r"an eval_dataset, and call set_trainer\(trainer\)"):
        trainer.train()
    trainer.evaluate()  # from now on callbacks see its data
    trainer.train()
    assert callback.record.finished


def test_only_the_trainer_that_trains_is_handed_over(llama):
    callback = pruning()
    trainer = plain_trainer(llama, callback)
    with pytest.raises(LayerPruneError, match="set_trainer got a Trainer without this Layer"):
        callback.set_trainer(plain_trainer(llama, []))
    other = plain_trainer(llama, callback)  # which it knows now
    with pytest.raises(LayerPruneError, match="set_trainer was called with another Trainer"):
        trainer.train()
    other.train()


def test_a_distillation_trainer_hands_itself_over(llama):
    first, late = pruning(), LayerPruningCallback(target_layers=5)
    trainer = make_trainer(llama, callbacks=[first])
    assert first.trainer is trainer
    trainer.add_callback(late)
    assert late.trainer is trainer


def test_a_trainer_hands_itself_only_to_those_that_ask(llama):
    class Asks(TrainerCallback):
        trainer = None
        times = 0

        def set_trainer(self, trainer):
            self.trainer, self.times = trainer, self.times + 1

    asks = Asks()
    trainer = make_trainer(llama, callbacks=[asks, TrainerCallback()], enable_jit_checkpoint=False)
    assert (asks.trainer, asks.times) == (trainer, 1)


# Settings


def test_a_wrong_name_of_a_setting_is_refused():
    with pytest.raises(LayerPruneError, match=r"no setting 'seed'. Did you mean scoring_seed\?"):
        pruning(seed=1)
    with pytest.raises(LayerPruneError, match=r"no setting 'xyz'. Choose from batch_tokens, criterion"):
        pruning(xyz=1)
    with pytest.raises(LayerPruneError, match="target_layers is missing"):
        LayerPruningCallback(criterion="kl")


def test_the_record_holds_the_settings_of_the_dataclass(llama):
    callback = pruning(criterion="positional", scoring_seed=3, pattern="random", steps_per_phase=2)
    again = LayerPruningCallback(callback.args, target_layers=5)
    assert again.args.pattern == "random"
    assert again.args.target_layers == 5
    plain_trainer(llama, callback).train()
    settings = callback.record.pruning
    assert (settings["scoring_seed"], settings["pattern"], settings["steps_per_phase"]) == (3, "random", 2)
    assert callback.state()["args"]["scoring_seed"] == 3
