"""The command `plan`, which estimates memory, FLOPs and time of a run from the config alone."""

from ..errors import LayerPruneError
from ..recipes.arguments import ModelArguments, TeacherArguments
from .common import parse
from .flags import LoraArguments, PlanArguments


def plan(arguments: list[str]) -> None:
    """Prints memory, FLOPs and time of distilling MODEL, from its config alone.

    usage: hf-layerprune plan MODEL --target_layers N [flags]
    example: hf-layerprune plan Qwen/Qwen3-0.6B --target_layers 20 --output_dir out
    """
    import torch

    from ..distillation.arguments import DistillationTrainingArguments
    from ..distillation.plan import GIB, check_device
    from ..pruning.arguments import PhaseSizeArguments
    from ..pruning.schedule import phase_sizes
    from ..pruning.target import resolve_target
    from ..recipes.run_plan import duration, plan_run, planned_model
    from ..reports.tables import markdown_table
    from ..surgery.decoder import layer_count, text_config

    kinds = [ModelArguments, TeacherArguments, LoraArguments, PlanArguments, PhaseSizeArguments]
    on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "True"]  # needed for bf16
    words = [*on_cpu, "--bf16", "True", *arguments]
    parsed = parse(plan, words, [*kinds, DistillationTrainingArguments])
    name, source, teacher, lora, output, removal, args = parsed
    device = check_device(output.device)
    model = planned_model(name, source, lora.lora_rank)
    removal = resolve_target(removal, model)
    layers, target = layer_count(text_config(model.config)), removal.target_layers
    if not 1 <= target < layers:
        raise LayerPruneError(
            f"target_layers is {target}, but the model has {layers} layers. Choose a value between 1 and "
            f"{layers - 1}."
        )
    start = layers - phase_sizes(layers, target, removal.layers_per_phase)[0]
    run = plan_run(
        model, args, target, start, teacher=teacher.teacher, trust_remote_code=source.trust_remote_code
    )
    training = run.training
    print(f"{name}: {layers} -> {target} layers, ", end="")
    print(f"{_count(training.parameters_before)} -> {_count(training.parameters_after)} parameters\n")
    rows = [[part, f"{size / GIB:.1f}"] for part, size in training.memory.items()]
    print(markdown_table([["memory", "GiB"], *rows, ["peak", f"{training.peak / GIB:.1f}"]]))
    if training.peak <= device.memory:
        print(f"\nThe peak fits {device.name} ({device.memory / GIB:.1f} GiB).")
    else:
        print(f"\nThe peak does not fit {device.name} ({device.memory / GIB:.1f} GiB). ", end="")
        print(run.advice(device.memory))
    before, after = (run.footprint.forward_flops(count) for count in (layers, target))
    print(f"A forward pass of the pruned model is {before / after:.2f} times as fast, by its FLOPs.")
    seconds = training.seconds(device.flops)
    print(f"A step of {training.step_tokens:,} tokens takes {training.step_flops / 1e12:.0f} TFLOP, ", end="")
    print(f"about {seconds:.2f} s at {device.flops / 1e12:.0f} TFLOP/s.")
    if args.max_steps > 0:
        print(f"{args.max_steps:,} steps take about {duration(args.max_steps * seconds)}.")


def _count(parameters: int) -> str:
    """Returns a number of parameters as text, such as 3.09B or 134.5M."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
