"""Plots of a report: training curves, and the causes found in a text."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from empcause.data import Word
from empcause.errors import UserError
from empcause.text import visible

# Of a longer text the first lines are drawn, because a higher picture cannot be written.
_MOST_LINES = 100


def load_pyplot() -> Any:
    """Load matplotlib's `pyplot` for drawing into files. Call it before long work that ends with plots.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("Figures need matplotlib: pip install 'empcause[evaluation]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_training(model_dir: Path, watched: str, path: Path) -> Path | None:
    """Plot the loss and the watched validation figure over the steps of a training.

    Args:
        model_dir: folder of a trained model, with its `trainer_state.json`.
        watched: name of the validation figure.
        path: the PNG file that is written.

    Returns:
        `path`, or None if the folder has no training history, or a damaged one.
    """
    try:
        history = json.loads((model_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        loss = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        values = [(entry["step"], entry[f"eval_{watched}"]) for entry in history if f"eval_{watched}" in entry]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    pyplot = load_pyplot()
    figure, left = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    if loss:
        left.plot(*zip(*loss, strict=True), color="#4C72B0", label="training loss")
    left.set(xlabel="optimiser step", ylabel="training loss")
    lines = [*left.get_lines()]
    left.spines["top"].set_visible(False)
    if values:  # a system to compare with may have watched another figure
        right = left.twinx()
        lines += right.plot(*zip(*values, strict=True), color="#DD8452", marker="o", label=f"validation {watched}")
        right.set_ylabel(f"validation {watched.replace('_', ' ')}")
        right.spines["top"].set_visible(False)
    left.legend(lines, [line.get_label() for line in lines], loc="best", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def plot_causes(text: str, words: Sequence[Word], probs: Sequence[float], title: str, path: Path) -> Path:
    """Draw a text whose words are shaded by their cause probability.

    Args:
        text: the raw text.
        words: its words.
        probs: `[W]` cause probabilities of the words.
        title: the title above the text.
        path: the PNG file that is written; of a very long text it shows the beginning.

    Returns:
        `path`.
    """
    pyplot = load_pyplot()
    columns, line_height = 72, 0.42
    lines: list[list[tuple[int, str, float]]] = [[]]
    column = 0
    for index, (place, probability) in enumerate(zip(words, probs, strict=True)):
        shown = visible(place.text)
        space = 1 if index and words[index - 1].end < place.start else 0
        if column + space + len(shown) > columns:
            lines.append([])
            column, space = 0, 0
        lines[-1].append((column + space, shown, float(probability)))
        column += space + len(shown)
    lines = lines[:_MOST_LINES]
    height = line_height * len(lines) + 1.0
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    axes.set(xlim=(0, columns), ylim=(len(lines), -0.3))
    axes.set_title(title, parse_math=False)
    axes.axis("off")
    shades = pyplot.get_cmap("YlOrRd")
    for row, line in enumerate(lines):
        for start, word, probability in line:
            shade = shades(0.85 * min(1.0, max(0.0, probability)))
            axes.barh(row + 0.5, len(word), left=start, height=0.8, color=shade, zorder=0)
            dark = np.dot(shade[:3], (0.3, 0.59, 0.11)) < 0.45
            axes.text(
                start + len(word) / 2,
                row + 0.5,
                word,
                parse_math=False,
                family="monospace",
                fontsize=9,
                ha="center",
                va="center",
                color="white" if dark else "black",
            )
    mappable = pyplot.cm.ScalarMappable(norm=pyplot.Normalize(0, 1 / 0.85), cmap=shades)
    bar = figure.colorbar(mappable, ax=axes, orientation="horizontal", fraction=0.08, aspect=50, pad=0.02)
    bar.set_label("cause probability")
    bar.ax.set_xlim(0, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the font draws a box for an emoji
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
