"""`empcause cases`: the answers of all trained systems side by side."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from empcause.cli.numbers import number
from empcause.cli.reproduce import add_run_options
from empcause.ranges import COUNT, SEED

if TYPE_CHECKING:
    from empcause.reproduction.cases import Case


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `empcause`."""
    parser = subparsers.add_parser(
        "cases",
        help="show what every trained system finds and answers in a few dialogues",
        description="Lets every system that `empcause reproduce` has trained read and answer the two inputs of the paper's Table "
        "10 and dialogues of the test split that the seed draws, and writes them side by side in Markdown and HTML.",
    )
    add_run_options(parser)
    parser.add_argument(
        "--number", type=number(int, COUNT), default=8, help="number of dialogues that are drawn (default: %(default)s)"
    )
    parser.add_argument("--seed", type=number(int, SEED), default=0, help="seed of the draw (default: %(default)s)")
    parser.add_argument(
        "--max_new_tokens",
        type=number(int, COUNT),
        default=40,
        help="longest answer in tokens (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Write the cases, print them, and say where they are."""
    from empcause.cli.terminal import console, hide_file_progress
    from empcause.reproduction.cases import write_cases
    from empcause.text import visible

    hide_file_progress()
    folder, cases = write_cases(
        namespace.size,
        output_dir=Path(namespace.output_dir),
        data=namespace.data,
        number=namespace.number,
        seed=namespace.seed,
        max_new_tokens=namespace.max_new_tokens,
    )
    for index, case in enumerate(cases, start=1):
        _print_case(case, index)
    console.print(visible(f"written to {folder}"), soft_wrap=True, markup=False, highlight=False)
    return 0


def _print_case(case: "Case", index: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from empcause.cli.terminal import console
    from empcause.reproduction.cases import describe, emotion_of, marked_parts
    from empcause.text import visible

    console.rule(Text(visible(describe(case, index))))
    table = Table("system", "emotion", "causes", "answer", show_lines=True)
    for answer in case.answers:
        causes = Text("–")
        if answer.causes is not None:
            styles = {0: "", 1: "bold black on yellow"}
            parts = [(visible(part), styles.get(rank, "underline yellow")) for part, rank in marked_parts(case, answer)]
            causes = Text.assemble(*parts)
        reply = "–" if answer.reply is None else visible(answer.reply)
        table.add_row(Text(answer.system), Text(emotion_of(answer)), causes, Text(reply))
    console.print(table)
    console.print(Text(f"reference: {visible(case.dialogue.response)}", style="dim"))
