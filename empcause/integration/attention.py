"""The attention function that transformers models call when they run with attn_implementation="empcause"."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils.output_capturing import _active_collector

from empcause.errors import UserError
from empcause.integration.classes import require
from empcause.integration.masks import Visible, read_mask
from empcause.ops import biased_attention, biased_attention_varlen

# Keyword arguments that transformers passes to every attention function and that are safe to ignore: they do not change the
# result, or they are checked below or in the mask.
_HARMLESS = frozenset(
    "position_ids position_embeddings use_cache cache cache_position past_key_values output_hidden_states "
    "output_router_logits return_dict logits_to_keep num_items_in_batch labels token_type_ids sliding_window seq_idx".split()
)
# Descriptions of arguments for error messages, where the name alone does not say what the feature is.
_FEATURES = {
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "output_attentions": "attention weights, which are never formed",
    "head_mask": "a mask over heads",
}


@dataclass(eq=False)
class Witness:
    """What `steer` tells the attention layers in one call of a model, and the record that they make for `steer` to check.

    Attributes:
        ranges: by the number of keys that a layer may have, the position of its first key: above 0 once a layer with a sliding
            window has dropped keys.
        layers: the indices of the layers that applied the causes.
    """

    ranges: dict[int, int]
    layers: set[int] = field(default_factory=set)


def layer_strength(module: nn.Module, gamma: float) -> float:
    """Return the strength of the bias in a layer: `gamma * l / L`, with l counted from 1 (section 3.3 of the paper).

    Args:
        module: the attention module of the layer.
        gamma: the factor of the strength in all layers.

    Raises:
        UserError: the module has no `layer_idx` or no `config`, so its place among the layers is not known.
    """
    layer_idx = getattr(module, "layer_idx", None)
    config = getattr(module, "config", None)
    if layer_idx is None or config is None:
        raise UserError(
            f"{type(module).__name__} lacks layer_idx or config, on which the strength of the bias depends."
        )
    return gamma * (layer_idx + 1) / config.num_hidden_layers


def _refusal(name: str, module: nn.Module) -> UserError:
    """Return the error for an argument of the attention function that is not supported."""
    what = f"{_FEATURES[name]} ({name})" if name in _FEATURES else name
    return UserError(
        f'attn_implementation="empcause" does not do {what}, which {type(module).__name__} asks for; "eager" does.'
    )


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
    """Compute the biased attention of one layer.

    Under autocast query, key and value are converted to the autocast dtype first.

    Args:
        module: the attention module, of a class that has been checked; its `layer_idx` and `config.num_hidden_layers`
            determine the strength.
        query: `[B, H, Q, D]`.
        key, value: `[B, Hkv, K, D]`, of the query's dtype.
        attention_mask: the mask that `biased_attention_mask` made, or None.
        dropout: the probability of dropping an attention probability.
        scaling: the factor of the logits; default `D ** -0.5`.
        is_causal: overrides `module.is_causal` (True if the module has none). With a mask it has no effect: the mask's offset
            determines which keys are visible.
        cause_probs: `[B or 1, n]`, cause probabilities of the first n <= K keys; later keys have 0. With a witness either n = K,
            or they are those of all positions, of which the layer has some.
        cause_gamma: the factor of the strength.
        cause_witness: from `steer`: tells the positions of the keys, and the layer records here that the causes arrived.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: description of packed sequences in a batch of one row, as
            transformers' DataCollatorWithFlattening makes it: prefix sums `[sequences + 1]` int32, and the longest lengths.
            Without them packed sequences are read from the mask.
        **kwargs: the other arguments that transformers passes to every attention function.

    Returns:
        The output `[B, Q, H, D]`, contiguous, and None for the attention weights, which are never formed.

    Raises:
        UserError: the module's class, a feature, the mask or a shape is not supported.
        RuntimeError: the witness does not know which positions the keys have.
    """
    require(module)
    for name, given in kwargs.items():
        if given is not None and name not in _HARMLESS and not (given is False and name == "output_attentions"):
            raise _refusal(name, module)
    # Most models do not pass output_attentions on to their attention. Instead transformers collects the weights that the
    # attention modules return, and would collect nothing here. A ContextVar cannot be traced, so compiled code reads the
    # collector's plain variable.
    collected = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    if any(name.endswith("attentions") for name in collected or ()):
        raise _refusal("output_attentions", module)
    if key.shape[-1] != value.shape[-1]:
        raise UserError(
            f'attn_implementation="empcause" needs keys and values of one head size; those of {type(module).__name__} are '
            f'{key.shape[-1]} and {value.shape[-1]} ("eager" and "sdpa" support that).'
        )
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # Rotary embeddings leave query and key in fp32 while value is in the autocast dtype.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    visible = Visible() if attention_mask is None else read_mask(attention_mask)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) or attention_mask is not None  # the mask's offset determines which keys are visible
    _check_order(module, query, key, attention_mask, causal, visible, cu_seq_lens_q, kwargs)
    cause, strength = None, 0.0
    if cause_probs is not None:
        cause = _fit(module, cause_probs, query.shape[0], key.shape[2], cause_witness)
        strength = layer_strength(module, cause_gamma)
        if cause_witness is not None:
            cause_witness.layers.add(int(module.layer_idx))  # type: ignore[arg-type]
    options: dict[str, Any] = {"strength": strength, "causal": causal, "scale": scaling, "dropout_p": dropout}
    if cu_seq_lens_q is not None:
        if query.shape[0] != 1 or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
            raise UserError(
                "Packed sequences need a batch of one row with cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k; "
                f"the batch has {query.shape[0]} rows, or one of these is missing."
            )
    elif visible.cu_seqlens is not None:
        cu_seq_lens_q = cu_seq_lens_k = visible.cu_seqlens
        max_length_q = max_length_k = visible.longest
    if cu_seq_lens_q is not None:
        assert cu_seq_lens_k is not None
        assert max_length_q is not None
        assert max_length_k is not None
        batch, _, rows, _ = query.shape
        query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        if cause is not None:
            cause = cause.expand(batch, -1).flatten()
        packed = biased_attention_varlen(
            query,
            key,
            value,
            cause,
            key_mask=None if visible.key_mask is None else visible.key_mask.flatten(),
            cu_seqlens_q=cu_seq_lens_q,
            cu_seqlens_k=cu_seq_lens_k,
            max_seqlen_q=max_length_q,
            max_seqlen_k=max_length_k,
            **options,
        )
        return packed.unflatten(0, (batch, rows)), None
    output = biased_attention(
        query, key, value, cause, key_mask=visible.key_mask, query_offset=visible.query_offset, **options
    )
    return output.transpose(1, 2), None


def _check_order(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    visible: Visible,
    cu_seq_lens: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuse arguments with which a query would see keys that it must not see, because the mask does not hide them.

    Raises:
        UserError: there is a sliding window shorter than the keys, no mask for fewer queries than keys, or packed sequences that
            only `seq_idx` or `position_ids` show.
    """
    rows, keys = query.shape[2], key.shape[2]
    if rows == 1:
        return
    window = kwargs.get("sliding_window")
    longest = visible.longest or keys
    if window is not None and window < longest:
        raise UserError(
            f'attn_implementation="empcause" does not do a sliding window (sliding_window) of {window} tokens over {longest} '
            f'keys; it runs while there are at most {window} ("eager" and "sdpa" run beyond).'
        )
    if attention_mask is None and causal and rows != keys:
        raise UserError(
            f'attn_implementation="empcause" was given no mask for {rows} queries and {keys} keys, so it cannot know which '
            "keys a query may see."
        )
    if cu_seq_lens is not None or visible.cu_seqlens is not None:
        return
    if kwargs.get("seq_idx") is not None:
        raise UserError(
            "Packed sequences were given as seq_idx alone; pass their position_ids too (DataCollatorWithFlattening makes "
            "them by default) and use_cache=False."
        )
    position_ids = kwargs.get("position_ids")
    if (
        position_ids is not None
        and getattr(module, "layer_idx", 0) == 0  # one check per call of the model is enough
        and visible.key_mask is None
        and rows == keys
        and position_ids.dim() == 2
        and not torch.compiler.is_compiling()
        and find_packed_sequence_indices(position_ids) is not None
    ):
        # With a cache transformers does not look for packed sequences, so they would attend to one another.
        raise UserError(
            "position_ids hold several packed sequences, which transformers does not detect when there is a cache: pass "
            "use_cache=False, or an attention_mask if they are not packed."
        )


def _fit(module: nn.Module, cause_probs: Tensor, batch: int, keys: int, witness: Witness | None) -> Tensor:
    """Return the causes `[batch or 1, keys]` of the layer's keys.

    Raises:
        UserError: they have another shape.
        RuntimeError: the witness does not know which positions so many keys have.
    """
    number = cause_probs.shape[-1]
    if cause_probs.dim() != 2 or cause_probs.shape[0] not in (1, batch) or (witness is None and number > keys):
        raise UserError(
            f"cause_probs must be [batch, tokens] = [{batch}, at most {keys}], not {list(cause_probs.shape)}."
        )
    if number == keys:  # This is so in every call that `steer` makes of a model whose layers have equally many keys.
        return cause_probs
    if witness is None:
        return nn.functional.pad(cause_probs, (0, keys - number))
    if keys not in witness.ranges:
        raise RuntimeError(
            f"{type(module).__name__} attends to {keys} keys where cache and input hold {max(witness.ranges)}: it cannot be "
            "steered, because which of these keys belong to the input is not known."
        )
    first = witness.ranges[keys]
    return cause_probs[:, first : first + keys]
