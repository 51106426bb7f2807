"""Markdown tables of measured figures beside published ones."""

from collections.abc import Mapping, Sequence

from empcause.evaluation.significance import Interval

# Published figures of systems, by the title of the data set on whose whole test split they were measured.
# Table 5 (systems) and Table 6 (ablation) of the paper: accuracy, Top-1, Top-3, Top-5 recall.
_EMOCAUSE: dict[str, tuple[float | None, ...]] = {
    "EmpDG (paper)": (0.31, 0.134, 0.362, 0.493),
    "RoBERTa_Att (paper)": (0.58, 0.148, 0.399, 0.596),
    "GEE (paper)": (0.40, 0.173, 0.481, 0.684),
    "ECE, RoBERTa-base (paper)": (0.58, 0.227, 0.565, 0.727),
    "ECE, unsupervised (paper)": (0.56, 0.147, 0.410, 0.607),
    "ECE, supervised (paper)": (0.56, 0.246, 0.514, 0.556),
    "ECE, without L_aux (paper)": (0.58, 0.208, 0.523, 0.709),
}
PUBLISHED_CAUSES = {"EmoCause": _EMOCAUSE}
CAUSE_COLUMNS = ("accuracy", "top1_recall", "top3_recall", "top5_recall")

# Table 7: perplexity, Distinct-1, Distinct-2, BERTScore P, R, F.
_EMPATHETIC_DIALOGUES: dict[str, tuple[float | None, ...]] = {
    "EmpDG (paper)": (34.311, 0.018, 0.069, 0.252, 0.213, 0.232),
    "RecEC (paper)": (177.825, 0.019, 0.090, 0.225, 0.177, 0.201),
    "GPT2 (paper)": (14.132, 0.027, 0.112, 0.304, 0.238, 0.271),
    "ECG (paper)": (14.063, 0.025, 0.109, 0.307, 0.240, 0.273),
}
PUBLISHED_RESPONSES = {"EmpatheticDialogues": _EMPATHETIC_DIALOGUES}
# The last column of Table 7: accuracy of the emotion that is found in the dialogue.
PUBLISHED_EMOTION_ACCURACY: dict[str, float | None] = {
    "EmpDG (paper)": 0.314,
    "RecEC (paper)": 0.412,
    "GPT2 (paper)": None,
    "ECG (paper)": 0.598,
}
RESPONSE_COLUMNS = ("perplexity", "distinct_1", "distinct_2", "bertscore_p", "bertscore_r", "bertscore_f")


# What a report says in place of published figures.
NOT_PUBLISHED = "No published figures stand beside these: none are known that were measured on the same texts."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a Markdown table whose first column is text and whose others are figures."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def format_figure(value: float | Interval | None) -> str:
    """Format a figure with three decimals, with its interval if it has one; None, which was not measured, is a dash."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, Interval) else f"{value:.3f}"


def comparison_table(
    name: str,
    figures: Mapping[str, float | Interval | None],
    published: Mapping[str, Sequence[float | None]],
    columns: Sequence[str],
) -> str:
    """Make a table with the measured figures in the first row and the published ones below it.

    Args:
        name: what the measured row is called.
        figures: the measured figures, by column; a missing one is a dash.
        published: rows of figures that were measured on the same data, by system.
        columns: names of the figures, in the order of `published`.
    """
    rows = [[f"**{name}**", *(format_figure(figures.get(column)) for column in columns)]]
    rows += [[system, *map(format_figure, values)] for system, values in published.items()]
    return markdown_table(["system", *(column.replace("_", " ") for column in columns)], rows)
