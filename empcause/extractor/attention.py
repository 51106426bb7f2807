"""Attention of the first token in an encoder's last layer: the one row that automatic labels need (Algorithm 1).

The row is computed from the outputs of the layer's query and key projections, which hooks collect. So the encoder runs its fast
attention as usual, nothing of size S x S is kept, and the same code serves every family.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from empcause.errors import UserError

# Names of the layers, of a layer's attention, and of the two projections in the supported families.
_LAYERS = ("encoder.layer", "transformer.layer")
_ATTENTIONS = ("attention.self", "attention.attn", "attention")
_PROJECTIONS = (("query", "key"), ("q", "k"), ("q_lin", "k_lin"))
_SUPPORTED = "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, MPNet and DistilBERT"


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def find_projections(encoder: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Find the query and key projections of an encoder's last layer.

    Raises:
        UserError: the encoder's attention is not a plain `softmax(q k)` with separate projections.
    """
    for layers in filter(None, (_child(encoder, path) for path in _LAYERS)):
        assert isinstance(layers, nn.ModuleList)
        for attention in filter(None, (_child(layers[-1], path) for path in _ATTENTIONS)):
            for names in _PROJECTIONS:
                query, key = (getattr(attention, name, None) for name in names)
                if isinstance(query, nn.Linear) and isinstance(key, nn.Linear):
                    return query, key
    raise UserError(
        f"Cannot read the attention of a {type(encoder).__name__}; encoders that work are {_SUPPORTED} "
        "(with separate query and key projections)."
    )


@contextmanager
def capture_projections(encoder: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs "query" and "key" of the last layer's projections while the encoder runs inside the block.

    Yields:
        A dictionary that then holds both, `[B, S, H * D]` each (H heads of size D), in the encoder's dtype.

    Raises:
        UserError: see `find_projections`.
    """
    captured: dict[str, Tensor] = {}
    query, key = find_projections(encoder)
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: captured.__setitem__(name, output))
        for name, module in (("query", query), ("key", key))
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def cls_attention(encoder: nn.Module, captured: dict[str, Tensor], attention_mask: Tensor, pooling: str) -> Tensor:
    """Compute the attention probabilities of the first token, before dropout, combined over heads.

    Args:
        encoder: the encoder that ran inside `capture_projections`.
        captured: what `capture_projections` collected.
        attention_mask: `[B, S]`, nonzero at tokens that may be attended.
        pooling: "mean" or "max" over heads.

    Returns:
        `[B, S]` float32; rows sum to 1 for "mean".
    """
    num_heads = encoder.config.num_attention_heads  # type: ignore[union-attr]
    query = captured["query"][:, :1].unflatten(-1, (num_heads, -1)).transpose(1, 2).float()
    key = captured["key"].unflatten(-1, (num_heads, -1)).transpose(1, 2).float()
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    position_bias = getattr(getattr(encoder, "encoder", None), "compute_position_bias", None)
    if position_bias is not None:  # MPNet
        scores = scores + position_bias(captured["key"])[:, :, :1].float()
    scores = scores.masked_fill(attention_mask[:, None, None] == 0, float("-inf"))
    probabilities = torch.softmax(scores, -1)[:, :, 0]
    return probabilities.mean(1) if pooling == "mean" else probabilities.amax(1)
