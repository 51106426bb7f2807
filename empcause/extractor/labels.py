"""Automatic cause labels: the words that the first token attends to most (Algorithm 1)."""

import torch
from torch import Tensor

from empcause.data.sequences import IGNORED


def automatic_labels(attention: Tensor, word_ids: Tensor, real_tokens: Tensor, top_k: int) -> Tensor:
    """Label the tokens of the `top_k` most attended content words.

    Args:
        attention: `[B, S]` attention of the first token.
        word_ids: `[B, S]` index of the content word that a token belongs to, -1 at stop words, punctuation and special tokens.
        real_tokens: `[B, S]` bool, False at special tokens and padding.
        top_k: number of words per text; a text with fewer content words has all of them labelled.

    Returns:
        `[B, S]` int64: 1 at tokens of the chosen words, `IGNORED` (-100) at special tokens and padding, 0 elsewhere.
    """
    words = word_ids.clamp(min=0)
    is_content = (word_ids >= 0) & real_tokens
    num_words = int(word_ids.max()) + 1 if word_ids.numel() else 0
    labels = torch.where(real_tokens, 0, IGNORED)
    if num_words <= 0:
        return labels
    # The score of a word is the highest attention of its tokens.
    piece_scores = torch.where(is_content, attention.float(), -1.0)
    scores = piece_scores.new_full((len(words), num_words), -1.0).scatter_reduce(1, words, piece_scores, "amax")
    best = scores.topk(min(top_k, num_words), dim=1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best.indices, best.values >= 0)
    return torch.where(is_content & chosen.gather(1, words), 1, labels)
