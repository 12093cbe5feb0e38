"""The command `plan`: memory, FLOPs and time of a run, from the config alone."""

from typing import Any

from ..errors import LayerPruneError
from ..recipes.arguments import ModelArguments
from .common import parse
from .flags import PlanArguments, TeacherArguments


def plan(arguments: list[str]) -> None:
    """Prints memory, FLOPs and time of distilling MODEL, from its config alone.

    usage: hf-layerprune plan MODEL --target_layers N [flags]
    example: hf-layerprune plan Qwen/Qwen3-0.6B --target_layers 20 --output_dir out
    """
    import torch

    from ..data.sequences import resolve_length
    from ..distillation.arguments import DistillationTrainingArguments
    from ..distillation.plan import check_device, measure_footprint, plan_training, settings_that_fit
    from ..pruning.arguments import PhaseSizeArguments
    from ..pruning.schedule import phase_sizes
    from ..reports.tables import markdown_table

    kinds = [ModelArguments, TeacherArguments, PlanArguments, PhaseSizeArguments]
    on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "True"]  # for bf16
    words = [*on_cpu, "--bf16", "True", *arguments]
    parsed = parse(plan, words, [*kinds, DistillationTrainingArguments])
    name, source, teacher, output, removal, args = parsed
    device = check_device(output.device)
    model = _meta_model(name, source, teacher.lora_rank)
    length = resolve_length(args.sequence_length, model.config)
    batch = args.per_device_train_batch_size
    footprint = measure_footprint(model, batch, length, args.bf16)
    if not 1 <= removal.target_layers < footprint.layers:
        raise LayerPruneError(
            f"target_layers is {removal.target_layers}, but the model has {footprint.layers} layers. Choose "
            f"a value between 1 and {footprint.layers - 1}."
        )
    first = phase_sizes(footprint.layers, removal.target_layers, removal.layers_per_phase)[0]
    settings = _settings(args, model.dtype.itemsize, teacher)
    depths = removal.target_layers, footprint.layers - first
    planned = plan_training(footprint, settings, *depths, length)
    print(f"{name}: {footprint.layers} -> {removal.target_layers} layers, ", end="")
    print(f"{_count(planned.parameters_before)} -> {_count(planned.parameters_after)} parameters\n")
    rows = [[part, f"{size / 2**30:.1f}"] for part, size in planned.memory.items()]
    print(markdown_table([["memory", "GiB"], *rows, ["peak", f"{planned.peak / 2**30:.1f}"]]))
    if planned.peak <= device.memory:
        print(f"\nThe peak fits {device.name} ({device.memory / 2**30:.1f} GiB).")
    else:
        changes = settings_that_fit(footprint, settings, *depths, length, device.memory)
        advice = (
            f"Add {' '.join(changes)}." if changes else "Use LoRA (--lora_rank 16), FSDP2 or a smaller batch."
        )
        print(f"\nThe peak does not fit {device.name} ({device.memory / 2**30:.1f} GiB). {advice}")
    seconds = planned.seconds(device.flops)
    print(f"A step of {planned.step_tokens:,} tokens takes {planned.step_flops / 1e12:.0f} TFLOP, ", end="")
    print(f"about {seconds:.2f} s at {device.flops / 1e12:.0f} TFLOP/s.")
    if args.max_steps > 0:
        print(f"{args.max_steps:,} steps take about {_duration(args.max_steps * seconds)}.")


def _meta_model(name: str, source: ModelArguments, lora_rank: int | None) -> Any:
    """Returns the model without weights, in the dtype of training, with its adapters.

    Raises:
        LayerPruneError: the model cannot be trained with these settings, or is to be quantised.
    """
    import torch

    from ..checkpoints.loading import load_meta_model
    from ..recipes.inputs import check_loading_for_training
    from ..surgery.decoder import check_next_token

    check_loading_for_training(source, all_weights=lora_rank is None)
    if source.quantized:
        raise LayerPruneError(
            f"{source.quantized} is set, but the memory of quantised weights is not planned. Leave it out: "
            "the run needs less than the plan for bfloat16."
        )
    model: Any = load_meta_model(name, source.trust_remote_code, source.gguf_file)
    check_next_token(model, "plan")
    model = model.to(torch.float32 if source.dtype == "auto" else getattr(torch, source.dtype))
    if lora_rank is None:
        return model
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=lora_rank, target_modules="all-linear"))


def _settings(args: Any, weight_bytes: int, teacher: TeacherArguments) -> Any:
    """Returns the settings that decide the memory of a run. Adapters share the teacher's weights, and cached
    logits need no teacher. Any other teacher is assumed to be as large as the model."""
    from pathlib import Path

    from ..distillation.plan import TrainingSettings
    from ..distillation.teacher_cache import HEAD

    cached = teacher.teacher is not None and (Path(teacher.teacher) / HEAD).is_file()
    shared = teacher.lora_rank is not None and teacher.teacher is None
    return TrainingSettings(
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        bf16=args.bf16,
        activation_checkpointing=args.activation_checkpointing,
        optim=str(getattr(args.optim, "value", args.optim)),
        weight_bytes=weight_bytes,
        teacher_bytes=0 if shared or cached else 2 if args.bf16 else weight_bytes,
        teacher_runs=not cached,
    )


def _duration(seconds: float) -> str:
    """Returns a time as text."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _count(parameters: int) -> str:
    """Returns a number of parameters as text, such as 3.09B or 134.5M."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
