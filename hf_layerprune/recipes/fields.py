"""Fills dataclasses from the values of a YAML file, a command line or keyword arguments."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import LayerPruneError, did_you_mean
from ..surgery.lineage import plain_int


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    NoneType: "null",
}


def fill(kinds: Sequence[Any], values: Mapping[str, Any]) -> list[Any]:
    """Returns one instance of each dataclass in `kinds`, with the values for its fields.

    Raises:
        LayerPruneError: a field without a default has no value, or a dataclass does not accept a value.
    """
    filled = []
    for kind in kinds:
        names = {one.name for one in dataclasses.fields(kind) if one.init}
        try:
            filled.append(kind(**{name: value for name, value in values.items() if name in names}))
        except ValueError as error:  # from the Trainer's arguments
            raise LayerPruneError(str(error)) from error
        except TypeError as error:
            lacking = [name for name in _required(kind) if name not in values]
            if not lacking:
                raise
            raise LayerPruneError(f"{lacking[0]} has no value, but it is required.") from error
    return filled


def check_fields(values: Mapping[str, Any], kinds: Iterable[Any], origin: str) -> dict[str, Any]:
    """Returns the values by field name and converted to the types of their fields.

    For example, 3 becomes 3.0 for a float field, and `keep` becomes `target_layers`.

    Args:
        values (mapping): values by the names of fields, or by their aliases.
        kinds (iterable of dataclasses): the dataclasses that have the fields.
        origin (`str`): the origin of the values, for errors.

    Raises:
        LayerPruneError: a field is unknown, or a value does not have the type of its field.
    """
    known: dict[str, dataclasses.Field] = {}
    hints: dict[str, Any] = {}
    for kind in kinds:
        hints |= get_type_hints(kind)
        for one in dataclasses.fields(kind):
            if one.init:
                known |= dict.fromkeys([one.name, *_aliases(one)], one)
    checked = {}
    for name, value in values.items():
        if name not in known:
            advice = did_you_mean(str(name), known) or "The fields are the flags of the command."
            raise LayerPruneError(f"{origin}: there is no field {name!r}. {advice}")
        one = known[name]
        if one.name in checked:
            raise LayerPruneError(f"{origin}: {name} is {one.name}, which is given too. Give one of them.")
        try:
            checked[one.name] = _converted(value, hints[one.name])
        except ValueError as error:
            raise LayerPruneError(
                f"{origin}: {name} is {value!r}, but must be {_wanted(hints[one.name])}."
            ) from error
        choices = one.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise LayerPruneError(f"{origin}: {name} is {value!r}. Choose from {', '.join(choices)}.")
    return checked


def _required(kind: Any) -> list[str]:
    missing = dataclasses.MISSING
    return [
        one.name
        for one in dataclasses.fields(kind)
        if one.init and one.default is missing and one.default_factory is missing
    ]


def _aliases(one: dataclasses.Field) -> list[str]:
    """Returns the aliases of a field, without the dashes of a flag."""
    return [alias.lstrip("-") for alias in one.metadata.get("aliases", ())]


def _options(hint: Any) -> tuple[Any, ...]:
    """Returns the types that a type hint allows."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _converted(value: Any, hint: Any) -> Any:
    """Returns a value converted to the first type of a hint that accepts it.

    Raises:
        ValueError: no type accepts the value.
    """
    for option in _options(hint):
        try:
            return _as(value, option)
        except ValueError:
            continue
    raise ValueError(value)


def _as(value: Any, kind: Any) -> Any:
    """Returns a value converted to one type, if the conversion is lossless.

    Raises:
        ValueError: the value has another type.
    """
    origin, truth = get_origin(kind) or kind, isinstance(value, bool)
    if origin is Any:
        return value
    if origin is Literal and value in get_args(kind):
        return value
    if origin is list and get_args(kind) == (str,) and isinstance(value, (str, Path)):
        return [str(value)]
    if origin is list and isinstance(value, (list, tuple, range)):
        return [_converted(entry, *get_args(kind)) for entry in value]
    if origin is int and not truth and isinstance(plain_int(value), int):
        return plain_int(value)
    if origin is float and not truth and isinstance(plain_int(value), (int, float)):
        return float(value)
    if origin is str and not truth and isinstance(value, (str, int, float, Path)):
        return str(value)
    if isinstance(origin, type) and issubclass(origin, Enum):
        return origin(value)
    as_it_is = origin in (bool, NoneType, dict) or (isinstance(origin, type) and origin not in WORDS)
    if as_it_is and isinstance(value, origin):
        return value
    raise ValueError(value)


def _wanted(hint: Any) -> str:
    """Returns the names of the types of a hint in words."""
    words = []
    for option in _options(hint):
        origin = get_origin(option) or option
        if origin is list:
            words.append(f"a list, each entry {_wanted(*get_args(option))}")
        elif isinstance(origin, type) and issubclass(origin, Enum):
            words.append(f"one of {', '.join(str(one.value) for one in origin)}")
        elif origin in WORDS and origin is not NoneType:
            words.append(WORDS[origin])
    if words == ["text"]:
        return "text (in a YAML file, put yes, no, true and false in quotes)"
    return " or ".join(words)
