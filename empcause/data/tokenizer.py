"""A small tokenizer trained on given texts, for models that are trained from scratch."""

import os
from collections.abc import Iterable
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output_dir: str | os.PathLike[str],
    kind: Literal["encoder", "decoder"] = "encoder",
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it with `save_pretrained`.

    Args:
        texts: the texts that it learns from.
        vocab_size: size of its vocabulary, special tokens and 256 bytes included.
        output_dir: the folder in which it is saved.
        kind: an "encoder" tokenizer makes `<s> text </s>` of every text as RoBERTa's does, a "decoder" tokenizer adds nothing as
            GPT-2's does.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size must be at least {len(alphabet) + len(SPECIAL_TOKENS)}, not {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS.values()),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    extra = {}
    if kind == "encoder":
        ids = tokenizer.get_vocab()
        ends = ("</s>", ids["</s>"]), ("<s>", ids["<s>"])
        tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
        extra = {"cls_token": "<s>", "sep_token": "</s>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS, **extra)
    wrapped.save_pretrained(output_dir)
    return wrapped
