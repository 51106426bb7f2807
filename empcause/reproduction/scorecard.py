"""`empcause reproduce scorecard`: every printed number of the tables beside the measured one, with a verdict."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from empcause.data import EMPATHETIC_DIALOGUES
from empcause.data.emocause import EMOCAUSE
from empcause.errors import UserError
from empcause.evaluation.significance import Interval
from empcause.evaluation.tables import markdown_table
from empcause.files import write_text
from empcause.reproduction.results import read_results
from empcause.reproduction.tables import (
    LOWER_IS_BETTER,
    REPLIES,
    SYSTEMS,
    TABLES,
    Table,
    effective_options,
    training_of,
)
from empcause.text import markdown


class Reason(StrEnum):
    """Why a measured figure cannot be compared with a printed one; there are no other reasons."""

    DATA = "other data"
    PRETRAINED = "other pretrained model"
    BUDGET = "smaller budget"
    VOCABULARY = "other vocabulary"
    LEXICON = "other lexicon"
    BERTSCORE = "other BERTScore model"
    REPLIES = "other number of replies"


@dataclass(frozen=True)
class Verdict:
    """A printed number beside the measured one.

    Attributes:
        table, row, column: where it stands.
        printed: the printed number.
        measured: the measured figure with its interval; None if it was not measured.
        verdict: "reproduced", "better", "worse", "not comparable" or "not measured".
        reasons: why it is not comparable.
    """

    table: str
    row: str
    column: str
    printed: float
    measured: Interval | None
    verdict: str
    reasons: tuple[Reason, ...] = ()


def judge(column: str, printed: float, measured: Interval) -> str:
    """Say whether the printed number lies in the interval of the measured one, which otherwise is better or worse than it."""
    low = measured.value if measured.low is None else measured.low
    high = measured.value if measured.high is None else measured.high
    if low <= printed <= high:
        return "reproduced"
    return "better" if (measured.value < printed) == (column in LOWER_IS_BETTER) else "worse"


def why_not_comparable(table: Table, key: str, column: str, results: Mapping[str, Any]) -> Iterator[Reason]:
    """The reasons for which a measured figure cannot be compared with the printed one."""
    published = EMOCAUSE.title if table.task == "extractor" else EMPATHETIC_DIALOGUES.title
    if results["data"]["name"] != published:
        yield Reason.DATA
    # The emotion accuracy of a generator is its extractor's.
    system = table.rows[key].system
    judged = (SYSTEMS[system].extractor or system) if column == "emotion_accuracy" else system
    own = SYSTEMS[judged]
    start = effective_options(training_of(judged, results["size"])).get("model_name_or_path")
    if start != effective_options(own.full).get("model_name_or_path"):
        yield Reason.PRETRAINED
    ended = [model["training"]["ended"] for model in results["systems"][key]["models"].values()]
    if training_of(system, results["size"]) != SYSTEMS[system].full and "stopped by budget" in ended:
        yield Reason.BUDGET
    if own.own_words and column == "perplexity":
        yield Reason.VOCABULARY
    if own.lexicon and column.endswith("_recall"):
        yield Reason.LEXICON
    if column.startswith("bertscore") and results["evaluation"].get("bertscore_model") != "roberta-large":
        yield Reason.BERTSCORE
    if column.startswith("distinct") and results["rows"][key]["replies"] != REPLIES:
        yield Reason.REPLIES


def score(results: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Judge every printed number of all tables.

    Args:
        results: the content of `results.json`, by table; of tables that are missing, nothing was measured.
    """
    verdicts = []
    for name, table in TABLES.items():
        for key, row in table.rows.items():
            for column, printed in table.printed(row).items():
                figures = results.get(name, {"rows": {}})["rows"].get(key, {"figures": {}})["figures"]
                if column not in figures:
                    verdicts.append(Verdict(name, row.title, column, printed, None, "not measured"))
                    continue
                measured = Interval(*figures[column])
                reasons = tuple(why_not_comparable(table, key, column, results[name]))
                verdict = "not comparable" if reasons else judge(column, printed, measured)
                verdicts.append(Verdict(name, row.title, column, printed, measured, verdict, reasons))
    return verdicts


def write_scorecard(output_dir: Path, size: str) -> Path:
    """Write `scorecard/scorecard.md` and `scorecard.json` of the tables that are there.

    Args:
        output_dir: the folder that `empcause reproduce` wrote into.
        size: name of the size.

    Returns:
        Path of the Markdown file.

    Raises:
        UserError: there is no table, or a `results.json` is not as it was written.
    """
    found = {name: output_dir / size / name / "results.json" for name in TABLES}
    results = {name: read_results(path) for name, path in found.items() if path.exists()}
    if not results:
        raise UserError(
            f"There is no table in {output_dir / size}; `empcause reproduce table5 --size {size}` makes one."
        )
    verdicts = score(results)
    folder = output_dir / size / "scorecard"
    folder.mkdir(exist_ok=True)
    listed = [asdict(each) for each in verdicts]
    made_of = {name: each["versions"] for name, each in results.items()}
    write_text(
        folder / "scorecard.json", json.dumps({"size": size, "versions": made_of, "verdicts": listed}, indent=1) + "\n"
    )
    write_text(folder / "scorecard.md", _markdown(verdicts, size))
    return folder / "scorecard.md"


def _markdown(verdicts: list[Verdict], size: str) -> str:
    rows = []
    for each in verdicts:
        difference = "–" if each.measured is None else f"{each.measured.value - each.printed:+.3f}"
        direction = "" if each.measured is None else judge(each.column, each.printed, each.measured)
        verdict = each.verdict
        if each.reasons:
            verdict += f" ({', '.join(each.reasons)}); the figure alone: {direction}"
        cells = [each.row, each.column.replace("_", " "), f"{each.printed:.3f}", str(each.measured or "–")]
        rows.append([each.table.removeprefix("table"), *map(markdown, [*cells, difference, verdict])])
    counts = Counter(each.verdict for each in verdicts)
    parts = [
        f"# Scorecard of the printed numbers (size {size})",
        f"{len(verdicts)} numbers: " + ", ".join(f"{number} {verdict}" for verdict, number in counts.items()) + ".",
        "A number is reproduced if the printed figure lies in the 95% interval of the measured one; otherwise the measured one "
        "is better or worse. It is not comparable for these reasons alone: " + ", ".join(Reason) + ".",
        markdown_table(["table", "system", "figure", "printed", "measured", "difference", "verdict"], rows),
    ]
    return "\n\n".join(parts) + "\n"
