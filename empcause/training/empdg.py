"""Training EmpDG's generator, a published comparison system (Li et al., COLING 2020)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import set_seed
from transformers.trainer_utils import SchedulerType

from empcause.data import Dialogue, emotion_id, find_corpus, load_dialogues, response_pairs
from empcause.data.dialogue import LISTENER
from empcause.data.origin import origin
from empcause.errors import UserError
from empcause.metrics import perplexity
from empcause.ranges import COUNT, SEED, SHARE, Range
from empcause.systems.empdg import SPECIAL_TOKENS, EmpDG, EmpDGConfig, Encoder, collate, measure_pairs
from empcause.systems.lexicon import VADER, load_lexicon, load_tagger
from empcause.systems.vocabulary import load_vectors, train_word_tokenizer
from empcause.training.card import model_card
from empcause.training.common import StageTrainer, StageTrainingArguments, draw_samples, finish, set_environment
from empcause.training.fingerprint import digest
from empcause.training.folder import find_checkpoint, in_output_folder


@dataclass
class EmpDGTrainingArguments(StageTrainingArguments):
    """Options of EmpDG's training; the defaults are its authors', with the faults of the published code corrected.

    The learning rate rises for `warmup_steps` steps to `learning_rate`, and then falls with the inverse square root of the step
    (Noam).
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
    }

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
            "help": "how emotion words are ranked as causes: at random, in the text's order, or by the model's attention",
            "choices": ["random", "order", "attention"],
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


@in_output_folder("empcause train empdg")
def train_empdg(args: EmpDGTrainingArguments) -> dict[str, float]:
    """Train EmpDG's generator, without discriminators; the best one is in `args.output_dir` then.

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
    corpus, _ = find_corpus(args.data)
    lexicon = load_lexicon(args.emotion_lexicon)
    tagger = load_tagger(args.adjectives) if args.adjectives else None
    dialogues = {split: load_dialogues(split, args.data) for split in ("train", "valid")}
    data = origin(args.data, *dialogues.values())
    responses = {split: _pairs(each, args.pairs) for split, each in dialogues.items()}
    for split, found in responses.items():
        if not found:
            raise UserError(f"No turn is answered in the split {split} of {data.name}; give other --data.")
    train_pairs = draw_samples(responses["train"], args.max_train_samples, args.seed)
    valid_pairs = draw_samples(responses["valid"], args.max_eval_samples, args.seed)
    if args.vocabulary == "everything":
        everything = [*dialogues["train"], *dialogues["valid"], *load_dialogues("test", args.data)]
        texts = [text for each in everything for text in (*each.turns, each.situation)]
        tokenizer = train_word_tokenizer(texts, SPECIAL_TOKENS, min_count=1)
    else:
        texts = [turn for each in dialogues["train"] for turn in each.turns]
        tokenizer = train_word_tokenizer(texts, SPECIAL_TOKENS)
    set_seed(args.seed)
    model = EmpDG(
        EmpDGConfig(
            vocab_size=len(tokenizer),
            emotion_words=sorted(lexicon),
            adjectives=args.adjectives,
            ranking=args.empdg_ranking,
            fill=args.empdg_fill,
            id2label=dict(enumerate(corpus.emotions)),
            **{name: getattr(args, name) for name in _MODEL_OPTIONS},
        )
    )
    vectors: bytes | None = None
    if args.embeddings:
        ids, values = load_vectors(args.embeddings, tokenizer.get_vocab(), args.hidden_size)
        with torch.no_grad():
            model.words.weight[torch.from_numpy(ids)] = torch.from_numpy(values)
        vectors = ids.tobytes() + values.tobytes()

    encode = Encoder(tokenizer, lexicon, tagger)
    training, validation = encode(train_pairs), encode(valid_pairs)
    emotions = {
        split: [emotion_id(pair.emotion, model.emotions) for pair in each]
        for split, each in (("train", train_pairs), ("valid", valid_pairs))
    }
    trainer = EmpDGTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=[each.item(emotion) for each, emotion in zip(training, emotions["train"], strict=True)],
        eval_dataset=list(zip(validation, emotions["valid"], strict=True)),
        data_collator=partial(collate, pad_token_id=model.config.pad_token_id),
        made_from={
            "tokenizer": digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]),
            "set of training data": digest(train_pairs),
            "set of validation data": digest(valid_pairs),
            "set of emotion words": digest(each.emotion_places for each in (*training, *validation)),
            "set of word vectors": digest([vectors]),
        },
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.measure(model, trainer.eval_dataset)
    abilities = (
        "EmpDG (Li et al., COLING 2020) without its discriminators: it tells the emotion of a dialogue and answers it, and its "
        f"emotion words are those of a lexicon of {len(lexicon):,} words, which `config.json` holds. The terms of the lexicon "
        "apply to that file."
    )
    trained_on = f"{len(train_pairs):,} of {len(responses['train']):,} responses, validated on {len(valid_pairs):,} of "
    trained_on += f"{len(responses['valid']):,}"
    return finish(trainer, metrics, model_card(trainer, metrics, "EmpDG", abilities, trained_on, data))


_MODEL_OPTIONS = (
    "hidden_size attention_size num_attention_heads filter_size dropout initial_std copy_softmax ffn_last_relu ranking_seed"
).split()


def _pairs(dialogues: Sequence[Dialogue], kind: str) -> list[Dialogue]:
    """Response pairs: all, or those that EmpDG's authors have, whose response is followed by a turn of each of the two."""
    if kind == "all":
        return response_pairs(dialogues)
    shortened = [
        replace(each, turns=each.turns[:-2], roles=each.roles[:-2]) for each in map(_up_to_listener, dialogues)
    ]
    return response_pairs(shortened)


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
        """Make the schedule of the learning rate."""
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
