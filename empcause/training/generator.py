"""Stage 2: training the empathetic conversation generator (Algorithm 2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from empcause.checkpoints import load_whole, read_config
from empcause.data import Dialogue, load_dialogues, response_pairs
from empcause.data.batching import EpochBatchSampler, TokenBatchSampler
from empcause.data.collation import pack_batch, packed_sizes, pad_batch
from empcause.data.origin import origin
from empcause.data.sequences import MIN_LENGTH, EncodedDialogue
from empcause.errors import UserError
from empcause.generator import (
    GENERATORS,
    CauseCache,
    add_separator,
    encode_for,
    longest_sequence,
    response_nll,
)
from empcause.metrics import perplexity
from empcause.ranges import COUNT, NOT_NEGATIVE, SHARE, Range
from empcause.text import code
from empcause.training.card import model_card
from empcause.training.common import (
    PretrainedStageArguments,
    StageTrainer,
    draw_samples,
    finish,
    load_config,
    load_tokenizer,
    set_environment,
)
from empcause.training.fingerprint import digest
from empcause.training.folder import find_checkpoint, in_output_folder

logger = logging.get_logger(__name__)


@dataclass
class GeneratorTrainingArguments(PretrainedStageArguments):
    """Options of stage 2; the defaults are the paper's (Table 4).

    `padding_free`, `bf16` and `torch_compile` are None until the device decides them; afterwards they are True or False.
    """

    figures: ClassVar = ("perplexity", "nll_per_token")
    higher_is_better: ClassVar = False
    ranges: ClassVar = PretrainedStageArguments.ranges | {
        "gamma": NOT_NEGATIVE,
        "cause_threshold": SHARE,
        "max_length": Range(MIN_LENGTH),
        "tokens_per_step": Range(MIN_LENGTH),
        "max_train_samples": COUNT,
        "max_eval_samples": COUNT,
    }

    output_dir: str | None = field(
        default="runs/generator", metadata={"help": "folder for the checkpoints and the finished model"}
    )
    model_name_or_path: str | None = field(
        default="gpt2", metadata={"help": "pretrained causal LM, by name or folder; empty: a new model of model_type"}
    )
    extractor: str | None = field(
        default="runs/extractor", metadata={"help": "folder of the frozen extractor; not needed with gamma 0"}
    )
    gamma: float = field(default=1.0, metadata={"help": "factor of the attention bias towards causes; 0: no bias"})
    cause_scope: str = field(
        default="context",
        metadata={"help": "turns that may hold causes", "choices": ["context", "speaker", "last"]},
    )
    cause_threshold: float | None = field(
        default=None,
        metadata={"help": "turn cause probabilities into 0 and 1 at this value; default: use them as they are"},
    )
    max_length: int = field(default=256, metadata={"help": "longest dialogue in tokens; oldest turns are dropped"})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on this many responses, drawn by the seed; default: all"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "validate on this many responses, drawn by the seed; default: all"}
    )
    padding_free: bool | None = field(
        default=None,
        metadata={"help": "pack the dialogues of a batch into one row, without padding them; default: on a GPU"},
    )
    tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "greatest number of tokens per optimiser step, on all devices together, in place of "
            "per_device_train_batch_size; needs padding_free"
        },
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "dialogues per batch and device in training"})
    per_device_eval_batch_size: int = field(
        default=16, metadata={"help": "dialogues per batch and device in evaluation"}
    )
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "batches per optimiser step"})
    num_train_epochs: float = field(default=10, metadata={"help": "passes over the training responses"})
    metric_for_best_model: str | None = field(
        default="perplexity", metadata={"help": "validation figure that early stopping and the scheduler watch"}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "compute in bf16 (weights stay in fp32); default: on a GPU that has it"}
    )
    torch_compile: bool | None = field(
        default=None, metadata={"help": "compile the model by torch.compile; default: on a GPU, with padding_free"}
    )

    def __post_init__(self) -> None:
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.padding_free is None:
            self.padding_free = self.tokens_per_step is not None or (on_gpu and not self._needs_rows())
        if self.bf16 is None:
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.torch_compile is None:
            self.torch_compile = on_gpu and self.padding_free
        super().__post_init__()
        if self.gamma > 0 and not self.extractor:
            raise UserError("a bias (gamma > 0) needs an extractor.")
        if self.padding_free and (why := self._needs_rows()):
            raise UserError(f"{why}; leave it out, or give padding_free false and no tokens_per_step.")
        if self.tokens_per_step is not None:
            self._check_tokens_per_step()

    def _needs_rows(self) -> str | None:
        """Return what is wrong with an option that takes the rows of a batch for dialogues; None if there is no such option."""
        if self.neftune_noise_alpha is not None:
            return "neftune_noise_alpha scales the noise by the length of a row, which packed dialogues share"
        if self.include_num_input_tokens_seen == "non_padding":
            return "include_num_input_tokens_seen non_padding takes end tokens of packed dialogues for padding"
        return None

    def _check_tokens_per_step(self) -> None:
        """Refuse what would have no effect beside `tokens_per_step`, and steps that do not divide into equal batches."""
        default = type(self).per_device_train_batch_size
        if not self.padding_free:
            raise UserError("tokens_per_step packs dialogues; leave out padding_free, or give it as true.")
        if self.per_device_train_batch_size != default or self.dataloader_drop_last:
            raise UserError(
                "tokens_per_step decides how many dialogues a batch has; leave out per_device_train_batch_size and "
                "dataloader_drop_last."
            )
        batches = self.gradient_accumulation_steps * self.world_size
        if self.tokens_per_step % batches:
            raise UserError(
                f"tokens_per_step is {self.tokens_per_step}; expected a multiple of {batches}, the number of batches in a step "
                "(gradient_accumulation_steps times processes)."
            )

    @property
    def tokens_per_batch(self) -> int | None:
        """Greatest number of tokens of a batch on one device; None without `tokens_per_step`."""
        if self.tokens_per_step is None:
            return None
        return self.tokens_per_step // (self.gradient_accumulation_steps * self.world_size)


@in_output_folder("empcause train generator")
def train_generator(args: GeneratorTrainingArguments) -> dict[str, float]:
    """Train a generator; the best one is in `args.output_dir` then.

    Args:
        args: the options.

    Returns:
        Perplexity and NLL per token (in nats) on the validation responses, by name.

    Raises:
        UserError: data, model, extractor or checkpoint are missing or malformed, or the training diverged.
        Interrupted: Ctrl-C or SIGTERM.
    """
    set_environment()
    checkpoint = find_checkpoint(args)
    if args.gamma > 0:
        assert args.extractor is not None
        read_config(args.extractor, "extractor", "empcause train extractor")
    train_dialogues, valid_dialogues = load_dialogues("train", args.data), load_dialogues("valid", args.data)
    data = origin(args.data, train_dialogues, valid_dialogues)
    train_responses, valid_responses = response_pairs(train_dialogues), response_pairs(valid_dialogues)
    for split, responses in (("train", train_responses), ("valid", valid_responses)):
        if not responses:
            raise UserError(f"No turn is answered in the split {split} of {data.name}; give other --data.")
    train_pairs = draw_samples(train_responses, args.max_train_samples, args.seed)
    valid_pairs = draw_samples(valid_responses, args.max_eval_samples, args.seed)
    set_seed(args.seed)
    model, tokenizer = build_generator(args)
    limit = min(args.max_length, longest_sequence(model))

    made_from: dict[str, str | None] = {
        "tokenizer": digest([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]),
        "set of training data": digest(train_pairs),
        "set of validation data": digest(valid_pairs),
        "extractor": None,
    }
    if args.gamma > 0:
        assert args.extractor is not None
        pairs = [*train_pairs, *valid_pairs]
        cache = CauseCache(args.extractor)
        found = cache.get([pair.text for pair in pairs], progress=True)
        pairs = [replace(pair, causes=causes) for pair, causes in zip(pairs, found, strict=True)]
        train_pairs, valid_pairs = pairs[: len(train_pairs)], pairs[len(train_pairs) :]
        made_from["extractor"] = cache.digest
    training = encode_pairs(model, tokenizer, train_pairs, limit)
    validation = encode_pairs(model, tokenizer, valid_pairs, limit)

    trainer = GeneratorTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=[each.item for each in training],
        eval_dataset=validation,
        made_from=made_from,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = measure_perplexity(model, tokenizer, validation, args.per_device_eval_batch_size)
    bias = "its attention is not biased (gamma 0)"
    if args.gamma > 0:
        assert args.extractor is not None
        bias = "its attention is biased towards the words that caused the speaker's emotion"
        bias += f" (gamma {args.gamma:g}), as the extractor {code(Path(args.extractor).resolve().name)} finds them"
    trained_on = f"{len(train_pairs):,} of {len(train_responses):,} responses, validated on {len(valid_pairs):,} of "
    trained_on += f"{len(valid_responses):,}"
    card = model_card(
        trainer, metrics, "Empathetic conversation generator", f"Answers a dialogue; {bias}.", trained_on, data
    )
    return finish(trainer, metrics, card)


def build_generator(args: GeneratorTrainingArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make the generator that the options describe, from a pretrained model or new, and its tokenizer.

    Raises:
        UserError: there is no such model, or no generator for its type.
    """
    tokenizer = load_tokenizer(args)
    base = load_config(args, tokenizer)
    kind = base.model_type.removeprefix("empathetic_")
    if kind not in GENERATORS:
        raise UserError(
            f"There is no generator over a model of type {kind!r}; expected one of {', '.join(GENERATORS)}."
        )
    config_class, model_class = GENERATORS[kind]
    values = base.to_dict() | {
        "gamma": args.gamma,
        "cause_scope": args.cause_scope,
        "cause_threshold": args.cause_threshold,
    }
    values.pop("model_type")
    config = config_class(**values)
    if args.model_name_or_path:
        options = {"config": config, "attn_implementation": "empcause"}
        model = load_whole(model_class, args.model_name_or_path, new=("role_embedding",), **options)
    else:
        model = model_class._from_config(config, attn_implementation="empcause")
    model = model.float()  # master weights; bf16 is the Trainer's autocast
    add_separator(model, tokenizer)
    return model, tokenizer


def encode_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Dialogue], max_length: int
) -> list[EncodedDialogue]:
    """Encode response pairs for the generator, and warn of turns and responses that do not fit.

    Args:
        model: the generator.
        tokenizer: its tokenizer.
        pairs: dialogues with their responses.
        max_length: greatest number of tokens of a dialogue with its response.
    """
    encoded = [encode_for(model, tokenizer, pair, max_length) for pair in pairs]
    dropped = sum(each.dropped_turns for each in encoded)
    cut = sum(each.cut_turn or each.cut_response for each in encoded)
    if dropped:
        logger.warning(f"{dropped} oldest turns of {len(pairs)} dialogues did not fit into {max_length} tokens.")
    if cut:
        logger.warning(
            f"{cut} of {len(pairs)} dialogues have a turn or a response that is cut: {max_length} tokens at most."
        )
    return encoded


def measure_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[EncodedDialogue], batch_size: int
) -> dict[str, float]:
    """Measure the perplexity over all response tokens, and the NLL per token in nats.

    Raises:
        UserError: the generator's probabilities are not finite.
    """
    nll, tokens = response_nll(model, tokenizer, encoded, batch_size=batch_size)
    return {"perplexity": perplexity(nll, tokens), "nll_per_token": float(nll.sum() / tokens.sum())}


class GeneratorTrainer(StageTrainer):
    """Packs or pads the dialogues, lets the model smooth the labels, and evaluates by the perplexity over all responses."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_smoother: Any = None  # the Trainer's would compare each token's logits with that token, not the next
        pad_token_id = self.processing_class.pad_token_id
        self.data_collator: Any = partial(pad_batch, pad_token_id=pad_token_id)
        if isinstance(self.batches, TokenBatchSampler):
            sizes = packed_sizes(self.batches.tokens, self.batches.items, int(self.batches.lengths.max()))
            self.data_collator = partial(pack_batch, pad_token_id=pad_token_id, sizes=sizes)
            if self.args.torch_compile:
                # Each combination of sizes has a graph of its own, which does not depend on the batches that came before.
                # A resumed run therefore computes with the same graphs as an unbroken one.
                self.accelerator.state.dynamo_plugin.dynamic = False
                graphs = len(sizes.tokens) * len(sizes.labels)
                torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, graphs)

    def make_batches(
        self, lengths: Sequence[int], seed: int, phases: Sequence[Sequence[int]] | None
    ) -> EpochBatchSampler:
        """Make the sampler of the training batches: with nearly the same number of tokens if they are packed.

        Raises:
            UserError: a dialogue is longer than a batch may be.
        """
        args = self.args
        if not args.padding_free:
            return super().make_batches(lengths, seed, phases)
        if args.tokens_per_batch is None:
            return TokenBatchSampler(
                lengths, seed, batch_size=args.per_device_train_batch_size, drop_last=args.dataloader_drop_last
            )
        if max(lengths) > args.tokens_per_batch:
            raise UserError(
                f"tokens_per_step is {args.tokens_per_step}, {args.tokens_per_batch} in a batch, but a dialogue has "
                f"{max(lengths)} tokens; give more, or a smaller max_length."
            )
        return TokenBatchSampler(lengths, seed, max_tokens=args.tokens_per_batch)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's loss, with labels smoothed as the options say."""
        return super().compute_loss(model, inputs | {"smoothing": self.args.label_smoothing_factor}, *args, **kwargs)

    def measure(self, model: Any, dataset: Any) -> dict[str, float]:
        """Measure the perplexity on the validation responses."""
        return measure_perplexity(model, self.processing_class, dataset, self.args.per_device_eval_batch_size)
