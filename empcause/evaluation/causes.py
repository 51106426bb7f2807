"""`empcause evaluate extractor`: what a system finds in annotated situations (Tables 5 and 6 of the paper)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from empcause.data import CauseAnnotation, emotion_id, load_annotations
from empcause.data.origin import Origin, origin
from empcause.errors import UserError
from empcause.evaluation.items import digest, evaluating_in, model_digests, readings, unknown_emotions
from empcause.evaluation.plots import load_pyplot, plot_causes, plot_training
from empcause.evaluation.report import read_items
from empcause.evaluation.significance import Interval, difference_interval, mean_interval
from empcause.evaluation.tables import (
    CAUSE_COLUMNS,
    NOT_PUBLISHED,
    PUBLISHED_CAUSES,
    comparison_table,
    format_figure,
    markdown_table,
)
from empcause.files import write_text
from empcause.metrics import RECALL_CUTS, RECALL_KINDS, emotion_correct, rank_words, score_causes
from empcause.ranges import COUNT, check_values
from empcause.systems import Reading, Reads, load_system
from empcause.text import code

# Draws of a random order of words, whose recalls are averaged.
_DRAWS = 5


@dataclass
class EvaluateCausesOptions:
    """Options of `empcause evaluate extractor`."""

    model: str = field(default="runs/extractor", metadata={"help": "folder of the system that is evaluated"})
    compare: str | None = field(
        default=None, metadata={"help": "folder of an earlier evaluation; differences get paired intervals"}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "folder or archive of the data, a corpus' name, or `sample`; default $EMPCAUSE_DATA_DIR"},
    )
    split: str = field(
        default="test", metadata={"help": "split of the annotated situations", "choices": ["valid", "test"]}
    )
    output_dir: str = field(
        default="runs/evaluation/extractor", metadata={"help": "folder for the report and the plots"}
    )
    batch_size: int = field(default=64, metadata={"help": "texts per batch"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what another evaluation left in output_dir"}
    )

    def __post_init__(self) -> None:
        check_values(self, {"batch_size": COUNT})


def evaluate_causes(options: EvaluateCausesOptions) -> dict[str, Any]:
    """Measure what a system finds in annotated situations, and write `metrics.json`, `items.json`, `report.md` and plots.

    What is found in a text is saved at once, so that an evaluation that was cut short continues from there when it is repeated.

    Args:
        options: the options.

    Returns:
        Every figure by name (accuracy and recalls in [0, 1], those of `chance_recalls` among them; `predicted_words` is the mean
        number of words that the system ranks), and `intervals`: (low, high) by name.

    Raises:
        UserError: data or model are missing, the model reads no texts or knows other emotions than the data, or `output_dir`
            is the model's folder or holds another evaluation.
        Interrupted: Ctrl-C or SIGTERM.
    """
    load_pyplot()
    annotations = load_annotations(options.split, options.data)
    scored = digest([asdict(annotation) for annotation in annotations])
    names = ["accuracy", *(f"{kind}top{k}_recall" for k in RECALL_CUTS for kind in RECALL_KINDS)]
    earlier = read_items(options.compare, scored, names)
    system = load_system(options.model)
    if not isinstance(system, Reads):
        raise UserError(f"{options.model} holds a system that finds neither emotions nor causes in texts.")
    data, emotions = origin(options.data, annotations), system.emotions
    if emotions and (problem := unknown_emotions(system, [each.emotion for each in annotations], data.name)):
        raise UserError(f"{problem}; evaluate it on data with its emotions, or train an extractor on these data.")
    emotion_ids = [emotion_id(each.emotion, emotions) for each in annotations] if emotions else []
    texts = [annotation.situation for annotation in annotations]
    words = [annotation.words for annotation in annotations]
    folder = Path(options.output_dir)
    subject = model_digests(system, folder) | {"data": scored, "batch_size": options.batch_size}
    with evaluating_in(folder, "empcause evaluate extractor", subject, options.overwrite_output_dir) as saved:
        found = readings(saved, system, texts, words, options.batch_size)
        items = _score(annotations, emotion_ids, found)
        intervals = {name: mean_interval(values) for name, values in items.items()}
        metrics: dict[str, Any] = {name: interval.value for name, interval in intervals.items()}
        metrics |= {"situations": len(annotations), "intervals": {name: each[1:] for name, each in intervals.items()}}
        differences = {}
        if earlier is not None:
            differences = {name: difference_interval(items[name], earlier[name]) for name in items if name in earlier}
            metrics["difference"] = {name: list(each) for name, each in differences.items()}
        write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        values = {"scored": scored} | {name: values.tolist() for name, values in items.items()}
        write_text(folder / "items.json", json.dumps(values))
        pictures = {
            "A situation with its cause words shaded": _plot_example(
                system, annotations[0], found[0], folder / "causes.png"
            ),
            "Training curves": plot_training(system.folders["model"], "top5_recall", folder / "training.png"),
        }
        report = _report(options, system, data, len(annotations), intervals, differences, pictures)
        write_text(folder / "report.md", report)
        return metrics


def _score(
    annotations: Sequence[CauseAnnotation], emotion_ids: Sequence[int], found: Sequence[Reading]
) -> dict[str, NDArray[np.float64]]:
    """Score what the system finds: `[n]` figures by name, one per situation."""
    items: dict[str, NDArray[np.float64]] = {}
    if emotion_probs := [each.emotion_probs for each in found if each.emotion_probs is not None]:
        items["accuracy"] = emotion_correct(emotion_probs, emotion_ids)
    if word_probs := [each.word_probs for each in found if each.word_probs is not None]:
        items |= score_causes(annotations, word_probs).items
        rankings = [
            rank_words([word.text for word in annotation.words], probs)
            for annotation, probs in zip(annotations, word_probs, strict=True)
        ]
        items["predicted_words"] = np.array([len(ranking) for ranking in rankings], np.float64)
        items |= chance_recalls(annotations)
    return items


def chance_recalls(annotations: Sequence[CauseAnnotation]) -> dict[str, NDArray[np.float64]]:
    """Lenient recall of two rankings of the content words that need no system, which a system has to surpass.

    Args:
        annotations: situations with their annotated words.

    Returns:
        `[n]` figures by name, one per situation: `random_topK_recall`, the mean of five random orders, and `first_topK_recall`,
        of the first words first.
    """
    lengths = [len(annotation.words) for annotation in annotations]
    draws = [np.random.default_rng(seed) for seed in range(_DRAWS)]
    rankings = {
        "random_": [[1 - draw.random(length) for length in lengths] for draw in draws],
        "first_": [[1 / np.arange(1, length + 1) for length in lengths]],
    }
    items = {}
    for prefix, orders in rankings.items():
        scored = [score_causes(annotations, order).items for order in orders]
        for name in (f"top{k}_recall" for k in RECALL_CUTS):
            items[f"{prefix}{name}"] = np.mean([each[name] for each in scored], axis=0)
    return items


def _plot_example(system: Reads, annotation: CauseAnnotation, found: Reading, path: Path) -> Path | None:
    """Draw a situation with the causes that were found in it; None for a system that finds no causes."""
    if found.word_probs is None:
        return None
    title = f"annotated: {annotation.emotion}"
    if found.emotion_probs is not None:
        emotion = system.emotions[int(np.argmax(found.emotion_probs))]
        title = f"{emotion} ({found.emotion_probs.max():.0%}); {title}"
    return plot_causes(annotation.situation, annotation.words, found.word_probs.tolist(), title, path)


def _report(
    options: EvaluateCausesOptions,
    system: Reads,
    data: Origin,
    situations: int,
    intervals: dict[str, Interval],
    differences: dict[str, Interval],
    pictures: dict[str, Path | None],
) -> str:
    published = PUBLISHED_CAUSES.get(data.name, {}) if options.split == "test" else {}
    measured = ", ".join(filter(None, (code(options.model), system.note)))
    parts = [
        "# Emotion cause extractor",
        f"{measured} on {situations:,} situations of {data.name} (split {options.split}); 95% bootstrap intervals "
        "over situations.",
        comparison_table("this model", intervals, published, CAUSE_COLUMNS),
        "" if published else NOT_PUBLISHED,
    ]
    if "top1_recall" in intervals:
        kinds = {"lenient (the benchmark's)": "", "strict": "strict_", "without stop-word filter": "unfiltered_"}
        kinds |= {"oracle ceiling": "oracle_", "random content words": "random_", "first content words": "first_"}
        rows = [
            [name, *(format_figure(intervals[f"{prefix}top{k}_recall"]) for k in RECALL_CUTS)]
            for name, prefix in kinds.items()
        ]
        parts += ["Recall by variant:", markdown_table(["variant", *(f"Top-{k}" for k in RECALL_CUTS)], rows)]
        parts += [
            f"The rows of content words need no system; the random one is the mean of {_DRAWS} draws. This system ranks "
            f"{format_figure(intervals['predicted_words'])} content words per situation."
        ]
    if differences and options.compare:
        shown = [[name, format_figure(differences[name])] for name in CAUSE_COLUMNS if name in differences]
        parts += [f"Difference to {code(options.compare)}, paired:", markdown_table(["figure", "difference"], shown)]
    parts += [f"![{caption}]({path.name})" for caption, path in pictures.items() if path is not None]
    return "\n\n".join(filter(None, parts)) + "\n"
