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
UNKNOWN = 5e-5  # the Trainer's default, for weights that are quantised or on other processes


def healing_learning_rate(model: PreTrainedModel) -> float:
    """Returns a peak learning rate to train all weights of a pruned model.

    AdamW changes each weight by about the learning rate in a step. One rate therefore changes small weights
    more than large ones, so the rate is a share of their root mean square (as in Adafactor, 1804.04235,
    section 8). The root mean square is .19 for SmolLM2-135M and .02 for Qwen2.5-Coder-0.5B.

    Args:
        model (`PreTrainedModel`): the model, before or after the removal of layers.
    """
    return relative_learning_rate(find_decoder(model).layers.parameters(), HEALING)


def relative_learning_rate(parameters: Iterable[nn.Parameter], share: float) -> float:
    """Returns `share` of the root mean square of the weight matrices, with two significant digits.

    Args:
        parameters (iterable of `Parameter`): vectors, such as biases, do not count.
        share (`float`): the share.
    """
    matrices = [one.detach() for one in parameters if one.ndim > 1 and one.is_floating_point()]
    if not matrices:
        return UNKNOWN
    # A float32 sum over a whole matrix loses digits. MPS has no float64, so rows are added up on the CPU.
    rows = (torch.linalg.vector_norm(one, dim=-1, dtype=torch.float32) for one in matrices)
    squares = sum(float(norms.cpu().double().square().sum()) for norms in rows)
    return float(f"{share * math.sqrt(squares / sum(one.numel() for one in matrices)):.2g}")
