"""Cases of the operator, shared by its tests: random arguments of any shape, and gradients of a backend."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from empcause.ops import biased_attention, biased_attention_varlen
from empcause.ops.reference import biased_attention_reference


@dataclass
class Case:
    """Arguments of one call; `make` draws the tensors."""

    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    queries: int = 33
    keys: int = 33
    dim: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool = True
    dropout_p: float = 0.0
    cause_shape: str | None = "BK"  # e.g. "1K", "BHK"; None: no cause
    masked: bool = False
    per_head: bool = False
    query_offset: int | None = None
    layout: str = "BHND"  # memory order; "qkv": views of one fused projection
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def make(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        if self.layout == "qkv":
            widths = [self.heads * self.dim, self.key_heads * self.dim, self.key_heads * self.dim]
            fused = random(self.batch, self.keys, sum(widths))
            query, key, value = (part.unflatten(-1, (-1, self.dim)).transpose(1, 2) for part in fused.split(widths, -1))
            query = query[:, :, self.keys - self.queries :]
        elif self.layout == "BNHD":
            query = random(self.batch, self.queries, self.heads, self.dim).transpose(1, 2)
            key = random(self.batch, self.keys, self.key_heads, self.dim).transpose(1, 2)
            value = random(self.batch, self.keys, self.key_heads, self.dim).transpose(1, 2)
        elif self.layout == "BHDN":  # rows that are not contiguous
            query = random(self.batch, self.heads, self.dim, self.queries).transpose(2, 3)
            key = random(self.batch, self.key_heads, self.dim, self.keys).transpose(2, 3)
            value = random(self.batch, self.key_heads, self.dim, self.keys).transpose(2, 3)
        else:
            query = random(self.batch, self.heads, self.queries, self.dim)
            key = random(self.batch, self.key_heads, self.keys, self.dim)
            value = random(self.batch, self.key_heads, self.keys, self.dim)
        cause = None
        if self.cause_shape is not None:
            sizes = {"B": self.batch, "H": self.heads, "K": self.keys, "1": 1}
            cause = torch.rand([sizes[letter] for letter in self.cause_shape], generator=generator) * 1.5 - 0.4
        options: dict[str, Any] = {"strength": 0.8, "causal": self.causal, "dropout_p": self.dropout_p, "seed": 11}
        if self.per_head:
            options["strength"] = torch.rand(self.heads, generator=generator)
        if self.masked:
            options["key_mask"] = torch.rand((self.batch, self.keys), generator=generator) > 0.3
        if self.query_offset is not None:
            options["query_offset"] = self.query_offset
        return (query, key, value, cause), options | self.extra


def gradients(call: Any, tensors: tuple[Tensor | None, ...], grad_seed: int = 3) -> list[Tensor]:
    """Output and the gradients of query, key, value and cause, all detached."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_(True) for tensor in tensors]
    output = call(*leaves)
    generator = torch.Generator().manual_seed(grad_seed)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad_output)]


def exact(case: Case) -> list[Tensor]:
    """The reference in fp64."""
    tensors, options = case.make()
    doubles = tuple(None if tensor is None else tensor.double() for tensor in tensors)
    return gradients(lambda *leaves: biased_attention_reference(*leaves, **options)[0], doubles)


def move(value: Any, device: str) -> Any:
    """Tensors to a device; everything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def measured(case: Case, backend: str, device: str = "cpu") -> list[Tensor]:
    """A backend on the same tensors, computed on a device."""
    tensors, options = case.make()
    options = {name: move(value, device) for name, value in options.items()}

    def call(*leaves: Tensor) -> Tensor:
        return biased_attention(*(move(leaf, device) for leaf in leaves), **options, backend=backend).cpu()

    return gradients(call, tensors)


def plain_torch(case: Case) -> list[Tensor]:
    """The formula in plain torch, every step in the case's own dtype: the yardstick of rounding errors."""
    (query, key, value, cause), options = case.make()
    group = case.heads // case.key_heads

    def call(query: Tensor, key: Tensor, value: Tensor, cause: Tensor | None = None) -> Tensor:
        from empcause.ops.philox import dropout_keep_mask
        from empcause.ops.reference import key_weights

        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query @ key.transpose(-1, -2) * case.dim**-0.5
        weight = key_weights(
            cause,
            options["strength"],
            options.get("key_mask"),
            case.batch,
            case.keys,
            torch.empty((), dtype=torch.float32),
        )
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
            keep = dropout_keep_mask(11, case.dropout_p, *shape)
            probability = probability * keep / (1 - case.dropout_p)
        return probability @ value

    return gradients(call, (query, key, value, cause))


EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def assert_close(case: Case, backend: str, device: str = "cpu") -> None:
    """Errors against fp64, bounded by those of plain torch in the same precision and by its rounding unit."""
    truth, ours, plain = exact(case), measured(case, backend, device), plain_torch(case)
    names = ["output", "grad query", "grad key", "grad value", "grad cause"]
    for name, expected, got, usual in zip(names, truth, ours, plain, strict=False):
        assert got.shape == expected.shape, name
        if not expected.numel():
            continue
        # However small a gradient is, it is a difference of terms like grad_output . value, of order sqrt(dim) here.
        scale = max(float(expected.abs().max()), case.dim**0.5)
        error = float((got.double() - expected).abs().max())
        usual_error = float((usual.double() - expected).abs().max())
        bound = 2 * usual_error + 8 * EPSILON[case.dtype] * scale
        assert error <= bound, f"{name}: error {error:.3g}, plain torch {usual_error:.3g}, bound {bound:.3g}, {case}"


def pack(tensor: Tensor, lengths: list[int]) -> Tensor:
    """Rows of `[B, H, N, D]` (or `[B, N]`) up to each length, one after another."""
    if tensor.dim() == 2:
        return torch.cat([tensor[index, :length] for index, length in enumerate(lengths)])
    return torch.cat([tensor[index, :, :length].transpose(0, 1) for index, length in enumerate(lengths)])


def raw_arguments(
    namespace: str, name: str, packed: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of a raw operator by name, all tensors among them but sums where nothing is packed, with what its forward pass
    left if it is the backward one."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, rows: int) -> Tensor:
        shape = (rows, heads, 8) if packed else (3, heads, rows, 8)
        return torch.randn(shape, generator=generator).to(dtype)

    query, key, value = random(4, 5), random(2, 7), random(2, 7)
    keys = (7,) if packed else (3, 7)
    arguments: dict[str, Any] = {"query": query, "key": key, "value": value}
    cause = torch.rand((4, 7) if packed else (3, 7), generator=generator)
    arguments |= {"cause": cause, "strength": 1.0, "head_strength": torch.rand(4, generator=generator)}
    arguments |= {"key_mask": torch.ones(keys, dtype=torch.bool)}
    arguments |= {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": 0, "max_seqlen_k": 0}
    if packed:
        sums = (torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32))
        arguments |= {"cu_seqlens_q": sums[0], "cu_seqlens_k": sums[1], "max_seqlen_q": 3, "max_seqlen_k": 4}
    arguments |= {
        "causal": True,
        "scale": 0.5,
        "dropout_p": 0.1,
        "seed": torch.tensor(3),
        "query_offset": torch.tensor(2),
    }
    arguments = {name: move(value, device) for name, value in arguments.items()}
    if not name.endswith("backward"):
        return arguments | {"for_backward": True}
    results = getattr(torch.ops, namespace).attention(**arguments, for_backward=True)
    left = dict(zip(("output", "rounding", "statistics"), results, strict=True))
    return {"grad_output": torch.ones_like(left["output"]), **arguments, **left, "cause_grad": True}


__all__ = [
    "Case",
    "assert_close",
    "biased_attention_varlen",
    "exact",
    "gradients",
    "measured",
    "move",
    "pack",
    "plain_torch",
    "raw_arguments",
]
