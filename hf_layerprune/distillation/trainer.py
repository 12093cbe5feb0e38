"""A Trainer whose loss is the distance to another model."""

import copy
import inspect
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from datasets import Dataset
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    TrainOutput,
)

from ..checkpoints.legacy_rope import legacy_rotary
from ..checkpoints.loading import is_whole, last_checkpoint, load_lineage, load_model, runs_own_code
from ..checkpoints.saving import (
    cast_state,
    check_configs,
    check_merge,
    check_reload,
    check_writable,
    save_adapter,
    save_model,
    saving,
)
from ..data import token_mask
from ..errors import LayerPruneError, one_line
from ..forward.hooks import LAST, captured, hidden, replayed, running, undisturbed
from ..forward.lm_head import Reader, balances_routers, router_losses
from ..forward.token_losses import cross_entropy
from ..reports.card import write_card
from ..reports.record import RunRecord, checkpoint_of, read_record, write_record
from ..surgery.decoder import check_next_token, find_decoder, is_sharded, text_config
from ..surgery.lineage import Lineage, get_lineage
from ..surgery.peft import adapter_configs, base_of
from ..surgery.removal import keep_lineage
from .arguments import DistillationTrainingArguments, check_processes_joined, quieten_replicas
from .losses import divergence, drowned_logits, hidden_error, hidden_pairs, likeliest
from .teacher import add_adapters, describe_teacher, find_tokenizer, make_teacher, shared_prefix
from .teacher_cache import TeacherOutputs
from .tiled_loss import tiled_loss
from .trainable import forget_parameters, trained_parameters


logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """[`~transformers.Trainer`] that trains a causal language model to be as its teacher.

    Iterative Layer-wise Distillation (2511.05085, section 3): KL divergence of the logits and squared
    error of hidden states against the original model. Student layers are matched with teacher layers
    by the student's lineage, so layers may be removed while it trains: see [`LayerPruningCallback`].
    Each loss term is logged under its own name. `eval_loss` is the cross-entropy on the labels, so that
    it compares with any other model's; the distillation terms are `eval_kl` and `eval_hidden_mse`.
    It is nan where no token has a label. A mixture of experts with `output_router_logits=True` in its config
    is trained with its balancing loss, too, logged as `aux_loss`: the mean over the accumulated batch,
    weighted by tokens, counts `router_aux_loss_coef` times.

    Args:
        model (`PreTrainedModel` or `str`): the student, a model, a folder or a hub id. A folder or hub id is
            loaded in float32, as trl does, and its tokenizer is the `processing_class` if none is given.
        args ([`DistillationTrainingArguments`], *optional*): settings.
        teacher_model (`PreTrainedModel` or `str`, *optional*): a model, a folder (also of
            [`write_teacher_outputs`]) or a hub id; left out, a frozen copy of `model` as it is given; with
            `peft_config` one that shares its weights.
        peft_config (`PeftConfig`, *optional*): train these adapters of PEFT instead of the model's weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the code that comes with `model` and
            `teacher_model` where these are folders or hub ids.
        others, kwargs: all other arguments of [`~transformers.Trainer`], in its order.

    What is saved is loaded again and compared, see [`DistillationTrainingArguments`].

    Raises:
        LayerPruneError: the teacher does not fit the student, or an argument has no meaning here.
    """

    args: DistillationTrainingArguments
    # Each loss term is a sum over tokens divided by the tokens of the whole accumulated batch.
    loss_is_scaled_for_ga = True
    _tag_names = ("hf_layerprune", "knowledge-distillation")

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        args: DistillationTrainingArguments | None = None,
        *others: Any,
        teacher_model: PreTrainedModel | str | Path | None = None,
        peft_config: Any = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        names = list(inspect.signature(Trainer.__init__).parameters)[3:]
        kwargs |= dict(zip(names, others, strict=False))
        for name in ("compute_loss_func", "model_init"):
            if kwargs.get(name) is not None:
                raise LayerPruneError(f"DistillationTrainer has no use for `{name}`: leave it out.")
        args = args or DistillationTrainingArguments()
        if not isinstance(args, DistillationTrainingArguments):
            raise LayerPruneError(
                f"args is a {type(args).__name__}: make it a DistillationTrainingArguments, which "
                "takes the same settings."
            )
        if args.torch_compile and args.activation_checkpointing:
            raise LayerPruneError("torch_compile and activation_checkpointing do not go together: use one.")
        if args.n_gpu > 1:
            raise LayerPruneError(
                f"{args.n_gpu} GPUs in one process: start with `accelerate launch` or `torchrun`, or with "
                "CUDA_VISIBLE_DEVICES=0."
            )
        check_processes_joined(args)
        quieten_replicas(args)
        if isinstance(model, (str, Path)):
            name = str(model)
            model = load_model(name, dtype="float32", trust_remote_code=trust_remote_code)
            if kwargs.get("processing_class") is None:
                kwargs["processing_class"] = find_tokenizer(name, trust_remote_code)
        if args.legacy_rope:
            legacy_rotary(model.config)  # whether it can be done is told before any work
        if isinstance(model, PreTrainedModel):
            check_next_token(model, "DistillationTrainer")
        if adapter_configs(model):
            raise LayerPruneError("Give the model without its adapters, and these as peft_config=.")
        tokenizer: Any = kwargs.get("processing_class")
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = _collator_without_padding(tokenizer)
        teacher = make_teacher(
            teacher_model,
            model,
            args.hidden_weight > 0,
            peft_config is not None,
            kwargs.get("processing_class"),
            trust_remote_code,
        )
        self._is_own_teacher = teacher_model is None
        vocabulary, self._taught_by, layers = _what_teaches(teacher, args)
        # What is more in one of them only fills it up.
        self._vocabulary = min(vocabulary, text_config(model.config).vocab_size)
        unknown = set(args.hidden_layers or []) - set(layers)
        if unknown:
            raise LayerPruneError(
                f"hidden_layers: the teacher has no layers {sorted(unknown)}, or wrote nothing of them; it "
                f"has {layers}."
            )
        logger.info("Teacher: %s.", describe_teacher(teacher, model))
        # The Trainer switches it off in the config, but not for generation.
        self._use_cache = getattr(model.config, "use_cache", None) or model.generation_config.use_cache
        adapted: Any = model if peft_config is None else add_adapters(model, peft_config)
        if peft_config is not None and args.export == "merged" and not is_sharded(adapted):
            check_merge(adapted)
        super().__init__(adapted, args, **kwargs)
        self.add_callback(_ConfigCheck)
        self._hand_over()
        model.add_model_tags(list(self._tag_names))
        if args.torch_compile:  # layer by layer, see _compiled: a whole compiled model does not see layers go
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        self._compiled_layers: dict[nn.Module, Any] = {}
        # Never inside self.model: it would be trained, saved and broadcast with it.
        self.teacher = teacher
        if isinstance(teacher, PreTrainedModel):
            # Under FSDP accelerate would leave it where it is; what is quantised has its place.
            place = None if getattr(teacher, "is_quantized", False) else True
            self.teacher = self.accelerator.prepare_model(
                teacher, device_placement=place, evaluation_mode=True
            )
        self._made_readers: tuple[Reader | TeacherOutputs, Reader] | None = None
        self._loss_only = False
        self._balance = -1, 0.0  # for this step, what hidden_weight is times
        self._may_train: list[nn.Parameter] | None = None
        self._kept: list[int] | None = None
        self._present: list[tuple[bool, int]] | None = None
        self._shared = 0  # so many first layers run once for teacher and student
        self._idle_steps = self._steps = 0  # since the last log: without a token that counts, and all
        self._told_idle = False
        # Sums of each loss term since the last log, and the tokens they are to be divided by.
        self._terms: dict[str, dict[str, Any]] = {
            "train": defaultdict(float),
            "eval": defaultdict(float),
        }

    def add_callback(self, callback: Any) -> None:
        """See [`~transformers.Trainer.add_callback`]."""
        super().add_callback(callback)
        self._hand_over()

    def _hand_over(self) -> None:
        """Hands this Trainer over to the callbacks that ask for it, as [`LayerPruningCallback`]."""
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
        """The weighted sum of the loss terms, each divided by the tokens of the accumulated batch;
        when evaluating, the mean cross-entropy. See [`~transformers.Trainer.compute_loss`]."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        inputs.pop("skip_logits", None)  # from evaluation with Liger's kernels, for a forward with labels
        mask = token_mask(inputs["input_ids"], labels, inputs.get("attention_mask"))
        tokens = inputs["input_ids"] if labels is None else labels
        if not model.training:
            mask[self._own_rows(len(mask)) :] = False
        training, student = model.training, self.accelerator.unwrap_model(model)
        pairs = self._hidden_pairs(student)
        if training:
            self._follow_cuts(model, student, inputs["input_ids"])
        teacher, learner = self._readers(inputs["input_ids"])
        shared = self._shared if training else 0
        with router_losses(student) as routed:
            states, learnt, expected, taught = self._read(model, inputs, pairs, shared)

        count = mask.sum() if num_items_in_batch is None or not training else num_items_in_batch
        count = torch.as_tensor(count, device=mask.device).clamp(min=1)
        ours, theirs = states[:, :-1][mask], expected[:, :-1][mask]
        weights = {self.args.divergence: self.args.kl_weight, "ce": self.args.ce_weight if training else 1.0}
        losses = partial(self._logit_losses, with_labels=weights["ce"] > 0)
        total: Any = 0.0
        sums: dict[str, torch.Tensor] = {}
        if any(weights.values()):
            total, sums = tiled_loss(learner, ours, teacher, theirs, tokens[:, 1:][mask], losses, weights)
        if pairs:
            parts = [(_state(learnt, s)[:, :-1][mask], _state(taught, t)[:, :-1][mask]) for s, t in pairs]
            error = torch.stack([hidden_error(s, t, self.args.hidden_loss) for s, t in parts]).mean()
            if training and self.args.balance_hidden:
                total = self._balanced(total, error, student)
            else:
                total = total + self.args.hidden_weight * error
            sums[f"hidden_{self.args.hidden_loss}"] = error.detach()
        for coefficient, balance in routed:
            # A mean over the whole text that was read; as all terms, it counts by tokens.
            balance = balance * mask.sum()
            total = total + coefficient * balance
            sums["aux_loss"] = balance.detach()

        self._note("train" if training else "eval", sums, mask.sum(), count if training else 1)
        loss = (total if training else sums["ce"]) / count
        if training and self.args.average_tokens_across_devices:
            # The count is of all processes, and gradients are averaged over them.
            loss = loss * self.accelerator.num_processes
        if not return_outputs:
            return loss
        if self._loss_only:
            return loss, CausalLMOutput()
        logits = learner.head(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        return loss, CausalLMOutput(logits=logits)

    def _read(
        self, model: nn.Module, inputs: dict[str, Any], pairs: list[tuple[int, int]], shared: int
    ) -> tuple[torch.Tensor, dict, Any, dict]:
        """What the student makes of a batch: its last hidden states, and those of the compared layers; and
        the same of the teacher. The `shared` first layers run once."""
        teacher, learner = self._readers(inputs["input_ids"])
        wanted = [t for _, t in pairs] + [shared - 1] * bool(shared)
        expected: Any
        if isinstance(teacher, TeacherOutputs):
            expected, taught = teacher.read(inputs, wanted)
        else:
            with torch.no_grad(), captured(teacher.model, wanted) as taught, self._compiled(teacher.model):
                expected = teacher.states(inputs)
        # Of the shared layers only the last one's output is read on, and what is compared.
        known = [taught[layer if layer in taught else shared - 1][1] for layer in range(shared)]
        student: Any = learner.model
        with (
            captured(student, [s for s, _ in pairs]) as learnt,
            self._compiled(student),
            replayed(base_of(student), known),
        ):
            states = learner.states(inputs, model)
        return states, learnt, expected, taught

    @contextmanager
    def _compiled(self, model: Any) -> Iterator[None]:
        """Within this context the decoder layers of `model` run compiled, if `torch_compile` is set.
        Elsewhere, as in scoring and saving, the model is plain."""
        layers: Any = find_decoder(base_of(model)).layers if self.args.torch_compile else []
        settings: Any = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
        with ExitStack() as patches:
            for layer in layers:
                if layer not in self._compiled_layers:
                    self._compiled_layers[layer] = torch.compile(layer.forward, **settings)
                patches.enter_context(running(layer, self._compiled_layers[layer]))
            if layers:  # a trained and a frozen layer, of either kind of attention, compile apart
                patches.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            yield

    def _hidden_pairs(self, student: Any) -> list[tuple[int, int]]:
        """Which student layers are compared with which teacher layers.

        Raises:
            LayerPruneError: none that was asked for is left.
        """
        if not self.args.hidden_weight:
            return []
        layers = self.args.hidden_layers
        if layers is None and isinstance(self.teacher, TeacherOutputs):
            layers = self.teacher.hidden_layers
        pairs = hidden_pairs(get_lineage(student), self._taught_by, layers)
        if not pairs:
            raise LayerPruneError(
                f"All of hidden_layers {layers} were removed, so there is no hidden "
                "state to compare: protect one of them, or leave hidden_layers out."
            )
        return pairs

    def _balanced(self, total: torch.Tensor, error: torch.Tensor, student: Any) -> torch.Tensor:
        """The total with the error of hidden states in proportion to it, by the sums of both over the steps
        since the last cut, without this one."""
        key, kept = "hidden_balance", get_lineage(student).kept
        memory: Any = self.state.stateful_callbacks  # checkpoints hold it
        if memory.get(key, {}).get("kept") != kept:
            memory[key] = {"kept": kept, "total": 0.0, "error": 0.0}
        sums = memory[key]
        if self._balance[0] != self.state.global_step:
            ratio = sums["total"] / sums["error"] if sums["error"] else 0.0
            self._balance = self.state.global_step, ratio
        found = self.accelerator.reduce(torch.stack([total.detach(), error.detach()]))
        sums["total"] += found[0].item()
        sums["error"] += found[1].item()
        return total + self.args.hidden_weight * self._balance[1] * error

    def _logit_losses(
        self, ours: torch.Tensor, theirs: Any, targets: torch.Tensor, with_labels: bool
    ) -> dict[str, torch.Tensor]:
        args, size = self.args, self._vocabulary
        if torch.is_tensor(theirs):
            theirs = theirs[:, :size]
            if args.top_k:
                theirs = likeliest(theirs, args.top_k, args.temperature)
        far = divergence(ours[:, :size], theirs, args.divergence, args.temperature, args.jsd_beta)
        found = {args.divergence: far}
        return found | {"ce": cross_entropy(ours, targets)} if with_labels else found

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """See [`~transformers.Trainer.prediction_step`]. Logits are made whole only where asked for."""
        self._loss_only = prediction_loss_only
        if "labels" not in inputs:  # without them the Trainer would measure nothing
            inputs = {**inputs, "labels": inputs["input_ids"]}
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._loss_only = False

    def compute_loss_context_manager(self) -> Any:
        """The mixed precision of training, also for parts of the model that are called by themselves:
        accelerate puts it around the forward of the whole model alone, which for PEFT is not the one with the
        output head. See [`~transformers.Trainer.compute_loss_context_manager`]."""
        contexts = super().compute_loss_context_manager()
        contexts.enter_context(self.accelerator.autocast())
        return contexts

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See [`~transformers.Trainer.training_step`].

        Raises:
            LayerPruneError: the loss is not finite; the weights are still as they were before the step.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            ids, folder = inputs["input_ids"], Path(str(self.args.output_dir))
            saved = last_checkpoint(folder)
            raise LayerPruneError(
                f"The loss of step {self.state.global_step + 1} is {float(loss)}, on a batch of "
                f"{tuple(ids.shape)} tokens that begins with {ids[0, :8].tolist()}. Look at the data, or "
                "lower learning_rate, hidden_weight or max_grad_norm. The last checkpoint: "
                f"{saved or 'none'}."
            )
        return loss

    def _follow_cuts(self, model: nn.Module, student: Any, input_ids: torch.Tensor) -> None:
        """When layers have gone, choose anew what is trained; when something else is trained than before, see
        what teacher and student share."""
        kept = get_lineage(student).kept
        if kept != self._kept:
            self._kept = kept
            if self._compiled_layers:
                self._compiled_layers.clear()
                torch.compiler.reset()
            self._choose_trained(student)
            if isinstance(model, DistributedDataParallel):
                self._wrap_again(model)
        present = [(p.requires_grad, 0 if p.requires_grad else p._version) for p in student.parameters()]
        if present != self._present:
            self._present = present
            # The balancing loss of routers reads all layers.
            apart = is_sharded(student) or balances_routers(student)
            if isinstance(self.teacher, PreTrainedModel) and not apart:
                self._shared = shared_prefix(student, self.teacher, input_ids)
            if self._shared:
                logger.info(
                    "The first %d of %d layers run once for teacher and student, and without gradient.",
                    self._shared,
                    len(get_lineage(student).kept),
                )

    def _wrap_again(self, model: DistributedDataParallel) -> None:
        """Make what adds up the gradients of all processes see which parameters there are now, in place."""
        handler, synchronised = self.accelerator.ddp_handler, model.require_backward_grad_sync
        settings: dict[str, Any] = {} if handler is None else handler.to_kwargs()
        settings |= {"device_ids": model.device_ids, "output_device": model.output_device}
        DistributedDataParallel.__init__(model, model.module, **settings)
        if handler is not None:
            handler.register_comm_hook(model)
        model.require_backward_grad_sync = synchronised

    def _choose_trained(self, student: Any) -> None:
        if self._may_train is None:
            self._may_train = [p for p in student.parameters() if p.requires_grad]
        present = {id(parameter) for parameter in student.parameters()}
        self._may_train = [p for p in self._may_train if id(p) in present]  # and those gone are free
        chosen = {id(parameter) for parameter in trained_parameters(student, self.args.trainable)}
        for parameter in self._may_train:
            parameter.requires_grad_(id(parameter) in chosen)
        # Of ZeRO-3's parameters the numbers are elsewhere.
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters() if p.requires_grad)
        if not trained:
            raise LayerPruneError(
                f"trainable={self.args.trainable!r} leaves nothing to train: all of it is frozen, or has no "
                "adapter."
            )
        logger.info("Training %d of %d parameters.", trained, student.num_parameters())

    def _readers(self, input_ids: torch.Tensor) -> tuple[Reader | TeacherOutputs, Reader]:
        """What reads with the teacher, and what reads with the student."""
        if self._made_readers is None:
            teacher: Any = self.teacher
            if not isinstance(teacher, TeacherOutputs):
                with undisturbed(teacher):
                    teacher = Reader(teacher, input_ids)
            student = self.accelerator.unwrap_model(self.model)
            with undisturbed(student):
                self._made_readers = teacher, Reader(student, input_ids)
        return self._made_readers

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """The tokens that count in the accumulated batch, on all processes, by the losses' own mask."""
        if not batch_samples:
            return None
        masks = [
            token_mask(batch["input_ids"], batch.get("labels"), batch.get("attention_mask"))
            for batch in batch_samples
        ]
        count = torch.stack([mask.sum().to(device) for mask in masks]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """See [`~transformers.Trainer.get_batch_samples`]. Says so if no token of a step counts."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._steps += 1
            if not count:
                self._idle_steps += 1
                self._tell_idle()
        return batches, count

    def _tell_idle(self) -> None:
        if not self._told_idle:
            logger.warning(
                "No token of step %d counts: all labels are -100, or all tokens are padding. Such steps "
                "teach nothing, and logged losses are those of the other steps. Check the labels that "
                "train_dataset and data_collator make.",
                self.state.global_step + 1,
            )
        self._told_idle = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms of the steps since the last log, mean per token."""
        if "loss" in logs:
            terms = self._drain("train", "")
            if self._idle_steps:  # whose loss of 0 is no loss
                learnt = self._steps - self._idle_steps
                logs["loss"] = logs["loss"] * self._steps / learnt if learnt else float("nan")
            self._idle_steps = self._steps = 0
            logs |= terms
            self._look_at(terms)
        super().log(logs, start_time)

    def _look_at(self, terms: dict[str, float]) -> None:
        """Say so if one term of the loss leaves no room for the others."""
        args = self.args
        hidden = args.hidden_weight * terms.get(f"hidden_{args.hidden_loss}", 0.0)
        others = args.kl_weight * terms.get(args.divergence, 0.0) + args.ce_weight * terms.get("ce", 0.0)
        sign = None if args.balance_hidden else drowned_logits(hidden, others)
        if sign is not None:
            logger.warning(sign)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Add the loss terms of the evaluation, mean per token, to its metrics. The loss is one of them, the
        same with any batch size and number of processes."""
        self._terms["eval"].clear()
        # Before training the Trainer has not yet put the student into the precision of training.
        wrapped = hasattr(self.accelerator.unwrap_model(self.model), "_original_forward")
        with nullcontext() if wrapped else self.accelerator.autocast():
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        terms = self._drain("eval", f"{prefix}_")
        terms |= {f"{prefix}_loss": terms[f"{prefix}_ce"]} if f"{prefix}_ce" in terms else {}
        if terms and all(map(math.isnan, terms.values())):
            logger.warning(
                "No token of the evaluation data counts: all labels are -100, or all tokens are padding. Its "
                "losses are nan. Check the labels that the data set and data_collator make."
            )
        return output._replace(metrics={**(output.metrics or {}), **terms})

    def _own_rows(self, rows: int) -> int:
        """How many of the rows of an evaluation batch are no repeats, with which accelerate fills up the last
        one so that all processes have as many."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(0, state.remainder - rows * self.accelerator.process_index), rows)

    def _note(self, mode: str, sums: dict[str, torch.Tensor], tokens: torch.Tensor, count: Any) -> None:
        # In training both are divided by the step's tokens, so that every step weighs the same.
        for name, total in {**sums, "tokens": tokens}.items():
            self._terms[mode][name] += total.detach() / count

    def _drain(self, mode: str, prefix: str) -> dict[str, float]:
        terms, self._terms[mode] = self._terms[mode], defaultdict(float)
        terms = {name: float(self.accelerator.reduce(total)) for name, total in terms.items()}
        tokens = terms.pop("tokens", 0.0)
        return {
            f"{prefix}{name}": round(total / tokens, 6) if tokens else float("nan")
            for name, total in terms.items()
        }

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """See [`~transformers.Trainer.train`]. A checkpoint that has fewer layers than the model first
        takes the model to the same layers. With `True` one that was not written to its end is passed over,
        and a run of [`LayerPruningCallback`] that came to none begins again.

        Raises:
            LayerPruneError: no checkpoint there, or one that the model cannot become.
        """
        folder, output_dir = resume_from_checkpoint or None, str(self.args.output_dir)
        if folder is True:
            folder = checkpoint_of(output_dir)
        if folder:
            if not is_whole(folder):
                raise LayerPruneError(
                    f"{folder} is no checkpoint that was written to its end; the last one in {output_dir}: "
                    f"{last_checkpoint(output_dir) or 'none'}."
                )
            self._check_teacher_of(read_record(folder))
            student = self.accelerator.unwrap_model(self.model)
            trusts = runs_own_code(base_of(student))
            keep_lineage(student, load_lineage(str(folder), trusts))
            if self.optimizer is not None:  # the user's own
                forget_parameters(self.optimizer, student)
        self._check_written()
        self._check_labels()
        self._idle_steps = self._steps = 0
        check_writable(output_dir)
        try:
            return super().train(folder, *args, **kwargs)
        finally:
            self.is_in_train = False  # the Trainer leaves it so after an error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint's weights as a new process would, so that every tensor of every type arrives."""
        student = self.accelerator.unwrap_model(model or self.model)
        if adapter_configs(student) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            kinds = {p.dtype for p in student.parameters() if p.is_floating_point()}
            settings = {"dtype": reduce(torch.promote_types, kinds), "output_loading_info": True}
            loaded, report = type(student).from_pretrained(resume_from_checkpoint, **settings)
            if report["missing_keys"]:
                lacking = sorted(report["missing_keys"])[0]
                raise LayerPruneError(f"{resume_from_checkpoint} lacks {lacking}: resume from another one.")
            student.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        # The callback has seen to it that it is of the present depth.
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Written over, a whole checkpoint is none until it is whole again.
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError, LayerPruneError) as error:
            # Our own errors say where the weights are, so they are told whole.
            why = str(error) if isinstance(error, LayerPruneError) else one_line(error)
            raise LayerPruneError(
                f"The checkpoint of step {self.state.global_step} cannot be written: {why} The last whole "
                f"one: {last_checkpoint(folder.parent) or 'none'}. If there was no room, make some, and go "
                "on from there with resume_from_checkpoint=True."
            ) from error

    def _check_written(self) -> None:
        """Before any long work: the teacher wrote of all rows, where these can be seen beforehand."""
        evaluated = [] if self.args.eval_strategy == "no" else [self.eval_dataset]
        for data in [self.train_dataset, *evaluated]:
            if isinstance(self.teacher, TeacherOutputs) and isinstance(data, Dataset):
                rows = self._remove_unused_columns(data, "training")
                for i in range(len(rows)):
                    self.teacher.check_has(self.data_collator([rows[i]]))

    def _check_labels(self) -> None:
        """Before any long work: some token of the training data counts. Reads up to the first that does."""
        data, size = self.train_dataset, self.args.per_device_train_batch_size
        if not isinstance(data, Dataset) or not len(data):
            return
        rows = self._remove_unused_columns(data, "training")
        with undisturbed(self.accelerator.unwrap_model(self.model)):  # of which only the random states matter
            for start in range(0, len(rows), size):
                batch = self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
                if token_mask(batch["input_ids"], batch.get("labels"), batch.get("attention_mask")).any():
                    return
        raise LayerPruneError(
            f"No token of the {len(rows)} rows in train_dataset counts: all labels are -100, or all tokens "
            "are padding. Check the labels that train_dataset and data_collator make."
        )

    def _check_teacher_of(self, record: RunRecord | None) -> None:
        """A model loaded from a checkpoint would, copied, be its own teacher."""
        layers = len(self._taught_by.kept)
        if self._is_own_teacher and record is not None and layers < record.model["layers"]:
            raise LayerPruneError(
                f"The run began with a model of {record.model['layers']} layers, but the teacher has "
                f"{layers}: start from the original model, or give it as teacher_model."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder, model = output_dir or str(self.args.output_dir), self.accelerator.unwrap_model(self.model)
        is_checkpoint = re.fullmatch(PREFIX_CHECKPOINT_DIR + r"-\d+", Path(folder).name)
        verify = self.args.verify_save and self.args.should_save
        with self._plain_config():
            if is_sharded(model):  # one process alone cannot read with this model, to compare
                super()._save(output_dir, state_dict)
            elif not adapter_configs(model):
                legacy = self.args.legacy_rope and self.args.should_save
                dtype = None if is_checkpoint or not self.args.should_save else self.args.save_dtype
                with saving(model, folder, verify=verify, legacy_rope=legacy, dtype=dtype):
                    super()._save(output_dir, cast_state(model, dtype) or state_dict)
            elif is_checkpoint:
                super()._save(output_dir, state_dict)
                if verify:
                    check_reload(model, Path(folder))
            elif self.args.should_save:
                if self.args.export == "adapter":
                    save_adapter(model, folder, verify=verify)
                    record = read_record(str(self.args.output_dir))
                    if record is not None:
                        write_record(record, folder)
                        write_card(record.to_dict(), Path(folder), self.hub_model_id)
                else:  # in a copy, as the teacher reads the same weights
                    legacy, dtype = self.args.legacy_rope, self.args.save_dtype
                    save_model(model, folder, verify=verify, legacy_rope=legacy, dtype=dtype)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)

    @contextmanager
    def _plain_config(self) -> Iterator[None]:
        """Within this context the config is as the user gave it, caching switched on again."""
        config = base_of(self.accelerator.unwrap_model(self.model)).config
        training, config.use_cache = config.use_cache, self._use_cache
        try:
            yield
        finally:
            config.use_cache = training

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """See [`~transformers.Trainer.init_hf_repo`].

        Raises:
            LayerPruneError: the hub cannot be reached, or does not let this user in.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of the network, of the hub, of the account
            raise LayerPruneError(f"No repository can be made on the hub: {one_line(error)}") from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.push_to_hub`].

        Raises:
            LayerPruneError: it was not pushed; the model and its card are in the output folder all the same.
        """
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            self.save_model(_internal_call=True)
            self.create_model_card()
            folder = self.args.output_dir
            raise LayerPruneError(
                f"Not pushed: {one_line(error)} The model is saved in {folder}: push it later, with "
                f"`hf upload REPOSITORY {folder} --exclude 'checkpoint-*'`."
            ) from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card: from the run record where [`LayerPruningCallback`] left one, else as
        [`~transformers.Trainer.create_model_card`] does."""
        record = read_record(str(self.args.output_dir))
        if record is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            write_card(record.to_dict(), folder, self.hub_model_id, *args, **kwargs)


class _ConfigCheck(TrainerCallback):
    """Tells what transformers will refuse to save, when the Trainer has set the special tokens."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_configs(model)


def _collator_without_padding(tokenizer: Any) -> Any:
    """The collator for a tokenizer without a padding token, as Llama's and GPT-2's; None where there is one.
    Rows of unequal length are padded with the end-of-text token, which the attention mask hides."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.pad_token is not None:
        return None
    if tokenizer.eos_token is None:
        return default_data_collator
    padding = copy.deepcopy(tokenizer)  # the user's is saved as it is
    padding.pad_token = tokenizer.eos_token
    return DataCollatorWithPadding(padding)


def _what_teaches(
    teacher: PreTrainedModel | TeacherOutputs, args: DistillationTrainingArguments
) -> tuple[int, Lineage, list[int]]:
    """The vocabulary of a teacher, its lineage, and which layers' states it can give, by original index.

    Raises:
        LayerPruneError: what it wrote is not what `args` ask for.
    """
    if isinstance(teacher, PreTrainedModel):
        lineage, size = get_lineage(teacher), text_config(teacher.config).vocab_size
        if args.top_k is not None and args.top_k >= size:
            raise LayerPruneError(f"top_k is {args.top_k}: it must be below the {size} tokens there are.")
        return size, lineage, lineage.kept
    for name in ("top_k", "temperature"):
        asked, written = getattr(args, name), getattr(teacher, name)
        if asked not in (None, written):
            raise LayerPruneError(f"{name} is {asked}, but {teacher.folder} was written with {written}.")
    if args.hidden_weight and not teacher.hidden_layers:
        raise LayerPruneError(
            f"{teacher.folder} holds no hidden states: write it with hidden_layers=[...], or set "
            "hidden_weight=0."
        )
    return teacher.vocabulary, teacher.lineage, teacher.hidden_layers


def _state(states: dict[int, tuple[Any, Any]], layer: int) -> torch.Tensor:
    if layer not in states:
        raise LayerPruneError(
            f"No hidden state was seen at layer {layer}: it did not run, or was compiled. Switch layer "
            "dropping and compilation off, or set hidden_weight=0."
        )
    before, after = states[layer]
    return before if layer == LAST else hidden(after)
