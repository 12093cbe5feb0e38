"""Estimates the memory and time of a training run from the configs, before any weights are loaded."""

import logging
import math
import os
import time
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..checkpoints.loading import load_meta_model
from ..data.sequences import resolve_length
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.plan import (
    GIB,
    Footprint,
    TrainingPlan,
    TrainingSettings,
    check_device,
    measure_footprint,
    plan_training,
    settings_that_fit,
)
from ..distillation.teacher_cache import is_teacher_cache
from ..errors import LayerPruneError
from ..forward.memory import free_gpu_memory
from ..pruning.arguments import PruningArguments
from ..pruning.schedule import phase_sizes
from ..pruning.target import resolve_target
from ..surgery.decoder import check_next_token, layer_count, text_config
from ..surgery.peft import base_of
from .arguments import ModelArguments
from .inputs import check_loading_for_training, check_stored_weights


logger = logging.getLogger(__name__)

CPU_SHARE = 0.5  # share of the matrix product speed that a distillation step reaches on a CPU


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run on one device.

    Args:
        footprint ([`Footprint`]): footprint of the model with all layers.
        settings ([`TrainingSettings`]): the settings that determine the memory of the run.
        target_layers (`int`), start_layers (`int`): number of layers of the pruned model, and at the start of
            training.
        length (`int`): number of tokens in a sequence.
        phases (`int`, *optional*, defaults to 1): number of removals with training after each.
    """

    footprint: Footprint
    settings: TrainingSettings
    target_layers: int
    start_layers: int
    length: int
    phases: int = 1

    def reconstruction_flops(self, pruning: PruningArguments, tokens: float, rows: int | None) -> float:
        """Returns the FLOPs of all reconstructions in a run that trains on `tokens` tokens.

        The teacher reads the tokens once. A backward pass takes as many FLOPs as two forward passes. A
        reconstruction reads each of the `rows` sequences at most once.
        """
        most = math.inf if rows is None else rows * self.length
        read = min(tokens / self.phases, most, pruning.reconstruction_tokens or math.inf) * self.phases
        trained = min(2 * pruning.reconstruction_layers, self.target_layers)
        passes = self.footprint.layers + 3 * trained * pruning.reconstruction_epochs
        return passes * self.footprint.layer_flops * read / (self.settings.batch * self.length)

    @property
    def training(self) -> TrainingPlan:
        """Returns the memory, FLOPs and tokens of a step."""
        depths = self.target_layers, self.start_layers
        return plan_training(self.footprint, self.settings, *depths, self.length)

    def advice(self, memory: float) -> str:
        """Returns a sentence with the settings that make the run fit into `memory` bytes."""
        depths = self.target_layers, self.start_layers
        changes = settings_that_fit(self.footprint, self.settings, *depths, self.length, memory)
        if changes:
            return f"Add {' '.join(changes)}."
        return "Use a smaller batch, FSDP2, or LoRA (`distill --lora_rank 16`)."


def planned_model(name: str, source: ModelArguments, lora_rank: int | None) -> Any:
    """Returns a model without weights, in the dtype of training, with its adapters.

    Raises:
        LayerPruneError: the model cannot be trained with these settings, or it would be quantised.
    """
    check_loading_for_training(source, all_weights=lora_rank is None)
    if source.quantized:
        raise LayerPruneError(
            f"{source.quantized} is set, but the memory of quantised weights is not planned. Leave it out: "
            "the run needs less than the plan for bfloat16."
        )
    model: Any = load_meta_model(name, source.trust_remote_code, source.gguf_file)
    check_next_token(model, "plan")
    if lora_rank is None:
        check_stored_weights(model.config, name)
    model = model.to(torch.float32 if source.dtype == "auto" else getattr(torch, source.dtype))
    if lora_rank is None:
        return model
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=lora_rank, target_modules="all-linear"))


def plan_run(
    model: PreTrainedModel,
    args: DistillationTrainingArguments,
    target_layers: int,
    start_layers: int,
    *,
    teacher: str | None = None,
    trust_remote_code: bool = False,
    on_cpu: bool = False,
) -> RunPlan:
    """Plans a distillation run.

    Args:
        model (`PreTrainedModel` or `PeftModel`): see [`planned_model`]. It cannot be used afterwards.
        args ([`DistillationTrainingArguments`]): the settings of the run.
        target_layers, start_layers (`int`): see [`RunPlan`].
        teacher (`str`, *optional*): folder or hub id of the teacher, or a cache of [`cache_teacher_logits`].
            Default: the model itself. A model with adapters shares its weights with this teacher.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the code that comes with the teacher.
        on_cpu (`bool`, *optional*, defaults to `False`): whether the run is on a CPU.

    Raises:
        LayerPruneError: the teacher does not exist, or a model cannot run without values.
    """
    weight_bytes, with_adapters = model.dtype.itemsize, hasattr(model, "peft_config")
    batch, length = args.per_device_train_batch_size, resolve_length(args.sequence_length, model.config)
    is_cached = teacher is not None and is_teacher_cache(teacher)
    other = None
    if teacher is not None and not is_cached:
        meta_teacher: Any = load_meta_model(teacher, trust_remote_code)
        other = measure_footprint(meta_teacher.to(model.dtype), batch, length, args.bf16)
    # With adapters, a teacher that is the model itself shares its weights. Other teachers keep their dtype.
    is_held_in_16_bits = args.bf16 and not with_adapters
    teacher_bytes = 2 if is_held_in_16_bits else weight_bytes
    if is_cached or (with_adapters and teacher is None):
        teacher_bytes = 0
    settings = TrainingSettings(
        batch=batch,
        accumulation=args.gradient_accumulation_steps,
        bf16=args.bf16,
        activation_checkpointing=bool(args.activation_checkpointing),
        optim=str(getattr(args.optim, "value", args.optim)),
        weight_bytes=weight_bytes,
        teacher_bytes=teacher_bytes,
        teacher_runs=not is_cached,
        teacher=other,
        on_cpu=on_cpu,
    )
    footprint = measure_footprint(model, batch, length, args.bf16)
    return RunPlan(footprint, settings, target_layers, start_layers, length)


def announce_plan(
    name: str,
    source: ModelArguments,
    pruning: PruningArguments,
    args: DistillationTrainingArguments,
    train: Any,
    *,
    select: str = "phases",
    teacher: str | None = None,
    lora_rank: int | None = None,
    given: Container[str] = (),
) -> None:
    """Logs the memory and time of a distillation run before its weights are loaded, see [`log_plan`].

    Sets `activation_checkpointing` in `args`, in place, if a run on one GPU only fits with it.

    Nothing is logged for runs that cannot be planned: quantised weights, and weights that are sharded over
    processes. The checks of the run handle wrong settings.

    Args:
        name (`str`): folder or hub id of the model.
        source ([`ModelArguments`]): settings of model loading.
        pruning ([`PruningArguments`]): settings of the number of layers to remove.
        args ([`DistillationTrainingArguments`]): the settings of the run.
        train (`Dataset` or stream): the rows to train on.
        select (`str`, *optional*, defaults to `"phases"`): the selection of layers, see [`RecipeArguments`].
        teacher, lora_rank (*optional*): see [`plan_run`] and [`planned_model`].
        given (container of `str`, *optional*): names of the settings that the user chose. They stay.
    """
    on_cpu = not torch.cuda.is_available() or args.use_cpu
    shares = bool(
        args.fsdp or args.deepspeed or {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & {*os.environ}
    )
    is_heard = logger.isEnabledFor(logging.INFO if on_cpu else logging.WARNING)
    if shares or source.quantized or (on_cpu and not is_heard) or args.local_process_index:
        return
    try:
        model = planned_model(name, source, lora_rank)
        recomputes = base_of(model).supports_gradient_checkpointing
        layers, target = layer_count(text_config(model.config)), resolve_target(pruning, model).target_layers
        sizes = phase_sizes(layers, target, pruning.layers_per_phase) if select == "phases" else []
        start = layers - sizes[0] if sizes else target
        trust = source.trust_remote_code
        plan = plan_run(model, args, target, start, teacher=teacher, trust_remote_code=trust, on_cpu=on_cpu)
        plan = replace(plan, phases=len(sizes) or 1)
    except Exception as error:  # a failed estimate must not end the run
        logger.debug("The run is not planned: %s", error)
        return
    chosen = "activation_checkpointing" in given or not recomputes or not _is_exact(args, train)
    if not on_cpu and not chosen:
        plan = _recompute_to_fit(plan, args)
    log_plan(plan, args, len(train) if isinstance(train, Dataset) else None, pruning)


def _is_exact(args: DistillationTrainingArguments, train: Any) -> bool:
    """Returns whether the plan counts all that a run needs, and no more.

    It counts all weights as trained, bfloat16 or float32 activations, and rows of `sequence_length` tokens.
    """
    has_pictures = isinstance(train, Dataset) and "input_ids" not in train.column_names
    return args.trainable == "all" and not args.fp16 and not has_pictures


def _recompute_to_fit(plan: RunPlan, args: DistillationTrainingArguments) -> RunPlan:
    """Sets activation checkpointing in `args`, in place, if the run only fits into the free memory of the GPU
    with it. Returns the plan of the run.

    With several processes nothing is changed: each has its own free memory, but all need the same settings.
    """
    if args.activation_checkpointing or args.torch_compile or args.world_size > 1:
        return plan
    free = free_gpu_memory(torch.device("cuda")) or 0
    recomputing = replace(plan, settings=replace(plan.settings, activation_checkpointing=True))
    if not recomputing.training.peak <= free < plan.training.peak:
        return plan
    args.activation_checkpointing = True
    logger.warning(
        "activation_checkpointing is set, because training would need %.1f GiB without it and %.1f GiB are "
        "free. Steps take about a third longer. A smaller batch may fit without it.",
        plan.training.peak / GIB,
        free / GIB,
    )
    return recomputing


def log_plan(
    plan: RunPlan,
    args: DistillationTrainingArguments,
    rows: int | None,
    pruning: PruningArguments | None = None,
) -> None:
    """Logs three lines: memory, time, and the settings to change if there is too little memory.

    The lines are warnings if the GPU is too small.

    Args:
        plan ([`RunPlan`]): the plan.
        args ([`DistillationTrainingArguments`]): the settings of the run.
        rows (`int`, *optional*): number of sequences to train on, if it is known.
        pruning ([`PruningArguments`], *optional*): the settings of reconstruction.
    """
    training, settings = plan.training, plan.settings
    if settings.on_cpu:
        name, free = "of RAM", psutil.virtual_memory().available
        speed = CPU_SHARE * matmul_speed(torch.bfloat16 if settings.bf16 else torch.float32)
    else:
        device = check_device(None)
        name, speed = f"on {device.name}", device.flops
        free = free_gpu_memory(torch.device("cuda")) or 0
    fits = training.peak <= free
    level = logging.INFO if fits or settings.on_cpu else logging.WARNING
    steps = args.max_steps
    if steps <= 0 and rows is not None:
        batches = math.ceil(rows / (settings.batch * args.world_size))
        steps = math.ceil(args.num_train_epochs * math.ceil(batches / settings.accumulation))
    words = f"{steps:,} step{'s' * (steps > 1)}" if steps > 0 else "A step"
    words += f" of {training.step_tokens:,} tokens"
    if settings.on_cpu or settings.bf16 or args.fp16:  # the GPU speeds are for 16 bits
        words += f", about {duration(max(1, steps) * training.seconds(speed))}"
        if pruning is not None and pruning.reconstruction_layers and steps > 0:
            flops = plan.reconstruction_flops(pruning, steps * training.step_tokens, rows)
            words += f", and about {duration(flops / speed)} of reconstruction"
    memory = f"about {training.peak / GIB:.1f} GiB, {free / GIB:.1f} GiB {name} are free"
    logger.log(level, "Memory: training needs %s.", memory)
    logger.log(level, "Time: %s.", words)
    logger.log(level, "The run should fit." if fits else f"The run may not fit. {plan.advice(free)}")


def matmul_speed(dtype: torch.dtype) -> float:
    """Measures the FLOP/s of matrix products on this CPU. Takes a fraction of a second."""
    size = 512
    with torch.random.fork_rng(devices=[]):
        factor = torch.rand(size, size).to(dtype)
    factor @ factor  # warm-up: the first product is slower
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < 0.05:
        factor @ factor
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - began)


def duration(seconds: float) -> str:
    """Returns a time as text."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
