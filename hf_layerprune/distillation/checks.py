"""Checks the arguments, the student, the teacher and the data before training, and the loss during it."""

import logging
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.legacy_rope import legacy_rotary
from ..checkpoints.loading import last_checkpoint
from ..data.batches import model_columns
from ..data.targets import targets_of
from ..errors import LayerPruneError
from ..forward.hooks import undisturbed
from ..surgery.decoder import check_next_token, text_config
from ..surgery.lineage import get_lineage
from ..surgery.peft import adapter_configs, base_of, check_adapter_type, unsaved_parameters
from .arguments import DistillationTrainingArguments, check_processes_joined
from .teacher import TeacherLayers
from .teacher_cache import CachedTeacherLogits


logger = logging.getLogger(__name__)


def check_arguments(args: Any, unused: dict[str, Any]) -> None:
    """Checks the arguments of [`DistillationTrainer`].

    Args:
        args ([`DistillationTrainingArguments`]): the settings.
        unused (`dict`): Trainer arguments that distillation does not use.

    Raises:
        LayerPruneError: an unused argument was given, or settings exclude each other.
    """
    for name, value in unused.items():
        if value is not None:
            raise LayerPruneError(f"DistillationTrainer has no use for `{name}`: leave it out.")
    if not isinstance(args, DistillationTrainingArguments):
        raise LayerPruneError(
            f"args is a {type(args).__name__}: make it a DistillationTrainingArguments, which "
            "takes the same settings."
        )
    if args.torch_compile and args.activation_checkpointing:
        raise LayerPruneError("torch_compile and activation_checkpointing do not go together: use one.")
    if args.n_gpu > 1:
        raise LayerPruneError(
            f"{args.n_gpu} GPUs in one process: start with `accelerate launch` or `torchrun`, or with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    check_processes_joined(args)


def check_student(model: Any, args: DistillationTrainingArguments, peft_config: Any = None) -> None:
    """Checks that `model` can be distilled and saved.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the student.
        args ([`DistillationTrainingArguments`]): the settings.
        peft_config (`PeftConfig`, *optional*): the adapters that the student will get.

    Raises:
        LayerPruneError: `model` cannot be distilled or saved.
    """
    if model is None:
        raise LayerPruneError(
            "model is None, but DistillationTrainer needs a student. Give a model, a folder or a hub id."
        )
    if args.legacy_rope:
        legacy_rotary(model.config)
    if isinstance(base_of(model), PreTrainedModel):
        check_next_token(base_of(model), "DistillationTrainer")
    adapters = adapter_configs(model)
    if adapters and peft_config is not None:
        raise LayerPruneError(
            "model has adapters, and peft_config is given too. Leave peft_config out to train the adapters, "
            "or give a model without any."
        )
    for config in adapters.values():
        check_adapter_type(config)
    unsaved = unsaved_parameters(model) if adapters else []
    if unsaved:
        raise LayerPruneError(
            f"{unsaved[0]} is trained, but it is no part of the adapters, so PEFT does not save it. Freeze "
            "it (requires_grad=False), or name its module in modules_to_save of the PEFT config."
        )
    if not adapters and peft_config is None and getattr(model, "is_quantized", False):
        raise quantised_weights(model.config, "the model")


def quantised_weights(config: PreTrainedConfig, name: str) -> LayerPruneError:
    """Returns the error for full training of a model with quantised weights.

    Args:
        config (`PreTrainedConfig`): the config of the model.
        name (`str`): the user's name for the model.
    """
    quantization: Any = config.quantization_config
    entry = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = getattr(entry.get("quant_method"), "value", entry.get("quant_method"))
    return LayerPruneError(
        f"The weights of {name} are stored quantised ({method}), but quantised weights cannot be trained. "
        "Train LoRA adapters with `distill --lora_rank 16` (peft_config= in Python), or give the model "
        "before quantisation."
    )


STOCHASTIC = ("adamw_torch_4bit", "adamw_torch_8bit")  # optimizers that can round stochastically
STOCHASTIC_ROUNDING = re.compile(r"bf16_stochastic_round\s*=\s*(1|t|true|y|yes|on)\b", re.IGNORECASE)


def check_trained_dtype(trainer: Any, model: Any) -> None:
    """Checks that the dtype of the trained weights is precise enough for small updates.

    Warns about bfloat16 weights: a plain optimizer rounds most of their updates away. FSDP and DeepSpeed keep
    float32 weights themselves.

    Raises:
        LayerPruneError: float16 weights are trained in float16. The Trainer fails on them in the first step.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if trainer.args.fp16 and torch.float16 in dtypes:
        raise LayerPruneError(
            "The trained weights are float16, and fp16 is True, which needs float32 weights. Load the model "
            "with dtype=torch.float32."
        )
    halves = dtypes & {torch.bfloat16, torch.float16}
    is_set = STOCHASTIC_ROUNDING.search(trainer.args.optim_args or "")
    rounds = trainer.args.optim in STOCHASTIC and is_set is not None
    is_plain = trainer.optimizer is None and not rounds
    if not halves or not is_plain or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    logger.warning(
        "The trained weights are %s, in which %s rounds most small updates away: at a learning rate of 1e-5, "
        "15 %% of the weights ever change. Load the model with dtype=torch.float32 and set bf16=True, or use "
        "FSDP2, or set optim='adamw_torch_8bit' with optim_args='bf16_stochastic_round=True' (torchao).",
        str(halves.pop()).removeprefix("torch."),
        str(getattr(trainer.args.optim, "value", trainer.args.optim)),
    )


def check_teacher(
    teacher: PreTrainedModel | CachedTeacherLogits, args: DistillationTrainingArguments
) -> TeacherLayers:
    """Checks that a teacher has the logits and hidden states that `args` need. Returns its layers.

    Raises:
        LayerPruneError: the teacher lacks them.
    """
    if isinstance(teacher, PreTrainedModel):
        lineage, size = get_lineage(teacher), text_config(teacher.config).vocab_size
        if args.top_k is not None and args.top_k >= size:
            raise LayerPruneError(f"top_k is {args.top_k}: it must be below the {size} tokens there are.")
        layers = TeacherLayers(lineage, lineage.kept, args.hidden_layers)
    else:
        _check_cache_settings(teacher, args)
        compared = teacher.hidden_layers if args.hidden_layers is None else args.hidden_layers
        layers = TeacherLayers(teacher.lineage, teacher.hidden_layers, compared)
    unknown = sorted(set(args.hidden_layers or []) - set(layers.available))
    if unknown:
        raise LayerPruneError(
            f"hidden_layers names layers {unknown}, whose hidden states the teacher does not have. Available "
            f"layers: {layers.available}."
        )
    return layers


def _check_cache_settings(teacher: CachedTeacherLogits, args: DistillationTrainingArguments) -> None:
    for name in ("top_k", "temperature"):
        value, cached = getattr(args, name), getattr(teacher, name)
        if value not in (None, cached):
            raise LayerPruneError(f"{name} is {value}, but {teacher.folder} was written with {cached}.")
    if teacher.sampling and args.divergence != "kl":
        raise LayerPruneError(
            f"divergence is {args.divergence!r}, but {teacher.folder} holds sampled tokens, which estimate "
            "'kl' alone. Set divergence='kl', or cache the logits without sampling."
        )
    if args.hidden_weight and not teacher.hidden_layers:
        raise LayerPruneError(
            f"{teacher.folder} holds no hidden states: write it with hidden_layers=[...], or set "
            "hidden_weight=0."
        )


def check_finite(loss: torch.Tensor, input_ids: torch.Tensor, step: int, output_dir: str) -> None:
    """Checks the loss of a batch before the optimizer steps.

    Raises:
        LayerPruneError: the loss is not finite.
    """
    if not torch.isfinite(loss):
        raise LayerPruneError(
            f"The loss of step {step} is {float(loss)}, on a batch of {tuple(input_ids.shape)} tokens that "
            f"begins with {input_ids[0, :8].tolist()}. Look at the data, or lower learning_rate, "
            "hidden_weight or max_grad_norm. The last checkpoint: "
            f"{last_checkpoint(output_dir) or 'none'}."
        )


def check_data(trainer: Any, student: Any) -> None:
    """Checks the data of a Trainer before training. Streams are checked while they are read.

    Raises:
        LayerPruneError: a row is not in the teacher cache, or no token of the training data counts.
    """
    args, collate, columns = trainer.args, trainer.data_collator, None
    if args.remove_unused_columns:
        columns = model_columns(base_of(student)) | set(trainer.label_names)
    evaluated = [] if args.eval_strategy == "no" else [trainer.eval_dataset]
    check_rows_are_cached(trainer.teacher, [trainer.train_dataset, *evaluated], columns, collate)
    batch_size = args.per_device_train_batch_size
    check_some_token_counts(trainer.train_dataset, columns, collate, batch_size, student)


def check_rows_are_cached(
    teacher: Any, datasets: Iterable[Any], columns: Collection[str] | None, collate: Callable[..., Any]
) -> None:
    """Checks that a teacher cache holds all rows of the data sets. Streams are checked while they are read.

    Args:
        teacher ([`CachedTeacherLogits`] or model): the teacher. A model has no cache to check.
        datasets (iterable): the data sets.
        columns (collection of `str`, *optional*): the columns that the model reads. Default: all.
        collate (`Callable`): makes a batch of rows.

    Raises:
        LayerPruneError: a row is not in the cache.
    """
    if not isinstance(teacher, CachedTeacherLogits):
        return
    for dataset in datasets:
        rows = _rows_of(dataset, columns)
        for i in range(len(rows)):
            teacher.check_has(collate([rows[i]]))


def check_some_token_counts(
    dataset: Any,
    columns: Collection[str] | None,
    collate: Callable[..., Any],
    batch_size: int,
    model: PreTrainedModel,
) -> None:
    """Checks that at least one token of the training data counts.

    Reads batches up to the first such token and does not change the random state. Streams are not read.

    Raises:
        LayerPruneError: all labels are -100, or all tokens are padding.
    """
    rows = _rows_of(dataset, columns)
    if not len(rows):
        return
    with undisturbed(model):  # the collator may draw random numbers
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            if targets_of(batch)[0].any():
                return
    raise LayerPruneError(
        f"No token of the {len(rows)} rows in train_dataset counts: all labels are -100, or all tokens "
        "are padding. Check the labels that train_dataset and data_collator make."
    )


def _rows_of(dataset: Any, columns: Collection[str] | None) -> Any:
    """Returns the rows that can be read before training, with only these columns. A stream has none."""
    if not isinstance(dataset, Dataset):
        return []
    if columns is None:
        return dataset
    known = [name for name in dataset.column_names if name in columns]
    return dataset.select_columns(known) if known else []  # the Trainer raises its own error
