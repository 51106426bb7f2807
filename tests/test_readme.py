"""The README: what it shows runs as it stands there, and its figures are those of the committed measurements."""

import csv
import math
import re
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_one_call_replaces_the_formula():
    """The five lines of plain torch and the call after them give the same output and the same four gradients."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
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


def test_the_lines_for_an_own_model(tiny_gpt2_dir):
    """They run as they stand, with a tiny model in the place of GPT-2; the marked word changes what the model computes."""
    [lines] = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "emphasis" in block)
    assert lines.count('"gpt2"') == 2
    names: dict = {}
    exec(lines.replace('"gpt2"', repr(str(tiny_gpt2_dir))), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    marked = names["inputs"]["input_ids"][0, names["causes"][0] > 0]
    assert names["tokenizer"].decode(marked).strip() == "grandmother"


def speed_ups(path: Path, dtype: str, direction: str) -> list[float]:
    """By length: the time of the fastest other way to compute the same function, divided by ours."""
    found = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            is_length = re.fullmatch(rf"GPT-2 [\dx]+, {dtype}", row["case"]) and row["direction"] == direction
            if is_length and row["same_function"] == "True" and row["time / empcause cpu"]:
                found[row["case"]].append(float(row["time / empcause cpu"]))
    return [min(ratios) for ratios in found.values()]


def test_the_table_of_speed_ups_is_that_of_the_measurements():
    """Geometric mean over seven lengths, and the smallest of the seven, from the file that a row of the table links."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:1] == "|"]
    table = [row for row in rows if row[1] in ("fp32", "bf16")]
    assert len(table) == 4
    results = ROOT
    for processor, precision, *cells in table:
        if processor:
            results = ROOT / re.search(r"\((.*?)\)", processor)[1]
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
        directions = ("forward", "forward+backward", "forward+backward+cause")
        for direction, cell in zip(directions, cells, strict=True):
            ratios = speed_ups(results, dtype, direction)
            assert len(ratios) == 7
            assert cell == f"{math.prod(ratios) ** (1 / 7):.1f} ({min(ratios):.1f})"
