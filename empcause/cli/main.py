"""Entry point: finds the command, runs it, and turns a user's mistake into one sentence."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from empcause.errors import UserError

# Each module has `register(subparsers)`, which adds its parser with `run`, a function of the parsed arguments.
COMMANDS = ("data", "train", "evaluate", "respond", "chat", "info", "demo", "bench")

DESCRIPTION = """\
Empathetic conversation generation enhanced by emotion cause.

A first run, from nothing:
  empcause demo                                                everything once, tiny, in minutes
  empcause data check                                          is the data complete?
  empcause train extractor --config recipes/extractor.yaml     stage 1: which words caused the emotion
  empcause train generator --config recipes/generator.yaml     stage 2: answers that attend to them
  empcause evaluate generator --model runs/generator
  empcause respond "I feel so lonely, all my friends live abroad."
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="empcause", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"empcause.cli.{name}").register(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 1 a check that found something, 2 a user's mistake (one sentence on standard error), 130 Ctrl-C.
    """
    namespace = build_parser().parse_args(arguments)
    try:
        return namespace.run(namespace)
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_disk_full(error):
            raise
        return _fail("the disk is full; what was saved before is kept. Make room, then run the same command again.")
    except KeyboardInterrupt:
        _fail("interrupted; a training goes on from its last checkpoint with --resume_from_checkpoint true.")
        return 130


def _is_disk_full(error: Exception) -> bool:
    """Libraries that write weights wrap the system's error in their own, so its text counts too."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full)


def _fail(message: str) -> int:
    print(f"empcause: error: {message}", file=sys.stderr)
    return 2
