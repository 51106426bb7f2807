"""`empcause data check` and `empcause data download`."""

import argparse
import sys


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser("data", help="check or download the data sets")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="count what is there and name malformed rows",
        description="Reads every file, prints the counts, and names malformed rows by file and line.",
    )
    check.add_argument(
        "--data",
        metavar="FOLDER",
        help="folder or archive of the data, a corpus' name, or `sample`; default: $EMPCAUSE_DATA_DIR, otherwise what was "
        "downloaded",
    )
    check.set_defaults(run=run_check)
    fetch = actions.add_parser(
        "download",
        help="fetch the data sets from their official addresses",
        description="Fetches the official archive of every data set and verifies it; an interrupted download is continued. "
        "EmpatheticDialogues and EmoCause, the paper's data, are under CC BY-NC 4.0: non-commercial use only.",
    )
    fetch.set_defaults(run=run_download)


def run_check(namespace: argparse.Namespace) -> int:
    """Print counts and problems; the exit code is 1 if there are problems."""
    from rich.table import Table

    from empcause.cli.terminal import console
    from empcause.data import check_data
    from empcause.text import visible

    result = check_data(namespace.data)
    table = Table("file", "counts")
    for name, counts in result.counts.items():
        table.add_row(name, ", ".join(f"{count:,} {unit}" for unit, count in counts.items()))
    console.print(table)
    for problem in result.problems:
        console.print(visible(problem), style="red", soft_wrap=True, markup=False)
    console.print("No malformed row." if not result.problems else f"{len(result.problems)} problems.")
    return 1 if result.problems else 0


def run_download(_: argparse.Namespace) -> int:
    """Fetch what is missing and print where it is."""
    from empcause.cli.terminal import console
    from empcause.data import DATASETS, download
    from empcause.text import visible

    try:
        for dataset in DATASETS:
            console.print(visible(f"{dataset.name}: {download(dataset)}"), soft_wrap=True, markup=False)
    except KeyboardInterrupt:
        print(
            "empcause: error: interrupted; what arrived is kept, the same command goes on from there.", file=sys.stderr
        )
        return 130
    return 0
