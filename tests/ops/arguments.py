"""Arguments for tests of the operator: packed rows, tensors on a device, and the arguments of a raw operator."""

from typing import Any

import torch
from torch import Tensor


def move(value: Any, device: str) -> Any:
    """Return a tensor on a device, and anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def pack(tensor: Tensor, lengths: list[int]) -> Tensor:
    """Pack the first `lengths[i]` rows of each sequence i of `[B, H, N, D]` into `[sum, H, D]`, or of `[B, N]` into `[sum]`."""
    if tensor.dim() == 2:
        return torch.cat([tensor[index, :length] for index, length in enumerate(lengths)])
    return torch.cat([tensor[index, :, :length].transpose(0, 1) for index, length in enumerate(lengths)])


def raw_arguments(
    namespace: str, name: str, packed: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return the arguments of a raw operator by name.

    Every tensor argument is given, the prefix sums only for packed sequences. The results that a backward operator takes are
    computed with the forward operator.

    Args:
        namespace: the namespace of the operators in `torch.ops`, for example "empcause_cpu".
        name: "attention" or "attention_backward".
    """
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
    left = dict(zip(("output", "rounding", "statistics", "weights"), results, strict=True))
    return {"grad_output": torch.ones_like(left["output"]), **arguments, **left, "cause_grad": True}
