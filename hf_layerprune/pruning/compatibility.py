"""Whether layers can be removed while this optimizer, these processes and these settings train a model."""

from typing import Any

from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel, TrainingArguments

from ..distillation.arguments import DistillationTrainingArguments, check_processes_joined
from ..distillation.trainable import forget_parameters
from ..errors import LayerPruneError
from ..surgery.lineage import get_lineage
from ..surgery.removal import possible_cuts


# Optimizers that keep state of a parameter elsewhere, or step inside backward.
UNFIT_OPTIMIZERS = ("galore", "lomo", "adalomo", "apollo")


def drop_removed_parameters(optimizer: Any, model: nn.Module) -> None:
    """Removes from `optimizer`, in place, the parameters that `model` no longer has, and their state.

    The state of all other parameters, the parameter groups and the learning rates stay as they are.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass, it may show other parameters
    forget_parameters(optimizer, model)


def check_restores_no_callbacks(args: TrainingArguments) -> None:
    """Refuses a setting by which the Trainer makes a new callback when it resumes.

    Raises:
        LayerPruneError: `restore_callback_states_from_checkpoint` is set.
    """
    if args.restore_callback_states_from_checkpoint:
        raise LayerPruneError(
            "restore_callback_states_from_checkpoint makes a new LayerPruningCallback, without calibration, "
            "task, teacher and evaluation. Leave it out: LayerPruningCallback resumes without it."
        )


def check_compatibility(args: TrainingArguments, model: PreTrainedModel, optimizer: Any) -> None:
    """Refuses settings with which the removal of layers would go wrong silently.

    Raises:
        LayerPruneError: naming the setting, and what to do instead.
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
            f"{'FSDP1' if flat else 'DeepSpeed'} holds parameters in ways that do not let layers go in "
            "training: leave it out (each process then holds a whole model), take FSDP2, or start it anew "
            "for each phase (`hf-layerprune phases`)."
        )
    waits = args.ddp_find_unused_parameters is False or (
        args.ddp_find_unused_parameters is None and args.activation_checkpointing
    )
    if args.world_size > 1 and waits and not isinstance(args, DistillationTrainingArguments):
        raise LayerPruneError(
            "With several processes a plain Trainer would wait for the gradients of removed layers: set "
            "ddp_find_unused_parameters=True, or use DistillationTrainer."
        )
    if args.enable_jit_checkpoint:
        # It may save between backward and the optimizer step, before this callback has ended its phase, and
        # training then ends as if it were finished: a resumed run would not be the same.
        raise LayerPruneError(
            "enable_jit_checkpoint: leave it out, LayerPruningCallback itself writes a checkpoint at SIGTERM."
        )
    if args.load_best_model_at_end and not isinstance(args, DistillationTrainingArguments):
        raise LayerPruneError(
            "load_best_model_at_end: a plain Trainer does not see when weights do not fit. Switch it off, "
            "the checkpoints of all phases stay on disk, or use DistillationTrainer."
        )
    if args.auto_find_batch_size:
        raise LayerPruneError(
            "auto_find_batch_size starts again with a model already cut: set the batch size yourself."
        )
    inner, name = getattr(optimizer, "optimizer", optimizer), str(getattr(args.optim, "value", args.optim))
    if name.startswith(UNFIT_OPTIMIZERS):
        raise LayerPruneError(
            f"optim={name} holds more of a parameter than a removal could take out of it: use adamw_torch or "
            "adamw_bnb_8bit, or give each phase an optimizer of its own (`hf-layerprune phases`)."
        )
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    exactly = trained <= held <= {id(p) for p in model.parameters()}
    if not exactly or inner.state is not vars(inner).get("state"):  # made of several optimizers
        raise LayerPruneError(
            f"The optimizer ({type(inner).__name__}, optim={name}) does not hold exactly the model's "
            "parameters and their state, so removed layers could not be taken out of it. Use AdamW, or give "
            "each phase an optimizer of its own (`hf-layerprune phases`)."
        )


def check_parameters_stay(model: PreTrainedModel) -> None:
    """Refuses a model in which a removal replaces parameters: the optimizer would hold the old ones.

    Raises:
        LayerPruneError: naming such a parameter, and what to do instead.
    """
    before = {id(parameter) for parameter in model.parameters()}
    cuts, _ = possible_cuts(model, range(len(get_lineage(model).kept)))
    with next(iter(cuts.values())):
        made = [name for name, parameter in model.named_parameters() if id(parameter) not in before]
    if made:
        raise LayerPruneError(
            f"{made[0]} holds a part for every layer; cut in training, the optimizer would lose its state. "
            "Remove layers first (`hf-layerprune prune`), then train with the original as teacher_model."
        )
