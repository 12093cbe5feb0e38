"""The flags of a command in a YAML file: --config reads it, --save_config writes it."""

from argparse import ArgumentParser
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any


COMMON_FLAGS = ("config", "save_config", "quiet")


def add_common_flags(parser: Any) -> None:
    """Adds the flags that every command has."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with values of flags. Flags override it.")
    parser.add_argument(
        "--save_config",
        "--save-config",
        metavar="FILE",
        help="Write the given flags to a YAML file, and do not run.",
    )
    parser.add_argument("--quiet", action="store_true", help="Print only results and errors.")


def common_flags(arguments: list[str]) -> Any:
    """Returns the values of the flags that every command has, without reading the others."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    add_common_flags(parser)
    return parser.parse_known_args(arguments)[0]


def write_config(path: str, values: Mapping[str, Any]) -> None:
    """Writes values of flags to a YAML file, and prints its name."""
    import yaml

    plain = {name: _plain(value) for name, value in values.items()}
    Path(path).write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
    print(f"Saved the settings in {path}. Nothing was run: `--config {path}` runs them.")


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
