"""Figures of a run, their ratios, and the CSV they are written to."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from empcause.benchmarks.shapes import Case
from empcause.benchmarks.timing import Timing

OURS = "empcause"


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none.

    Attributes:
        section: "attention" or "training step".
        case: name of the shape or batch, and its dtype.
        direction: "forward", "forward+backward", "forward+backward+cause" (with the gradient of cause), "step".
        peer: what was timed.
        same_function: whether it weighs keys as asked, or is there as a mark of speed only.
        status: "ok", or why it was not timed.
        timing: milliseconds.
        gflops: useful multiplications and additions of the matrix products, 10^9 per second; None for training steps.
        peak_mib: memory of a training step, or of a pass beside its inputs, at its highest.
        shape: of attention; None for training steps.
    """

    section: str
    case: str
    direction: str
    peer: str
    same_function: bool
    status: str
    timing: Timing | None = None
    gflops: float | None = None
    peak_mib: float | None = None
    shape: Case | None = None

    @property
    def group(self) -> tuple[str, str, str]:
        """Rows that are compared with each other: section, case, direction."""
        return self.section, self.case, self.direction


def ratios(rows: Sequence[Row]) -> dict[tuple[tuple[str, str, str], str], dict[str, float]]:
    """Time of each peer / time of each of our backends, same case and direction: above 1 we are faster."""
    ours: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.timing and OURS in row.peer:
            ours.setdefault(row.group, {})[row.peer] = row.timing.median
    return {
        (row.group, row.peer): {name: row.timing.median / time for name, time in ours.get(row.group, {}).items()}
        for row in rows
        if row.timing and OURS not in row.peer
    }


def write_csv(rows: Sequence[Row], facts: dict[str, str], path: Path) -> None:
    """One line per row: its figures, its ratios, the machine."""
    found = ratios(rows)
    columns = sorted({name for values in found.values() for name in values})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                *("section", "case", "direction", "peer", "same_function", "status"),
                *("median_ms", "p20_ms", "p80_ms", "repeats", "gflops", "peak_mib"),
                *(f"time / {name}" for name in columns),
                *facts,
            ]
        )
        for row in rows:
            timing = asdict(row.timing) if row.timing else {}
            figures = [*(timing.get(name) for name in ("median", "p20", "p80", "repeats")), row.gflops, row.peak_mib]
            figures += [found.get((row.group, row.peer), {}).get(name) for name in columns]
            identity = [row.section, row.case, row.direction, row.peer, row.same_function, row.status]
            writer.writerow([*identity, *(_short(figure) for figure in figures), *facts.values()])


def _short(figure: float | None) -> str:
    return "" if figure is None else str(figure) if isinstance(figure, int) else f"{figure:.4g}"
