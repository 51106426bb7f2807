"""EmpDG's generator: two encoders, an emotion classifier, and a decoder that can copy words."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from empcause.data.sequences import IGNORED
from empcause.systems.empdg.configuration import EmpDGConfig
from empcause.systems.layers import Attention, sinusoids, smoothed_cross_entropy, smoothing_entropy

# What `EmpDG.encode` takes of a batch.
CONTEXT = ("input_ids", "attention_mask", "token_type_ids", "emotion_ids", "emotion_mask")

# Added to probabilities before their logarithm is taken.
_TINY = 1e-18


class UnbiasedLayerNorm(nn.Module):
    """Layer normalisation by the unbiased standard deviation: `weight (x - mean) / (std + 1e-6) + bias`.

    torch's LayerNorm divides by the biased one.

    Args:
        width: size of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """Normalise the last dimension of states `[..., width]`."""
        centred = states - states.mean(-1, keepdim=True)
        return self.weight * centred / (states.std(-1, keepdim=True) + 1e-6) + self.bias


class FeedForward(nn.Module):
    """Two convolutions of width 3 over time with a ReLU between them.

    Args:
        config: gives the widths, and whether there is a ReLU at the end.
        causal: each position sees the two before it in place of both its neighbours.
    """

    def __init__(self, config: EmpDGConfig, causal: bool) -> None:
        super().__init__()
        self.first = nn.Conv1d(config.hidden_size, config.filter_size, 3)
        self.second = nn.Conv1d(config.filter_size, config.hidden_size, 3)
        self.sides = (2, 0) if causal else (1, 1)
        self.last_relu = config.ffn_last_relu

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform states.

        Args:
            states: `[B, S, width]`.
            mask: `[B, S]` bool, False at padding, which counts as zeros like what lies beyond the ends of a sequence; otherwise
                the result would depend on the batch. None: there is no padding that another position sees.
        """
        states, kept = states.transpose(1, 2), 1 if mask is None else mask[:, None]
        states = self.first(pad(states * kept, self.sides)).relu()
        states = self.second(pad(states * kept, self.sides))
        return (states.relu() if self.last_relu else states).transpose(1, 2)


class Encoder(nn.Module):
    """One pre-norm block over embedded tokens, whose positions are sinusoids.

    Args:
        config: gives the sizes.
    """

    def __init__(self, config: EmpDGConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.project = nn.Linear(width, width, bias=False)
        self.attention = Attention(width, config.attention_size, config.num_attention_heads)
        self.feed_forward = FeedForward(config, causal=False)
        self.attention_norm = UnbiasedLayerNorm(width)
        self.feed_forward_norm = UnbiasedLayerNorm(width)
        self.norm = UnbiasedLayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, embedded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tokens.

        Args:
            embedded: `[B, S, width]` embedded tokens without positions.
            mask: `[B, S]` bool, False at padding.

        Returns:
            The states `[B, S, width]`, and the attention of the first token `[B, S]`, the mean over heads.
        """
        states = self.dropout(self.project(embedded) + sinusoids(embedded.shape[1], embedded.shape[2], embedded.device))
        read = self.attention_norm(states)
        logits = self.attention.logits(read[:, :1], read)[:, :, 0]
        first = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1).mean(1)
        states = states + self.dropout(self.attention(read, mask=mask))
        states = states + self.dropout(self.feed_forward(self.feed_forward_norm(states), mask))
        return self.norm(states), first


class Decoder(nn.Module):
    """One pre-norm block: causal attention to what was said, attention to both encoders' states, a feed-forward layer.

    Args:
        config: gives the sizes.
    """

    def __init__(self, config: EmpDGConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.project = nn.Linear(width, width, bias=False)
        self.attention = Attention(width, config.attention_size, config.num_attention_heads)
        self.cross_attention = Attention(width, config.attention_size, config.num_attention_heads)
        self.feed_forward = FeedForward(config, causal=True)
        self.attention_norm = UnbiasedLayerNorm(width)
        self.cross_attention_norm = UnbiasedLayerNorm(width)
        self.feed_forward_norm = UnbiasedLayerNorm(width)
        self.norm = UnbiasedLayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, embedded: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Decode all positions at once.

        Args:
            embedded: `[B, T, width]` what each position reads: the start vector, then the words before.
            memory: `[B, K, width]` the encoders' states.
            mask: `[B, K]` bool, False at padding.

        Returns:
            The states `[B, T, width]`, and the logits of the attention to `memory` `[B, heads, T, K]`, not masked.
        """
        states = self.dropout(self.project(embedded) + sinusoids(embedded.shape[1], embedded.shape[2], embedded.device))
        states = states + self.dropout(self.attention(self.attention_norm(states), causal=True))
        read = self.cross_attention_norm(states)
        logits = self.cross_attention.logits(read, memory)
        states = states + self.dropout(self.cross_attention(read, memory, mask))
        states = states + self.dropout(self.feed_forward(self.feed_forward_norm(states)))
        return self.norm(states), logits


def copy_weights(logits: Tensor, mask: Tensor, softmax: str = "once") -> Tensor:
    """Probabilities with which source tokens are copied.

    Args:
        logits: `[B, heads, T, K]` of the attention to the source.
        mask: `[B, K]` bool, False at padding.
        softmax: "once" over the mean of the heads' logits; "twice", as published: again over these probabilities, which are
            nearly uniform then, with padding among them.

    Returns:
        `[B, T, K]`, rows sum to 1.
    """
    weights = logits.mean(1).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return weights.softmax(-1) if softmax == "twice" else weights


def mix_copies(logits: Tensor, gate: Tensor, copies: Tensor, source_ids: Tensor, extra_words: int) -> Tensor:
    """Mix the vocabulary's probabilities with those of copying a source token.

    Args:
        logits: `[B, T, V]` over the vocabulary.
        gate: `[B, T, 1]` probability of not copying.
        copies: `[B, T, K]` probabilities of the source tokens, once the word is a copy.
        source_ids: `[B, K]` int64 ids of the source tokens; V, V+1, ... are an item's own words outside of the vocabulary.
        extra_words: number of such ids.

    Returns:
        `[B, T, V + extra_words]` logarithms of the probabilities.
    """
    probs = pad(gate * logits.softmax(-1), (0, extra_words))
    index = source_ids[:, None].expand_as(copies)
    return (probs.scatter_add(2, index, (1 - gate) * copies) + _TINY).log()


@dataclass
class EmpDGContext(ModelOutput):
    """What the encoders make of a batch of contexts.

    Attributes:
        last_hidden_state: `[B, K, width]` states of the context's tokens, then those of its emotion words.
        mask: `[B, K]` bool, False at padding.
        source_ids: `[B, K]` int64, what `mix_copies` takes.
        emotion_logits: `[B, E]`.
        context_attention: `[B, n + 1]` attention of the context encoder's first token to itself and the words.
        emotion_attention: `[B, m + 1]` attention of the emotion encoder's first token to itself and the emotion words.
    """

    last_hidden_state: Tensor | None = None
    mask: Tensor | None = None
    source_ids: Tensor | None = None
    emotion_logits: Tensor | None = None
    context_attention: Tensor | None = None
    emotion_attention: Tensor | None = None


@dataclass
class EmpDGOutput(ModelOutput):
    """Result of the generator.

    Attributes:
        loss: 0-d, the divergence from the smoothed target plus the emotion's cross-entropy, summed over the batch; None without
            labels.
        logits: `[B, T, V + extra_words]` logarithms of the mixed probabilities.
        token_losses: `[B, T]` negative log-likelihood of the labels in nats, 0 where there is none; None without labels.
        emotion_logits: `[B, E]`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    emotion_logits: Tensor | None = None


class EmpDG(PreTrainedModel, GenerationMixin):
    """EmpDG's generator, which tells the emotion of a context and answers it.

    Args:
        config: the configuration.
    """

    config_class = EmpDGConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    config: EmpDGConfig

    def __init__(self, config: EmpDGConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width)
        self.context_encoder = Encoder(config)
        self.emotion_encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.emotion_head = nn.Linear(2 * width, config.num_labels, bias=False)
        self.start = nn.Linear(config.num_labels, width)
        self.gate = nn.Linear(width, 1)
        self.head = nn.Linear(width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw matrices by Xavier's uniform rule and words from a normal distribution; biases stay at torch's default."""
        if isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            std = self.config.initial_std
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5 if std is None else std)

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of the emotions, by their ids."""
        return tuple(self.config.id2label[index] for index in range(self.config.num_labels))

    def get_input_embeddings(self) -> nn.Module:
        """The word vectors."""
        return self.words

    def _embed(self, ids: Tensor) -> Tensor:
        """Vectors of tokens times the square root of their size; words outside of the vocabulary are unknown words."""
        known = torch.where(ids < self.config.vocab_size, ids, self.config.unk_token_id)
        return self.words(known) * self.config.hidden_size**0.5

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        emotion_ids: Tensor,
        emotion_mask: Tensor,
    ) -> EmpDGContext:
        """Encode contexts and their emotion words, and tell the emotion.

        Args:
            input_ids: `[B, n + 1]` int64, a class token and the words of all turns; V, V+1, ... are unknown words.
            attention_mask: `[B, n + 1]`, 0 at padding.
            token_type_ids: `[B, n + 1]` int64, the class token again, then for each token the token of its turn's role.
            emotion_ids: `[B, m + 1]` int64, the label token and the context's emotion words, numbered as in `input_ids`.
            emotion_mask: `[B, m + 1]`, 0 at padding.
        """
        mask, emotion_mask = attention_mask.bool(), emotion_mask.bool()
        states, context_attention = self.context_encoder(self._embed(input_ids) + self._embed(token_type_ids), mask)
        emotion_states, emotion_attention = self.emotion_encoder(self._embed(emotion_ids), emotion_mask)
        return EmpDGContext(
            last_hidden_state=torch.cat((states, emotion_states), 1),
            mask=torch.cat((mask, emotion_mask), 1),
            source_ids=torch.cat((input_ids, emotion_ids), 1),
            emotion_logits=self.emotion_head(torch.cat((emotion_states[:, 0], states[:, 0]), -1)),
            context_attention=context_attention,
            emotion_attention=emotion_attention,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        emotion_ids: Tensor | None = None,
        emotion_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: EmpDGContext | None = None,
        extra_words: int = 0,
        labels: Tensor | None = None,
        emotion_labels: Tensor | None = None,
        smoothing: float = 0.0,
        **kwargs: Any,
    ) -> EmpDGOutput:
        """Predict the emotion and each next word, and compute the loss if there are labels.

        Args:
            input_ids, attention_mask, token_type_ids, emotion_ids, emotion_mask: see `encode`; not needed with `encoder_outputs`.
            decoder_input_ids: `[B, T]` int64, any token and the words before each next one. The first token is not read, because
                the decoder starts from the emotion. Default: made of `labels`.
            encoder_outputs: what `encode` gives.
            extra_words: number of ids from V on in the batch.
            labels: `[B, T]` int64, the response with its end token, numbered as `input_ids`; -100 at padding.
            emotion_labels: `[B]` int64, or -100 for items that do not count.
            smoothing: share of the target that is spread over the vocabulary.
        """
        config = self.config
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask, token_type_ids, emotion_ids, emotion_mask)  # type: ignore[arg-type]
        context: Any = encoder_outputs
        if decoder_input_ids is None:
            if labels is None:
                return EmpDGOutput(emotion_logits=context.emotion_logits)
            before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, config.pad_token_id)
            decoder_input_ids = pad(before, (1, 0), value=config.decoder_start_token_id)
        start = self.start(context.emotion_logits)[:, None]
        embedded = torch.cat((start, self._embed(decoder_input_ids[:, 1:])), 1)
        states, logits = self.decoder(embedded, context.last_hidden_state, context.mask)
        copies = copy_weights(logits.float(), context.mask, config.copy_softmax)
        gate = self.gate(states).float().sigmoid()
        log_probs = mix_copies(self.head(states).float(), gate, copies, context.source_ids, extra_words)
        output = EmpDGOutput(logits=log_probs, emotion_logits=context.emotion_logits)
        if labels is not None:
            real = labels != IGNORED
            targets = labels.masked_fill(~real, config.pad_token_id)
            output.token_losses = -log_probs.gather(2, targets[..., None])[..., 0] * real
            smoothed = smoothed_cross_entropy(
                log_probs[real], labels[real], config.pad_token_id, config.vocab_size, smoothing
            )
            output.loss = (smoothed - smoothing_entropy(config.vocab_size, smoothing)).sum()
            if emotion_labels is not None:
                emotion_logits = context.emotion_logits.float()
                output.loss = output.loss + cross_entropy(emotion_logits, emotion_labels, reduction="sum")
        return output

    def answer_greedily(
        self, context: EmpDGContext, extra_words: int, max_new_tokens: int, feed_first: bool = False
    ) -> Tensor:
        """Answer contexts by the most probable word each time.

        Args:
            context: what `encode` gives.
            extra_words: number of ids from V on in the batch.
            max_new_tokens: greatest length of an answer.
            feed_first: each item goes on from the first item's words in place of its own, as published.

        Returns:
            `[B, L]` int64 with `L <= max_new_tokens`: the words with the end token, then padding.
        """
        assert context.last_hidden_state is not None
        size = (len(context.last_hidden_state), 1)
        output = self.generate(
            encoder_outputs=context,
            extra_words=extra_words,
            feed_first=feed_first,
            decoder_input_ids=torch.full(size, self.config.decoder_start_token_id, device=self.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=False,
        )
        return output[:, 1:]

    def prepare_inputs_for_generation(
        self,
        decoder_input_ids: Tensor,
        encoder_outputs: EmpDGContext,
        extra_words: int,
        feed_first: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward` for the next word; everything before it is computed again, because one layer is cheap."""
        if feed_first:
            decoder_input_ids = decoder_input_ids[:1].expand_as(decoder_input_ids)
        return {
            "decoder_input_ids": decoder_input_ids,
            "encoder_outputs": encoder_outputs,
            "extra_words": extra_words,
        }
