"""GEE, the generative emotion estimator (Kim, Kim and Kim, EMNLP 2021): it finds emotions and causes by Bayes' rule.

Any sequence-to-sequence or causal language model of transformers learns `p(situation | emotion)` from pairs of an emotion and a
situation, without a label of a cause. The emotion of a situation is the one that makes it most probable, and a word is a cause if
it makes the most probable emotions more probable than others.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput, logging

from empcause.checkpoints import load_own_tokenizer, load_pretrained
from empcause.data import EMPATHETIC_DIALOGUES, Word, align_max
from empcause.data.batching import length_batches
from empcause.data.sequences import IGNORED
from empcause.errors import UserError
from empcause.ranges import COUNT, check_values
from empcause.systems.protocol import Reading
from empcause.text import one_line

logger = logging.get_logger(__name__)

Rule = Literal["published", "exact"]

# Bayes' rule compares the two most probable emotions with the two least probable ones.
_FEWEST_EMOTIONS = 4


class GEEConfig(PreTrainedConfig):
    """Configuration of a GEE: its language model, and how emotions and causes are found with it.

    `rule` and `count_ends` do not affect the training: to evaluate a trained model with other values, set them in the `config` of
    the loaded `GEE` and save that with its tokenizer to another folder.

    Args:
        lm: configuration of the language model, or its values by name.
        emotions: names of the emotions, by their ids; default is those of EmpatheticDialogues.
        emotion_prompt: what the language model reads before a situation; `{emotion}` stands for the name of the emotion. The
            published model has `__{emotion}__`.
        rule: how causes are found: "published" (`published_odds`) or "exact" (`exact_odds`).
        count_ends: whether the tokens that begin and end a situation count for its emotion.
        max_length: greatest number of pieces of a situation; the rest of a longer one is neither learned nor read.

    Raises:
        UserError: a value is out of range, or the language model's type is unknown.
    """

    model_type = "empcause_gee"
    sub_configs: ClassVar = {"lm": AutoConfig}

    lm: Any = None
    emotions: list[str] | tuple[str, ...] = EMPATHETIC_DIALOGUES.emotions
    emotion_prompt: str = "A situation in which somebody feels {emotion}:"
    rule: Rule = "published"
    count_ends: bool = True
    max_length: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.lm, dict):
            values = dict(self.lm)
            try:
                self.lm = AutoConfig.for_model(values.pop("model_type", None), **values)
            except (ValueError, TypeError, StrictDataclassError) as error:
                raise UserError(f"lm: {one_line(error)}") from error
        check_values(self, {"max_length": COUNT})
        if "{emotion}" not in self.emotion_prompt:
            raise UserError(f"emotion_prompt is {self.emotion_prompt!r}; expected a text with {{emotion}} in it.")
        if len(set(self.emotions)) != len(self.emotions) or len(self.emotions) < _FEWEST_EMOTIONS:
            raise UserError(
                f"emotions are {', '.join(self.emotions)}; expected at least {_FEWEST_EMOTIONS}, each of them once."
            )
        super().__post_init__(**kwargs)

    def prompt(self, *emotions: str) -> str:
        """What the language model reads before a situation with these emotions.

        Several emotions are joined by "and" in the prompt; a prompt of a single word, as the published one, is repeated instead.
        """
        if len(self.emotion_prompt.split()) > 1:
            return self.emotion_prompt.replace("{emotion}", " and ".join(emotions))
        return " ".join(self.emotion_prompt.replace("{emotion}", emotion) for emotion in emotions)


@dataclass
class GEEOutput(ModelOutput):
    """Result of a GEE.

    Attributes:
        loss: 0-d float32, the summed negative log-likelihood of the labels, in nats, divided by their number or by
            `num_items_in_batch`.
        token_losses: `[B, T]` float32, the negative log-likelihood of each label in nats, 0 where the label is -100.
    """

    loss: Tensor | None = None
    token_losses: Tensor | None = None


class GEE(PreTrainedModel):
    """A language model of situations given an emotion.

    Args:
        config: the configuration.
        lm: the pretrained language model; default is a new one of the configuration.
    """

    config_class = GEEConfig
    base_model_prefix = "gee"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # forward takes num_items_in_batch, which the Trainer passes
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    config: GEEConfig

    def __init__(self, config: GEEConfig, lm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.lm = lm if lm is not None else language_model_class(config.lm).from_config(config.lm)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's word embeddings."""
        return self.lm.get_input_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> GEEOutput:
        """Compute the negative log-likelihood of situations.

        Args:
            input_ids: `[B, S]` int64: the prompt and, for a causal language model, the situation behind it.
            attention_mask: `[B, S]`, 0 at padding.
            labels: `[B, T]` int64, the tokens of the situation, -100 where none counts. For a causal language model `T = S`, and
                a label is the token at its own place, as in transformers' models.
            num_items_in_batch: the number by which the summed loss is divided; default is the number of labels that count.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        targets = labels
        if self.lm.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = self.lm.prepare_decoder_input_ids_from_labels(labels)
            logits = self.lm(**inputs).logits
        else:
            logits = self.lm(**inputs).logits[:, :-1]
            targets = labels[:, 1:]
        counted = targets != IGNORED
        losses = nn.functional.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
        number = num_items_in_batch if num_items_in_batch is not None else counted.sum().clamp(min=1)
        token_losses = losses.new_zeros(targets.shape).masked_scatter(counted, losses)
        if targets.shape != labels.shape:
            token_losses = nn.functional.pad(token_losses, (1, 0))  # nothing predicts the first token of a causal model
        return GEEOutput(loss=losses.sum() / number, token_losses=token_losses)


AutoConfig.register("empcause_gee", GEEConfig)
AutoModel.register(GEEConfig, GEE)


def language_model_class(config: Any) -> Any:
    """The `AutoModel` of a language model, by its configuration: sequence-to-sequence or causal."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


@dataclass(frozen=True)
class Situation:
    """A situation as a language model writes it.

    Attributes:
        ids: `[T]` int64, its tokens; special ones begin and end it, as the model needs them.
        is_piece: `[T]` bool, False at these special tokens.
        spans: `[T, 2]` int64, characters of the text.
        cut: whether the end of the text was left out.
    """

    ids: NDArray[np.int64]
    is_piece: NDArray[np.bool_]
    spans: NDArray[np.int64]
    cut: bool


def encode_situation(config: GEEConfig, tokenizer: PreTrainedTokenizerBase, text: str) -> Situation:
    """Tokenize a situation. Behind the prompt of a causal language model it begins with a space.

    Args:
        config: the configuration of the GEE.
        tokenizer: a fast tokenizer (character offsets are needed), with an end token.
        text: the raw text.
    """
    if config.lm.is_encoder_decoder:
        ids, special, spans = _encode(tokenizer, text_target=text)
    else:
        ids, special, spans = _encode(tokenizer, text=f" {text}", add_special_tokens=False)
        spans = np.maximum(spans - 1, 0)
    if not len(ids) or ids[-1] != tokenizer.eos_token_id:
        ids, special, spans = (
            np.append(ids, tokenizer.eos_token_id),
            np.append(special, 1),
            np.append(spans, [[0, 0]], 0),
        )
    is_piece = special == 0
    pieces = np.flatnonzero(is_piece)
    cut = len(pieces) > config.max_length
    end = pieces[config.max_length] if cut else len(ids)
    return Situation(ids[:end], is_piece[:end], spans[:end], cut)


def encode_prompt(config: GEEConfig, tokenizer: PreTrainedTokenizerBase, *emotions: str) -> NDArray[np.int64]:
    """Tokenize the prompt of one or several emotions: `[P]` int64, with the special tokens of the tokenizer.

    Special tokens behind the prompt of a causal language model are left out, because the situation follows.
    """
    ids, special, _ = _encode(tokenizer, text=config.prompt(*emotions))
    if config.lm.is_encoder_decoder:
        return ids
    return ids[: np.flatnonzero(special == 0)[-1] + 1]


def _encode(tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[NDArray[np.int64], ...]:
    """Tokenize a text: token ids `[T]`, 1 at special tokens `[T]`, and characters `[T, 2]`."""
    encoded = tokenizer(
        **options,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        split_special_tokens=True,  # "</s>" in a text is spelled out and is not the token of this name
        verbose=False,
    )
    names = ("input_ids", "special_tokens_mask", "offset_mapping")
    ids, special, spans = (np.asarray(encoded[name], np.int64) for name in names)
    return ids, special, spans.reshape(-1, 2)


def make_item(config: GEEConfig, prompt: NDArray[np.int64], situation: Situation) -> dict[str, NDArray[np.int64]]:
    """Make the arguments of `GEE.forward` for one situation: `input_ids` `[S]` and `labels` `[T]`, int64."""
    if config.lm.is_encoder_decoder:
        return {"input_ids": prompt, "labels": situation.ids}
    return {
        "input_ids": np.concatenate([prompt, situation.ids]),
        "labels": np.concatenate([np.full(len(prompt), IGNORED), situation.ids]),
    }


def collate(items: Sequence[dict[str, NDArray[np.int64]]], pad_token_id: int) -> dict[str, Tensor]:
    """Make a batch of items of `make_item`, padded on the right: `input_ids`, `attention_mask` `[B, S]`, `labels` `[B, T]`."""

    def pad(name: str, fill: int) -> Tensor:
        return pad_sequence([torch.from_numpy(item[name]) for item in items], batch_first=True, padding_value=fill)

    mask = pad_sequence([torch.ones(len(item["input_ids"]), dtype=torch.long) for item in items], batch_first=True)
    return {"input_ids": pad("input_ids", pad_token_id), "attention_mask": mask, "labels": pad("labels", IGNORED)}


@torch.inference_mode()
def label_nll(
    model: GEE, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, NDArray[np.int64]]], batch_size: int
) -> list[NDArray[np.float64]]:
    """Compute the negative log-likelihood of every label that counts, in nats.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        items: what `make_item` made.
        batch_size: items per batch; batches hold items of similar length.

    Returns:
        Per item `[T]` float64, one value per token of the situation.

    Raises:
        UserError: the model's probabilities are not finite.
    """
    found: dict[int, NDArray[np.float64]] = {}
    was_training = model.training
    model.eval()
    for indices in length_batches([len(item["labels"]) for item in items], batch_size):
        batch = collate([items[index] for index in indices], tokenizer.pad_token_id)
        losses = model(**{name: value.to(model.device) for name, value in batch.items()}).token_losses
        losses = losses.double().cpu().numpy()
        if not np.isfinite(losses).all():
            raise UserError(
                "The probabilities of a GEE are not numbers (NaN): its training diverged or its files are damaged."
            )
        for row, index in enumerate(indices):
            labels = items[index]["labels"]
            found[index] = losses[row, : len(labels)][labels != IGNORED]
    model.train(was_training)
    return [found[index] for index in range(len(items))]


def log_evidence(log_probs: Tensor, rule: Rule) -> Tensor:
    """How much a situation speaks for each emotion, if all emotions are equally probable before it is read.

    Args:
        log_probs: `[E, T]` float64, log-probability of each token of the situation under each emotion.
        rule: "published" takes the mean over tokens as if it were a log-likelihood; "exact" takes the sum, which it is.

    Returns:
        `[E]` float64; its softmax is the posterior of the emotions.
    """
    total = log_probs.sum(1)
    if rule == "published":
        total = total / max(1, log_probs.shape[1])
    return total - np.log(len(total))


def published_odds(log_probs: Tensor, joint: Tensor, evidence: Tensor) -> Tensor:
    """Log-odds that a piece was written under the two most probable emotions, as GEE was published.

    Three hypotheses are compared: both of these emotions in one prompt, and each of the two least probable ones. Their priors are
    `evidence`.

    Args:
        log_probs: `[E, T]` float64, log-probability of each piece under each emotion.
        joint: `[T]` float64, log-probability of each piece under the prompt of the two most probable emotions.
        evidence: `[E]` float64, see `log_evidence`.

    Returns:
        `[T]` float64, `log(p / (1 - p))` of the probability p of the first hypothesis.
    """
    order = evidence.argsort(descending=True, stable=True)
    top = joint + evidence[order[:2]].logsumexp(0)
    others = (log_probs + evidence[:, None])[order[-2:]]
    return top - others.logsumexp(0)


def exact_odds(log_probs: Tensor, evidence: Tensor, top: int = 2) -> Tensor:
    """Log-odds that a piece was written under one of the most probable emotions, by Bayes' rule over all emotions.

    Args:
        log_probs: `[E, T]` float64, log-probability of each piece under each emotion.
        evidence: `[E]` float64, see `log_evidence`.
        top: number of the most probable emotions.

    Returns:
        `[T]` float64, `log(p / (1 - p))` of the summed probability p of these emotions.
    """
    order = evidence.argsort(descending=True, stable=True)
    weighted = log_probs + evidence[:, None]
    return weighted[order[:top]].logsumexp(0) - weighted[order[top:]].logsumexp(0)


class GEESystem:
    """A trained GEE, which finds emotions and causes.

    Args:
        folder: its folder.

    Raises:
        UserError: there is no GEE in it, or it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folders = {"model": Path(folder)}
        self.model = load_pretrained(GEE, folder, "emotion estimator (GEE)", "empcause train gee", GEEConfig.model_type)
        self.model.eval()
        self.tokenizer = load_own_tokenizer(self.model, folder, needed=["pad_token", "eos_token"])
        self.note = f"causes by Bayes' rule ({self.model.config.rule})"
        config = self.model.config
        self._prompts = [encode_prompt(config, self.tokenizer, emotion) for emotion in config.emotions]

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of the emotions that it knows, by their ids."""
        return tuple(self.model.config.emotions)

    def read(self, texts: Sequence[str], words: Sequence[Sequence[Word]], batch_size: int) -> list[Reading]:
        """Find emotions and causes of texts (see `Reads`).

        The value of a word is the highest one of its pieces; that of a piece is `p / (1 - p)`, divided by the highest one of the
        text. It keeps the order of the probabilities p, most of which are 1 within the precision of float32.

        Args:
            texts: raw texts.
            words: the words of each text.
            batch_size: texts per batch, each of them behind the prompt of one emotion.
        """
        config = self.model.config
        situations = [encode_situation(config, self.tokenizer, text) for text in texts]
        if cut := sum(situation.cut for situation in situations):
            logger.warning(
                f"{cut} of {len(texts)} texts have more than {config.max_length} tokens; no causes are found in the rest."
            )
        items = [make_item(config, prompt, situation) for situation in situations for prompt in self._prompts]
        flat = self._log_probs(items, batch_size)
        number = len(self._prompts)
        log_probs = [torch.stack(flat[place : place + number]) for place in range(0, len(flat), number)]
        of_pieces = [every[:, situation.is_piece] for every, situation in zip(log_probs, situations, strict=True)]
        evidence = [log_evidence(each, config.rule) for each in of_pieces]
        if config.rule == "published":
            items = [
                make_item(config, self._joint_prompt(each), situation)
                for each, situation in zip(evidence, situations, strict=True)
            ]
            joint = self._log_probs(items, batch_size)
            odds = [
                published_odds(each, both[situation.is_piece], prior)
                for each, both, prior, situation in zip(of_pieces, joint, evidence, situations, strict=True)
            ]
        else:
            odds = [exact_odds(each, prior) for each, prior in zip(of_pieces, evidence, strict=True)]
        if config.count_ends:
            evidence = [log_evidence(each, config.rule) for each in log_probs]
        return [
            Reading(each.softmax(0).float().numpy(), _word_values(value, situation, split))
            for each, value, situation, split in zip(evidence, odds, situations, words, strict=True)
        ]

    def _joint_prompt(self, evidence: Tensor) -> NDArray[np.int64]:
        """Tokenize the prompt of the two most probable emotions, the most probable one first."""
        best = evidence.argsort(descending=True, stable=True)[:2].tolist()
        return encode_prompt(self.model.config, self.tokenizer, *(self.emotions[index] for index in best))

    def _log_probs(self, items: Sequence[dict[str, NDArray[np.int64]]], batch_size: int) -> list[Tensor]:
        return [torch.from_numpy(-nll) for nll in label_nll(self.model, self.tokenizer, items, batch_size)]


def _word_values(odds: Tensor, situation: Situation, words: Sequence[Word]) -> NDArray[np.float32]:
    """Values of words, `[W]` float32 in [0, 1], from the log-odds of the pieces; 0 where a word has no piece."""
    relative = (odds - odds.max()).exp().numpy() if len(odds) else odds.numpy()
    return align_max(situation.spans[situation.is_piece], relative, [(word.start, word.end) for word in words])
