"""Two processes on one machine, against one."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from hf_layerprune import LayerPruningCallback, get_lineage
from hf_layerprune.reports.record import read_record

from ..conftest import tokens
from .test_trainer import ALL_TERMS, examples, make_trainer, students


# Run as a process of its own: what each rank does.
RANK = """
import sys
sys.path.insert(0, {root!r})
import torch
from tests.distillation.test_distributed import run

torch.set_num_threads(1)
# A process that ends while gloo's threads still run is aborted now and then.
run({settings!r}).accelerator.end_training()
"""


ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3}


def pruning(reconstruction):
    return LayerPruningCallback(target_layers=2, calibration=examples(4), **reconstruction)


def run(settings):
    """Train as `settings` say, with or without layers going, and leave the weights and the log."""
    settings = dict(settings)
    resume, evaluated = settings.pop("resume", None), settings.pop("evaluated", ())
    kind, name = settings.pop("kind"), settings["output_dir"]
    reconstruction = settings.pop("reconstruction", {})
    if settings.pop("sharded", False):
        shard()
    student, teacher = students()
    if kind == "plain":
        arguments = {
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "lr_scheduler_type": "constant",
        }
        args = TrainingArguments(**arguments | {"logging_steps": 1, "save_strategy": "no"} | settings)
        trainer = Trainer(
            student,
            args,
            train_dataset=dataset(),
            data_collator=default_data_collator,
            callbacks=[callback := pruning(reconstruction)],
        )
        callback.set_trainer(trainer)
    else:
        callbacks = [pruning(reconstruction)] if kind == "pruned" else None
        trainer = make_trainer(student, dataset(), teacher_model=teacher, callbacks=callbacks, **settings)
    start = {key: value.clone() for key, value in student.state_dict().items()}
    trainer.train(resume_from_checkpoint=resume)
    metrics = [trainer.evaluate(dataset().select(range(rows))) for rows in evaluated]
    end = {key: whole(value) for key, value in student.state_dict().items()}
    change = {key: value - start[key] for key, value in end.items()}
    mine = {key: value.contiguous() for key, value in end.items()}
    save_file(mine, f"{name}-{trainer.accelerator.process_index}.safetensors")
    if trainer.is_world_process_zero():
        found = {"kept": get_lineage(student).kept, "log": trainer.state.log_history, "eval": metrics}
        found["moved"] = max(value.abs().max().item() for value in change.values())
        Path(f"{name}.json").write_text(json.dumps(found))
    return trainer


def whole(tensor):
    return tensor.full_tensor() + 0 if hasattr(tensor, "full_tensor") else tensor


def shard():
    """FSDP2, which accelerate would not start on a CPU."""
    make = accelerate.Accelerator.__init__
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.distributed_type = DistributedType.FSDP
        settings = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(2, **settings)

    accelerate.Accelerator.__init__ = init


def dataset():
    """Rows of which different numbers of tokens count, so that a mean of means would differ."""
    ids = tokens(16, 12)
    labels = ids.clone()
    for row in range(16):
        labels[row, : row % 11] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def launch(settings):
    """[`run`] in two processes."""
    root = str(Path(__file__).parents[2])
    Path("rank.py").write_text(textwrap.dedent(RANK).format(root=root, settings=settings))
    processes = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *processes, "rank.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.partition("torch/distributed/elastic")[0][-4000:]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("distilled", {"gradient_accumulation_steps": 2}),
        ("distilled", {"activation_checkpointing": True}),
        ("distilled", {"trainable": "around_cuts"}),
        ("pruned", {"gradient_accumulation_steps": 2, "trainable": "around_cuts"}),
        ("pruned", {"activation_checkpointing": True, "save_strategy": "steps", "save_steps": 2}),
        ("plain", {}),
        ("pruned", {"reconstruction": {"reconstruction_layers": 1}, "trainable": "around_cuts"}),
        ("plain", {"reconstruction": {"reconstruction_layers": 1}}),
        ("pruned", {"sharded": True, "save_strategy": "steps", "save_steps": 2, **ADAMW}),
        ("plain", {"sharded": True, "save_strategy": "steps", "save_steps": 4}),
    ],
)
def test_two_processes_learn_what_one_does(kind, settings):
    common = {"max_steps": 4 if kind != "distilled" else 2, "optim": "sgd", "learning_rate": 0.1} | settings
    common |= {"kind": kind, "max_grad_norm": 0.0, **(ALL_TERMS if kind != "plain" else {})}
    two = common | {"per_device_train_batch_size": 2, "output_dir": "two"}
    launch(two)
    run(common | {"per_device_train_batch_size": 4, "output_dir": "one", "sharded": False})

    found, expected = load_file("two-0.safetensors"), load_file("one-0.safetensors")
    other = load_file("two-1.safetensors")
    theirs, ours = (json.loads(Path(f"{name}.json").read_text()) for name in ("two", "one"))
    assert theirs["kept"] == ours["kept"]
    assert len(ours["kept"]) == (4 if kind == "distilled" else 2)
    assert ours["moved"] > 1e-3
    tolerance = 1e-2 if "reconstruction" in settings else 1e-3  # of AdamW, not SGD
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * ours["moved"])
        assert torch.equal(other[name], found[name])
    terms = ("loss",) if kind == "plain" else ("loss", "kl", "ce", "hidden_mse")
    for one, other in zip(ours["log"], theirs["log"], strict=True):
        assert all(other[term] == pytest.approx(one[term], rel=1e-4) for term in terms if "loss" in one)
    if kind == "pruned":
        records = [read_record(name).phases for name in ("two", "one")]
        removed = [[one.original for p in phases for one in p.removals] for phases in records]
        assert len(removed[0]) == 2
        assert removed[0] == removed[1]
    if "save_steps" in settings:
        saved = AutoModelForCausalLM.from_pretrained("two/checkpoint-4")
        assert saved.config.num_hidden_layers == 2
        assert saved.config.architectures == ["LlamaForCausalLM"]
    if "sharded" in settings and kind == "pruned":
        shutil.rmtree("two/checkpoint-4")
        launch(two | {"resume": "two/checkpoint-2"})
        again = load_file("two-0.safetensors")
        assert all(torch.equal(again[name], value) for name, value in found.items())


def test_an_evaluation_is_the_same_in_two_processes_and_with_other_batches():
    """The last batch is filled up with rows that were read before, which must not count."""
    settings = {"kind": "distilled", "max_steps": 1, "evaluated": [3, 5], "learning_rate": 0.0} | ALL_TERMS
    launch(
        settings | {"output_dir": "two", "per_device_eval_batch_size": 2, "per_device_train_batch_size": 4}
    )
    found = [json.loads(Path("two.json").read_text())["eval"]]
    for size in (1, 4):
        run(settings | {"output_dir": "one", "per_device_eval_batch_size": size})
        found.append(json.loads(Path("one.json").read_text())["eval"])
    names = ["eval_loss", "eval_kl", "eval_ce", "eval_hidden_mse"]
    two, *others = [[each[name] for each in one for name in names] for one in found]
    assert others == [pytest.approx(two, rel=1e-4)] * 2
