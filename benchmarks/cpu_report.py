"""Plots of `empcause bench`."""

from collections.abc import Collection, Sequence
from pathlib import Path

from empcause.benchmarks.figures import OURS, Row, ratios
from empcause.benchmarks.plotting import load_pyplot

COLORS = {
    "eager formula": "#DD8452",
    "folded, sdpa": "#55A868",
    "sdpa, log-weight mask": "#4C72B0",
    "sdpa, log-weight row": "#8172B3",
}


def where(facts: dict[str, str]) -> str:
    """Return the machine that figures are from, in a line."""
    return f"{facts['cpu']}, {facts['isa']}, {facts['threads']} threads, torch {facts['torch']}"


def plot_ratios(rows: Sequence[Row], facts: dict[str, str], path: Path) -> bool:
    """Draw the time of each peer / ours over the length of the sequences, a panel for each dtype and direction.

    Returns:
        Whether there was anything to draw.
    """
    lines: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    found = ratios(rows)
    for row in rows:
        ratio = found.get((row.group, row.peer), {}).get(f"{OURS} cpu")
        if ratio and row.same_function and row.shape and row.case.startswith("GPT-2"):
            panel = lines.setdefault((str(row.shape.dtype).removeprefix("torch."), row.direction), {})
            panel.setdefault(row.peer, []).append((row.shape.keys, ratio))
    if not lines:
        return False
    pyplot = load_pyplot()
    panels = sorted(lines, key=lambda key: (key[0] != "float32", key[1]))
    columns = max(sum(dtype == kind for kind, _ in panels) for dtype, _ in panels)
    count = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        count, columns, figsize=(3.6 * columns, 2.7 * count), squeeze=False, layout="constrained"
    )
    for axes, key in zip(grid.flat, panels, strict=False):
        for peer, points in lines[key].items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, color=COLORS.get(peer), label=peer)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(", ".join(key), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    grid.flat[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("time of the peer / time of empcause", fontsize=9)
    figure.suptitle(where(facts), fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return True


def plot_roofline(
    rows: Sequence[Row], gflops: Collection[float], gigabytes: float, facts: dict[str, str], path: Path
) -> bool:
    """Draw useful FLOPs per second over FLOPs per byte of inputs and outputs, under the machine's limits.

    Args:
        gflops: 10^9 FLOP/s, of each dtype that has a limit of its own.
        gigabytes: 10^9 bytes/s.

    Returns:
        Whether there was anything to draw.
    """
    # A single key shows what a call costs, not what the machine gives.
    points = [
        (row, row.shape.flops(row.direction) / row.shape.bytes(row.direction))
        for row in rows
        if row.timing and row.peer.startswith(OURS) and row.shape and row.shape.keys > 1
    ]
    if not points:
        return False
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    low, high = min(x for _, x in points) / 2, max(max(x for _, x in points) * 2, 4 * max(gflops) / gigabytes)
    for roof in gflops:
        axes.plot([low, roof / gigabytes, high], [low * gigabytes, roof, roof], color="black", linewidth=1)
        axes.annotate(f"{roof:.0f} GFLOP/s", (high, roof), ha="right", va="bottom", fontsize=7)
    axes.annotate(f"{gigabytes:.0f} GB/s", (low, low * gigabytes), ha="left", va="bottom", fontsize=7)
    marks = {"forward": "o", "forward+backward": "s", "forward+backward+cause": "^"}
    for direction, mark in marks.items():
        for name, color in (("float32", "#4C72B0"), ("bfloat16", "#DD8452")):
            chosen = [(x, row.gflops) for row, x in points if row.direction == direction and row.case.endswith(name)]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), mark, color=color, markersize=4, label=f"{direction}, {name}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful FLOPs per byte of inputs and outputs", fontsize=8)
    axes.set_ylabel("GFLOP/s", fontsize=8)
    axes.legend(frameon=False, fontsize=7)
    axes.set_title(where(facts), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return True
