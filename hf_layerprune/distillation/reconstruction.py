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
from ..files import whole_file
from ..forward.hooks import can_replay, captured, hidden, replayed, undisturbed
from ..forward.lm_head import Reader
from ..scoring.score import fingerprint
from ..surgery.decoder import find_decoder, is_sharded
from ..surgery.lineage import Lineage, get_lineage
from ..surgery.peft import base_of
from .losses import divergence, hidden_error


logger = logging.getLogger(__name__)

KL_TOKENS = 4096  # what the divergence before and after is measured on
WARMUP = 0.05  # of the steps
MAX_GRAD_NORM = 1.0
PREFIX = "reconstruction"  # of the names of all files


@dataclass(frozen=True)
class Window:
    """Consecutive layers that are trained together.

    Args:
        first, last (`int`): the student's layers, as present indices.
        reads, writes (`int`): the teacher's layers whose input and whose output these are to have, as present
            indices of the teacher.
    """

    first: int
    last: int
    reads: int
    writes: int


@dataclass(frozen=True)
class WindowResult:
    """What reconstruction did for one window.

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
    """What [`reconstruct_layers`] did.

    Args:
        windows (`list[WindowResult]`): of each trained window.
        kl_before, kl_after (`float`): KL(teacher || student) in nats per token, on the first batches.
        tokens (`int`): tokens that the teacher read.
        steps (`int`): optimizer steps, over all windows.
    """

    windows: list[WindowResult]
    kl_before: float
    kl_after: float
    tokens: int
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
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

    Inputs and targets are the teacher's own states, read once and kept, so that a step runs a few layers and
    no output head. Windows that overlap are trained together, others one after another. Each step reads one
    of `batches`; every epoch takes them in a new order. With several processes each keeps and reads its share
    of the rows of every batch.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a model that lost layers. Of a `PeftModel` only the adapters
            in these layers are trained.
        teacher (`PreTrainedModel`): the model it was cut from, or one with more of its layers.
        batches: batches with `input_ids` `(batch, length)` and where needed `attention_mask`, or another form
            of tokens that [`make_batches`] knows. Labels do not matter.
        layers_before, layers_after (`int`, *optional*, defaults to 1): how many layers are trained on either
            side of a cut.
        epochs (`int`, *optional*, defaults to 4): how often each batch is read.
        learning_rate (`float`, *optional*, defaults to 1e-3): the peak of a cosine schedule, for AdamW.
        autocast (`torch.dtype`, *optional*): compute in this precision, for example `torch.bfloat16`. Weights
            of 16 bits are float32 while they are trained, and have their own dtype again afterwards.
        seed (`int`, *optional*, defaults to 0): for the order of the batches.
        folder (`str` or `Path`, *optional*): keeps states that do not fit in memory, and lets a stopped run
            go on: called again with the same model and arguments, it ends with the same bits. The files are
            removed in the end.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        [`Reconstruction`]

    Raises:
        LayerPruneError: the model has no cut, the teacher lacks a layer, the layers cannot be run by
            themselves, or a setting has no meaning; before any training. Or the loss is not finite: then the
            weights are those before the step.
    """
    base: Any = base_of(model)
    batches = make_batches(batches)
    windows = find_windows(get_lineage(base), get_lineage(teacher), layers_before, layers_after)
    _check(base, teacher, batches, windows, epochs, learning_rate, autocast)
    _check_layers_stand_alone(base, windows, batches[0]["input_ids"][:1, :8].to(base.device))
    trained = [_trained(base, window) for window in windows]
    # What a checkpoint is of: both models as they are now, the text and the settings.
    settings = [layers_before, layers_after, str(autocast)]
    work = [] if folder is None else [fingerprint([base, teacher], batches, settings)]
    kl_before = mean_kl(base, teacher, batches)
    states = cache_states(teacher, batches, windows, base, autocast, None if folder is None else Path(folder))
    bar = tqdm(
        total=len(windows) * epochs * len(batches), desc="Reconstruction", unit="step", disable=not progress
    )
    results = []
    for number, window in enumerate(windows):
        training = _Training(base, window, trained[number], states[number], autocast)
        with _training_alone(base, window, training.parameters):
            before = training.error()
            checkpoint = None if folder is None else Path(folder) / f"{PREFIX}_window_{number}.pt"
            training.fit(epochs, learning_rate, seed, checkpoint, work, bar)
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
    """The layers that are trained: so many `before` and `after` each cut, as windows that do not overlap.

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
    """KL(teacher || student) in nats per token, on the first batches of about [`KL_TOKENS`] tokens. Every
    token counts that is no padding, whatever its label."""
    total, tokens = 0.0, 0
    models = student, teacher
    with undisturbed(student), undisturbed(teacher):
        readers: list[Reader] = []
        for whole in batches:
            batch = {name: value for name, value in whole.items() if name != "labels"}
            inputs = [{name: value.to(one.device) for name, value in batch.items()} for one in models]
            ids = [own["input_ids"] for own in inputs]
            readers = readers or [Reader(one, own) for one, own in zip(models, ids, strict=True)]
            mask, _ = targets_of(inputs[0])
            rows = [
                reader.rows(reader.states(own)[:, :-1][mask.to(own["input_ids"].device)])
                for reader, own in zip(readers, inputs, strict=True)
            ]
            for own, theirs in zip(*rows, strict=True):
                size = min(own.shape[-1], theirs.shape[-1])
                total += float(divergence(own[:, :size], theirs[:, :size].to(own.device)))
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
    """Check what can be checked before any work."""
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
    widths = [find_decoder(one).config.hidden_size for one in (model, teacher)]
    if widths[0] != widths[1]:
        raise LayerPruneError(
            f"The teacher's hidden size is {widths[1]}, the student's {widths[0]}. Give the model that the "
            "student was cut from."
        )
    for one in (model, teacher):
        if is_sharded(one):
            raise LayerPruneError(
                "The weights are sharded over processes, so single layers cannot be trained. Reconstruct "
                "layers before the model is sharded."
            )


def _check_layers_stand_alone(model: Any, windows: Sequence[Window], input_ids: torch.Tensor) -> None:
    """Check that a hidden state `(batch, length, hidden)` is all that layers hand on.

    Raises:
        LayerPruneError: it is not, so that a window could not be run from its input alone.
    """
    layers = {layer for window in windows for layer in (window.first - 1, window.last) if layer >= 0}
    with undisturbed(model):
        alone = can_replay(model, input_ids, max(1, *(window.first for window in windows)))
        with captured(model, layers) as found:
            model.base_model(input_ids=input_ids, use_cache=False)
    width = find_decoder(model).config.hidden_size
    for _, output in found.values():
        more = output[1:] if isinstance(output, (tuple, list)) else ()
        alone &= not any(map(torch.is_tensor, more))
        alone &= hidden(output).shape == (*input_ids.shape, width)
    if not alone:
        raise LayerPruneError(
            f"The layers of this {model.config.model_type} model hand on more than one hidden state, so they "
            "cannot be trained apart from the others. Leave reconstruction out."
        )


@dataclass(frozen=True)
class _States:
    """The teacher's states around a window, batch by batch, this process's rows.

    Args:
        batches (`list`): what the model reads besides the states, on its device.
        masks (`list[torch.Tensor]`): `(rows, length)`, which positions count.
        counts (`list[int]`): how many do, on all processes.
        inputs, targets (`list[torch.Tensor]`): `(rows, length, hidden)`, in the precision that the teacher
            computes in.
    """

    batches: list[dict[str, torch.Tensor]]
    masks: list[torch.Tensor]
    counts: list[int]
    inputs: list[torch.Tensor]
    targets: list[torch.Tensor]


def _trained(model: Any, window: Window) -> list[nn.Parameter]:
    """The parameters of a window that are trained."""
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
) -> list[_States]:
    """Runs the teacher once over this process's rows of all batches and keeps its states around each window:
    on the student's device where they fit in a quarter of its free memory, else in main memory where they fit
    in half of that, else in files in `folder`.

    Raises:
        LayerPruneError: they do not fit, and there is no folder.
    """
    rank, world = PartialState().process_index, PartialState().num_processes
    rows = [{name: value[rank::world] for name, value in one.items() if name != "labels"} for one in batches]
    width = find_decoder(teacher).config.hidden_size
    sizes = [batch["input_ids"].numel() * width for batch in rows]
    dtype = autocast or teacher.dtype
    make = _storage(2 * len(windows) * sum(sizes) * dtype.itemsize, student.device, folder)
    kept = [
        [make(f"{PREFIX}_states_{number}_{side}", sum(sizes), dtype).split(sizes) for side in ("in", "out")]
        for number in range(len(windows))
    ]
    layers = sorted({layer for window in windows for layer in (window.reads, window.writes)})
    context: Any = nullcontext() if autocast is None else torch.autocast(teacher.device.type, autocast)
    with undisturbed(teacher), context:
        for number, batch in enumerate(rows):
            if not len(batch["input_ids"]):
                continue
            own = {name: value.to(teacher.device) for name, value in batch.items()}
            with captured(teacher, layers) as found, _stop_after(teacher, layers[-1]):
                teacher.base_model(**own, use_cache=False)
            for window, (given, wanted) in zip(windows, kept, strict=True):
                given[number].copy_(found[window.reads][0].flatten())
                wanted[number].copy_(hidden(found[window.writes][1]).flatten())
    inputs = [{name: value.to(student.device) for name, value in batch.items()} for batch in rows]
    masks = [_counted(batch) for batch in inputs]
    counts = [int(_counted(batch).sum()) for batch in batches]
    shapes = [(*batch["input_ids"].shape, width) for batch in rows]

    def shaped(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    return [_States(inputs, masks, counts, shaped(given), shaped(wanted)) for given, wanted in kept]


def _counted(batch: Batch) -> torch.Tensor:
    """Which positions count, `(rows, length)`: all but padding and the first of each row, whose state is a
    hundred times as large as the others and the same in every text (2402.17762)."""
    real = torch.ones_like(batch["input_ids"])
    if "attention_mask" in batch:
        real = batch["attention_mask"]
    return real.bool() & (real.cumsum(1) > 1)


def _storage(
    size: int, device: torch.device, folder: Path | None
) -> Callable[[str, int, torch.dtype], torch.Tensor]:
    """What makes a flat tensor by name, number of elements and dtype, where `size` bytes of them fit."""
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

    def make(name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(place, str):
            return torch.from_file(f"{place}/{name}_{rank}.bin", shared=True, size=count, dtype=dtype)
        return torch.empty(count, dtype=dtype, device=place, pin_memory=on_gpu and place.type == "cpu")

    return make


class _Reached(Exception):
    """The last layer of a window has run: the rest of the model need not."""


@contextmanager
def _stop_after(model: Any, layer: int) -> Iterator[None]:
    """Within this context a forward pass of the model ends, without an error, once `layer` has run."""

    def stop(*args: Any) -> None:
        raise _Reached

    handle = find_decoder(model).layers[layer].register_forward_hook(stop)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


@contextmanager
def _training_alone(model: Any, window: Window, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within this context these parameters, and no others, are trained, and dropout is off. All that has 16
    bits in the window is float32, also a frozen base under adapters, so that they fit together."""
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
        states: _States,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.window, self.parameters, self.states = model, window, parameters, states
        self._autocast = autocast
        self._before: Any = None  # what the layer before the window returns, as it returns it
        read = [batch for batch in states.batches if len(batch["input_ids"])]  # a process may have no row
        if window.first and read:
            example = {name: value[:1] for name, value in read[0].items()}
            last = window.first - 1
            with undisturbed(model), captured(model, [last]) as found, _stop_after(model, last):
                model.base_model(**example, use_cache=False)
            self._before = found[window.first - 1][1]

    def loss(self, number: int) -> torch.Tensor:
        """The summed error on this process's rows of a batch, divided by the tokens of all processes."""
        states, window, device = self.states, self.window, self.model.device
        if not len(states.inputs[number]):
            return torch.zeros((), device=device, requires_grad=True)
        given = states.inputs[number].to(device, non_blocking=True).to(self.parameters[0].dtype)
        wanted = states.targets[number].to(device, non_blocking=True)
        context: Any = nullcontext()
        if self._autocast is not None:
            context = torch.autocast(device.type, self._autocast)
        with context, captured(self.model, [window.last]) as found, _stop_after(self.model, window.last):
            before = (given, *self._before[1:]) if isinstance(self._before, tuple) else given
            with replayed(self.model, [before] * window.first):
                self.model.base_model(**states.batches[number], use_cache=False)
        mask = states.masks[number]
        error = hidden_error(hidden(found[window.last][1])[mask], wanted[mask], "normalized_mse")
        return error / max(1, states.counts[number])

    def error(self) -> float:
        """The mean over all batches."""
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
        work: list[Any],
        bar: Any,
    ) -> None:
        """Train, from `checkpoint` if it is there and of the same `work`; it is written after each epoch."""
        count = len(self.states.batches)
        fused = all(parameter.is_cuda for parameter in self.parameters)
        optimizer = torch.optim.AdamW(self.parameters, learning_rate, weight_decay=0.0, fused=fused)
        steps = epochs * count
        schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
        done, work = 0, [*work, epochs, learning_rate, seed]
        saved: Any = {}
        if checkpoint is not None and checkpoint.exists():
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved and saved["work"] != work:
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
                self._save(checkpoint, epoch + 1, work, optimizer, schedule)

    def _save(self, checkpoint: Path, epochs: int, work: list[Any], optimizer: Any, schedule: Any) -> None:
        if not PartialState().is_main_process:  # all processes hold the same
            return
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        content = {"work": work, "epochs": epochs, "weights": [p.data for p in self.parameters]}
        content |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        with whole_file(checkpoint) as file:
            torch.save(content, file)
