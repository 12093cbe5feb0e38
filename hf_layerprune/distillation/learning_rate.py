"""Peak learning rates that fit the size of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..surgery.decoder import find_decoder


HEALING = 5e-4  # change of a weight in a step of AdamW, as a share of the weights' root mean square
RECONSTRUCTION = 3e-3  # the same for a few layers, whose loss has little noise
ADAPTERS = 1e-3  # rate for adapters, whose size at the start says nothing


def healing_learning_rate(model: PreTrainedModel) -> float:
    """Returns a peak learning rate to train all weights of a pruned model.

    AdamW changes each weight by about the learning rate in a step. One rate therefore changes small weights
    more than large ones, so the rate is a share of their root mean square (as in Adafactor, 1804.04235,
    section 8). Between SmolLM2-135M (.19) and Qwen2.5-0.5B (.02) this is a factor of ten.

    Args:
        model (`PreTrainedModel`): the model, before or after the removal of layers.
    """
    return relative_learning_rate(find_decoder(model).layers.parameters(), HEALING)


def relative_learning_rate(parameters: Iterable[nn.Parameter], share: float) -> float:
    """Returns `share` of the root mean square of the weight matrices, with two significant digits.

    Args:
        parameters (iterable of `Parameter`): at least one of them has two or more dimensions.
        share (`float`): the share.
    """
    matrices = [parameter.detach() for parameter in parameters if parameter.ndim > 1]
    squares = sum(float(torch.linalg.vector_norm(one, dtype=torch.float32)) ** 2 for one in matrices)
    return float(f"{share * math.sqrt(squares / sum(one.numel() for one in matrices)):.2g}")
