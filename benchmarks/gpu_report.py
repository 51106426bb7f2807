"""Plots of `gpu.py`, and the machine they are from."""

import subprocess
from pathlib import Path

import torch

from empcause.benchmarks.figures import OURS, Row


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
            panels.setdefault(row.group, []).append(row)
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
