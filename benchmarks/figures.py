"""Figures of a run, their ratios, and the CSV that holds them."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from empcause.benchmarks.shapes import Case
from empcause.benchmarks.timing import Timing

OURS = "empcause"
_IDENTITY = ("section", "case", "direction", "peer", "same_function", "status")
_FIGURES = ("median_ms", "p20_ms", "p80_ms", "repeats", "gflops", "peak_mib")


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none.

    Attributes:
        section: "attention" or "training step".
        case: name of the shape or batch, and its dtype.
        direction: "forward", "forward+backward", "forward+backward+cause" (with the gradient of cause), "step".
        peer: what was timed.
        same_function: whether it weighs keys as asked, or is there to compare speed only.
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
        """Section, case and direction: rows of the same group are compared with each other."""
        return self.section, self.case, self.direction


def ratios(rows: Sequence[Row]) -> dict[tuple[tuple[str, str, str], str], dict[str, float]]:
    """Return the time of each peer / that of each of our backends in the same case and direction: above 1 we are faster."""
    ours: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.timing and OURS in row.peer:
            ours.setdefault(row.group, {})[row.peer] = row.timing.median
    return {
        (row.group, row.peer): {name: row.timing.median / time for name, time in ours.get(row.group, {}).items()}
        for row in rows
        if row.timing and OURS not in row.peer
    }


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Read rows and facts that `write_csv` wrote; shapes are not in the file, and ratios follow from the rows.

    Raises:
        ValueError: the file is not such a table.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        lines, columns = list(reader), [*(reader.fieldnames or [])]
    names = (*_IDENTITY, *_FIGURES)
    if not lines or (*columns[: len(names)],) != names:
        raise ValueError(f"{path} is not a table of these benchmarks: it has the columns {', '.join(columns)}")
    rows = []
    for line in lines:
        timing = None
        if line["median_ms"]:
            median, p20, p80 = (float(line[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
            timing = Timing(median, p20, p80, int(line["repeats"]))
        gflops, peak_mib = (float(line[name]) if line[name] else None for name in ("gflops", "peak_mib"))
        section, case, direction, peer, same_function, status = (line[name] for name in _IDENTITY)
        rows.append(
            Row(section, case, direction, peer, same_function == "True", status, timing, gflops, peak_mib=peak_mib)
        )
    facts = [name for name in columns[len(names) :] if not name.startswith("time / ")]
    return rows, {name: lines[0][name] for name in facts}


def write_csv(rows: Sequence[Row], facts: dict[str, str], path: Path) -> None:
    """Write one line per row: its figures, its ratios, the machine."""
    found = ratios(rows)
    columns = sorted({name for values in found.values() for name in values})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_IDENTITY, *_FIGURES, *(f"time / {name}" for name in columns), *facts])
        for row in rows:
            timing = asdict(row.timing) if row.timing else {}
            figures = [*(timing.get(name) for name in ("median", "p20", "p80", "repeats")), row.gflops, row.peak_mib]
            figures += [found.get((row.group, row.peer), {}).get(name) for name in columns]
            identity = [row.section, row.case, row.direction, row.peer, row.same_function, row.status]
            writer.writerow([*identity, *(_short(figure) for figure in figures), *facts.values()])


def _short(figure: float | None) -> str:
    return "" if figure is None else str(figure) if isinstance(figure, int) else f"{figure:.4g}"
