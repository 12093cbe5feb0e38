"""Reading text with a model: its last hidden states, and the logits of them piece by piece, so that memory
does not grow with length times vocabulary."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .data import Batch
from .decoder import text_config
from .losses import token_mask


PIECE = 2**25  # logits made at once
ROWS = 16  # positions whose probabilities are computed at once: so few stay in the processor's cache


class Reader:
    """Reads batches with one model, also while layers are missing from it.

    Logits are made from last hidden states by the model's own forward, with the part before its head
    standing still, so that whatever it does to logits (bias, scale, soft cap) is done. Where that does not
    give the model's logits, they are made at once, and the states are the logits themselves.

    Args:
        model (`PreTrainedModel`): a causal language model.
        input_ids (`torch.Tensor`): `(batch, length)`, some tokens to try this with.
    """

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor) -> None:
        self.model, self.in_pieces = model, True
        input_ids = input_ids[:1, :8]
        whole = model(input_ids=input_ids, use_cache=False).logits
        try:
            states = self.states({"input_ids": input_ids})[0]
            pieces = torch.cat([piece for _, piece in self.logits(states)])[None]
        except Exception:  # a model that is put together in another way
            self.in_pieces = False
        else:
            scale = float(whole.float().nan_to_num().std())
            same = pieces.shape == whole.shape
            self.in_pieces = same and torch.allclose(pieces, whole, rtol=0, atol=0.05 * scale, equal_nan=True)

    def states(self, batch: Batch) -> torch.Tensor:
        """The states `(batch, length, hidden)` that the output head reads, or all logits."""
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
        if not self.in_pieces:
            return self.model(**inputs, use_cache=False).logits

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _HeadReached(output.last_hidden_state)

        # Through the model's own forward, as accelerate puts the precision of training there.
        handle = self.model.base_model.register_forward_hook(stop)
        try:
            self.model(**inputs, use_cache=False)
        except _HeadReached as reached:
            return reached.states
        finally:
            handle.remove()
        raise RuntimeError("The model has made logits without the part before its head.")

    def logits(self, states: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The logits `(part, vocabulary)` of states `(positions, hidden)`, with what part they are of."""
        if not self.in_pieces:
            yield slice(0, len(states)), states
            return
        model, base = self.model, cast(Any, self.model.base_model)
        step = ROWS * max(1, PIECE // text_config(model.config).vocab_size // ROWS)
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            output = _StandingStill(states[None, part])
            had = vars(base).get("forward")
            vars(base)["forward"] = lambda *args, output=output, **kwargs: output
            try:
                logits = model(input_ids=ids[:, part], use_cache=False).logits[0]
            finally:
                del vars(base)["forward"]
                if had is not None:
                    vars(base)["forward"] = had
            yield part, logits

    def rows(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """The logits of states `(positions, hidden)`, [`ROWS`] positions at a time."""
        for _, logits in self.logits(states):
            yield from logits.split(ROWS)


class _HeadReached(Exception):
    """Ends a forward pass before its head."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


class _StandingStill:
    """What the part before the head would return: its states, and nothing else."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def targets_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions `(batch, length - 1)` count, and the tokens `(batch, length)` that they are to say."""
    labels = batch.get("labels")
    mask = token_mask(batch["input_ids"], labels, batch.get("attention_mask"))
    return mask, batch["input_ids"] if labels is None else labels
