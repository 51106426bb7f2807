"""Training EmpDG, a published comparison system (Li et al., COLING 2020): its generator, then that against discriminators."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from empcause.checkpoints import load_pretrained
from empcause.data import Dialogue, emotion_id, find_corpus, load_dialogues, response_pairs
from empcause.data.batching import EpochBatchSampler, LengthBatchSampler
from empcause.data.dialogue import LISTENER, SPEAKER
from empcause.data.origin import Origin, origin
from empcause.errors import UserError
from empcause.metrics import perplexity
from empcause.outputs import checksum
from empcause.ranges import COUNT, NOT_NEGATIVE, SEED, SHARE, Range
from empcause.systems.empdg import (
    SPECIAL_TOKENS,
    AdversarialEmpDG,
    AdversarialEmpDGConfig,
    EmpDG,
    EmpDGConfig,
    EncodedPair,
    Encoder,
    collate,
    measure_pairs,
    spell,
    stack,
)
from empcause.systems.empdg.modeling import CONTEXT
from empcause.systems.lexicon import VADER, emotion_words, load_lexicon, load_tagger
from empcause.systems.vocabulary import encode_words, load_vectors, train_word_tokenizer
from empcause.training.card import model_card
from empcause.training.common import StageTrainer, StageTrainingArguments, draw_samples, finish, set_environment
from empcause.training.fingerprint import digest
from empcause.training.folder import STATE, find_checkpoint, in_output_folder

# Folders of the first two phases of a training with discriminators, in that of the whole.
GENERATOR, DISCRIMINATORS = "generator", "discriminators"

# Steps of a round of the joint training: one of the discriminators, then five of the generator.
ROUND = 6

# Greatest length of the answers that the discriminators see, in words.
_LONGEST_ANSWER = 31


@dataclass
class EmpDGTrainingArguments(StageTrainingArguments):
    """Options of EmpDG's training; the defaults are its authors', with the faults of the published code corrected.

    The learning rate rises for `warmup_steps` steps to `learning_rate`, and then falls with the inverse square root of the step
    (Noam). With `discriminators`, the options that each training has are those of the generator's own training.
    """

    figures: ClassVar = ("perplexity", "nll_per_token")
    higher_is_better: ClassVar = False
    ranges: ClassVar = StageTrainingArguments.ranges | {
        "hidden_size": Range(4),
        "attention_size": COUNT,
        "num_attention_heads": COUNT,
        "filter_size": COUNT,
        "dropout": SHARE,
        "initial_std": Range(0),
        "ranking_seed": SEED,
        "max_train_samples": COUNT,
        "max_eval_samples": COUNT,
        "discriminator_steps": COUNT,
        "discriminator_learning_rate": NOT_NEGATIVE,
        "penalty_weight": NOT_NEGATIVE,
        "adversarial_weight": NOT_NEGATIVE,
        "joint_rounds": COUNT,
        "joint_eval_rounds": COUNT,
    }

    refused: ClassVar = StageTrainingArguments.refused | dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing"),
        "EmpDG has one layer, which is not worth computing twice",
    )

    output_dir: str | None = field(
        default="runs/empdg", metadata={"help": "folder for the checkpoints and the finished model"}
    )
    emotion_lexicon: str = field(
        default=VADER,
        metadata={
            "help": "emotion words: `vader` (package vaderSentiment), or a file with one word a line or NRC's format"
        },
    )
    adjectives: str | None = field(
        default=None,
        metadata={"help": "folder of a spaCy model whose adjectives are emotion words too; default: they are not"},
    )
    embeddings: str | None = field(
        default=None,
        metadata={"help": "word vectors as text or .npy, of hidden_size numbers; default: drawn at random"},
    )
    pairs: str = field(
        default="all",
        metadata={
            "help": "train on all responses, or as published on those that a speaker and a listener turn follow (`empdg`)",
            "choices": ["all", "empdg"],
        },
    )
    vocabulary: str = field(
        default="train",
        metadata={
            "help": "words that the training split has twice, or as published all words of all splits (`everything`)",
            "choices": ["train", "everything"],
        },
    )
    copy_softmax: str = field(
        default="once",
        metadata={"help": "softmax of the copy weights: once, or twice as published", "choices": ["once", "twice"]},
    )
    ffn_last_relu: bool = field(default=False, metadata={"help": "end the feed-forward layers in a ReLU, as published"})
    initial_std: float | None = field(
        default=None,
        metadata={"help": "standard deviation of new word vectors (published: 0.01); default: hidden_size^-0.5"},
    )
    dropout: float = field(default=0.0, metadata={"help": "probability of dropout after embeddings and layers"})
    hidden_size: int = field(default=300, metadata={"help": "width of the states and the word vectors"})
    attention_size: int = field(default=40, metadata={"help": "width of queries, keys and values over all heads"})
    num_attention_heads: int = field(default=2, metadata={"help": "number of attention heads"})
    filter_size: int = field(default=50, metadata={"help": "channels of the feed-forward convolutions"})
    empdg_ranking: str = field(
        default="random",
        metadata={
            "help": "how emotion words are ranked as causes: at random, in the text's order, or by the attention to them; "
            "`context`: all content words by the attention to them",
            "choices": ["random", "order", "attention", "context"],
        },
    )
    empdg_fill: bool = field(
        default=False, metadata={"help": "rank other content words behind the emotion words, at random"}
    )
    ranking_seed: int = field(default=0, metadata={"help": "seed of random rankings"})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on this many responses, drawn by the seed; default: all"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "validate on this many responses, drawn by the seed; default: all"}
    )
    discriminators: bool = field(
        default=False,
        metadata={"help": "train the generator, then two discriminators of its answers, then all of them together"},
    )
    discriminator_steps: int = field(
        default=1000, metadata={"help": "steps in which the discriminators are trained alone"}
    )
    discriminator_learning_rate: float = field(
        default=1e-4, metadata={"help": "learning rate of the discriminators, which is constant"}
    )
    penalty_weight: float = field(default=0.1, metadata={"help": "weight of the discriminators' gradient penalty"})
    adversarial: str = field(
        default="straight_through",
        metadata={
            "help": "how the discriminators' scores reach the generator: through the words that it chooses, or as published "
            "as a constant, which teaches it nothing",
            "choices": ["straight_through", "constant"],
        },
    )
    adversarial_weight: float = field(
        default=1.0, metadata={"help": "weight of the discriminators' scores in the generator's loss"}
    )
    batched_decoding: str = field(
        default="own",
        metadata={
            "help": "from whose words each answer that the discriminators see goes on: its own, or as published those of the "
            "batch's first answer",
            "choices": ["own", "first"],
        },
    )
    joint_rounds: int = field(
        default=5000,
        metadata={
            "help": "greatest number of rounds of the joint training: a step of the discriminators, five of the generator"
        },
    )
    joint_eval_rounds: int = field(
        default=200,
        metadata={
            "help": "rounds between evaluations and checkpoints of the joint training; it keeps the best accuracy"
        },
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "dialogues per batch and device in training"}
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "dialogues per batch and device in evaluation"}
    )
    # 300^-0.5 8000^-0.5, at which Noam's schedule arrives at step 8,000.
    learning_rate: float = field(default=6.4549722e-4, metadata={"help": "highest learning rate, that of warmup_steps"})
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(default=8000, metadata={"help": "steps in which the learning rate rises"})
    adam_beta2: float = field(default=0.98, metadata={"help": "decay of the optimiser's second moments"})
    adam_epsilon: float = field(default=1e-9, metadata={"help": "epsilon of the optimiser"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip gradients to this norm; 0: no clipping"})
    label_smoothing_factor: float = field(
        default=0.1, metadata={"help": "share of a word's target that is spread over the vocabulary"}
    )
    max_steps: int = field(default=40000, metadata={"help": "greatest number of optimiser steps"})
    eval_strategy: str = field(default="steps", metadata={"help": "when to evaluate: epoch, steps or no"})
    eval_steps: float | None = field(default=2000, metadata={"help": "steps between evaluations"})
    eval_delay: float = field(default=14000, metadata={"help": "step of the first evaluation that counts"})
    save_strategy: str = field(default="steps", metadata={"help": "when to save a checkpoint: epoch, steps or no"})
    save_steps: float = field(default=2000, metadata={"help": "steps between checkpoints"})
    early_stopping_patience: int = field(
        default=3, metadata={"help": "end after this many evaluations without a better figure; 0: never end early"}
    )
    metric_for_best_model: str | None = field(
        default="perplexity", metadata={"help": "validation figure that early stopping watches"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_scheduler_type == SchedulerType.INVERSE_SQRT and self.lr_scheduler_kwargs:
            raise UserError("lr_scheduler_type inverse_sqrt takes no lr_scheduler_kwargs here; give warmup_steps.")
        if self.discriminators:
            self._check_adversarial()
            return
        for each in fields(self):
            if each.name in _ADVERSARIAL and getattr(self, each.name) != each.default:
                raise UserError(f"{each.name} has no effect without discriminators; give discriminators true too.")

    def _check_adversarial(self) -> None:
        """Refuse options with which the joint training could not do what they say."""
        if self.lr_scheduler_type != SchedulerType.INVERSE_SQRT or self.warmup_steps < 1:
            raise UserError(
                "The joint training goes on with the generator's rate; with discriminators give lr_scheduler_type "
                "inverse_sqrt and warmup_steps of at least 1."
            )
        if self.world_size > 1:
            raise UserError("EmpDG with discriminators is trained in one process; start the command without torchrun.")
        if self.gradient_accumulation_steps > 1:
            raise UserError("With discriminators, each step takes one batch; leave out gradient_accumulation_steps.")
        if self.bf16 or self.fp16:
            raise UserError("EmpDG with discriminators is trained in float32; leave out bf16 and fp16.")
        if self.torch_compile:
            raise UserError("EmpDG with discriminators cannot be compiled; leave out torch_compile.")
        if self.resume_from_checkpoint and str(self.resume_from_checkpoint).lower() not in ("true", "false"):
            raise UserError(
                "With discriminators, give resume_from_checkpoint true: each phase has its own checkpoints."
            )


_ADVERSARIAL = (
    "discriminator_steps discriminator_learning_rate penalty_weight adversarial adversarial_weight batched_decoding "
    "joint_rounds joint_eval_rounds"
).split()


@dataclass(frozen=True)
class TrainingData:
    """What all phases learn from.

    Attributes:
        origin: where the dialogues are from.
        emotions: names of the emotions, by their ids.
        tokenizer: the words.
        encode: encodes dialogues; it has the lexicon and the tagger.
        train, valid: responses, encoded, each with the id of its emotion.
        responses: the texts of the training responses, each with the speaker's next turn, "" where there is none.
        digests: digests of these, by what they are.
        described: how many responses there are, as a part of a sentence.
    """

    origin: Origin
    emotions: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    encode: Encoder
    train: Sequence[tuple[EncodedPair, int]]
    valid: Sequence[tuple[EncodedPair, int]]
    responses: Sequence[tuple[str, str]]
    digests: dict[str, str | None]
    described: str


@in_output_folder("empcause train empdg")
def train_empdg(args: EmpDGTrainingArguments) -> dict[str, float]:
    """Train EmpDG; the best generator is in `args.output_dir` then.

    With discriminators, the generator alone is trained in the folder `generator` of the output folder and the discriminators
    alone in the folder `discriminators`, before the joint training. Each phase has checkpoints of its own, and a training that is
    resumed goes on in the phase in which it was interrupted.

    Args:
        args: the options.

    Returns:
        Perplexity, NLL per token (in nats) and emotion accuracy on the validation responses, by name.

    Raises:
        UserError: data, lexicon, vectors or checkpoint are missing or malformed, or the training diverged.
        Interrupted: Ctrl-C or SIGTERM.
    """
    set_environment()
    checkpoint = find_checkpoint(args)
    data = load_training_data(args)
    if not args.discriminators:
        return _train_generator(args, data, checkpoint)
    folder = Path(str(args.output_dir))
    first = copy(args)
    first.output_dir, first.discriminators = str(folder / GENERATOR), False
    _train_first(first, data)
    _train_discriminators(discriminator_arguments(args, str(folder / DISCRIMINATORS)), data, folder / GENERATOR)
    return _train_jointly(joint_arguments(args), data, folder, checkpoint)


def load_training_data(args: EmpDGTrainingArguments) -> TrainingData:
    """Load and encode the dialogues, with the vocabulary and the emotion words that the options say.

    Raises:
        UserError: data, lexicon or tagger are missing or malformed, or no turn is answered in a split.
    """
    corpus, _ = find_corpus(args.data)
    lexicon = load_lexicon(args.emotion_lexicon)
    tagger = load_tagger(args.adjectives) if args.adjectives else None
    dialogues = {split: load_dialogues(split, args.data) for split in ("train", "valid")}
    about = origin(args.data, *dialogues.values())
    found = {split: _pairs(each, args.pairs) for split, each in dialogues.items()}
    for split, pairs in found.items():
        if not pairs:
            raise UserError(f"No turn is answered in the split {split} of {about.name}; give other --data.")
    train = draw_samples(found["train"], args.max_train_samples, args.seed)
    valid = draw_samples(found["valid"], args.max_eval_samples, args.seed)
    if args.vocabulary == "everything":
        everything = [*dialogues["train"], *dialogues["valid"], *load_dialogues("test", args.data)]
        texts = [text for each in everything for text in (*each.turns, each.situation)]
        tokenizer = train_word_tokenizer(texts, SPECIAL_TOKENS, min_count=1)
    else:
        texts = [turn for each in dialogues["train"] for turn in each.turns]
        tokenizer = train_word_tokenizer(texts, SPECIAL_TOKENS)
    encode = Encoder(tokenizer, lexicon, tagger)
    training, validation = encode([pair for pair, _ in train]), encode([pair for pair, _ in valid])
    responses = [(pair.response, feedback) for pair, feedback in train]
    digests: dict[str, str | None] = {
        "tokenizer": digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]),
        "set of training data": digest(pair for pair, _ in train),
        "set of validation data": digest(pair for pair, _ in valid),
        "set of emotion words": digest(each.emotion_places for each in (*training, *validation)),
    }
    if args.discriminators:
        digests["set of next turns"] = digest(responses)
    described = f"{len(train):,} of {len(found['train']):,} responses, validated on {len(valid):,} of "
    described += f"{len(found['valid']):,}"

    def with_emotions(encoded: Sequence[EncodedPair], pairs: Sequence[Any]) -> list[tuple[EncodedPair, int]]:
        emotions = [emotion_id(pair.emotion, corpus.emotions) for pair, _ in pairs]
        return list(zip(encoded, emotions, strict=True))

    return TrainingData(
        about,
        corpus.emotions,
        tokenizer,
        encode,
        with_emotions(training, train),
        with_emotions(validation, valid),
        responses,
        digests,
        described,
    )


def _train_generator(args: EmpDGTrainingArguments, data: TrainingData, checkpoint: str | None) -> dict[str, float]:
    """Train the generator alone; the best one is in `args.output_dir` then."""
    set_seed(args.seed)
    model = EmpDG(
        EmpDGConfig(
            vocab_size=len(data.tokenizer),
            emotion_words=sorted(data.encode.lexicon),
            adjectives=str(Path(args.adjectives).resolve()) if args.adjectives else None,
            ranking=args.empdg_ranking,
            fill=args.empdg_fill,
            id2label=dict(enumerate(data.emotions)),
            **{name: getattr(args, name) for name in _MODEL_OPTIONS},
        )
    )
    vectors: bytes | None = None
    if args.embeddings:
        ids, values = load_vectors(args.embeddings, data.tokenizer.get_vocab(), args.hidden_size)
        with torch.no_grad():
            model.words.weight[torch.from_numpy(ids)] = torch.from_numpy(values)
        vectors = ids.tobytes() + values.tobytes()
    trainer = EmpDGTrainer(
        model=model,
        args=args,
        processing_class=data.tokenizer,
        train_dataset=[encoded.item(emotion) for encoded, emotion in data.train],
        eval_dataset=data.valid,
        data_collator=partial(collate, pad_token_id=model.config.pad_token_id),
        made_from=data.digests | {"set of word vectors": digest([vectors])},
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return _finish(trainer, data, "without its discriminators")


def _finish(trainer: "EmpDGTrainer", data: TrainingData, how: str) -> dict[str, float]:
    """Measure and save the generator that a trainer has, and say how it was trained."""
    metrics = trainer.measure(trainer.model, trainer.eval_dataset)
    abilities = (
        f"EmpDG (Li et al., COLING 2020) {how}: it tells the emotion of a dialogue and answers it, and its emotion words are "
        f"those of a lexicon of {len(data.encode.lexicon):,} words, which `config.json` holds. The terms of the lexicon apply to "
        "that file."
    )
    return finish(trainer, metrics, model_card(trainer, metrics, "EmpDG", abilities, data.described, data.origin))


@in_output_folder("empcause train empdg")
def _train_first(args: EmpDGTrainingArguments, data: TrainingData) -> dict[str, float]:
    """Train the generator alone, as the first phase, in a folder of its own."""
    return _train_generator(args, data, find_checkpoint(args))


def discriminator_arguments(args: EmpDGTrainingArguments, folder: str) -> EmpDGTrainingArguments:
    """Make the options of the second phase of those of the whole: so many steps at one rate, which nothing evaluates.

    Args:
        args: the options of the whole training.
        folder: the phase's output folder.
    """
    own = copy(args)
    own.output_dir = folder
    own.max_steps, own.learning_rate = args.discriminator_steps, args.discriminator_learning_rate
    own.lr_scheduler_type, own.warmup_steps = SchedulerType.CONSTANT, 0
    own.adam_beta1, own.adam_beta2, own.adam_epsilon = *_BETAS, _EPSILON
    own.eval_strategy, own.load_best_model_at_end = IntervalStrategy.NO, False
    if args.save_strategy != IntervalStrategy.NO:
        own.save_strategy, own.save_steps = IntervalStrategy.STEPS, args.joint_eval_rounds
    return own


# The Adam of the discriminators has torch's defaults.
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def joint_arguments(args: EmpDGTrainingArguments) -> EmpDGTrainingArguments:
    """Make the options of the joint training of those of the whole: it counts in rounds, and watches the emotion accuracy.

    Args:
        args: the options of the whole training.
    """
    own = copy(args)
    own.max_steps = ROUND * args.joint_rounds
    own.metric_for_best_model, own.greater_is_better, own.eval_delay = "accuracy", True, 0
    if args.eval_strategy != IntervalStrategy.NO:
        own.eval_strategy, own.eval_steps = IntervalStrategy.STEPS, ROUND * args.joint_eval_rounds
    if args.save_strategy != IntervalStrategy.NO:
        own.save_strategy, own.save_steps = IntervalStrategy.STEPS, ROUND * args.joint_eval_rounds
    return own


@in_output_folder("empcause train empdg")
def _train_discriminators(args: EmpDGTrainingArguments, data: TrainingData, generator: Path) -> dict[str, float]:
    """Train new discriminators of a generator's answers; both are in `args.output_dir` then.

    Args:
        args: the options of this phase.
        data: what they learn from.
        generator: the folder of the generator, which stays as it is.
    """
    checkpoint = find_checkpoint(args)
    trained = load_pretrained(EmpDG, generator, "EmpDG model", "empcause train empdg", EmpDGConfig.model_type)
    values = {name: value for name, value in trained.config.to_dict().items() if name != "model_type"}
    set_seed(args.seed)
    model = AdversarialEmpDG(AdversarialEmpDGConfig(**values | {"discriminators": True}))
    model.generator.load_state_dict(trained.state_dict())
    items = [item for item in _adversarial_items(data) if len(item["feedback"])]
    if not items:
        raise UserError("The speaker answers no training response; leave out discriminators, or give other --data.")
    trainer = DiscriminatorTrainer(
        model=model,
        args=args,
        processing_class=data.tokenizer,
        encode=data.encode,
        train_dataset=items,
        eval_dataset=data.valid,
        data_collator=partial(_adversarial_collate, pad_token_id=model.config.pad_token_id),
        made_from=data.digests | {"generator": _weights(generator)},
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    abilities = "EmpDG (Li et al., COLING 2020) with discriminators that were trained on its answers, before it learns from them."
    card = model_card(trainer, {}, "EmpDG's discriminators", abilities, data.described, data.origin)
    return finish(trainer, {}, card)


def _train_jointly(
    args: EmpDGTrainingArguments, data: TrainingData, folder: Path, checkpoint: str | None
) -> dict[str, float]:
    """Train a generator and its discriminators together; the best generator is in `args.output_dir` then.

    Args:
        args: the options of the joint training.
        data: what they learn from.
        folder: the folder of the whole, which has those of the phases before.
        checkpoint: from which to go on, or None.
    """
    kind = AdversarialEmpDGConfig.model_type
    model = load_pretrained(
        AdversarialEmpDG, folder / DISCRIMINATORS, "EmpDG with discriminators", "empcause train empdg", kind
    )
    steps = json.loads((folder / GENERATOR / STATE).read_text(encoding="utf-8"))["global_step"]
    set_seed(args.seed)
    trainer = JointTrainer(
        model=model,
        args=args,
        steps_before=steps,
        processing_class=data.tokenizer,
        encode=data.encode,
        train_dataset=list(_adversarial_items(data)),
        eval_dataset=data.valid,
        data_collator=partial(_adversarial_collate, pad_token_id=model.config.pad_token_id),
        made_from=data.digests
        | {"discriminators": _weights(folder / DISCRIMINATORS), "length of the generator's training": str(steps)},
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.keep_generator()
    return _finish(trainer, data, "trained together with its discriminators")


def _weights(folder: Path) -> str:
    return digest(checksum(path) for path in sorted(folder.glob("*.safetensors")))


def _adversarial_items(data: TrainingData) -> Iterator[dict[str, Any]]:
    """Yield the training items with what discriminators read: places of emotion words, and the speaker's next turns."""
    end = np.array([data.tokenizer.eos_token_id], np.int64)
    for (encoded, emotion), texts in zip(data.train, data.responses, strict=True):
        response, feedback = encode_words(data.tokenizer, texts)
        yield encoded.item(emotion) | {
            "unknown": encoded.unknown,
            "positive_places": _places(data.encode, response.words),
            "feedback": np.append(np.array(feedback.ids, np.int64), end if feedback.ids else []).astype(np.int64),
            "feedback_places": _places(data.encode, feedback.words),
        }


def _places(encode: Encoder, words: Sequence[str]) -> NDArray[np.int64]:
    """Places of the emotion words in a text, then that of its end token."""
    return np.array([*emotion_words(words, encode.lexicon, encode.tagger), len(words)], np.int64)


def _adversarial_collate(items: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Make a batch of items; what discriminators read is there for those alone whose response the speaker answers."""
    answered = [place for place, item in enumerate(items) if len(item["feedback"])]
    batch = collate(items, pad_token_id) | {"answered": torch.tensor(answered, dtype=torch.int64)}
    for name, fill in (("positive_places", -1), ("feedback", pad_token_id), ("feedback_places", -1)):
        batch[name] = stack([items[place][name] for place in answered], fill)
    return batch | {"unknown": [items[place]["unknown"] for place in answered]}


_MODEL_OPTIONS = (
    "hidden_size attention_size num_attention_heads filter_size dropout initial_std copy_softmax ffn_last_relu ranking_seed"
).split()


def _pairs(dialogues: Sequence[Dialogue], kind: str) -> list[tuple[Dialogue, str]]:
    """Response pairs, each with the turn with which the speaker goes on, "" where the speaker does not.

    All of them, or those that EmpDG's authors have, whose response is followed by a turn of each of the two.
    """
    found = []
    for dialogue in dialogues:
        listened = _up_to_listener(dialogue)
        shortened = replace(listened, turns=listened.turns[:-2], roles=listened.roles[:-2])
        for pair in response_pairs([dialogue if kind == "all" else shortened]):
            after = len(pair.turns) + 1
            goes_on = dialogue.roles[after : after + 1] == (SPEAKER,)
            found.append((pair, dialogue.turns[after] if goes_on else ""))
    return found


def _up_to_listener(dialogue: Dialogue) -> Dialogue:
    """A dialogue without the turns behind the last one of the listener."""
    places = [place for place, role in enumerate(dialogue.roles, 1) if role == LISTENER]
    last = places[-1] if places else 0
    return replace(dialogue, turns=dialogue.turns[:last], roles=dialogue.roles[:last])


def noam(warmup_steps: int) -> Callable[[int], float]:
    """The schedule of "Attention is all you need", as a share of its highest learning rate.

    Args:
        warmup_steps: the step with the highest rate.

    Returns:
        A function of the number of steps done before, as torch's schedulers call it: the first step has rate `1 / warmup_steps`.
        transformers' `inverse_sqrt` lags one step behind and begins with a step of rate 0.
    """
    return lambda done: min((done + 1) / warmup_steps, (warmup_steps / (done + 1)) ** 0.5)


class EmpDGTrainer(StageTrainer):
    """Sums the losses of a step's items, and evaluates by perplexity and emotion accuracy over all validation responses."""

    loss_is_scaled_for_ga = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_smoother: Any = None  # the model smooths its labels itself

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of the learning rate, for `inverse_sqrt` that of `noam`."""
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if self.args.lr_scheduler_type == SchedulerType.INVERSE_SQRT and warmup:
            scheduler = self.lr_scheduler = LambdaLR(optimizer or self.optimizer, noam(warmup))
        return scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss, summed over the items of all processes and batches of an optimiser step."""
        output = model(**inputs, smoothing=self.args.label_smoothing_factor)
        loss = output.loss * self.accelerator.num_processes  # the gradients' mean over processes is taken
        return (loss, output) if return_outputs else loss

    def measure(self, model: Any, dataset: Any) -> dict[str, float]:
        """Measure perplexity and emotion accuracy on the validation responses, whose turns have their roles."""
        encoded, emotions = zip(*dataset, strict=True)
        scores, predicted = measure_pairs(model, encoded, self.args.per_device_eval_batch_size)
        nll, tokens = (np.array(column) for column in zip(*scores, strict=True))
        return {
            "perplexity": perplexity(nll, tokens),
            "nll_per_token": float(nll.sum() / tokens.sum()),
            "accuracy": float(np.mean(np.array(predicted) == np.array(emotions))),
        }


class DiscriminatorTrainer(EmpDGTrainer):
    """Trains the discriminators of a generator that stays as it is.

    Args:
        encode: tells the emotion words of answers.
        **kwargs: arguments of `StageTrainer`.
    """

    def __init__(self, *, encode: Encoder, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encode = encode

    @property
    def generator_learns(self) -> bool:
        """Whether this step is the generator's."""
        return False

    def create_optimizer(self, model: Any = None) -> Any:
        """Make an optimiser of all weights, in which generator and discriminators have options of their own."""
        if self.optimizer is None:  # type: ignore[has-type]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            adam = {name: value for name, value in (("betas", _BETAS), ("eps", _EPSILON)) if name in options}
            adam["lr"] = self.args.discriminator_learning_rate
            groups = []
            for part, own in ((self.model.generator, {}), (self.model.discriminators, adam)):
                decaying = set(self.get_decay_parameter_names(part))
                for decay, decays in ((self.args.weight_decay, True), (0.0, False)):
                    weights = [each for name, each in part.named_parameters() if (name in decaying) == decays]
                    groups.append({"params": weights, "weight_decay": decay, **own})
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of those whose step it is; the others get no gradient, so that the optimiser leaves them alone."""
        args, own = self.args, self.accelerator.unwrap_model(model)
        own.generator.requires_grad_(self.generator_learns)
        own.discriminators.requires_grad_(not self.generator_learns)
        unknown = inputs.pop("unknown")
        output = model(
            **inputs,
            **self._answers(own, inputs, unknown),
            generator_learns=self.generator_learns,
            penalty_weight=args.penalty_weight,
            adversarial_weight=args.adversarial_weight,
            straight_through=args.adversarial == "straight_through",
            smoothing=args.label_smoothing_factor,
        )
        return (output.loss, output) if return_outputs else output.loss

    @torch.no_grad()
    def _answers(self, model: Any, inputs: Mapping[str, Any], unknown: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The generator's answers to the items that discriminators see, and the places of their emotion words.

        Args:
            model: the generator with its discriminators.
            inputs: a batch.
            unknown: of each of these items, the words outside of the vocabulary.
        """
        generator, config, tokenizer = model.generator, model.config, self.processing_class
        rows, places = [], []
        if unknown:
            was_training = generator.training
            generator.eval()
            context = generator.encode(**{name: inputs[name][inputs["answered"]] for name in CONTEXT})
            first = self.args.batched_decoding == "first"
            found = generator.answer_greedily(context, inputs["extra_words"], _LONGEST_ANSWER, first)
            generator.train(was_training)
            for ids, extra in zip(found.tolist(), unknown, strict=True):
                said = spell(tokenizer, ids, extra)
                rows.append(np.array([*(each for each, _ in said), config.eos_token_id], np.int64))
                places.append(_places(self.encode, [word for _, word in said]))
        device = inputs["input_ids"].device
        return {
            "negatives": stack(rows, config.pad_token_id).to(device),
            "negative_places": stack(places, -1).to(device),
        }


class JointTrainer(DiscriminatorTrainer):
    """Trains the discriminators for one step and then the generator for five, on the same batch.

    The loss that is logged is the mean over the steps of both.

    Args:
        steps_before: number of steps for which the generator was trained alone; its learning rate goes on from there.
        **kwargs: arguments of `DiscriminatorTrainer`.
    """

    def __init__(self, *, steps_before: int, **kwargs: Any) -> None:
        self.steps_before = steps_before
        super().__init__(**kwargs)

    def make_batches(
        self, lengths: Sequence[int], seed: int, phases: Sequence[Sequence[int]] | None
    ) -> EpochBatchSampler:
        """Make the sampler of the training batches: of texts of similar length, each of them for a whole round."""
        args = self.args
        return _Rounds(lengths, args.per_device_train_batch_size, seed, phases, args.dataloader_drop_last)

    @property
    def generator_learns(self) -> bool:
        """Whether this step is the generator's."""
        return self.state.global_step % ROUND > 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of the learning rates: the generator's goes on, the discriminators' is constant."""
        share = noam(int(self.args.warmup_steps))

        def rate(done: int) -> float:
            rounds, steps = divmod(done, ROUND)
            return share(self.steps_before + rounds * (ROUND - 1) + max(0, steps - 1))

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, [*[rate] * 2, *[lambda done: 1.0] * 2])
        return self.lr_scheduler

    def measure(self, model: Any, dataset: Any) -> dict[str, float]:
        """Measure perplexity and emotion accuracy of the generator on the validation responses."""
        return super().measure(getattr(model, "generator", model), dataset)

    def keep_generator(self) -> None:
        """Let the generator be the model that is finished."""
        self.model: Any = self.accelerator.unwrap_model(self.model).generator


class _Rounds(LengthBatchSampler):
    """Yields each batch of texts of similar length as many times as a round has steps."""

    def __len__(self) -> int:
        return ROUND * super().__len__()

    def draw(self, random: np.random.Generator) -> Iterator[list[int]]:
        for batch in super().draw(random):
            yield from [batch] * ROUND
