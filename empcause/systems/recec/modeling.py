"""RecEC's two models (Gao and others, 2021): the emotion reasoner (stage 1), and the generator over it (stage 2)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from empcause.data.sequences import IGNORED
from empcause.systems.layers import Attention, sinusoids, smoothed_cross_entropy
from empcause.systems.recec.configuration import RecECConfig, RecECReasonerConfig

# What the published code adds to the logits of keys that the hard gate leaves out. It is finite, so that all keys have the same
# weight where all are left out.
_LEFT_OUT = -1e18


class CauseAttention(Attention):
    """Attention of the decoder to the causes in the context.

    Args:
        config: sizes, and the gate. "soft": keys and values are made of `p_i M_i`, so that a token without cause keeps its weight
            but adds a vector of zeros. "hard": keys and values are made of `M_i`, and only causes have a weight; where there are
            none, the result is 0 (as published: the mean over all tokens, padding included).
    """

    def __init__(self, config: RecECConfig) -> None:
        super().__init__(config.hidden_size, config.attention_size, config.num_heads, config.dropout)
        self.gate, self.published = config.gate, config.published

    def forward(self, hidden: Tensor, memory: Tensor, causes: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
        """Attend to causes.

        Args:
            hidden: `[B, T, d]` states of the decoder.
            memory: `[B, S, d]` states `M` of the context.
            causes: `[B, S]` the cause probabilities; with the hard gate 0 or 1.
            real: `[B, S]` bool, False at padding.

        Returns:
            `[B, T, d]`.
        """
        if self.gate == "soft":
            return super().forward(hidden, causes[..., None] * memory, real)
        kept = real & (causes > 0)
        if self.published:
            return super().forward(hidden, memory, torch.where(kept, 0.0, _LEFT_OUT).to(hidden.dtype))
        any_kept = kept.any(1, keepdim=True)
        return super().forward(hidden, memory, kept | ~any_kept) * any_kept[..., None]


class Sublayer(nn.Module):
    """A sublayer between its layer normalisation and its residual connection: `x + dropout(layer(norm(x), ...))`."""

    def __init__(self, config: RecECReasonerConfig, layer: nn.Module, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps)
        self.layer = layer
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, *others: Tensor, **options: Any) -> Tensor:
        """Add the layer's result to `[B, T, d]` states; the other arguments are the layer's."""
        return hidden + self.dropout(self.layer(self.norm(hidden), *others, **options))


def feed_forward(config: RecECReasonerConfig) -> nn.Module:
    """Two linear layers with ReLU and dropout between them."""
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.ffn_size),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.ffn_size, config.hidden_size),
    )


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward layer, both pre-norm."""

    def __init__(self, config: RecECReasonerConfig, heads: int) -> None:
        super().__init__()
        attention = Attention(config.hidden_size, config.attention_size, heads, config.dropout)
        self.attention = Sublayer(config, attention, eps=1e-6)
        self.feed_forward = Sublayer(config, feed_forward(config), eps=1e-6)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Transform `[B, S, d]` states; `mask` is `[B, S]` bool, False at padding."""
        return self.feed_forward(self.attention(hidden, mask=mask))


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the context, attention to its causes and a feed-forward layer, all pre-norm."""

    def __init__(self, config: RecECConfig) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.attention_size, config.num_heads, config.dropout)
        self.self_attention = Sublayer(config, Attention(*sizes), eps=1e-12)
        self.context_attention = Sublayer(config, Attention(*sizes), eps=1e-12)
        self.cause_attention = Sublayer(config, CauseAttention(config), eps=1e-12)
        self.feed_forward = Sublayer(config, feed_forward(config), eps=1e-12)

    def forward(self, hidden: Tensor, memory: Tensor, causes: Tensor, real: Tensor) -> Tensor:
        """Transform `[B, T, d]` states; the others are as for `CauseAttention`."""
        hidden = self.self_attention(hidden, causal=True)
        hidden = self.context_attention(hidden, memory, real)
        return self.feed_forward(self.cause_attention(hidden, memory, causes, real))


class RecECPreTrainedModel(PreTrainedModel):
    """What both models share: how their weights start."""

    config: RecECReasonerConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


@dataclass
class ReasonerOutput(ModelOutput):
    """Result of the emotion reasoner.

    Attributes:
        loss: 0-d, the sum of the two losses; None without labels.
        emotion_logits: `[B, E]`.
        cause_logits: `[B, S, 2]`; class 1 is "belongs to a cause".
        emotion_loss, cause_loss: 0-d, means over texts and over labelled tokens; None without labels.
    """

    loss: Tensor | None = None
    emotion_logits: Tensor | None = None
    cause_logits: Tensor | None = None
    emotion_loss: Tensor | None = None
    cause_loss: Tensor | None = None


class RecECReasoner(RecECPreTrainedModel):
    """Finds the emotion of a dialogue and the tokens that belong to its causes (stage 1).

    Args:
        config: the configuration.
    """

    config_class = RecECReasonerConfig
    base_model_prefix = "reasoner"
    accepts_loss_kwargs = False

    def __init__(self, config: RecECReasonerConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.block: nn.Module
        if config.published:
            self.block = Attention(config.hidden_size, config.attention_size, 1, config.dropout)
        else:
            self.block = EncoderBlock(config, heads=1)
        self.norm = nn.LayerNorm(config.hidden_size, 1e-6)
        self.emotion_head = nn.Linear(config.hidden_size, config.num_labels)
        self.cause_head = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is not self.words:
            return
        if self.config.published:
            init.uniform_(module.weight)
        else:
            # Words are added to positions, whose numbers are sines: beside smaller words the emotion is not learned for long.
            init.normal_(module.weight)

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of the emotions, by their ids."""
        return tuple(self.config.id2label[index] for index in range(self.config.num_labels))

    def get_input_embeddings(self) -> nn.Module:
        """The word table."""
        return self.words

    @torch.no_grad()
    def set_word_vectors(self, ids: Tensor, vectors: Tensor) -> None:
        """Start words at given vectors.

        Args:
            ids: `[n]` int64, the ids of these words; others keep what they have.
            vectors: `[n, d]`, their vectors.
        """
        self.words.weight[ids] = vectors.to(self.words.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        emotion_labels: Tensor | None = None,
        cause_labels: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> ReasonerOutput:
        """Predict emotions and causes, and compute the losses if there are labels.

        Args:
            input_ids: `[B, S]` token ids of contexts (`encode_pair`).
            attention_mask: `[B, S]`, 0 at padding.
            emotion_labels: `[B]` int64 emotion ids, or -100 for texts that do not count.
            cause_labels: `[B, S]` int64: 0, 1, or -100 for tokens that do not count; needed with `emotion_labels`.
            smoothing: share of every emotion label that is spread evenly over the emotions.

        Raises:
            ValueError: there are emotion labels and no cause labels.
        """
        words, mask = self.words(input_ids), attention_mask.bool()
        if self.config.published:
            hidden = self.dropout(self.block(self.dropout(words), mask=mask))
        else:
            hidden = self.block(self.dropout(words + sinusoids(words.shape[1], words.shape[2], words.device)), mask)
        hidden = self.norm(hidden)
        emotion_logits, cause_logits = self.emotion_head(hidden[:, 0]), self.cause_head(hidden)
        if emotion_labels is None:
            return ReasonerOutput(emotion_logits=emotion_logits, cause_logits=cause_logits)
        if cause_labels is None:
            raise ValueError("cause_labels are needed with emotion_labels; -100 where a token has none.")
        emotion_loss = _mean_loss(emotion_logits, emotion_labels, smoothing)
        cause_loss = _mean_loss(cause_logits, cause_labels)
        return ReasonerOutput(emotion_loss + cause_loss, emotion_logits, cause_logits, emotion_loss, cause_loss)


def _mean_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the labels that are not -100; 0 if there are none."""
    total = functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", label_smoothing=smoothing
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


@dataclass
class EncoderOutput(ModelOutput):
    """What the encoder knows about contexts.

    Attributes:
        last_hidden_state: `[B, S, d]`, the memory `M`.
        emotion_logits: `[B, E]` of the reasoner.
        emotion_state: `[B, 1, d]`, the vector of the most probable emotion, which every token's state starts with.
        causes: `[B, S]`: for the soft gate the cause probabilities, for the hard gate 0 and 1.
    """

    last_hidden_state: Tensor | None = None
    emotion_logits: Tensor | None = None
    emotion_state: Tensor | None = None
    causes: Tensor | None = None


class RecECEncoder(nn.Module):
    """The frozen emotion reasoner, and the encoder that reads a context with the emotion that the reasoner finds.

    Args:
        config: the configuration.
    """

    main_input_name = "input_ids"

    def __init__(self, config: RecECConfig) -> None:
        super().__init__()
        self.config = config
        self.reasoner = RecECReasoner(config.reasoner_config())
        self.reasoner.requires_grad_(False)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emotions = nn.Embedding(config.num_labels, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(EncoderBlock(config, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, 1e-6)

    def embed(self, token_ids: Tensor, emotion_state: Tensor) -> Tensor:
        """States `[B, T, d]` with which tokens start: word, position and emotion."""
        words = self.words(token_ids)
        return self.dropout(words + sinusoids(words.shape[1], words.shape[2], words.device) + emotion_state)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, cause_probs: Tensor | None = None, **kwargs: Any
    ) -> EncoderOutput:
        """Read contexts.

        Args:
            input_ids: `[B, S]` token ids (`encode_pair`).
            attention_mask: `[B, S]`, 0 at padding.
            cause_probs: `[B, S]` in [0, 1], needed with `causes: extractor` in place of what the reasoner says.
            **kwargs: what `generate` hands to every encoder; not used.

        Raises:
            ValueError: `cause_probs` are missing.
        """
        with torch.no_grad():
            found = self.reasoner(input_ids, attention_mask)
        if self.config.causes == "extractor":
            if cause_probs is None:
                raise ValueError("cause_probs are needed: this model was trained with the causes of an extractor.")
            causes = cause_probs
        else:
            causes = found.cause_logits.float().softmax(-1)[..., 1]
        if self.config.gate == "hard":
            # A straight-through Gumbel-softmax at temperature 1 whose gradient nobody uses is this draw.
            draws = self.training or self.config.published
            causes = torch.bernoulli(causes) if draws else (causes >= 0.5).to(causes)
        emotion_state = self.emotions(found.emotion_logits.argmax(-1))[:, None]
        hidden = self.embed(input_ids, emotion_state)
        for block in self.blocks:
            hidden = block(hidden, attention_mask.bool())
        return EncoderOutput(self.norm(hidden), found.emotion_logits, emotion_state, causes.to(hidden))


@dataclass
class RecECOutput(ModelOutput):
    """Result of the generator.

    Attributes:
        loss: 0-d float32, the smoothed cross-entropy summed over the labelled tokens, divided by their number or by
            `num_items_in_batch`; None without labels.
        logits: `[B, T, V]`; None with labels, which need those of the labelled tokens alone.
        token_losses: `[B, T]` float32 in nats, the negative log-likelihood of each labelled token, without smoothing; 0 where
            the label is -100. None without labels.
        encoder_outputs: the encoder's result.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    encoder_outputs: EncoderOutput | None = None


class RecEC(RecECPreTrainedModel, GenerationMixin):
    """Answers dialogues with attention to the causes of the speaker's emotion (stage 2).

    The emotion reasoner is a part of it; it is frozen and stays in evaluation mode (as published: dropout is on in training).

    Args:
        config: the configuration.
    """

    config_class = RecECConfig
    base_model_prefix = "recec"
    accepts_loss_kwargs = True

    config: RecECConfig

    def __init__(self, config: RecECConfig) -> None:
        super().__init__(config)
        self.encoder = RecECEncoder(config)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, 1e-12)
        self.post_init()
        self.generation_config.update(do_sample=True, top_k=3, temperature=0.6)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.config.published and module is self.encoder.words:
            init.xavier_uniform_(
                module.weight
            )  # the output layer shares these weights, and starts as every other layer

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of the emotions, by their ids."""
        return self.encoder.reasoner.emotions

    def get_input_embeddings(self) -> nn.Module:
        """The generator's word table, which is its output layer too."""
        return self.encoder.words

    @torch.no_grad()
    def set_word_vectors(self, ids: Tensor, vectors: Tensor) -> None:
        """Start words at given vectors (see `RecECReasoner.set_word_vectors`); as published, they have no effect."""
        if not self.config.published:
            self.encoder.words.weight[ids] = vectors.to(self.encoder.words.weight)

    def answer_greedily(self) -> None:
        """Make `generate` take the most probable token in place of sampling; `save_pretrained` keeps it so."""
        self.generation_config.update(do_sample=False, top_k=None, temperature=None)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder, which `generate` runs once."""
        return self.encoder

    def train(self, mode: bool = True) -> "RecEC":
        """Switch dropout on or off; the reasoner's stays off."""
        super().train(mode)
        if not self.config.published:
            self.encoder.reasoner.eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cause_probs: Tensor | None = None,
        encoder_outputs: EncoderOutput | None = None,
        num_items_in_batch: Tensor | int | None = None,
        smoothing: float = 0.0,
        **kwargs: Any,
    ) -> RecECOutput:
        """Compute the logits of responses, and the losses if there are labels.

        Args:
            input_ids: `[B, S]` token ids of contexts; may be left out with `encoder_outputs`.
            attention_mask: `[B, S]`, 0 at padding.
            decoder_input_ids: `[B, T]` token ids of responses behind the start token; default: the labels, shifted.
            labels: `[B, T]` token ids of responses with their end token, -100 where a token does not count.
            cause_probs: see `RecECEncoder`.
            encoder_outputs: what the encoder made of the contexts.
            num_items_in_batch: the number by which the summed loss is divided; default is the number of labelled tokens.
            smoothing: share of every label that is spread over the other tokens except padding.
            **kwargs: what `generate` hands to every decoder (`use_cache`, ...); not used.

        Raises:
            ValueError: there is neither a context nor its encoding, or neither labels nor `decoder_input_ids`.
        """
        if attention_mask is None or (encoder_outputs is None and input_ids is None):
            raise ValueError("attention_mask and one of input_ids and encoder_outputs are needed.")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, cause_probs)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids or labels are needed.")
            filled = labels.masked_fill(labels == IGNORED, self.config.pad_token_id)
            decoder_input_ids = functional.pad(filled[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        memory, _, emotion_state, causes = encoder_outputs.to_tuple()
        hidden = self.encoder.embed(decoder_input_ids, emotion_state)
        for block in self.blocks:
            hidden = block(hidden, memory, causes, attention_mask.bool())
        hidden = self.norm(hidden)
        if labels is None:
            logits = functional.linear(hidden, self.encoder.words.weight)
            return RecECOutput(logits=logits, encoder_outputs=encoder_outputs)
        counted = labels != IGNORED
        logits, targets = functional.linear(hidden[counted], self.encoder.words.weight).float(), labels[counted]
        log_probs = logits.log_softmax(-1)
        losses = smoothed_cross_entropy(log_probs, targets, self.config.pad_token_id, self.config.vocab_size, smoothing)
        number = num_items_in_batch if num_items_in_batch is not None else counted.sum().clamp(min=1)
        nll = -log_probs.detach().gather(1, targets[:, None])[:, 0]
        token_losses = nll.new_zeros(labels.shape).masked_scatter(counted, nll)
        return RecECOutput(losses.sum() / number, None, token_losses, encoder_outputs)


AutoModel.register(RecECReasonerConfig, RecECReasoner)
AutoModelForSeq2SeqLM.register(RecECConfig, RecEC)
