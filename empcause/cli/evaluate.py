"""`empcause evaluate STAGE`: metrics with intervals, beside the published figures."""

import argparse

from empcause.cli.stages import STAGES, add_parser


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    add_parser(
        subparsers,
        "evaluate",
        help="measure a trained model; writes JSON, a Markdown table and figures",
        description=f"`empcause evaluate {next(iter(STAGES))} --help` shows the options of one stage.",
        arguments_help="--model FOLDER, --option value",
    )
