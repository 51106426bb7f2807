"""Finding emotions and causes with a trained extractor."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from empcause.checkpoints import load_own_tokenizer, load_pretrained
from empcause.data import Causes, Word, align_max, split_words
from empcause.data.batching import length_batches
from empcause.data.collation import pad_batch
from empcause.errors import UserError
from empcause.extractor.configuration import CauseExtractorConfig
from empcause.extractor.encoding import encode_text, is_cut
from empcause.extractor.modeling import CauseExtractor

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Extraction:
    """What the extractor finds in one text.

    Attributes:
        text: the raw text.
        emotion_probs: `[E]` float32, probabilities in the order of the extractor's `emotions`.
        words: the words of the text.
        word_probs: `[W]` float32; the cause probability of a word is the highest one of its tokens.
        causes: character spans of the extractor's tokens without special tokens, and their cause probabilities.
    """

    text: str
    emotion_probs: NDArray[np.float32]
    words: tuple[Word, ...]
    word_probs: NDArray[np.float32]
    causes: Causes


def load_extractor(path: str | os.PathLike[str]) -> tuple[CauseExtractor, PreTrainedTokenizerBase]:
    """Load a trained extractor and its tokenizer, in evaluation mode.

    Raises:
        UserError: the folder does not exist, holds another kind of model, or is damaged.
    """
    model = load_pretrained(
        CauseExtractor, path, "extractor", "empcause train extractor", CauseExtractorConfig.model_type
    )
    return model.eval(), load_own_tokenizer(model, path, needed=["pad_token"])


@torch.inference_mode()
def extract(
    model: CauseExtractor,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    words: Sequence[Sequence[Word]] | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    progress: bool = False,
    share: tuple[int, int] = (0, 1),
) -> list[Extraction]:
    """Find emotion and causes of texts.

    Args:
        model: the extractor.
        tokenizer: its tokenizer.
        texts: raw texts; a text without words has no causes.
        words: their words where they are split already, as in annotations; default `split_words`.
        batch_size: texts per batch; batches hold texts of similar length.
        max_length: greatest number of tokens per text. Words beyond have probability 0, and a warning says in how many texts
            there are some. Default is the number that the encoder can read.
        progress: show a progress bar.
        share: `(k, n)`: read every n-th batch, from the k-th on. Together n processes that are given the same texts read each
            text once, in the batch in which one process would read it, so that its probabilities are the same.

    Returns:
        What was found in the texts, in their order; with `n > 1` only in those of the share.

    Raises:
        ValueError: `words` and `texts` differ in number.
        UserError: the extractor's probabilities are not finite.
    """
    if words is None:
        words = [split_words(text) for text in texts]
    if len(words) != len(texts):
        raise ValueError(f"words has {len(words)} entries for {len(texts)} texts; one list per text is expected.")
    limit = max_length or longest_input(model, tokenizer)
    items = [encode_text(tokenizer, text, split, limit) for text, split in zip(texts, words, strict=True)]
    cut = sum(is_cut(item, text, limit) for item, text in zip(items, texts, strict=True))
    if cut:
        logger.warning(f"{cut} of {len(texts)} texts have more than {limit} tokens; no causes are found in the rest.")
    batches = length_batches([len(item["input_ids"]) for item in items], batch_size)[share[0] :: share[1]]
    results: dict[int, Extraction] = {}
    was_training = model.training
    model.eval()
    for indices in tqdm(batches, desc="extracting causes", disable=not progress):
        batch = pad_batch([items[index] for index in indices], tokenizer.pad_token_id)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        output = model(**batch)
        emotion_probs = output.emotion_logits.float().softmax(-1).cpu().numpy()
        if model.config.cause_from == "head":
            cause_probs = output.cause_logits.float().softmax(-1)[..., 1]
        else:
            attention = output.cls_attention * (batch["special_tokens_mask"] == 0)
            cause_probs = attention / attention.amax(-1, keepdim=True).clamp(min=1e-9)
        if not (np.isfinite(emotion_probs).all() and cause_probs.isfinite().all()):
            raise UserError(
                "The extractor's probabilities are not numbers (NaN): its training diverged or its files are damaged."
            )
        for row, index in enumerate(indices):
            real = items[index]["special_tokens_mask"] == 0
            causes = Causes(items[index]["offsets"][real], cause_probs[row, : len(real)].cpu().numpy()[real])
            word_probs = align_max(*causes, [(word.start, word.end) for word in words[index]])
            results[index] = Extraction(texts[index], emotion_probs[row], tuple(words[index]), word_probs, causes)
    model.train(was_training)
    return [results[index] for index in sorted(results)]


def longest_input(model: CauseExtractor, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens that encoder and tokenizer can read."""
    config = model.encoder.config
    # RoBERTa's and MPNet's positions count from behind the padding index.
    offset = config.pad_token_id + 1 if config.model_type not in ("bert", "electra", "distilbert") else 0
    return min(config.max_position_embeddings - offset, tokenizer.model_max_length)
