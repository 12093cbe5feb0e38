"""What only a GPU can show. Each part fits in ten minutes and writes PART.json into OUTPUT.

    python examples/benchmarks/gpu.py checks OUTPUT
    python examples/benchmarks/gpu.py speed OUTPUT [--shape qwen3b] [--steps 6]
    python examples/benchmarks/gpu.py heal OUTPUT --model MODEL --tokens TOKENS.npy --seconds 300 [--keep 23]

- checks: GPU and CPU agree on scores, losses, gradients and reconstruction; a resumed run, LoRA and compiled
  layers work on the GPU.
- speed: step time, share of the peak FLOP/s and peak memory of distillation (also compiled) and of a plain
  Trainer, and the time to score all layers, for a model of a given shape with random weights.
- heal: the steps of the default recipe on MODEL, with the longest training that fits in so many seconds.

TOKENS.npy holds token ids, `(rows, length)`. `--tiny` uses a tiny model and data instead, also on a CPU.
"""

import argparse
import copy
import json
import statistics
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruningCallback,
    copying,
    evaluate_text,
    prune,
    reconstruct_layers,
    remove_layers,
    score_layers,
)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEAK_FLOPS = 989e12  # bfloat16 on one H100 or H200, dense
SHAPES = {
    "tiny": (Qwen2Config, {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}),
    "qwen3b": (Qwen2Config, {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}),
    "llama1b": (LlamaConfig, {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}),
    "llama8b": (LlamaConfig, {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
}
MORE = {
    "tiny": {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "qwen3b": {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    "llama1b": {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama8b": {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}
TIED = ("tiny", "qwen3b", "llama1b")


def random_model(shape, dtype=torch.float32, device=DEVICE):
    kind, sizes = SHAPES[shape]
    config = kind(**sizes, **MORE[shape], tie_word_embeddings=shape in TIED, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(device):
        model = (Qwen2ForCausalLM if kind is Qwen2Config else LlamaForCausalLM)(config)
    return model.to(dtype).eval()


def random_rows(model, rows, length):
    ids = torch.randint(
        0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)
    )
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def settings(folder, **changes):
    given = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": DEVICE == "cpu",
    }
    return given | changes


def batches_of(data, size, device):
    return [
        {"input_ids": torch.tensor(data[i : i + size]["input_ids"], device=device)}
        for i in range(0, len(data), size)
    ]


# --- checks ---


def difference(found, expected):
    found, expected = (torch.as_tensor(x).double().cpu().flatten() for x in (found, expected))
    return float((found - expected).norm() / expected.norm())


def on_both(compute):
    """What `compute(model, batches)` returns on the CPU and on the GPU, and how far they differ."""
    found = []
    for device in ("cpu", DEVICE):
        model = random_model("tiny", device="cpu").to(device)
        found.append(compute(model, batches_of(random_rows(model, 16, 64), 4, device)))
    return difference(*found)


def check_scores(criterion):
    def compute(model, batches):
        table = score_layers(model, batches, criterion, progress=False)
        return torch.tensor([table.scores[layer] for layer in sorted(table.scores)])

    return on_both(compute)


def check_step(folder, **changes):
    """How far the weights are from those of the CPU after three steps."""
    found = []
    for device in ("cpu", DEVICE):
        student = random_model("tiny", device="cpu")
        teacher = copy.deepcopy(student)
        remove_layers(student, [2, 3])
        args = DistillationTrainingArguments(
            **settings(folder, use_cpu=device == "cpu", max_steps=3, **changes)
        )
        data = random_rows(student, 12, 64)
        trainer = DistillationTrainer(student, args, train_dataset=data, teacher_model=teacher)
        trainer.train()
        found.append(torch.cat([p.detach().flatten().float().cpu() for p in student.parameters()]))
    return difference(*found)


# A CPU compiles for a minute with inductor.
COMPILED = {"torch_compile": True, "torch_compile_backend": "inductor" if DEVICE == "cuda" else "aot_eager"}


def check_compiled(folder):
    return check_step(folder, **COMPILED)


def check_reconstruction():
    def compute(model, batches):
        teacher = copy.deepcopy(model)
        remove_layers(model, [2, 3])
        result = reconstruct_layers(model, teacher, batches, epochs=2, progress=False)
        return torch.tensor([result.windows[0].error_after, result.kl_after])

    return on_both(compute)


def check_resumed(folder):
    """How far the weights of a resumed run are from those of one that was not stopped."""
    found = []
    for stop in (None, 2):
        torch.manual_seed(0)
        place = Path(folder) / f"resumed_{stop}"
        for resume in (False, True) if stop else (False,):
            student = random_model("tiny")
            data = random_rows(student, 16, 64)
            given = settings(place, max_steps=4, save_strategy="steps", save_steps=2)
            trainer = DistillationTrainer(
                student,
                DistillationTrainingArguments(**given),
                train_dataset=data,
                callbacks=[
                    LayerPruningCallback(target_layers=4, calibration=data),
                    Stop(None if resume else stop),
                ],
            )
            trainer.train(resume_from_checkpoint=resume)
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    return difference(found[1], found[0])


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def check_lora(folder, dtype, bf16):
    """Adapters train and are saved; the loss stays finite."""
    from peft import LoraConfig

    student = random_model("tiny", dtype)
    data = random_rows(student, 16, 64)
    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(**settings(Path(folder) / f"lora_{dtype}_{bf16}", bf16=bf16)),
        train_dataset=data,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[LayerPruningCallback(target_layers=5, calibration=data)],
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history[0]["loss"] * 0.0


def checks(options):
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = options.output / "checks"
    todo = {
        f"scores: {name}": (check_scores, [name], 1e-3)
        for name in ("loss", "kl", "block_influence", "taylor")
    }
    todo |= {
        "weights after three steps": (check_step, [folder], 1e-3),
        "weights after three steps, hidden states": (
            lambda f: check_step(f, hidden_weight=1.0),
            [folder],
            1e-3,
        ),
        "weights after three compiled steps": (check_compiled, [folder], 1e-3),
        "reconstruction": (check_reconstruction, [], 1e-3),
        "a resumed run": (check_resumed, [folder], 1e-4),
    }
    todo |= {
        f"LoRA, {str(dtype)[6:]} base, bf16={bf16}": (check_lora, [folder, dtype, bf16], 0.0)
        for dtype in (torch.float32, torch.bfloat16)
        for bf16 in (False, True)
    }
    found = {}
    for name, (check, arguments, limit) in todo.items():
        try:
            value = check(*arguments)
            found[name] = {"difference": value, "ok": value <= limit}
        except Exception as error:  # the other checks go on
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}", "ok": False}
        print(name, found[name], flush=True)
    return found


# --- speed ---


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now() - self.began)


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib():
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None


def step_flops(student, teacher, tokens):
    """Six operations for each trained weight and two for each of the teacher's, without attention."""
    return tokens * (6 * student.num_parameters() + (2 * teacher.num_parameters() if teacher else 0))


def time_steps(options, batch, length, distil, **more):
    student = random_model(options.shape)
    teacher = random_model(options.shape, torch.bfloat16) if distil else None
    remove_layers(student, [2, 3])
    student.train()
    data = random_rows(student, batch * options.steps, length)
    given = settings(
        options.output / "speed",
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        bf16=True,
        **more,
    )
    clock = Clock()
    common = {"train_dataset": data, "callbacks": [clock]}
    if distil:
        trainer = DistillationTrainer(
            student, DistillationTrainingArguments(**given), teacher_model=teacher, **common
        )
    else:
        trainer = Trainer(student, TrainingArguments(**given), data_collator=default_data_collator, **common)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = statistics.median(clock.seconds[2:])
    return {
        "step_seconds": seconds,
        "tokens_per_second": batch * length / seconds,
        "share_of_peak_flops": step_flops(student, teacher, batch * length) / seconds / PEAK_FLOPS,
        "peak_gib": peak_gib(),
        "steps": clock.seconds,
    }


def free():
    import gc

    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def speed(options):
    batch, length = (2, 32) if options.tiny else (4, 2048)
    found = {"shape": options.shape, "batch": batch, "length": length}
    kinds = {
        "distillation": {"distil": True},
        "compiled distillation": {"distil": True, **COMPILED},
        "plain Trainer": {"distil": False},
    }
    for name, kind in kinds.items():
        found[name] = time_steps(options, batch, length, **kind)
        print(name, found[name], flush=True)
        free()
    model = random_model(options.shape, torch.bfloat16)
    batches = batches_of(random_rows(model, 4 * batch, length), batch, DEVICE)
    began = now()
    score_layers(model, batches, progress=False)
    found["scoring"] = {"seconds": now() - began, "tokens": 4 * batch * length}
    print("scoring", found["scoring"], flush=True)
    return found


# --- heal ---


def heal(options):
    if options.tiny:
        model, tokenizer = random_model("tiny"), None
        rows = np.random.default_rng(0).integers(0, 512, (64, 32))
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(DEVICE)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        rows = np.load(options.tokens)
    length, batch = rows.shape[1], options.batch
    calibration, heldout = rows[:128], rows[128:192]
    if options.tiny:
        calibration, heldout = rows[:8], rows[8:12]
    train = rows[len(calibration) + len(heldout) :]
    given = {
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": min(batch, 16),
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "bf16": True,
        "logging_steps": 10,
        "dataloader_num_workers": 0 if options.tiny else 2,
    }
    seconds = measure_step(model, as_rows(train[: 8 * batch]), given, options)
    steps = max(2, int(options.seconds / seconds))
    steps = min(steps, options.most_tokens // (batch * length)) if options.most_tokens else steps
    print(f"{seconds:.3f} s a step: {steps} steps, {steps * batch * length} tokens", flush=True)
    folder = options.output / "healed"
    recipe = {
        "select": "block",
        "criterion": "block_influence",
        "replacement": "linear",
        "replacement_loss": "none",
        "reconstruction_layers": 1 if options.tiny else 3,
        "reconstruction_tokens": 2**20,
        "reconstruction_learning_rate": 2e-3,
        "calibration_sequences": len(calibration),
        "heldout_sequences": len(heldout),
    }
    model, run = prune(
        model,
        as_rows(rows),
        keep=4 if options.tiny else options.keep,
        recipe=recipe | settings(folder, max_steps=steps, **given),
        tokenizer=tokenizer or FakeTokenizer(),
    )
    record = run.to_dict()
    batches = batches_of(as_rows(heldout), 8, DEVICE)
    return {
        "tokens": steps * batch * length,
        "distinct_tokens": min(steps * batch, len(train)) * length,
        "seconds": record["seconds"],
        "reconstruction": record["phases"][-1]["reconstruction"],
        "healed": record["phases"][-1]["healed"],
        "text": evaluate_text(model, batches),
        "copying": copying(model, batches[:2]),
        "log": [one for one in record["log"] if "kl" in one],
        "peak_gib": peak_gib(),
    }


class FakeTokenizer:
    def save_pretrained(self, folder):
        pass


def as_rows(ids):
    ids = np.asarray(ids, dtype=np.int64)
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def measure_step(model, data, given, options):
    """Seconds of a distillation step with a copy of the model, median of six."""
    student = copy.deepcopy(model)
    remove_layers(student, [1, 2])
    clock = Clock()
    args = DistillationTrainingArguments(**settings(options.output / "measured", max_steps=8, **given))
    teacher = copy.deepcopy(model)
    DistillationTrainer(student, args, train_dataset=data, teacher_model=teacher, callbacks=[clock]).train()
    free()
    return statistics.median(clock.seconds[2:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["checks", "speed", "heal"])
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3b")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model")
    parser.add_argument("--tokens")
    parser.add_argument("--keep", type=int, default=23)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--most_tokens", type=int)
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.batch, options.seconds = "tiny", 4, min(options.seconds, 1.0)
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    began = time.monotonic()
    found = {"device": device, "torch": torch.__version__, options.part: globals()[options.part](options)}
    found["seconds"] = time.monotonic() - began
    (options.output / f"{options.part}.json").write_text(json.dumps(found, indent=1))
    print(json.dumps({name: value for name, value in found.items() if name != options.part}))


if __name__ == "__main__":
    main()
