"""Arguments of the operator that have no meaning, or another meaning than they seem to have, are refused."""

import math

import numpy as np
import pytest
import torch

from empcause.ops import biased_attention, biased_attention_varlen
from faults.kinds import Guard, fault

OPERATOR, PACKED = "empcause/ops/attention.py", "empcause/ops/varlen.py"
BACKENDS = ("cpu", "reference")


def padded():
    """Return query, key, value and cause of 2 sequences of 5 rows, as arguments of the operator."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    return {"query": query, "key": key, "value": value, "cause": torch.rand(2, 5, generator=generator)}


def packed(sums=(0, 4, 10), longest=6):
    """Return the rows of `padded` as arguments of the packed operator, in sequences with these prefix sums."""
    inputs = padded()
    rows = {name: inputs[name].transpose(1, 2).flatten(0, 1) for name in ("query", "key", "value")}
    starts = torch.tensor(sums, dtype=torch.int32)
    bounds = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return rows | {"cause": inputs["cause"].flatten()} | bounds


@fault(
    Guard(PACKED, "starts[0] != 0 or ", ""),
    Guard(PACKED, "starts[-1] != rows or ", ""),
    Guard(PACKED, " or min(lengths, default=0) < 0", ""),
    Guard(PACKED, "    if max(lengths, default=0) > longest:\n", "    if False:\n"),
    cause="sums of packed sequences that do not rise from 0 to the number of rows; a bound that a sequence exceeds",
    place="biased_attention_varlen on the CPU and on the reference",
    promise="refused; sums that hold give what each sequence gives alone",
)
def test_sums_of_packed_sequences():
    for backend in BACKENDS:
        for which in ("q", "k"):
            for sums in ((1, 4, 10), (0, 4, 9), (0, 4, 11), (0, 10, 4, 10), (0, -1, 10)):
                wrong = torch.tensor(sums, dtype=torch.int32)
                fine = torch.tensor([0, *[4] * (len(sums) - 2), 10], dtype=torch.int32)
                arguments = packed(longest=11) | {
                    "cu_seqlens_q": fine,
                    "cu_seqlens_k": fine,
                    f"cu_seqlens_{which}": wrong,
                }
                with pytest.raises(RuntimeError, match=f"cu_seqlens_{which} must rise from 0 to the"):
                    biased_attention_varlen(**arguments, backend=backend)
            with pytest.raises(RuntimeError, match="max_seqlen_"):
                biased_attention_varlen(**packed() | {f"max_seqlen_{which}": 5}, backend=backend)
        arguments = packed()
        output = biased_attention_varlen(**arguments, backend=backend)
        for first, last in ((0, 4), (4, 10)):
            rows = (arguments[name][first:last].transpose(0, 1)[None] for name in ("query", "key", "value"))
            alone = biased_attention(*rows, arguments["cause"][None, first:last], backend=backend)
            torch.testing.assert_close(output[first:last], alone[0].transpose(0, 1))


@fault(
    Guard(OPERATOR, "        if not isinstance(sums, Tensor) or sums.device != device:\n", "        if False:\n"),
    Guard(OPERATOR, "        if not _is_integer(longest) or longest < 0:\n", "        if False:\n"),
    cause="sums of packed sequences on another device or in a list, bounds that are no lengths",
    place="biased_attention_varlen on every backend",
    promise="refused before foreign memory is read; numpy's integers count as integers",
)
def test_kinds_of_packed_arguments():
    expected = biased_attention_varlen(**packed(), backend="cpu")
    numpys = {"max_seqlen_q": np.int64(6), "max_seqlen_k": np.int32(6)}
    assert torch.equal(biased_attention_varlen(**packed() | numpys, backend="cpu"), expected)
    for backend in BACKENDS:
        for which in ("q", "k"):
            for sums in (
                torch.zeros(3, dtype=torch.int32, device="meta"),
                [0, 4, 10],
                np.array([0, 4, 10], dtype=np.int32),
            ):
                with pytest.raises(ValueError, match=f"cu_seqlens_{which} must be a tensor on cpu"):
                    biased_attention_varlen(**packed() | {f"cu_seqlens_{which}": sums}, backend=backend)
            for longest in (True, 6.0, -1, torch.tensor(6), None, "6"):
                with pytest.raises(ValueError, match=f"max_seqlen_{which} must be an int"):
                    biased_attention_varlen(**packed() | {f"max_seqlen_{which}": longest}, backend=backend)


@fault(
    Guard(OPERATOR, "    if causal is not True and causal is not False:\n", "    if False:\n"),
    Guard(OPERATOR, " or not -LARGEST_SCALE < scale < LARGEST_SCALE", ""),
    Guard(OPERATOR, "(type(scale) is float or _is_number(scale))", "True"),
    Guard(OPERATOR, "(type(dropout_p) is float or _is_number(dropout_p))", "True"),
    Guard(OPERATOR, "    if not _is_integer(value) or not -(2**bits) <= value < 2**bits:\n", "    if False:\n"),
    cause="options without meaning: a scale that is NaN or a tensor, an offset of 1.7, a seed of True, causal None",
    place="biased_attention on every backend",
    promise="refused by name, not rounded, guessed or stripped of its gradient; numpy's numbers count as numbers",
)
def test_options_without_meaning():
    wrong = {
        "causal": (None, 1, "no", torch.tensor(True)),
        "scale": (math.nan, math.inf, 1e39, "0.3", True, torch.tensor(0.3, requires_grad=True)),
        "dropout_p": (None, "0.1", True, torch.tensor(0.1), math.nan),
        "query_offset": (1.7, True, "1", 2**62, -(2**63), 2**64),
        "seed": (1.5, True, "1", 2**63, torch.Generator()),
    }
    right = {"scale": np.float32(0.5), "dropout_p": np.float64(0.25), "query_offset": np.int64(-1), "seed": np.int32(3)}
    plain = {name: value.item() for name, value in right.items()}
    for backend in BACKENDS:
        for name, values in wrong.items():
            for value in values:
                with pytest.raises(ValueError, match=f"^{name} must be "):
                    biased_attention(**padded(), **{"dropout_p": 0.1} | {name: value}, backend=backend)
        assert torch.equal(
            biased_attention(**padded(), **right, backend=backend),
            biased_attention(**padded(), **plain, backend=backend),
        )


@fault(
    Guard(OPERATOR, "        alike = alike and query.layout is key.layout is value.layout is DENSE\n"),
    Guard(OPERATOR, "    except (AttributeError, RuntimeError):", "    except ZeroDivisionError:"),
    Guard(OPERATOR, "    if dtype not in DTYPES:\n", "    if False:\n"),
    Guard(OPERATOR, "    if not isinstance(cause, Tensor) or cause.layout is not DENSE:\n", "    if False:\n"),
    Guard(OPERATOR, "    if not isinstance(key_mask, Tensor) or key_mask.layout is not DENSE:\n", "    if False:\n"),
    cause="lists, numpy arrays, sparse and nested tensors, dtypes that no backend computes with",
    place="biased_attention on every backend",
    promise="refused by name; negated views, parameters, expanded and empty tensors are taken as what they are",
)
def test_tensors_of_other_kinds():
    inputs = padded()
    names = ("query", "key", "value")
    changes = (
        *((name, inputs[name].tolist(), f"{name} must be a dense tensor, not list") for name in names),
        *((name, inputs[name].numpy(), f"{name} must be a dense tensor, not ndarray") for name in names),
        *(
            (name, inputs[name].to_sparse(), f"{name} must be a dense tensor, not of layout torch.sparse_coo")
            for name in names
        ),
        (
            "query",
            torch.nested.nested_tensor(list(inputs["query"]), layout=torch.jagged),
            "query must be a dense tensor, not nested",
        ),
        ("cause", inputs["cause"].numpy(), "cause must be a dense tensor or None, not ndarray"),
        ("cause", inputs["cause"].to_sparse(), "cause must be a dense tensor or None, not of layout torch.sparse_coo"),
        ("key_mask", [[True] * 5] * 2, "key_mask must be a dense tensor or None, not list"),
        (
            "key_mask",
            torch.ones(2, 5, dtype=torch.bool).to_sparse(),
            "key_mask must be a dense tensor or None, not of layout",
        ),
    )
    for backend in BACKENDS:
        for name, value, message in changes:
            with pytest.raises(ValueError, match=message):
                biased_attention(**inputs | {name: value}, backend=backend)
        for change in (
            torch.Tensor.to_sparse,
            torch.Tensor.numpy,
            torch.Tensor.cfloat,
            lambda x: x.to(torch.float8_e4m3fn),
        ):
            with pytest.raises(ValueError, match="must be"):
                biased_attention(**inputs | {name: change(inputs[name]) for name in names}, backend=backend)
        expected = biased_attention(**inputs, backend=backend)
        negated = {name: torch._neg_view(-tensor) for name, tensor in inputs.items()}
        assert torch.equal(biased_attention(**negated, backend=backend), expected)
        parameters = {name: torch.nn.Parameter(tensor) for name, tensor in inputs.items()}
        assert torch.equal(biased_attention(**parameters, backend=backend), expected)
        for rows in (0, 1):
            few = {name: tensor[:rows].expand(rows, *tensor.shape[1:]) for name, tensor in inputs.items()}
            assert torch.equal(biased_attention(**few, backend=backend), expected[:rows])
        assert biased_attention(**inputs | {"query": inputs["query"][:, :, :0]}, backend=backend).shape == (2, 4, 0, 8)
        nothing = {"key": inputs["key"][:, :, :0], "value": inputs["value"][:, :, :0], "cause": inputs["cause"][:, :0]}
        assert not biased_attention(**inputs | nothing, backend=backend).any()
