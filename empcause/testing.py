"""Tests of a backend of `biased_attention`: random cases, what is right for them in fp64, and the rule that judges errors.

Whoever writes a backend registers it (CONTRIBUTING.md) and holds it to the rule:

    from empcause.testing import Case, assert_close

    assert_close(Case(queries=1, keys=300, dim=64, dtype=torch.bfloat16), "my_backend")

The rule (`disagreement`) measures errors against fp64 and bounds them by the errors of plain torch, which takes every step in the
dtype of the case.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from empcause.ops import biased_attention
from empcause.ops.philox import dropout_keep_mask
from empcause.ops.reference import biased_attention_reference, key_weights

NAMES = ("output", "grad query", "grad key", "grad value", "grad cause")
# The root mean square of a case is judged alone if it has this many query rows and keys, and elements of query and of key,
# since few errors have no typical size, and all errors of a row go together. Otherwise a batch is added, at most
# LARGEST_FACTOR times as large.
JUDGED_ROWS, JUDGED_ELEMENTS, LARGEST_FACTOR = 64, 512, 16
# With fewer columns a few extreme elements make the root mean square; where rows see fewer keys, torch subtracts equal terms
# without an error, and its own root mean square is no measure.
JUDGED_COLUMNS = JUDGED_KEYS = 8
_STRENGTH, _SEED = 0.8, 11
_LAYOUTS = ("BHND", "BNHD", "BHDN", "qkv")


@dataclass
class Case:
    """Arguments of one call of `biased_attention`, drawn at random by `make`.

    Attributes:
        batch, heads, key_heads, queries, keys, dim: sizes of query `[batch, heads, queries, dim]`, key and value
            `[batch, key_heads, keys, dim]`.
        dtype: of query, key and value.
        causal, dropout_p, query_offset: as in `biased_attention`.
        cause_shape: shape of cause, one letter per dimension: "BK", "1K", "BHK", "B1K", "1HK" or "11K", with B for `batch`, H for
            `heads`, K for `keys` and 1 for 1. None: no cause.
        masked: whether a `key_mask` takes out about 30 % of the keys.
        per_head: whether each head has a strength of its own.
        layout: order of the dimensions in memory, "BHND", "BNHD" or "BHDN" (whose rows are not contiguous); or "qkv", in which
            query, key and value are views of one fused projection, which needs `queries <= keys`.
        seed: of the random numbers.
        extra: further options of the call, which replace those that were drawn.
    """

    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    queries: int = 33
    keys: int = 33
    dim: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool = True
    dropout_p: float = 0.0
    cause_shape: str | None = "BK"
    masked: bool = False
    per_head: bool = False
    query_offset: int | None = None
    layout: str = "BHND"
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout not in _LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, not {self.layout!r}")

    def make(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], dict[str, Any]]:
        """Draw query, key, value and cause (fp32 in [-0.4, 1.1], or None) on the CPU, and the options of the call by name."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        def rows(heads: int, number: int) -> Tensor:
            if self.layout == "BNHD":
                return random(self.batch, number, heads, self.dim).transpose(1, 2)
            if self.layout == "BHDN":
                return random(self.batch, heads, self.dim, number).transpose(2, 3)
            return random(self.batch, heads, number, self.dim)

        if self.layout == "qkv":
            widths = [self.heads * self.dim, self.key_heads * self.dim, self.key_heads * self.dim]
            fused = random(self.batch, self.keys, sum(widths))
            query, key, value = (part.unflatten(-1, (-1, self.dim)).transpose(1, 2) for part in fused.split(widths, -1))
            query = query[:, :, self.keys - self.queries :]
        else:
            query = rows(self.heads, self.queries)
            key, value = rows(self.key_heads, self.keys), rows(self.key_heads, self.keys)
        cause = None
        if self.cause_shape is not None:
            sizes = {"B": self.batch, "H": self.heads, "K": self.keys, "1": 1}
            cause = torch.rand([sizes[letter] for letter in self.cause_shape], generator=generator) * 1.5 - 0.4
        options: dict[str, Any] = {
            "strength": _STRENGTH,
            "causal": self.causal,
            "dropout_p": self.dropout_p,
            "seed": _SEED,
        }
        if self.per_head:
            options["strength"] = torch.rand(self.heads, generator=generator)
        if self.masked:
            options["key_mask"] = torch.rand((self.batch, self.keys), generator=generator) > 0.3
        if self.query_offset is not None:
            options["query_offset"] = self.query_offset
        return (query, key, value, cause), options | self.extra


def gradients(
    call: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    grad_output: Tensor | None = None,
    number: int = 4,
) -> list[Tensor]:
    """Return the output of a call and the gradients of its arguments, detached.

    Args:
        call: a function of the tensors that returns the output.
        tensors: query, key, value and cause, or the first of these. What is None has no gradient.
        grad_output: gradient of the output, of its shape and dtype; None draws the same normal numbers for every call.
        number: how many of the tensors get a gradient, from the first on.
    """
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(index < number)
        for index, tensor in enumerate(tensors)
    ]
    output = call(*leaves)
    if grad_output is None:
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        grad_output = drawn.to(output.device, output.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad_output)]


def exact(case: Case) -> list[Tensor]:
    """Return output and gradients of the reference in fp64."""
    tensors, options = case.make()
    doubles = [None if tensor is None else tensor.double() for tensor in tensors]
    return gradients(lambda *leaves: biased_attention_reference(*leaves, **options)[0], doubles)


def measured(case: Case, backend: str, device: str = "cpu") -> list[Tensor]:
    """Return output and gradients of a backend, on the CPU.

    Args:
        backend: its name, as in `biased_attention`.
        device: computes; copies of the tensors on it have the strides that `Case.make` gave them.
    """
    tensors, options = case.make()
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}

    def call(*leaves: Any) -> Tensor:
        return biased_attention(*(_on(device, leaf) for leaf in leaves), **options, backend=backend).cpu()

    return gradients(call, tensors)


def _on(device: str, tensor: Any) -> Any:
    """Return the tensor on a device, with its strides even where it is a view into a larger buffer."""
    if tensor is None or tensor.device.type == torch.device(device).type:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def plain_torch(case: Case) -> list[Tensor]:
    """Return output and gradients of the paper's formula in plain torch, every step in the dtype of the case.

    Its errors are what rounding costs whoever takes these steps.
    """
    tensors, options = case.make()
    group = case.heads // case.key_heads

    def call(query: Tensor, key: Tensor, value: Tensor, cause: Tensor | None = None) -> Tensor:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query @ key.transpose(-1, -2) * case.dim**-0.5
        fp32 = torch.empty((), dtype=torch.float32)
        weight = key_weights(cause, options["strength"], options.get("key_mask"), case.batch, case.keys, fp32)
        weight = weight.expand(case.batch, case.heads, case.keys)[:, :, None].to(case.dtype)
        if case.causal:
            offset = case.keys - case.queries if case.query_offset is None else case.query_offset
            position = torch.arange(case.queries)[:, None] + offset
            logits = logits.masked_fill(torch.arange(case.keys) > position, float("-inf"))
        logits = logits.masked_fill(weight == 0, float("-inf"))
        dead = (logits == float("-inf")).all(-1, keepdim=True)
        probability = logits.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0) * weight
        total = probability.sum(-1, keepdim=True)
        probability = probability / torch.where(total == 0, 1.0, total)
        if case.dropout_p:
            shape = (case.batch, case.heads, case.queries, case.keys)
            probability = probability * dropout_keep_mask(_SEED, case.dropout_p, *shape) / (1 - case.dropout_p)
        return probability @ value

    return gradients(call, tensors)


def disagreement(
    truth: Sequence[Tensor],
    got: Sequence[Tensor],
    plain: Sequence[Tensor],
    dtype: torch.dtype,
    errors: Sequence[str] = ("largest", "root mean square"),
    few_keys: bool = False,
) -> str | None:
    """Say why results are less exact than they should be; None if they are exact enough.

    Two errors against fp64 count: the root of the mean square, which sees what is slightly wrong everywhere, and the largest,
    which sees what is wrong somewhere. Each may be twice that of plain torch in the same dtype, and its rounding unit.

    Args:
        truth: output and gradients (in the order of NAMES) in fp64; a row of the output is its last dimension.
        got: what is judged, in the same order.
        plain: the results of plain torch in `dtype`, in the same order.
        dtype: whose rounding unit counts.
        errors: the kinds of error that count.
        few_keys: whether every row sees so few keys that gradients are small differences of large terms.

    Returns:
        One sentence that names the first tensor that is wrong, its error and the bound.
    """
    rows, dim = truth[0][..., 0].numel(), truth[0].shape[-1]
    for name, expected, actual, usual in zip(NAMES, truth, got, plain, strict=False):
        if actual.shape != expected.shape:
            return f"{name}: shape {list(actual.shape)} in place of {list(expected.shape)}"
        if not expected.numel():
            continue
        if not actual.isfinite().all():
            return f"{name}: not finite"
        eps, size = torch.finfo(dtype).eps, _root_mean_square(expected)
        # Where all rows see a single key, gradients vanish but for the rounding of fp64. They are differences of equal terms of
        # the order of sqrt(dim), which torch subtracts without an error; the error of others has no typical size there.
        vanishes = size <= 1e-12
        # However small a gradient is, it is a difference of larger terms, which are rounded.
        terms = dim**0.5 if vanishes else 1.0
        if few_keys and name in ("grad key", "grad cause"):
            # It is a sum over rows of such differences, whose errors are independent. For a key they are scaled by dim^-1/2.
            summed = rows * truth[2].shape[-2] / expected.numel()
            terms = max(terms, (summed * dim) ** 0.5)
        measures = {"largest": (_largest, 8 * eps * max(_largest(expected), terms))}
        # Nor has it one where all of it comes from a single row's probabilities.
        if not vanishes and rows > 1:
            measures["root mean square"] = _root_mean_square, eps * size
        for kind in errors:
            if kind not in measures:
                continue
            measure, unit = measures[kind]
            error, bound = measure(actual.double() - expected), 2 * measure(usual.double() - expected) + unit
            if error > bound:
                return f"{name}: {kind} error {error:.3g}, allowed {bound:.3g}"
    return None


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def verdict(case: Case, backend: str, device: str = "cpu") -> str | None:
    """Say what is wrong with a backend on a case, by `disagreement`; None if nothing is.

    The root mean square of a small case is judged together with that of a larger batch, so that there are JUDGED_ROWS query rows
    and keys, and JUDGED_ELEMENTS elements of query and of key. It is not judged with fewer than JUDGED_COLUMNS columns, nor where
    no row sees JUDGED_KEYS keys. A case with `extra` options, which fit its own batch, is judged alone.
    """

    def results(case: Case) -> tuple[list[Tensor], ...]:
        return exact(case), measured(case, backend, device), plain_torch(case)

    rows, key_rows = case.batch * case.heads * case.queries, case.batch * case.key_heads * case.keys
    share = min(min(rows, case.batch * case.keys) / JUDGED_ROWS, min(rows, key_rows) * case.dim / JUDGED_ELEMENTS)
    offset = case.keys - case.queries if case.query_offset is None else case.query_offset
    seen = min(case.keys, case.queries + offset) if case.causal else case.keys
    few_keys = seen < JUDGED_KEYS
    few = case.dim < JUDGED_COLUMNS or few_keys
    truth, got, plain = results(case)
    if (not 0 < share < 1 or case.extra) and not few:
        return disagreement(truth, got, plain, case.dtype)
    wrong = disagreement(truth, got, plain, case.dtype, ["largest"], few_keys)
    if wrong is not None or few:
        return wrong
    larger = replace(case, batch=case.batch * min(LARGEST_FACTOR, math.ceil(1 / share)), seed=case.seed + 1000)
    truth, got, plain = (
        [torch.cat(parts) for parts in zip(alone, others, strict=True)]
        for alone, others in zip((truth, got, plain), results(larger), strict=True)
    )
    return disagreement(truth, got, plain, case.dtype, ["root mean square"])


def assert_close(case: Case, backend: str, device: str = "cpu") -> None:
    """Hold a backend to the rule on a case.

    Raises:
        AssertionError: `verdict` found something wrong.
    """
    wrong = verdict(case, backend, device)
    assert wrong is None, f"{backend} on {device}: {wrong}, {case}"
