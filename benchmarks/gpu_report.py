"""Plots of `empcause bench` on a GPU, what machine its figures are from, and what they say about the default backend.

python -m empcause.benchmarks.gpu_report FOLDER    draws the plots anew from FOLDER/gpu.csv
"""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from empcause.benchmarks.figures import OURS, Row, read_csv
from empcause.benchmarks.plotting import load_pyplot, plot_long_context
from empcause.benchmarks.timing import Timing
from empcause.ops.backends import head_dim_class

# The sections that are drawn as bars.
_BARS = ("attention", "host time", "training step", "generation")
# What `empcause bench` writes on a GPU: the table, and a plot of each section that was measured.
FILES = ("gpu.csv", *(f"gpu_{section.replace(' ', '_')}.png" for section in _BARS), "gpu_long_context.png")


def machine(device: str) -> dict[str, str]:
    """Return what the figures depend on: GPU, driver, versions."""
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


def cuda_is_not_slower(rows: Iterable[Row]) -> frozenset[tuple[tuple[int, int], torch.dtype, int]]:
    """Return for which calls the CUDA kernels are measured to be no slower than Triton's: what `CUDA_IS_NOT_SLOWER` should be.

    Args:
        rows: of a table; those without a compute capability do not count.

    Returns:
        Compute capability, dtype and class of the head size for which both backends have figures of attention and the CUDA
        kernels are not slower in any case and direction that both have.
    """
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.section == "attention" and row.timing and row.capability and row.head_dim is not None:
            major, minor = row.capability.split(".")
            call = (int(major), int(minor)), getattr(torch, row.dtype), head_dim_class(row.head_dim)
            times.setdefault((call, row.group), {})[row.peer] = row.timing.median
    not_slower: dict[tuple[tuple[int, int], torch.dtype, int], bool] = {}
    for (call, _), found in times.items():
        if f"{OURS} cuda" in found and f"{OURS} triton" in found:
            faster = found[f"{OURS} cuda"] <= found[f"{OURS} triton"]
            not_slower[call] = not_slower.get(call, True) and faster
    return frozenset(call for call, every in not_slower.items() if every)


def plot_all(rows: Sequence[Row], facts: dict[str, str], folder: Path) -> None:
    """Draw every plot of FILES for which there is something to draw."""
    for section, name in zip(_BARS, FILES[1:-1], strict=True):
        plot(rows, section, facts, folder / name)
    where = f"{facts['gpu']}, torch {facts['torch']}, CUDA {facts['cuda']}"
    plot_long_context(rows, where, folder / FILES[-1])


def plot(rows: Sequence[Row], section: str, facts: dict[str, str], path: Path) -> bool:
    """Draw medians of a section as bars, a panel per case and direction; the lines are the 20th and 80th percentile.

    What only one peer was timed for has no panel.

    Returns:
        Whether there was anything to draw.
    """
    panels: dict[tuple[str, str, str], list[tuple[Row, Timing]]] = {}
    for row in rows:
        if row.timing and row.section == section:
            panels.setdefault(row.group, []).append((row, row.timing))
    panels = {group: found for group, found in panels.items() if len(found) > 1}
    if not panels:
        return False
    pyplot = load_pyplot()
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    height = 0.24 * max(len(found) for found in panels.values()) + 0.9
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(6 * columns, height * lines + 0.5), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, ((_, case, direction), found) in zip(grid.flat, panels.items(), strict=False):
        found = sorted(found, key=lambda item: item[1].median)
        medians = [timing.median for _, timing in found]
        errors = [
            [timing.median - timing.p20 for _, timing in found],
            [timing.p80 - timing.median for _, timing in found],
        ]
        colors = ["#DD8452" if OURS in row.peer else "#4C72B0" if row.same_function else "#BBBBBB" for row, _ in found]
        axes.barh(range(len(found)), medians, xerr=errors, color=colors, height=0.7, error_kw={"linewidth": 0.8})
        axes.set_yticks(range(len(found)), [row.peer for row, _ in found], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"{case}, {direction}", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("milliseconds (grey: another function, which weighs no keys)", fontsize=8)
    figure.suptitle(f"{section}: {facts['gpu']}, torch {facts['torch']}, CUDA {facts['cuda']}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    plot_all(*read_csv(Path(sys.argv[1]) / "gpu.csv"), Path(sys.argv[1]))
