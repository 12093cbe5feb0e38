"""Handles SIGTERM in training: saves a checkpoint after the present step, then ends the process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import Trainer, TrainingArguments


TERMINATED = 128 + signal.SIGTERM  # the exit code of a process that SIGTERM ended


class Termination:
    """Handles SIGTERM while a Trainer trains.

    In a training step the signal requests a checkpoint after the step. Inside [`~Termination.immediate`], and
    when the Trainer no longer trains, the process exits at once with code 143.
    """

    def __init__(self) -> None:
        self._is_requested = False
        self._is_immediate = False
        self._trainer: Trainer | None = None

    def install(self, trainer: Trainer | None) -> None:
        """Installs the handler of the signal, unless other code has installed a handler.

        Args:
            trainer (`Trainer`, *optional*): the Trainer. Its `is_in_train` is False if training was aborted.
        """
        self._is_requested = self._is_immediate = False
        self._trainer = trainer
        present = signal.getsignal(signal.SIGTERM)
        # Replace the handler of an aborted run.
        free = present is signal.SIG_DFL or isinstance(getattr(present, "__self__", None), Termination)
        if free and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handle)

    def uninstall(self) -> None:
        """Restores the default handler at the end of training."""
        if signal.getsignal(signal.SIGTERM) == self.handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def handle(self, number: int, frame: Any) -> None:
        """Handles the signal."""
        if self._is_immediate or (self._trainer is not None and not self._trainer.is_in_train):
            raise SystemExit(TERMINATED)
        self._is_requested = True

    @contextmanager
    def immediate(self, nothing_is_lost: bool = True) -> Iterator[None]:
        """Makes the signal end the process at once within this context, if no work is lost."""
        self._is_immediate = nothing_is_lost
        try:
            yield
        finally:
            self._is_immediate = False

    def is_requested(self, args: TrainingArguments) -> bool:
        """Returns whether any process got the signal.

        All processes end together, because they wait for each other.
        """
        if args.world_size > 1:
            signals = torch.tensor(int(self._is_requested), device=args.device)
            self._is_requested = bool(reduce(signals, "sum"))
        return self._is_requested

    def end_process(self) -> None:
        """Ends the process if it got the signal."""
        if self._is_requested:
            raise SystemExit(TERMINATED)
