"""Block reconstruction: trains the layers next to each cut on the teacher's hidden states."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.batches import make_batches
from ..data.targets import Batch, targets_of
from ..errors import LayerPruneError
from ..forward.hooks import can_replay, captured, hidden, undisturbed
from ..forward.lm_head import ChunkedLMHead
from ..scoring.score import fingerprint
from ..surgery.decoder import find_decoder, is_sharded
from ..surgery.lineage import get_lineage
from ..surgery.peft import adapter_configs, base_of
from .learning_rate import ADAPTERS, RECONSTRUCTION, relative_learning_rate
from .losses import divergence
from .window_states import PREFIX, cache_states, counted_positions
from .window_training import WindowTraining, only_trained, window_parameters
from .windows import Window, check_teacher_has_layers, find_windows


logger = logging.getLogger(__name__)

KL_TOKENS = 4096  # number of tokens for the KL divergence before and after reconstruction


@dataclass(frozen=True)
class WindowResult:
    """The result of reconstruction for one window.

    Args:
        layers (`list[int]`): the trained layers, as indices in the original model.
        error_before, error_after (`float`): squared error of the last layer's output, relative to the
            teacher's mean square (mean over tokens).
    """

    layers: list[int]
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Reconstruction:
    """The result of [`reconstruct_layers`].

    Args:
        windows (`list[WindowResult]`): the result of each trained window.
        kl_before, kl_after (`float`): KL(teacher || student) in nats per token, on the first batches.
        tokens (`int`): the number of tokens that the teacher read.
        steps (`int`): the number of optimizer steps, over all windows.
    """

    windows: list[WindowResult]
    kl_before: float
    kl_after: float
    tokens: int
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain values for JSON."""
        return asdict(self)


def reconstruct_layers(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Any,
    *,
    layers_before: int = 1,
    layers_after: int = 1,
    removed: Collection[int] | None = None,
    epochs: int = 4,
    learning_rate: float | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Reconstruction:
    """Trains the layers next to each cut of `model`, in place, on the teacher's hidden states.

    The hidden state after these layers learns to equal the teacher's (the block-wise distillation of Puzzle,
    2411.19146, section 3.2, only at the cuts). Inputs and targets are hidden states of the teacher that are
    computed once. A step therefore runs a few layers and no LM head. Overlapping windows are trained
    together, and other windows one after another. Each step reads one batch, and every epoch has a new order.
    Each process reads its share of the rows of every batch.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a model that lost layers. In a `PeftModel` only the adapters
            of these layers are trained.
        teacher (`PreTrainedModel`): the original model, or a model with more of its layers than `model`.
        batches: batches with `input_ids` `(batch, length)` and if needed `attention_mask`, or another form of
            tokens that [`make_batches`] accepts. Labels are ignored.
        layers_before, layers_after (`int`, *optional*, defaults to 1): number of trained layers before and
            after each cut.
        removed (collection of `int`, *optional*): train only next to the cuts that removed one of these
            layers, given as original indices. Default: all cuts.
        epochs (`int`, *optional*, defaults to 4): number of passes over the batches.
        learning_rate (`float`, *optional*): peak of a cosine schedule for AdamW. Default: 0.003 times the
            root mean square of the weight matrices in a window, or 0.001 for adapters.
        autocast (`torch.dtype`, *optional*): compute in this precision, for example `torch.bfloat16`. 16-bit
            weights are float32 during training and return to their own dtype afterwards.
        seed (`int`, *optional*, defaults to 0): seed for the order of the batches.
        folder (`str` or `Path`, *optional*): folder for checkpoints and for hidden states that do not fit in
            memory. A stopped run that is called again with the same model and arguments gives the same result
            bit for bit. The files are removed at the end.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        [`Reconstruction`]: errors and divergences before and after training.

    Raises:
        LayerPruneError: before training, if the model has no cut, the teacher lacks a layer, the layers
            cannot run alone, or a setting is invalid. During training, if the gradient is not finite. The
            weights then stay as before the step.
    """
    base: Any = base_of(model)
    batches = make_batches(batches)
    windows = find_windows(get_lineage(base), get_lineage(teacher), layers_before, layers_after, removed)
    _check(batches, epochs, learning_rate, autocast)
    _check_models(base, teacher)
    _check_layers_stand_alone(base, [one.first for one in windows], [one.last for one in windows], batches)
    trained = [window_parameters(base, window) for window in windows]
    # A checkpoint is valid only for these models, this text and these settings.
    settings = [windows, str(autocast)]
    run_key = [] if folder is None else [fingerprint([base, teacher], batches, settings)]
    kl_before = mean_kl(base, teacher, batches)
    states = cache_states(teacher, batches, windows, base, autocast, None if folder is None else Path(folder))
    bar = tqdm(
        total=len(windows) * epochs * len(batches), desc="Reconstruction", unit="step", disable=not progress
    )
    results = []
    for number, window in enumerate(windows):
        training = WindowTraining(base, window, trained[number], states[number], autocast)
        with only_trained(base, window, training.parameters):
            before = training.error()
            checkpoint = None if folder is None else Path(folder) / f"{PREFIX}_window_{number}.pt"
            rate = learning_rate or _fitting_learning_rate(model, window)
            training.fit(epochs, rate, seed, checkpoint, run_key, bar)
            after = training.error()
        kept = get_lineage(base).kept
        results.append(WindowResult(kept[window.first : window.last + 1], before, after))
        logger.info(
            "Reconstructed layers %s: error %.4f before, %.4f after.", results[-1].layers, before, after
        )
    bar.close()
    PartialState().wait_for_everyone()
    if folder is not None and PartialState().is_main_process:
        for file in Path(folder).glob(f"{PREFIX}_*"):
            file.unlink()
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    steps = len(windows) * epochs * len(batches)
    return Reconstruction(results, kl_before, mean_kl(base, teacher, batches), tokens, steps)


def _fitting_learning_rate(model: Any, window: Window) -> float:
    """Returns the peak learning rate of a window."""
    if adapter_configs(model):
        return ADAPTERS
    layers = find_decoder(base_of(model)).layers[window.first : window.last + 1]
    return relative_learning_rate(layers.parameters(), RECONSTRUCTION)


def mean_kl(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    max_tokens: int = KL_TOKENS,
) -> float:
    """Returns KL(teacher || student) in nats per token on the first batches, about `max_tokens` tokens.

    All tokens except padding count, whatever their labels are.
    """
    total, tokens = 0.0, 0
    models = student, teacher
    with undisturbed(student), undisturbed(teacher):
        lm_heads: list[ChunkedLMHead] = []
        for batch in batches:
            inputs = [
                {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
                for model in models
            ]
            lm_heads = lm_heads or [
                ChunkedLMHead(model, each["input_ids"]) for model, each in zip(models, inputs, strict=True)
            ]
            mask, _ = targets_of(inputs[0])
            logits = [
                lm_head.rows(lm_head.states(each)[:, :-1][mask.to(each["input_ids"].device)])
                for lm_head, each in zip(lm_heads, inputs, strict=True)
            ]
            for student_logits, teacher_logits in zip(*logits, strict=True):
                size = min(student_logits.shape[-1], teacher_logits.shape[-1])
                teacher_logits = teacher_logits[:, :size].to(student_logits.device)
                total += float(divergence(student_logits[:, :size], teacher_logits))
            tokens += int(mask.sum())
            if tokens >= max_tokens:
                break
    return total / max(1, tokens)


def check_can_reconstruct(model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Checks before any removal that [`reconstruct_layers`] will work, whichever layers are removed.

    Raises:
        LayerPruneError: reconstruction cannot work for these models or this text.
    """
    base: Any = base_of(model)
    _check_text(batches)
    _check_models(base, teacher)
    check_teacher_has_layers(get_lineage(base), get_lineage(teacher))
    layers = find_decoder(base).layers
    idle = [i for i, layer in enumerate(layers) if not any(p.requires_grad for p in layer.parameters())]
    if idle:
        raise LayerPruneError(
            f"Layers {idle} have no trainable parameter, so reconstruction may have nothing to train next to "
            "a cut. Unfreeze them, put adapters on them, or set reconstruction_layers to 0."
        )
    _check_layers_stand_alone(base, range(len(layers)), range(len(layers)), batches)


def _check(
    batches: Sequence[Batch], epochs: int, learning_rate: float | None, autocast: torch.dtype | None
) -> None:
    """Checks the text and the settings before any work."""
    _check_text(batches)
    if autocast is torch.float16:
        raise LayerPruneError(
            "autocast is torch.float16, in which small gradients vanish. Use torch.bfloat16, or None for "
            "float32."
        )
    if epochs < 1 or (learning_rate is not None and not 0 < learning_rate < float("inf")):
        raise LayerPruneError(
            f"epochs is {epochs} and learning_rate {learning_rate}: use at least 1 epoch and a rate above 0."
        )


def _check_text(batches: Sequence[Batch]) -> None:
    """Checks that at least one token counts."""
    if not any(bool(counted_positions(batch).any()) for batch in batches):
        raise LayerPruneError("No token of the batches counts: all are padding. Give sequences with tokens.")


def _check_models(model: Any, teacher: PreTrainedModel) -> None:
    """Checks that neither model is sharded and that both have the same hidden size."""
    widths = [find_decoder(each).config.hidden_size for each in (model, teacher)]
    if widths[0] != widths[1]:
        raise LayerPruneError(
            f"The teacher's hidden size is {widths[1]}, the student's {widths[0]}. Give the model that the "
            "student was cut from."
        )
    for each in (model, teacher):
        if is_sharded(each):
            raise LayerPruneError(
                "The weights are sharded over processes, so single layers cannot be trained. Reconstruct "
                "layers before the model is sharded."
            )


def _check_layers_stand_alone(
    model: Any, firsts: Sequence[int], lasts: Sequence[int], batches: Sequence[Batch]
) -> None:
    """Checks that layers pass only one hidden state `(batch, length, hidden)` to the next layer.

    A window can then run from its input alone.

    Args:
        firsts, lasts (sequence of `int`): the layers with which windows may begin and end.

    Raises:
        LayerPruneError: a layer passes more than one hidden state.
    """
    input_ids = batches[0]["input_ids"][:1, :8].to(model.device)
    layers = {layer for layer in (*(first - 1 for first in firsts), *lasts) if layer >= 0}
    with undisturbed(model):
        stand_alone = can_replay(model, input_ids, max(1, *firsts))
        with captured(model, layers) as states:
            model.base_model(input_ids=input_ids, use_cache=False)
    width = find_decoder(model).config.hidden_size
    for _, output in states.values():
        more = output[1:] if isinstance(output, (tuple, list)) else ()
        stand_alone &= not any(map(torch.is_tensor, more))
        stand_alone &= hidden(output).shape == (*input_ids.shape, width)
    if not stand_alone:
        raise LayerPruneError(
            f"The layers of this {model.config.model_type} model hand on more than one hidden state, so they "
            "cannot be trained alone. Leave reconstruction out: set reconstruction_layers to 0."
        )
