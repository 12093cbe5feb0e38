"""The model that teaches: where it comes from, whether it can teach this student, and what both share."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

from ..checkpoints.loading import load_model, load_tokenizer
from ..errors import LayerPruneError, one_line
from ..surgery.decoder import check_next_token, find_decoder, is_sharded
from ..surgery.lineage import Lineage, get_lineage
from ..surgery.peft import check_adapter_type, keep_base_known
from .losses import hidden_pairs
from .teacher_cache import HEAD, TeacherOutputs


logger = logging.getLogger(__name__)

OTHER_TOKENS = 0.01  # so large a share of the vocabulary makes another tokenizer


@dataclass(frozen=True)
class TeacherLayers:
    """The layers of a teacher.

    Args:
        lineage ([`Lineage`]): the layers that the teacher has.
        available (`list[int]`): the layers whose hidden states it can give, as original indices.
        compared (`list[int]`, *optional*): the layers whose hidden states are compared, as original indices.
            Default: the layer after each cut and the last.
    """

    lineage: Lineage
    available: list[int]
    compared: list[int] | None

    def pairs_with(self, student: Lineage) -> list[tuple[int, int]]:
        """Returns the compared layers of student and teacher, see [`hidden_pairs`].

        Raises:
            LayerPruneError: the student has lost all of them.
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
) -> PreTrainedModel | TeacherOutputs:
    """A frozen model in eval mode that can teach `student`, or what one said.

    Args:
        teacher (`PreTrainedModel` or `str`, *optional*): a model (frozen in place), a folder (also of
            [`write_teacher_outputs`]) or a hub id; left out, a copy of `student` as it is now.
        student (`PreTrainedModel`): the model that will be trained.
        hidden_states (`bool`): whether hidden states will be compared.
        adapters (`bool`, *optional*, defaults to `False`): only adapters will be trained, so that the copy
            has modules of its own, but the student's weights.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): the student's. Vocabularies
            that are larger and of different size are filled up.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the code that comes with the teacher.

    Raises:
        LayerPruneError: the teacher has another vocabulary or tokenizer, or hidden states that do not match
            the student's; it shares weights with the student, or cannot be loaded.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    tokens = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    given = student if teacher is None else teacher
    if isinstance(given, PreTrainedModel) and is_sharded(given):
        raise LayerPruneError(
            "The teacher's weights are already shared out over processes, so that it cannot run by itself: "
            "load it before the training arguments are made, and give it as teacher_model."
        )
    if teacher is None:
        weights = _tensors(student) if adapters else []
        teacher = copy.deepcopy(student, {id(tensor): tensor for tensor in weights})
        return teacher.eval().requires_grad_(False)
    if isinstance(teacher, (str, Path)):
        teacher = str(teacher)
        if (Path(teacher) / HEAD).exists():
            said = TeacherOutputs(teacher)
            _check(said.vocabulary, said.width, said.lineage, student, hidden_states, tokens)
            known = find_decoder(student).config.vocab_size
            if said.vocabulary > known:
                raise LayerPruneError(
                    f"{teacher} is of {said.vocabulary} tokens, the student knows {known}: give the teacher "
                    "itself, or write the outputs of one with the student's vocabulary."
                )
            name = said.settings.get("teacher", "")
            check_tokenizers(name, said.vocabulary, student, tokenizer, trust_remote_code)
            return said
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


def check_tokens(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: Any, trust_remote_code: bool = False
) -> None:
    """Check that the same token ids mean the same text to both; say so where it cannot be known.

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
    """Check that the same token ids mean the same text to teacher and student.

    Args:
        teacher (`str` or `None`): the folder or hub id of the teacher, if it is from one.
        vocabulary (`int`): how many tokens it has logits of.
        student (`PreTrainedModel`): the model that will be trained.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the student's; left out, that of its folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run the code that comes with a tokenizer.

    Returns:
        `bool`: whether this could be known.

    Raises:
        LayerPruneError: the tokenizers are different.
    """
    if teacher and teacher == student.name_or_path:
        return True
    theirs = find_tokenizer(teacher, trust_remote_code)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not hasattr(tokenizer, "get_vocab"):
        tokenizer = find_tokenizer(student.name_or_path, trust_remote_code)
    if theirs is None or tokenizer is None:
        return False
    common = range(min(vocabulary, find_decoder(student).config.vocab_size))
    ours, other = ({i: token for token, i in one.get_vocab().items()} for one in (tokenizer, theirs))
    compared = [i for i in common if i in ours]
    unlike = [i for i in compared if other.get(i) != ours[i]]
    if not unlike:
        return True
    example = (
        f"token {unlike[0]} is {ours[unlike[0]]!r} to the student, {other.get(unlike[0])!r} to the teacher"
    )
    if len(unlike) > OTHER_TOKENS * len(compared):
        raise LayerPruneError(
            f"The teacher ({teacher}) has another tokenizer: {len(unlike)} of {len(compared)} token ids mean "
            f"something else ({example}). Logits can only be compared over the same tokens. Choose a teacher "
            "with the student's tokenizer."
        )
    logger.warning(
        "%d of %d token ids mean something else to the teacher (%s): %s. Check that the training data does "
        "not depend on them.",
        len(unlike),
        len(compared),
        teacher,
        example,
    )
    return True


def find_tokenizer(name: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer in a folder or on the hub, None where there is none."""
    if not name:
        return None
    try:
        # Without its files some classes would make an empty tokenizer.
        cached_file(name, TOKENIZER_CONFIG_FILE)
        return load_tokenizer(name, trust_remote_code)
    except (OSError, LayerPruneError) as error:
        logger.info("No tokenizer to compare in %r: %s", name, one_line(error))
        return None


def _same_embeddings(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    """Whether both have the same vectors for the same tokens, so that one comes from the other."""
    ours, theirs = (getattr(one.get_input_embeddings(), "weight", None) for one in (student, teacher))
    if ours is None or theirs is None or ours.shape != theirs.shape or is_sharded(student):
        return False
    return torch.equal(ours.detach(), theirs.detach().to(ours))


def describe_teacher(teacher: PreTrainedModel | TeacherOutputs, student: PreTrainedModel) -> str:
    """In words, what teaches and what that takes or saves."""
    if isinstance(teacher, TeacherOutputs):
        rows = len(teacher.keys)
        return f"what was written in {teacher.folder}, of {rows} rows; no second model is held or run"
    own = {parameter.data_ptr() for parameter in student.parameters()}
    sizes = {parameter.data_ptr(): parameter.nbytes for parameter in teacher.parameters()}
    held = sum(size for place, size in sizes.items() if place not in own) / 2**20
    shared = sum(size for place, size in sizes.items() if place in own) / 2**20
    if shared:
        return f"the student's own weights, {shared:.1f} MB that are not held twice"
    return f"a second model, {held:.1f} MB"


def _tensors(model: Any) -> list[torch.Tensor]:
    """All that a copy of `model` may share with it."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        # Of bitsandbytes' 8-bit layers the first to run takes scales off the weight, which two would share.
        if getattr(getattr(module, "weight", None), "CB", None) is not None:
            module.init_8bit_state()
        state = getattr(module, "state", None)
        tensors += [
            one for one in (getattr(state, "CB", None), getattr(state, "SCB", None)) if one is not None
        ]
    return tensors


def add_adapters(model: PreTrainedModel, peft_config: Any) -> Any:
    """A `PeftModel` around `model`, in place, whose own weights stay as they are, as a teacher may read them.

    Raises:
        LayerPruneError: the adapters fit nowhere, or train or change the model's own weights.
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
    keep_base_known(adapted)
    return adapted


def _fingerprint(parameter: torch.Tensor) -> tuple[int, int, float]:
    """What tells whether a parameter was changed: its place, how often it was written to, and its sum, as
    writing to its `data` is not counted (OLoRA)."""
    total = 0.0 if parameter.is_meta else float(parameter.detach().sum(dtype=torch.float64).nan_to_num())
    return parameter.data_ptr(), parameter._version, total


def _check(
    vocabulary: int,
    width: int,
    lineage: Lineage,
    student: PreTrainedModel,
    hidden_states: bool,
    tokens: int | None,
) -> None:
    """Check that a teacher of this vocabulary, hidden size and lineage can teach `student`."""
    ours, needed = find_decoder(student).config, get_lineage(student)
    smaller = min(vocabulary, ours.vocab_size)
    if vocabulary != ours.vocab_size and (tokens is None or smaller < tokens):
        known = "" if tokens is None else f", and the tokenizer knows {tokens}"
        advice = (
            " If one is only filled up, give the tokenizer as processing_class." if tokens is None else ""
        )
        raise LayerPruneError(
            f"The teacher's vocabulary has {vocabulary} tokens, the student's "
            f"{ours.vocab_size}{known}: logits can only be compared over the same vocabulary.{advice}"
        )
    if not hidden_states:
        return
    if width != ours.hidden_size or lineage.original != needed.original:
        raise LayerPruneError(
            "Hidden states can only be compared with the model that the student was cut from: the "
            f"teacher has {lineage.original} layers of width {width}, the student "
            f"descends from {needed.original} of width {ours.hidden_size}. Set hidden_weight=0 to "
            "learn from the teacher's logits alone."
        )
    if not set(needed.kept) <= set(lineage.kept):
        raise LayerPruneError(
            f"The teacher has {lineage}, but the student still has {needed.kept}, whose hidden states are to "
            "be compared. Give the original model as teacher, or set hidden_weight=0 to learn from the "
            "teacher's logits alone."
        )
