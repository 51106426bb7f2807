"""`empcause evaluate extractor`: Tables 5 and 6."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from empcause.data import EMOTIONS, CauseAnnotation, emotion_id, load_annotations
from empcause.data.origin import Origin, origin
from empcause.evaluation.items import digest, evaluating_in, extractions, model_digest
from empcause.evaluation.metrics import RECALL_CUTS, RECALL_KINDS, emotion_correct, score_causes
from empcause.evaluation.plots import load_pyplot, plot_causes, plot_training
from empcause.evaluation.report import read_items
from empcause.evaluation.significance import Interval, difference_interval, mean_interval
from empcause.evaluation.tables import (
    EXTRACTOR_COLUMNS,
    PUBLISHED_EXTRACTORS,
    comparison_table,
    format_figure,
    markdown_table,
)
from empcause.extractor import Extraction, load_extractor
from empcause.files import write_text
from empcause.ranges import COUNT, check_values
from empcause.text import code


@dataclass
class EvaluateExtractorOptions:
    """Options of `empcause evaluate extractor`."""

    model: str = field(default="runs/extractor", metadata={"help": "folder of the extractor"})
    compare: str | None = field(
        default=None, metadata={"help": "folder of an earlier evaluation; differences get paired intervals"}
    )
    data: str | None = field(
        default=None, metadata={"help": "folder or archive of the data, or `sample`; default $EMPCAUSE_DATA_DIR"}
    )
    split: str = field(default="test", metadata={"help": "split of EmoCause", "choices": ["valid", "test"]})
    output_dir: str = field(default="runs/evaluation/extractor", metadata={"help": "where report and figures go"})
    batch_size: int = field(default=64, metadata={"help": "texts per batch"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what another evaluation left in output_dir"}
    )

    def __post_init__(self) -> None:
        check_values(self, {"batch_size": COUNT})


def evaluate_extractor(options: EvaluateExtractorOptions) -> dict[str, Any]:
    """Measure an extractor on EmoCause and write `metrics.json`, `items.json`, `report.md` and figures.

    What is found in a text is saved as it comes; an evaluation that was cut short goes on from there when it is repeated.

    Returns:
        Every figure by name, and `intervals`: name to (low, high).

    Raises:
        UserError: missing data or model; or `output_dir` holds another evaluation.
        Interrupted: Ctrl-C or SIGTERM.
    """
    load_pyplot()
    annotations = load_annotations(options.split, options.data)
    scored = digest([asdict(annotation) for annotation in annotations])
    names = ["accuracy", *(f"{kind}top{k}_recall" for k in RECALL_CUTS for kind in RECALL_KINDS)]
    earlier = read_items(options.compare, scored, names)
    model, tokenizer = load_extractor(options.model)
    texts = [annotation.situation for annotation in annotations]
    subject = {
        "model": model_digest(options.model),
        "data": scored,
        "batch_size": options.batch_size,
    }
    folder = Path(options.output_dir)
    with evaluating_in(folder, "empcause evaluate extractor", subject, options.overwrite_output_dir) as saved:
        words = [annotation.words for annotation in annotations]
        found = extractions(saved, model, tokenizer, texts, words, options.batch_size)
        return _judge(options, annotations, found, scored, earlier)


def _judge(
    options: EvaluateExtractorOptions,
    annotations: Sequence[CauseAnnotation],
    found: Sequence[Extraction],
    scored: str,
    earlier: dict[str, list[float]] | None,
) -> dict[str, Any]:
    """The figures of what was found, and all files."""
    items = {
        "accuracy": emotion_correct(
            [extraction.emotion_probs for extraction in found], [emotion_id(each.emotion) for each in annotations]
        ),
        **score_causes(annotations, [extraction.word_probs for extraction in found]).items,
    }
    intervals = {name: mean_interval(values) for name, values in items.items()}
    metrics: dict[str, Any] = {name: interval.value for name, interval in intervals.items()}
    metrics |= {"situations": len(annotations), "intervals": {name: each[1:] for name, each in intervals.items()}}
    differences = {}
    if earlier is not None:
        differences = {name: difference_interval(items[name], earlier[name]) for name in items}
        metrics["difference"] = {name: list(each) for name, each in differences.items()}

    folder = Path(options.output_dir)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    saved = {"scored": scored} | {name: values.tolist() for name, values in items.items()}
    write_text(folder / "items.json", json.dumps(saved))
    curves = plot_training(Path(options.model), "top5_recall", folder / "training.png")
    example = found[0]
    emotion = EMOTIONS[int(np.argmax(example.emotion_probs))]
    title = f"{emotion} ({example.emotion_probs.max():.0%}); annotated: {annotations[0].emotion}"
    plot_causes(example.text, example.words, example.word_probs.tolist(), title, folder / "causes.png")
    data = origin(options.data, annotations)
    report = _report(options, data, len(annotations), intervals, differences, curves is not None)
    write_text(folder / "report.md", report)
    return metrics


def _report(
    options: EvaluateExtractorOptions,
    data: Origin,
    situations: int,
    intervals: dict[str, Interval],
    differences: dict[str, Interval],
    has_curves: bool,
) -> str:
    kinds = {"lenient (the benchmark's)": "", "strict": "strict_", "without stop-word filter": "unfiltered_"}
    kinds |= {"oracle ceiling": "oracle_"}
    rows = [
        [name, *(format_figure(intervals[f"{prefix}top{k}_recall"]) for k in RECALL_CUTS)]
        for name, prefix in kinds.items()
    ]
    published = data.published and options.split == "test"
    parts = [
        "# Emotion cause extractor",
        f"{code(options.model)} on {situations:,} situations of {data.name} (split {options.split}); 95% bootstrap intervals "
        "over situations.",
        comparison_table("this model", intervals, PUBLISHED_EXTRACTORS if published else {}, EXTRACTOR_COLUMNS),
        "" if published else "The paper's figures are not shown beside these: they are of EmoCause's test split.",
        "Recall by variant:",
        markdown_table(["variant", *(f"Top-{k}" for k in RECALL_CUTS)], rows),
    ]
    if differences and options.compare:
        shown = [[name, format_figure(differences[name])] for name in EXTRACTOR_COLUMNS]
        parts += [f"Difference to {code(options.compare)}, paired:", markdown_table(["figure", "difference"], shown)]
    parts.append("![A situation with its cause words shaded](causes.png)")
    if has_curves:
        parts.append("![Training curves](training.png)")
    return "\n\n".join(filter(None, parts)) + "\n"
