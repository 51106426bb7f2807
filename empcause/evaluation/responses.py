"""`empcause evaluate generator`: how a system scores and answers dialogues (Table 7 of the paper)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from empcause.data import Dialogue, emotion_id, load_dialogues, response_pairs, split_words
from empcause.data.origin import Origin, origin
from empcause.errors import UserError
from empcause.evaluation.items import SavedItems, digest, evaluating_in, model_digests, readings, unknown_emotions
from empcause.evaluation.plots import load_pyplot, plot_causes, plot_training
from empcause.evaluation.report import read_items
from empcause.evaluation.significance import Interval, mean_interval, perplexity_difference, perplexity_interval
from empcause.evaluation.tables import (
    NOT_PUBLISHED,
    PUBLISHED_RESPONSES,
    RESPONSE_COLUMNS,
    comparison_table,
    format_figure,
    markdown_table,
)
from empcause.files import write_text
from empcause.metrics import (
    BertScore,
    bits_per_byte,
    distinct_n,
    emotion_correct,
    nll_per_word,
    perplexity,
)
from empcause.ranges import COUNT, SEED, check_values
from empcause.systems import Answers, Encoded, Reading, Reads, Scores, ScoresWords, System, load_system
from empcause.text import code, markdown

logger = logging.get_logger(__name__)


@dataclass
class EvaluateResponsesOptions:
    """Options of `empcause evaluate generator`."""

    model: str = field(default="runs/generator", metadata={"help": "folder of the system that is evaluated"})
    extractor: str = field(
        default="runs/extractor", metadata={"help": "folder of the extractor, for systems that need one"}
    )
    compare: str | None = field(
        default=None, metadata={"help": "folder of an earlier evaluation; the difference gets a paired interval"}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "folder or archive of the data, a corpus' name, or `sample`; default $EMPCAUSE_DATA_DIR"},
    )
    split: str = field(default="test", metadata={"help": "split of the dialogues", "choices": ["valid", "test"]})
    output_dir: str = field(
        default="runs/evaluation/generator", metadata={"help": "folder for the report and the plots"}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "score this many responses, drawn by the seed; default: all"}
    )
    max_generated: int | None = field(
        default=None,
        metadata={"help": "generate an answer in place of this many of them; default: all that are scored"},
    )
    max_new_tokens: int = field(default=40, metadata={"help": "longest generated response in tokens"})
    bertscore_model: str | None = field(
        default=None, metadata={"help": "encoder for BERTScore, by name or folder; default: no BERTScore"}
    )
    bertscore_layer: int | None = field(
        default=None, metadata={"help": "layer of bertscore_model; default: the one that bert-score recommends"}
    )
    batch_size: int = field(default=16, metadata={"help": "dialogues per batch"})
    seed: int = field(default=0, metadata={"help": "seed of the random choice of max_samples responses"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what another evaluation left in output_dir"}
    )

    def __post_init__(self) -> None:
        names = ("max_samples", "max_generated", "max_new_tokens", "bertscore_layer", "batch_size")
        check_values(self, dict.fromkeys(names, COUNT) | {"seed": SEED})
        if self.bertscore_layer is not None and not self.bertscore_model:
            raise UserError("bertscore_layer is a layer of bertscore_model; give that too.")


def evaluate_responses(options: EvaluateResponsesOptions) -> dict[str, Any]:
    """Measure how a system scores and answers dialogues.

    Writes `metrics.json`, `items.json`, `responses.json`, `report.md` and plots. Results per item are saved at once, so that an
    evaluation that was cut short continues from there when it is repeated.

    Args:
        options: the options.

    Returns:
        Every figure by name (`nll_per_word` in nats, accuracy, Distinct and `unknown_share` in [0, 1]), and `intervals`: (low,
        high) by name. The emotion accuracy is missing if the system finds no emotions or knows others than the data, and
        `vocab_size` and `unknown_share` if it scores no words of a vocabulary (`ScoresWords`).

    Raises:
        UserError: data, model or a library are missing, the model neither scores nor answers, or `output_dir` is the model's
            folder or holds another evaluation.
        Interrupted: Ctrl-C or SIGTERM.
    """
    load_pyplot()
    bertscore = BertScore(options.bertscore_model, options.bertscore_layer) if options.bertscore_model else None
    dialogues = load_dialogues(options.split, options.data)
    data, everything = origin(options.data, dialogues), response_pairs(dialogues)
    if not everything:
        raise UserError(f"No turn is answered in the split {options.split} of {data.name}; give other --data.")
    pairs = everything
    if options.max_samples is not None:
        chosen = np.random.default_rng(options.seed).permutation(len(pairs))[: options.max_samples]
        pairs = [pairs[index] for index in chosen]
    system = load_system(options.model, options.extractor)
    if not isinstance(system, Scores | Answers):
        raise UserError(f"{options.model} holds a system that neither scores nor answers dialogues.")
    if isinstance(system, Answers):
        system.check_room(options.max_new_tokens)
    emotion_ids: list[int] = []
    no_accuracy = None
    if isinstance(system, Reads) and system.emotions:
        no_accuracy = unknown_emotions(system, [pair.emotion for pair in pairs], data.name)
        if no_accuracy is None:
            emotion_ids = [emotion_id(pair.emotion, system.emotions) for pair in pairs]
        else:
            no_accuracy += "; the emotion accuracy needs an extractor that was trained on these data."
            logger.warning(no_accuracy)
    identities = [_identity(pair) for pair in pairs]
    if options.compare and not isinstance(system, Scores):
        raise UserError(f"{options.model} scores no responses, and scores are what --compare compares.")
    if options.bertscore_model and not isinstance(system, Answers):
        raise UserError(f"{options.model} answers no dialogues, and answers are what --bertscore_model compares.")
    targets = system.targets(pairs) if isinstance(system, Scores) else []
    scored = digest(identities, targets)
    earlier = read_items(options.compare, scored, ["nll"])
    number = len(pairs) if options.max_generated is None else min(options.max_generated, len(pairs))
    folder = Path(options.output_dir)
    subject = model_digests(system, folder) | {
        "data": digest(identities),
        "batch_size": options.batch_size,
        "max_generated": number,
        "max_new_tokens": options.max_new_tokens,
    }
    with evaluating_in(folder, "empcause evaluate generator", subject, options.overwrite_output_dir) as saved:
        predictions = _predict(system, pairs, number, options, bertscore, saved)
        if isinstance(system, ScoresWords):
            unknown = np.array([target.count(system.unknown_id) for target in targets])
            predictions = replace(predictions, unknown=unknown, vocab_size=system.vocab_size)
        results = _Results(data, len(everything), scored, system, predictions, emotion_ids, no_accuracy, bertscore)
        return _judge(options, results, earlier)


def _identity(pair: Dialogue) -> dict[str, Any]:
    """Everything that distinguishes a response pair from others, as values that JSON can hold."""
    return {
        "conv_id": pair.conv_id,
        "emotion": pair.emotion,
        "context": pair.turns,
        "roles": pair.roles,
        "response": pair.response,
    }


@dataclass(frozen=True)
class _Predictions:
    """Results of a system for response pairs, in their order; empty for what the system cannot do."""

    pairs: Sequence[Dialogue]
    found: Sequence[Reading] = ()
    encoded: Sequence[Encoded] = ()
    nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    unknown: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # unknown words of each response
    vocab_size: int | None = None
    responses: Sequence[str] = ()
    bertscores: dict[str, NDArray] = field(default_factory=dict)


def _predict(
    system: System,
    pairs: Sequence[Dialogue],
    number: int,
    options: EvaluateResponsesOptions,
    bertscore: BertScore | None,
    saved: SavedItems,
) -> _Predictions:
    """Let a system read, score and answer, as far as it can.

    Args:
        system: the system.
        pairs: dialogues with their responses.
        number: how many of the pairs, from the first one on, it answers.
        options: give the batch size and the length of answers.
        bertscore: compares the answers with the responses; None if this is not wanted.
        saved: where the results go, and where those of an earlier process are.
    """
    size = options.batch_size

    def score_batch(batch: list[int]) -> list[tuple[float, int]]:
        scores = score([encoded[index] for index in batch], size)
        if len(scores) != len(batch) or not all(np.isfinite(nll) and count > 0 for nll, count in scores):
            raise UserError(
                f"{options.model} gave the scores {scores!r:.100}; expected {len(batch)} pairs of a finite number and a count."
            )
        return scores

    found: Sequence[Reading] = ()
    if isinstance(system, Reads):
        found = readings(saved, system, pairs, [split_words(pair.text) for pair in pairs], 64)
        pairs = [replace(pair, causes=each.causes) for pair, each in zip(pairs, found, strict=True)]
    predictions = _Predictions(pairs, found)
    lengths = [len(pair.text) for pair in pairs]
    if isinstance(system, Scores):
        encoded, score = system.encode(pairs), system.score
        lengths = [len(each) for each in encoded]
        rows = saved.each("scoring", lengths, size, score_batch)
        nll, tokens = (np.array(column) for column in zip(*rows, strict=True))
        predictions = replace(predictions, encoded=encoded, nll=nll, tokens=tokens)
    if isinstance(system, Answers):
        answer, longest = system.answer, options.max_new_tokens
        responses = saved.each(
            "answering", lengths[:number], size, lambda batch: answer([pairs[index] for index in batch], size, longest)
        )
        predictions = replace(predictions, responses=responses)
        if bertscore is not None:
            compare = bertscore
            rows = saved.each(
                bertscore.setting,
                [len(response) for response in responses],
                size,
                lambda batch: compare(
                    [responses[index] for index in batch], [pairs[index].response for index in batch]
                ).tolist(),
            )
            bertscores = dict(zip(("bertscore_p", "bertscore_r", "bertscore_f"), np.array(rows).T, strict=True))
            predictions = replace(predictions, bertscores=bertscores)
    return predictions


@dataclass(frozen=True)
class _Results:
    """What an evaluation has found, and on which data."""

    data: Origin
    whole: int  # number of responses in the whole split
    scored: str
    system: System
    predictions: _Predictions
    emotion_ids: Sequence[int]  # empty where no emotion accuracy is measured
    no_accuracy: str | None  # the sentence that says why
    bertscore: BertScore | None


def _judge(
    options: EvaluateResponsesOptions, results: _Results, earlier: dict[str, list[float]] | None
) -> dict[str, Any]:
    """Compute the figures of what was found, scored and answered, and write all files."""
    predictions = results.predictions
    references = [pair.response for pair in predictions.pairs]
    metrics, intervals, correct = _score(predictions, results.emotion_ids)
    if predictions.bertscores and results.bertscore is not None:
        metrics["bertscore_model"] = results.bertscore.setting
    metrics["intervals"] = {name: each[1:] for name, each in intervals.items()}
    difference = None
    if earlier is not None and len(predictions.nll):
        difference = perplexity_difference(predictions.nll, earlier["nll"], predictions.tokens)
        metrics["perplexity_difference"] = list(difference)

    folder = Path(options.output_dir)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    items = {"nll": predictions.nll, "tokens": predictions.tokens, "unknown": predictions.unknown}
    items |= {"emotion_accuracy": correct} | predictions.bertscores
    values: dict[str, Any] = {"scored": results.scored} | {name: array.tolist() for name, array in items.items()}
    values["vocab_size"] = predictions.vocab_size
    values["ids"] = [f"{pair.conv_id}:{len(pair.turns)}" for pair in predictions.pairs]
    values["bytes"] = [] if metrics.get("bits_per_byte") is None else [len(ref.encode()) for ref in references]
    write_text(folder / "items.json", json.dumps(values))
    dialogues = [
        {"context": pair.turns, "emotion": pair.emotion, "reference": pair.response, "response": response}
        for pair, response in zip(predictions.pairs, predictions.responses, strict=False)
    ]
    write_text(folder / "responses.json", json.dumps(dialogues, indent=1, ensure_ascii=False) + "\n")
    curves = plot_training(results.system.folders["model"], "perplexity", folder / "training.png")
    example = None
    pair = predictions.pairs[0]
    if predictions.found and (word_probs := predictions.found[0].word_probs) is not None:
        title = f"annotated: {pair.emotion}"
        example = plot_causes(pair.text, split_words(pair.text), word_probs.tolist(), title, folder / "causes.png")
    pictures = {"A dialogue with its cause words shaded": example, "Training curves": curves}
    write_text(folder / "report.md", _report(options, results, metrics | intervals, difference, pictures))
    return metrics


def _score(
    predictions: _Predictions, emotion_ids: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Interval], NDArray[np.float64]]:
    """Compute the figures, and the intervals of those that have one, by name, and which emotions are right (`[n]` or `[0]`)."""
    nll, tokens, responses = predictions.nll, predictions.tokens, predictions.responses
    references = [pair.response for pair in predictions.pairs]
    metrics: dict[str, Any] = {}
    intervals: dict[str, Interval] = {}
    if len(nll):
        intervals["perplexity"] = perplexity_interval(nll, tokens)
        # If a response is scored only in part, the words and bytes of that part are not known.
        in_part = any(each.cut_response for each in predictions.encoded)
        metrics |= {
            "perplexity": perplexity(nll, tokens),
            "nll_per_word": None if in_part else nll_per_word(nll, references),
            "bits_per_byte": None if in_part else bits_per_byte(nll, references),
        }
    if predictions.vocab_size is not None:
        metrics["vocab_size"] = predictions.vocab_size
        metrics["unknown_share"] = float(predictions.unknown.sum() / tokens.sum())
    emotion_probs = [each.emotion_probs for each in predictions.found if each.emotion_probs is not None]
    correct = np.zeros(0)
    if emotion_probs and emotion_ids:
        correct = emotion_correct(emotion_probs, emotion_ids)
        intervals["emotion_accuracy"] = mean_interval(correct)
        metrics["emotion_accuracy"] = float(correct.mean())
    if responses:
        metrics |= {
            "distinct_1": distinct_n(responses, 1),
            "distinct_2": distinct_n(responses, 2),
            "words_per_response": float(np.mean([len(split_words(response)) for response in responses])),
        }
    metrics |= {"scored_responses": len(references), "generated_responses": len(responses)}
    for name, values in predictions.bertscores.items():
        intervals[name] = mean_interval(values)
        metrics[name] = intervals[name].value
    return metrics, intervals, correct


def _report(
    options: EvaluateResponsesOptions,
    results: _Results,
    figures: dict[str, Any],
    difference: Interval | None,
    pictures: dict[str, Path | None],
) -> str:
    predictions = results.predictions
    pairs, responses = predictions.pairs, predictions.responses
    others = ("nll_per_word", "bits_per_byte", "emotion_accuracy", "words_per_response")
    published: dict[str, Sequence[float | None]] = {}
    if options.split == "test" and len(responses) == results.whole:
        same_scale = results.bertscore is not None and results.bertscore.rescaled
        published = {
            name: (*values[:3], *(values[3:] if same_scale else (None, None, None)))
            for name, values in PUBLISHED_RESPONSES.get(results.data.name, {}).items()
        }
    measured = ", ".join(filter(None, (code(options.model), results.system.note)))
    decoding = getattr(results.system, "decoding", "greedily")
    shortened = sum(each.dropped_turns > 0 for each in predictions.encoded)
    cut = sum(each.cut_response for each in predictions.encoded)
    parts = [
        "# Empathetic conversation generator",
        f"{measured}, on {len(pairs):,} of {results.whole:,} responses of "
        f"{results.data.name} (split {options.split}), "
        f"{len(responses):,} generated {decoding}; 95% bootstrap intervals over responses. Perplexities of "
        "different tokenizers do not compare; bits per byte do.",
        comparison_table("this model", figures, published, RESPONSE_COLUMNS),
        "" if published else NOT_PUBLISHED,
        markdown_table(
            ["figure", "value"], [[name.replace("_", " "), format_figure(figures.get(name))] for name in others]
        ),
    ]
    if "vocab_size" in figures:
        parts.append(
            f"The vocabulary has {figures['vocab_size']:,} tokens, and {figures['unknown_share']:.1%} of the scored tokens are "
            "unknown words, all of which are predicted as one token: that flatters perplexity and bits per byte."
        )
    if results.no_accuracy:
        parts.append(markdown(results.no_accuracy))
    if shortened:
        parts.append(f"Of {shortened:,} contexts the oldest turns did not fit into the model.")
    if cut:
        parts.append(f"Of {cut:,} responses the end did not fit, so that figures per word and byte cannot be given.")
    if "bertscore_model" in figures:
        parts.append(f"BERTScore: {markdown(figures['bertscore_model'])}.")
    if difference is not None and options.compare:
        parts.append(f"Perplexity minus that of {code(options.compare)}, paired: {difference}.")
    parts += [f"![{caption}]({path.name})" for caption, path in pictures.items() if path is not None]
    rows = [
        [markdown(" / ".join(pair.turns)), markdown(pair.response), markdown(response) or "(empty)"]
        for pair, response in zip(pairs[:10], responses, strict=False)
    ]
    if rows:
        header = "| context | reference | response |\n|---|---|---|\n"
        parts.append(header + "\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(filter(None, parts)) + "\n"
