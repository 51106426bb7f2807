"""The raw operators in Triton: from tensors to launches (compare csrc/torch/operators.h).

Everything that the kernels take for granted of their arguments is checked here, as the raw operators can be called by anybody:
nothing outside of the arguments is ever read or written. Nothing waits for the GPU.
"""

import contextlib
import inspect
import math
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from empcause.kernels import weights
from empcause.kernels.backward import backward_keys_kernel, backward_queries_kernel
from empcause.kernels.configurations import Configuration, block_d, configuration
from empcause.kernels.decode import MAX_PARTS, decode_kernel, merge_kernel
from empcause.kernels.forward import forward_kernel
from empcause.kernels.launch import launch
from empcause.ops.registration import cause_sizes, num_flags

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
MOST_ROWS = 2**30  # of a sequence: their indices are of 32 bits, with room for sums
MOST_ELEMENTS = 2**60  # of any tensor: their number and their bytes are counted in 64 bits


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cause: Tensor | None,
    strength: float,
    head_strength: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    query_offset: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output and what a backward pass needs.

    Returns:
        Output `[B, H, Q, D]`, packed `[N, H, D]`; an empty tensor, where the CPU's kernels leave what rounding took from it; LSE
        of rows in one or two parts `[B, H, 1 or 2, Q]`, packed `[H, 1 or 2, N]` (see `attention.py`); log2 of the weights and
        their flags `[B or 1, H or 1, K + flags]` (see `weights.py`), empty where neither cause nor key_mask is given.
    """
    weighting = (cause, strength, head_strength, key_mask)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return Call(query, key, value, *weighting, *packing, causal, scale, dropout_p, seed, query_offset).forward()


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    rounding: Tensor,
    statistics: Tensor,
    weights: Tensor,
    cause: Tensor | None,
    strength: float,
    head_strength: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    query_offset: Tensor | None,
    cause_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and cause; the last is empty without `cause_grad`."""
    weighting = (cause, strength, head_strength, key_mask)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = Call(query, key, value, *weighting, *packing, causal, scale, dropout_p, seed, query_offset)
    return call.backward(grad_output, output, rounding, statistics, weights, cause_grad)


class Call:
    """One call: its arguments checked. Its launches are made by `launch`."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cause: Tensor | None,
        strength: float,
        head_strength: Tensor | None,
        key_mask: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        query_offset: Tensor | None,
    ) -> None:
        self.packed = cu_seqlens_q is not None
        _require(self.packed == (cu_seqlens_k is not None), "cu_seqlens_q and cu_seqlens_k come together")
        self.query, self.dtype, self.device = query, query.dtype, query.device
        self.check_shapes(key, value)
        self.query, self.key, self.value = _whole_rows(query), _whole_rows(key), _whole_rows(value)

        self.batch, self.max_queries, self.max_keys = self.outer, self.num_queries, self.num_keys  # of sequences
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            sums = cu_seqlens_q.numel()
            _require(sums > 0, "cu_seqlens_q must have a number per sequence and one more, not none")
            self.check_contiguous("cu_seqlens_q", cu_seqlens_q, torch.int32, (sums,))
            self.check_contiguous("cu_seqlens_k", cu_seqlens_k, torch.int32, (sums,))
            _require(min(max_seqlen_q, max_seqlen_k) >= 0, "max_seqlen_q and max_seqlen_k must not be negative")
            self.batch, self.max_queries, self.max_keys = sums - 1, max_seqlen_q, max_seqlen_k
        else:
            _require(
                max_seqlen_q == max_seqlen_k == 0,
                "max_seqlen_q and max_seqlen_k must be 0 without cu_seqlens_q and cu_seqlens_k",
            )
        longest = max(self.num_queries, self.num_keys, self.max_queries, self.max_keys)
        _require(longest < MOST_ROWS, "the Triton kernels take fewer than 2^30 queries and keys")
        self.check_number("query_offset", query_offset)
        _require(abs(scale) <= torch.finfo(torch.float32).max, "scale must be finite in fp32")
        _require(0.0 <= dropout_p < 1.0, "dropout_p must be in [0, 1)")
        _require(dropout_p == 0.0 or seed is not None, "dropout needs a seed")
        self.check_number("seed", seed)
        self.threshold = math.floor(dropout_p * 65536 + 0.5)
        self.cause, self.strength, self.head_strength, self.key_mask = cause, strength, head_strength, key_mask
        self.check_weighting()
        self.current_device = _current_device(query)
        self.shared: dict[str, Any] = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "log2_weight": None,
            # Of batch and heads; what is 1 there is broadcast.
            "weight_batch": 0,
            "weight_head": 0,
            "cu_queries": cu_seqlens_q,
            "cu_keys": cu_seqlens_k,
            "query_offset": query_offset,
            "seed": seed,
            **self.strides("query", self.query),
            **self.strides("key", self.key),
            **self.strides("value", self.value),
            "num_heads": self.num_heads,
            "group": self.num_heads // self.num_key_heads,
            "total_queries": self.num_queries,
            "total_keys": self.num_keys,
            "num_outer": self.outer,
            # A float64 product: the kernels round once.
            "scale": scale * math.log2(math.e),
            "threshold": self.threshold,
            "kept_factor": 1.0 / (1.0 - dropout_p),
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": block_d(self.head_dim),
            "CAUSAL": causal,
            "DROPOUT": self.threshold != 0,
        }

    def check_shapes(self, key: Tensor, value: Tensor) -> None:
        """Of query, key and value; keeps their sizes."""
        query, dims, row_axis = self.query, 3 if self.packed else 4, 0 if self.packed else 2
        form, key_form = ("[N, H, D]", "[M, Hkv, D]") if self.packed else ("[B, H, Q, D]", "[B, Hkv, K, D]")
        if self.dtype not in _DTYPES:
            _refuse("query", "float32, bfloat16 or float16", query)
        if query.dim() != dims:
            _refuse("query", form, query)
        if key.dim() != dims:
            _refuse("key", key_form, key)
        self.num_heads, self.num_key_heads, self.head_dim = query.shape[1], key.shape[1], query.shape[-1]
        if not 1 <= self.head_dim <= LARGEST_HEAD_DIM:
            _refuse("query", f"{form} with head sizes up to {LARGEST_HEAD_DIM}", query)
        self.num_queries, self.num_keys = query.shape[row_axis], key.shape[row_axis]
        self.outer = 1 if self.packed else query.shape[0]
        for name, tensor in (("key", key), ("value", value)):
            self.check(name, tensor, self.dtype, self.rows_shape(self.num_keys, self.num_key_heads))
        elements = self.outer * self.num_heads * (self.num_queries + self.num_keys + 1) * self.head_dim
        _require(elements < MOST_ELEMENTS, "there are too many rows for their number to be counted in 64 bits")
        if self.num_key_heads < 1 or self.num_heads % self.num_key_heads:
            _refuse("key", f"{key_form} with Hkv a divisor of {self.num_heads}", key)

    def rows_shape(self, rows: int, heads: int) -> tuple[int, ...]:
        return (rows, heads, self.head_dim) if self.packed else (self.outer, heads, rows, self.head_dim)

    def check(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != self.device:
            _refuse(name, f"{_name(dtype)} {list(shape)} on {self.device}", tensor)

    def check_contiguous(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.check(name, tensor, dtype, shape)
        _require(tensor.is_contiguous(), f"{name} must be contiguous")

    def check_number(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            self.check(name, tensor, torch.int64, ())

    def check_weighting(self) -> None:
        """Checks cause, head_strength and key_mask; keeps the shape of the weights, None where all are 1."""
        self.cause_batch = self.cause_heads = 1
        if self.cause is not None:
            self.check_cause(self.cause)
        if self.head_strength is not None:
            self.check_contiguous("head_strength", self.head_strength, torch.float32, (self.num_heads,))
        if self.key_mask is not None:
            shape = (self.num_keys,) if self.packed else (self.outer, self.num_keys)
            self.check_contiguous("key_mask", self.key_mask, torch.bool, shape)
        self.weights_shape: tuple[int, int, int] | None = None
        if self.cause is not None or self.key_mask is not None:
            per_head = self.cause_heads != 1 or (self.head_strength is not None and self.cause is not None)
            batch = self.outer if self.cause_batch != 1 or self.key_mask is not None else 1
            self.weights_shape = (batch, self.num_heads if per_head else 1, self.num_keys + num_flags(self.num_keys))

    def check_cause(self, cause: Tensor) -> None:
        """Checks a cause: `[B or 1, K]`, `[B or 1, H or 1, K]`, packed `[M]`, `[H or 1, M]`; keeps its batch and heads."""
        if cause.dim() + self.packed not in (2, 3):
            forms = "[M] or [H or 1, M]" if self.packed else "[B or 1, K] or [B or 1, H or 1, K]"
            _refuse("cause", f"float32 {forms}", cause)
        self.cause_batch, self.cause_heads = cause_sizes(cause, self.packed)
        shape: tuple[int, ...] = () if self.packed else (1 if self.cause_batch == 1 else self.outer,)
        shape += (1 if self.cause_heads == 1 else self.num_heads,) if cause.dim() + self.packed == 3 else ()
        self.check_contiguous("cause", cause, torch.float32, (*shape, self.num_keys))

    def compute_weights(self) -> Tensor:
        """Returns log2 of the weights and their flags, for the kernels and for the backward pass."""
        if self.weights_shape is None:
            return self.query.new_empty(0, dtype=torch.float32)
        result = self.query.new_empty(self.weights_shape, dtype=torch.float32)
        self.set_weights(result)
        batch, heads, _ = self.weights_shape
        blocks = ceil_div(self.num_keys, weights.BLOCK)
        self.launch(
            weights.weights_kernel,
            batch * heads * blocks,
            weights.OPTIONS,
            cause=self.cause,
            head_strength=self.head_strength,
            key_mask=self.key_mask,
            strength=self.strength,
            cause_batch=0 if self.cause_batch == 1 else self.cause_heads * self.num_keys,
            cause_head=0 if self.cause_heads == 1 else self.num_keys,
            num_heads=heads,
            num_blocks=blocks,
            BLOCK=weights.BLOCK,
        )
        return result

    def check_weights(self, tensor: Tensor) -> None:
        """Checks the weights that a forward pass has returned."""
        if self.weights_shape is None:
            self.check("weights", tensor, torch.float32, (0,))
        else:
            self.check_contiguous("weights", tensor, torch.float32, self.weights_shape)
            self.set_weights(tensor)

    def set_weights(self, tensor: Tensor) -> None:
        batch, heads, keys = tensor.shape
        self.shared["log2_weight"] = tensor
        self.shared["weight_batch"] = 0 if batch == 1 else heads * keys
        self.shared["weight_head"] = 0 if heads == 1 else keys

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = self.new_rows(self.num_queries, self.num_heads)
        statistics = self.query.new_empty(self.statistics_shape(), dtype=torch.float32)
        with self.current_device:
            weights = self.compute_weights()
            shared_weights = self.weights_shape is None or self.weights_shape[1] == 1
            packed_heads = self.num_heads // self.num_key_heads if shared_weights else 1
            if self.threshold == 0 and packed_heads * self.max_queries <= 16:
                self.decode(output, statistics, packed_heads)
            else:
                self.attend(output, statistics)
        return output, self.query.new_empty(0, dtype=torch.int16), statistics, weights

    def attend(self, output: Tensor, statistics: Tensor) -> None:
        tiles = self.configuration("forward")
        blocks = ceil_div(self.max_queries, tiles.block_m)
        self.launch(
            forward_kernel,
            self.batch * self.num_heads * blocks,
            tiles.options,
            output=output,
            statistics=statistics,
            num_blocks=blocks,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            NUM_STAGES=tiles.num_stages,
        )

    def decode(self, output: Tensor, statistics: Tensor, packed_heads: int) -> None:
        tiles = self.configuration("decode")
        units = self.batch * self.num_heads // packed_heads
        wanted = ceil_div(2 * _multiprocessors(self.query.device), max(units, 1))
        parts = max(1, min(wanted, ceil_div(self.max_keys, 256), MAX_PARTS))
        rows = self.outer * self.num_queries * self.num_heads
        part_output = self.query.new_empty((parts, rows, self.head_dim), dtype=torch.float32)
        part_maximum, part_total = self.query.new_empty((2, parts, rows), dtype=torch.float32)
        found = {"part_output": part_output, "part_maximum": part_maximum, "part_total": part_total, "parts": parts}
        self.launch(
            decode_kernel,
            units * parts,
            tiles.options,
            **found,
            packed_heads=packed_heads,
            max_queries=max(self.max_queries, 1),
            part_keys=ceil_div(ceil_div(self.max_keys, parts), tiles.block_n) * tiles.block_n,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            NUM_STAGES=tiles.num_stages,
        )
        self.launch(
            merge_kernel,
            rows,
            {"num_warps": 4},
            **found,
            output=output,
            statistics=statistics,
            BLOCK_P=16,
            MAX_PARTS=MAX_PARTS,
        )

    def backward(
        self,
        grad_output: Tensor,
        output: Tensor,
        rounding: Tensor,
        statistics: Tensor,
        weights: Tensor,
        cause_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = self.rows_shape(self.num_queries, self.num_heads)
        self.check("grad_output", grad_output, self.dtype, shape)
        self.check("output", output, self.dtype, shape)
        self.check("rounding", rounding, torch.int16, (0,))
        self.check_contiguous("statistics", statistics, torch.float32, self.statistics_shape())
        _require(not cause_grad or self.cause is not None, "cause_grad without cause")
        self.check_weights(weights)
        grad_output, output = _whole_rows(grad_output), _whole_rows(output)
        grad_query = self.new_rows(self.num_queries, self.num_heads)
        grad_key = self.new_rows(self.num_keys, self.num_key_heads)
        grad_value = self.new_rows(self.num_keys, self.num_key_heads)
        shape = (self.num_heads, self.num_queries)
        delta = self.query.new_empty(shape if self.packed else (self.outer, *shape), dtype=torch.float32)
        grad_weight, grad_cause = None, self.query.new_empty(0, dtype=torch.float32)
        if cause_grad and self.cause is not None:
            grad_weight = self.query.new_empty((self.outer, self.num_heads, self.num_keys), dtype=torch.float32)
            grad_cause = self.query.new_empty(self.cause.shape, dtype=torch.float32)
        self.shared |= {
            "grad_output": grad_output,
            **self.strides("grad_output", grad_output),
            "statistics": statistics,
            "delta": delta,
        }
        with self.current_device:
            self.backward_queries(output, grad_query)
            self.backward_keys(grad_key, grad_value, grad_weight)
            if grad_weight is not None:
                self.reduce_grad_cause(grad_weight, grad_cause)
        return grad_query, grad_key, grad_value, grad_cause

    def backward_keys(self, grad_key: Tensor, grad_value: Tensor, grad_weight: Tensor | None) -> None:
        tiles = self.configuration("backward_keys")
        blocks = ceil_div(self.max_keys, tiles.block_n)
        self.launch(
            backward_keys_kernel,
            self.batch * self.num_key_heads * blocks,
            tiles.options,
            key_mask=None if grad_weight is None else self.key_mask,
            grad_key=grad_key,
            grad_value=grad_value,
            grad_weight=grad_weight,
            num_blocks=blocks,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            NUM_STAGES=tiles.num_stages,
            CAUSE_GRAD=grad_weight is not None,
        )

    def backward_queries(self, output: Tensor, grad_query: Tensor) -> None:
        tiles = self.configuration("backward_queries")
        blocks = ceil_div(self.max_queries, tiles.block_m)
        self.launch(
            backward_queries_kernel,
            self.batch * self.num_heads * blocks,
            tiles.options,
            output=output,
            **self.strides("output", output),
            grad_query=grad_query,
            num_blocks=blocks,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            NUM_STAGES=tiles.num_stages,
        )

    def reduce_grad_cause(self, grad_weight: Tensor, grad_cause: Tensor) -> None:
        """Computes the gradient of cause from that of the weights `[B, H, K]`."""
        rows = self.cause_batch * self.cause_heads
        blocks = ceil_div(self.num_keys, weights.GRAD_CAUSE_KEYS)
        self.launch(
            weights.grad_cause_kernel,
            rows * blocks,
            {"num_warps": 4},
            grad_weight=grad_weight,
            head_strength=self.head_strength,
            grad_cause=grad_cause,
            strength=self.strength,
            cause_heads=self.cause_heads,
            num_rows=self.outer * self.num_heads // max(rows, 1),
            num_blocks=blocks,
            BLOCK=weights.GRAD_CAUSE_KEYS,
            ROWS=weights.GRAD_CAUSE_ROWS,
        )

    def launch(self, kernel: Any, programs: int, options: dict[str, Any], **own: Any) -> None:
        """Launch a kernel, its arguments in the order in which it has them: `own` by their names, and of `shared` those it takes.

        Args:
            options: what the compiler is told, as `num_warps`.

        Raises:
            RuntimeError: an argument that the kernel has and nobody gives, or the other way round.
        """
        names = _names(kernel.fn)
        named = self.shared | own
        if not (own.keys() <= names <= named.keys()):
            wrong = (own.keys() - names) | (names - named.keys())
            raise RuntimeError(
                f"empcause: {kernel.__name__} is launched with the wrong arguments: {', '.join(sorted(wrong))}"
            )
        if programs > 0:
            self.run(kernel, programs, tuple([named[name] for name in kernel.arg_names]), options)

    def run(self, kernel: Any, programs: int, arguments: tuple, options: dict[str, Any]) -> None:
        launch(kernel, programs, arguments, options, self.device)

    def architecture(self) -> int:
        return architecture(self.query.device)

    def configuration(self, kernel: str) -> Configuration:
        return configuration(kernel, self.head_dim, self.query.dtype, self.architecture(), self.threshold != 0)

    def strides(self, name: str, tensor: Tensor) -> dict[str, int]:
        """Returns the strides of batch, heads and rows, as the kernels name them."""
        batch, head, row = (0, tensor.stride(1), tensor.stride(0)) if self.packed else tensor.stride()[:3]
        return {f"{name}_batch_stride": batch, f"{name}_head_stride": head, f"{name}_row_stride": row}

    def new_rows(self, rows: int, heads: int) -> Tensor:
        """Laid out so that rows come before heads: `[B, N, H, D]` seen as `[B, H, N, D]`."""
        if self.packed:
            return self.query.new_empty((rows, heads, self.head_dim))
        return self.query.new_empty((self.outer, rows, heads, self.head_dim)).transpose(1, 2)

    def statistics_shape(self) -> tuple[int, ...]:
        shape = (self.num_heads, 2 if self.dtype == torch.float32 else 1, self.num_queries)
        return shape if self.packed else (self.outer, *shape)


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"empcause: {what}")


def _refuse(name: str, expected: str, tensor: Tensor) -> NoReturn:
    got = f"{_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
    raise RuntimeError(f"empcause: {name} must be {expected}, not {got}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _whole_rows(tensor: Tensor) -> Tensor:
    """The kernels read any strides but need whole rows; only other layouts are copied."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _current_device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@cache
def _names(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@cache
def architecture(device: torch.device) -> int:
    """Compute capability times 10; Triton's interpreter runs what sm_80 would."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
