"""Training arguments with the settings of distillation."""

import logging
from dataclasses import dataclass, field

from accelerate.utils import get_int_from_env
from transformers import TrainingArguments

from ..data.arguments import SequenceArguments
from ..errors import LayerPruneError
from ..forward.token_losses import DIVERGENCES, HIDDEN_ERRORS
from ..surgery.lineage import plain_int
from .trainable import check_trainable


# Iterative Layer-wise Distillation (2511.05085) adds sum(KL) / 100 to the SUM of two hidden-state errors. Its
# sum(KL) is over the positions of a batch of 2 x 2048. Here all terms are means per token and over layers.
LOSS_PRESETS = {
    "paper": {
        "kl_weight": 2 * 2048 / 100,
        "hidden_weight": 2.0,
        "ce_weight": 0.0,
        "temperature": 1.0,
    }
}


EXPORTS = ("merged", "adapter")
DTYPES = ("float32", "bfloat16", "float16")


def quieten_replicas(args: TrainingArguments) -> None:
    """Limits the logs of this package to errors in all processes except the main one.

    The limit applies to the whole process, like `log_level_replica` of transformers.
    """
    if args.process_index:
        logging.getLogger("hf_layerprune").setLevel(logging.ERROR)


# Environment variables in which launchers give the number of processes, as in accelerate.
WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


def check_processes_joined(args: TrainingArguments) -> None:
    """Checks that the processes of a launcher train one model together.

    Raises:
        LayerPruneError: each process would train its own model.
    """
    started = get_int_from_env(WORLD_SIZES, 1)
    if started > 1 and args.world_size == 1:
        raise LayerPruneError(
            f"The launcher started {started} processes, but each would train alone and write to the same "
            f"{args.output_dir}: they are not joined on {args.device}. On a machine without GPUs set "
            "use_cpu=True in the training arguments (or the environment variable ACCELERATE_USE_CPU=true). "
            "For a single process start with `python`."
        )


@dataclass
class DistillationTrainingArguments(SequenceArguments, TrainingArguments):
    """Extends [`~transformers.TrainingArguments`] by the settings of distillation.

    Args:
        kl_weight (`float`, *optional*, defaults to 1.0):
            Weight of the divergence from the teacher's next-token distribution (mean per token).
        divergence (`str`, *optional*, defaults to `"kl"`):
            `"kl"`, KL(teacher || student); `"reverse_kl"`, KL(student || teacher); or `"jsd"`, the
            Jensen-Shannon divergence between both distributions.
        jsd_beta (`float`, *optional*, defaults to 0.5):
            For `"jsd"`: a value near 0 is close to the forward KL, and a value near 1 to the reverse KL
            (2306.13649, section 2).
        hidden_weight (`float`, *optional*, defaults to 0.0):
            Weight of the hidden-state error (mean per token and compared layer).
        hidden_loss (`str`, *optional*, defaults to `"mse"`):
            `"mse"`, the mean squared error, whose scale differs by orders of magnitude between models;
            `"normalized_mse"`, the same relative to the teacher's mean square; or `"cosine"`, one minus the
            cosine similarity.
        balance_hidden (`bool`, *optional*, defaults to `False`):
            Make `hidden_weight` relative to the other loss terms, so that 1.0 gives both the same size. The
            weight is multiplied by the mean of the other terms and divided by the mean hidden-state error.
            Both means start again after each removal. The first step after a removal has no hidden-state
            error.
        ce_weight (`float`, *optional*, defaults to 0.0):
            Weight of the cross-entropy on the labels (mean per token).
        temperature (`float`, *optional*, defaults to 1.0):
            Divides the logits of teacher and student in the divergence.
        top_k (`int`, *optional*):
            Number of the teacher's top tokens in the divergence. All other tokens count as one token.
            Default: all tokens, or the number in the cached teacher logits.
        hidden_layers (`list[int]`, *optional*):
            Layers whose outputs are compared, as indices in the original model. Default: the layer after each
            cut and the last layer (after the final norm), or the layers in the teacher cache.
        trainable (`str`, *optional*, defaults to `"all"`):
            Which parameters with `requires_grad` to train: `"all"`; `"around_cuts"`, the layers next to each
            cut (2511.05085), chosen again after each removal; or a number N, for example `"4"`, for the LM
            head and the last N layers. The layers before the first trained layer run once for both teacher
            and student.
        loss_preset (`str`, *optional*):
            `"paper"` sets `kl_weight`, `hidden_weight`, `ce_weight` and `temperature` as in 2511.05085 at its
            batch of 2 x 2048 positions.
        export (`str`, *optional*, defaults to `"merged"`):
            How to save a model with adapters, except in checkpoints: `"merged"`, a plain model; or
            `"adapter"`, the adapters and the list of kept layers, see [`save_adapter`].
        verify_save (`bool`, *optional*, defaults to `True`):
            Load each saved model again on the CPU, and stop if its weights or logits differ. The saved
            weights are kept. The check takes no GPU memory for a second copy of the weights.
        save_dtype (`str`, *optional*):
            Dtype of the saved model: `"float32"`, `"bfloat16"` or `"float16"`. Default: the dtype of the
            model. Checkpoints and adapters keep the dtype of training.
        legacy_rope (`bool`, *optional*, defaults to `False`):
            Also write the rotary settings under their old names, for transformers 4 and converters.
        sequence_length, packing, loss_on (*optional*):
            Settings that make sequences of raw rows (text, chats, prompts with completions), see
            [`SequenceArguments`].
    """

    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of the divergence from the teacher. It is a mean per token."}
    )
    divergence: str = field(
        default="kl",
        metadata={
            "help": "Divergence. kl is KL(teacher || student), reverse_kl is KL(student || teacher), jsd "
            "is the Jensen-Shannon divergence.",
            "choices": list(DIVERGENCES),
        },
    )
    jsd_beta: float = field(
        default=0.5, metadata={"help": "For jsd: near 0 close to the forward KL, near 1 to the reverse KL."}
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the hidden-state error. It is a mean per token and layer."}
    )
    hidden_loss: str = field(
        default="mse",
        metadata={
            "help": "Hidden-state error. mse: squared error; normalized_mse: relative to the teacher's "
            "mean square; cosine: one minus the cosine.",
            "choices": list(HIDDEN_ERRORS),
        },
    )
    balance_hidden: bool = field(
        default=False,
        metadata={"help": "Make hidden_weight relative to the other loss terms. 1.0 makes both equal."},
    )
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy on the labels."})
    temperature: float = field(
        default=1.0, metadata={"help": "Divides teacher and student logits in the divergence."}
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": "Top tokens of the teacher in the divergence. Default: all tokens."},
    )
    hidden_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers to compare, by original index. Default: the layer after each cut and the last."
        },
    )
    trainable: str = field(
        default="all",
        metadata={
            "help": "Trained part: all, around_cuts, or N (LM head and last N layers). around_cuts: the "
            "layers next to each cut."
        },
    )
    loss_preset: str | None = field(
        default=None,
        metadata={
            "help": "Weights and temperature as in arXiv 2511.05085.",
            "choices": list(LOSS_PRESETS),
        },
    )
    export: str = field(
        default="merged",
        metadata={
            "help": "How to save a model with adapters. merged: a plain model; adapter: the adapters and "
            "the list of kept layers.",
            "choices": list(EXPORTS),
        },
    )
    verify_save: bool = field(
        default=True, metadata={"help": "Load each saved model again and compare its weights and logits."}
    )
    save_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the saved model. Default: the dtype of the model; on the command line that "
            "of the stored MODEL.",
            "choices": list(DTYPES),
        },
    )
    legacy_rope: bool = field(
        default=False, metadata={"help": "Also write the rotary settings as transformers 4 reads them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_layers is not None:
            self.hidden_layers = [plain_int(layer) for layer in self.hidden_layers]
        self.top_k = plain_int(self.top_k)
        if self.loss_preset is not None:
            if self.loss_preset not in LOSS_PRESETS:
                raise LayerPruneError(
                    f"loss_preset is {self.loss_preset!r}: choose from {', '.join(LOSS_PRESETS)}."
                )
            for name, value in LOSS_PRESETS[self.loss_preset].items():
                setattr(self, name, value)
        weights = {name: getattr(self, name) for name in ("kl_weight", "hidden_weight", "ce_weight")}
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise LayerPruneError(f"{name} is {value}: it must be a number of at least 0.")
        if not any(weights.values()):
            raise LayerPruneError(
                "kl_weight, hidden_weight and ce_weight are all 0. Set one of them above 0."
            )
        if self.balance_hidden and not (self.hidden_weight and (self.kl_weight or self.ce_weight)):
            raise LayerPruneError(
                "balance_hidden needs a hidden_weight, and kl_weight or ce_weight to be relative to."
            )
        if self.hidden_weight and self.hidden_layers == []:
            raise LayerPruneError(
                "hidden_weight is set, but hidden_layers is empty. Name layers, or leave one of the two out."
            )
        check_trainable(self.trainable)
        choices_of = {"divergence": DIVERGENCES, "hidden_loss": HIDDEN_ERRORS, "export": EXPORTS}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise LayerPruneError(f"{name} is {getattr(self, name)!r}: choose from {', '.join(choices)}.")
        if self.save_dtype is not None and self.save_dtype not in DTYPES:
            raise LayerPruneError(f"save_dtype is {self.save_dtype!r}: choose from {', '.join(DTYPES)}.")
        if not 0 < self.jsd_beta < 1:
            raise LayerPruneError(f"jsd_beta is {self.jsd_beta}: it must be above 0 and below 1.")
        if self.top_k is not None and self.top_k < 1:
            raise LayerPruneError(f"top_k is {self.top_k}: it must be at least 1.")
        if not 0 < self.temperature < float("inf"):
            raise LayerPruneError(f"temperature is {self.temperature}: it must be above 0.")
        if self.label_smoothing_factor:
            raise LayerPruneError(
                "label_smoothing_factor is not used by distillation: the teacher's distribution "
                "takes its place. Set it to 0."
            )
