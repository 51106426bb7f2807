"""Figures of a run, their ratios, and the CSV that holds them."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from empcause.benchmarks.shapes import Case
from empcause.benchmarks.timing import Timing
from empcause.errors import UserError
from empcause.files import write_text

OURS = "empcause"
_IDENTITY = ("section", "case", "direction", "peer", "same_function", "status")
_FIGURES = ("median_ms", "p20_ms", "p80_ms", "repeats", "gflops", "peak_mib")
_KIND = ("capability", "dtype", "head_dim")  # tables that were written before these columns lack all three


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none.

    Attributes:
        section: "attention", "host time", "training step", "generation", "memory", "long context" or "correctness".
        case: name of the shape, batch or prompts, and the dtype.
        direction: "forward", "forward+backward", "forward+backward+cause" (with the gradient of cause), "step", "compiled step",
            "generate"; "all" where nothing was timed.
        peer: what was timed.
        same_function: whether it weighs keys as it should, or is there to compare speed only.
        status: "ok", or why it was not timed.
        timing: milliseconds: of the device, in the section "host time" of the host.
        gflops: useful multiplications and additions of the matrix products, 10^9 per second; None where they are not counted.
        peak_mib: MiB that a training step takes at its highest, or a pass beside its inputs.
        capability: compute capability of the GPU, such as "9.0"; "" on the CPU.
        dtype: of query, key and value, such as "bfloat16"; "" where no attention is timed alone.
        head_dim: head size, or None where no attention is timed alone.
        shape: of attention, in the run that measured it; a table does not hold it.
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
    capability: str = ""
    dtype: str = ""
    head_dim: int | None = None
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
    """Read rows and facts that `write_csv` wrote. Shapes are not in the file, and ratios follow from the rows.

    Raises:
        UserError: the file cannot be read, is not such a table, or is damaged.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            lines, columns = list(reader), [*(reader.fieldnames or [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    names = (*_IDENTITY, *_FIGURES)
    if not lines or (*columns[: len(names)],) != names:
        raise UserError(f"{path} is not a table of `empcause bench`: it has the columns {', '.join(columns)}.")
    try:
        rows = [_row(line) for line in lines]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    facts = [name for name in columns[len(names) :] if name not in _KIND and not name.startswith("time / ")]
    return rows, {name: lines[0][name] for name in facts}


def _row(line: dict[str, str]) -> Row:
    timing = None
    if line["median_ms"]:
        median, p20, p80 = (float(line[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
        timing = Timing(median, p20, p80, int(line["repeats"]))
    gflops, peak_mib = (float(line[name]) if line[name] else None for name in ("gflops", "peak_mib"))
    section, case, direction, peer, same_function, status = (line[name] for name in _IDENTITY)
    capability, dtype, head_dim = (line.get(name, "") for name in _KIND)
    return Row(
        section,
        case,
        direction,
        peer,
        same_function == "True",
        status,
        timing,
        gflops,
        peak_mib,
        capability,
        dtype,
        int(head_dim) if head_dim else None,
    )


def write_csv(rows: Sequence[Row], facts: dict[str, str], path: Path) -> None:
    """Write one line per row: its figures, its ratios, the machine. The file is replaced as a whole, or not at all."""
    found = ratios(rows)
    columns = sorted({name for values in found.values() for name in values})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_IDENTITY, *_FIGURES, *_KIND, *(f"time / {name}" for name in columns), *facts])
    for row in rows:
        timing = asdict(row.timing) if row.timing else {}
        figures = [*(timing.get(name) for name in ("median", "p20", "p80", "repeats")), row.gflops, row.peak_mib]
        ours = [found.get((row.group, row.peer), {}).get(name) for name in columns]
        identity = [row.section, row.case, row.direction, row.peer, row.same_function, row.status]
        kind = [row.capability, row.dtype, _short(row.head_dim)]
        writer.writerow([*identity, *map(_short, figures), *kind, *map(_short, ours), *facts.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, file.getvalue())


def _short(figure: float | None) -> str:
    return "" if figure is None else str(figure) if isinstance(figure, int) else f"{figure:.4g}"


@dataclass
class Results:
    """The rows of a run. Its table is written anew whenever rows come, so that a run that is stopped loses none.

    Attributes:
        facts: what the figures depend on: the machine and versions.
        path: of the table; None writes nothing.
        rows: those of an earlier run that this one continues, then its own.
    """

    facts: dict[str, str]
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows, and write the table."""
        self.rows += rows
        if self.path is not None and self.rows:
            write_csv(self.rows, self.facts, self.path)

    def has(self, section: str, case: str, direction: str | None = None, peer: str | None = None) -> bool:
        """Whether there are rows of this case; of this direction and peer alone where they are given."""
        return any(
            (row.section, row.case) == (section, case)
            and direction in (None, row.direction)
            and peer in (None, row.peer)
            for row in self.rows
        )


def resumed(facts: dict[str, str], measured: Iterable[str], path: Path) -> Results:
    """Return the results of an earlier run on this machine, to be continued.

    Args:
        facts: of this machine now.
        measured: names of facts that are measured anew in every run, and may differ.

    Raises:
        UserError: there are none, they cannot be read, or they are of another machine or other versions.
    """
    rows, earlier = read_csv(path)
    for name, value in facts.items():
        if name not in measured and earlier.get(name) != value:
            raise UserError(f"{path} is of another machine or version ({name} {earlier.get(name)}, here {value}).")
    return Results(earlier, path, rows)


def compare(old: Path, new: Path, tolerance: float) -> list[str]:
    """Return where the second run is slower beside a peer than the first was, by more than the tolerance; a sentence for each.

    Both the peer and the machine may have changed, so that a case counts by its best ratio over the peers that both runs timed.

    Raises:
        UserError: a file that is no table of `empcause bench`, or tables without a case in common.
    """
    first, second = _ratios_by_case(old), _ratios_by_case(new)
    if not first.keys() & second.keys():
        raise UserError(f"{old} and {new} have no case in common.")
    found = []
    for key in first.keys() & second.keys():
        common = first[key].keys() & second[key].keys()
        changes = [second[key][peer] / first[key][peer] for peer in common]
        if changes and max(changes) < 1 - tolerance:
            found.append(f"{', '.join(key)}: {max(changes):.2f} of what it was beside the peer that it lost least to")
    return sorted(found)


def _ratios_by_case(path: Path) -> dict[tuple[str, ...], dict[str, float]]:
    """Return the ratios of each peer, by section, case, direction and our backend."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for (group, peer), values in ratios(read_csv(path)[0]).items():
        for ours, ratio in values.items():
            found.setdefault((*group, ours), {})[peer] = ratio
    return found
