"""`optimum-cli layerprune ...`: the same commands inside optimum's command line.

At build this file is copied to optimum/commands/register, where optimum looks for commands of others.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class LayerPruneCommand(BaseOptimumCLICommand):
    """Hands what follows `layerprune` to `hf-layerprune` as it is."""

    COMMAND = CommandInfo(name="layerprune", help="Make a causal language model shallower (hf-layerprune).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=REMAINDER, help="a command of hf-layerprune, and its flags")

    def run(self) -> None:
        from hf_layerprune.commands.cli import main

        if code := main(self.args.arguments):
            raise SystemExit(code)


REGISTER_COMMANDS = [LayerPruneCommand]
