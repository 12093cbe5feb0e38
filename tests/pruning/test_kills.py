"""Runs that are killed, again and again, and end as if they had not been."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, default_data_collator

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    LayerPruningCallback,
    get_lineage,
    last_checkpoint,
    save_model,
)
from hf_layerprune.reports.record import check_folder_is_free, read_record

from ..conftest import make_model, tokens
from ..distillation.test_tiled_loss import perturbed
from ..distillation.test_trainer import examples, make_trainer
from ..tiny_models import tiny_model


ENDS = (0, -signal.SIGKILL, -signal.SIGXFSZ, 128 + signal.SIGTERM)
# What a run can be doing when it is killed, by the function it is in.
MOMENTS = {
    "score_layers": "scoring",
    "remove_layers": "removal",
    "reconstruct_layers": "reconstruction",
    "_save_checkpoint": "checkpoint",
    "on_save": "record",
}


def train(folder, save_steps):
    """One attempt at a run of two removals: it begins, or goes on where the one before was killed."""
    args = DistillationTrainingArguments(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        make_model(),
        args,
        train_dataset=examples(16),
        data_collator=default_data_collator,
        callbacks=[
            LayerPruningCallback(
                target_layers=4,
                calibration=examples(4),
                reconstruction_layers=1,
                reconstruction_epochs=3,
            )
        ],
    )
    trainer.train(resume_from_checkpoint=read_record(folder) is not None)
    save_file(trainer.model.state_dict(), f"{folder}/end.safetensors")
    removed = [[one.original, one.score] for one in read_record(folder).removals]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    end = {"kept": get_lineage(trainer.model).kept, "removed": removed, "losses": losses}
    Path(folder, "end.json").write_text(json.dumps(end))


def attempt(folder, part=None, calls_into=0, by=signal.SIGKILL, save_steps=1, limit=None):
    """Train in a process of its own, and see it kill itself so many calls of Python functions after it first
    came to a part of the work, or get another signal then; or be killed at this byte of any file it writes.

    Returns:
        What it was doing when it was killed, None if it came to its end; and of each part how many calls it
        took each time.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        calls, lengths, entered, kill_at = 0, {}, [], None
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        def count(frame, event, argument):
            nonlocal calls, kill_at
            now = MOMENTS.get(frame.f_code.co_name)
            if event == "call":
                calls += 1
                if now:
                    entered.append((frame, calls))
                if now == part and part and kill_at is None:
                    kill_at = calls + calls_into
                if calls == kill_at:
                    names = {one.f_code.co_name for one, _ in traceback.walk_stack(frame)}
                    doing = [what for name, what in MOMENTS.items() if name in names]
                    os.write(write, json.dumps([doing, {}]).encode())
                    os.kill(os.getpid(), by)
            elif event == "return" and entered and entered[-1][0] is frame:
                lengths.setdefault(now, []).append(calls - entered.pop()[1])

        try:
            sys.setprofile(count)
            train(folder, save_steps)
            sys.setprofile(None)
            os.write(write, json.dumps([None, lengths]).encode())
        except BaseException as error:
            traceback.print_exc()
            os._exit(error.code if isinstance(error, SystemExit) else 1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in ENDS, "the attempt failed"
    return json.loads(said or "[null, {}]")


def check_termination():
    """A run that is told to end leaves a checkpoint of the step it is in; in scoring it ends at once."""
    torch.set_num_threads(1)
    attempt("whole", save_steps=3)
    for part, step in (
        ("checkpoint", 4),
        ("scoring", None),
        ("removal", 1),
        ("record", 4),
        ("reconstruction", None),
    ):
        doing, _ = attempt("told", part, 3, signal.SIGTERM, save_steps=3)
        assert doing[0] == part
        found = last_checkpoint("told")
        assert found == (None if step is None else f"told/checkpoint-{step}")
        assert not read_record("told") or not read_record("told").finished
        attempt("told", save_steps=3)
        assert Path("told/end.json").read_text() == Path("whole/end.json").read_text()
        shutil.rmtree("told")


def check_bytes(kills, seed):
    """Kill runs at a byte of a file that they write, small ones and large ones."""
    torch.set_num_threads(1)
    attempt("whole")
    expected, draw = load_file("whole/end.safetensors"), random.Random(seed)
    files = [path.stat().st_size for path in Path("whole").rglob("*") if path.is_file()]
    for number in range(kills):
        folder, most = f"cut-{number}", draw.choice(sorted(set(files)))
        attempt(folder, limit=draw.randrange(most // 2, most))
        assert not Path(folder, "end.json").exists()
        attempt(folder)
        found = load_file(f"{folder}/end.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert Path(folder, "end.json").read_text() == Path("whole/end.json").read_text()


def check_runs(kills, seed):
    """Kill runs so many times, in all parts of the work; each must end as one that was left alone."""
    torch.set_num_threads(1)
    _, lengths = attempt("whole")
    expected = load_file("whole/end.safetensors")
    draw, seen = random.Random(seed), []
    while len(seen) < kills:
        folder, parts = f"killed-{len(seen)}", sorted(lengths)
        draw.shuffle(parts)
        for part in parts:
            doing, _ = attempt(folder, part, draw.randrange(draw.choice(lengths[part]) + 1))
            if doing is None:
                break
            seen.append(doing)
        else:
            attempt(folder)
        assert Path(folder, "end.json").read_text() == Path("whole/end.json").read_text()
        found = load_file(f"{folder}/end.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    Path("seen.json").write_text(json.dumps(seen))


@pytest.mark.parametrize(("kills", "seed"), [(4, 0), pytest.param(20, 1, marks=pytest.mark.faults)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(kills, seed):
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
    script += f"from tests.pruning.test_kills import check_runs\ncheck_runs({kills}, {seed})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(Path("seen.json").read_text())
    assert len(seen) >= kills
    assert {part for doing in seen for part in doing} == set(MOMENTS.values())


@pytest.mark.parametrize(("kills", "seed"), [(3, 0), pytest.param(20, 1, marks=pytest.mark.faults)])
def test_a_run_that_is_killed_at_a_byte_leaves_the_last_checkpoint_whole(kills, seed):
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
    script += f"from tests.pruning.test_kills import check_bytes\ncheck_bytes({kills}, {seed})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_that_is_told_to_end_leaves_a_checkpoint():
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
    script += "from tests.pruning.test_kills import check_termination\ncheck_termination()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_half_written_checkpoint_is_passed_over():
    trainer = make_trainer(make_model(), max_steps=3, save_strategy="steps", save_steps=1)
    trainer.train()
    assert last_checkpoint("out") == "out/checkpoint-3"
    state = Path("out/checkpoint-3/trainer_state.json")
    state.write_text(state.read_text()[:-20])
    assert last_checkpoint("out") == "out/checkpoint-2"
    Path("out/checkpoint-10").mkdir()
    shutil.copytree("out/checkpoint-1", "out/checkpoint-mine")
    assert last_checkpoint("out") == "out/checkpoint-2"
    with pytest.raises(LayerPruneError, match=r"checkpoint-3 is no checkpoint .*: out/checkpoint-2"):
        trainer.train(resume_from_checkpoint="out/checkpoint-3")
    trainer.train(resume_from_checkpoint=True)
    assert last_checkpoint("out") == "out/checkpoint-3"


def test_a_checkpoint_written_over_is_none_until_it_is_whole_again(monkeypatch):
    trainer = make_trainer(make_model(), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()

    def stop(*args):
        assert last_checkpoint("out") is None
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_checkpoint("out") is None


def test_fused_experts_are_resumed():
    losses = []
    for resume in (None, "out/checkpoint-2"):
        torch.manual_seed(0)
        student = tiny_model("qwen2_moe")
        teacher = perturbed(student)
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ce_weight": 1.0}
        data = Dataset.from_dict({name: (tokens(8, 12) % 60).tolist() for name in ("input_ids", "labels")})
        trainer = make_trainer(student, data, teacher_model=teacher, learning_rate=1e-2, **settings)
        trainer.train(resume_from_checkpoint=resume)
        losses.append(trainer.state.log_history[3]["loss"])
    assert losses[0] == losses[1]


def test_weights_of_two_precisions_are_resumed_as_they_were():
    model = make_model().bfloat16()
    model.model.norm.float()
    with torch.no_grad():
        model.model.norm.weight += 1e-4  # which bfloat16 would round away
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained("saved")
    trainer = make_trainer(make_model().bfloat16())
    trainer.model.model.norm.float()
    trainer._load_from_checkpoint("saved")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.dtype == state[name].dtype


def test_a_checkpoint_that_lacks_weights_is_refused():
    make_model().save_pretrained("saved")
    state = load_file("saved/model.safetensors")
    del state["model.norm.weight"]
    save_file(state, "saved/model.safetensors", metadata={"format": "pt"})
    trainer = make_trainer(make_model())
    with pytest.raises(LayerPruneError, match=r"saved lacks model\.norm\.weight"):
        trainer._load_from_checkpoint("saved")


def test_the_handler_of_a_run_that_broke_off_is_replaced():
    class Stop(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise ValueError("stop")

    handlers = []
    for folder in ("one", "two"):
        callback = LayerPruningCallback(target_layers=4, calibration=examples(4))
        settings = {"output_dir": folder, "max_steps": 2, "callbacks": [callback, Stop()]}
        with pytest.raises(ValueError, match="stop"):
            make_trainer(make_model(), **settings).train()
        handlers.append(signal.getsignal(signal.SIGTERM))
        assert handlers[-1] == callback._termination.handle
    with pytest.raises(SystemExit, match="143"):  # nothing is in training
        handlers[-1](signal.SIGTERM, sys._getframe())


@contextmanager
def full_at(size):
    """Within this context no file can be larger: a disk on which there is no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [500, 100_000, 300_000])  # the record, the model, the optimizer
def test_a_full_disk_leaves_the_last_checkpoint(size):
    def run(folder, fill_at=None, **settings):
        class Fill(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == fill_at:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        saves = {"output_dir": folder, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        callbacks = [LayerPruningCallback(target_layers=4, calibration=examples(4)), Fill()]
        trainer = make_trainer(make_model(), callbacks=callbacks, **saves)
        with full_at(resource.RLIM_INFINITY):
            trainer.train(**settings)
        return trainer.model.state_dict()

    expected = run("whole")
    with pytest.raises((LayerPruneError, OSError)) as caught:
        run("full", fill_at=1)
    assert "File too large" in str(caught.value) or "inline_container" in str(
        caught.value
    )  # as torch says it
    if size > 500:
        assert "The last whole one: full/checkpoint-1." in str(caught.value)
    assert last_checkpoint("full") == "full/checkpoint-1"
    found = run("full", resume_from_checkpoint=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_cannot_be_saved_goes_where_there_is_room(tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    Path("taken").write_text("a file, where a folder is to be")
    with pytest.raises(LayerPruneError, match=r"safe in .*elsewhere/taken-\d+/rescued\.safetensors"):
        save_model(model, "taken")
    [rescued] = (tmp_path / "elsewhere").glob("*/*")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in load_file(rescued).items())
    with full_at(100_000), pytest.raises(LayerPruneError, match=r"too large.* only in memory"):
        save_model(model, "later")
    save_model(model, "later")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder in which nobody can write")
def test_a_folder_that_cannot_be_written_to_is_found_before_any_work():
    trainer = make_trainer(make_model(), output_dir="/proc")
    with pytest.raises(LayerPruneError, match="Cannot write to the output folder /proc"):
        trainer.train()
    with pytest.raises(LayerPruneError, match="Cannot write to the output folder /proc"):
        check_folder_is_free("/proc")


def test_a_hub_that_cannot_be_reached_loses_nothing(monkeypatch, tokenizer):
    """No server answers at this address."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: HfApi("http://127.0.0.1:9", token="hf_none"))
    with pytest.raises(LayerPruneError, match=r"No repository can be made on the hub: .*refused"):
        make_trainer(make_model(), push_to_hub=True, hub_model_id="me/cut")
    callbacks = [LayerPruningCallback(target_layers=5, calibration=examples(4))]
    trainer = make_trainer(make_model(), callbacks=callbacks, processing_class=tokenizer, max_steps=1)
    trainer.train()
    with pytest.raises(LayerPruneError, match=r"Not pushed: .*refused.* is saved in out: .*hf upload"):
        trainer.push_to_hub()
    again = AutoModelForCausalLM.from_pretrained("out")
    assert all(torch.equal(again.state_dict()[n], v) for n, v in trainer.model.state_dict().items())
    assert "layer-pruning" in Path("out/README.md").read_text()
    assert Path("out/tokenizer.json").exists()


@pytest.mark.faults
def test_a_hub_that_goes_away_in_training_does_not_stop_it(monkeypatch):
    """A push from a checkpoint is made beside the training, and made again with the next."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: HfApi("http://127.0.0.1:9", token="hf_none"))
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", "me/cut"))
    saves = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(make_model(), **saves)
    trainer.push_in_progress = None
    trainer.train()
    assert trainer.state.global_step == 2
    assert last_checkpoint("out") == "out/checkpoint-2"


def test_a_checkpoint_that_is_another_model_says_all_that_is_to_say(llama):
    llama.model.layers[0].self_attn.scaling *= 2  # nothing in the config says so
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "output_dir": "a-folder-" + 60 * "x"}
    with pytest.raises(LayerPruneError) as caught:
        make_trainer(llama, **saves).train()
    for part in (
        "saved model differs",
        "safe in a-folder-",
        "Please report this",
        "last whole one: none",
    ):
        assert part in str(caught.value)
