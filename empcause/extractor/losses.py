"""The three losses of the extractor (eq 3, 7, 8) and their weighted sum (eq 9)."""

from torch import Tensor, nn

from empcause.data.sequences import IGNORED
from empcause.extractor.configuration import CauseExtractorConfig


def cause_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Compute the cross-entropy over two classes per token (eq 7); 0 if no token is labelled.

    Args:
        logits: `[B, S, 2]`.
        labels: `[B, S]` int64: 0, 1, or -100 for tokens that do not count.
        reduction: "mean" over the labelled tokens, or their "sum".

    Returns:
        A 0-d tensor of the logits' dtype.
    """
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1) if reduction == "mean" else total


def aux_loss(attention: Tensor, cause_probs: Tensor, real_tokens: Tensor, form: str) -> Tensor:
    """Compute the loss that links attention and cause detection (eq 8), as a mean over texts; gradients flow into both.

    Args:
        attention: `[B, S]` attention of the first token.
        cause_probs: `[B, S]` probability of the cause class.
        real_tokens: `[B, S]` bool; the attention is renormalised over these.
        form: "complement" `1 - <Att, C1>`, or "literal" `<Att, C1>`.

    Returns:
        A 0-d tensor.
    """
    weights = attention * real_tokens
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    product = (weights * cause_probs).sum(-1).mean()
    return 1 - product if form == "complement" else product


def extractor_losses(
    config: CauseExtractorConfig,
    emotion_logits: Tensor,
    cause_logits: Tensor,
    attention: Tensor,
    real_tokens: Tensor,
    emotion_labels: Tensor,
    cause_labels: Tensor,
) -> dict[str, Tensor]:
    """Compute all losses of a batch.

    Texts without any cause label take part in the emotion loss only.

    Args:
        config: weights and forms.
        emotion_logits: `[B, E]`, E emotions.
        cause_logits: `[B, S, 2]`.
        attention: `[B, S]` attention of the first token.
        real_tokens: `[B, S]` bool, False at special tokens and padding.
        emotion_labels: `[B]` int64 emotion ids.
        cause_labels: `[B, S]` int64: 0, 1, or -100.

    Returns:
        0-d tensors: "emotion_loss" (eq 3), "cause_loss" (eq 7) and "aux_loss" (eq 8), the last two only if a text has a cause
        label, and "loss", their weighted sum (eq 9).
    """
    losses = {"emotion_loss": nn.functional.cross_entropy(emotion_logits.float(), emotion_labels)}
    labelled = (cause_labels != IGNORED).any(-1)
    if labelled.any():
        logits = cause_logits.float()
        losses["cause_loss"] = cause_loss(logits, cause_labels, config.cause_reduction)
        cause_probs = logits.softmax(-1)[..., 1]
        losses["aux_loss"] = aux_loss(
            attention[labelled], cause_probs[labelled], real_tokens[labelled], config.aux_form
        )
    weights = {
        "emotion_loss": config.emotion_weight,
        "cause_loss": config.cause_weight,
        "aux_loss": config.aux_weight,
    }
    total = sum((weights[name] * value for name, value in losses.items()), emotion_logits.new_zeros(()))
    return {"loss": total, **losses}
