"""`empcause info`: what is built, what runs here, and why."""

import argparse


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser("info", help="what is built, what runs here, and why")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the backends of the attention operator."""
    from empcause.ops import info

    print(info())
    return 0
