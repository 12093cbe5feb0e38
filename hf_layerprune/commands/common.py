"""Functions that all commands use: parsing, config files, JSON files, the end of a command."""

import json
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import LayerPruneError, did_you_mean
from ..files import check_folder_of, whole_file
from .config_file import COMMON_FLAGS, add_common_flags, common_flags, write_config
from .help import HELP_ALL, help_text, help_wanted


OUTPUT_DIR = "trainer_output"  # the Trainer's default
MODEL = ("MODEL", "Folder or hub id of the model.")
flag_names: list[str] = []  # flags of the running command
given_values: dict[str, Any] = {}  # values given by its flags and config file

Command = Callable[[list[str]], None]


def parse(
    command: Command,
    arguments: list[str],
    kinds: Iterable[Any],
    model: bool = True,
    several: bool = False,
    positional: tuple[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Returns the model name or names in a command line, and a filled dataclass for each of `kinds`.

    Args:
        command (`Callable`): the function of the command. The help shows its name and docstring.
        arguments (list of `str`): the words after the command's name.
        kinds (iterable of dataclasses): the dataclasses whose fields are the flags.
        model (`bool`, *optional*, defaults to `True`): whether the command takes a model.
        several (`bool`, *optional*, defaults to `False`): whether the command takes several models.
        positional (`tuple`, *optional*): name and help of another first argument, which the command reads.
        defaults (mapping, *optional*): other defaults to show in the help. An empty mapping shows no default.

    Raises:
        LayerPruneError: a flag is unknown, or a dataclass refuses a value.
        SystemExit: the command line asks for help, which is printed.
    """
    kinds, common = list(kinds), common_flags(arguments)
    if help_wanted(arguments):
        actions = _parser(command, kinds)._actions  # argparse has no public list of flags
        if defaults is not None:
            _show_defaults(actions, defaults)
        whole = not {*HELP_ALL}.isdisjoint(arguments)
        first = positional or (MODEL if model else None)
        print(help_text(command, actions, first, whole, given=defaults or ()))
        raise SystemExit(0)
    # The file is read before the parser knows the flags, so that errors in the file name fields, not flags.
    config = read_config(common.config, kinds, model, several) if common.config else {}
    parser = _parser(command, kinds)
    if model:
        _add_model(parser, several)
    values = given = parse_given(command, arguments, kinds, model, several)
    if config:
        from ..pruning.arguments import with_given

        values = with_given(config, given)
    given_values.clear()
    given_values.update({name: value for name, value in values.items() if name not in COMMON_FLAGS})
    for action in parser._actions:  # argparse has no public way to make an argument optional later
        if action.dest in values and action.dest not in given:
            action.required, action.default = False, values[action.dest]
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:  # a dataclass refused a value
        raise LayerPruneError(str(error)) from error
    if common.save_config:
        save_config(common.save_config, given_values)
    return [rest.model, *parsed] if model else parsed


def _show_defaults(actions: Iterable[Action], defaults: Mapping[str, Any]) -> None:
    """Sets the defaults of flags for the help in place. With an empty mapping, most flags show no default."""
    for action in actions:
        if action.dest in defaults:
            action.default = defaults[action.dest]
        elif not defaults and action.default is not True:  # the default of a switch sets its form in the help
            action.default = SUPPRESS


def _add_model(parser: Any, several: bool) -> Any:
    return parser.add_argument("model", nargs="+" if several else None)


def read_config(
    path: str, kinds: Iterable[Any], model: bool = False, several: bool = False
) -> dict[str, Any]:
    """Returns the values of flags in a YAML file.

    Args:
        path (`str`): the file.
        kinds, model, several: see [`parse`].

    Raises:
        LayerPruneError: there is no such file, or it holds an unknown flag or a value of another type.
    """
    from ..recipes.fields import check_fields
    from ..recipes.recipe import RecipeArguments, read_yaml

    values = read_yaml(Path(path))
    known = {one.name for kind in kinds for one in fields(kind)} | {"model"}
    of_recipes = [one.name for one in fields(RecipeArguments) if one.name in values and one.name not in known]
    if of_recipes:
        raise LayerPruneError(
            f"{path}: {of_recipes[0]} is a setting of recipes. Use `hf-layerprune run {path}`, or leave it "
            "out."
        )
    names = {"model": values.pop("model")} if model and "model" in values else {}
    if several and isinstance(names.get("model"), str):
        names["model"] = [names["model"]]
    return names | check_fields(values, kinds, path)


def save_config(path: str, values: dict[str, Any]) -> None:
    """Writes the given values to a YAML file, and ends the command.

    Raises:
        SystemExit: always, with code 0.
    """
    check_folder_of(path)
    write_config(path, values)
    raise SystemExit(0)


def keep_settings(output_dir: str) -> None:
    """Writes the settings of the command into its output folder, see [`write_settings`]."""
    from ..recipes.recipe import write_settings

    write_settings(given_values, output_dir)


def parse_given(
    command: Command, arguments: list[str], kinds: Iterable[Any], model: bool = False, several: bool = False
) -> dict[str, Any]:
    """Returns the flags that a command line gives, by name, without defaults.

    Args:
        command, arguments, kinds, model, several: see [`parse`].

    Raises:
        LayerPruneError: a flag is unknown.
    """
    parser = _parser(command, list(kinds), only_given=True)
    if model:
        _add_model(parser, several).required = False
    return vars(parser.parse_args(arguments))


def _parser(command: Command, kinds: list[Any], only_given: bool = False) -> Any:
    from argparse import SUPPRESS

    from transformers import HfArgumentParser

    name = command.__name__.replace("_", "-")

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            unknown = message.removeprefix("unrecognized arguments: ")
            if unknown == message:
                raise LayerPruneError(f"{message}. See hf-layerprune {name} --help.")
            advice = f"See hf-layerprune {name} --help."
            flags = [word.partition("=")[0] for word in unknown.split() if word.startswith("-")]
            if not flags:
                raise LayerPruneError(f"There is no argument {unknown!r}. {advice}")
            known = [flag for action in self._actions for flag in action.option_strings]
            raise LayerPruneError(f"There is no flag {flags[0]}. {did_you_mean(flags[0], known) or advice}")

        def add_argument(self, *names: Any, **settings: Any) -> Any:
            if only_given and settings.get("action") != "help":
                settings |= {"default": SUPPRESS} | ({"required": False} if "required" in settings else {})
            return super().add_argument(*names, **settings)

    flag_names[:] = [one.name for kind in kinds for one in fields(kind) if one.init]
    parser = Parser(kinds, prog=f"hf-layerprune {name}", add_help=False)
    add_common_flags(parser)
    return parser


def write_json(path: str, values: Any) -> None:
    """Writes values to a JSON file. Of several processes, the first one writes."""
    from ..data.processes import process_index

    if process_index():
        return
    with whole_file(path) as file:
        file.write(json.dumps(values, indent=1).encode())


def finish(name: str, tokenizer: Any, record: dict[str, Any], output_dir: str) -> None:
    """Writes tokenizer, processor files and card into the folder of a saved model, and prints the table.

    Args:
        name (`str`): folder or hub id of the original model.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        record (`dict`): the record of the run.
        output_dir (`str`): the folder of the model.
    """
    from ..checkpoints.loading import copy_companions
    from ..reports.card import write_card

    tokenizer.save_pretrained(output_dir)
    copy_companions(name, output_dir)
    write_card(record, Path(output_dir))
    print_table(record)


def print_table(record: dict[str, Any]) -> None:
    """Prints the table of a run."""
    from ..reports.tables import markdown_table, table_rows

    print(markdown_table(table_rows(record)))
