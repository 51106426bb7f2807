"""`empcause evaluate generator`: Table 7."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from empcause.checkpoints import read_config
from empcause.data import Dialogue, emotion_id, load_dialogues, response_pairs, split_words
from empcause.data.origin import Origin, origin
from empcause.data.sequences import EncodedDialogue, encode_response
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
    encode_for,
    generate_responses,
    load_generator,
    longest_sequence,
    response_nll,
)
from empcause.generator.inference import longest_context
from empcause.hub import not_found, reach_hub
from empcause.ranges import COUNT, SEED, check_values
from empcause.text import code, markdown, one_line


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

    def __post_init__(self) -> None:
        names = ("max_samples", "max_generated", "max_new_tokens", "bertscore_layer", "batch_size")
        check_values(self, dict.fromkeys(names, COUNT) | {"seed": SEED})
        if self.bertscore_layer is not None and not self.bertscore_model:
            raise UserError("bertscore_layer is a layer of bertscore_model; give that too.")


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
    dialogues = load_dialogues(options.split, options.data)
    data, everything = origin(options.data, dialogues), response_pairs(dialogues)
    pairs = everything
    if options.max_samples is not None:
        chosen = np.random.default_rng(options.seed).permutation(len(pairs))[: options.max_samples]
        pairs = [pairs[index] for index in chosen]
    model, tokenizer = load_generator(options.model)
    longest_context(model, options.max_new_tokens)
    limit = longest_sequence(model)
    identities = [_identity(pair) for pair in pairs]
    scored = digest(identities, [encode_response(tokenizer, pair.response, limit)[0] for pair in pairs])
    earlier = read_items(options.compare, scored, ["nll"])
    texts = [pair.text for pair in pairs]
    extractor, extractor_tokenizer = load_extractor(options.extractor)
    number = len(pairs) if options.max_generated is None else min(options.max_generated, len(pairs))
    subject = {
        "model": model_digest(options.model),
        "extractor": model_digest(options.extractor),
        "data": digest(identities),
        "batch_size": options.batch_size,
        "max_generated": number,
        "max_new_tokens": options.max_new_tokens,
    }
    folder = Path(options.output_dir)
    with evaluating_in(folder, "empcause evaluate generator", subject, options.overwrite_output_dir) as saved:
        found = extractions(saved, extractor, extractor_tokenizer, texts, [split_words(text) for text in texts], 64)
        pairs = [replace(pair, causes=each.causes) for pair, each in zip(pairs, found, strict=True)]
        encoded = [encode_for(model, tokenizer, pair, limit) for pair in pairs]
        lengths = [len(each.input_ids) for each in encoded]

        def score(batch: list[int]) -> list[tuple[float, int]]:
            nll, tokens = response_nll(
                model, tokenizer, [encoded[index] for index in batch], batch_size=options.batch_size
            )
            return list(zip(nll.tolist(), tokens.tolist(), strict=True))

        def answer(batch: list[int]) -> list[str]:
            return generate_responses(
                model,
                tokenizer,
                [pairs[index] for index in batch],
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
        results = _Results(
            data=data,
            whole=len(everything),
            scored=scored,
            gamma=model.config.gamma,
            pairs=pairs,
            encoded=encoded,
            found=found,
            nll=nll,
            tokens=tokens,
            responses=responses,
            bertscores=bertscores,
            bertscore=bertscore,
        )
        return _judge(options, results, earlier)


def _identity(pair: Dialogue) -> dict[str, Any]:
    """What makes a response pair this one and no other, as JSON can hold it."""
    return {
        "conv_id": pair.conv_id,
        "emotion": pair.emotion,
        "context": pair.turns,
        "roles": pair.roles,
        "response": pair.response,
    }


@dataclass(frozen=True)
class _Results:
    """What an evaluation has found, in the order of its items, and what the items are."""

    data: Origin
    whole: int  # number of responses of the split
    scored: str
    gamma: float
    pairs: Sequence[Dialogue]
    encoded: Sequence[EncodedDialogue]
    found: Sequence[Extraction]
    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    responses: Sequence[str]
    bertscores: dict[str, NDArray]
    bertscore: "BertScore | None"


def _judge(
    options: EvaluateGeneratorOptions, results: _Results, earlier: dict[str, list[float]] | None
) -> dict[str, Any]:
    """The figures of what was found, scored and answered, and all files."""
    pairs, found, responses = results.pairs, results.found, results.responses
    nll, tokens = results.nll, results.tokens
    correct = emotion_correct([each.emotion_probs for each in found], [emotion_id(pair.emotion) for pair in pairs])
    references = [pair.response for pair in pairs]
    # Of a response that is scored in part, neither words nor bytes are known.
    in_part = any(each.cut_response for each in results.encoded)
    intervals = {
        "perplexity": perplexity_interval(nll, tokens),
        "emotion_accuracy": mean_interval(correct),
    }
    metrics: dict[str, Any] = {
        "perplexity": perplexity(nll, tokens),
        "nll_per_word": None if in_part else nll_per_word(nll, references),
        "bits_per_byte": None if in_part else bits_per_byte(nll, references),
        "emotion_accuracy": float(correct.mean()),
        "distinct_1": distinct_n(responses, 1),
        "distinct_2": distinct_n(responses, 2),
        "words_per_response": float(np.mean([len(split_words(response)) for response in responses])),
        "scored_responses": len(pairs),
        "generated_responses": len(responses),
    }
    for name, values in results.bertscores.items():
        intervals[name] = mean_interval(values)
        metrics[name] = intervals[name].value
    if results.bertscore is not None:
        metrics["bertscore_model"] = results.bertscore.setting
    metrics["intervals"] = {name: each[1:] for name, each in intervals.items()}
    difference = None
    if earlier is not None:
        difference = perplexity_difference(nll, earlier["nll"], tokens)
        metrics["perplexity_difference"] = list(difference)

    folder = Path(options.output_dir)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    saved = {"scored": results.scored, "nll": nll.tolist(), "tokens": tokens.tolist()}
    write_text(folder / "items.json", json.dumps(saved))
    dialogues = [
        {"context": pair.turns, "emotion": pair.emotion, "reference": pair.response, "response": response}
        for pair, response in zip(pairs, responses, strict=False)
    ]
    write_text(folder / "responses.json", json.dumps(dialogues, indent=1, ensure_ascii=False) + "\n")
    curves = plot_training(Path(options.model), "perplexity", folder / "training.png")
    example = found[0]
    title = f"annotated: {pairs[0].emotion}"
    plot_causes(example.text, example.words, example.word_probs.tolist(), title, folder / "causes.png")
    figures = metrics | {name: each for name, each in intervals.items()}
    write_text(folder / "report.md", _report(options, results, figures, difference, curves is not None))
    return metrics


class BertScore:
    """BERTScore of responses, rescaled with the library's baseline for `roberta-large` (as the published figures), raw for other
    encoders, which have none.

    Args:
        model: the encoder, by name or folder.
        layer: its layer; None is what the library has chosen for it.

    Attributes:
        setting: the library's hash of it (model, layer, versions).
        rescaled: with the baseline, as the published figures are.

    Raises:
        UserError: bert-score is not installed, or there is no such encoder or layer.
    """

    def __init__(self, model: str, layer: int | None) -> None:
        try:
            from bert_score import BERTScorer
        except ImportError as error:
            raise UserError("BERTScore needs bert-score: pip install 'empcause[evaluation]'.") from error
        self.rescaled = rescale = model == "roberta-large"
        if layer is None and not rescale:
            raise UserError("--bertscore_layer is needed with an encoder other than roberta-large.")
        reach_hub(model)
        try:
            self._scorer = BERTScorer(
                model_type=model, num_layers=layer, lang="en" if rescale else None, rescale_with_baseline=rescale
            )
        except OSError as error:
            raise not_found("encoder", model, error) from error
        except (ValueError, LookupError, AssertionError) as error:
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
    results: _Results,
    figures: dict[str, Any],
    difference: Interval | None,
    has_curves: bool,
) -> str:
    others = ("nll_per_word", "bits_per_byte", "emotion_accuracy", "words_per_response")
    published: dict[str, Sequence[float | None]] = {}
    if results.data.published and options.split == "test" and len(results.responses) == results.whole:
        same_scale = results.bertscore is not None and results.bertscore.rescaled
        published = {
            name: (*values[:3], *(values[3:] if same_scale else (None, None, None)))
            for name, values in PUBLISHED_GENERATORS.items()
        }
    bias = f"biased towards causes (gamma {results.gamma:g})" if results.gamma else "without bias (gamma 0)"
    shortened = sum(each.dropped_turns > 0 for each in results.encoded)
    cut = sum(each.cut_response for each in results.encoded)
    parts = [
        "# Empathetic conversation generator",
        f"{code(options.model)}, {bias}, on {len(results.pairs):,} of {results.whole:,} responses of "
        f"{results.data.name} (split {options.split}), "
        f"{len(results.responses):,} generated greedily; 95% bootstrap intervals over responses. Perplexities of "
        "different tokenizers do not compare; bits per byte do.",
        comparison_table("this model", figures, published, GENERATOR_COLUMNS),
        ""
        if published
        else "The paper's figures are not shown beside these: they are of EmpatheticDialogues' whole test split.",
        markdown_table(
            ["figure", "value"], [[name.replace("_", " "), format_figure(figures[name])] for name in others]
        ),
    ]
    if shortened:
        parts.append(f"Of {shortened:,} contexts the oldest turns did not fit into the model.")
    if cut:
        parts.append(f"Of {cut:,} responses the end did not fit, so that figures per word and byte cannot be given.")
    if results.bertscore is not None:
        parts.append(f"BERTScore: {markdown(results.bertscore.setting)}.")
    if difference is not None and options.compare:
        parts.append(f"Perplexity minus that of {code(options.compare)}, paired: {difference}.")
    parts += ["![A dialogue with its cause words shaded](causes.png)"]
    if has_curves:
        parts.append("![Training curves](training.png)")
    rows = [
        [markdown(" / ".join(pair.turns)), markdown(pair.response), markdown(response) or "(empty)"]
        for pair, response in zip(results.pairs[:10], results.responses, strict=False)
    ]
    header = "| context | reference | response |\n|---|---|---|\n"
    parts.append(header + "\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(filter(None, parts)) + "\n"
