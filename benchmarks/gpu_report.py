"""Results of `gpu.py` as CSV and plots."""

import csv
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
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
        peak_mib: memory of a training step at its highest.
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


def machine(device: str) -> dict[str, str]:
    """What the figures depend on: GPU, driver, versions."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    facts = {"torch": torch.__version__, "triton": triton_version, "cuda": str(torch.version.cuda)}
    if not device.startswith("cuda"):
        return {"gpu": "none", "driver": "none", **facts}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"gpu": torch.cuda.get_device_name(device), "driver": driver, **facts}


def _key(row: Row) -> tuple[str, str, str]:
    return row.section, row.case, row.direction


def ratios(rows: list[Row]) -> dict[tuple[tuple[str, str, str], str], dict[str, float]]:
    """Time of each peer / time of each of our backends, same case and direction: above 1 we are faster."""
    ours: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.timing and OURS in row.peer:
            ours.setdefault(_key(row), {})[row.peer] = row.timing.median
    return {
        (_key(row), row.peer): {name: row.timing.median / time for name, time in ours.get(_key(row), {}).items()}
        for row in rows
        if row.timing and OURS not in row.peer
    }


def write_csv(rows: list[Row], facts: dict[str, str], path: Path) -> None:
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
            figures += [found.get((_key(row), row.peer), {}).get(name) for name in columns]
            identity = [row.section, row.case, row.direction, row.peer, row.same_function, row.status]
            writer.writerow([*identity, *(_short(figure) for figure in figures), *facts.values()])


def _short(figure: float | None) -> str:
    return "" if figure is None else str(figure) if isinstance(figure, int) else f"{figure:.4g}"


def plot(rows: list[Row], section: str, facts: dict[str, str], path: Path) -> bool:
    """Medians of a section as bars, a panel per case and direction; the lines are the 20th and 80th percentile.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.timing and row.section == section:
            panels.setdefault(_key(row), []).append(row)
    if not panels:
        return False
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    height = 0.24 * max(len(found) for found in panels.values()) + 0.9
    figure, grid = pyplot.subplots(lines, columns, figsize=(6 * columns, height * lines + 0.5), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, ((_, case, direction), found) in zip(grid.flat, panels.items(), strict=False):
        found = sorted(found, key=lambda row: row.timing.median)
        medians = [row.timing.median for row in found]
        errors = [
            [row.timing.median - row.timing.p20 for row in found],
            [row.timing.p80 - row.timing.median for row in found],
        ]
        colors = ["#DD8452" if OURS in row.peer else "#4C72B0" if row.same_function else "#BBBBBB" for row in found]
        axes.barh(range(len(found)), medians, xerr=errors, color=colors, height=0.7, error_kw={"linewidth": 0.8})
        axes.set_yticks(range(len(found)), [row.peer for row in found], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"{case}, {direction}", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("milliseconds (grey: without weights, another function)", fontsize=8)
    figure.suptitle(f"{section}: {facts['gpu']}, torch {facts['torch']}, CUDA {facts['cuda']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
