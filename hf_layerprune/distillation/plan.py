"""Estimates the memory by part, the FLOPs and the time of a training run from the config alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # private: torch has no public name for this
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from ..errors import LayerPruneError
from ..surgery.decoder import find_decoder, text_config
from ..surgery.peft import base_of
from .tiled_loss import LOGITS_PER_CHUNK_CPU, LOGITS_PER_CHUNK_GPU


GIB = 2**30
MFU = 0.33  # model FLOPs utilization that a Qwen2.5-3B distillation step reached on an H200
TILE_COPIES = 6  # float32 tensors of one tile of logits that the loss and its gradient hold at once
# Memory in GiB and dense 16-bit TFLOP/s from the vendors' data sheets.
DEVICES = {
    "l4-24gb": (22.5, 121),
    "rtx4090-24gb": (23.6, 165),
    "a100-40gb": (39.5, 312),
    "l40s-48gb": (44.5, 362),
    "a100-80gb": (79.2, 312),
    "h100-80gb": (79.2, 989),
    "h200-141gb": (139.8, 989),
}
# Bytes of optimizer state per trained parameter.
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "lion_32bit": 4, "paged_lion_32bit": 4}


@dataclass(frozen=True)
class Footprint:
    """The memory that a forward pass of a model saves for the backward pass, and the FLOPs of the pass.

    Args:
        layers (`int`): number of decoder layers in the model.
        saved_by_layer (`float`): bytes that one layer saves on average.
        saved_elsewhere (`int`): bytes that the rest of the model saves, without the LM head.
        layer_input (`int`): bytes of the input of one layer.
        layer_flops (`float`): forward FLOPs of one layer on average.
        head_flops (`float`): forward FLOPs of the LM head.
        layer_parameters (`float`), trained_by_layer (`float`): number of parameters and of trained parameters
            in one layer on average.
        parameters (`int`), trained (`int`): number of parameters and of trained parameters in the model.
        head_parameters (`int`), trains_head (`bool`): number of parameters in the LM head, and whether they
            are trained.
        logits (`int`): number of logits of the batch.
    """

    layers: int
    saved_by_layer: float
    saved_elsewhere: int
    layer_input: int
    layer_flops: float
    head_flops: float
    layer_parameters: float
    trained_by_layer: float
    parameters: int
    trained: int
    head_parameters: int
    trains_head: bool
    logits: int

    def forward_flops(self, layers: int) -> float:
        """Returns the FLOPs of a forward pass with `layers` layers."""
        return layers * self.layer_flops + self.head_flops


@dataclass(frozen=True)
class TrainingPlan:
    """The memory, FLOPs and tokens of one optimizer step on one device.

    Args:
        parameters_before (`int`), parameters_after (`int`): number of parameters of the model before and
            after pruning.
        memory (`dict[str, float]`): bytes by part.
        peak (`float`): peak memory in bytes. It is less than the sum of all parts, because gradients grow
            while activations are freed.
        step_flops (`float`): FLOPs of one optimizer step.
        step_tokens (`int`): number of tokens in one optimizer step.
    """

    parameters_before: int
    parameters_after: int
    memory: dict[str, float]
    peak: float
    step_flops: float
    step_tokens: int

    def seconds(self, flops_per_second: float) -> float:
        """Returns the seconds of one optimizer step at a throughput in FLOP/s."""
        return self.step_flops / flops_per_second


def measure_footprint(model: PreTrainedModel, batch: int, length: int, bf16: bool) -> Footprint:
    """Runs a model on tensors without values and measures the memory that its backward pass would need.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a model on the meta device, in the dtype of training. It
            cannot be used afterwards: its tensors become tensors without values.
        batch (`int`), length (`int`): number of sequences in a batch, and of tokens in a sequence.
        bf16 (`bool`): whether to run under bfloat16 autocast.

    Raises:
        LayerPruneError: the model cannot run without values.
    """
    base: Any = base_of(model)
    decoder = find_decoder(base)
    config = text_config(base.config)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            base.tie_weights()  # the new tensors are not tied
            ids = torch.zeros(batch, length, dtype=torch.long)
            counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention())
            with (
                _saved_bytes(model) as saved,
                _marks(decoder.layers, saved) as marks,
                torch.autocast("cpu", torch.bfloat16, enabled=bf16),
                counter,
            ):
                states = base.base_model(input_ids=ids, use_cache=False)[0]
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise LayerPruneError(
            f"The memory of this {config.model_type} model cannot be planned: it does not run on tensors "
            f"without values ({str(error).splitlines()[0][:150]})."
        ) from error
    count, inside = len(decoder.layers), sum(after - before for before, after in marks)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder.layers]
    trained = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in decoder.layers]
    head = config.vocab_size * states.shape[-1]
    return Footprint(
        layers=count,
        saved_by_layer=inside / count,
        saved_elsewhere=sum(saved.values()) - inside,
        layer_input=states.numel() * states.element_size(),
        layer_flops=counter.get_total_flops() / count,
        head_flops=2 * head * batch * length,
        layer_parameters=sum(layers) / count,
        trained_by_layer=sum(trained) / count,
        parameters=sum(p.numel() for p in base.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        head_parameters=head,
        trains_head=any(p.requires_grad for p in base.get_output_embeddings().parameters()),
        logits=config.vocab_size * batch * length,
    )


@contextmanager
def _saved_bytes(model: nn.Module) -> Iterator[dict[Any, int]]:
    """Yields the bytes of each storage that autograd saves within this context, without parameters."""
    # Private: storages without values have no public address. test_plan.py fails if torch changes this.
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: list[Any] = []  # keep storages, so that no other storage gets the same address
    saved: dict[Any, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in saved:
            saved[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def _marks(layers: Any, saved: dict[Any, int]) -> Iterator[list[tuple[int, int]]]:
    """Yields a list that gets the saved bytes before and after each layer that runs within this context."""
    marks: list[tuple[int, int]] = []
    begun: list[int] = []
    hooks: list[Any] = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda *_: begun.append(sum(saved.values()))))
        hooks.append(layer.register_forward_hook(lambda *_: marks.append((begun[-1], sum(saved.values())))))
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


def _cpu_attention() -> dict[Any, Any]:
    """Returns the FLOP formula for flash attention on CPUs, which FlopCounterMode does not know."""

    def flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)  # the arguments are shapes

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flops}


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a run that determine its memory.

    Args:
        batch (`int`), accumulation (`int`): number of sequences in a batch, and of batches in a step.
        bf16 (`bool`), activation_checkpointing (`bool`): the settings in the training arguments.
        optim (`str`): name of the optimizer in the training arguments.
        weight_bytes (`int`), teacher_bytes (`int`): bytes per parameter of the student and of the teacher.
            `teacher_bytes` is 0 if the teacher's logits are cached, or if it shares the student's weights
            (LoRA).
        teacher_runs (`bool`): whether the teacher computes its logits in each step.
        teacher ([`Footprint`], *optional*): footprint of the teacher with the same batch. Default: the
            footprint of the model.
        on_cpu (`bool`): whether the run is on a CPU, where the loss reads fewer logits at once.
    """

    batch: int
    accumulation: int
    bf16: bool
    activation_checkpointing: bool
    optim: str
    weight_bytes: int = 4
    teacher_bytes: int = 4
    teacher_runs: bool = True
    teacher: Footprint | None = None
    on_cpu: bool = False


def plan_training(
    footprint: Footprint, settings: TrainingSettings, target_layers: int, start_layers: int, length: int
) -> TrainingPlan:
    """Plans a distillation run on one device.

    Args:
        footprint ([`Footprint`]): footprint of the model with all layers and `settings.batch` sequences.
        settings ([`TrainingSettings`]): the settings that determine the memory.
        target_layers (`int`): number of layers of the pruned model.
        start_layers (`int`): number of layers at the start of training, when the run needs the most memory.
        length (`int`): number of tokens in a sequence.
    """
    gone = footprint.layers - start_layers
    parameters = footprint.parameters - gone * footprint.layer_parameters
    trained = footprint.trained - gone * footprint.trained_by_layer
    layer = footprint.saved_by_layer
    if settings.activation_checkpointing:
        activations = start_layers * footprint.layer_input + layer
    else:
        activations = start_layers * layer
    activations += footprint.saved_elsewhere
    tile = min(footprint.logits, LOGITS_PER_CHUNK_CPU if settings.on_cpu else LOGITS_PER_CHUNK_GPU)
    teacher = settings.teacher or footprint
    memory = {
        "weights": parameters * settings.weight_bytes,
        "teacher": _teacher_memory(teacher, settings),
        "optimizer": trained * optimizer_bytes(settings.optim),
        "gradients": trained * settings.weight_bytes,
        "activations": activations,
        "logits": TILE_COPIES * 4 * tile + 4 * footprint.head_parameters * footprint.trains_head,
    }
    held = memory["weights"] + memory["teacher"] + memory["optimizer"]
    at_loss = held + activations + memory["logits"] + memory["gradients"] * (settings.accumulation > 1)
    at_end = held + memory["gradients"] + layer
    backward = 2 if footprint.trained >= parameters else 1  # frozen weights get no gradient
    student = start_layers * footprint.layer_flops + footprint.head_flops
    flops = student * (1 + backward + settings.activation_checkpointing)
    if settings.teacher_runs:
        flops += teacher.layers * teacher.layer_flops + teacher.head_flops
    removed = footprint.layers - target_layers
    before, per_layer = footprint.parameters, footprint.layer_parameters
    if footprint.trained < footprint.parameters:  # adapters, which are merged after training
        before, per_layer = before - footprint.trained, per_layer - footprint.trained_by_layer
    return TrainingPlan(
        parameters_before=before,
        parameters_after=round(before - removed * per_layer),
        memory=memory,
        peak=max(at_loss, at_end),
        step_flops=flops * settings.accumulation,
        step_tokens=settings.batch * settings.accumulation * length,
    )


def _teacher_memory(teacher: Footprint, settings: TrainingSettings) -> float:
    """Returns the bytes of the teacher. Autocast holds its float32 weights in 16 bits, except embeddings."""
    embeddings = 2 * teacher.head_parameters * (settings.teacher_bytes == 2 < settings.weight_bytes)
    return teacher.parameters * settings.teacher_bytes + embeddings


def optimizer_bytes(optim: str) -> int:
    """Returns the bytes of state per trained parameter for an optimizer of the Trainer."""
    if optim in OPTIMIZER_BYTES:
        return OPTIMIZER_BYTES[optim]
    return 2 if "8bit" in optim else 8


# Trains bfloat16 weights: 8-bit states, and updates that are rounded up or down at random (torchao).
IN_BF16 = "--dtype bfloat16 --optim adamw_torch_8bit --optim_args bf16_stochastic_round=True"


def settings_that_fit(
    footprint: Footprint, settings: TrainingSettings, target: int, start: int, length: int, memory: float
) -> list[str]:
    """Returns the changes of settings with which a run fits into `memory` bytes, the mildest change first.

    The list is empty if the run does not fit even with all changes. Changes that save no memory are left out.
    """
    chosen: list[str] = []
    present = settings
    peak = plan_training(footprint, present, target, start, length).peak
    with_adapters = settings.teacher_bytes == 0 and settings.teacher_runs  # the teacher shares their base
    in_bf16 = {
        "weight_bytes": 2,
        "teacher_bytes": min(2, settings.teacher_bytes),
        "optim": "adamw_torch_8bit",
    }
    changes: dict[str, dict[str, Any]] = {
        "--activation_checkpointing True": {"activation_checkpointing": True},
        "--optim adamw_8bit": {"optim": "adamw_8bit"},
        "--dtype bfloat16": {"weight_bytes": 2} if with_adapters else {},  # adapters stay float32
        IN_BF16: in_bf16 if settings.weight_bytes == 4 and not with_adapters else {},
        "--teacher DIR of cached logits": {"teacher_bytes": 0, "teacher_runs": False},
    }
    for words, change in changes.items():
        changed = replace(present, **change)
        lower = plan_training(footprint, changed, target, start, length).peak
        if lower >= peak:
            continue
        chosen = [one for one in chosen if words != IN_BF16 or not one.startswith("--optim ")] + [words]
        present, peak = changed, lower
        if peak <= memory:
            return chosen
    return []


@dataclass(frozen=True)
class Device:
    """A GPU to plan a run for.

    Args:
        name (`str`): the common name of the GPU.
        memory (`float`): memory in bytes.
        flops (`float`): FLOP/s that training reaches, see `MFU`.
    """

    name: str
    memory: float
    flops: float


def check_device(name: str | None) -> Device:
    """Returns the device with this name. Default: the GPU of this machine, or an H100 if there is no GPU.

    Raises:
        LayerPruneError: the device is unknown.
    """
    if name is None and torch.cuda.is_available():
        present = torch.cuda.get_device_name().lower()
        known = next((one for one in DEVICES if one.split("-")[0] in present), "h100-80gb")
        return Device(present, torch.cuda.mem_get_info()[1], DEVICES[known][1] * 1e12 * MFU)
    name = name or "h100-80gb"
    if name not in DEVICES:
        raise LayerPruneError(f"device is {name!r}. Choose from {', '.join(DEVICES)}.")
    memory, teraflops = DEVICES[name]
    return Device(name, memory * GIB, teraflops * 1e12 * MFU)
