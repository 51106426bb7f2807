"""The attention function that transformers' models call under the name "empcause"."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from empcause.integration.masks import decode_mask
from empcause.ops import biased_attention, biased_attention_varlen

# Features of other models' attention that the operator does not have.
_REFUSED = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}


@dataclass(eq=False)
class Witness:
    """What the attention layers tell `steer` of one call of a model.

    Attributes:
        keys: by layer, the number of keys that it weighed by their causes.
    """

    keys: dict[int, int] = field(default_factory=dict)


def layer_strength(module: nn.Module, gamma: float) -> float:
    """Strength of the bias in a layer: `gamma * l / L`, l counted from 1 (section 3.3 of the paper).

    Raises:
        ValueError: the attention module does not know its place among the layers.
    """
    layer_idx = getattr(module, "layer_idx", None)
    config = getattr(module, "config", None)
    if layer_idx is None or config is None:
        raise ValueError(
            f"{type(module).__name__} has no layer_idx and config, which the strength of a layer depends on."
        )
    return gamma * (layer_idx + 1) / config.num_hidden_layers


def empcause_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cause_probs: Tensor | None = None,
    cause_gamma: float = 1.0,
    cause_witness: Witness | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Biased attention of one layer.

    Args:
        module: the attention module; its `layer_idx` and `config.num_hidden_layers` decide the strength.
        query: `[B, H, Q, D]`.
        key, value: `[B, Hkv, K, D]`.
        attention_mask: what `biased_attention_mask` made, or None.
        dropout: probability of dropping an attention probability.
        scaling: factor of the logits; default `D ** -0.5`.
        is_causal: overrides the module's own.
        cause_probs: `[B or 1, n]` cause probability of the first n <= K keys; later keys have 0.
        cause_gamma: factor of the strength.
        cause_witness: the layer writes down in it that the causes arrived, for `steer`.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: of packed sequences in a batch of one row, as transformers'
            flattening collator makes them: prefix sums `[sequences + 1]` int32, and the longest lengths. Pass an
            attention_mask of ones with them, or transformers itself looks for packing in position_ids.

    Returns:
        `[B, Q, H, D]` contiguous, and None for the attention weights, which are never formed.

    Raises:
        ValueError: a feature, mask or shape that is not supported.
    """
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="empcause" does not do {what} ({name}), which this model asks for.')
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # Rotary embeddings leave query and key in fp32 while value is in the autocast dtype.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    key_mask, query_offset = (None, None) if attention_mask is None else decode_mask(attention_mask)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) or attention_mask is not None  # with a mask, its offset says what may be seen
    cause, strength = None, 0.0
    if cause_probs is not None:
        cause = _fit(cause_probs, query.shape[0], key.shape[2])
        strength = layer_strength(module, cause_gamma)
        if cause_witness is not None:
            cause_witness.keys[int(module.layer_idx)] = key.shape[2]  # type: ignore[arg-type]
    options: dict[str, Any] = {"strength": strength, "causal": causal, "scale": scaling, "dropout_p": dropout}
    if cu_seq_lens_q is not None:
        if query.shape[0] != 1 or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
            raise ValueError(
                "Packed sequences are one row of a batch with cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k; "
                f"the batch has {query.shape[0]} rows, or one of these is missing."
            )
        packed = biased_attention_varlen(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            None if cause is None else cause[0],
            key_mask=None if key_mask is None else key_mask[0],
            cu_seqlens_q=cu_seq_lens_q,
            cu_seqlens_k=cu_seq_lens_k,
            max_seqlen_q=max_length_q,
            max_seqlen_k=max_length_k,
            **options,
        )
        return packed[None], None
    output = biased_attention(query, key, value, cause, key_mask=key_mask, query_offset=query_offset, **options)
    return output.transpose(1, 2), None


def _fit(cause_probs: Tensor, batch: int, keys: int) -> Tensor:
    """Extend causes of the prompt with 0 for keys that came later."""
    if cause_probs.dim() != 2 or cause_probs.shape[0] not in (1, batch) or cause_probs.shape[1] > keys:
        raise ValueError(
            f"cause_probs must be [batch, tokens] = [{batch}, at most {keys}], not {list(cause_probs.shape)}."
        )
    return nn.functional.pad(cause_probs, (0, keys - cause_probs.shape[1]))
