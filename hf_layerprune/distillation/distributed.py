"""Helpers for several processes: DDP buckets after a removal, and repeated rows in evaluation."""

from typing import Any

from torch.nn.parallel import DistributedDataParallel


def reinitialize_ddp(model: DistributedDataParallel, handler: Any) -> None:
    """Re-initialises the DDP wrapper in place, so that its buckets match the current trained parameters.

    Args:
        model (`DistributedDataParallel`): the wrapper.
        handler (`DistributedDataParallelKwargs`, *optional*): settings of the wrapper in accelerate.
    """
    synchronised = model.require_backward_grad_sync
    settings: dict[str, Any] = {} if handler is None else handler.to_kwargs()
    settings |= {"device_ids": model.device_ids, "output_device": model.output_device}
    DistributedDataParallel.__init__(model, model.module, **settings)
    if handler is not None:
        handler.register_comm_hook(model)
    model.require_backward_grad_sync = synchronised


def count_distinct_rows(accelerator: Any, rows: int) -> int:
    """Returns how many of the first `rows` rows of an evaluation batch are not repeated.

    Accelerate repeats rows in the last batch, so that every process has the same number of rows.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(max(0, state.remainder - rows * accelerator.process_index), rows)
