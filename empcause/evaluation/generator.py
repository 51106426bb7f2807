"""`empcause evaluate generator`: Table 7."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from empcause.checkpoints import read_config
from empcause.data import ResponsePair, emotion_id, join_turns, load_dialogues, response_pairs, split_words
from empcause.data.sequences import encode_dialogue
from empcause.errors import UserError
from empcause.evaluation.items import digest, evaluating_in, extractions, model_digest
from empcause.evaluation.metrics import bits_per_byte, distinct_n, emotion_correct, nll_per_word, perplexity
from empcause.evaluation.plots import load_pyplot, plot_causes, plot_training
from empcause.evaluation.report import read_items
from empcause.evaluation.significance import Interval, mean_interval, perplexity_difference, perplexity_interval
from empcause.evaluation.tables import (
    GENERATOR_COLUMNS,
    PUBLISHED_GENERATORS,
    comparison_table,
    format_figure,
    markdown_table,
)
from empcause.extractor import Extraction, load_extractor
from empcause.files import write_text
from empcause.generator import (
    TextCauses,
    generate_responses,
    generator_item,
    load_generator,
    longest_sequence,
    response_nll,
)
from empcause.text import one_line


@dataclass
class EvaluateGeneratorOptions:
    """Options of `empcause evaluate generator`."""

    model: str = field(default="runs/generator", metadata={"help": "folder of the generator"})
    extractor: str = field(default="runs/extractor", metadata={"help": "folder of the extractor"})
    compare: str | None = field(
        default=None, metadata={"help": "folder of an earlier evaluation; the difference gets a paired interval"}
    )
    data: str | None = field(
        default=None, metadata={"help": "folder or archive of the data, or `sample`; default $EMPCAUSE_DATA_DIR"}
    )
    split: str = field(default="test", metadata={"help": "split of EmpatheticDialogues", "choices": ["valid", "test"]})
    output_dir: str = field(default="runs/evaluation/generator", metadata={"help": "where report and figures go"})
    max_samples: int | None = field(
        default=None, metadata={"help": "score this many responses, drawn by the seed; default: all"}
    )
    max_generated: int | None = field(
        default=None, metadata={"help": "generate this many of them; default: all that are scored"}
    )
    max_new_tokens: int = field(default=40, metadata={"help": "longest generated response in tokens"})
    bertscore_model: str | None = field(
        default=None, metadata={"help": "encoder for BERTScore, by name or folder; default: no BERTScore"}
    )
    bertscore_layer: int | None = field(
        default=None, metadata={"help": "its layer; default: what bert-score has chosen for it"}
    )
    batch_size: int = field(default=16, metadata={"help": "dialogues per batch"})
    seed: int = field(default=0, metadata={"help": "seed of the drawing"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what another evaluation left in output_dir"}
    )


def evaluate_generator(options: EvaluateGeneratorOptions) -> dict[str, Any]:
    """Measure a generator and write `metrics.json`, `items.json`, `responses.json`, `report.md` and figures.

    Results per item are saved as they come; an evaluation that was cut short goes on from there when it is repeated.

    Returns:
        Every figure by name, and `intervals`: name to (low, high).

    Raises:
        UserError: missing data, model or library; or `output_dir` holds another evaluation.
        Interrupted: Ctrl-C or SIGTERM.
    """
    load_pyplot()
    bertscore = BertScore(options.bertscore_model, options.bertscore_layer) if options.bertscore_model else None
    read_config(options.extractor, "extractor", "empcause train extractor")
    pairs = response_pairs(load_dialogues(options.split, options.data))
    if options.max_samples is not None:
        chosen = np.random.default_rng(options.seed).permutation(len(pairs))[: options.max_samples]
        pairs = [pairs[index] for index in chosen]
    earlier = read_items(options.compare, "tokens", len(pairs))
    model, tokenizer = load_generator(options.model)
    texts = [join_turns(pair.context)[0] for pair in pairs]
    extractor, extractor_tokenizer = load_extractor(options.extractor)
    number = len(pairs) if options.max_generated is None else min(options.max_generated, len(pairs))
    subject = {
        "model": model_digest(options.model),
        "extractor": model_digest(options.extractor),
        "data": digest([asdict(pair) for pair in pairs]),
        "batch_size": options.batch_size,
        "max_generated": number,
        "max_new_tokens": options.max_new_tokens,
    }
    folder = Path(options.output_dir)
    with evaluating_in(folder, "empcause evaluate generator", subject, options.overwrite_output_dir) as saved:
        found = extractions(saved, extractor, extractor_tokenizer, texts, [split_words(text) for text in texts], 64)
        causes: list[TextCauses | None] = [
            TextCauses(each.token_spans, each.token_probs) if model.config.gamma else None for each in found
        ]
        items = []
        for pair, cause in zip(pairs, causes, strict=True):
            encoded = encode_dialogue(tokenizer, pair.context, pair.roles, pair.response, longest_sequence(model))
            items.append(generator_item(model, encoded, pair.context, pair.roles, cause))
        lengths = [len(item["input_ids"]) for item in items]

        def score(batch: list[int]) -> list[tuple[float, int]]:
            nll, tokens = response_nll(
                model, tokenizer, [items[index] for index in batch], batch_size=options.batch_size
            )
            return list(zip(nll.tolist(), tokens.tolist(), strict=True))

        def answer(batch: list[int]) -> list[str]:
            return generate_responses(
                model,
                tokenizer,
                [pairs[index] for index in batch],
                [causes[index] for index in batch],
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
            )

        scores = saved.each("scoring", lengths, options.batch_size, score)
        responses = saved.each("answering", lengths[:number], options.batch_size, answer)
        bertscores = {}
        if bertscore is not None:
            rows = saved.each(
                bertscore.setting,
                [len(response) for response in responses],
                options.batch_size,
                lambda batch: bertscore(
                    [responses[index] for index in batch], [pairs[index].response for index in batch]
                ).tolist(),
            )
            bertscores = dict(zip(("bertscore_p", "bertscore_r", "bertscore_f"), np.array(rows).T, strict=True))
        nll, tokens = (np.array(column) for column in zip(*scores, strict=True))
        return _judge(
            options, pairs, found, nll, tokens, responses, earlier, bertscores, bertscore and bertscore.setting
        )


def _judge(
    options: EvaluateGeneratorOptions,
    pairs: Sequence[ResponsePair],
    found: Sequence[Extraction],
    nll: NDArray[np.float64],
    tokens: NDArray[np.int64],
    responses: Sequence[str],
    earlier: dict[str, list] | None,
    bertscores: dict[str, NDArray],
    bertscore_setting: str | None,
) -> dict[str, Any]:
    """The figures of what was found, scored and answered, and all files."""
    correct = emotion_correct([each.emotion_probs for each in found], [emotion_id(pair.emotion) for pair in pairs])
    references = [pair.response for pair in pairs]
    intervals = {
        "perplexity": perplexity_interval(nll, tokens),
        "emotion_accuracy": mean_interval(correct),
    }
    metrics: dict[str, Any] = {
        "perplexity": perplexity(nll, tokens),
        "nll_per_word": nll_per_word(nll, references),
        "bits_per_byte": bits_per_byte(nll, references),
        "emotion_accuracy": float(correct.mean()),
        "distinct_1": distinct_n(responses, 1),
        "distinct_2": distinct_n(responses, 2),
        "words_per_response": float(np.mean([len(split_words(response)) for response in responses])),
        "scored_responses": len(pairs),
        "generated_responses": len(responses),
    }
    for name, values in bertscores.items():
        intervals[name] = mean_interval(values)
        metrics[name] = intervals[name].value
    if bertscore_setting is not None:
        metrics["bertscore_model"] = bertscore_setting
    metrics["intervals"] = {name: each[1:] for name, each in intervals.items()}
    difference = None
    if earlier is not None:
        if earlier["tokens"] != tokens.tolist():
            raise UserError(
                f"--compare {options.compare}: that evaluation scored other responses, or with another tokenizer."
            )
        difference = perplexity_difference(nll, earlier["nll"], tokens)
        metrics["perplexity_difference"] = list(difference)

    folder = Path(options.output_dir)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_text(folder / "items.json", json.dumps({"nll": nll.tolist(), "tokens": tokens.tolist()}))
    dialogues = [
        {"context": pair.context, "emotion": pair.emotion, "reference": pair.response, "response": response}
        for pair, response in zip(pairs, responses, strict=False)
    ]
    write_text(folder / "responses.json", json.dumps(dialogues, indent=1, ensure_ascii=False) + "\n")
    curves = plot_training(Path(options.model), "perplexity", folder / "training.png")
    example = found[0]
    title = f"annotated: {pairs[0].emotion}"
    plot_causes(example.text, example.words, example.word_probs.tolist(), title, folder / "causes.png")
    figures = metrics | {name: each for name, each in intervals.items()}
    write_text(folder / "report.md", _report(options, figures, difference, pairs, responses, curves is not None))
    return metrics


class BertScore:
    """BERTScore of responses, rescaled with the library's baseline for `roberta-large` (as the published figures), raw for other
    encoders, which have none.

    Args:
        model: the encoder, by name or folder.
        layer: its layer; None is what the library has chosen for it.

    Attributes:
        setting: the library's hash of it (model, layer, versions).

    Raises:
        UserError: bert-score is not installed, or there is no such encoder or layer.
    """

    def __init__(self, model: str, layer: int | None) -> None:
        try:
            from bert_score import BERTScorer
        except ImportError as error:
            raise UserError("BERTScore needs bert-score: pip install 'empcause[evaluation]'.") from error
        rescale = model == "roberta-large"
        if layer is None and not rescale:
            raise UserError("--bertscore_layer is needed with an encoder other than roberta-large.")
        try:
            self._scorer = BERTScorer(
                model_type=model, num_layers=layer, lang="en" if rescale else None, rescale_with_baseline=rescale
            )
        except (OSError, ValueError, AssertionError) as error:
            raise UserError(f"--bertscore_model {model} cannot be used: {one_line(error)}") from error
        scale = "rescaled with the baseline" if rescale else "raw, no baseline for this encoder"
        self.setting = f"{self._scorer.hash.replace(model, Path(model).name)}, {scale}"

    def __call__(self, responses: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
        """Precision, recall and F per response, `[n, 3]`; an empty response scores 0."""
        values = np.zeros((len(responses), 3))
        filled = [index for index, response in enumerate(responses) if response.strip()]
        if filled:
            scores = self._scorer.score([responses[index] for index in filled], [references[index] for index in filled])
            values[filled] = np.stack([score.numpy() for score in scores], axis=1)
        return values


def _report(
    options: EvaluateGeneratorOptions,
    figures: dict[str, Any],
    difference: Interval | None,
    pairs: Sequence[ResponsePair],
    responses: Sequence[str],
    has_curves: bool,
) -> str:
    others = ("nll_per_word", "bits_per_byte", "emotion_accuracy", "words_per_response")
    parts = [
        "# Empathetic conversation generator",
        f"`{options.model}` on {figures['scored_responses']} responses (split {options.split}), "
        f"{figures['generated_responses']} generated greedily; 95% bootstrap intervals over responses. Perplexities of "
        "different tokenizers do not compare; bits per byte do.",
        comparison_table("this model", figures, PUBLISHED_GENERATORS, GENERATOR_COLUMNS),
        markdown_table(
            ["figure", "value"], [[name.replace("_", " "), format_figure(figures[name])] for name in others]
        ),
    ]
    if "bertscore_model" in figures:
        parts.append(f"BERTScore: {figures['bertscore_model']}.")
    if difference is not None:
        parts.append(f"Perplexity minus that of `{options.compare}`, paired: {difference}.")
    parts += ["![A dialogue with its cause words shaded](causes.png)"]
    if has_curves:
        parts.append("![Training curves](training.png)")
    shown = [
        [" / ".join(pair.context), pair.response, response or "(empty)"]
        for pair, response in zip(pairs[:10], responses, strict=False)
    ]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in shown]
    header = "| context | reference | response |\n|---|---|---|\n"
    parts.append(header + "\n".join("| " + " | ".join(row) + " |" for row in cells))
    return "\n\n".join(parts) + "\n"
