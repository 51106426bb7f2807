"""`empcause reproduce`: a table of the paper from data to Markdown, and all tables beside the printed figures."""

import argparse
import importlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from empcause.cli.numbers import number
from empcause.cli.stages import STAGES
from empcause.ranges import COUNT

# Named here and not read from `empcause.reproduction`, whose import takes seconds.
TABLES = ("table5", "table6", "table7")
SIZES = ("smoke", "small", "full")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "reproduce",
        help="train, evaluate and compare the systems of a table of the paper",
        description="Trains the systems of a table that are not trained yet, evaluates them, and writes the table beside the "
        "printed figures. If it is interrupted, the same command goes on. `scorecard` puts every printed number of all tables "
        "beside the measured one.",
    )
    parser.add_argument("what", choices=[*TABLES, "scorecard"], help="which table, or the scorecard of all")
    add_run_options(parser)
    parser.add_argument("--seeds", type=number(int, COUNT), default=1, help="number of seeds (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="make these rows alone (default: all)")
    parser.add_argument(
        "--redo", nargs="+", default=[], metavar="SYSTEM", help="remove what is there of these systems and make it anew"
    )
    parser.add_argument(
        "--accept_code", action="store_true", help="go on with models and evaluations that other code made"
    )
    parser.set_defaults(run=run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a run: its size, data and folder."""
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="smoke",
        help="smoke: tiny models on the embedded sample, in minutes; small: over small pretrained models, in hours on two CPU "
        "cores; full: the paper's models (default: %(default)s)",
    )
    parser.add_argument("--data", help="folder, archive or name of the data; default: $EMPCAUSE_DATA_DIR")
    parser.add_argument(
        "--output_dir",
        default="runs/reproduction",
        help="folder that holds a folder for each size (default: %(default)s)",
    )


def prepare(command: str, stage: str, words: Sequence[str]) -> tuple[str, Callable[[], Mapping[str, Any]]]:
    """Make what `empcause COMMAND STAGE WORDS` runs.

    Returns:
        Name of the module that does the work, and a function that does it.

    Raises:
        UserError: the words are no valid options.
    """
    from empcause.cli.options import parse_options

    task = getattr(STAGES[stage], command)
    module = importlib.import_module(task.module)
    kind = getattr(module, task.options)
    options = parse_options(kind, words, prog=f"empcause {command} {stage}", description=task.description)
    return task.module, lambda: getattr(module, task.function)(options)


def run(namespace: argparse.Namespace) -> int:
    """Make the table or the scorecard, print it, and say where it is."""
    import torch

    from empcause.cli.memory import keep_freed_memory
    from empcause.cli.terminal import console, hide_file_progress
    from empcause.reproduction import reproduce, write_scorecard
    from empcause.text import visible

    def say(text: str) -> None:
        console.print(visible(text), soft_wrap=True, markup=False, highlight=False)

    hide_file_progress()
    if namespace.what == "scorecard":
        path = write_scorecard(Path(namespace.output_dir), namespace.size)
    else:
        if not torch.accelerator.is_available():
            keep_freed_memory()
        command = shlex.join(["empcause", *sys.argv[1:]])
        folder = reproduce(
            namespace.what,
            namespace.size,
            prepare=prepare,
            output_dir=Path(namespace.output_dir),
            seeds=namespace.seeds,
            data=namespace.data,
            rows=namespace.rows,
            redo=namespace.redo,
            accept_code=namespace.accept_code,
            command=command,
            say=say,
        )
        path = folder / "table.md"
    console.print(path.read_text(encoding="utf-8"), soft_wrap=True, markup=False, highlight=False)
    say(f"written to {path.parent}")
    return 0
