"""Runs block reconstruction in training, after the removals of a phase and before the Trainer continues."""

import logging
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from ..checkpoints.saving import save_model
from ..checkpoints.verification import load_again
from ..data.targets import Batch
from ..distillation.reconstruction import check_can_reconstruct, reconstruct_layers
from ..distillation.teacher_cache import CachedTeacherLogits
from ..distillation.trainer import DistillationTrainer
from ..errors import LayerPruneError
from ..forward.hooks import undisturbed
from ..surgery.peft import adapter_configs
from .arguments import ReconstructionArguments


logger = logging.getLogger(__name__)

FOLDER = "reconstruction"  # folder of checkpoints and hidden states in the output folder
ORIGINAL = "original_model"  # folder of the original model for a plain Trainer


class PhaseReconstruction:
    """Trains the layers next to the cuts of a phase on the teacher's hidden states.

    Args:
        settings ([`ReconstructionArguments`]): the settings of the reconstruction.
        args ([`~transformers.TrainingArguments`]): the training arguments.
        teacher (`PreTrainedModel`): the original model.
        model (`PreTrainedModel`): the model before the first removal. Its frozen parameters stay frozen.
        loader (`DataLoader`): the data loader of training.
        calibration (`list`): the batches to train on if the training data is a stream.
        phase_tokens (`int`, *optional*): number of training tokens in a phase, if phases are counted in
            tokens.
        phase_steps (`int`): number of training steps in a phase.

    Raises:
        LayerPruneError: these models or this text do not allow reconstruction.
    """

    def __init__(
        self,
        settings: ReconstructionArguments,
        args: TrainingArguments,
        teacher: PreTrainedModel,
        model: PreTrainedModel,
        loader: Any,
        calibration: list[Batch],
        phase_tokens: int | None,
        phase_steps: int,
    ) -> None:
        self._settings, self._args, self._teacher = settings, args, teacher
        self._loader, self._calibration = loader, calibration
        self._tokens = settings.reconstruction_tokens or phase_tokens
        self._rows = phase_steps * args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        self._frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        self._folder = Path(str(args.output_dir)) / FOLDER
        check_can_reconstruct(model, teacher, list(islice(self._batches(model, 1), 1)))

    def run(self, model: PreTrainedModel, removed: Collection[int], number: int) -> dict[str, Any]:
        """Trains the layers of `model` next to the new cuts, in place.

        Args:
            model (`PreTrainedModel`): the pruned model.
            removed (collection of `int`): the layers that the phase removed, by original index.
            number (`int`): the number of the phase, which is the seed for its rows.

        Returns:
            `dict`: the result of [`reconstruct_layers`], and its duration in `seconds`.
        """
        began, settings = time.monotonic(), self._settings
        with trainable_but(model, self._frozen):
            result = reconstruct_layers(
                model,
                self._teacher,
                list(self._batches(model, number)),
                layers_before=settings.reconstruction_layers,
                layers_after=settings.reconstruction_layers,
                removed=removed,
                epochs=settings.reconstruction_epochs,
                learning_rate=settings.reconstruction_learning_rate,
                autocast=torch.bfloat16 if self._args.bf16 else None,  # fp16 would need gradient scaling
                seed=self._args.seed,
                folder=self._folder,
                progress=not self._args.disable_tqdm,
            )
        if PartialState().is_main_process:
            self._folder.rmdir()  # its checkpoints are already deleted
        return result.to_dict() | {"seconds": round(time.monotonic() - began, 2)}

    def _batches(self, model: PreTrainedModel, number: int) -> Iterator[Batch]:
        """Yields batches of random rows of the training data until there are enough tokens or rows.

        Each row is drawn at most once. If the training data is a stream, yields the calibration batches
        instead. Every call with the same number yields the same batches.
        """
        tokens = 0
        for batch in self._training_batches(model, number) if self._can_draw else self._calibration:
            yield batch
            ids = batch["input_ids"]
            tokens += int(batch.get("attention_mask", torch.ones_like(ids)).sum())
            if self._tokens is not None and tokens >= self._tokens:
                return

    @property
    def _can_draw(self) -> bool:
        dataset = self._loader.dataset
        return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")

    def _training_batches(self, model: PreTrainedModel, number: int) -> Iterator[Batch]:
        dataset, seed = self._loader.dataset, self._args.seed + number
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        if self._tokens is None:
            order = order[: self._rows]
        size = self._args.train_batch_size * self._args.world_size
        for first in range(0, len(order), size):
            with undisturbed(model):  # the collator may draw random numbers
                set_seed(seed + first)
                batch = self._loader.collate_fn([dataset[row] for row in order[first : first + size]])
            yield batch


@contextmanager
def trainable_but(model: PreTrainedModel, frozen: Collection[int]) -> Iterator[None]:
    """Makes all parameters trainable within this context, except the parameters with these ids.

    The Trainer may train fewer parameters, for example with `trainable="around_cuts"`. It chooses them after
    a removal.
    """
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in required:
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) not in frozen)
    try:
        yield
    finally:
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)


def find_teacher(
    given: PreTrainedModel | None,
    trainer: Trainer | None,
    args: TrainingArguments,
    model: PreTrainedModel,
    is_resumed: bool,
) -> PreTrainedModel:
    """Returns the teacher of reconstruction.

    It is the teacher of [`DistillationTrainer`], else the given teacher, else a copy of the original model.
    The copy stays in the output folder so that the run can be resumed.

    Args:
        given (`PreTrainedModel`, *optional*): the teacher that scores layers.
        trainer, args, model: the Trainer (*optional*), the training arguments and the model of training.
        is_resumed (`bool`): whether `model` may already have lost layers.

    Raises:
        LayerPruneError: the original model does not exist.
    """
    if isinstance(trainer, DistillationTrainer):
        if isinstance(trainer.teacher, CachedTeacherLogits):
            raise LayerPruneError(
                "reconstruction_layers needs the teacher's hidden states, but "
                f"{trainer.teacher.folder} holds cached logits. Give the original model as teacher_model, or "
                "set reconstruction_layers to 0."
            )
        teacher: Any = trainer.accelerator.unwrap_model(trainer.teacher)
        return teacher
    if given is not None:
        return given
    if adapter_configs(model):
        raise LayerPruneError(
            "reconstruction_layers needs the original model as teacher, which a plain Trainer with adapters "
            "does not have. Use DistillationTrainer with peft_config, or set reconstruction_layers to 0."
        )
    folder = Path(str(args.output_dir)) / ORIGINAL
    if not is_resumed and PartialState().is_main_process:
        save_model(model, folder, verify=False)
    PartialState().wait_for_everyone()
    if not folder.is_dir():
        raise LayerPruneError(
            f"{folder} is gone, which is the teacher of reconstruction. Put it back, or start a new run in "
            "another output_dir."
        )
    original: Any = load_again(model, folder)
    return original.to(model.device).eval().requires_grad_(False)


def forget_original(args: TrainingArguments, is_over: bool) -> None:
    """Deletes the copy of the original model at the end of a run.

    The copy stays if the run is not over, because the run may be resumed.
    """
    folder = Path(str(args.output_dir)) / ORIGINAL
    if not PartialState().is_main_process or not folder.is_dir():
        return
    if is_over:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        logger.info("Training stopped early. Delete %s unless the run is resumed, which needs it.", folder)
