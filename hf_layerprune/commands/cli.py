"""Runs the commands of hf-layerprune, and reports errors in one line."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib.metadata import version

from ..errors import LayerPruneError, choose_from
from .common import OUTPUT_DIR, Command, flag_names, keep_settings, parse
from .config_file import common_flags
from .evaluate import card, evaluate
from .flags import name_flags
from .help import summary
from .plan import plan
from .prune import phases, prune
from .score import inspect, score
from .train import cache_teacher, distill, run


INTERRUPTED = 128 + signal.SIGINT  # the exit code after Ctrl-C


def study(arguments: list[str]) -> None:
    """Answers a question by a grid of small runs.

    usage: hf-layerprune study NAME [flags]
    example: hf-layerprune study criteria --quick
    """
    from ..reports.tables import markdown_table
    from .studies import STUDIES, check_study, run_study, study_rows
    from .study_setting import StudyArguments

    name = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    names = ("NAME", f"One of {', '.join(STUDIES)}.")
    (settings,) = parse(study, arguments[bool(name) :], [StudyArguments], model=False, positional=names)
    check_study(name)
    print(f"{STUDIES[name].__doc__}\n")
    print(markdown_table(study_rows(run_study(name, settings))))
    folder = settings.output_dir or f"study-{name}"
    keep_settings(folder)
    print(f"\nTable, plot and numbers are in {folder}.")


def quickstart(arguments: list[str]) -> None:
    """Prunes SmolLM2-135M from 30 to 27 layers on this machine, without the hub or an account.

    usage: hf-layerprune quickstart [flags]
    example: hf-layerprune quickstart --output_dir smollm2-27-layers
    """
    from .quickstart import QuickstartArguments
    from .quickstart import quickstart as run

    (settings,) = parse(quickstart, arguments, [QuickstartArguments], model=False)
    run(settings)
    keep_settings(settings.output_dir)


SHARED = ("score", "evaluate")  # commands whose batches are shared by processes
COMMANDS: dict[str, Command] = {
    "quickstart": quickstart,
    "inspect": inspect,
    "plan": plan,
    "score": score,
    "prune": prune,
    "cache-teacher": cache_teacher,
    "distill": distill,
    "phases": phases,
    "run": run,
    "evaluate": evaluate,
    "study": study,
    "card": card,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, 2 after a user error, or 130 after Ctrl-C."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: hf-layerprune COMMAND ...\n")
        for name, function in COMMANDS.items():
            print(f"  {name:14s}{summary(function)}")
        print("\nhf-layerprune COMMAND --help shows the flags of a command and an example.")
        return 0
    if command == "--version":
        print(f"hf-layerprune {version('hf-layerprune')}")
        return 0
    quiet = common_flags(rest).quiet
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is first imported
    from tqdm.contrib.logging import logging_redirect_tqdm

    handler = logging.StreamHandler()
    handler.setFormatter(_FlagNames("%(message)s"))
    logging.basicConfig(handlers=[handler])
    flag_names.clear()
    try:
        if command not in COMMANDS:
            raise LayerPruneError(f"There is no command {command!r}. {choose_from(command, COMMANDS)}.")
        silence = _quiet_libraries() if quiet else nullcontext()
        with _package_logs(quiet), logging_redirect_tqdm(), silence, _processes(command):
            COMMANDS[command](rest)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except LayerPruneError as error:
        print(f"hf-layerprune: error: {name_flags(str(error), flag_names)}", file=sys.stderr)
        return 2
    except (OSError, ImportError) as error:
        # These are user errors too: a file that cannot be written, or a missing package.
        print(f"hf-layerprune: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nhf-layerprune: interrupted. {_how_to_continue(command, rest)}", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextmanager
def _processes(command: str) -> Iterator[None]:
    """Lets the processes of torchrun share the work of a command within this context. The first one prints.

    Raises:
        LayerPruneError: the command does not share its work.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started == 1 or command in ("distill", "run"):  # a Trainer starts the process group
        yield
        return
    if command not in SHARED:
        raise LayerPruneError(
            f"{command} works in one process, but torchrun or accelerate started {started}. Start it "
            "directly."
        )
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    if not state.is_main_process:
        logging.getLogger("hf_layerprune").setLevel(logging.ERROR)
    with (
        open(os.devnull, "w") as nothing,
        nullcontext() if state.is_main_process else redirect_stdout(nothing),
    ):
        yield
    state.wait_for_everyone()  # not after an error: torchrun then stops the other processes
    state.destroy_process_group()


@contextmanager
def _package_logs(quiet: bool) -> Iterator[None]:
    """Makes this package log its progress within this context, or only errors if `quiet` is set."""
    package = logging.getLogger("hf_layerprune")
    level = package.level
    package.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Switches off the logs of a Trainer within this context, and the progress bars and warnings of
    transformers and datasets."""
    import datasets
    from transformers.utils import logging as transformers_logging

    from ..pruning.other_callbacks import silent_trainers

    verbosity = transformers_logging.get_verbosity()
    shows_bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with silent_trainers():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars[0]:
            transformers_logging.enable_progress_bar()
        if shows_bars[1]:
            datasets.enable_progress_bars()


class _FlagNames(logging.Formatter):
    """Writes arguments as flags in log messages of this package, as in its errors."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return name_flags(message, flag_names) if record.name.startswith("hf_layerprune") else message


def _how_to_continue(command: str, arguments: list[str]) -> str:
    """Returns advice for the user after Ctrl-C."""
    from argparse import ArgumentParser

    parser = ArgumentParser(add_help=False)
    parser.add_argument("--output_dir", "--output-dir", default=OUTPUT_DIR)
    parser.add_argument("--json")
    given = parser.parse_known_args(arguments)[0]
    if command in ("distill", "run"):
        from ..checkpoints.loading import last_checkpoint

        found = last_checkpoint(given.output_dir)
        if found:
            return f"Its last checkpoint is {found}: add --resume to the command to continue from it."
        return "It wrote no checkpoint. Run the command again, with --save_steps to be able to resume."
    if command in ("phases", "cache-teacher", "study") or (command in ("score", "evaluate") and given.json):
        return "Run the command again to continue."
    if command in ("score", "evaluate"):
        return "Nothing was kept. Run the command again, with --json FILE to be able to continue."
    return "Nothing was kept. Run the command again."
