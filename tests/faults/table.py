"""Writes the table of docs/RELIABILITY.md from the marks of the fault tests: `make fault-table`."""

from itertools import groupby

from faults.kinds import ROOT, kinds

DOCUMENT = ROOT / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def table() -> str:
    """The kinds of fault, one table per test file, as Markdown."""
    lines = ["| what goes wrong | where | what is promised | test |", "|---|---|---|---|"]
    for file, group in groupby(kinds(), key=lambda kind: kind.test.split("::")[0]):
        for kind in group:
            name = kind.test.split("::")[1].removeprefix("test_")
            lines.append(f"| {kind.cause} | {kind.place} | {kind.promise} | [{name}](../{file}) |")
    return "\n".join(lines) + "\n"


def with_table(document: str) -> str:
    """The document with its table made anew."""
    head, rest = document.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
