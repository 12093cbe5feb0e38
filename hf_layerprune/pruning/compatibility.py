"""What a run trains with (optimizer, processes, other callbacks), and whether layers can leave it."""

import gc
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # another one in a notebook
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from ..checkpoints.loading import load_lineage, runs_own_code
from ..distillation.arguments import DistillationTrainingArguments, check_processes_joined
from ..distillation.trainable import forget_parameters
from ..errors import LayerPruneError
from ..surgery.lineage import get_lineage
from ..surgery.peft import adapter_configs
from ..surgery.removal import possible_cuts


# They keep what they know of a parameter elsewhere than in their state, or step inside backward.
UNFIT_OPTIMIZERS = ("galore", "lomo", "adalomo", "apollo")


def drop_removed_parameters(optimizer: Any, model: nn.Module) -> None:
    """Make `optimizer`, in place, forget the parameters that `model` has no longer, and their state.

    The state of all others, the parameter groups and the learning rates stay as they are.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass, a part of it may show others for its parameters
    forget_parameters(optimizer, model)


def check_backend(args: TrainingArguments, model: PreTrainedModel, optimizer: Any) -> None:
    """Refuse what would go wrong without a word when layers vanish.

    Raises:
        LayerPruneError: naming it, and the way round it.
    """
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
    if not exactly or inner.state is not vars(inner).get("state"):  # one made of several has none
        raise LayerPruneError(
            f"The optimizer ({type(inner).__name__}, optim={name}) does not hold exactly the model's "
            "parameters and their state, so removed layers could not be taken out of it. Use AdamW, or give "
            "each phase an optimizer of its own (`hf-layerprune phases`)."
        )


def check_parameters_stay(model: PreTrainedModel) -> None:
    """Refuse a model in which a removal makes new parameters of old ones, as the optimizer holds the old.

    Raises:
        LayerPruneError: naming one, and the way round it.
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


def check_depth_of_checkpoint(model: nn.Module, *args: Any) -> None:
    """A hook before `model` loads a state dict: check that a checkpoint from which a plain Trainer resumes
    has the model's layers. Otherwise the Trainer would fail later, at the optimizer, without a reason.

    Raises:
        LayerPruneError: it has others.
    """
    # The Trainer tells no callback from where it resumes; its method that loads the weights knows.
    frames = [frame for frame, _ in traceback.walk_stack(None)]
    loading = [one.f_locals for one in frames if one.f_code.co_name == "_load_from_checkpoint"]
    if loading and isinstance(folder := loading[0].get("resume_from_checkpoint"), str):
        check_same_depth(model, folder)


def check_same_depth(model: Any, folder: str) -> None:
    """Check that the model in a checkpoint has the layers of `model`.

    Raises:
        LayerPruneError: it has others, with the way to make them the same.
    """
    saved, present = load_lineage(folder, runs_own_code(model)), get_lineage(model)
    if saved == present:
        return
    more = [i for i, original in enumerate(present.kept) if original not in saved.kept]
    advice = f"Load the model with from_pretrained({folder!r}) before you resume"
    if adapter_configs(model):
        advice = f"Take the same layers out of the base first, with remove_layers(model, {more})"
    raise LayerPruneError(
        f"The checkpoint has {saved}, the model {present}, so its weights would go to the wrong layers. "
        f"{advice}, or use DistillationTrainer, which does this itself."
    )


def check_groups_of_checkpoint(optimizer: Any, state: dict[str, Any]) -> None:
    """A hook before the user's own `optimizer` loads its state: check that the parameter groups are those of
    the checkpoint.

    Raises:
        LayerPruneError: they are not, with the way to make them the same.
    """
    ours, saved = (
        [len(one["params"]) for one in groups] for groups in (optimizer.param_groups, state["param_groups"])
    )
    if ours != saved:
        raise LayerPruneError(
            f"The optimizer has parameter groups of {ours} parameters, but the checkpoint's has groups of "
            f"{saved}: a group whose layers were removed stays as an empty one. Make the optimizer with the "
            'same groups (an empty one is {"params": []}), or resume with the original model in '
            "DistillationTrainer, which makes the same layers leave model and optimizer."
        )


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that `callback` is in, of several the one that trains. It shows itself to no callback, so
    it is looked for among all that lives."""
    trainers = [one for one in gc.get_objects() if issubclass(type(one), Trainer)]
    handlers = [(one, vars(one).get("callback_handler")) for one in trainers]
    found = [one for one, handler in handlers if handler is not None and callback in handler.callbacks]
    return max(found, key=lambda one: one.is_in_train, default=None)


def loss_is_known(trainer: Trainer | None, args: TrainingArguments) -> bool:
    """Whether the loss of a Trainer is a cross-entropy or a divergence in nats, and not, as in reinforcement
    learning, one that may take any value."""
    if isinstance(args, DistillationTrainingArguments):
        return True
    own = next((c for c in type(trainer).__mro__ if "compute_loss" in vars(c)), None)
    usual = own is Trainer or (own is not None and own.__name__ == "SFTTrainer")
    return trainer is not None and usual and trainer.compute_loss_func is None


def neighbours(callback: TrainerCallback) -> list[TrainerCallback]:
    """The other callbacks of the Trainer that `callback` is in. A Trainer shows them to none, so they are
    looked for among all that lives."""
    return [one for callbacks in _lists_of(callback) for one in callbacks if one is not callback]


def _lists_of(callback: TrainerCallback) -> list[list[TrainerCallback]]:
    handlers = [one for one in gc.get_objects() if type(one) is CallbackHandler]
    return [one.callbacks for one in handlers if any(other is callback for other in one.callbacks)]


def printers_after(callback: TrainerCallback) -> list[TrainerCallback]:
    """Returns the callbacks that print the logs of the Trainer that `callback` is in. From now on it comes
    before them, so that they print what it adds to a log."""
    kinds = (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)
    found: list[TrainerCallback] = []
    for callbacks in _lists_of(callback):
        printers = [one for one in callbacks if isinstance(one, kinds)]
        # The loop over the callbacks, which calls this, goes on with the one that came next.
        if printers and callbacks.index(callback) > callbacks.index(printers[0]):
            callbacks.remove(callback)
            callbacks.insert(callbacks.index(printers[0]), callback)
        found += printers
    return found


def parameter_keepers(callbacks: list[TrainerCallback], model: nn.Module) -> list[str]:
    """The names of those that keep parameters of `model`, a part of it or a copy, as for a moving average."""
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}

    def keeps(value: Any, depth: int = 3) -> bool:
        if isinstance(value, nn.Module):
            return value is not model and any(tuple(p.shape) in shapes for p in value.parameters())
        if torch.is_tensor(value):
            return value.dim() > 0 and tuple(value.shape) in shapes
        return depth > 0 and any(keeps(one, depth - 1) for one in _parts(value))

    return [type(one).__name__ for one in callbacks if keeps(list(vars(one).values()))]


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value
