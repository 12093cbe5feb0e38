"""Checks that layers can be removed with this optimizer, these processes and these settings."""

from typing import Any

from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel, TrainingArguments

from ..distillation.arguments import DistillationTrainingArguments, check_processes_joined
from ..distillation.trainable import forget_parameters
from ..errors import LayerPruneError
from ..surgery.layer_stack import LayerStack


# Optimizers that store the state of parameters elsewhere, or step inside the backward pass.
UNFIT_OPTIMIZERS = ("galore", "lomo", "adalomo", "apollo")


def drop_removed_parameters(optimizer: Any, model: nn.Module) -> None:
    """Removes from `optimizer`, in place, the parameters that `model` no longer has, and their state.

    The state of all other parameters, the parameter groups and the learning rates do not change.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass, FSDP may expose other parameters
    forget_parameters(optimizer, model)


def check_restores_no_callbacks(args: TrainingArguments) -> None:
    """Checks that the Trainer does not create a new callback when it resumes.

    Raises:
        LayerPruneError: `restore_callback_states_from_checkpoint` is set.
    """
    if args.restore_callback_states_from_checkpoint:
        raise LayerPruneError(
            "restore_callback_states_from_checkpoint makes a new LayerPruningCallback, without calibration, "
            "task, teacher and evaluation. Leave it out: LayerPruningCallback resumes without it."
        )


def check_compatibility(args: TrainingArguments, model: PreTrainedModel, optimizer: Any) -> None:
    """Checks that no setting would silently break the removal of layers.

    Raises:
        LayerPruneError: a setting does not work with removals. The error names the setting and a solution.
    """
    check_restores_no_callbacks(args)
    if args.n_gpu > 1:
        raise LayerPruneError(
            f"{args.n_gpu} GPUs in one process: start with `accelerate launch` or `torchrun`, or with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    check_processes_joined(args)
    flat = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if flat or isinstance(optimizer, DeepSpeedOptimizerWrapper):
        raise LayerPruneError(
            f"{'FSDP1' if flat else 'DeepSpeed'} stores parameters in a form from which layers cannot be "
            "removed in training. Use FSDP2 or plain data parallelism, or `hf-layerprune phases`, which "
            "starts your training command again in each phase."
        )
    waits = args.ddp_find_unused_parameters is False or (
        args.ddp_find_unused_parameters is None and args.activation_checkpointing
    )
    if args.world_size > 1 and waits and not isinstance(args, DistillationTrainingArguments):
        raise LayerPruneError(
            "With several processes a plain Trainer would wait for the gradients of removed layers. Set "
            "ddp_find_unused_parameters=True, or use DistillationTrainer."
        )
    if args.enable_jit_checkpoint:
        # This setting may save between the backward pass and the optimizer step, before this callback ends
        # its phase. Training then ends as if it were finished, so a resumed run would differ.
        raise LayerPruneError(
            "enable_jit_checkpoint is set, but LayerPruningCallback writes a checkpoint at SIGTERM itself. "
            "Leave enable_jit_checkpoint out."
        )
    if args.load_best_model_at_end and not isinstance(args, DistillationTrainingArguments):
        raise LayerPruneError(
            "load_best_model_at_end is set, but a plain Trainer may load the weights of a model with other "
            "layers. Use DistillationTrainer, or leave it out: the checkpoints of all phases stay on disk."
        )
    if args.auto_find_batch_size:
        raise LayerPruneError(
            "auto_find_batch_size is set, but it would start again with a model that has lost layers. Set "
            "per_device_train_batch_size instead."
        )
    inner, name = getattr(optimizer, "optimizer", optimizer), str(getattr(args.optim, "value", args.optim))
    if name.startswith(UNFIT_OPTIMIZERS):
        raise LayerPruneError(
            f"optim is {name}, whose state cannot be removed with a layer. Use adamw_torch or "
            "adamw_bnb_8bit, or `hf-layerprune phases`, which starts each phase with a new optimizer."
        )
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    exactly = trained <= held <= {id(p) for p in model.parameters()}
    if not exactly or inner.state is not vars(inner).get("state"):  # a combination of several optimizers
        raise LayerPruneError(
            f"The optimizer ({type(inner).__name__}, optim={name}) does not hold exactly the model's "
            "parameters and their state, so removed layers would stay in it. Use AdamW, or "
            "`hf-layerprune phases`, which starts each phase with a new optimizer."
        )


def check_parameters_stay(model: PreTrainedModel) -> None:
    """Checks that a removal does not replace parameters, because the optimizer would hold the old ones.

    Raises:
        LayerPruneError: a removal replaces a parameter. The error names the parameter and a solution.
    """
    before = {id(parameter) for parameter in model.parameters()}
    cuts, _ = LayerStack(model).removable()
    with next(iter(cuts.values())):
        made = [name for name, parameter in model.named_parameters() if id(parameter) not in before]
    if made:
        raise LayerPruneError(
            f"{made[0]} holds values for all layers, so each removal replaces it, and its optimizer state "
            "would be lost. Remove the layers first (`hf-layerprune prune`), then train with the original as "
            "teacher_model."
        )
