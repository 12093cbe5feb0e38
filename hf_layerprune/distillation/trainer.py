"""A Trainer whose loss is the distance of the student to a teacher."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import DynamoBackend
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    DataCollator,
    EvalPrediction,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..checkpoints.saving import check_configs, check_merge, check_no_adapters_in, check_writable
from ..data.collator import padding_collator
from ..data.pictures import PictureCollator
from ..data.targets import targets_of
from ..data.trainer_rows import collator_for_pictures, prepare_rows
from ..errors import LayerPruneError, one_line
from ..forward.lm_head import router_losses
from ..surgery.decoder import is_sharded
from ..surgery.lineage import get_lineage
from ..surgery.peft import adapter_configs, base_of, keep_base_known
from .arguments import DistillationTrainingArguments, quieten_replicas
from .checks import (
    check_arguments,
    check_data,
    check_finite,
    check_student,
    check_teacher,
    check_trained_dtype,
)
from .compiled_layers import CompiledLayers
from .distributed import count_distinct_rows, reinitialize_ddp
from .forward_pass import ForwardPass
from .hidden_balance import HiddenBalance
from .loss_log import LossLog
from .objective import distillation_loss
from .resuming import find_checkpoint, load_student, load_weights, remove_as_in_checkpoint
from .shared_prefix import SharedPrefix
from .teacher import (
    add_adapters,
    describe_teacher,
    hold_in_autocast_dtype,
    make_teacher,
    place_teacher,
)
from .trainable import TrainedParameters, forget_parameters, freeze_vision
from .trainer_saving import (
    card_from_record,
    checked_saving,
    checkpoint_errors,
    export_adapters,
    is_checkpoint,
    not_pushed,
    use_cache_restored,
)


logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """Trains a causal language model to match the predictions of its teacher.

    The loss is the KL divergence of the logits and the squared error of hidden states against the original
    model (Iterative Layer-wise Distillation, 2511.05085, section 3). Student layers are matched with teacher
    layers by the student's lineage, so layers may be removed during training: see [`LayerPruningCallback`].

    Each loss term is logged under its own name:

    - `eval_loss` is the cross-entropy on the labels, which can be compared with other models. It is nan if no
      token has a label.
    - `eval_kl` and `eval_hidden_mse` are the distillation terms.
    - `aux_loss` is the balancing loss of a mixture of experts with `output_router_logits=True` in its config.
      It is the mean over the accumulated batch, weighted by tokens and by `router_aux_loss_coef`.

    Args:
        model (`PreTrainedModel`, `PeftModel` or `str`): the student, as a model, a folder or a hub id. A
            folder or hub id is loaded in float32, as in trl, and its tokenizer is the default
            `processing_class`. Only the adapters of a `PeftModel` are trained.
        args ([`DistillationTrainingArguments`], *optional*): settings.
        teacher_model (`PreTrainedModel` or `str`, *optional*): a model, a folder (also a cache of
            [`cache_teacher_logits`]) or a hub id. Default: a frozen copy of `model`. If adapters are trained,
            the copy has no adapters and shares the weights of `model`. Under 16-bit mixed precision, a copy
            or a loaded teacher holds the weights of its linear layers in 16 bits, like autocast uses them.
        peft_config (`PeftConfig`, *optional*): train these PEFT adapters instead of the model's weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the code that comes with `model` and
            `teacher_model` if these are folders or hub ids.

    All other arguments are the same as in [`~transformers.Trainer`]. `train_dataset` and `eval_dataset` may
    hold raw rows with `text`, `messages`, `conversations`, or `prompt` and `completion`. [`prepare_dataset`]
    makes token sequences of them with the tokenizer in `processing_class`. The default `data_collator` pads
    rows of unequal length on the right. For rows with pictures it is a [`PictureCollator`], with which only
    the text decoder, the embeddings and the LM head are trained. A saved model is loaded again and compared,
    see `verify_save` in [`DistillationTrainingArguments`].

    Raises:
        LayerPruneError: the teacher does not fit the student, or distillation does not use an argument.
    """

    args: DistillationTrainingArguments
    # Each loss term is a sum over tokens, divided by the number of tokens in the accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path | None = None,
        args: DistillationTrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | datasets.Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | datasets.Dataset | None = None,
        processing_class: PreTrainedTokenizerBase
        | BaseImageProcessor
        | FeatureExtractionMixin
        | ProcessorMixin
        | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (
            None,
            None,
        ),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        *,
        teacher_model: PreTrainedModel | str | Path | None = None,
        peft_config: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        args = args or DistillationTrainingArguments()
        check_arguments(args, {"compute_loss_func": compute_loss_func, "model_init": model_init})
        quieten_replicas(args)
        student, processing_class = load_student(model, processing_class, trust_remote_code)
        check_student(student, args, peft_config)
        compares_layers = args.hidden_weight > 0
        shares_weights = peft_config is not None or bool(adapter_configs(student))
        teacher = make_teacher(
            teacher_model, student, compares_layers, shares_weights, processing_class, trust_remote_code
        )
        trained = student if peft_config is None else add_adapters(student, peft_config)
        if adapter_configs(trained):
            keep_base_known(trained)
        student = base_of(student)
        self._copied_teacher = teacher_model is None
        self._teacher_layers = check_teacher(teacher, args)
        # The Trainer disables the cache in the config.
        self._use_cache = getattr(student.config, "use_cache", None) or student.generation_config.use_cache
        if shares_weights and args.export == "merged" and not is_sharded(trained):
            check_merge(trained)
        if data_collator is None:
            data_collator = collator_for_pictures([train_dataset, eval_dataset], processing_class, args)
        if isinstance(data_collator, PictureCollator):
            args.remove_unused_columns = False  # the collator reads columns that the model does not
            freeze_vision(trained)  # teacher and student see the same
        # A collator that reads raw rows needs all columns.
        if data_collator is None or args.remove_unused_columns:
            tokenizer: Any = processing_class
            train_dataset = prepare_rows(train_dataset, tokenizer, student, args, "train_dataset")
            eval_dataset = prepare_rows(eval_dataset, tokenizer, student, args, "eval_dataset")
        super().__init__(
            trained,
            args,
            padding_collator(processing_class) if data_collator is None else data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        check_trained_dtype(self, trained)
        self.add_callback(_ConfigCheck)
        self._hand_over()
        student.add_model_tags(["hf_layerprune", "knowledge-distillation"])
        if args.torch_compile:  # compile layer by layer: a compiled model would keep removed layers
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        if teacher is not teacher_model and not shares_weights:
            hold_in_autocast_dtype(teacher, self.accelerator)
        logger.info("Teacher: %s.", describe_teacher(teacher, student))
        # The teacher is not part of self.model, because self.model is trained, saved and broadcast.
        self.teacher: Any = place_teacher(teacher, self.accelerator)
        self._compiled_layers = CompiledLayers(
            args.torch_compile, backend=args.torch_compile_backend, mode=args.torch_compile_mode
        )
        self._forward_pass: ForwardPass | None = None  # created with the first batch
        self._trained_parameters = TrainedParameters(args.trainable)
        self._shared_prefix = SharedPrefix(self.teacher)
        self._hidden_balance = HiddenBalance(self.accelerator.reduce)
        self._loss_log = LossLog(self.accelerator.reduce)
        self._kept_layers: list[int] | None = None
        self._needs_logits = True

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, see [`~transformers.Trainer.add_callback`]."""
        super().add_callback(callback)
        self._hand_over()

    def _hand_over(self) -> None:
        """Passes this Trainer to the callbacks that need it, such as [`LayerPruningCallback`]."""
        for callback in list(self.callback_handler.callbacks):
            if hasattr(callback, "set_trainer") and getattr(callback, "trainer", None) is not self:
                callback.set_trainer(self)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the sum of the weighted loss terms, divided by the tokens of the accumulated batch.

        In evaluation it returns the mean cross-entropy. See [`~transformers.Trainer.compute_loss`].
        """
        training, student = model.training, self.accelerator.unwrap_model(model)
        mask, labels = targets_of(inputs)
        # Evaluation with Liger kernels sets skip_logits, which only a forward pass with labels can use.
        inputs = {name: x for name, x in inputs.items() if name not in ("labels", "skip_logits")}
        lineage, shared_layers = get_lineage(student), 0
        pairs = self._teacher_layers.pairs_with(lineage) if self.args.hidden_weight else []
        if training:
            self._follow_removals(model, student, inputs["input_ids"])
            shared_layers = self._shared_prefix.length
        else:
            mask[count_distinct_rows(self.accelerator, len(mask)) :] = False
        if self._forward_pass is None:
            trained = self.accelerator.unwrap_model(self.model)
            self._forward_pass = ForwardPass(
                self.teacher, trained, inputs["input_ids"], self._compiled_layers
            )
        with router_losses(student) as balancing:
            outputs, teacher_outputs = self._forward_pass.run(inputs, pairs, shared_layers, model)
        balance, memory = training and self.args.balance_hidden, self.state.stateful_callbacks
        scale = self._hidden_balance.scale(memory, lineage.kept, self.state.global_step) if balance else 1.0
        loss = distillation_loss(
            outputs,
            teacher_outputs,
            labels,
            mask,
            self.args,
            layer_pairs=pairs,
            router_losses=balancing,
            hidden_scale=scale,
            with_cross_entropy=not training,
        )
        if balance:
            self._hidden_balance.add(memory, loss)
        tokens = mask.sum()
        divisor = num_items_in_batch if training and num_items_in_batch is not None else tokens
        divisor = torch.as_tensor(divisor, device=mask.device).clamp(min=1)
        self._loss_log.add("train" if training else "eval", loss.terms, tokens, divisor if training else 1)
        value = (loss.total if training else loss.terms["ce"]) / divisor
        if training and self.args.average_tokens_across_devices:
            # The divisor counts the tokens of all processes, and gradients are averaged over processes.
            value = value * self.accelerator.num_processes
        if not return_outputs:
            return value
        return value, CausalLMOutput(logits=outputs.logits() if self._needs_logits else None)

    def _follow_removals(self, model: nn.Module, student: Any, input_ids: torch.Tensor) -> None:
        """Chooses the trained parameters again after a removal. Then counts the shared first layers."""
        kept = get_lineage(student).kept
        if kept != self._kept_layers:
            self._kept_layers = kept
            self._compiled_layers.forget()
            self._trained_parameters.choose(student)
            if isinstance(model, DistributedDataParallel):
                reinitialize_ddp(model, self.accelerator.ddp_handler)
        self._shared_prefix.update(student, input_ids)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs one evaluation step, see [`~transformers.Trainer.prediction_step`].

        Computes the whole logits only if they are needed.
        """
        self._needs_logits = not prediction_loss_only
        if "labels" not in inputs:  # without labels the Trainer would measure nothing
            inputs = {**inputs, "labels": inputs["input_ids"]}
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._needs_logits = True

    def compute_loss_context_manager(self) -> Any:
        """Adds mixed precision for parts of the model that run alone.

        Accelerate wraps only the forward pass of the whole model. For PEFT this model does not contain the LM
        head directly. See [`~transformers.Trainer.compute_loss_context_manager`].
        """
        contexts = super().compute_loss_context_manager()
        contexts.enter_context(self.accelerator.autocast())
        return contexts

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs one training step, see [`~transformers.Trainer.training_step`].

        Raises:
            LayerPruneError: the loss is not finite. The weights are the same as before the step.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        check_finite(loss, inputs["input_ids"], self.state.global_step + 1, str(self.args.output_dir))
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Returns the batches of a step and their number of tokens.

        Counts the tokens with the mask of the loss, on all processes. Warns once if no token of a step
        counts. See [`~transformers.Trainer.get_batch_samples`].
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        count = torch.stack([targets_of(batch)[0].sum().to(device) for batch in batches]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        self._loss_log.count_step(self.state.global_step + 1, count)
        return batches, count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss term per token to a log, see [`~transformers.Trainer.log`]."""
        if "loss" in logs:
            logs |= self._loss_log.training_logs(logs["loss"], self.args)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Adds the mean of each loss term per token to the metrics of an evaluation.

        The means do not depend on the batch size or the number of processes. See
        [`~transformers.Trainer.evaluation_loop`].
        """
        self._loss_log.clear("eval")
        output = super().evaluation_loop(*args, **kwargs)
        terms = self._loss_log.evaluation_metrics(kwargs.get("metric_key_prefix", "eval"))
        return output._replace(metrics={**(output.metrics or {}), **terms})

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Trains the student, see [`~transformers.Trainer.train`].

        If the checkpoint has fewer layers than the model, the same layers are first removed from the model.
        `True` resumes from the last complete checkpoint. A run of [`LayerPruningCallback`] without a
        checkpoint starts again.

        Raises:
            LayerPruneError: the checkpoint does not exist or belongs to another model.
        """
        student, output_dir = self.accelerator.unwrap_model(self.model), str(self.args.output_dir)
        checkpoint = find_checkpoint(resume_from_checkpoint, output_dir)
        if checkpoint:
            copied = self._teacher_layers.lineage if self._copied_teacher else None
            remove_as_in_checkpoint(student, checkpoint, copied)
            if self.optimizer is not None:  # made by the user
                forget_parameters(self.optimizer, student)
        check_data(self, student)
        self._loss_log.clear_steps()
        check_writable(output_dir)
        if not adapter_configs(student) or self.args.export == "merged":
            check_no_adapters_in(output_dir)
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            self.is_in_train = False  # the Trainer leaves it True after an error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Private: the Trainer has no public method to load a checkpoint. Its private method rounds weights of
        # a model with two dtypes. See test_weights_of_two_precisions_are_resumed_as_they_were.
        student = self.accelerator.unwrap_model(model or self.model)
        if adapter_configs(student) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(student, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # Private, for the same reason. LayerPruningCallback ensures that this checkpoint has the same layers.
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Private: no public method covers the writing of all files of a checkpoint.
        with checkpoint_errors(str(self.args.output_dir), self.state.global_step, self.args.should_save):
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Private: save_model does not get the state dict that FSDP and DeepSpeed gather.
        folder, model = output_dir or str(self.args.output_dir), self.accelerator.unwrap_model(self.model)
        with use_cache_restored(model, self._use_cache):
            if adapter_configs(model) and not is_sharded(model) and not is_checkpoint(folder):
                if self.args.should_save:
                    export_adapters(model, folder, self.args, self.processing_class, self.hub_model_id)
                return
            with checked_saving(model, folder, self.args) as cast:
                super()._save(output_dir, cast or state_dict)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Creates the repository on the hub, see [`~transformers.Trainer.init_hf_repo`].

        Raises:
            LayerPruneError: the hub cannot be reached or denies access.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # the network, the hub or the account
            raise LayerPruneError(f"No repository can be made on the hub: {one_line(error)}") from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes the model to the hub, see [`~transformers.Trainer.push_to_hub`].

        Raises:
            LayerPruneError: the push failed. The model and its card are in the output folder.
        """
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            self.save_model(_internal_call=True)
            self.create_model_card()
            raise not_pushed(error, self.args.output_dir) from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card from the run record of [`LayerPruningCallback`].

        Without a run record it writes the card of [`~transformers.Trainer.create_model_card`].
        """
        if not card_from_record(self, *args, **kwargs):
            super().create_model_card(*args, **kwargs)


class _ConfigCheck(TrainerCallback):
    """Checks that transformers can save the config after the Trainer has set the special tokens."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_configs(model)
