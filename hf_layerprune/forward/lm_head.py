"""Computes the last hidden states of a model, and their logits in chunks. Memory does not grow with sequence
length times vocabulary size."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.targets import Batch, Positions, targets_of
from ..errors import LayerPruneError
from ..surgery.decoder import describe_class, is_sharded, predicts_next_token, text_config
from ..surgery.peft import base_of
from .hooks import cache_off, running
from .token_losses import joined, logit_spread, sum_by_unit, sum_dtype


LOGITS_PER_CHUNK = 2**25  # logits computed at once
ROWS = 16  # positions whose probabilities a CPU computes at once, so that they fit into its cache


class ChunkedLMHead:
    """Computes the last hidden states of a model and their logits in chunks, also while layers are removed.

    The model's own forward computes the logits. The given states replace the part before the LM head, so that
    bias, scale and soft cap of the logits are applied. If this does not reproduce the model's logits, all
    logits are computed at once. A model without a language-model head has states only.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a text model. It must be in eval mode in this call.
        input_ids (`torch.Tensor`): `(batch, length)`, the tokens for a test of the chunked logits.
    """

    def __init__(self, model: Any, input_ids: torch.Tensor) -> None:
        self.model, self._inner = model, base_of(model)
        # Sharded weights are whole only within the model's own forward, which runs all parts of the model.
        self.has_logits = predicts_next_token(self._inner)
        self.is_chunked = (
            self.has_logits
            and not is_sharded(model)
            and "logits_to_keep" in inspect.signature(type(self._inner).forward).parameters
        )
        self._body: Any = self._inner.base_model
        self._cast: tuple[nn.Parameter, Any] | None = None
        self.vocabulary: int = text_config(self._inner.config).vocab_size
        input_ids = input_ids[:1, :8]
        if not self.has_logits:
            self._check_text_alone(input_ids)
        if not self.is_chunked:
            return
        whole = model(input_ids=input_ids, use_cache=False).logits
        try:
            chunked = self.head(self.states({"input_ids": input_ids})[0])[None]
        except Exception:  # a model with another structure
            self.is_chunked = False
        else:
            scale = logit_spread(whole)
            # Compared in float32: in mixed precision, accelerate converts only the logits of the whole model.
            self.is_chunked &= chunked.shape == whole.shape and torch.allclose(
                chunked.float(), whole.float(), rtol=0, atol=0.05 * scale, equal_nan=True
            )

    def states(self, batch: Batch, model: nn.Module | None = None) -> torch.Tensor:
        """Returns the states `(batch, length, hidden)` that the LM head reads, or all logits.

        Args:
            batch (`dict`): `input_ids` `(batch, length)` and other inputs of the model.
            model (`nn.Module`, *optional*): the wrapper of the model, such as DDP. Default: the model.
        """
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
        if not self.has_logits:
            return self._body_states(inputs)
        inputs["use_cache"] = False
        model = model or self.model
        if not self.is_chunked:
            return model(**inputs).logits
        outputs = []
        handle = self._body.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            # Calls the model's own forward, where accelerate sets the precision of training.
            model(**inputs, logits_to_keep=batch["input_ids"].new_empty(0))
        finally:
            handle.remove()
        return outputs[0].last_hidden_state

    def _body_states(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the last hidden states of a model without a language-model head. Its head is not run."""
        # Sharded weights are whole only within the model's own forward.
        runs = self._inner if is_sharded(self.model) else self._body
        outputs = []
        handle = self._body.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            runs(**inputs, **cache_off(runs))
        finally:
            handle.remove()
        return outputs[0].last_hidden_state

    def _check_text_alone(self, input_ids: torch.Tensor) -> None:
        try:
            self._body_states({"input_ids": input_ids})
        except Exception as error:  # a model can raise any error
            raise LayerPruneError(
                f"{describe_class(self._inner)} cannot be scored with text: it does not read tokens alone or "
                f"has no last hidden state ({' '.join(str(error).split())[:200]})."
            ) from error

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the logits `(positions, vocabulary)` of states `(positions, hidden)`."""
        if not self.is_chunked:
            return states
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        output = _StandingStill(states[None])
        with running(self._body, lambda *args, **kwargs: output):
            return self._inner(input_ids=ids, use_cache=False).logits[0]

    def head_parameters(self) -> list[nn.Parameter]:
        """Returns the trained parameters that [`ChunkedLMHead.head`] reads."""
        if not self.is_chunked:
            return []
        others = {id(parameter) for parameter in self._body.parameters()}
        others -= {id(parameter) for parameter in self._inner.get_output_embeddings().parameters()}
        trained = [parameter for parameter in self._inner.parameters() if parameter.requires_grad]
        return [parameter for parameter in trained if id(parameter) not in others]

    @contextmanager
    def cast_once(self) -> Iterator[None]:
        """Casts the weight of a plain LM head once within this context, not in each call of
        [`ChunkedLMHead.head`]. Its gradients are those of [`ChunkedLMHead.stand_in`]."""
        module: Any = self._inner.get_output_embeddings()
        if not self.is_chunked or type(module) is not nn.Linear:
            yield
            return
        weight: Any = module.weight
        device = weight.device.type

        def swap(*args: Any) -> None:
            if module.weight is weight and weight.is_floating_point() and torch.is_autocast_enabled(device):
                cast = weight.detach().to(torch.get_autocast_dtype(device))
                module.weight = nn.Parameter(cast, weight.requires_grad)

        handle, self._cast = module.register_forward_pre_hook(swap), (weight, module)
        try:
            yield
        finally:
            handle.remove()
            module.weight, self._cast = weight, None

    def stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns the parameter that takes the place of a parameter within [`ChunkedLMHead.cast_once`]."""
        if self._cast is not None and parameter is self._cast[0]:
            return self._cast[1].weight
        return parameter

    def rows(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the logits of states `(positions, hidden)`, [`ChunkedLMHead.rows_at_once`] at a time.

        The logits of a chunk are computed at once.
        """
        for chunk in states.split(self._chunk_size) if self.is_chunked else [states]:
            yield from self.head(chunk).split(self.rows_at_once)

    @property
    def rows_at_once(self) -> int:
        """The number of positions whose logits [`ChunkedLMHead.rows`] yields at once. On a CPU the logits fit
        into its cache. Other devices get a whole chunk."""
        return ROWS if self.model.device.type == "cpu" else self._chunk_size

    @property
    def _chunk_size(self) -> int:
        """The number of positions in a chunk."""
        return ROWS * max(1, LOGITS_PER_CHUNK // self.vocabulary // ROWS)


def balances_routers(model: Any) -> bool:
    """Returns whether the model's own loss includes the load-balancing loss of its experts."""
    return bool(getattr(text_config(base_of(model).config), "output_router_logits", False))


@contextmanager
def router_losses(model: Any) -> Iterator[list[tuple[float, torch.Tensor]]]:
    """Collects the weight and the value of the load-balancing loss in each forward pass of a mixture of
    experts with `output_router_logits=True`.

    Raises:
        LayerPruneError: the config has no known field for the weight.
    """
    inner: Any = base_of(model)
    losses: list[tuple[float, torch.Tensor]] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        value = getattr(output, "aux_loss", None)
        if torch.is_tensor(value):
            losses.append((_router_weight(inner), value))

    handle = inner.register_forward_hook(keep) if balances_routers(inner) else None
    try:
        yield losses
    finally:
        if handle is not None:
            handle.remove()


def _router_weight(model: Any) -> float:
    for place in (model, text_config(model.config)):  # the model's own forward accepts both
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(getattr(place, name, None), (int, float)):
                return float(getattr(place, name))
    raise LayerPruneError(
        f"output_router_logits is True, but {model.config.model_type} has no router_aux_loss_coef, the "
        "weight of the balancing loss. Set it in the model's config, or set output_router_logits=False."
    )


class _StandingStill:
    """The output of the part before the LM head. It holds only the last hidden states."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def unit_losses(lm_head: ChunkedLMHead, batch: Batch, positions: Positions | None = None) -> torch.Tensor:
    """Returns the summed next-token loss of each [`UNIT`] of the batch, in nats.

    Args:
        lm_head ([`ChunkedLMHead`]): computes the logits.
        batch (`dict`): `input_ids` `(batch, length)` and other inputs of the model.
        positions ([`Positions`], *optional*): the counted positions of the batch. Default: all positions
            whose next token has a label.

    Returns:
        `torch.Tensor`: `(units,)`, see [`sum_dtype`].
    """
    mask, tokens = targets_of(batch)
    positions = positions or Positions.of(mask)
    logits = lm_head.rows(positions.select(lm_head.states(batch)))
    targets = positions.select(tokens[:, 1:]).split(lm_head.rows_at_once)
    # Without positions there is one empty chunk of targets, and no chunk of logits.
    losses = [
        F.cross_entropy(rows.float(), tokens_after.long(), reduction="none").to(sum_dtype(mask.device))
        for rows, tokens_after in zip(logits, targets, strict=bool(len(targets[0])))
    ]
    return sum_by_unit(positions, joined(losses, positions))
