"""`empcause info`: which backends are built and which run on this machine, and whether the installed torch is tested."""

import argparse


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "info", help="which backends are built and run here; whether torch is a tested version"
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the version of torch and the backends of the attention operator."""
    from empcause.ops import info

    print(info())
    return 0
