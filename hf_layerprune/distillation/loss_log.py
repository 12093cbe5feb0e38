"""Sums each loss term between two logs and counts the steps without tokens."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .losses import hidden_loss_dominates
from .objective import LossSettings


logger = logging.getLogger(__name__)


class LossLog:
    """Computes the mean of each loss term per token, since the last log or over an evaluation.

    Args:
        reduce (`Callable`): sums a tensor over all processes.
    """

    def __init__(self, reduce: Callable[[torch.Tensor], Any]) -> None:
        self._reduce = reduce
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._steps = self._steps_without_tokens = 0
        self._warned = False

    def add(self, mode: str, terms: dict[str, torch.Tensor], tokens: torch.Tensor, divisor: Any = 1) -> None:
        """Adds the loss terms of a batch and its number of tokens.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            terms (`dict[str, torch.Tensor]`): sums over tokens.
            tokens (`torch.Tensor`): the number of tokens that count.
            divisor (*optional*, defaults to 1): divides the terms and the number of tokens. In training it is
                the number of tokens of the step, so that every step has the same weight.
        """
        for name, total in {**terms, "tokens": tokens}.items():
            self._sums[mode][name] += total.detach() / divisor

    def training_logs(self, loss: float, settings: Any) -> dict[str, float]:
        """Returns the values for a training log: the mean of each loss term per token and the mean loss.

        The mean loss is over the steps with tokens. The sums start again. Warns if the hidden-state error
        dominates the loss.

        Args:
            loss (`float`): the mean loss over all steps since the last log.
            settings ([`DistillationTrainingArguments`]): the settings.
        """
        terms = self.means("train")
        mean = self._mean_over_steps_with_tokens(loss)
        self.clear_steps()
        if not settings.balance_hidden:
            _warn_of_dominating_hidden_loss(terms, settings)
        return {"loss": mean, **terms}

    def evaluation_metrics(self, prefix: str) -> dict[str, float]:
        """Returns the mean of each loss term per token over an evaluation. The sums start again.

        `{prefix}_loss` is the cross-entropy.
        """
        terms = self.means("eval", f"{prefix}_")
        if f"{prefix}_ce" in terms:
            terms[f"{prefix}_loss"] = terms[f"{prefix}_ce"]
        _warn_of_evaluation_without_tokens(terms)
        return terms

    def means(self, mode: str, prefix: str = "") -> dict[str, float]:
        """Returns the mean of each loss term per token over all processes. The sums start again.

        A mean is nan if there are no tokens.
        """
        sums = {name: float(self._reduce(total)) for name, total in self._sums[mode].items()}
        self.clear(mode)
        tokens = sums.pop("tokens", 0.0)
        return {
            f"{prefix}{name}": round(total / tokens, 6) if tokens else float("nan")
            for name, total in sums.items()
        }

    def clear(self, mode: str) -> None:
        """Clears all loss terms of a mode."""
        self._sums[mode].clear()

    def clear_steps(self) -> None:
        """Clears the counts of steps."""
        self._steps = self._steps_without_tokens = 0

    def count_step(self, step: int, tokens: Any) -> None:
        """Counts a training step. Warns once if no token of a step counts."""
        self._steps += 1
        if tokens:
            return
        self._steps_without_tokens += 1
        if not self._warned:
            self._warned = True
            logger.warning(
                "No token of step %d counts: all labels are -100, or all tokens are padding. Such steps "
                "teach nothing, and logged losses are those of the other steps. Check the labels that "
                "train_dataset and data_collator make.",
                step,
            )

    def _mean_over_steps_with_tokens(self, loss: float) -> float:
        """Returns the mean loss over the steps with tokens; nan if no step has tokens.

        Args:
            loss (`float`): the mean loss over all steps since the last log.
        """
        if not self._steps_without_tokens:
            return loss
        steps = self._steps - self._steps_without_tokens
        return loss * self._steps / steps if steps else float("nan")


def _warn_of_dominating_hidden_loss(terms: dict[str, float], settings: LossSettings) -> None:
    """Warns if the weighted hidden-state error is much larger than the other loss terms."""
    hidden = settings.hidden_weight * terms.get(f"hidden_{settings.hidden_loss}", 0.0)
    divergence = settings.kl_weight * terms.get(settings.divergence, 0.0)
    warning = hidden_loss_dominates(hidden, divergence + settings.ce_weight * terms.get("ce", 0.0))
    if warning is not None:
        logger.warning(warning)


def _warn_of_evaluation_without_tokens(metrics: dict[str, float]) -> None:
    """Warns if all losses of an evaluation are nan."""
    if metrics and all(map(math.isnan, metrics.values())):
        logger.warning(
            "No token of the evaluation data counts: all labels are -100, or all tokens are padding. Its "
            "losses are nan. Check the labels that the data set and data_collator make."
        )
