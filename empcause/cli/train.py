"""`empcause train STAGE`: one stage of the method, from a recipe."""

import argparse

from empcause.cli.stages import STAGES, add_parser


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    add_parser(
        subparsers,
        "train",
        help=f"train {' or '.join(stage.title for stage in STAGES.values())}",
        description="Options come from a YAML recipe (--config) and the command line, which wins. "
        f"`empcause train {next(iter(STAGES))} --help` shows those of a stage.",
        arguments_help="--config RECIPE, --option value",
    )
