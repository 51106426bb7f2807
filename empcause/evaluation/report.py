"""One report over both stages."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from empcause.errors import UserError
from empcause.evaluation.tables import markdown_table
from empcause.files import write_text


def read_items(folder: str | None, scored: str, names: Iterable[str]) -> dict[str, list[float]] | None:
    """Read the figures per test item that an earlier evaluation left, for a paired difference.

    Args:
        folder: output folder of the earlier evaluation; None if there is nothing to compare with.
        scored: digest of what this evaluation scores; the earlier one must have scored the same.
        names: names of the figures that are compared.

    Returns:
        `[n]` values by name, for those of the figures that are there; None without a folder.

    Raises:
        UserError: none of the figures is there, or they belong to other items.
    """
    if folder is None:
        return None
    try:
        items = json.loads((Path(folder) / "items.json").read_text(encoding="utf-8"))
        if items["scored"] != scored:
            raise UserError(
                f"--compare {folder}: that evaluation scored other items (another stage, split, subset, seed, tokenizer or other "
                "data), so that no difference is paired; repeat it on the same ones."
            )
        found = {name: items[name] for name in names if name in items}
        if not found:
            raise KeyError("none of the figures")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--compare {folder}: no readable items.json of an earlier evaluation there.") from error


def write_report(
    folder: Path, extractor_metrics: Mapping[str, Any], generator_metrics: Mapping[str, Any], note: str = ""
) -> Path:
    """Write `report.md` and `metrics.json`, which sum up the evaluations in `folder/evaluation/{extractor,generator}`.

    Args:
        folder: the folder with the evaluations of both stages, in which the report is written.
        extractor_metrics, generator_metrics: what `evaluate_causes` and `evaluate_responses` returned.
        note: a sentence above the figures.

    Returns:
        Path of the Markdown report.
    """
    stages = {"extractor": extractor_metrics, "generator": generator_metrics}
    write_text(folder / "metrics.json", json.dumps(stages, indent=2) + "\n")
    parts = ["# empcause: report", note] if note else ["# empcause: report"]
    for stage, metrics in stages.items():
        rows = [
            [name.replace("_", " "), f"{value:.4g}"]
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        source = f"evaluation/{stage}"
        parts += [f"## {stage.capitalize()}", f"More, with intervals: [{source}/report.md]({source}/report.md)"]
        parts.append(markdown_table(["figure", "value"], rows))
        parts += [
            f"![{caption}]({source}/{name}.png)"
            for name, caption in (("training", "Training curves"), ("causes", "Cause words of a text"))
            if (folder / source / f"{name}.png").exists()
        ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path
