"""Configuration of EmpDG."""

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from empcause.data import EMPATHETIC_DIALOGUES
from empcause.errors import UserError
from empcause.ranges import COUNT, NOT_NEGATIVE, SEED, SHARE, check_values


class EmpDGConfig(PreTrainedConfig):
    """Configuration of EmpDG's generator (Li et al., COLING 2020).

    The defaults are the paper's sizes with the faults of the published code corrected; `copy_softmax`, `ffn_last_relu` and
    `initial_std` can be set as they were published.

    Args:
        vocab_size: number of words, special tokens included.
        hidden_size: width of the states (300), even and at least 4.
        attention_size: width of queries, keys and values over all heads (40).
        num_attention_heads: number of heads.
        filter_size: channels of the feed-forward layers' convolutions (50).
        dropout: probability of dropout after the embeddings and every layer.
        initial_std: standard deviation of word vectors that are not given; None: `hidden_size ** -0.5` (published: 0.01).
        copy_softmax: whether the softmax of the copy weights is taken "once" over real tokens, or "twice", the second time over
            padding too (published).
        ffn_last_relu: whether the feed-forward layers end in a ReLU (published).
        emotion_words: the lexicon, lower-cased words.
        adjectives: folder of a spaCy model whose adjectives are emotion words too; None: they are not.
        ranking: how emotion words are ranked as causes: in "random" order, in the "order" of the text, or by the "attention" of
            the emotion encoder's first token; "context" ranks all content words in their place, by the attention of the context
            encoder's first token.
        fill: rank the text's other content words behind the emotion words, in random order; otherwise they are not predicted.
        ranking_seed: seed of random orders.
        discriminators: whether discriminators took part in the training; it changes nothing that the model computes.
        id2label: names of the emotions by their ids; default is those of EmpatheticDialogues.

    Raises:
        UserError: a value is out of range.
    """

    model_type = "empdg"

    vocab_size: int = 8
    hidden_size: int = 300
    attention_size: int = 40
    num_attention_heads: int = 2
    filter_size: int = 50
    dropout: float = 0.0
    initial_std: float | None = None
    copy_softmax: Literal["once", "twice"] = "once"
    ffn_last_relu: bool = False
    emotion_words: list | None = None
    adjectives: str | None = None
    ranking: Literal["random", "order", "attention", "context"] = "random"
    fill: bool = False
    ranking_seed: int = 0
    discriminators: bool = False
    is_encoder_decoder: bool = True
    unk_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    bos_token_id: int = 3
    decoder_start_token_id: int = 3
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        counts = ("vocab_size", "hidden_size", "attention_size", "num_attention_heads", "filter_size")
        ranges = dict.fromkeys(counts, COUNT) | {"dropout": SHARE, "initial_std": NOT_NEGATIVE, "ranking_seed": SEED}
        check_values(self, ranges)
        if self.hidden_size % 2 or self.hidden_size < 4:
            raise UserError(f"hidden_size is {self.hidden_size}; expected an even number of at least 4.")
        if self.attention_size % self.num_attention_heads:
            raise UserError(
                f"attention_size is {self.attention_size}; expected a multiple of num_attention_heads, "
                f"{self.num_attention_heads}."
            )
        for name in ("fill", "discriminators"):
            if not isinstance(value := getattr(self, name), bool):
                raise UserError(f"{name} is {value!r}; expected true or false.")
        if self.fill and self.ranking == "context":
            raise UserError('ranking "context" ranks all content words already; leave out fill.')
        if self.id2label is None:  # type: ignore[has-type]
            self.id2label = dict(enumerate(EMPATHETIC_DIALOGUES.emotions))
        super().__post_init__(**kwargs)


AutoConfig.register("empdg", EmpDGConfig)
