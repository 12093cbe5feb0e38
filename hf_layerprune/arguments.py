"""Settings of distillation, beside those of the Trainer."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .errors import LayerPruneError


# Iterative Layer-wise Distillation (2511.05085) adds sum(KL) / 100, over the positions of a batch of
# 2 x 2048, to the SUM of two hidden-state errors. Here all terms are means: per token, over layers.
LOSS_PRESETS = {
    "paper": {
        "kl_weight": 2 * 2048 / 100,
        "hidden_weight": 2.0,
        "ce_weight": 0.0,
        "temperature": 1.0,
    }
}


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] and how much each loss of distillation counts.

    Args:
        kl_weight (`float`, *optional*, defaults to 1.0):
            Weight of KL(teacher || student) over the vocabulary, mean per token.
        hidden_weight (`float`, *optional*, defaults to 0.0):
            Weight of the squared error of hidden states, mean per token, feature and compared layer. Its
            scale differs by orders of magnitude between models, so no other default fits all.
        ce_weight (`float`, *optional*, defaults to 0.0):
            Weight of the cross-entropy on the labels, mean per token.
        temperature (`float`, *optional*, defaults to 1.0):
            Divides both logits in the KL term.
        hidden_layers (`list[int]`, *optional*):
            Layers whose outputs are compared, by index in the original model. Left out, the layer
            after each cut and the last layer (after the final norm).
        loss_preset (`str`, *optional*):
            `"paper"` sets the four numbers above as in 2511.05085 at its batch of 2 x 2048 positions.
        verify_save (`bool`, *optional*, defaults to `True`):
            Load each saved model again, as one more model in memory, and stop if its logits differ. The
            weights stay on disk.
        legacy_rope (`bool`, *optional*, defaults to `False`):
            Write rotary settings under their old names too, for transformers 4 and converters.
    """

    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of KL(teacher || student), mean per token."}
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the mean squared error of hidden states."}
    )
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy on the labels."})
    temperature: float = field(
        default=1.0, metadata={"help": "Divides teacher and student logits in the KL term."}
    )
    hidden_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Original indices of the layers to compare. Default: the layer after each cut "
            "and the last."
        },
    )
    loss_preset: str | None = field(
        default=None,
        metadata={
            "help": "'paper' sets the weights and the temperature as in arXiv 2511.05085.",
            "choices": list(LOSS_PRESETS),
        },
    )
    verify_save: bool = field(
        default=True, metadata={"help": "Load each saved model again and compare its logits."}
    )
    legacy_rope: bool = field(
        default=False, metadata={"help": "Write rotary settings as transformers 4 reads them, too."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
            raise LayerPruneError("All loss weights are 0: nothing would be trained.")
        if not 0 < self.temperature < float("inf"):
            raise LayerPruneError(f"temperature is {self.temperature}: it must be above 0.")
        if self.label_smoothing_factor:
            raise LayerPruneError(
                "label_smoothing_factor is not used by distillation: the teacher's distribution "
                "takes its place. Set it to 0."
            )
