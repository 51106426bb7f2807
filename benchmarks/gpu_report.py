"""Plots of the GPU benchmark, and what machine its figures are from.

python -m empcause.benchmarks.gpu_report FOLDER    draws the plots anew from FOLDER/gpu.csv
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from empcause.benchmarks.figures import OURS, Row, read_csv
from empcause.benchmarks.timing import Timing


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


def plot_all(rows: Sequence[Row], facts: dict[str, str], folder: Path) -> None:
    """Draw `gpu_attention.png` and `gpu_training_step.png`, each if there is something to draw."""
    for section in ("attention", "training step"):
        plot(rows, section, facts, folder / f"gpu_{section.replace(' ', '_')}.png")


def plot(rows: Sequence[Row], section: str, facts: dict[str, str], path: Path) -> bool:
    """Draw medians of a section as bars, a panel per case and direction; the lines are the 20th and 80th percentile.

    What only one peer was timed for has no panel.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str, str], list[tuple[Row, Timing]]] = {}
    for row in rows:
        if row.timing and row.section == section:
            panels.setdefault(row.group, []).append((row, row.timing))
    panels = {group: found for group, found in panels.items() if len(found) > 1}
    if not panels:
        return False
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
    figure.supxlabel("milliseconds (grey: without weights, another function)", fontsize=8)
    figure.suptitle(f"{section}: {facts['gpu']}, torch {facts['torch']}, CUDA {facts['cuda']}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    plot_all(*read_csv(Path(sys.argv[1]) / "gpu.csv"), Path(sys.argv[1]))
