"""Prints the help of a command on one screen, with one line per flag. --help_all explains every flag."""

import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Container, Iterable, Sequence
from inspect import cleandoc, getdoc
from textwrap import wrap
from typing import Any


WIDTH, SCREEN = 100, 50  # columns and lines
FLAG_WIDTH = 35
HELP, HELP_ALL = ("-h", "--help"), ("--help_all", "--help-all")

# Names of flags by group. If not all flags fit on the screen, the flags in the second string are only named.
GROUPS = {
    "model": (
        "model models device teacher lora_rank",
        "dtype attn_implementation device_map load_in_8bit load_in_4bit gguf_file trust_remote_code",
    ),
    "data": (
        "data sequence_length calibration_sequences heldout_sequences max_sequences tasks",
        "loss_on data_field data_template data_split data_config data_revision streaming packing "
        "repeat_share self_sequences self_length self_temperature heldout limit lm_eval",
    ),
    "pruning": (
        "target_layers criterion protected",
        "target_ratio target_parameters target_speedup layers layers_per_phase racing pattern scoring_seed "
        "block_size compare remove steps_per_phase tokens_per_phase restart_learning_rate quality_floor "
        "min_recovery reconstruction_layers reconstruction_tokens reconstruction_epochs "
        "reconstruction_learning_rate select block_candidates replacement replacement_layers "
        "replacement_loss",
    ),
    "healing": (
        "max_steps learning_rate per_device_train_batch_size gradient_accumulation_steps "
        "activation_checkpointing kl_weight",
        "trainable num_train_epochs bf16 seed hidden_weight ce_weight divergence jsd_beta hidden_loss "
        "balance_hidden temperature top_k sampling hidden_layers loss_preset tokens batch_size batch_tokens "
        "answer_tokens",
    ),
    "output": (
        "output_dir resume plot json config",
        "save_config quiet save_steps report_to save_dtype legacy_rope export verify_save title paper quick "
        "evaluation base_model repository license language datasets",
    ),
}
GROUP_OF = {name: group for group, parts in GROUPS.items() for name in " ".join(parts).split()}

# One line for each of the Trainer's flags that --help explains.
RATE = "learning_rate"  # the only one whose default differs from the Trainer's
TRAINER_HELP = {
    "output_dir": "A new folder for the model, its card and its record.",
    "max_steps": "Training steps of all phases. Default: by num_train_epochs.",
    RATE: "Peak learning rate. Default: fits the weights (LoRA: 5e-5).",
    "per_device_train_batch_size": "Sequences in a batch of one device.",
    "gradient_accumulation_steps": "Batches in a training step.",
    "activation_checkpointing": "Recompute activations: less memory, slower steps.",
}


def help_wanted(arguments: Iterable[str]) -> bool:
    """Returns whether a command line asks for help."""
    return not {*HELP, *HELP_ALL}.isdisjoint(arguments)


def summary(command: Any) -> str:
    """Returns the first line of a command's docstring."""
    return (getdoc(command) or "").partition("\n")[0]


def help_text(
    command: Any,
    actions: Sequence[Action],
    positional: tuple[str, str] | None,
    whole: bool = False,
    given: Container[str] = (),
) -> str:
    """Returns the help of a command.

    Args:
        command (`Callable`): the command. Its docstring holds a summary and the lines `usage:` and
            `example:`.
        actions (sequence of `argparse.Action`): the flags of the command. Their texts are changed in place.
        positional (`tuple`, *optional*): name and description of the first argument.
        whole (`bool`, *optional*, defaults to `False`): whether to explain every flag with its whole help
            text.
        given (container of `str`, *optional*): the flags whose defaults are from a recipe.
    """
    _, usage, example = re.split(r"^usage: |^example: ", cleandoc(command.__doc__), flags=re.M)
    example = " \\\n    ".join(line.strip() for line in example.splitlines())
    lines = [f"usage: {usage.strip()}", "", summary(command), "example:", f"  {example}", ""]
    if positional:
        lines += wrap(": ".join(positional), WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        lines += [""]
    groups = _by_group(actions)
    for action in actions:
        if "Trainer" in groups and action.dest in TRAINER_HELP and (not whole or action.dest == RATE):
            action.help = TRAINER_HELP[action.dest]
        if action.dest in given:
            action.help = re.sub(r"\s*Default: [^.]*(\.\d[^.]*)*\.(?=\s|$)", "", action.help or "")
    if whole:
        return "\n".join([*lines, *_sections(groups, _whole_text)])
    trainer = groups.pop("Trainer", [])
    end = ["", "--help_all explains every flag" + (", those of the Trainer too." if trainer else ".")]
    for main, gap in ((False, True), (False, False), (True, False)):
        shown = "\n".join([*lines, *_sections(groups, _line_of_text, main, gap), *end])
        if shown.count("\n") < SCREEN:
            break
    return shown


def _by_group(actions: Iterable[Action]) -> dict[str, list[Action]]:
    """Returns the flags of each group in the order of `GROUPS`, without the negated flags `--no_...`."""
    flags = {one.dest: one for one in actions if one.option_strings and "--no_" not in one.option_strings[0]}
    groups: dict[str, list[Action]] = {group: [] for group in [*GROUPS, "Trainer"]}
    for name in [
        *(name for name in GROUP_OF if name in flags),
        *(name for name in flags if name not in GROUP_OF),
    ]:
        groups[GROUP_OF.get(name, "Trainer")].append(flags[name])
    return {group: members for group, members in groups.items() if members}


def _sections(
    groups: dict[str, list[Action]], text: Callable[[Action], str], main: bool = False, gap: bool = True
) -> list[str]:
    """Returns the lines of all groups.

    Args:
        groups (`dict`): flags by group.
        text (`Callable`): returns the text of a flag.
        main (`bool`, *optional*, defaults to `False`): whether to explain only the main flags, and name the
            other flags.
        gap (`bool`, *optional*, defaults to `True`): whether to put an empty line between groups.
    """
    lines: list[str] = []
    for group, members in groups.items():
        explained = [one for one in members if not main or one.dest in GROUPS[group][0].split()]
        lines += [""] * (gap and bool(lines)) + [f"{group}:"]
        for one in explained:
            lines += _entry(_invocation(one), text(one))
        named = " ".join(one.option_strings[0] for one in members if one not in explained)
        if named:
            lines += wrap(
                f"also {named}", WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
            )
    return lines


def _entry(flag: str, text: str) -> list[str]:
    """Returns the lines of a flag and its text. The text is beside the flag, or below a long flag."""
    indent = " " * FLAG_WIDTH
    lines = wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    left = f"  {flag}"
    if lines and len(left) < FLAG_WIDTH:
        return [left + lines[0][len(left) :], *lines[1:]]
    return [left, *lines]


def _invocation(action: Action) -> str:
    """Returns a flag with a placeholder for its value, such as `--max_steps N`."""
    flag = action.option_strings[0]
    if action.nargs == 0 or (action.nargs == "?" and action.default is not True):
        return flag
    kinds: dict[Any, str] = {int: "N", float: "X"}
    word = action.dest.split("_")[-1].upper()
    word = word if len(word) <= 9 else "VALUE"
    value = action.metavar or ("BOOL" if action.default is True else kinds.get(action.type, word))
    return f"{flag} {value}{' ...' if action.nargs == '+' else ''}"


def _text(action: Action) -> str:
    # argparse reads % as the beginning of a placeholder, so help texts contain %%.
    return " ".join((action.help or "").split()).replace("%%", "%")


def _choices(action: Action) -> list[str]:
    choices = [str(getattr(one, "value", one)) for one in action.choices or ()]
    return [f"One of {', '.join(choices)}."] if choices else []


def _default(action: Action, text: str) -> str:
    value = getattr(action.default, "value", action.default)
    said = "Default:" in text or value in (None, False, "", [], SUPPRESS)
    return "" if said else f"(default: {value})"


def _whole_text(action: Action) -> str:
    """Returns the help of a flag with its choices and its default."""
    text = _text(action)
    return " ".join(filter(None, [text, *_choices(action), _default(action, text)]))


def _line_of_text(action: Action) -> str:
    """Returns the first sentence of a flag's help with its choices, and further sentences that fit on the
    line."""
    text = _text(action)
    first, *others = re.split(r"(?<=[.?])\s+", text)
    line, default = " ".join([first, *_choices(action)]), _default(action, text)
    if len(line) + len(default) >= WIDTH - FLAG_WIDTH:
        default = ""
    for sentence in others:
        if len(f"{line} {sentence} {default}") > WIDTH - FLAG_WIDTH:
            break
        line += f" {sentence}"
    return f"{line} {default}".rstrip()
