"""Computes and caches the teacher's hidden states before and after each window."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from ..data.batches import has_pictures, has_rows
from ..data.targets import Batch
from ..errors import LayerPruneError
from ..forward.hooks import captured, hidden, undisturbed
from ..surgery.decoder import find_decoder
from .windows import Window


logger = logging.getLogger(__name__)

PREFIX = "reconstruction"  # prefix of all file names


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's hidden states before and after a window, for this process's rows of each batch.

    Args:
        batches (`list`): the other inputs of the model besides the hidden states, on its device. Batches with
            pictures are in main memory.
        masks (`list[torch.Tensor]`): `(rows, length)`, the positions that count.
        counts (`list[int]`): the number of positions that count, on all processes.
        inputs, targets (`list[torch.Tensor]`): `(rows, length, hidden)`, in the teacher's precision.
    """

    batches: list[dict[str, torch.Tensor]]
    masks: list[torch.Tensor]
    counts: list[int]
    inputs: list[torch.Tensor]
    targets: list[torch.Tensor]


def cache_states(
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    windows: Sequence[Window],
    student: PreTrainedModel,
    autocast: torch.dtype | None,
    folder: Path | None,
) -> list[TeacherStates]:
    """Runs the teacher once over this process's rows. Returns its hidden states before and after each window.

    The hidden states are on the student's device if they fit in a quarter of its free memory. Otherwise they
    are in main memory if they fit in half of it, or else in files in `folder`.

    Raises:
        LayerPruneError: the hidden states do not fit in memory, and no folder is given.
    """
    rank, world = PartialState().process_index, PartialState().num_processes
    rows = [_rows_of_process(batch, number, rank, world) for number, batch in enumerate(batches)]
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
            with captured(teacher, layers) as states, stop_after(teacher, layers[-1]):
                teacher.base_model(**batch, use_cache=False)
            for window, (window_inputs, window_targets) in zip(windows, storage, strict=True):
                window_inputs[number].copy_(states[window.teacher_first][0].flatten())
                window_targets[number].copy_(hidden(states[window.teacher_last][1]).flatten())
    inputs = [
        batch if has_pictures(batch) else {name: value.to(student.device) for name, value in batch.items()}
        for batch in rows
    ]
    masks = [counted_positions(batch).to(student.device) for batch in inputs]
    counts = [int(counted_positions(batch).sum()) for batch in batches]
    shapes = [(*batch["input_ids"].shape, width) for batch in rows]

    def shaped(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    return [TeacherStates(inputs, masks, counts, shaped(given), shaped(wanted)) for given, wanted in storage]


def _rows_of_process(batch: Batch, number: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Returns the rows of a batch that a process reads, without labels. One process reads a whole batch with
    pictures."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if has_rows(inputs):
        return {name: value[rank::world] for name, value in inputs.items()}
    return inputs if rank == number % world else {"input_ids": inputs["input_ids"][:0]}


def counted_positions(batch: Batch) -> torch.Tensor:
    """Returns a mask `(rows, length)` of all positions except padding.

    The hidden state of the first position is a hundred times as large as the others (2402.17762). It counts
    as much as they do, because errors are relative, and all later attention depends on it.
    """
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _allocator(
    size: int, device: torch.device, folder: Path | None
) -> Callable[[str, int, torch.dtype], torch.Tensor]:
    """Returns a function that allocates a flat tensor, given its name, number of elements and dtype.

    The tensors are placed where `size` bytes are free: on `device`, in main memory or in `folder`.
    """
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
    """The exception that ends a forward pass after the last layer of a window."""


@contextmanager
def stop_after(model: Any, layer: int) -> Iterator[None]:
    """Ends the forward pass of a model within this context once `layer` has run, without an error."""

    def stop(*args: Any) -> None:
        raise _LayerReached

    handle = find_decoder(model).layers[layer].register_forward_hook(stop)
    try:
        yield
    except _LayerReached:
        pass
    finally:
        handle.remove()
