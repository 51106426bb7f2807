"""Training GEE: a language model learns the situations of each emotion, without any label of a cause."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from empcause.checkpoints import load_whole
from empcause.data import Dialogue, emotion_id, find_corpus, load_dialogues
from empcause.data.batching import EpochBatchSampler
from empcause.data.origin import origin
from empcause.errors import UserError
from empcause.metrics import perplexity
from empcause.ranges import COUNT
from empcause.systems.gee import (
    GEE,
    GEEConfig,
    collate,
    encode_prompt,
    encode_situation,
    label_nll,
    language_model_class,
    make_item,
)
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


@dataclass
class GEETrainingArguments(PretrainedStageArguments):
    """Options of GEE's training. Its settings were not published; the defaults are usual ones for a large model."""

    figures: ClassVar = ("nll_per_token", "perplexity")
    higher_is_better: ClassVar = False
    ranges: ClassVar = PretrainedStageArguments.ranges | {"max_length": COUNT}
    refused: ClassVar = PretrainedStageArguments.refused | {
        "label_smoothing_factor": "Bayes' rule needs likelihoods, which smoothed labels do not give",
    }

    output_dir: str | None = field(
        default="runs/gee", metadata={"help": "folder for the checkpoints and the finished model"}
    )
    model_name_or_path: str | None = field(
        default="facebook/bart-large",
        metadata={
            "help": "pretrained sequence-to-sequence or causal LM, by name or folder; empty: a new model of model_type"
        },
    )
    emotion_prompt: str = field(
        default=GEEConfig.emotion_prompt,
        metadata={"help": "what the model reads before a situation; the published model has __{emotion}__"},
    )
    rule: str = field(
        default="published",
        metadata={
            "help": "how the trained model finds causes: as GEE was published, or exactly by Bayes' rule over all emotions",
            "choices": ["published", "exact"],
        },
    )
    count_ends: bool = field(
        default=True, metadata={"help": "count the tokens that begin and end a situation for its emotion"}
    )
    max_length: int = field(default=128, metadata={"help": "longest situation in tokens"})
    learning_rate: float = field(default=1e-5, metadata={"help": "initial learning rate of the optimiser"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "optimiser steps of warm-up; below 1: the share of all steps"}
    )
    early_stopping_patience: int = field(
        default=2, metadata={"help": "end after this many evaluations without a better figure; 0: never end early"}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "situations per batch and device"})
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "situations per batch and device in evaluation"}
    )
    num_train_epochs: float = field(default=10, metadata={"help": "passes over the training situations"})
    metric_for_best_model: str | None = field(
        default="nll_per_token", metadata={"help": "validation figure that early stopping and the scheduler watch"}
    )


@in_output_folder("empcause train gee")
def train_gee(args: GEETrainingArguments) -> dict[str, float]:
    """Train a GEE; the best one is in `args.output_dir` then.

    Args:
        args: the options.

    Returns:
        NLL per token (in nats) and perplexity of the validation situations given their emotions, by name.

    Raises:
        UserError: data, model or checkpoint are missing or malformed, or the training diverged.
        Interrupted: Ctrl-C or SIGTERM.
    """
    set_environment()
    checkpoint = find_checkpoint(args)
    corpus, _ = find_corpus(args.data)
    train_dialogues, valid_dialogues = load_dialogues("train", args.data), load_dialogues("valid", args.data)
    data = origin(args.data, train_dialogues, valid_dialogues)
    for split, dialogues in (("train", train_dialogues), ("valid", valid_dialogues)):
        if without := sum(not dialogue.situation.strip() for dialogue in dialogues):
            raise UserError(
                f"{without} of {len(dialogues)} dialogues of {data.name} (split {split}) have no situation, which is the text "
                "that GEE learns; add the situations, or give other --data."
            )
    set_seed(args.seed)
    model, tokenizer = build_gee(args, corpus.emotions)
    training = encode_situations(model.config, tokenizer, train_dialogues)
    validation = encode_situations(model.config, tokenizer, valid_dialogues)
    trainer = GEETrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=training,
        eval_dataset=validation,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
        made_from={
            "tokenizer": digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]),
            "set of training data": digest(train_dialogues),
            "set of validation data": digest(valid_dialogues),
        },
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.measure(model, validation)
    abilities = "Finds the emotion of a situation and the words that caused it, by Bayes' rule over a language model."
    trained_on = f"{len(training):,} situations with their emotions and no causes, validated on {len(validation):,}"
    card = model_card(trainer, metrics, "GEE: emotion causes by a generative model", abilities, trained_on, data)
    return finish(trainer, metrics, card)


def build_gee(args: GEETrainingArguments, emotions: Sequence[str]) -> tuple[GEE, PreTrainedTokenizerBase]:
    """Make the GEE that the options describe, over a pretrained language model or a new one, and its tokenizer.

    Args:
        args: the options.
        emotions: names of the emotions, by their ids.

    Raises:
        UserError: there is no such model, it writes no text, or its tokenizer does not fit it.
    """
    tokenizer = load_tokenizer(args)
    if tokenizer.eos_token is None:
        raise UserError(f"The tokenizer {tokenizer.name_or_path!r} has no end token, which every situation needs.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is told by its place, not by its token
    base = load_config(args, tokenizer)
    lm = None
    if args.model_name_or_path:
        lm = load_whole(language_model_class(base), args.model_name_or_path).float()  # bf16 is the Trainer's autocast
        base = lm.config
    elif base.is_encoder_decoder and base.decoder_start_token_id is None:
        base.decoder_start_token_id = tokenizer.pad_token_id
    config = GEEConfig(
        lm=base.to_dict(),
        emotions=list(emotions),
        emotion_prompt=args.emotion_prompt,
        rule=args.rule,
        count_ends=args.count_ends,
        max_length=args.max_length,
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    try:
        model = GEE(config, lm)
    except ValueError as error:
        raise UserError(f"A model of type {base.model_type!r} is no language model: {error}") from error
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, the model {rows}; give the model's own."
        )
    _limit_length(model.config, tokenizer)
    _check_causal(model, tokenizer)
    return model, tokenizer


def _limit_length(config: GEEConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Shorten `config.max_length` to what the language model can read at once, where it has a limit.

    Raises:
        UserError: the prompt leaves no room for a situation.
    """
    positions = getattr(config.lm, "max_position_embeddings", None)
    if positions is None:
        return
    # The prompt of two emotions is the longest. Special tokens begin and end a situation.
    longest = sorted(config.emotions, key=lambda emotion: len(encode_prompt(config, tokenizer, emotion)))[-2:]
    prompt = 0 if config.lm.is_encoder_decoder else len(encode_prompt(config, tokenizer, *longest))
    if (room := positions - prompt - 2) < 1:
        raise UserError(
            f"emotion_prompt has {prompt} tokens with two emotions, and the model reads {positions}; give a shorter one."
        )
    config.max_length = min(config.max_length, room)


def _check_causal(model: GEE, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a language model that sees later tokens of the situation, as an encoder does that was loaded as a causal model.

    Raises:
        UserError: another last token changes the probabilities of those before it.
    """
    config = model.config
    prompt = encode_prompt(config, tokenizer, config.emotions[0])
    situation = encode_situation(config, tokenizer, "It was the last day of the year.")
    other = replace(situation, ids=np.append(situation.ids[:-1], situation.ids[0]))
    first, second = label_nll(model, tokenizer, [make_item(config, prompt, each) for each in (situation, other)], 2)
    if not np.allclose(first[:-1], second[:-1], rtol=1e-6, atol=1e-6):  # of a new model, the change is small too
        raise UserError(
            f"A model of type {config.lm.model_type!r} sees the tokens that it shall predict; give a sequence-to-sequence or "
            "causal language model."
        )


def encode_situations(
    config: GEEConfig, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue]
) -> list[dict[str, NDArray[np.int64]]]:
    """Encode the situations of dialogues behind the prompts of their emotions, and warn of those that are cut.

    Raises:
        UserError: an emotion is unknown.
    """
    prompts = [encode_prompt(config, tokenizer, emotion) for emotion in config.emotions]
    situations = [encode_situation(config, tokenizer, dialogue.situation) for dialogue in dialogues]
    if cut := sum(situation.cut for situation in situations):
        logger.warning(
            f"{cut} of {len(dialogues)} situations have more than {config.max_length} tokens; the rest of them is not learned."
        )
    return [
        make_item(config, prompts[emotion_id(dialogue.emotion, config.emotions)], situation)
        for dialogue, situation in zip(dialogues, situations, strict=True)
    ]


class GEETrainer(StageTrainer):
    """Makes batches of situations of similar length, and evaluates by the likelihood of all validation situations."""

    def make_batches(
        self, lengths: Sequence[int], seed: int, phases: Sequence[Sequence[int]] | None
    ) -> EpochBatchSampler:
        """Make the sampler of the training batches by the numbers of labels, because inputs may be the prompt alone."""
        return super().make_batches([len(item["labels"]) for item in self.train_dataset], seed, phases)

    def measure(self, model: Any, dataset: Any) -> dict[str, float]:
        """Measure the NLL per token and the perplexity on the validation situations, given their emotions."""
        nll = label_nll(model, self.processing_class, dataset, self.args.per_device_eval_batch_size)
        total, tokens = [float(each.sum()) for each in nll], [len(each) for each in nll]
        return {"nll_per_token": sum(total) / sum(tokens), "perplexity": perplexity(total, tokens)}
