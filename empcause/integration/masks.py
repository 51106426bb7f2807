"""The mask function: padding, cache position and packing in a small tensor of a class of its own.

transformers asks a mask function what each query may see. Biased attention needs less than a square mask: for every key the
first query row that may see it. `[B, 1, 1, K]` integers hold that; `HIDDEN` stands for a key that nobody sees. The position of
the queries in the cache is in there too (a key at position j is first seen by row j - query_offset), which matters with a
static cache, where there are more keys than are filled. Being four-dimensional, the tensor passes through `generate` untouched.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    packed_sequence_mask_function,
    prepare_padding_mask,
    remap_positions_for_packed_sequence,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from empcause.errors import UserError
from empcause.integration.classes import require
from empcause.ops.torch_internals import is_fake

# Stands for a key that no query sees: larger than any row, and small enough to be subtracted without overflow.
HIDDEN = 1 << 40
# Offset at which every query sees every key: attention that is not causal.
EVERYTHING = 1 << 30

# transformers composes mask functions as closures; the code of each, by which it is known.
_AND = and_masks(causal_mask_function).__code__
_REMAP = remap_positions_for_packed_sequence(causal_mask_function, None).__code__
_PACKED = packed_sequence_mask_function(None).__code__
# Patterns that leave out no key while there are few enough keys. Values: the closure's variable that holds the limit, what is
# added to it, and the name of the pattern.
_LIMITS = {
    sliding_window_overlay(1).__code__: ("sliding_window", 0, "a sliding window"),
    sliding_window_bidirectional_overlay(1).__code__: ("sliding_window", 1, "a sliding window to both sides"),
    chunked_overlay(1, None).__code__: ("chunk_size", 0, "attention in chunks"),
}
_NAMES = [what for _, _, what in _LIMITS.values()]
_OTHER_CODE = (
    'attn_implementation="empcause" does not reach this model\'s attention, which is code of its own and cannot read its mask; '
    'load it with "eager" or "sdpa".'
)


class KeyMask(Tensor):
    """A mask that only this package reads, int64.

    `[B, 1, 1, K]`: first query row that may see each key; with K = 0 all keys are there, causally. `[1, 2, longest, n + 1]`:
    prefix sums of the lengths of n packed sequences, the same in every row. `[1, 3, 1, 3]`: a limit that the keys exceed, their
    number, and the index of the pattern that has this limit: reading it is refused.

    It may be moved, copied and cut. Attention code that would compute with it takes it for another kind of mask, and is
    refused: whatever makes another dtype of it raises a UserError.

    Attributes:
        visible: its contents, once it has been read, since all layers read the same mask.
    """

    visible: "Visible | None" = None

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hand on what leaves the mask a mask; `unbind` reads it, as plain tensors."""
        if func is Tensor.unbind:
            return Tensor.__torch_function__(func, (Tensor,), args, kwargs or {})
        try:
            result = super().__torch_function__(func, types, args, kwargs or {})
        except RuntimeError as error:  # shapes or dtypes that do not go together
            raise UserError(_OTHER_CODE) from error
        if isinstance(result, Tensor) and result.dtype != torch.int64:
            raise UserError(_OTHER_CODE)
        return result


class Visible(NamedTuple):
    """What a `KeyMask` says about visible keys; None where it says nothing."""

    key_mask: Tensor | None = None  # [B, K] bool
    query_offset: Tensor | None = None  # 0-d int64
    cu_seqlens: Tensor | None = None  # [sequences + 1] int32, over the rows of the batch one after another
    longest: int = 0


def biased_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> KeyMask:
    """Mask function for `AttentionMaskInterface`; called by transformers.

    Args:
        batch_size, q_length, kv_length: B, Q, K.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: the pattern. Causal and bidirectional are understood, packed sequences found in position_ids, and
            windows and chunks, where they leave out no key or there is a single query row.
        attention_mask: `[B, <= K]` bool, False at padding.
        device: where the mask is made.
        config: the model's, whose class must have been checked.

    Raises:
        UserError: another pattern, or a model that has not been checked. A window or chunk that is shorter than the keys is
            refused by the layer that attends with it.
    """
    if config is not None:
        require(config, derived=True)
    seen = None
    if mask_function is bidirectional_mask_function:
        q_offset, kv_offset = EVERYTHING, 0
    elif mask_function is not causal_mask_function:
        packing, causal, limits = _understand(mask_function)
        keys = kv_length + kv_offset
        if packing is not None:
            keys = packing.shape[2]
        exceeded = [(limit, what) for limit, what in limits if keys > limit]
        if exceeded and (q_length > 1 or packing is not None):
            # Refused where it is read: models make masks for kinds of layers that they do not have.
            limit, what = exceeded[0]
            return _marked(torch.tensor([limit, keys, _NAMES.index(what)]).expand(1, 3, 1, 3))
        if packing is not None:
            return packing
        if exceeded:  # one query row: the pattern says for each key whether it is seen
            query = torch.as_tensor(q_offset, device=device).reshape(1, 1)
            position = torch.arange(kv_length, device=device)[None] + kv_offset
            seen = mask_function(torch.arange(batch_size, device=device)[:, None], 0, query, position)
        elif not causal:
            q_offset, kv_offset = EVERYTHING, 0
    aligned = isinstance(q_offset, int) and kv_offset + kv_length == q_offset + q_length
    if aligned and attention_mask is None and seen is None:
        return _marked(torch.empty(batch_size, 1, 1, 0, dtype=torch.int64, device=device))
    first = torch.arange(kv_length, device=device) + (kv_offset - q_offset)
    first = first.expand(batch_size, kv_length)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        first = torch.where(padding[:, kv_offset : kv_offset + kv_length].to(torch.bool), first, HIDDEN)
    if seen is not None:
        first = torch.where(seen, first, HIDDEN)
    return _marked(first[:, None, None])


def read_mask(mask: Tensor) -> Visible:
    """Read a mask made by `biased_attention_mask`, without synchronising a GPU.

    Raises:
        UserError: it is some other mask, or one of a window or chunk that is shorter than the keys.
    """
    if is_fake(mask):
        return _read(mask)
    if not isinstance(mask, KeyMask):
        raise UserError(
            'attn_implementation="empcause" makes its own mask from a two-dimensional attention_mask; it was given a '
            f"{mask.dtype} mask of shape {list(mask.shape)}, and arbitrary 4-D masks are not supported."
        )
    if torch.compiler.is_compiling():
        return _read(mask)
    if mask.visible is None:
        mask.visible = _read(mask)
    return mask.visible


def _read(mask: Tensor) -> Visible:
    rows = mask.unbind(1)
    if len(rows) == 2:
        return Visible(cu_seqlens=rows[0][0, 0].to(torch.int32), longest=rows[0].shape[1])
    if len(rows) == 3:
        limit, keys, what = rows[0][0, 0].tolist()
        raise UserError(
            f'attn_implementation="empcause" does not do {_NAMES[what]} of {limit} tokens over {keys} keys, which this model '
            f'asks for; it runs while there are at most {limit} ("eager" and "sdpa" run beyond).'
        )
    first = rows[0][:, 0]
    if not first.shape[1]:
        return Visible()
    position = torch.arange(first.shape[1], device=first.device)
    return Visible(first < HIDDEN, (position - first).amax())


def _understand(mask_function: Callable) -> tuple[KeyMask | None, bool, list[tuple[int, str]]]:
    """Take a composed pattern apart: its packing, whether it is causal, and limits with their names.

    Raises:
        UserError: a part that is not known.
    """
    packing, causal, limits = None, False, []
    for part, variables in _parts(mask_function):
        if part is _PACKED:
            packing = _pack(variables["packed_sequence_mask"])
        elif part in _LIMITS:
            variable, more, what = _LIMITS[part]
            limits.append((variables[variable] + more, what))
        elif part is causal_mask_function.__code__:
            causal = True
        elif part is not bidirectional_mask_function.__code__:
            raise UserError(
                'attn_implementation="empcause" does causal and bidirectional attention over padded or packed batches; this '
                'model asks for another pattern (a custom mask, or blocks that see both ways); load it with "eager" or "sdpa".'
            )
    return packing, causal, limits


def _parts(mask_function: Callable) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The parts whose conjunction a mask function is, as code and variables of the closure."""
    code = mask_function.__code__
    cells = mask_function.__closure__ or ()
    variables = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
    if code is _AND:
        for function in variables["mask_functions"]:
            yield from _parts(function)
    elif code is _REMAP:  # positions within each packed sequence: there the pattern is the same
        yield from _parts(variables["mask_function"])
    else:
        yield code, variables


def _marked(mask: Tensor) -> KeyMask:
    """The mask as ours. A fake tensor, which has shapes alone, can be of no other class."""
    return cast(KeyMask, mask) if is_fake(mask) else mask.as_subclass(KeyMask)


def _pack(sequence: Tensor) -> KeyMask:
    """Packing as a mask, from the number `[B, S]` of the sequence to which each token belongs."""
    starts = torch.ones_like(sequence, dtype=torch.bool)
    starts[:, 1:] = sequence.diff(dim=1) != 0
    end = torch.tensor([sequence.numel()], device=sequence.device)
    sums = torch.cat([starts.flatten().nonzero()[:, 0], end])
    return _marked(sums.expand(1, 2, int(sums.diff().max()), -1))
