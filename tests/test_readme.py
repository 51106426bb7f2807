"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_one_call_replaces_the_formula():
    """The five lines of plain torch and the call after them give the same output and the same four gradients."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    formula, call = (block for block in blocks if "output =" in block and "generate" not in block)
    assert len(formula.strip().splitlines()) == 5
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(2, 3, 20, 16, generator=generator) for name in ("query", "key", "value")}
    tensors["cause"] = torch.rand(2, 20, generator=generator)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    results = []
    for code in (formula, call):
        names = {"torch": torch, "strength": 0.5, **leaves}
        exec(code, names)
        output = names["output"]
        results.append([output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert results[0][-1].abs().max() > 1e-3  # the cause matters here
