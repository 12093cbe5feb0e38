"""Block reconstruction: the layers next to each cut are trained on the teacher's hidden states."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..data import Batch, make_batches, targets_of
from ..errors import LayerPruneError
from ..forward.hooks import can_replay, captured, hidden, replayed, undisturbed
from ..forward.lm_head import Reader
from ..scoring.score import fingerprint
from ..surgery.decoder import find_decoder, is_sharded
from ..surgery.lineage import Lineage, get_lineage
from ..surgery.peft import base_of
from .losses import divergence, hidden_error


logger = logging.getLogger(__name__)

KL_TOKENS = 4096  # tokens of the divergence before and after
WARMUP = 0.05  # share of the steps
MAX_GRAD_NORM = 1.0
PREFIX = "reconstruction"  # of all file names


@dataclass(frozen=True)
class Window:
    """Consecutive layers that are trained together.

    Args:
        first, last (`int`): the first and the last of these layers, as present indices of the student.
        teacher_first, teacher_last (`int`): the teacher layers whose input and output the window shall have,
            as present indices of the teacher.
    """

    first: int
    last: int
    teacher_first: int
    teacher_last: int


@dataclass(frozen=True)
class WindowResult:
    """The result of reconstruction for one window.

    Args:
        layers (`list[int]`): the trained layers, as indices in the original model.
        error_before, error_after (`float`): squared error of the last layer's output, relative to the
            teacher's mean square; mean over tokens.
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
    epochs: int = 4,
    learning_rate: float = 1e-3,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Reconstruction:
    """Trains the layers next to each cut of `model`, in place, so that the hidden state after them equals the
    teacher's (the block-wise distillation of Puzzle, 2411.19146, section 3.2, at the cut alone).

    Inputs and targets are the teacher's hidden states, computed once, so that a step runs a few layers and no
    LM head. Overlapping windows are trained together, others one after another. Each step reads one of
    `batches`; every epoch takes them in a new order. Each of several processes reads its share of the rows of
    every batch.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a model that lost layers. In a `PeftModel` only the adapters
            of these layers are trained.
        teacher (`PreTrainedModel`): the original model, or one with more of its layers.
        batches: batches with `input_ids` `(batch, length)` and where needed `attention_mask`, or another form
            of tokens that [`make_batches`] accepts. Labels are ignored.
        layers_before, layers_after (`int`, *optional*, defaults to 1): the number of trained layers on either
            side of a cut.
        epochs (`int`, *optional*, defaults to 4): the number of passes over the batches.
        learning_rate (`float`, *optional*, defaults to 1e-3): the peak of a cosine schedule, for AdamW.
        autocast (`torch.dtype`, *optional*): compute in this precision, for example `torch.bfloat16`. 16-bit
            weights are float32 during training and return to their own dtype afterwards.
        seed (`int`, *optional*, defaults to 0): the seed of the order of the batches.
        folder (`str` or `Path`, *optional*): holds hidden states that do not fit in memory, and checkpoints.
            A stopped run that is called again with the same model and arguments ends with the same bits. The
            files are removed at the end.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        [`Reconstruction`]

    Raises:
        LayerPruneError: before training, if the model has no cut, the teacher lacks a layer, the layers
            cannot run alone, or a setting is invalid. During training, if the gradient is not finite; the
            weights are those before the step.
    """
    base: Any = base_of(model)
    batches = make_batches(batches)
    windows = find_windows(get_lineage(base), get_lineage(teacher), layers_before, layers_after)
    _check(base, teacher, batches, windows, epochs, learning_rate, autocast)
    _check_layers_stand_alone(base, windows, batches[0]["input_ids"][:1, :8].to(base.device))
    trained = [_trained_parameters(base, window) for window in windows]
    # A checkpoint is valid for these models, this text and these settings only.
    settings = [layers_before, layers_after, str(autocast)]
    run_key = [] if folder is None else [fingerprint([base, teacher], batches, settings)]
    kl_before = mean_kl(base, teacher, batches)
    states = cache_states(teacher, batches, windows, base, autocast, None if folder is None else Path(folder))
    bar = tqdm(
        total=len(windows) * epochs * len(batches), desc="Reconstruction", unit="step", disable=not progress
    )
    results = []
    for number, window in enumerate(windows):
        training = _Training(base, window, trained[number], states[number], autocast)
        with _only_trained(base, window, training.parameters):
            before = training.error()
            checkpoint = None if folder is None else Path(folder) / f"{PREFIX}_window_{number}.pt"
            training.fit(epochs, learning_rate, seed, checkpoint, run_key, bar)
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


def find_windows(student: Lineage, teacher: Lineage, before: int, after: int) -> list[Window]:
    """Returns the trained layers, `before` and `after` each cut, as windows that do not overlap.

    Raises:
        LayerPruneError: the student has no cut that the teacher has not, or the teacher lacks a layer of the
            student.
    """
    if before < 0 or after < 0 or before + after < 1:
        raise LayerPruneError(
            f"layers_before is {before} and layers_after is {after}. Choose numbers of at least 0, and at "
            "least one layer in all."
        )
    missing = sorted(set(student.kept) - set(teacher.kept))
    if student.original != teacher.original or missing:
        raise LayerPruneError(
            f"The teacher has {teacher}, the student {student}. Give a teacher that has all layers of the "
            "student."
        )
    places = [teacher.kept.index(layer) for layer in student.kept]
    count = len(places)
    ends = [-1, *places, len(teacher.kept)]
    cuts = [i for i in range(count + 1) if ends[i + 1] != ends[i] + 1]  # in front of this student layer
    spans: list[list[int]] = []
    for cut in cuts:
        span = [max(0, cut - before), min(count, cut + after) - 1]
        if span[0] > span[1]:
            continue
        if spans and span[0] <= spans[-1][1]:
            spans[-1][1] = span[1]
        else:
            spans.append(span)
    if not spans:
        raise LayerPruneError(
            "No layer was removed from the model, so there is no cut to reconstruct. Remove layers first."
        )
    return [Window(first, last, places[first], places[last]) for first, last in spans]


def mean_kl(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Returns KL(teacher || student) in nats per token, on the first batches of about [`KL_TOKENS`] tokens.
    All tokens but padding count, whatever their labels."""
    total, tokens = 0.0, 0
    models = student, teacher
    with undisturbed(student), undisturbed(teacher):
        lm_heads: list[Reader] = []
        for batch in batches:
            inputs = [
                {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
                for model in models
            ]
            lm_heads = lm_heads or [
                Reader(model, each["input_ids"]) for model, each in zip(models, inputs, strict=True)
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
            if tokens >= KL_TOKENS:
                break
    return total / max(1, tokens)


def _check(
    model: Any,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    windows: Sequence[Window],
    epochs: int,
    learning_rate: float,
    autocast: torch.dtype | None,
) -> None:
    """Checks all arguments before any work."""
    if not any(bool(_counted(batch).any()) for batch in batches):
        raise LayerPruneError(
            "No token of the batches counts: all are padding, or the first of their sequence. Give sequences "
            "of at least two tokens."
        )
    if autocast is torch.float16:
        raise LayerPruneError(
            "autocast is torch.float16, in which small gradients vanish. Use torch.bfloat16, or None for "
            "float32."
        )
    if epochs < 1 or not 0 < learning_rate < float("inf"):
        raise LayerPruneError(
            f"epochs is {epochs} and learning_rate {learning_rate}: use at least 1 epoch and a rate above 0."
        )
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


def _check_layers_stand_alone(model: Any, windows: Sequence[Window], input_ids: torch.Tensor) -> None:
    """Checks that a layer passes on one hidden state `(batch, length, hidden)` and nothing else, so that a
    window can run from its input alone.

    Raises:
        LayerPruneError: it passes on more.
    """
    layers = {layer for window in windows for layer in (window.first - 1, window.last) if layer >= 0}
    with undisturbed(model):
        stand_alone = can_replay(model, input_ids, max(1, *(window.first for window in windows)))
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
            "cannot be trained apart from the others. Leave reconstruction out."
        )


@dataclass(frozen=True)
class _TeacherStates:
    """The teacher's hidden states before and after a window, for this process's rows of each batch.

    Args:
        batches (`list`): what the model reads besides the hidden states, on its device.
        masks (`list[torch.Tensor]`): `(rows, length)`, the positions that count.
        counts (`list[int]`): the number of positions that count, on all processes.
        inputs, targets (`list[torch.Tensor]`): `(rows, length, hidden)`, in the teacher's precision.
    """

    batches: list[dict[str, torch.Tensor]]
    masks: list[torch.Tensor]
    counts: list[int]
    inputs: list[torch.Tensor]
    targets: list[torch.Tensor]


def _trained_parameters(model: Any, window: Window) -> list[nn.Parameter]:
    """Returns the trained parameters of a window."""
    layers = find_decoder(model).layers[window.first : window.last + 1]
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    if not parameters:
        raise LayerPruneError(
            f"Nothing in layers {window.first} to {window.last} can be trained: all of it is frozen, or "
            "has no adapter. Unfreeze the layers, or put adapters on them."
        )
    return parameters


def cache_states(
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    windows: Sequence[Window],
    student: PreTrainedModel,
    autocast: torch.dtype | None,
    folder: Path | None,
) -> list[_TeacherStates]:
    """Runs the teacher once over this process's rows of all batches. Returns its hidden states before and
    after each window: on the student's device if they fit in a quarter of its free memory, else in main
    memory if they fit in half of it, else in files in `folder`.

    Raises:
        LayerPruneError: they do not fit, and there is no folder.
    """
    rank, world = PartialState().process_index, PartialState().num_processes
    rows = [{name: x[rank::world] for name, x in batch.items() if name != "labels"} for batch in batches]
    width = find_decoder(teacher).config.hidden_size
    sizes = [batch["input_ids"].numel() * width for batch in rows]
    dtype = autocast or teacher.dtype
    allocate = _allocator(2 * len(windows) * sum(sizes) * dtype.itemsize, student.device, folder)
    storage = [
        [
            allocate(f"{PREFIX}_states_{number}_{side}", sum(sizes), dtype).split(sizes)
            for side in ("in", "out")
        ]
        for number in range(len(windows))
    ]
    layers = sorted({layer for window in windows for layer in (window.teacher_first, window.teacher_last)})
    context: Any = nullcontext() if autocast is None else torch.autocast(teacher.device.type, autocast)
    with undisturbed(teacher), context:
        for number, batch in enumerate(rows):
            if not len(batch["input_ids"]):
                continue
            batch = {name: value.to(teacher.device) for name, value in batch.items()}
            with captured(teacher, layers) as states, _stop_after(teacher, layers[-1]):
                teacher.base_model(**batch, use_cache=False)
            for window, (window_inputs, window_targets) in zip(windows, storage, strict=True):
                window_inputs[number].copy_(states[window.teacher_first][0].flatten())
                window_targets[number].copy_(hidden(states[window.teacher_last][1]).flatten())
    inputs = [{name: value.to(student.device) for name, value in batch.items()} for batch in rows]
    masks = [_counted(batch) for batch in inputs]
    counts = [int(_counted(batch).sum()) for batch in batches]
    shapes = [(*batch["input_ids"].shape, width) for batch in rows]

    def shaped(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    return [_TeacherStates(inputs, masks, counts, shaped(given), shaped(wanted)) for given, wanted in storage]


def _counted(batch: Batch) -> torch.Tensor:
    """Returns the positions that count, `(rows, length)`: all but padding and the first of each row, whose
    hidden state is a hundred times as large as the others and the same in every text (2402.17762)."""
    mask = torch.ones_like(batch["input_ids"])
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
    return mask.bool() & (mask.cumsum(1) > 1)


def _allocator(
    size: int, device: torch.device, folder: Path | None
) -> Callable[[str, int, torch.dtype], torch.Tensor]:
    """Returns a function that makes a flat tensor by name, number of elements and dtype, in a place with room
    for `size` bytes."""
    on_gpu = device.type == "cuda"
    place: str | torch.device
    if on_gpu and size <= torch.cuda.mem_get_info(device)[0] // 4:
        place = device
    elif size <= psutil.virtual_memory().available // 2:
        place = torch.device("cpu")
    elif folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        place = str(folder)
    else:
        raise LayerPruneError(
            f"The teacher's hidden states take {size / 2**30:.1f} GiB, more than half of the free memory. "
            "Give a folder to keep them in, or fewer tokens."
        )
    logger.info("Reconstruction keeps %.2f GiB of the teacher's hidden states: %s.", size / 2**30, place)
    rank = PartialState().process_index

    def allocate(name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(place, str):
            return torch.from_file(f"{place}/{name}_{rank}.bin", shared=True, size=count, dtype=dtype)
        return torch.empty(count, dtype=dtype, device=place, pin_memory=on_gpu and place.type == "cpu")

    return allocate


class _LayerReached(Exception):
    """Ends a forward pass after the last layer of a window."""


@contextmanager
def _stop_after(model: Any, layer: int) -> Iterator[None]:
    """Within this context a forward pass of the model ends, without an error, once `layer` has run."""

    def stop(*args: Any) -> None:
        raise _LayerReached

    handle = find_decoder(model).layers[layer].register_forward_hook(stop)
    try:
        yield
    except _LayerReached:
        pass
    finally:
        handle.remove()


@contextmanager
def _only_trained(model: Any, window: Window, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within this context only these parameters are trained, and dropout is off. All 16-bit weights of the
    window are float32, also a frozen base, so that base and adapters have the same dtype."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = find_decoder(model).layers[window.first : window.last + 1]
    halves = [p for layer in layers for p in layer.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    dtypes = [parameter.dtype for parameter in halves]
    try:
        model.requires_grad_(False)
        for parameter in halves:
            parameter.data = parameter.data.float()
        for parameter in parameters:
            parameter.requires_grad_(True)
        with undisturbed(model), torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter, dtype in zip(halves, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
        for parameter in required:
            parameter.requires_grad_(True)


class _Training:
    """The training of one window of a model."""

    def __init__(
        self,
        model: Any,
        window: Window,
        parameters: list[nn.Parameter],
        states: _TeacherStates,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.window, self.parameters, self.states = model, window, parameters, states
        self._autocast = autocast
        self._previous_output: Any = None  # an output of the layer before the window, for its form
        batches = [batch for batch in states.batches if len(batch["input_ids"])]  # a process may have no row
        if window.first and batches:
            example = {name: value[:1] for name, value in batches[0].items()}
            previous = window.first - 1
            with undisturbed(model), captured(model, [previous]) as outputs, _stop_after(model, previous):
                model.base_model(**example, use_cache=False)
            self._previous_output = outputs[previous][1]

    def loss(self, number: int) -> torch.Tensor:
        """Returns the summed error on this process's rows of a batch, divided by the tokens of all
        processes."""
        states, window, device = self.states, self.window, self.model.device
        if not len(states.inputs[number]):
            return torch.zeros((), device=device, requires_grad=True)
        inputs = states.inputs[number].to(device, non_blocking=True).to(self.parameters[0].dtype)
        targets = states.targets[number].to(device, non_blocking=True)
        context: Any = nullcontext()
        if self._autocast is not None:
            context = torch.autocast(device.type, self._autocast)
        with context, captured(self.model, [window.last]) as outputs, _stop_after(self.model, window.last):
            previous = self._previous_output
            previous = (inputs, *previous[1:]) if isinstance(previous, tuple) else inputs
            with replayed(self.model, [previous] * window.first):
                self.model.base_model(**states.batches[number], use_cache=False)
        mask = states.masks[number]
        error = hidden_error(hidden(outputs[window.last][1])[mask], targets[mask], "normalized_mse")
        return error / max(1, states.counts[number])

    def error(self) -> float:
        """Returns the mean error over all batches."""
        with torch.no_grad():
            counts = torch.tensor(self.states.counts, dtype=torch.float64)
            losses = torch.stack([self.loss(number) for number in range(len(counts))]).float()
        return float((reduce(losses, "sum").double().cpu() * counts).sum() / counts.sum())

    def fit(
        self,
        epochs: int,
        learning_rate: float,
        seed: int,
        checkpoint: Path | None,
        run_key: list[Any],
        bar: Any,
    ) -> None:
        """Trains, from `checkpoint` if it exists and has the same `run_key`. Writes it after each epoch."""
        count = len(self.states.batches)
        fused = all(parameter.is_cuda for parameter in self.parameters)
        optimizer = torch.optim.AdamW(self.parameters, learning_rate, weight_decay=0.0, fused=fused)
        steps = epochs * count
        schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
        done, run_key = 0, [*run_key, epochs, learning_rate, seed]
        saved: Any = {}
        if checkpoint is not None and checkpoint.exists():
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved and saved["run_key"] != run_key:
            logger.warning("%s is of other models, text or settings. Reconstruction starts anew.", checkpoint)
        elif saved:
            done = saved["epochs"]
            for parameter, value in zip(self.parameters, saved["weights"], strict=True):
                parameter.data.copy_(value)
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            bar.update(done * count)
        for epoch in range(done, epochs):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
            for number in order.tolist():
                self.loss(number).backward()
                for parameter in self.parameters:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = reduce(gradient, "sum")
                norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
                if not norm.isfinite():
                    raise LayerPruneError(
                        f"The gradient of reconstruction is {float(norm)} in epoch {epoch + 1} of layers "
                        f"{self.window.first} to {self.window.last}. Look at the data, or lower the "
                        "learning_rate."
                    )
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
            if checkpoint is not None:
                self._save(checkpoint, epoch + 1, run_key, optimizer, schedule)

    def _save(self, checkpoint: Path, epochs: int, run_key: list[Any], optimizer: Any, schedule: Any) -> None:
        if not PartialState().is_main_process:  # all processes hold the same
            return
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        draft = checkpoint.with_suffix(".draft")
        content = {"run_key": run_key, "epochs": epochs, "weights": [p.data for p in self.parameters]}
        content |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(content, draft)
        draft.replace(checkpoint)
