"""Entry point: finds the command, runs it, and turns a user's mistake into one sentence."""

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from empcause.cli.failures import sentence
from empcause.cli.stages import STAGES
from empcause.errors import Interrupted, UserError
from empcause.text import visible

# Modules of this package. Each has `register(subparsers)`, which adds a parser whose default `run` takes the parsed arguments.
COMMANDS = ("data", "train", "evaluate", "respond", "chat", "info", "demo", "bench", "reproduce", "cases")

_TRAININGS = "\n".join(
    f"  {f'empcause train {name} --config {stage.recipe}':<61}{stage.purpose}" for name, stage in STAGES.items()
)
DESCRIPTION = f"""\
Empathetic conversation generation enhanced by emotion cause.

A first run, from nothing:
  empcause demo                                                everything once, tiny, in minutes
  empcause data check                                          is the data complete?
{_TRAININGS}
  empcause evaluate generator --model runs/generator
  empcause respond "My dog has been ill for a week, and the vet has no idea why."
"""


class Parser(argparse.ArgumentParser):
    """Parser that raises a `UserError` for wrong arguments, and takes no abbreviated options."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs, allow_abbrev=False)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` that says what is wrong and which command shows the help."""
        raise UserError(f"{message}; see {self.prog} --help.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="empcause", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in COMMANDS:
        importlib.import_module(f"empcause.cli.{name}").register(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 1 a check that found something, 2 a user's mistake (one sentence on standard error), 130 Ctrl-C, 143 SIGTERM.
    """
    command = ""
    try:
        with suppress(ValueError):  # outside of the main thread
            signal.signal(signal.SIGTERM, _end)
        _prepare_streams()
        _refuse_repetition(sys.argv[1:] if arguments is None else arguments)
        namespace = build_parser().parse_args(arguments)
        command = namespace.command
        if command != "info":
            _check_instruction_set()
        code = namespace.run(namespace)
        _flush()
        return code
    except BrokenPipeError:
        _give_up_output()
        return 0
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "interrupted.")
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except Exception as error:
        said = sentence(error, command)
        if said is None:
            raise
        return _fail(said)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGTERM like Ctrl-C: the command ends with a sentence on what was saved."""
    raise Interrupted(signal=number)


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Format a message in one line, in which control characters are shown."""
        return f"empcause: {visible(record.getMessage())}"


def _prepare_streams() -> None:
    """Let no input or output fail because of its encoding, and no file get the number of a closed standard stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Visible())
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def _refuse_repetition(arguments: Sequence[str]) -> None:
    """Refuse an option that is given twice, because one of its values would be dropped silently.

    Raises:
        UserError: an option is given twice.
    """
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    seen = set()
    for word in words:
        name = word.split("=")[0].replace("-", "_")
        if word.startswith("--") and name in seen:
            raise UserError(f"{word.split('=')[0]} is given twice; give it once.")
        if word.startswith("--"):
            seen.add(name)


def _check_instruction_set() -> None:
    """Refuse a wrong EMPCAUSE_CPU_ISA before any work; only `empcause info` runs and shows it.

    Raises:
        UserError: it names an instruction set that this processor does not have.
    """
    if not os.environ.get("EMPCAUSE_CPU_ISA"):
        return
    from empcause.ops import info

    backend = info()["cpu"]
    if backend.built and not backend.runs:
        raise UserError(f"{backend.reason}.")


def _give_up_output() -> None:
    """Discard the remaining output, which nobody reads, so that the interpreter does not complain when it closes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    if sys.stderr is not None:
        print(f"empcause: error: {visible(message)}", file=sys.stderr)
    try:
        _flush()
    except OSError:
        _give_up_output()
    return 2


def _flush() -> None:
    if sys.stdout is not None:  # it is None where the caller closed it
        sys.stdout.flush()
