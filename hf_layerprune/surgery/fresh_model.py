"""Builds a fresh model without weights from a config, and compares a live model with it."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging


SCALARS = (bool, int, float, str, type(None))
_ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """A difference between a live model and a fresh model.

    Args:
        path (`str`): the path of the live module in the model.
        module (`nn.Module`): the live module.
        name (`str`): an attribute, a parameter, a buffer or a submodule of the module. It is empty for the
            module itself.
        here, there: the values in the live model and in the fresh model. For a tensor, its shape.
    """

    path: str
    module: nn.Module
    name: str
    here: Any
    there: Any

    @property
    def key(self) -> tuple[Any, str]:
        """The key of the same difference before and after a removal, which may change the path."""
        return weakref.ref(self.module), self.name

    def __str__(self) -> str:
        where = f"{self.path}.{self.name}".strip(".")
        return f"{where} is {self.here} here, {self.there} there"


def build_meta_model(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model without weights, on the meta device, with the class and config of `model`."""
    # Building some models, such as DiffLlama, draws random numbers.
    with torch.device("meta"), torch.random.fork_rng(devices=[]), quiet():
        # Built from plain values, as in a reload, so that the rules of the config run again.
        config = type(model.config).from_dict(copy.deepcopy(model.config.to_dict()))
        return type(model)(config)


def differences(model: PreTrainedModel, meta_model: PreTrainedModel) -> list[Difference]:
    """Returns all differences between a live model and a fresh model.

    It compares modules and their classes, shapes of tensors, tied weights, and attributes that are plain
    values, lists of plain values, or tables by layer.
    """
    live, fresh = dict(model.named_modules()), dict(meta_model.named_modules())
    different = []
    for path in fresh.keys() - live.keys():
        inside = path
        while inside not in live:
            inside = inside.rpartition(".")[0]
        name = path[len(inside) :].lstrip(".")
        different.append(Difference(inside, live[inside], name, _ABSENT, "a module"))
    for path, module in live.items():
        if path not in fresh:
            different.append(Difference(path, module, "", "a module", _ABSENT))
            continue
        here, there = module_facts(module), module_facts(fresh[path])
        # Values that are neither saved nor in a fresh model are not needed, such as tables of a removed kind
        # of attention.
        stale = here.keys() - there.keys() - _saved_tensors(module)
        different += [
            Difference(path, module, name, here.get(name, _ABSENT), there.get(name, _ABSENT))
            for name in sorted((here.keys() | there.keys()) - stale)
            if here.get(name, _ABSENT) != there.get(name, _ABSENT)
        ]
    for target, source in meta_model.all_tied_weights_keys.items():
        if _parameter(model, target) is not _parameter(model, source):
            different.append(Difference("", model, target, "a parameter of its own", f"tied to {source}"))
    return sorted(different, key=str)


@contextmanager
def quiet() -> Iterator[None]:
    """Makes transformers log only errors within this context, as warnings about a meta model do not help
    users."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def module_facts(module: nn.Module) -> dict[str, Any]:
    """Returns the properties of a module that a config determines: its class, the shapes of its own tensors,
    and its plain attributes."""
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    facts: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in (*parameters, *buffers)}
    facts["class"] = type(module).__name__
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training" and _is_plain(value):
            facts[name] = _copied(value)
    return facts


def _copied(value: Any) -> Any:
    """Returns a list for a sequence, a new dict for a dict, and a scalar unchanged."""
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(entry, SCALARS) for entry in value)
    if isinstance(value, dict):  # keyed by layer
        return bool(value) and all(type(key) is int for key in value)
    return isinstance(value, SCALARS)


def _saved_tensors(module: nn.Module) -> set[str]:
    """Returns the names of a module's own parameters and saved buffers."""
    tensors = (
        *module.named_parameters(recurse=False, remove_duplicate=False),
        *module.named_buffers(recurse=False, remove_duplicate=False),
    )
    # Private, as the only public way is `state_dict`, which runs hooks and gathers sharded weights.
    return {name for name, _ in tensors} - module._non_persistent_buffers_set


def _parameter(model: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    try:
        return getattr(model.get_submodule(parent), name, None)
    except AttributeError:
        return None
