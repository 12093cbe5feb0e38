"""Two processes on one machine, against one."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from .conftest import tokens
from .test_trainer import ALL_TERMS, make_trainer, students


# Run as a process of its own: what each rank does.
RANK = """
import json
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from safetensors.torch import save_file
from tests.test_distributed import dataset
from tests.test_trainer import make_trainer, students

torch.set_num_threads(1)
student, teacher = students()
trainer = make_trainer(student, dataset(), teacher_model=teacher, **{settings!r})
trainer.train()
if trainer.is_world_process_zero():
    state = {{name: value.contiguous() for name, value in student.state_dict().items()}}
    save_file(state, "two.safetensors")
    Path("two.json").write_text(json.dumps(trainer.state.log_history))
# A process that ends while gloo's threads still run is aborted now and then.
trainer.accelerator.end_training()
"""


def dataset():
    """Rows of which different numbers of tokens count, so that a mean of means would differ."""
    ids = tokens(16, 12)
    labels = ids.clone()
    for row in range(16):
        labels[row, : row % 11] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"activation_checkpointing": True},
        {"trainable": "around_cuts"},
    ],
)
def test_two_processes_learn_what_one_does(settings):
    common = (
        {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0} | ALL_TERMS | settings
    )
    root = str(Path(__file__).parent.parent)
    two = common | {"per_device_train_batch_size": 2, "output_dir": "two"}
    Path("rank.py").write_text(textwrap.dedent(RANK).format(root=root, settings=two))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "rank.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]

    student, teacher = students()
    one = make_trainer(
        student, dataset(), teacher_model=teacher, **common, per_device_train_batch_size=4, output_dir="one"
    )
    start = {name: value.clone() for name, value in student.state_dict().items()}
    one.train()
    found, expected = load_file("two.safetensors"), student.state_dict()
    moved = max((expected[name] - start[name]).abs().max().item() for name in expected)
    assert moved > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3 * moved)
    logs = json.loads(Path("two.json").read_text())
    for ours, theirs in zip(one.state.log_history[:-1], logs[:-1], strict=True):
        for term in ("loss", "kl", "ce", "hidden_mse"):
            assert theirs[term] == pytest.approx(ours[term], rel=1e-4), term
