"""How fast is a step of distillation, and what memory does it need above the weights?

    python examples/benchmarks/distill_step.py TEXT.jsonl FOUND.json [BATCH] [LENGTH] [STEPS] [NAME=PYTHON...]

Each way runs in a process of its own, one after the other: SmolLM2-135M with layers 14 and 17 removed learns
from the whole one, in bfloat16 autocast, with plain SGD, so that no optimizer's memory counts. A NAME=PYTHON
runs a peer with that interpreter, in which it is installed: trl, modelopt, silverspoon.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


PACKAGES = {"trl": "trl", "modelopt": "nvidia-modelopt", "silverspoon": "silverspoon-kd"}
OURS = ("plain Trainer, no teacher", "all", "all, compiled", "around_cuts", "last 4", "lora", "written")


class Clock(TrainerCallback):
    """Times each step but the last, in which it follows what is allocated: to the byte and the same in every
    run, unlike the memory of the process, of which the C library keeps back some."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.last = state.global_step == state.max_steps - 1
        if self.last:
            self.profile = torch.profiler.profile(profile_memory=True)
            self.profile.__enter__()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.last:
            self.profile.__exit__(None, None, None)
        else:
            self.steps.append(time.perf_counter() - self.began)

    def peak(self):
        """MiB that the step held above what was there when it began."""
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        where = torch._C._autograd.DeviceType.CUDA if torch.cuda.is_available() else events[0].device_type()
        events = sorted((e for e in events if e.device_type() == where), key=lambda e: e.start_ns())
        return max(itertools.accumulate(e.nbytes() for e in events)) / 2**20


def make_trainer(name, folder, dataset, settings, callbacks):
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / which) for which in ("cut", "whole"))
    given = {"train_dataset": dataset, "callbacks": callbacks}
    if name == OURS[0]:
        return Trainer(student, TrainingArguments(**settings), **given)
    if name == "trl":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        off_policy = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "gradient_checkpointing": False}
        args = GKDConfig(**settings, **off_policy, dataset_kwargs={"skip_prepare_dataset": True})
        given |= {"processing_class": AutoTokenizer.from_pretrained(folder / "whole")}
        return GKDTrainer(student, teacher, args=args, data_collator=collate, **given)
    if name == "modelopt":
        from modelopt.torch.distill.plugins.huggingface import KDTrainer

        args = TrainingArguments(**settings)
        return KDTrainer(student, args=args, distill_args={"teacher_model": teacher}, **given)
    if name == "silverspoon":
        import silverspoon_kd

        args = silverspoon_kd.TrainingArguments(**settings)
        return silverspoon_kd.ResponseBasedDistiller(student, teacher, args=args, **given)
    from hf_layerprune import (
        DistillationTrainer,
        DistillationTrainingArguments,
        cache_teacher_logits,
        remove_layers,
    )

    if name == "lora":  # the model's own weights teach
        from peft import LoraConfig

        del student
        args, config = DistillationTrainingArguments(**settings), LoraConfig(target_modules="all-linear", r=8)
        trainer = DistillationTrainer(teacher, args, peft_config=config, **given)
        remove_layers(trainer.model, [14, 17])
        return trainer
    if name == "written":  # the teacher's 64 likeliest tokens, from the disk
        said = str(folder / "said")
        cache_teacher_logits(teacher, DataLoader(dataset, 4, collate_fn=default_data_collator), said)
        del teacher
        return DistillationTrainer(
            student, DistillationTrainingArguments(**settings), teacher_model=said, **given
        )
    what, _, compiled = name.removeprefix("last ").partition(", ")
    args = DistillationTrainingArguments(**settings, trainable=what, torch_compile=bool(compiled))
    return DistillationTrainer(student, args, teacher_model=teacher, **given)


def collate(rows):
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def run_one(name, folder, batch, length, steps):
    from datasets import Dataset

    blocks = json.loads((folder / "blocks.json").read_text())
    clock = Clock()
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "optim": "sgd",
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    dataset = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    trainer = make_trainer(name, folder, dataset, settings, [clock])
    models = [
        trainer.model,
        *(getattr(trainer, n, None) for n in ("teacher", "teacher_model", "_teacher_model")),
    ]
    models = [model for model in models if isinstance(model, torch.nn.Module)]
    held = {p.data_ptr(): p.nbytes for model in models for p in model.parameters()}
    trainer.train()
    found = {
        "seconds": statistics.median(clock.steps[1:]),
        "weights_mb": sum(held.values()) / 2**20,
        "peak_mb": clock.peak(),
        "version": version(PACKAGES[name]) if name in PACKAGES else None,
    }
    print(json.dumps(found))


def bound(folder, tokens):
    """Tokens a second if nothing took time but the matrix products of a full step, at the rate that products
    of the model's own shapes reach here: two operations for each weight forward, four backward."""
    whole, cut = (AutoConfig.from_pretrained(folder / which) for which in ("whole", "cut"))
    width, inner, words = whole.hidden_size, whole.intermediate_size, whole.vocab_size
    keys = whole.num_key_value_heads * whole.head_dim
    layer = 2 * width * whole.num_attention_heads * whole.head_dim + 2 * width * keys + 3 * width * inner
    teacher, student = (config.num_hidden_layers * layer + words * width for config in (whole, cut))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states, weight = (
        torch.randn(*size, device=device).bfloat16() for size in ((tokens, width), (width, inner))
    )
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(10):
            states @ weight
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / 10)
    rate = 2 * tokens * width * inner / statistics.median(seconds)
    return rate / (2 * teacher + 6 * student), rate


def prepare(folder, text, batch, length, steps):
    from hf_layerprune import load_embedded_model, load_texts, remove_layers, save_model, token_sequences

    model, tokenizer = load_embedded_model()
    tokenizer.save_pretrained(folder / "whole")
    save_model(model, folder / "whole", verify=False)
    remove_layers(model, [14, 17])
    save_model(model, folder / "cut", verify=False)
    blocks = token_sequences(load_texts(text), tokenizer, length, limit=batch * steps)
    (folder / "blocks.json").write_text(json.dumps(list(blocks["input_ids"])))
    versions = {name: version(name) for name in ("torch", "transformers", "hf-layerprune")}
    machine = {"device": str(model.device), "cpu_threads": torch.get_num_threads()}
    return {"versions": versions, "machine": machine}


def main():
    text, target, *rest = sys.argv[1:]
    peers = dict(one.split("=", 1) for one in rest if "=" in one)
    sizes = [int(one) for one in rest if "=" not in one]
    batch, length, steps = [*sizes, *(4, 256, 6)[len(sizes) :]]
    ways = dict.fromkeys(OURS, sys.executable) | peers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = {
            "batch": batch,
            "length": length,
            **prepare(folder, text, batch, length, steps),
            "rows": [],
        }
        most, rate = bound(folder, batch * length)
        print(f"{batch} x {length} tokens, {torch.get_num_threads()} threads, {steps} steps", end="; ")
        print(f"matrix products at {rate / 1e9:.0f} GFLOP/s bound a full step at {most:.0f} tokens/s")
        print(f"{'':26s} {'tokens/s':>9s} {'weights MB':>11s} {'peak above MB':>14s}", flush=True)
        for way, python in ways.items():
            command = [python, __file__, "--one", way, name, str(batch), str(length), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{way:26s} failed: {done.stderr.strip().splitlines()[-1][:200]}", flush=True)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            speed = batch * length / found["seconds"]
            print(f"{way:26s} {speed:9.0f} {found['weights_mb']:11.0f} {found['peak_mb']:14.0f}", flush=True)
            measured["rows"].append({"way": way, "tokens_per_second": round(speed, 1), **found})
    Path(target).write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        way, name, *sizes = sys.argv[2:]
        run_one(way, Path(name), *map(int, sizes))
    else:
        main()
