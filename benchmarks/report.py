"""Ratios of one benchmark run, as CSV and a plot.

pytest benchmarks --benchmark-only --benchmark-json=run.json
python benchmarks/report.py run.json benchmarks/results/cpu
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

OURS = "empcause"


def main(source: Path, target: Path) -> None:
    """Write `target.csv` and `target.png` from pytest-benchmark's JSON.

    A ratio is a peer's median time / ours for the same case in the same run: above 1 we are faster.
    """
    run = json.loads(source.read_text())
    medians: dict[tuple[str, str, str], dict[str, float]] = {}
    for benchmark in run["benchmarks"]:
        peer, direction, shape, dtype = benchmark["name"].removeprefix("test_attention[").removesuffix("]").split("|")
        medians.setdefault((direction, shape, dtype), {})[peer] = benchmark["stats"]["median"] * 1e3
    peers = sorted({peer for times in medians.values() for peer in times} - {OURS})
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["direction", "shape", "dtype", "empcause ms", *(f"{p} ms" for p in peers), *(f"{p} ratio" for p in peers)]
        )
        for case, times in medians.items():
            figures = [times[OURS], *(times[peer] for peer in peers), *(times[peer] / times[OURS] for peer in peers)]
            writer.writerow([*case, *(f"{figure:.3f}" for figure in figures)])
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(medians) + 1.2), layout="constrained")
    place = np.arange(len(medians))
    for index, (peer, color) in enumerate(zip(peers, ("#DD8452", "#4C72B0"), strict=False)):
        ratios = [times[peer] / times[OURS] for times in medians.values()]
        axes.barh(place + 0.38 * (index - 0.5), ratios, height=0.36, color=color, label=f"{peer} / empcause")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(place, [f"{shape}, {dtype}, {direction}" for direction, shape, dtype in medians], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the peer / time of empcause, same run")
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
