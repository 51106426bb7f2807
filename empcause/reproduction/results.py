"""The results of a table: `results.json` (ids, hashes and scores, no texts), and the table in Markdown and LaTeX."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from empcause.data import CauseAnnotation
from empcause.errors import UserError
from empcause.evaluation.causes import chance_recalls
from empcause.evaluation.items import digest
from empcause.evaluation.significance import Interval, holm
from empcause.evaluation.tables import markdown_table
from empcause.files import write_text
from empcause.metrics import RECALL_CUTS, score_causes
from empcause.reproduction.figures import Figure, Ratio, Variety, mean_of, read_figures, read_vocabulary
from empcause.reproduction.folder import versions
from empcause.reproduction.tables import (
    CEILING,
    FIRST_WORDS,
    LOWER_IS_BETTER,
    PREDICTED_WORDS,
    RANDOM_WORDS,
    SYSTEMS,
    TABLES,
    Table,
)
from empcause.text import code, markdown

SCHEMA = 1


def write_results(
    folder: Path,
    name: str,
    about: Mapping[str, Any],
    made: Mapping[str, Mapping[int, Sequence[Path]]],
    annotations: Sequence[CauseAnnotation],
) -> None:
    """Compute a table of what was evaluated, and write `results.json`, `table.md` and `table.tex`.

    Args:
        folder: where they are written.
        name: name of the table.
        about: what else stands in the results: which data, systems and options they are of.
        made: folders of evaluations, by row and seed; several are of several views of the same trained system.
        annotations: the annotated situations that were tested; none for a table of responses.
    """
    table = TABLES[name]
    figures: dict[str, dict[str, Figure]] = {}
    for key, row in table.rows.items():
        if row.system and key in made:
            found = read_figures(table.task, [folder for seed in sorted(made[key]) for folder in made[key][seed]])
            figures[key] = {column: found[column] for column in found.keys() - row.without}
        elif not row.system:
            figures[key] = rank_without_system(key, annotations)
    ids = [each.conv_id for each in annotations]
    if not ids and made:
        first = next(iter(next(iter(made.values())).values()))[0]
        ids = json.loads((first / "items.json").read_text(encoding="utf-8"))["ids"]
    compared = _compare(table, figures)
    rows = {}
    for key, columns in figures.items():
        shown = {column: columns[column] for column in table.columns if column in columns}
        replies = columns.get("distinct_1")
        by_seed = {seed: read_figures(table.task, paths) for seed, paths in sorted(made.get(key, {}).items())}
        rows[key] = {
            "title": table.rows[key].title,
            "seeds": list(by_seed),
            "views": len(table.rows[key].views) or 1,
            "replies": len(replies.without) if isinstance(replies, Variety) else 0,
            "vocabulary": read_vocabulary(next(iter(made[key].values()))[0]) if key in made else None,
            "figures": {column: list(figure.interval()) for column, figure in shown.items()},
            "by_seed": {
                column: [each[column].value for each in by_seed.values()] if len(by_seed) > 1 else []
                for column in shown
            },
            "differences": compared.get(key, {}),
            "items": {
                column: [round(value, 5) for value in figure.numerators.tolist()]
                for column, figure in shown.items()
                if isinstance(figure, Ratio)
            },
        }
    results = {"schema": SCHEMA, **about, "versions": versions(), "rows": rows, "ids": ids}
    write_text(folder / "results.json", _dump(results))
    write_text(folder / "table.md", _markdown(table, name, results))
    write_text(folder / "table.tex", _latex(table, results))


def _dump(results: Mapping[str, Any]) -> str:
    """JSON of results with their digest, one line per entry."""
    entries = dict(results) | {"sha256": digest(results)}
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items()) + "\n}\n"


def read_results(path: Path) -> dict[str, Any]:
    """Read a `results.json`.

    Raises:
        UserError: it is missing or damaged, was changed after it was written, or is of another version of its format.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        found = results.pop("sha256")
        table = results["table"]
    except FileNotFoundError as error:
        raise UserError(f"There are no results at {path}; `empcause reproduce` makes them.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no results.json of `empcause reproduce`, or it is damaged.") from error
    if found != digest(results):
        raise UserError(f"{path} was changed after it was written: its hash does not fit; make it anew.")
    if results.get("schema") != SCHEMA or table not in TABLES:
        raise UserError(f"{path} is of another version of empcause; make it anew.")
    return results


def rank_without_system(key: str, annotations: Sequence[CauseAnnotation]) -> dict[str, Figure]:
    """The recalls of a ranking that needs no system: random content words, the first ones, or the annotated words themselves."""
    if key == CEILING:
        items = score_causes(annotations, [np.ones(len(annotation.words)) for annotation in annotations]).items
    else:
        items = chance_recalls(annotations)
    prefix = {CEILING: "oracle_", RANDOM_WORDS: "random_", FIRST_WORDS: "first_"}[key]
    return {f"top{cut}_recall": mean_of(items[f"{prefix}top{cut}_recall"]) for cut in RECALL_CUTS}


def _compare(table: Table, figures: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, Any]]:
    """The paired difference of every system's figure to that of the best baseline, with Holm's correction over the table.

    The best baseline is chosen for each column among those whose figures can be compared with the row's.
    """
    baselines = [key for key in figures if _is_baseline(table, key)]
    found: list[tuple[str, str, str, Any]] = []
    for key in figures:
        if not table.rows[key].system:
            continue
        for column in table.columns:
            mine = figures[key].get(column)
            if mine is None or column == PREDICTED_WORDS or _is_bound(table, key, column):
                continue
            sign = 1 if column in LOWER_IS_BETTER else -1
            measured = [
                other for other in baselines if column in figures[other] and not _is_bound(table, other, column)
            ]
            theirs = {other: figures[other][column] for other in measured}
            fitting = [other for other, figure in theirs.items() if mine.fits(figure)]
            best = min(fitting, key=lambda other: sign * theirs[other].value, default=key)
            if best != key:
                found.append((key, column, best, mine.minus(theirs[best])))  # type: ignore[arg-type]
    adjusted = holm([difference.p for *_, difference in found])
    compared: dict[str, dict[str, Any]] = {}
    for (key, column, other, difference), p in zip(found, adjusted, strict=True):
        compared.setdefault(key, {})[column] = {
            "to": other,
            "difference": list(difference.interval),
            "p": difference.p,
            "p_holm": p,
        }
    return compared


def _is_baseline(table: Table, key: str) -> bool:
    """Whether a row is a system to compare with whose figures are not too good."""
    row = table.rows[key]
    return bool(row.system) and not row.ours and not row.selected_on_test


def _is_bound(table: Table, key: str, column: str) -> bool:
    """Whether a figure is a lower bound: a system with words of its own predicts an unknown word as such, without its bytes."""
    system = table.rows[key].system
    return bool(system) and column == "bits_per_byte" and SYSTEMS[system].own_words


def _cells(table: Table, results: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells, one list per line: what stands in it, the figures, and how the training ended."""
    lines: list[list[str]] = []
    for key, row in table.rows.items():
        printed = table.printed(row)
        if printed:
            shown = [f"{printed[column]:.3f}" if column in printed else "–" for column in table.columns]
            lines.append([f"{row.title}, paper", *shown, ""])
        measured = results["rows"].get(key)
        if measured is None:
            lines.append([f"{row.title}, here", *("–" for _ in table.columns), "not made yet"])
            continue
        seeds = len(measured["seeds"])
        figures = measured["figures"]
        over = [f"{number} {what}" for number, what in ((len(row.views), "orders"), (seeds, "seeds")) if number > 1]
        mean = f" (mean of {' and '.join(over)})" if over else ""
        here = f"{row.title}, here{mean}" if row.system else row.title
        shown = [_figure(table, key, column, measured) if column in figures else "–" for column in table.columns]
        lines.append([here, *shown, _ended(results["systems"].get(key))])
        if seeds > 1:
            spread = [measured["by_seed"].get(column, []) for column in table.columns]
            lines.append(
                [
                    "least and greatest of the seeds",
                    *(f"{min(e):.3f} to {max(e):.3f}" if e else "–" for e in spread),
                    "",
                ]
            )
        if differences := measured["differences"]:
            shown = [
                _difference(differences[column], table) if column in differences else "–" for column in table.columns
            ]
            lines.append(["minus the best baseline", *shown, ""])
    return lines


def _figure(table: Table, key: str, column: str, measured: Mapping[str, Any]) -> str:
    """A measured figure with its interval, and beside it what bounds or flatters it."""
    text = str(Interval(*measured["figures"][column]))
    if _is_bound(table, key, column):
        return f"at least {text}"
    if column == "perplexity" and (vocabulary := measured["vocabulary"]):
        return f"{text} (vocabulary of {vocabulary['size']:,}, {vocabulary['unknown_share']:.1%} unknown words)"
    return text


def _ended(system: Mapping[str, Any] | None) -> str:
    if system is None:
        return ""
    ended = [model["training"]["ended"] for model in system["models"].values()]
    return ", ".join(f"{each} ({ended.count(each)})" if len(ended) > 1 else each for each in dict.fromkeys(ended))


def _difference(each: Mapping[str, Any], table: Table) -> str:
    value, low, high = each["difference"]
    span = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
    p = "p < .001" if each["p_holm"] < 0.001 else f"p = {each['p_holm']:.3f}"
    return f"{value:+.3f}{span}, {p} ({table.rows[each['to']].title})"


def _header(table: Table) -> list[str]:
    return ["system", *(column.replace("_", " ") for column in table.columns), "training"]


def _markdown(table: Table, name: str, results: Mapping[str, Any]) -> str:
    cells = [[markdown(cell) for cell in line] for line in _cells(table, results)]
    items = "situations" if table.task == "extractor" else "responses"
    parts = [
        f"# Table {name.removeprefix('table')}: {table.title} (size {results['size']})",
        f"On {len(results['ids']):,} {items} of {results['data']['name']} (split test). Brackets are 95% intervals over "
        "them; they do not cover the choice of the seed. Differences are paired; their p-values are corrected by Holm's method "
        "over the table, and the best baseline of the column stands in parentheses.",
        markdown_table(_header(table), cells),
    ]
    if any(len(row.views) > 1 for row in table.rows.values()):
        parts.append(
            "The orders of a row are random orders of words by the same trained model; they are no seeds of a training."
        )
    if table.task == "generator":
        replies = results["evaluation"].get("max_generated")
        parts.append(
            f"At most {replies} replies per row, to the same contexts. Perplexities and bits per byte are of all responses. "
            "Perplexities are compared between rows with the same tokens only; Distinct between rows with as many replies. A "
            "system with a vocabulary of words predicts all unknown words as one token, which flatters its perplexity and bounds "
            "its bits per byte; the size of the vocabulary and the share of unknown words among the scored tokens stand beside "
            "the perplexity."
        )
    parts.append(f"Made by {code(results['command'])}.")
    return "\n\n".join(parts) + "\n"


def _latex(table: Table, results: Mapping[str, Any]) -> str:
    lines = [" & ".join(map(_escape, line)) + r" \\" for line in (_header(table), *_cells(table, results))]
    body = "\n".join([lines[0], r"\hline", *lines[1:]])
    return f"\\begin{{tabular}}{{l{'r' * len(table.columns)}l}}\n\\hline\n{body}\n\\hline\n\\end{{tabular}}\n"


def _escape(text: str) -> str:
    """Text for LaTeX."""
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "<": "$<$"}
    return "".join(named.get(each, f"\\{each}" if each in "&%$#_{}" else each) for each in text)
