"""Adds the commands of hf-layerprune to optimum's command line, as `optimum-cli layerprune ...`.

The build copies this file to optimum/commands/register, where optimum finds commands of other packages.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class LayerPruneCommand(BaseOptimumCLICommand):
    """Passes the arguments after `layerprune` to `hf-layerprune`."""

    COMMAND = CommandInfo(name="layerprune", help="Make a causal language model shallower (hf-layerprune).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=REMAINDER, help="a command of hf-layerprune, and its flags")

    def run(self) -> None:
        from hf_layerprune.commands.cli import main

        if code := main(self.args.arguments):
            raise SystemExit(code)


REGISTER_COMMANDS = [LayerPruneCommand]
