"""matplotlib, which only those who draw need, and the plot that CPU and GPU share."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from empcause.benchmarks.figures import OURS, Row
from empcause.benchmarks.long_context import DIRECTIONS, SECTION
from empcause.errors import UserError

_COLORS = ("#4C72B0", "#55A868", "#8172B3", "#937860")


def load_pyplot() -> Any:
    """Return matplotlib's pyplot, which draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def require_matplotlib(output: Path | None) -> None:
    """Check that plots can be drawn, before anything is measured.

    Raises:
        UserError: there is a folder for them, and no matplotlib.
    """
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError('The plots of --output need matplotlib: pip install "empcause[evaluation]".')


def plot_long_context(rows: Sequence[Row], machine: str, path: Path) -> bool:
    """Draw time and peak memory over the tokens, both axes logarithmic; dashed with gradients.

    Args:
        machine: the heading.

    Returns:
        Whether there was anything to draw.
    """
    lines: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for row in rows:
        if row.section == SECTION and row.timing and row.peak_mib is not None:
            (tokens,) = re.findall(r"1x1x(\d+)x", row.case)
            point = int(tokens), row.timing.median / 1e3, max(row.peak_mib, 0.01)
            lines.setdefault((row.peer, row.direction), []).append(point)
    if not lines:
        return False
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    peers = [*dict.fromkeys(peer for peer, _ in lines)]
    ours = [peer for peer in peers if OURS in peer]
    colors = dict(zip([peer for peer in peers if peer not in ours], _COLORS, strict=False))
    colors |= dict(zip(ours, ("#DD8452", "#C44E52"), strict=False))
    for (peer, direction), points in lines.items():
        tokens, seconds, peaks = zip(*sorted(points), strict=True)
        style = {
            "color": colors[peer],
            "marker": "o",
            "markersize": 3,
            "linestyle": ("-", "--")[DIRECTIONS.index(direction)],
        }
        for axes, values in zip(panels, (seconds, peaks), strict=True):
            axes.plot(tokens, values, label=f"{peer}, {direction}", **style)
    for axes, name in zip(panels, ("seconds", "peak memory beside the inputs, MiB"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks := sorted({point[0] for points in lines.values() for point in points}))
        axes.set_xticklabels([f"{tokens // 1024}k" for tokens in ticks])
        axes.set_xlabel("tokens", fontsize=8)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=6)
    figure.suptitle(machine, fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return True
