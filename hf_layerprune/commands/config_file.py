"""Reads the flags of a command from a YAML file (--config), and writes them to one (--save_config)."""

from argparse import ArgumentParser
from collections.abc import Mapping
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
    """Returns the values of the flags that every command has. Other flags are not parsed."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    add_common_flags(parser)
    return parser.parse_known_args(arguments)[0]


def write_config(path: str, values: Mapping[str, Any]) -> None:
    """Writes the values of flags to a YAML file, and prints the file name."""
    from ..recipes.recipe import write_yaml

    write_yaml(Path(path), values)
    print(f"Saved the settings in {path}. Nothing was run: `--config {path}` runs them.")
