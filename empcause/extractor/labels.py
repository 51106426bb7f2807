"""Automatic cause labels: the words that the first token attends to most (Algorithm 1)."""

import torch
from torch import Tensor

from empcause.data.sequences import IGNORED


def automatic_labels(attention: Tensor, word_ids: Tensor, real_tokens: Tensor, top_k: int) -> Tensor:
    """Label the pieces of the `top_k` most attended content words 1, all other real pieces 0.

    Args:
        attention: `[B, S]` attention of the first token.
        word_ids: `[B, S]` index of the content word a piece belongs to, -1 for stop words, punctuation, special tokens.
        real_tokens: `[B, S]` bool, False at special tokens and padding.
        top_k: how many words per text; fewer where the text has fewer content words.

    Returns:
        `[B, S]` int64; `IGNORED` (-100) at special tokens and padding.
    """
    words = word_ids.clamp(min=0)
    is_content = (word_ids >= 0) & real_tokens
    num_words = int(word_ids.max()) + 1 if word_ids.numel() else 0
    labels = torch.where(real_tokens, 0, IGNORED)
    if num_words <= 0:
        return labels
    # A word's score is that of its best piece.
    piece_scores = torch.where(is_content, attention.float(), -1.0)
    scores = piece_scores.new_full((len(words), num_words), -1.0).scatter_reduce(1, words, piece_scores, "amax")
    best = scores.topk(min(top_k, num_words), dim=1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best.indices, best.values >= 0)
    return torch.where(is_content & chosen.gather(1, words), 1, labels)
