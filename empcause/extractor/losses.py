"""The three losses of the extractor (eq 3, 7, 8) and their weighted sum (eq 9)."""

import torch
from torch import Tensor, nn

from empcause.data.sequences import IGNORED
from empcause.extractor.configuration import CauseExtractorConfig


def count_labels(emotion_labels: Tensor, cause_labels: Tensor) -> Tensor:
    """Count what the losses of a batch are means over.

    Args:
        emotion_labels: `[B]` int64 emotion ids, or -100.
        cause_labels: `[B, S]` int64: 0, 1, or -100.

    Returns:
        `[3]` int64: numbers of texts with an emotion label, of tokens with a cause label, and of texts with such a token.
    """
    labelled = cause_labels != IGNORED
    return torch.stack([(emotion_labels != IGNORED).sum(), labelled.sum(), labelled.any(-1).sum()])


def cause_loss(logits: Tensor, labels: Tensor, reduction: str, number: Tensor | None = None) -> Tensor:
    """Compute the cross-entropy over two classes per token (eq 7); 0 if no token is labelled.

    Args:
        logits: `[B, S, 2]`.
        labels: `[B, S]` int64: 0, 1, or -100 for tokens that do not count.
        reduction: "mean" over the labelled tokens, or their "sum".
        number: 0-d, the number by which a mean divides the sum; default is that of the labelled tokens.

    Returns:
        A 0-d tensor of the logits' dtype.
    """
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    if number is None:
        number = (labels != IGNORED).sum()
    return total / number.clamp(min=1) if reduction == "mean" else total


def aux_loss(
    attention: Tensor, cause_probs: Tensor, real_tokens: Tensor, form: str, number: Tensor | int | None = None
) -> Tensor:
    """Compute the loss that links attention and cause detection (eq 8), as a mean over texts; gradients flow into both.

    Args:
        attention: `[B, S]` attention of the first token.
        cause_probs: `[B, S]` probability of the cause class.
        real_tokens: `[B, S]` bool; the attention is renormalised over these.
        form: "complement" `1 - <Att, C1>`, or "literal" `<Att, C1>`.
        number: the number by which the sum over texts is divided; default is that of these texts.

    Returns:
        A 0-d tensor.
    """
    weights = attention * real_tokens
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    product = (weights * cause_probs).sum(-1)
    return (1 - product if form == "complement" else product).sum() / (len(product) if number is None else number)


def extractor_losses(
    config: CauseExtractorConfig,
    emotion_logits: Tensor,
    cause_logits: Tensor,
    attention: Tensor,
    real_tokens: Tensor,
    emotion_labels: Tensor,
    cause_labels: Tensor,
    counts: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute all losses of a batch, or its share of the losses of several batches that are trained on in one step.

    Texts without any cause label take part in the emotion loss only.

    Args:
        config: weights and forms.
        emotion_logits: `[B, E]`, E emotions.
        cause_logits: `[B, S, 2]`.
        attention: `[B, S]` attention of the first token.
        real_tokens: `[B, S]` bool, False at special tokens and padding.
        emotion_labels: `[B]` int64 emotion ids, or -100 for texts that do not count.
        cause_labels: `[B, S]` int64: 0, 1, or -100.
        counts: `[3]`, the sum of `count_labels` over the batches of the step; default is those of this batch. The losses of the
            batches then add up to those of one batch with all their texts.

    Returns:
        0-d tensors: "emotion_loss" (eq 3), "cause_loss" (eq 7) and "aux_loss" (eq 8), the last two only if a text has a cause
        label, and "loss", their weighted sum (eq 9).
    """
    texts, tokens, labelled_texts = count_labels(emotion_labels, cause_labels) if counts is None else counts
    losses = {
        "emotion_loss": nn.functional.cross_entropy(
            emotion_logits.float(), emotion_labels, ignore_index=IGNORED, reduction="sum"
        )
        / texts
    }
    if tokens > 0:  # the same on all processes of a step, which must compute gradients of the same weights
        labelled = (cause_labels != IGNORED).any(-1)
        logits = cause_logits.float()
        losses["cause_loss"] = cause_loss(logits, cause_labels, config.cause_reduction, tokens)
        cause_probs = logits.softmax(-1)[..., 1]
        losses["aux_loss"] = aux_loss(
            attention[labelled], cause_probs[labelled], real_tokens[labelled], config.aux_form, labelled_texts
        )
    weights = {
        "emotion_loss": config.emotion_weight,
        "cause_loss": config.cause_weight,
        "aux_loss": config.aux_weight,
    }
    total = sum((weights[name] * value for name, value in losses.items()), emotion_logits.new_zeros(()))
    return {"loss": total, **losses}
