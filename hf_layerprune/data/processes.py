"""Shares batches among the processes of a distributed run. Each reads a part, and all get all results."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import LayerPruneError
from .batches import has_rows


Item = TypeVar("Item")
Result = TypeVar("Result")


def process_count() -> int:
    """Returns the number of processes in the default group of torch.distributed; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Returns the rank of this process; 0 without a process group."""
    return dist.get_rank() if process_count() > 1 else 0


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in the order of their ranks."""
    values = [value] * process_count()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Sums each tensor over all processes, in place."""
    if process_count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def run_together(compute: Callable[[], Result]) -> list[Result]:
    """Runs `compute` in all processes and returns all results, in the order of their ranks.

    The results must be plain values. An error in one process is raised in all processes, so that no process
    waits for another.

    Raises:
        LayerPruneError, RuntimeError: the error of the first process that fails.
    """
    if process_count() == 1:
        return [compute()]
    result, error = None, None
    try:
        result = compute()
    except Exception as caught:
        error = caught
    # Errors are sent as text, because not every exception can be pickled.
    described = None if error is None else (isinstance(error, LayerPruneError), str(error))
    outcomes = gather((result, described))
    for rank, (_, failure) in enumerate(outcomes):
        if failure is None:
            continue
        if rank == process_index() and error is not None:
            raise error
        refused, text = failure
        raise LayerPruneError(text) if refused else RuntimeError(text)
    return [outcome for outcome, _ in outcomes]


def make_together(make: Callable[[], Result]) -> Result:
    """Returns the result of `make` in this process. An error in one process is raised in all, see
    [`run_together`]. Unlike there, the result may be any object."""
    made: list[Result] = []
    run_together(lambda: made.append(make()))
    return made[0]


def read_turn(
    items: Sequence[Item], first: int, read: Callable[[int, Item], Result], in_step: bool = False
) -> list[Result]:
    """Reads the next items, one in each process, and returns all results in order.

    Args:
        items (sequence): all items, the same in all processes.
        first (`int`): index of the first item of this turn.
        read (`Callable`): takes the index of an item and the item, and returns plain values.
        in_step (`bool`, *optional*, defaults to `False`): a process without an item reads the last item again
            because the forward pass of a sharded model runs in all processes.
    """
    last = min(first + process_count(), len(items)) - 1
    mine = first + process_index()
    if mine > last and in_step:
        mine = last
    results: list[Any] = run_together(lambda: read(mine, items[mine]) if mine <= last else None)
    return results[: last - first + 1]


def read_all(
    items: Sequence[Item], read: Callable[[int, Item], Result], in_step: bool = False
) -> Iterator[Result]:
    """Yields the results of all items in order. Each process reads a part of the items, see [`read_turn`]."""
    for first in range(0, len(items), process_count()):
        yield from read_turn(items, first, read, in_step)


def split_for_processes(batches: list[Any]) -> list[Any]:
    """Splits the batches into parts of nearly equal size if there are fewer batches than processes.

    Batches with pictures are not split: they do not say which row a picture belongs to.
    """
    parts = -(-process_count() // max(1, len(batches)))
    split: list[Any] = []
    for batch in batches:
        if not has_rows(batch):
            split.append(batch)
            continue
        columns = [value.tensor_split(min(parts, len(value))) for value in batch.values()]
        split += [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]
    return split


def check_same_batches(batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Checks that all processes hold the same batches.

    Raises:
        LayerPruneError: the batches differ.
    """
    if process_count() == 1:
        return
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(repr((name, value.dtype, value.shape)).encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    check_same(digest.hexdigest(), "The batches")


def check_same(value: Any, what: str) -> None:
    """Checks that a plain value is the same in all processes.

    Args:
        value: the value to compare.
        what (`str`): name of the value in the error.

    Raises:
        LayerPruneError: the value differs.
    """
    if any(other != value for other in gather(value)):
        raise LayerPruneError(
            f"{what} differ between the {process_count()} processes, which share the work. Give all of them "
            "the same: each process then reads a part."
        )
