"""Loads or copies the teacher, and checks that it fits the student."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

from ..checkpoints.loading import load_model, load_tokenizer
from ..errors import LayerPruneError, one_line
from ..forward.hooks import undisturbed
from ..forward.token_losses import sum_dtype
from ..surgery.decoder import check_next_token, find_decoder, is_sharded, text_config
from ..surgery.lineage import Lineage, get_lineage
from ..surgery.peft import adapter_configs, base_of, check_adapter_type
from .losses import hidden_pairs
from .teacher_cache import CachedTeacherLogits, is_teacher_cache


logger = logging.getLogger(__name__)

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROBED_TOKENS = 8  # number of tokens to test whether adapters change the logits
LOGIT_TOLERANCE = 0.05  # relative to the largest logit, above the rounding of bfloat16
DIFFERENT_TOKENS = 0.01  # tokenizers count as different from this share of different tokens on


@dataclass(frozen=True)
class TeacherLayers:
    """The layers of a teacher.

    Args:
        lineage ([`Lineage`]): the layers that the teacher has.
        available (`list[int]`): the layers whose hidden states the teacher can return, as original indices.
        compared (`list[int]`, *optional*): the layers whose hidden states are compared, as original indices.
            Default: the layer after each cut and the last layer.
    """

    lineage: Lineage
    available: list[int]
    compared: list[int] | None

    def pairs_with(self, student: Lineage) -> list[tuple[int, int]]:
        """Returns the pairs of student and teacher layers to compare, see [`hidden_pairs`].

        Raises:
            LayerPruneError: the student has lost all compared layers.
        """
        pairs = hidden_pairs(student, self.lineage, self.compared)
        if not pairs:
            raise LayerPruneError(
                f"All of hidden_layers {self.compared} were removed, so there is no hidden "
                "state to compare: protect one of them, or leave hidden_layers out."
            )
        return pairs


def make_teacher(
    teacher: PreTrainedModel | str | Path | None,
    student: PreTrainedModel,
    hidden_states: bool,
    adapters: bool = False,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | CachedTeacherLogits:
    """Returns the teacher of `student`: a frozen model in eval mode, or the cached logits of one.

    Args:
        teacher (`PreTrainedModel` or `str`, *optional*): a model (frozen in place), a folder (also a cache of
            [`cache_teacher_logits`]) or a hub id. Default: a copy of `student`. The copy of a `PeftModel` has
            no adapters.
        student (`PreTrainedModel` or `PeftModel`): the model that will be trained.
        hidden_states (`bool`): whether hidden states will be compared.
        adapters (`bool`, *optional*, defaults to `False`): whether only adapters will be trained, so that a
            copy shares the student's weights.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): the student's tokenizer. Logits
            beyond its tokens are padding, so the vocabulary sizes may differ by padding.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the code that comes with the teacher.

    Raises:
        LayerPruneError: the teacher has another vocabulary or tokenizer, its hidden states do not match the
            student's, it shares weights with the student, or it cannot be loaded.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has a tokenizer
    tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    given = base_of(student) if teacher is None else teacher
    if isinstance(given, PreTrainedModel) and is_sharded(given):
        raise LayerPruneError(
            "The teacher's weights are already shared out over processes, so that it cannot run by itself: "
            "load it before the training arguments are made, and give it as teacher_model."
        )
    if teacher is None and adapter_configs(student):
        return _without_adapters(student)
    student = base_of(student)
    if teacher is None:
        weights = _tensors(student) if adapters else []
        teacher = copy.deepcopy(student, {id(tensor): tensor for tensor in weights})
        return teacher.eval().requires_grad_(False)
    if isinstance(teacher, (str, Path)):
        teacher = str(teacher)
        if is_teacher_cache(teacher):
            cache = CachedTeacherLogits(teacher)
            _check(cache.vocabulary, cache.width, cache.lineage, student, hidden_states, tokens)
            known = find_decoder(student).config.vocab_size
            if cache.vocabulary > known:
                raise LayerPruneError(
                    f"{teacher} is of {cache.vocabulary} tokens, the student knows {known}: give the teacher "
                    "itself, or cache the logits of a teacher with the student's vocabulary."
                )
            name = cache.settings.get("teacher", "")
            check_tokenizers(name, cache.vocabulary, student, tokenizer, trust_remote_code)
            return cache
        teacher = load_model(teacher, dtype=student.dtype, trust_remote_code=trust_remote_code)
        return make_teacher(teacher, student, hidden_states, adapters, tokenizer, trust_remote_code)
    check_next_token(teacher, "The teacher")
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    if shared:
        raise LayerPruneError(
            f"Teacher and student share {len(shared)} weights, so that training would change the "
            "teacher. Leave `teacher_model` out to get a frozen copy."
        )
    config = find_decoder(teacher).config
    _check(config.vocab_size, config.hidden_size, get_lineage(teacher), student, hidden_states, tokens)
    check_tokens(teacher, student, tokenizer, trust_remote_code)
    return teacher.eval().requires_grad_(False)


def _without_adapters(student: Any) -> PreTrainedModel:
    """Returns a frozen copy of a `PeftModel` without adapters. It shares all weights that are not trained.

    Raises:
        LayerPruneError: the adapters change the predictions of the model, so the copy is a different model.
    """
    shared = {id(tensor): tensor for tensor in _tensors(student) if not tensor.requires_grad}
    teacher = copy.deepcopy(student, shared).unload().eval().requires_grad_(False)
    with undisturbed(student):
        ids = (
            torch.arange(PROBED_TOKENS, device=student.device)[None] % text_config(student.config).vocab_size
        )
        ours, theirs = (model(input_ids=ids, use_cache=False).logits.float() for model in (student, teacher))
    if (ours - theirs).abs().max() > LOGIT_TOLERANCE * theirs.abs().max():
        raise LayerPruneError(
            "The adapters of model already change its logits, so the model without them is no teacher for "
            "it. Give the original model as teacher_model, or merge the adapters (model.merge_and_unload()) "
            "and add new ones."
        )
    return teacher


def hold_in_autocast_dtype(teacher: PreTrainedModel | CachedTeacherLogits, accelerator: Accelerator) -> None:
    """Casts, in place, the float32 weights that autocast would cast in every forward pass.

    These are the weights of linear layers that no other kind of module reads. Embeddings, norms, and experts
    in one tensor stay in float32. The outputs under autocast stay the same bit for bit. Without 16-bit
    autocast no weight is cast.
    """
    dtype = AUTOCAST_DTYPES.get(accelerator.mixed_precision)
    if not isinstance(teacher, PreTrainedModel) or not accelerator.native_amp or dtype is None:
        return
    others = {
        id(parameter)
        for module in teacher.modules()
        if not _is_linear(module)
        for parameter in module.parameters(recurse=False)
    }
    for parameter in teacher.parameters():
        if id(parameter) not in others and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def place_teacher(teacher: PreTrainedModel | CachedTeacherLogits, accelerator: Accelerator) -> Any:
    """Places the teacher on the accelerator's device, sharded by the accelerator's settings. Returns it."""
    if not isinstance(teacher, PreTrainedModel):
        return teacher
    # By default accelerate does not move a model under FSDP. A quantised model must not be moved.
    place = None if getattr(teacher, "is_quantized", False) else True
    return accelerator.prepare_model(teacher, device_placement=place, evaluation_mode=True)


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def check_tokens(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: Any, trust_remote_code: bool = False
) -> None:
    """Checks that both models have the same text for each token id. Warns if a tokenizer is unknown.

    Args:
        teacher, student (`PreTrainedModel`): the models.
        tokenizer, trust_remote_code (*optional*): see [`check_tokenizers`].

    Raises:
        LayerPruneError: the tokenizers are different.
    """
    vocabulary = find_decoder(teacher).config.vocab_size
    if _same_embeddings(teacher, student) or check_tokenizers(
        teacher.name_or_path, vocabulary, student, tokenizer, trust_remote_code
    ):
        return
    logger.warning(
        "The tokenizers of teacher and student cannot be compared: one of the models is of no folder with a "
        "tokenizer. Each token id must mean the same text to both. Give the teacher as a folder or hub id, "
        "and the student's tokenizer as processing_class."
    )


def check_tokenizers(
    teacher: str | None,
    vocabulary: int,
    student: PreTrainedModel,
    tokenizer: Any,
    trust_remote_code: bool = False,
) -> bool:
    """Checks that teacher and student have the same text for each token id.

    Args:
        teacher (`str` or `None`): the folder or hub id of the teacher; None if it has none.
        vocabulary (`int`): the number of logits of the teacher.
        student (`PreTrainedModel`): the model that will be trained.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the student's tokenizer. Default: the tokenizer in
            the student's folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the code that comes with a tokenizer.

    Returns:
        `bool`: whether both tokenizers are known.

    Raises:
        LayerPruneError: the tokenizers are different.
    """
    if teacher and teacher == student.name_or_path:
        return True
    teacher_tokenizer = find_tokenizer(teacher, trust_remote_code)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has a tokenizer
    if not hasattr(tokenizer, "get_vocab"):
        tokenizer = find_tokenizer(student.name_or_path, trust_remote_code)
    if teacher_tokenizer is None or tokenizer is None:
        return False
    common = range(min(vocabulary, find_decoder(student).config.vocab_size))
    student_tokens, teacher_tokens = (
        {i: token for token, i in each.get_vocab().items()} for each in (tokenizer, teacher_tokenizer)
    )
    compared = [i for i in common if i in student_tokens]
    different = [i for i in compared if teacher_tokens.get(i) != student_tokens[i]]
    if not different:
        return True
    first = different[0]
    example = (
        f"token {first} is {student_tokens[first]!r} to the student, {teacher_tokens.get(first)!r} to the "
        "teacher"
    )
    if len(different) > DIFFERENT_TOKENS * len(compared):
        raise LayerPruneError(
            f"The teacher ({teacher}) has another tokenizer: {len(different)} of {len(compared)} token ids "
            f"mean something else ({example}). Logits can only be compared over the same tokens. Choose "
            "a teacher with the student's tokenizer."
        )
    logger.warning(
        "%d of %d token ids mean something else to the teacher (%s): %s. Check that the training data does "
        "not depend on them.",
        len(different),
        len(compared),
        teacher,
        example,
    )
    return True


def find_tokenizer(name: str | None, trust_remote_code: bool) -> Any:
    """Returns the tokenizer in a folder or on the hub; None if no tokenizer exists."""
    if not name:
        return None
    try:
        # Some classes return an empty tokenizer for a folder without tokenizer files.
        cached_file(name, TOKENIZER_CONFIG_FILE)
        return load_tokenizer(name, trust_remote_code)
    except (OSError, LayerPruneError) as error:
        logger.info("No tokenizer to compare in %r: %s", name, one_line(error))
        return None


def _same_embeddings(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    """Returns whether both models have the same token embeddings and so come from the same model."""
    student_weight, teacher_weight = (
        getattr(model.get_input_embeddings(), "weight", None) for model in (student, teacher)
    )
    if student_weight is None or teacher_weight is None or is_sharded(student):
        return False
    if student_weight.shape != teacher_weight.shape:
        return False
    return torch.equal(student_weight.detach(), teacher_weight.detach().to(student_weight))


def describe_teacher(teacher: PreTrainedModel | CachedTeacherLogits, student: PreTrainedModel) -> str:
    """Returns a description of the teacher and of the memory that it uses or shares."""
    if isinstance(teacher, CachedTeacherLogits):
        rows = len(teacher.keys)
        return f"cached logits of {rows} rows in {teacher.folder}, without a second model"
    own = {parameter.data_ptr() for parameter in student.parameters()}
    sizes = {parameter.data_ptr(): parameter.nbytes for parameter in teacher.parameters()}
    held = sum(size for place, size in sizes.items() if place not in own) / 2**20
    shared = sum(size for place, size in sizes.items() if place in own) / 2**20
    if shared:
        return f"the student's own weights, {shared:.1f} MB that are not held twice"
    return f"a second model, {held:.1f} MB"


def _tensors(model: Any) -> list[torch.Tensor]:
    """Returns all tensors that a copy of `model` may share with it."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        # The first forward pass of an 8-bit bitsandbytes layer moves the scales away from the weight. This
        # must happen before two layers share the weight.
        if getattr(getattr(module, "weight", None), "CB", None) is not None:
            module.init_8bit_state()
        state = getattr(module, "state", None)
        quantized = (getattr(state, "CB", None), getattr(state, "SCB", None))
        tensors += [tensor for tensor in quantized if tensor is not None]
    return tensors


def add_adapters(model: PreTrainedModel, peft_config: Any) -> Any:
    """Returns a `PeftModel` around `model`. The weights of `model` do not change: the teacher may share them.

    Raises:
        LayerPruneError: the adapters fit no layer, or train or change the weights of `model`.
    """
    from peft import get_peft_model

    check_adapter_type(peft_config)
    own = dict(model.named_parameters())
    before = {name: _fingerprint(parameter) for name, parameter in own.items()}
    try:
        adapted = get_peft_model(model, peft_config)
    except (ValueError, TypeError) as error:
        raise LayerPruneError(f"These adapters cannot be put on this model: {one_line(error)}") from error
    changed = [name for name, p in own.items() if _fingerprint(p) != before[name]]
    trained = [name for name, p in own.items() if p.requires_grad]
    if changed or trained:
        raise LayerPruneError(
            f"These adapters {'change' if changed else 'train'} the model's own weights "
            f"({(changed or trained)[0]}), which the teacher reads: use another init_lora_weights or "
            "bias='none', or merge them into a model and train that."
        )
    return adapted


def _fingerprint(parameter: torch.Tensor) -> tuple[int, float]:
    """Returns the address and the sum of a parameter. They differ after a change of the parameter."""
    if parameter.is_meta:
        return parameter.data_ptr(), 0.0
    total = parameter.detach().sum(dtype=sum_dtype(parameter.device))
    return parameter.data_ptr(), float(total.nan_to_num())


def _check(
    vocabulary: int,
    width: int,
    lineage: Lineage,
    student: PreTrainedModel,
    hidden_states: bool,
    tokens: int | None,
) -> None:
    """Checks that a teacher with this vocabulary, hidden size and lineage fits `student`."""
    config, student_lineage = find_decoder(student).config, get_lineage(student)
    smaller = min(vocabulary, config.vocab_size)
    if vocabulary != config.vocab_size and (tokens is None or smaller < tokens):
        known = "" if tokens is None else f", and the tokenizer knows {tokens}"
        advice = (
            " If one vocabulary is only padded, give the tokenizer as processing_class."
            if tokens is None
            else ""
        )
        raise LayerPruneError(
            f"The teacher's vocabulary has {vocabulary} tokens, the student's "
            f"{config.vocab_size}{known}: logits can only be compared over the same vocabulary.{advice}"
        )
    if not hidden_states:
        return
    if width != config.hidden_size or lineage.original != student_lineage.original:
        raise LayerPruneError(
            "Hidden states can only be compared with the model that the student was cut from: the "
            f"teacher has {lineage.original} layers of width {width}, the student "
            f"descends from {student_lineage.original} of width {config.hidden_size}. Set hidden_weight=0 to "
            "learn from the teacher's logits alone."
        )
    if not set(student_lineage.kept) <= set(lineage.kept):
        raise LayerPruneError(
            f"The teacher has {lineage}, but the student still has {student_lineage.kept}, whose hidden "
            "states are to be compared. Give the original model as teacher, or set hidden_weight=0 to "
            "learn from the teacher's logits alone."
        )
