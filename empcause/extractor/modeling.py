"""The emotion cause extractor: an encoder with an emotion head and a cause head (eq 1-7)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from empcause.data.sequences import IGNORED
from empcause.extractor.attention import capture_projections, cls_attention, find_projections
from empcause.extractor.configuration import CauseExtractorConfig
from empcause.extractor.labels import automatic_labels
from empcause.extractor.losses import extractor_losses


@dataclass
class CauseExtractorOutput(ModelOutput):
    """Result of the extractor.

    Attributes:
        loss: 0-d, the weighted sum of the losses (eq 9); None without labels.
        emotion_logits: `[B, E]`, before the softmax of eq 2.
        cause_logits: `[B, S, 2]`, before the softmax of eq 6; class 1 is "caused the emotion".
        cls_attention: `[B, S]` float32 attention of the first token in the last layer, mean (or max) over heads.
        emotion_loss, cause_loss, aux_loss: 0-d, the parts of the loss without their weights; None if they were not computed.
    """

    loss: Tensor | None = None
    emotion_logits: Tensor | None = None
    cause_logits: Tensor | None = None
    cls_attention: Tensor | None = None
    emotion_loss: Tensor | None = None
    cause_loss: Tensor | None = None
    aux_loss: Tensor | None = None


class CauseExtractor(PreTrainedModel):
    """Finds the emotion of a text and the words that caused it.

    Args:
        config: the configuration.
        encoder: the pretrained encoder; default is a new one of the configuration.

    Raises:
        UserError: the encoder's attention cannot be read.
    """

    config_class = CauseExtractorConfig
    base_model_prefix = "extractor"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    config: CauseExtractorConfig

    def __init__(self, config: CauseExtractorConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = encoder if encoder is not None else AutoModel.from_config(config.encoder, **_no_pooler(config))
        find_projections(self.encoder)
        hidden_size = self.encoder.config.hidden_size
        self.dropout = nn.Dropout(config.head_dropout)
        self.emotion_head = nn.Linear(hidden_size, config.num_labels)
        self.cause_head = nn.Linear(hidden_size, 2)
        self.post_init()

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of the emotions, by their ids."""
        return tuple(self.config.id2label[index] for index in range(self.config.num_labels))

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's word embeddings."""
        return self.encoder.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        special_tokens_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
        emotion_labels: Tensor | None = None,
        cause_labels: Tensor | None = None,
        automatic: Tensor | None = None,
        counts: Tensor | None = None,
        **kwargs: Any,
    ) -> CauseExtractorOutput:
        """Predict emotions and causes, and compute the losses if `emotion_labels` are given.

        Args:
            input_ids: `[B, S]` token ids; the first token of every text is its class token.
            attention_mask: `[B, S]`, 0 at padding.
            special_tokens_mask: `[B, S]`, 1 at special tokens; needed for the losses.
            word_ids: `[B, S]` index of each token's content word, -1 for none; needed for automatic labels.
            emotion_labels: `[B]` int64 emotion ids, or -100 for texts that do not count.
            cause_labels: `[B, S]` int64: 0, 1, or -100 for tokens without a label (default: all of them).
            automatic: `[B]` bool, texts whose cause labels are made here from the attention (Algorithm 1).
            counts: `[3]`, numbers by which the summed losses are divided (see `extractor_losses`); default is those of the batch.

        Raises:
            ValueError: `special_tokens_mask` or `word_ids` are missing and needed.
        """
        with capture_projections(self.encoder) as captured:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        attention = cls_attention(self.encoder, captured, attention_mask, self.config.attention_pooling)
        hidden = self.dropout(hidden)
        emotion_logits, cause_logits = self.emotion_head(hidden[:, 0]), self.cause_head(hidden)
        output = CauseExtractorOutput(emotion_logits=emotion_logits, cause_logits=cause_logits, cls_attention=attention)
        if emotion_labels is None:
            return output
        if special_tokens_mask is None:
            raise ValueError("special_tokens_mask is needed with emotion_labels: causes are never special tokens.")
        real_tokens = (attention_mask != 0) & (special_tokens_mask == 0)
        if cause_labels is None:
            cause_labels = torch.full_like(input_ids, IGNORED)
        if automatic is not None and automatic.any():
            if word_ids is None:
                raise ValueError("word_ids are needed for automatic labels: whole words are chosen.")
            made = automatic_labels(attention.detach(), word_ids, real_tokens, self.config.automatic_top_k)
            cause_labels = torch.where(automatic[:, None], made, cause_labels)
        losses = extractor_losses(
            self.config, emotion_logits, cause_logits, attention, real_tokens, emotion_labels, cause_labels, counts
        )
        return CauseExtractorOutput(**{**output, **losses})


def _no_pooler(config: CauseExtractorConfig) -> dict[str, bool]:
    """Options that leave out the pooling layer of the families in which only their own classification heads use it."""
    pooled = {"bert", "roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text"}
    return {"add_pooling_layer": False} if getattr(config.encoder, "model_type", "") in pooled else {}


AutoModel.register(CauseExtractorConfig, CauseExtractor)
