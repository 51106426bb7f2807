"""`empcause bench`: attention on this CPU beside the other ways to it, and beside the machine's limits."""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from empcause.cli.numbers import number
from empcause.errors import UserError
from empcause.outputs import working_in
from empcause.ranges import NOT_NEGATIVE, SHARE, Range

EPILOG = """\
Peers are checked against fp64 before they are timed. Compare ratios within a run: the machine's speed cancels there.

  empcause bench                                              GPT-2's attention at all lengths
  empcause bench --suites decoding dropout --dtypes fp32
  empcause bench --suites all --output results                a table and two plots
  empcause bench --compare old/cpu.csv new/cpu.csv            exit code 1 where a ratio fell
"""
SUITES = ("lengths", "shapes", "dropout", "decoding", "dialogues", "overhead", "memory")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "bench",
        help="time attention on this CPU beside its peers",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suites", nargs="+", choices=(*SUITES, "all"), default=["lengths"])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="beside this package; all but FlexAttention by default"
    )
    parser.add_argument("--threads", type=number(int, Range(1, 4096)), help="of torch")
    parser.add_argument("--seconds", type=number(float, NOT_NEGATIVE), default=1.5, help="for each direction of a case")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write a CSV and plots there")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the results of an earlier run in --output"
    )
    parser.add_argument("--compare", type=Path, nargs=2, metavar="CSV", help="two earlier results; nothing is timed")
    parser.add_argument(
        "--tolerance", type=number(float, SHARE), default=0.15, help="of --compare, as a share of the ratio"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, or compare two results; 1 if a ratio fell."""
    import torch

    from empcause.cli.memory import keep_freed_memory
    from empcause.ops import info

    if not info()["cpu"].runs:
        raise UserError(f"The CPU backend does not run here: {info()['cpu'].reason}.")
    from empcause.benchmarks import cpu

    if options.compare:
        old, new = options.compare
        fallen = cpu.compare(old, new, options.tolerance)
        print("\n".join(fallen) or "No case fell behind its peers.")
        return int(bool(fallen))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()  # or whose results meet fresh pages is a matter of luck
    suites = SUITES if "all" in options.suites else options.suites
    with nullcontext() if options.output is None else working_in(options.output):
        if options.output is not None:
            _keep_earlier_results([options.output / name for name in cpu.FILES], options.overwrite_output_dir)
        cpu.bench(suites, options.dtypes, options.peers, options.output, options.seconds)
    return 0


def _keep_earlier_results(paths: Sequence[Path], overwrite: bool) -> None:
    for path in paths:
        if path.is_symlink():
            raise UserError(f"{path} is a link, which is not written through; choose another --output.")
        if path.exists() and not overwrite:
            raise UserError(
                f"{path} is there already; choose another --output, or replace it with --overwrite_output_dir."
            )
