"""Chooses the trained parameters of a pruned model."""

import logging
from typing import Any

from torch import nn

from ..errors import LayerPruneError
from ..surgery.decoder import find_decoder
from ..surgery.lineage import Lineage, get_lineage
from ..surgery.peft import base_of


logger = logging.getLogger(__name__)

CHOICES = "'all', 'around_cuts', or a number of last layers, as '4'"


def forget_parameters(optimizer: Any, model: nn.Module) -> None:
    """Removes from `optimizer`, in place, the parameters that `model` no longer has, and their state."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    live = {id(parameter) for parameter in model.parameters()}
    for group in inner.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in live]
    for parameter in [p for p in inner.state if id(p) not in live]:
        del inner.state[parameter]


def check_trainable(what: str) -> None:
    """Checks the setting `trainable`.

    Raises:
        LayerPruneError: `what` is not an allowed value.
    """
    if what not in ("all", "around_cuts") and not (what.isdecimal() and int(what) > 0):
        raise LayerPruneError(f"trainable is {what!r}: it must be {CHOICES}.")


def trained_layers(lineage: Lineage, what: str) -> list[int]:
    """Returns the present indices of the trained layers.

    Args:
        lineage (`Lineage`): the lineage of the model.
        what (`str`): `"all"`; `"around_cuts"`, the last layer before and the first layer after each cut
            (Iterative Layer-wise Distillation, 2511.05085, section 3); or a number of last layers.
    """
    count = len(lineage.kept)
    if what == "all":
        return list(range(count))
    if what != "around_cuts":
        return list(range(max(0, count - int(what)), count))
    after = [*lineage.after_cuts, *([count] if lineage.kept[-1] < lineage.original - 1 else [])]
    return sorted({i for cut in after for i in (cut - 1, cut) if 0 <= i < count})


def trained_parameters(model: Any, what: str) -> list[nn.Parameter]:
    """Returns the trained parameters of `model`: all for `"all"`, else the parameters of [`trained_layers`].

    If `what` is a number of last layers, the LM head is included unless it is tied to the embeddings.

    Raises:
        LayerPruneError: no parameter matches `what`.
    """
    if what == "all":
        return list(model.parameters())
    base = base_of(model)
    layers = find_decoder(base).layers
    parameters = [p for i in trained_layers(get_lineage(base), what) for p in layers[i].parameters()]
    if what != "around_cuts":
        embeddings = {id(parameter) for parameter in base.get_input_embeddings().parameters()}
        head: Any = base.get_output_embeddings()
        parameters += [parameter for parameter in head.parameters() if id(parameter) not in embeddings]
    if not parameters:
        raise LayerPruneError(
            "trainable is 'around_cuts', but the model has lost no layer, so nothing would be trained. "
            "Remove layers first, or set trainable to 'all'."
        )
    return parameters


def freeze_vision(model: Any) -> None:
    """Freezes all parameters of a vision-language model, in place, but those of its text decoder, embeddings
    and LM head, and the adapters on them."""
    base = base_of(model)
    text = (find_decoder(base).parent, base.get_input_embeddings(), base.get_output_embeddings())
    kept = {id(parameter) for module in text for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)


class TrainedParameters:
    """Freezes and unfreezes the parameters of a model that loses layers.

    Args:
        trainable (`str`): which parameters to train, see [`trained_parameters`]. Parameters that the user
            froze stay frozen.
    """

    def __init__(self, trainable: str) -> None:
        self._trainable = trainable
        self._not_frozen_by_user: list[nn.Parameter] | None = None

    def choose(self, model: Any) -> None:
        """Chooses the trained parameters of `model` by its current layers.

        Raises:
            LayerPruneError: there is no parameter to train.
        """
        if self._not_frozen_by_user is None:
            self._not_frozen_by_user = [p for p in model.parameters() if p.requires_grad]
        # Drop the parameters of removed layers, so that their memory is freed.
        present = {id(parameter) for parameter in model.parameters()}
        self._not_frozen_by_user = [p for p in self._not_frozen_by_user if id(p) in present]
        chosen = {id(parameter) for parameter in trained_parameters(model, self._trainable)}
        for parameter in self._not_frozen_by_user:
            parameter.requires_grad_(id(parameter) in chosen)
        # DeepSpeed ZeRO-3 empties parameters and stores their sizes in ds_numel.
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        if not trained:
            raise LayerPruneError(
                f"trainable={self._trainable!r} leaves nothing to train: all of it is frozen, or has no "
                "adapter."
            )
        logger.info("Training %d of %d parameters.", trained, model.num_parameters())
