"""Training RecEC (Gao and others, 2021): the emotion reasoner first, then the generator over the frozen reasoner."""

import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from empcause.data import Dialogue, emotion_id, find_corpus, load_dialogues, response_pairs
from empcause.data.batching import EpochBatchSampler, PaddedBatchSampler
from empcause.data.origin import Origin, origin
from empcause.errors import UserError
from empcause.generator import CauseCache
from empcause.metrics import BertScore, emotion_correct, perplexity
from empcause.outputs import checksum
from empcause.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Range
from empcause.systems.recec import (
    CAUSES,
    EncodedPair,
    RecEC,
    RecECConfig,
    RecECReasoner,
    RecECReasonerConfig,
    answer_pairs,
    collate,
    encode_pair,
    load_reasoner,
    pair_nll,
    published_perplexity,
    read_pairs,
)
from empcause.systems.recec.configuration import REASONER_FIELDS, SHORTEST
from empcause.systems.vocabulary import load_vectors, train_word_tokenizer
from empcause.training.card import model_card
from empcause.training.common import StageTrainer, StageTrainingArguments, draw_samples, finish, set_environment
from empcause.training.fingerprint import digest
from empcause.training.folder import find_checkpoint, in_output_folder

logger = logging.get_logger(__name__)

# Special tokens, which have the first ids.
SPECIAL_TOKENS = {
    "pad_token": "<PAD>",
    "bos_token": "<BOS>",
    "eos_token": "<EOS>",
    "unk_token": "<UNK>",
    "cls_token": "<CLS>",
    "sep_token": "<SEP>",
}

# Options with the names that they have in the configuration.
_SIZES = ("hidden_size", "attention_size", "ffn_size", "num_layers", "num_heads")

# Folder of the reasoner in that of the whole system.
REASONER = "reasoner"

# Number of validation contexts that are answered where BERTScore is watched, and the greatest length of an answer in tokens.
_ANSWERED, _LONGEST_ANSWER = 500, 20


@dataclass
class RecECTrainingArguments(StageTrainingArguments):
    """Options of RecEC's training; the defaults are the authors' where these are not faults.

    Those without `reasoner_` in their names are the generator's where both stages have one of that kind.
    """

    figures: ClassVar = ("bertscore_f", "perplexity", "nll_per_token")
    ranges: ClassVar = StageTrainingArguments.ranges | {
        "max_length": Range(SHORTEST),
        **dict.fromkeys(_SIZES, COUNT),
        "dropout": SHARE,
        "tokens_per_batch": COUNT,
        "reasoner_learning_rate": NOT_NEGATIVE,
        "reasoner_epochs": POSITIVE,
        "reasoner_tokens_per_batch": COUNT,
        "max_train_samples": COUNT,
        "max_eval_samples": COUNT,
        "bertscore_layer": COUNT,
    }
    refused: ClassVar = StageTrainingArguments.refused | {
        "per_device_train_batch_size": "batches have as many texts as tokens_per_batch allows",
        "dataloader_drop_last": "batches have as many texts as tokens_per_batch allows",
        "gradient_checkpointing": "RecEC is too small to need it",
        "activation_checkpointing": "RecEC is too small to need it",
    }

    output_dir: str | None = field(
        default="runs/recec",
        metadata={"help": "folder for the checkpoints and the finished model; the reasoner's is in it"},
    )
    reasoner: str | None = field(
        default=None, metadata={"help": "folder of a trained reasoner to build on; default: train one first"}
    )
    causes: str = field(
        default="speaker",
        metadata={
            "help": "what counts as causes: every turn of the speaker, the last turn, or what the extractor says of each word",
            "choices": list(CAUSES),
        },
    )
    extractor: str | None = field(
        default="runs/extractor",
        metadata={"help": "folder of the frozen extractor; needed with causes extractor alone"},
    )
    gate: str = field(
        default="soft",
        metadata={
            "help": "how the decoder attends to causes: weighted by their probability, or to likely causes alone",
            "choices": ["soft", "hard"],
        },
    )
    published: bool = field(
        default=False,
        metadata={"help": "train and choose models as the published code does, with its faults, on the test split"},
    )
    decoding: str = field(
        default="sampling",
        metadata={
            "help": "how the finished model answers: sampling (top-k 3, temperature 0.6) as published, or greedy",
            "choices": ["sampling", "greedy"],
        },
    )
    embeddings: str | None = field(
        default=None,
        metadata={"help": "file of word vectors (text as GloVe's, or NAME.npy beside NAME.txt); default: random ones"},
    )
    hidden_size: int = field(default=300, metadata={"help": "width of states and word vectors"})
    attention_size: int = field(default=512, metadata={"help": "width of queries, keys and values, all heads together"})
    ffn_size: int = field(default=1200, metadata={"help": "inner width of feed-forward layers"})
    num_layers: int = field(
        default=2, metadata={"help": "number of blocks of the generator's encoder, and of its decoder"}
    )
    num_heads: int = field(default=2, metadata={"help": "number of attention heads of the generator"})
    dropout: float = field(default=0.1, metadata={"help": "dropout probability"})
    max_length: int = field(
        default=512, metadata={"help": "longest context, and longest response, in tokens; oldest turns are dropped"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on this many responses, drawn by the seed; default: all"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "validate on this many responses, drawn by the seed; default: all"}
    )
    bertscore_model: str | None = field(
        default="roberta-large",
        metadata={"help": "encoder for BERTScore, by name or folder; used if metric_for_best_model is bertscore_f"},
    )
    bertscore_layer: int | None = field(
        default=None, metadata={"help": "layer of bertscore_model; default: the one that bert-score recommends"}
    )
    tokens_per_batch: int = field(
        default=4096, metadata={"help": "greatest size of a batch: number of texts times tokens of the longest one"}
    )
    reasoner_tokens_per_batch: int = field(default=8192, metadata={"help": "the same for the reasoner"})
    learning_rate: float = field(default=5e-4, metadata={"help": "initial learning rate of the generator"})
    reasoner_learning_rate: float = field(default=1e-5, metadata={"help": "initial learning rate of the reasoner"})
    num_train_epochs: float = field(default=80, metadata={"help": "passes over the training responses"})
    reasoner_epochs: float = field(default=25, metadata={"help": "passes of the reasoner over their contexts"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "learning rate schedule"})
    adam_beta2: float = field(default=0.997, metadata={"help": "beta2 of the optimiser"})
    adam_epsilon: float = field(default=1e-9, metadata={"help": "epsilon of the optimiser"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "greatest norm of the gradients; 0: any"})
    label_smoothing_factor: float = field(
        default=0.1, metadata={"help": "share of every label of an emotion or a word that is spread over the others"}
    )
    seed: int = field(default=1024, metadata={"help": "seed of the weights, of dropout and of the batches' order"})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "dialogues per batch in evaluation"})
    metric_for_best_model: str | None = field(
        default="bertscore_f",
        metadata={
            "help": "validation figure that early stopping and the choice of the generator watch: bertscore_f of 500 answers, "
            "perplexity or nll_per_token; the reasoner's is its accuracy"
        },
    )

    def __post_init__(self) -> None:
        self.higher_is_better = str(self.metric_for_best_model).removeprefix("eval_") == "bertscore_f"  # type: ignore[misc]
        if self.published and self.gate == "hard":
            self.load_best_model_at_end = False  # the published code forgets the best figure after every epoch
        super().__post_init__()
        if self.world_size > 1:
            raise UserError("RecEC is trained in one process; start the command without torchrun.")
        if self.causes == "extractor" and not self.extractor:
            raise UserError("causes extractor needs the folder of an extractor.")
        if self.higher_is_better and not self.bertscore_model:
            raise UserError("metric_for_best_model bertscore_f needs bertscore_model; or give perplexity.")


@dataclass(frozen=True)
class ValidationPairs:
    """Validation dialogues with their responses, and the same encoded."""

    pairs: Sequence[Dialogue]
    encoded: Sequence[EncodedPair]


@dataclass(frozen=True)
class TrainingData:
    """What both stages learn from.

    Attributes:
        origin: where the dialogues are from.
        emotions: names of the emotions, by their ids.
        texts: the texts whose words are the vocabulary.
        train, valid: dialogues with their responses.
        digests: digests of these, by what they are.
        described: how many dialogues there are, as a part of a sentence.
    """

    origin: Origin
    emotions: tuple[str, ...]
    texts: Sequence[str]
    train: Sequence[Dialogue]
    valid: Sequence[Dialogue]
    digests: dict[str, str | None]
    described: str


@in_output_folder("empcause train recec")
def train_recec(args: RecECTrainingArguments) -> dict[str, float]:
    """Train a reasoner and then a generator over it; the best generator, with the reasoner in it, is in `args.output_dir` then.

    The reasoner is trained in the folder `reasoner` of the output folder, with checkpoints of its own. A training that is resumed
    goes on in the stage in which it was interrupted.

    Args:
        args: the options.

    Returns:
        Figures of the generator on the validation responses, and the reasoner's accuracy on their contexts, by name.

    Raises:
        UserError: data, model, extractor or checkpoint are missing or malformed, or the training diverged.
        Interrupted: Ctrl-C or SIGTERM.
    """
    set_environment()
    checkpoint = find_checkpoint(args)
    bertscore = None
    if args.higher_is_better:
        assert args.bertscore_model is not None
        bertscore = BertScore(args.bertscore_model, args.bertscore_layer)
    data = load_training_data(args)
    folder = args.reasoner
    if not folder:
        folder = os.path.join(str(args.output_dir), REASONER)
        train_reasoner(reasoner_arguments(args, folder), data)
    reasoner, tokenizer = load_reasoner(folder)
    config = make_config(args, tokenizer, data.emotions)
    _check_reasoner(folder, reasoner.config, config)
    set_seed(args.seed)
    model = RecEC(config)
    model.encoder.reasoner.load_state_dict(reasoner.state_dict())
    weights = [checksum(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    made_from = data.digests | {"tokenizer": _tokenizer_digest(tokenizer), "reasoner": digest(weights)}
    made_from |= _set_vectors(args, model, tokenizer)
    if args.decoding == "greedy":
        model.answer_greedily()
    training, validation = (encode_pairs(tokenizer, pairs, config) for pairs in (data.train, data.valid))
    trainer = GeneratorTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=[each.item for each in training],
        eval_dataset=ValidationPairs(data.valid, validation),
        bertscore=bertscore,
        made_from=made_from,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.measure(model, trainer.eval_dataset)
    metrics |= measure_accuracy(model.encoder.reasoner, tokenizer, trainer.eval_dataset, args)
    abilities = (
        f"Finds the emotion of a dialogue and answers it with attention to the emotion's causes ({args.gate} gate)."
    )
    card = model_card(trainer, metrics, "RecEC", abilities, data.described, data.origin)
    return finish(trainer, metrics, card)


@in_output_folder("empcause train recec")
def train_reasoner(args: RecECTrainingArguments, data: TrainingData) -> dict[str, float]:
    """Train a reasoner; the best one (as published: the last one) is in `args.output_dir` then.

    Args:
        args: the options of the reasoner's training (`reasoner_arguments`).
        data: what it learns from.

    Returns:
        Its accuracy on the validation contexts, by name.

    Raises:
        UserError: a checkpoint is malformed, or the training diverged.
        Interrupted: Ctrl-C or SIGTERM.
    """
    checkpoint = find_checkpoint(args)
    tokenizer = train_word_tokenizer(data.texts, SPECIAL_TOKENS, min_count=1 if args.published else 2)
    config = make_config(args, tokenizer, data.emotions)
    set_seed(args.seed)
    model = RecECReasoner(config.reasoner_config())
    made_from = data.digests | {"tokenizer": _tokenizer_digest(tokenizer)} | _set_vectors(args, model, tokenizer)
    training, validation = (encode_pairs(tokenizer, pairs, config) for pairs in (data.train, data.valid))
    items = [
        {
            "input_ids": each.input_ids,
            "cause_labels": each.cause_labels,
            "emotion_labels": emotion_id(pair.emotion, data.emotions),
        }
        for each, pair in zip(training, data.train, strict=True)
    ]
    trainer = ReasonerTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=items,
        eval_dataset=ValidationPairs(data.valid, validation),
        made_from=made_from,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.measure(model, trainer.eval_dataset)
    abilities = "Finds the emotion of a dialogue and the turns that caused it: the first stage of RecEC."
    card = model_card(trainer, metrics, "RecEC's emotion reasoner", abilities, data.described, data.origin)
    return finish(trainer, metrics, card)


def reasoner_arguments(args: RecECTrainingArguments, folder: str) -> RecECTrainingArguments:
    """Make the options of the reasoner's training of those of the whole.

    Args:
        args: the options of the whole training.
        folder: the reasoner's output folder.
    """
    own = copy(args)
    own.output_dir = folder
    own.learning_rate, own.num_train_epochs = args.reasoner_learning_rate, args.reasoner_epochs
    own.tokens_per_batch = args.reasoner_tokens_per_batch
    own.metric_for_best_model = "accuracy"
    own.higher_is_better = own.greater_is_better = True  # type: ignore[misc]
    if "mode" in (args.lr_scheduler_kwargs or {}):
        own.lr_scheduler_kwargs = {**args.lr_scheduler_kwargs, "mode": "max"}
    if str(args.resume_from_checkpoint or "false").lower() != "false":
        own.resume_from_checkpoint = "true"  # a folder that is named is one of the generator's checkpoints
    if args.published:
        own.load_best_model_at_end = False
    return own


def load_training_data(args: RecECTrainingArguments) -> TrainingData:
    """Load the dialogues, with the extractor's causes where they are needed.

    Raises:
        UserError: data or extractor are missing or malformed, or no turn is answered in a split.
    """
    corpus, _ = find_corpus(args.data)
    splits = ("train", "test" if args.published else "valid")
    dialogues = [load_dialogues(split, args.data) for split in splits]
    about = origin(args.data, *dialogues)
    chosen, numbers = [], []
    for split, of_split, number in zip(splits, dialogues, (args.max_train_samples, args.max_eval_samples), strict=True):
        pairs = response_pairs(of_split)
        if not pairs:
            raise UserError(f"No turn is answered in the split {split} of {about.name}; give other --data.")
        chosen.append(draw_samples(pairs, number, args.seed))
        numbers.append(f"{len(chosen[-1]):,} of {len(pairs):,}")
    train, valid = chosen
    digests: dict[str, str | None] = {
        "set of training data": digest(train),
        "set of validation data": digest(valid),
        "extractor": None,
    }
    if args.causes == "extractor":
        assert args.extractor is not None
        cache = CauseCache(args.extractor)
        found = cache.get([pair.text for pair in (*train, *valid)], progress=True)
        pairs = [replace(pair, causes=causes) for pair, causes in zip((*train, *valid), found, strict=True)]
        train, valid = pairs[: len(train)], pairs[len(train) :]
        digests["extractor"] = cache.digest
    if args.published:  # the published vocabulary holds the words of all splits
        dialogues.append(load_dialogues("valid", args.data))
    texts = [
        turn for of_split in dialogues[: None if args.published else 1] for each in of_split for turn in each.turns
    ]
    described = f"{numbers[0]} responses, validated on {numbers[1]}"
    if args.published:
        described += " of the test split, on which models were chosen as the published code does it"
    return TrainingData(about, corpus.emotions, texts, train, valid, digests, described)


def make_config(
    args: RecECTrainingArguments, tokenizer: PreTrainedTokenizerBase, emotions: Sequence[str]
) -> RecECConfig:
    """Make the configuration of the whole system, of which the reasoner's is a part.

    Raises:
        UserError: sizes do not fit each other.
    """
    return RecECConfig(
        vocab_size=len(tokenizer),
        causes=args.causes,
        gate=args.gate,
        published=args.published,
        dropout=args.dropout,
        max_tokens=args.max_length,
        id2label=dict(enumerate(emotions)),
        decoder_start_token_id=tokenizer.bos_token_id,
        **{name: getattr(args, name) for name in _SIZES},
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map])


def _set_vectors(
    args: RecECTrainingArguments, model: RecEC | RecECReasoner, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str | None]:
    """Start the words of a new model at the vectors that the options name.

    Returns:
        The digest of the vectors by what they are, None without vectors.
    """
    if args.embeddings is None:
        return {"word vectors": None}
    ids, vectors = load_vectors(args.embeddings, tokenizer.get_vocab(), args.hidden_size)
    model.set_word_vectors(torch.from_numpy(ids), torch.from_numpy(vectors))
    return {"word vectors": digest([ids.tolist(), vectors.tobytes()])}


def _check_reasoner(folder: str, found: RecECReasonerConfig, expected: RecECReasonerConfig) -> None:
    """Refuse a reasoner that was trained with other settings than those of the generator over it.

    Raises:
        UserError: a setting differs.
    """
    for name in REASONER_FIELDS:
        has, needed = getattr(found, name), getattr(expected, name)
        if has != needed:
            raise UserError(
                f"The reasoner in {folder} has {name} {has}, this training {needed}; give the same, or leave out reasoner."
            )


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Dialogue], config: RecECReasonerConfig
) -> list[EncodedPair]:
    """Encode dialogues with their responses, and warn of turns and responses that do not fit."""
    encoded = [encode_pair(tokenizer, pair, config) for pair in pairs]
    dropped, cut = sum(each.dropped_turns for each in encoded), sum(each.cut_response for each in encoded)
    if dropped or cut:
        logger.warning(
            f"{dropped} oldest turns and the ends of {cut} responses of {len(pairs)} dialogues did not fit into "
            f"{config.max_tokens} tokens."
        )
    return encoded


def measure_accuracy(
    reasoner: RecECReasoner,
    tokenizer: PreTrainedTokenizerBase,
    validation: ValidationPairs,
    args: RecECTrainingArguments,
) -> dict[str, float]:
    """Measure the emotion accuracy of a reasoner on the contexts of dialogues, in [0, 1].

    Raises:
        UserError: the reasoner's probabilities are not finite, or an emotion is unknown to it.
    """
    found = read_pairs(reasoner, tokenizer, validation.encoded, args.per_device_eval_batch_size)
    gold = [emotion_id(pair.emotion, reasoner.emotions) for pair in validation.pairs]
    return {"accuracy": float(emotion_correct([probs for probs, _ in found], gold).mean())}


class RecECTrainer(StageTrainer):
    """Makes batches by their number of tokens, padding included, and lets the model smooth the labels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_smoother: Any = None  # the models smooth labels themselves
        self.data_collator: Any = partial(collate, pad_token_id=self.processing_class.pad_token_id)

    def make_batches(
        self, lengths: Sequence[int], seed: int, phases: Sequence[Sequence[int]] | None
    ) -> EpochBatchSampler:
        """Make the sampler of the training batches: `tokens_per_batch` tokens at most, padding included.

        Raises:
            UserError: a dialogue is longer than a batch may be.
        """
        lengths = [max(len(item["input_ids"]), len(item.get("labels", ()))) for item in self.train_dataset]
        if max(lengths, default=0) > self.args.tokens_per_batch:
            raise UserError(
                f"a batch has {self.args.tokens_per_batch} tokens, but a dialogue {max(lengths)}; give more "
                "tokens_per_batch and reasoner_tokens_per_batch, or a smaller max_length."
            )
        return PaddedBatchSampler(lengths, seed, self.args.tokens_per_batch)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's loss, with labels smoothed as the options say."""
        return super().compute_loss(model, inputs | {"smoothing": self.args.label_smoothing_factor}, *args, **kwargs)


class ReasonerTrainer(RecECTrainer):
    """Trains a reasoner, and evaluates it by its accuracy."""

    def measure(self, model: Any, dataset: Any) -> dict[str, float]:
        """Measure the accuracy on the validation contexts."""
        return measure_accuracy(model, self.processing_class, dataset, self.args)


class GeneratorTrainer(RecECTrainer):
    """Trains a generator, and evaluates it by its perplexity, and by BERTScore where that decides.

    Args:
        bertscore: compares answers with responses; None if this is not wanted.
        **kwargs: arguments of `StageTrainer`.
    """

    def __init__(self, bertscore: BertScore | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bertscore = bertscore

    def measure(self, model: Any, dataset: Any) -> dict[str, float]:
        """Measure the perplexity on the validation responses, and the BERTScore F of answers in place of 500 of them."""
        size, tokenizer = self.args.per_device_eval_batch_size, self.processing_class
        nll, tokens = (
            np.array(column) for column in zip(*pair_nll(model, tokenizer, dataset.encoded, size), strict=True)
        )
        metrics = {"perplexity": perplexity(nll, tokens), "nll_per_token": float(nll.sum() / tokens.sum())}
        if self.args.published:
            smoothing = self.args.label_smoothing_factor
            metrics["published_perplexity"] = published_perplexity(model, tokenizer, dataset.encoded, size, smoothing)
        if self.bertscore is not None:
            chosen = np.random.default_rng(0).permutation(len(dataset.pairs))[:_ANSWERED]
            contexts = [dataset.encoded[index] for index in chosen]
            answers = answer_pairs(model, tokenizer, contexts, size, _LONGEST_ANSWER)
            references = [dataset.pairs[index].response for index in chosen]
            metrics["bertscore_f"] = float(self.bertscore(answers, references)[:, 2].mean())
        return metrics
