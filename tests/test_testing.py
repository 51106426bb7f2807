"""The rule that judges backends sees what is wrong, in small cases too, and can be used without pytest."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from empcause import testing
from empcause.testing import Case, assert_close, exact, measured, verdict

CASES = {
    "several rows": Case(),
    "one row": Case(batch=1, heads=1, key_heads=1, queries=1, keys=40),
    "few keys": Case(keys=3, queries=3),
    "bf16": Case(dtype=torch.bfloat16),
    "options of its own": Case(extra={"strength": 0.3}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_by_a_few_rounding_units_is_seen(name, monkeypatch):
    case = CASES[name]
    assert verdict(case, "reference") is None
    right, eps = testing.biased_attention, torch.finfo(case.dtype).eps
    monkeypatch.setattr(testing, "biased_attention", lambda *x, **y: right(*x, **y) * (1 + 40 * eps))
    with pytest.raises(AssertionError, match=r"^reference on cpu: output: .* error .*, allowed .*, Case\("):
        assert_close(case, "reference")


def test_a_small_error_everywhere_is_seen_in_a_small_case(monkeypatch):
    right = testing.biased_attention
    monkeypatch.setattr(testing, "biased_attention", lambda *x, **y: right(*x, **y) * (1 + 6 * 2.0**-23))
    assert "root mean square" in verdict(CASES["one row"], "reference")
    assert verdict(CASES["few keys"], "reference") is None, "there the root mean square is no measure"


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout must be one of BHND, BNHD, BHDN, qkv, not 'NHD'"):
        Case(layout="NHD")


@pytest.mark.parametrize("layout", ["BHND", "BNHD", "BHDN", "qkv"])
def test_layouts_are_of_the_same_shapes(layout):
    case = Case(layout=layout, queries=20)
    (query, key, value, cause), _ = case.make()
    assert [tensor.shape for tensor in (query, key, value)] == [(2, 4, 20, 16), (2, 2, 33, 16), (2, 2, 33, 16)]
    assert cause.shape == (2, 33)
    for got, expected in zip(measured(case, "reference"), exact(case), strict=True):
        assert got.shape == expected.shape


def test_a_case_is_drawn_from_its_seed():
    first, again, other = (Case(seed=seed).make()[0][0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert replace(Case(), seed=1) == Case(seed=1)


def test_it_does_not_need_pytest():
    code = "import sys; sys.modules['pytest'] = None; import empcause.testing"
    subprocess.run([sys.executable, "-c", code], check=True)
