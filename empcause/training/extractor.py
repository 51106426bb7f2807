"""Stage 1: training the emotion cause extractor (Algorithm 1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, set_seed
from transformers.utils import logging

from empcause.checkpoints import load_whole
from empcause.data import CauseAnnotation, emotion_id, find_corpus, load_annotations, load_dialogues, split_words
from empcause.data.collation import pad_batch
from empcause.data.origin import origin
from empcause.data.sequences import IGNORED, MIN_LENGTH
from empcause.errors import Missing, UserError
from empcause.extractor import CauseExtractor, CauseExtractorConfig, encode_text, extract, longest_input
from empcause.extractor.encoding import is_cut
from empcause.extractor.losses import count_labels
from empcause.metrics import emotion_correct, score_causes
from empcause.ranges import COUNT, NOT_NEGATIVE, Range
from empcause.training.card import model_card
from empcause.training.common import (
    PretrainedStageArguments,
    StageTrainer,
    finish,
    load_config,
    load_tokenizer,
    set_environment,
)
from empcause.training.fingerprint import digest
from empcause.training.folder import find_checkpoint, in_output_folder

logger = logging.get_logger(__name__)

# Parts of the loss, in the order of their numbers in `count_labels`.
LOSSES = ("emotion_loss", "cause_loss", "aux_loss")

SUPERVISIONS = ("semi-supervised", "supervised", "unsupervised", "emotion")


@dataclass
class ExtractorTrainingArguments(PretrainedStageArguments):
    """Options of stage 1; the defaults are the paper's (Table 4)."""

    figures: ClassVar = (
        "accuracy",
        *(f"{kind}top{cut}_recall" for kind in ("", "strict_") for cut in (1, 3, 5)),
    )
    higher_is_better: ClassVar = True
    ranges: ClassVar = PretrainedStageArguments.ranges | {
        "automatic_label_start": NOT_NEGATIVE,
        "automatic_top_k": COUNT,
        "emotion_weight": NOT_NEGATIVE,
        "cause_weight": NOT_NEGATIVE,
        "aux_weight": NOT_NEGATIVE,
        "max_length": Range(MIN_LENGTH),
    }
    refused: ClassVar = PretrainedStageArguments.refused | {
        "label_smoothing_factor": "the extractor's losses are the paper's, without smoothed labels",
        "debug": "it cannot read the extractor's automatic labels",
    }

    output_dir: str | None = field(
        default="runs/extractor", metadata={"help": "folder for the checkpoints and the finished model"}
    )
    model_name_or_path: str | None = field(
        default="roberta-base",
        metadata={"help": "pretrained encoder, by name or folder; empty: a new model of model_type"},
    )
    supervision: str = field(
        default="semi-supervised",
        metadata={
            "help": "semi-supervised (Algorithm 1), supervised (annotations alone), unsupervised (automatic labels alone), "
            "emotion (emotion labels alone)",
            "choices": list(SUPERVISIONS),
        },
    )
    interleave: bool = field(
        default=False, metadata={"help": "mix labelled and unlabelled batches; otherwise all labelled ones come first"}
    )
    automatic_label_start: int = field(
        default=0, metadata={"help": "first epochs in which texts without annotation train the emotion alone"}
    )
    automatic_top_k: int = field(
        default=3, metadata={"help": "number of words per text that automatic labels mark as causes"}
    )
    annotations: str = field(
        default="halved",
        metadata={
            "help": "learn from a half of the annotations' validation split and validate on the other one, or as the paper's "
            "supervised row was made: learn from all of it and validate on the test split",
            "choices": ["halved", "published"],
        },
    )
    stratified_split: bool = field(
        default=False, metadata={"help": "halve the annotations' validation split separately for each emotion"}
    )
    cause_from: str = field(
        default="head",
        metadata={
            "help": "source of cause probabilities: the cause head, or the first token's attention",
            "choices": ["head", "attention"],
        },
    )
    attention_pooling: str = field(
        default="mean", metadata={"help": "how the heads of that attention are combined", "choices": ["mean", "max"]}
    )
    aux_form: str = field(
        default="complement",
        metadata={
            "help": "auxiliary loss (eq 8): 1 - <Att, C1>, or literally <Att, C1>",
            "choices": ["complement", "literal"],
        },
    )
    emotion_weight: float = field(default=1 / 3, metadata={"help": "weight of the emotion loss (eq 9)"})
    cause_weight: float = field(default=1.0, metadata={"help": "weight of the cause loss (eq 9)"})
    aux_weight: float = field(default=1.0, metadata={"help": "weight of the auxiliary loss (eq 9)"})
    cause_reduction: str = field(
        default="mean", metadata={"help": "how the cause loss combines tokens", "choices": ["mean", "sum"]}
    )
    max_length: int = field(default=128, metadata={"help": "longest text in tokens"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "texts per batch and device"})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "texts per batch and device in evaluation"})
    num_train_epochs: float = field(default=20, metadata={"help": "training iterations of Algorithm 1"})
    metric_for_best_model: str | None = field(
        default="top5_recall", metadata={"help": "validation figure that early stopping and the scheduler watch"}
    )

    def __post_init__(self) -> None:
        if not (self.emotion_weight or self.cause_weight or self.aux_weight):
            raise UserError("emotion_weight, cause_weight and aux_weight are all 0: there is nothing to learn.")
        super().__post_init__()
        if self.annotations == "published" and self.stratified_split:
            raise UserError("stratified_split halves the validation split, which annotations published does not.")
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError(
                "activation_checkpointing_kwargs: with use_reentrant the auxiliary loss would not reach the attention."
            )


@in_output_folder("empcause train extractor")
def train_extractor(args: ExtractorTrainingArguments) -> dict[str, float]:
    """Train an extractor; the best one is in `args.output_dir` then.

    Args:
        args: the options.

    Returns:
        Accuracy and Top-k recall on the validation situations, each in [0, 1], by name.

    Raises:
        UserError: data, model or checkpoint are missing or malformed, or the training diverged.
        Interrupted: Ctrl-C or SIGTERM.
    """
    set_environment()
    checkpoint = find_checkpoint(args)
    corpus, _ = find_corpus(args.data)
    try:
        labelled, validation = split_annotations(args)
    except Missing as error:
        raise UserError(
            f"{str(error).removesuffix('.')} (an extractor is validated on annotated causes, whatever its supervision)."
        ) from error
    dialogues = [] if args.supervision == "supervised" else load_dialogues("train", args.data)
    data = origin(args.data, [*labelled, *validation], *([dialogues] if dialogues else []))
    if without := sum(not dialogue.situation.strip() for dialogue in dialogues):
        raise UserError(
            f"{without} of {len(dialogues)} dialogues of {data.name} (split train) have no situation, which is the text that an "
            "extractor learns from; add the situations, or learn from the annotations alone with --supervision supervised."
        )
    tokenizer = load_tokenizer(args)
    set_seed(args.seed)
    model = CauseExtractor(*build_encoder(args, tokenizer, corpus.emotions))
    limit = model.config.max_length = min(args.max_length, longest_input(model, tokenizer))
    check_tokenizer(tokenizer, model)

    if args.supervision in ("unsupervised", "emotion"):
        labelled = []
    items = [encode_annotation(tokenizer, annotation, model.emotions, limit) for annotation in labelled]
    for dialogue in dialogues:
        words = split_words(dialogue.situation)
        encoded = encode_text(tokenizer, dialogue.situation, words, limit)
        items.append(
            encoded
            | {
                "emotion_labels": emotion_id(dialogue.emotion, model.emotions),
                "cause_labels": np.full(len(encoded["input_ids"]), IGNORED),
                "automatic": args.supervision != "emotion",
            }
        )
    texts = [each.situation for each in labelled] + [each.situation for each in dialogues]
    if cut := sum(is_cut(item, text, limit) for item, text in zip(items, texts, strict=True)):
        logger.warning(
            f"{cut} of {len(texts)} situations have more than {limit} tokens; the rest of them is not learned."
        )
    phases = [range(len(labelled)), range(len(labelled), len(items))]
    trainer = ExtractorTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=items,
        eval_dataset=validation,
        data_collator=partial(pad_batch, pad_token_id=tokenizer.pad_token_id),
        phases=None if args.interleave else phases,
        made_from={
            "tokenizer": digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]),
            "set of training data": digest([*labelled, *dialogues]),
            "set of validation data": digest(validation),
        },
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = measure_causes(model, tokenizer, validation, args.per_device_eval_batch_size)
    assert corpus.annotations is not None, "split_annotations refuses data without annotations"
    abilities = _abilities(args, corpus.annotations.title)
    trained_on = f"{len(labelled):,} annotated and {len(dialogues):,} other situations, validated on "
    trained_on += f"{len(validation):,} annotated ones"
    if args.annotations == "published":
        trained_on += " of the test split, so that its figures on that split are too good"
    card = model_card(trainer, metrics, "Emotion cause extractor", abilities, trained_on, data)
    return finish(trainer, metrics, card)


def _abilities(args: ExtractorTrainingArguments, annotations: str) -> str:
    """What the extractor has learned, for its card."""
    learned = {
        "semi-supervised": f"Causes were learned from {annotations}'s annotations and from automatic labels.",
        "supervised": f"Causes were learned from {annotations}'s annotations.",
        "unsupervised": "Causes were learned from automatic labels; no annotation of causes was used.",
        "emotion": "Causes were not learned: the emotion alone was.",
    }
    read = "Causes are read from the attention of the first token." if args.cause_from == "attention" else ""
    if args.supervision == "emotion" and not read:
        read = "What it says about causes is meaningless."
    return " ".join(
        filter(None, ("Finds the emotion of a text and the words that caused it.", learned[args.supervision], read))
    )


def split_annotations(args: ExtractorTrainingArguments) -> tuple[list[CauseAnnotation], list[CauseAnnotation]]:
    """Annotated situations to learn from, and others for the validation.

    These are two random halves of the annotations' validation split (EmoCause-1 and EmoCause-2 in the paper), or the splits
    train and valid where the annotations have a training split of their own, as the embedded sample has. As published, they are
    everything but the test split, and the test split.

    Raises:
        Missing: there are no annotations.
        UserError: a record is malformed.
    """
    corpus, _ = find_corpus(args.data)
    if args.annotations == "published":
        splits = [split for split in (corpus.annotations.splits if corpus.annotations else ()) if split != "test"]
        learned = [each for split in splits for each in load_annotations(split, args.data)]
        return learned, load_annotations("test", args.data)
    if corpus.annotations and "train" in corpus.annotations.splits:
        return load_annotations("train", args.data), load_annotations("valid", args.data)
    annotations = load_annotations("valid", args.data)
    random = np.random.default_rng(args.seed)
    order = random.permutation(len(annotations)).tolist()
    if args.stratified_split:
        by_emotion = [[index for index in order if annotations[index].emotion == name] for name in corpus.emotions]
        first = {index for group in by_emotion for index in group[: len(group) // 2]}
    else:
        first = set(order[: len(order) // 2])
    halves: tuple[list[CauseAnnotation], list[CauseAnnotation]] = ([], [])
    for index in order:
        halves[index not in first].append(annotations[index])
    return halves


def build_encoder(
    args: ExtractorTrainingArguments, tokenizer: Any, emotions: Sequence[str]
) -> tuple[CauseExtractorConfig, Any]:
    """Make the extractor's configuration, and load its encoder if that is pretrained (otherwise None).

    Args:
        args: the options.
        tokenizer: the encoder's tokenizer.
        emotions: names of the emotions, by their ids.

    Raises:
        UserError: there is no such encoder, or its weights cannot be used.
    """
    encoder_config = load_config(args, tokenizer)
    encoder = None
    if args.model_name_or_path:
        encoder = load_whole(AutoModel, args.model_name_or_path, new=("pooler",))
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # only the encoder's own classification heads use it
        encoder_config = encoder.config
    config = CauseExtractorConfig(
        encoder=encoder_config.to_dict(),
        cause_from=args.cause_from,
        attention_pooling=args.attention_pooling,
        automatic_top_k=args.automatic_top_k,
        emotion_weight=args.emotion_weight,
        cause_weight=args.cause_weight,
        aux_weight=args.aux_weight,
        cause_reduction=args.cause_reduction,
        aux_form=args.aux_form,
        max_length=args.max_length,
        id2label=dict(enumerate(emotions)),
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    return config, encoder


def check_tokenizer(tokenizer: Any, model: CauseExtractor) -> None:
    """Refuse a tokenizer that does not fit the encoder.

    Raises:
        UserError: it has more tokens than the encoder, no padding token, or writes no class token before a text.
    """
    name, rows = tokenizer.name_or_path, len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer {name} has {len(tokenizer)} tokens, the encoder {rows}; give the encoder's own."
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"The tokenizer {name} has no padding token; give that of an encoder.")
    if tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][0] != 1:
        raise UserError(f"The tokenizer {name} writes no class token before a text; give that of an encoder.")


def encode_annotation(
    tokenizer: Any, annotation: CauseAnnotation, emotions: Sequence[str], max_length: int
) -> dict[str, Any]:
    """Make a training item of an annotated situation: every token that overlaps an annotated word is labelled 1.

    Returns:
        What `encode_text` gives, with `cause_labels` `[S]` int64, `emotion_labels` (its id) and `automatic` (False).

    Raises:
        UserError: the emotion is none of `emotions`.
    """
    encoded = encode_text(tokenizer, annotation.situation, annotation.words, max_length)
    gold_spans = np.array([annotation.words[index][1:] for index in annotation.gold], np.int64).reshape(-1, 2)
    return encoded | {
        "emotion_labels": emotion_id(annotation.emotion, emotions),
        "cause_labels": cause_labels(encoded["offsets"], gold_spans),
        "automatic": False,
    }


def cause_labels(offsets: NDArray[np.int64], gold_spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """Label tokens by their character spans.

    Args:
        offsets: `[S, 2]` spans of the tokens; special tokens have empty ones.
        gold_spans: `[G, 2]` spans of the annotated words.

    Returns:
        `[S]` int64: 1 for tokens that overlap an annotated word, 0 for others, -100 for special tokens.
    """
    overlap = np.maximum(offsets[:, :1], gold_spans[:, 0]) < np.minimum(offsets[:, 1:], gold_spans[:, 1])
    is_special = offsets[:, 0] == offsets[:, 1]
    return np.where(is_special, IGNORED, overlap.any(1))


def measure_causes(
    model: CauseExtractor, tokenizer: Any, annotations: Sequence[CauseAnnotation], batch_size: int
) -> dict[str, float]:
    """Measure emotion accuracy and Top-k recall (lenient and strict) on annotated situations, each in [0, 1].

    Raises:
        UserError: the extractor's probabilities are not finite, or an emotion is unknown to it.
    """
    found = extract(
        model,
        tokenizer,
        [annotation.situation for annotation in annotations],
        words=[annotation.words for annotation in annotations],
        batch_size=batch_size,
    )
    correct = emotion_correct(
        [extraction.emotion_probs for extraction in found],
        [emotion_id(each.emotion, model.emotions) for each in annotations],
    )
    recalls = score_causes(annotations, [extraction.word_probs for extraction in found]).summary()
    kept = {name: value for name, value in recalls.items() if name.startswith(("top", "strict"))}
    return {"accuracy": float(correct.mean()), **kept}


class ExtractorTrainer(StageTrainer):
    """Trains without automatic labels in the first epochs if so told, logs the three losses, and evaluates by ranking words.

    The losses of an optimiser step are those of one batch with all its texts, however many batches and processes share these.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums = torch.zeros(len(LOSSES), device=self.args.device)
        self._steps = torch.zeros(len(LOSSES), device=self.args.device)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Take the batches of an optimiser step.

        Returns:
            The batches of this process, and the sum of `count_labels` over those of all processes, `[3]`.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(len(LOSSES), dtype=torch.long, device=device)
        for batch in batches:
            self._start_automatic_labels(batch)
            real_tokens = (batch["attention_mask"] != 0) & (batch["special_tokens_mask"] == 0)
            made = torch.where(real_tokens, 0, IGNORED)  # as many as the model makes, whichever words it chooses
            labels = torch.where(batch["automatic"][:, None], made, batch["cause_labels"])
            counts += count_labels(batch["emotion_labels"], labels).to(device)
        counts = self.accelerator.reduce(counts, "sum")
        self._steps += counts > 0
        return batches, counts

    def _start_automatic_labels(self, batch: Any) -> None:
        """Leave automatic labels out until the epoch in which they begin."""
        if (self.state.epoch or 0.0) < self.args.automatic_label_start:
            batch["automatic"] = torch.zeros_like(batch["automatic"])

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the model's loss; its three parts are kept for the log."""
        self._start_automatic_labels(inputs)
        output = model(**inputs, counts=num_items_in_batch)
        for place, name in enumerate(LOSSES):
            if (part := getattr(output, name)) is not None:
                self._sums[place] += part.detach()
        loss = output.loss * self.accelerator.num_processes  # the gradients' mean over processes is taken
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss over the optimiser steps since the last log that had it."""
        if "loss" in logs:
            sums, steps = self.accelerator.reduce(self._sums, "sum").tolist(), self._steps.tolist()
            logs = logs | {name: sums[place] / steps[place] for place, name in enumerate(LOSSES) if steps[place]}
            self._sums.zero_()
            self._steps.zero_()
        super().log(logs, *args, **kwargs)

    def measure(self, model: Any, dataset: Any) -> dict[str, float]:
        """Measure accuracy and recall on the validation situations."""
        return measure_causes(model, self.processing_class, dataset, self.args.per_device_eval_batch_size)
