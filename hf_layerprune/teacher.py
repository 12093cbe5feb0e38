"""The model that teaches: where it comes from, whether it can teach this student, and what both share."""

import copy
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .adapters import base_of, check_adapter_type, keep_base_known
from .checkpoint import load_model, one_line
from .decoder import check_next_token, find_decoder, is_sharded
from .errors import LayerPruneError
from .leave_one_out import can_replay, captured, hidden
from .lineage import Lineage, get_lineage
from .scoring import undisturbed
from .teacher_outputs import HEAD, TeacherOutputs


def make_teacher(
    teacher: PreTrainedModel | str | Path | None,
    student: PreTrainedModel,
    hidden_states: bool,
    adapters: bool = False,
    tokens: int | None = None,
) -> PreTrainedModel | TeacherOutputs:
    """A frozen model in eval mode that can teach `student`, or what one said.

    Args:
        teacher (`PreTrainedModel` or `str`, *optional*): a model (frozen in place), a folder (also of
            [`write_teacher_outputs`]) or a hub id; left out, a copy of `student` as it is now.
        student (`PreTrainedModel`): the model that will be trained.
        hidden_states (`bool`): whether hidden states will be compared.
        adapters (`bool`, *optional*, defaults to `False`): only adapters will be trained, so that the copy
            has modules of its own, but the student's weights.
        tokens (`int`, *optional*): how many the tokenizer knows. Vocabularies that are larger and of
            different size are filled up.

    Raises:
        LayerPruneError: the teacher has another vocabulary, fewer layers than the student once had or
            not the layers it has now, shares weights with it, or cannot be loaded.
    """
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
            return said
        return make_teacher(
            load_model(teacher, dtype=student.dtype), student, hidden_states, adapters, tokens
        )
    check_next_token(teacher, "The teacher")
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    if shared:
        raise LayerPruneError(
            f"Teacher and student share {len(shared)} weights, so that training would change the "
            "teacher. Leave `teacher_model` out to get a frozen copy."
        )
    config = find_decoder(teacher).config
    _check(config.vocab_size, config.hidden_size, get_lineage(teacher), student, hidden_states, tokens)
    return teacher.eval().requires_grad_(False)


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
    before = {name: (parameter.data_ptr(), parameter._version) for name, parameter in own.items()}
    try:
        adapted = get_peft_model(model, peft_config)
    except (ValueError, TypeError) as error:
        raise LayerPruneError(f"These adapters cannot be put on this model: {one_line(error)}") from error
    changed = [name for name, p in own.items() if (p.data_ptr(), p._version) != before[name]]
    trained = [name for name, p in own.items() if p.requires_grad]
    if changed or trained:
        raise LayerPruneError(
            f"These adapters {'change' if changed else 'train'} the model's own weights "
            f"({(changed or trained)[0]}), which the teacher reads: use another init_lora_weights or "
            "bias='none', or merge them into a model and train that."
        )
    keep_base_known(adapted)
    return adapted


def shared_prefix(student: Any, teacher: Any, input_ids: torch.Tensor) -> int:
    """How many of the first layers are not trained and do the same in `student`, as it trains, and `teacher`.

    Their tensors must be equal, and what they return for some tokens must be equal to the bit and without
    gradient, also with the student's dropout on.

    Args:
        student, teacher (`PreTrainedModel`): the models; the student's mode is that of training.
        input_ids (`torch.Tensor`): `(batch, length)`, some tokens.
    """
    if all(parameter.requires_grad for parameter in student.parameters()):
        return 0
    input_ids = input_ids[:1, :8]
    ours, theirs = (find_decoder(base_of(model)).layers for model in (student, teacher))
    layers = range(min(len(ours), len(theirs)) - 1)
    with torch.random.fork_rng(), captured(student, layers) as own:
        student(input_ids=input_ids, use_cache=False)
    with torch.no_grad(), captured(teacher, layers) as taught:
        teacher(input_ids=input_ids, use_cache=False)

    def is_shared(layer: int) -> bool:
        return (
            layer in own
            and not hidden(own[layer][1]).requires_grad
            and torch.equal(hidden(own[layer][1]), hidden(taught[layer][1]))
            and _same_tensors(ours[layer].state_dict(), theirs[layer].state_dict())
        )

    count = len(list(takewhile(is_shared, layers)))
    body: Any = base_of(teacher).base_model
    if not count or not _same_tensors(_outside(student), body.state_dict()):
        return 0
    with undisturbed(student):
        return count if can_replay(student, input_ids, count) else 0


def _outside(model: Any) -> dict[str, torch.Tensor]:
    """The tensors outside the decoder layers that are not trained, among them what comes before these."""
    base = base_of(model)
    body: Any = base.base_model
    inside = {id(tensor) for tensor in find_decoder(base).layers.state_dict(keep_vars=True).values()}
    tensors = body.state_dict(keep_vars=True).items()
    return {name: tensor for name, tensor in tensors if id(tensor) not in inside and not tensor.requires_grad}


def _same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether all of our tensors are theirs, by name and value."""
    return all(name in theirs and torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


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
    gone = sorted(set(needed.kept) - set(lineage.kept))
    if lineage.original < needed.original or gone:
        raise LayerPruneError(
            f"The teacher has {lineage}, but the student descends from a model of {needed.original} "
            f"layers and still has {needed.kept}. Give the original model as teacher."
        )
    if hidden_states and (width != ours.hidden_size or lineage.original != needed.original):
        raise LayerPruneError(
            "Hidden states can only be compared with the model that the student was cut from: the "
            f"teacher has {lineage.original} layers of width {width}, the student "
            f"descends from {needed.original} of width {ours.hidden_size}. Set hidden_weight=0 to "
            "learn from the teacher's logits alone."
        )
